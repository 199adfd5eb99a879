"""Build encoders from random weights, and fine-tune them for two steps."""

from __future__ import annotations

import torch
from torch import nn

import e2e.encoders
import e2e.heads  # noqa: F401  (registers them)
from e2e.bags.bag import Bag
from e2e.encoders.base import ENCODERS, Encoder
from e2e.engine.model import MILModel
from e2e.heads.base import HEADS
from e2e.training.optim import build_optimizer, learning_rate
from tests.helpers.models import make_bag


def build(name: str, seed: int = 0, **options) -> Encoder:
    torch.manual_seed(seed)
    return ENCODERS.build(name, **({"pretrained": False} | options))


def images(count: int = 4, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def bag_of(pixels: torch.Tensor, sizes: tuple[int, ...], chunk: int = 4) -> Bag:
    bag = make_bag(sizes, chunk=chunk)
    bag.pixels.pixels = pixels
    return bag


def fine_tune(
    encoder: Encoder, *, side: int, lr: float, layer_decay: float = 1.0, steps: int = 3, **options
) -> tuple[list[float], MILModel, set[str]]:
    """Train on two bags; returns the loss before each step, the model, and which tensors moved."""
    torch.manual_seed(1)
    head = HEADS.build("abmil", encoder.dim, 2, embed_dim=16, dropout=0.0)
    model = MILModel(encoder, head, chunk=4, **options).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = build_optimizer(model, lr=lr, weight_decay=0.0, layer_decay=layer_decay)
    bag, losses = bag_of(images(7, side), (5, 2)), []
    for step in range(steps):
        for group in optimizer.param_groups:
            rate = learning_rate(step, peak=lr, warmup=0, steps=2 * steps)
            group["lr"] = rate * group["lr_scale"]
        logits = torch.cat([output.logits for output in model(bag, torch.device("cpu"))])
        loss = nn.functional.cross_entropy(logits, bag.target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.batch_norm.commit(lambda tensor: None, torch.tensor(True))
    after = model.state_dict()
    return losses, model, {k for k, v in before.items() if not torch.equal(v, after[k])}


def saved_bytes(encoder: Encoder, pixels: torch.Tensor) -> int:
    """What the graph of one pass holds, the weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encoder(pixels)
    assert features.requires_grad
    return sum(held.values())
