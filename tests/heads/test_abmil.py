"""ABMIL, mean and max pooling against formulas written out bag by bag in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head

B, N, D, C = 3, 7, 10, 4
SIZES = (7, 1, 4)


def bags(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    features = torch.randn(B, N, D, dtype=torch.float64)
    mask = torch.arange(N) < torch.tensor(SIZES).unsqueeze(1)
    return features.masked_fill(~mask.unsqueeze(-1), math.nan), mask


def build(name: str, **options: object) -> Head:
    torch.manual_seed(1)
    head = HEADS.build(name, D, C, **options).double().eval()
    for parameter in head.parameters():  # nothing stays at a 0 or a 1 that could hide a mistake
        nn.init.normal_(parameter, std=0.5)
    return head


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_abmil_is_the_papers_formula_on_each_bag_alone(gated, norm):
    head = build("abmil", embed_dim=6, attn_dim=5, gated=gated, norm=norm)
    p = dict(head.named_parameters())
    assert set(p) == {
        *(["project.0.weight", "project.0.bias"] if norm else []),
        *(f"project.{int(norm)}.{kind}" for kind in ("weight", "bias")),
        *("score.value.0.weight", "score.value.0.bias", "score.score.weight"),
        *(["score.gate.0.weight", "score.gate.0.bias"] if gated else []),
        *("classify.weight", "classify.bias"),
    }
    features, mask = bags()
    output = head(features, mask)
    for b, size in enumerate(SIZES):
        x = features[b, :size]
        if norm:
            x = layer_norm(x, p["project.0.weight"], p["project.0.bias"])
        linear = f"project.{int(norm)}"
        h = (x @ p[f"{linear}.weight"].T + p[f"{linear}.bias"]).clamp(min=0)
        hidden = (h @ p["score.value.0.weight"].T + p["score.value.0.bias"]).tanh()
        if gated:
            gate = h @ p["score.gate.0.weight"].T + p["score.gate.0.bias"]
            hidden = hidden / (1 + (-gate).exp())
        unnormalised = (hidden @ p["score.score.weight"].T).exp().squeeze(-1)
        attention = unnormalised / unnormalised.sum()
        logits = (attention @ h) @ p["classify.weight"].T + p["classify.bias"]
        torch.testing.assert_close(output.logits[b], logits, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(output.attention()[b, 0, :size], attention)


@pytest.mark.parametrize("embed_dim", [6, None])
@pytest.mark.parametrize("name", ["mean", "max"])
def test_mean_and_max_pool_the_patches_logits(name, embed_dim):
    head = build(name, embed_dim=embed_dim)
    p = dict(head.named_parameters())
    features, mask = bags()
    output = head(features, mask)
    for b, size in enumerate(SIZES):
        h = features[b, :size]
        if embed_dim:
            h = (h @ p["project.0.weight"].T + p["project.0.bias"]).clamp(min=0)
        patch_logits = h @ p["classify.weight"].T + p["classify.bias"]
        pooled = patch_logits.sum(0) / size if name == "mean" else patch_logits.max(0).values
        torch.testing.assert_close(output.logits[b], pooled)
        if name == "max":
            torch.testing.assert_close(output.instance_logits[b, :size], patch_logits)
            assert (output.instance_logits[b, size:] == 0).all()
        else:
            assert (output.attention_logits[b, 0, :size] == 0).all()


def test_max_shares_the_gradient_of_a_tie():
    head = build("max", embed_dim=None)
    patch = torch.randn(1, 1, D, dtype=torch.float64)
    twice = patch.expand(1, 2, D).clone().requires_grad_()
    head(twice, torch.ones(1, 2, dtype=torch.bool)).logits.sum().backward()
    torch.testing.assert_close(twice.grad[0, 0], twice.grad[0, 1])
    assert twice.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["abmil", "mean", "max"])
def test_an_unknown_activation_names_the_nearest(name):
    with pytest.raises(UserError, match="unknown activation 'rellu'; did you mean 'relu'"):
        HEADS.build(name, D, C, act="rellu")
