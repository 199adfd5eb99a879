"""Low-rank adapters against dense algebra, on ViTs of several families, through the whole engine."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.distributed import FileStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from e2e.encoders.base import ENCODERS
from e2e.encoders.lora import LoraLinear, add_lora, merge_lora
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import HEADS
from e2e.training.optim import build_optimizer
from tests.helpers.encoders import bag_of, build, fine_tune, images, saved_bytes

VIT = "vit_tiny_patch16_224"


def adapted(rank: int = 2, alpha: float = 6.0, bias: bool = True) -> LoraLinear:
    """A layer 5 -> 3 in float64 whose adapter is no longer zero."""
    torch.manual_seed(0)
    linear = nn.Linear(5, 3, bias=bias).double()
    linear.requires_grad_(False)
    layer = LoraLinear(linear, rank, alpha)
    nn.init.normal_(layer.lora_b)
    return layer


def stirred(model: nn.Module) -> nn.Module:
    """With adapters as after some training."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_b, std=0.1)
    return model


# --- one layer ---


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_its_dense_formula(bias):
    layer = adapted(bias=bias)
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    dense = layer.weight + (6.0 / 2) * layer.lora_b @ layer.lora_a
    expected = x @ dense.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_its_gradient_is_the_dense_ones_by_the_chain_rule():
    # W' = W + s B A, so dA = s B^T dW' and dB = s dW' A^T.
    layer = adapted()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    layer(x).pow(3).sum().backward()
    dense = (layer.weight + 3 * layer.lora_b @ layer.lora_a).detach().requires_grad_()
    y = x.detach().clone().requires_grad_()
    (y @ dense.T + layer.bias).pow(3).sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(layer.lora_a.grad, 3 * layer.lora_b.T @ dense.grad)
    torch.testing.assert_close(layer.lora_b.grad, 3 * dense.grad @ layer.lora_a.T)
    torch.testing.assert_close(x.grad, y.grad)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


@pytest.mark.parametrize("bias", [True, False])
def test_merging_gives_a_plain_layer_with_the_same_outputs(bias):
    layer = adapted(bias=bias)
    x = torch.randn(4, 5, dtype=torch.float64)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    assert merged.state_dict().keys() == ({"weight", "bias"} if bias else {"weight"})
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-13, atol=1e-13)


# --- a whole network ---


@torch.no_grad()
def test_the_first_step_starts_from_the_network_bit_by_bit(tmp_path):
    plain = build(VIT, img_size=32).eval()
    torch.save(plain.net.state_dict(), tmp_path / "w.pt")
    options = {"img_size": 32, "weights": str(tmp_path / "w.pt"), "lora_rank": 4, "lora_alpha": 9.0}
    encoder = build(VIT, seed=1, **options).eval()
    assert torch.equal(encoder(images(3, 32)), plain(images(3, 32)))
    base, adapters = plain.state_dict().keys(), encoder.state_dict().keys()
    assert adapters - base == {
        f"net.blocks.{k}.attn.{layer}.{part}"
        for k in range(12)
        for layer in ("qkv", "proj")
        for part in ("lora_a", "lora_b")
    }
    assert base <= adapters  # the weights keep their names beside the adapters


