"""A small encoder with all that can go wrong in a second pass, models with it, and bags of random pixels."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

import e2e.heads  # noqa: F401  (registers the heads)
from e2e.bags.bag import Bag, Chunk, PixelSource
from e2e.bags.chunk_plan import cut_update
from e2e.encoders.base import Encoder
from e2e.engine.model import MILModel
from e2e.heads.base import HEADS

CPU = torch.device("cpu")


SIZES = (7, 1, 12)


class SmallEncoder(Encoder):
    """Convolution, BatchNorm, dropout: all that can go wrong in a second pass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
        self.dim = 6
        self.pretrained = False
        self.net = nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(5, 6, 3),
        )

    def features(self, images: Tensor) -> Tensor:
        return self.net(images).mean((-2, -1))


class CountedPixels(PixelSource):
    """A pixel source over given pixels that remembers what was asked for."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.asked: list[tuple[int, int]] = []

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        self.asked.append((start, stop))
        return self.pixels[start:stop]


def make_bag(sizes=SIZES, chunk=5, weight=None, dtype=torch.float64, grouped=False) -> Bag:
    """Bags of random pixels, each in chunks of its own, or ``grouped`` as an update's are."""
    total = sum(sizes)
    generator = torch.Generator().manual_seed(1)
    offsets = [0, *accumulate(sizes)]
    groups = cut_update(sizes, chunk) if grouped else [cut_update([n], chunk)[0] for n in sizes]
    rows = [planned.num_patches for group in groups for planned in group]
    weight = torch.ones(len(sizes)) if weight is None else torch.tensor(weight)
    chunks = []
    for stop, count in zip(accumulate(rows), rows, strict=True):
        bag = next(k for k in range(len(sizes)) if offsets[k + 1] > stop - count)
        seed = 1000 * (11 + bag) + stop - count - offsets[bag]
        chunks.append(Chunk(stop - count, stop, seed, bool(weight[bag] > 0)))
    return Bag(
        offsets=tuple(offsets),
        chunks=tuple(chunks),
        coords=tuple(torch.zeros(n, 2, dtype=torch.int32) for n in sizes),
        pixels=CountedPixels(torch.rand(total, 3, 8, 8, generator=generator, dtype=dtype)),
        target=torch.arange(len(sizes)) % 2,
        slides=tuple(f"s{k}" for k in range(len(sizes))),
        seeds=tuple(range(11, 11 + len(sizes))),
        weight=weight,
        shards=((),) * len(sizes),
    )


def make_model(chunk: int = 5, *, head="abmilx", dropout=0.0, **options) -> MILModel:
    torch.manual_seed(0)
    head_options = {"embed_dim": 8, "dropout": dropout}
    head_options = {k: v for k, v in head_options.items() if k in HEADS.options(head)}
    encoder = SmallEncoder(dropout)
    model = MILModel(encoder, HEADS.build(head, 6, 2, **head_options), chunk=chunk, **options)
    with torch.no_grad():  # random weights would leave frozen BatchNorm the identity
        for tensor in (encoder.net[1].running_mean, encoder.net[1].running_var):
            tensor.uniform_(0.2, 0.6)
    return model.double().train()


def gradients(model: MILModel, bag: Bag) -> dict[str, Tensor]:
    model.zero_grad()
    logits = torch.cat([output.logits for output in model(bag, CPU)])
    losses = nn.functional.cross_entropy(logits, bag.target, reduction="none")
    (losses * bag.weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 distance over all tensors together."""
    assert a.keys() == b.keys()
    gap = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return float((gap / sum(b[k].double().square().sum() for k in b)).sqrt())