@torch.no_grad()
def test_a_state_dict_gives_the_same_network_again_and_merging_a_plain_one():
    encoder = stirred(build(VIT, img_size=32, lora_rank=4).double().eval())
    expected = encoder(images(3, 32))
    again = build(VIT, seed=7, img_size=32, lora_rank=4).double().eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(images(3, 32)), expected)
    merge_lora(encoder)
    plain = build(VIT, seed=9, img_size=32).double().eval()
    assert (plain(images(3, 32)) - expected).abs().max() > 0.1
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(plain(images(3, 32)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "targets", "layers"),
    [
        (VIT, ["qkv"], 12),
        (VIT, ["qkv", "mlp.fc1", "mlp.fc2"], 36),
        ("vit_small_patch14_dinov2", None, 24),
        ("deit3_small_patch16_224", None, 24),
        ("swin_tiny_patch4_window7_224", None, 24),
        ("eva02_base_patch14_224", None, 48),  # query, key and value apart
        ("vit_small_patch16_dinov3", None, 24),
        ("pvt_v2_b0", None, 24),
        ("beit_base_patch16_224", ["proj"], 12),
        ("vit_base_patch16_siglip_224", None, 24 + 3),  # attention pools, too
        ("convnext_tiny", ["fc1", "fc2"], 36),
    ],
)
def test_every_adapter_of_a_family_learns(name, targets, layers):
    with torch.device("meta"):
        encoder = build(name, lora_rank=2, lora_targets=targets).train()
    adapters = [m for m in encoder.modules() if isinstance(m, LoraLinear)]
    assert len(adapters) == layers
    side = encoder.net.pretrained_cfg["input_size"][-1]
    encoder(torch.empty(2, 3, side, side, device="meta")).sum().backward()
    learns = {n for n, p in encoder.named_parameters() if p.grad is not None}
    assert len(learns) == 2 * layers
    assert all(n.endswith(("lora_a", "lora_b")) for n in learns)
    assert learns == {n for n, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_an_attention_that_passes_its_layer_by_takes_no_adapter(name):
    with torch.device("meta"), pytest.raises(UserError, match=r"bypasses the adapter\n.*\[proj\]"):
        build(name, lora_rank=2)


def test_what_cannot_be_adapted_is_a_users_mistake():
    def refused(name: str, **options) -> str:
        with torch.device("meta"), pytest.raises(UserError) as error:
            build(name, **options)
        return str(error.value)

    assert "it has no linear layers" in refused("r18", lora_rank=4)
    message = refused("convnext_tiny", lora_rank=4)
    assert "is called qkv or q or" in message
    assert "  mlp.fc1" in message
    message = refused(VIT, lora_rank=4, lora_targets=["qkv", "value"])
    assert "is called value; it has:\n" in message
    assert "  attn.qkv" in message
    assert "lora_rank=-1 must be 1 or more" in refused(VIT, lora_rank=-1)
    net = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(UserError, match="leaves no layer"):
        add_lora(net, rank=1, alpha=None, targets=["0"])


def test_frozen_blocks_have_no_adapters_and_keep_no_activations():
    options = {"img_size": 32, "lora_rank": 2}
    few, all_blocks = build(VIT, freeze=7, **options), build(VIT, **options)
    adapted = {n.split(".")[2] for n, p in few.named_parameters() if p.requires_grad}
    assert adapted == {"6", "7", "8", "9", "10", "11"}
    sizes = [saved_bytes(e.train(), images(8, 32)) for e in (few, all_blocks)]
    assert sizes[0] < 0.6 * sizes[1]


def test_batch_norm_stands_still_under_adapters():
    encoder = build("mobilevit_xxs", lora_rank=2)
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    _, _, moved = fine_tune(encoder, side=64, lr=1e-3, batch_norm="chunk")
    names = {name for name in moved if name.startswith("encoder.")}
    assert len(names) == 2 * 2 * 9  # two layers of nine attentions
    assert all(name.endswith(("lora_a", "lora_b")) for name in names)


def test_recomputed_chunks_give_the_gradient_of_one_piece():
    def gradients(chunk: int, **options) -> dict[str, torch.Tensor]:
        encoder = stirred(build(VIT, img_size=32, lora_rank=2, drop_path=0.0))
        torch.manual_seed(0)
        head = HEADS.build("abmil", encoder.dim, 2, embed_dim=16, dropout=0.0)
        model = MILModel(encoder, head, chunk=chunk, **options).double().train()
        bag = bag_of(images(7, 32), (7,), chunk)
        model(bag, torch.device("cpu"))[0].logits.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    full, pieces, half = gradients(7), gradients(2), gradients(2, autocast=torch.bfloat16)
    assert full.keys() == pieces.keys() == half.keys()
    assert sum("lora" in name for name in full) == 48
    for name in full:
        torch.testing.assert_close(pieces[name], full[name], rtol=1e-9, atol=1e-12, msg=name)
    flat = [torch.cat([g.flatten() for g in result.values()]) for result in (full, half)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_a_large_vit_learns_through_its_adapters_alone():
    encoder = build("vit_base_patch16_224", img_size=32, lora_rank=4)
    losses, model, moved = fine_tune(encoder, side=32, lr=2e-3)
    assert losses[0] > losses[1] > losses[2]
    assert {n for n in moved if n.startswith("encoder.")} == {
        f"encoder.net.blocks.{k}.attn.{layer}.lora_{part}"
        for k in range(12)
        for layer in ("qkv", "proj")
        for part in "ab"
    }
    share = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    assert share / sum(p.numel() for p in model.encoder.parameters()) < 0.01


def test_adapters_and_groups_are_the_same_sharded(tmp_path, monkeypatch):
    def model() -> MILModel:
        encoder = stirred(build(VIT, img_size=32, lora_rank=2))
        torch.manual_seed(0)
        return MILModel(encoder, HEADS.build("abmil", encoder.dim, 2, dropout=0.0), chunk=4).train()

    def step(model: MILModel) -> tuple[list[tuple[float, float, int]], dict[str, torch.Tensor]]:
        optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, layer_decay=0.5)
        model(bag_of(images(7, 32), (7,)), torch.device("cpu"))[0].logits.sum().backward()
        optimizer.step()
        groups = [
            (g["lr_scale"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups
        ]
        full = {
            n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()
        }
        return groups, {n: p.detach() for n, p in full.items()}

    groups, weights = step(model())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # init_process_group replaces it
    init_process_group("gloo", store=FileStore(str(tmp_path / "ranks"), 1), rank=0, world_size=1)
    try:
        sharded, mesh = model(), init_device_mesh("cpu", (1,))
        for block in sharded.encoder.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded_groups, sharded_weights = step(sharded)
    finally:
        destroy_process_group()
    assert sharded_groups == groups
    assert sharded_weights.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(sharded_weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_rank_there_are_no_adapters():
    assert ENCODERS.options(VIT)["lora_rank"] == (int, 0)
    assert not any(isinstance(m, LoraLinear) for m in build(VIT).modules())
