"""gABMIL against its formula, written out patch by patch in NumPy, float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head

EACH = functools.partial(nn.functional.cross_entropy, reduction="none")
"""The loss of a classification task."""

D, C = 10, 4
SIZES = (7, 1, 4)


def build(**options: object) -> Head:
    torch.manual_seed(1)
    head = HEADS.build("gabmil", D, C, **options).double().eval()
    for parameter in head.parameters():  # nothing stays at a 0 or a 1 that could hide a mistake
        nn.init.normal_(parameter, std=0.3)
    return head


def by_hand(p: dict[str, NDArray], x: NDArray) -> tuple[NDArray, NDArray]:
    """Logits (C,) and attention (n,) of one bag."""
    projected, scores = [], []
    for patch in x:
        centred = patch - patch.mean()
        normal = centred / math.sqrt((centred**2).mean() + 1e-5)
        normal = normal * p["project.0.weight"] + p["project.0.bias"]
        h = np.maximum(p["project.1.weight"] @ normal + p["project.1.bias"], 0)
        value = np.tanh(p["score.value.0.weight"] @ h + p["score.value.0.bias"])
        gate = 1 / (1 + np.exp(-(p["score.gate.0.weight"] @ h + p["score.gate.0.bias"])))
        projected.append(h)
        scores.append(float(p["score.score.weight"][0] @ (value * gate)))
    attention = np.exp(scores) / np.exp(scores).sum()
    slide = sum(a * h for a, h in zip(attention, projected, strict=True))
    return p["classify.weight"] @ slide + p["classify.bias"], attention


def test_gabmil_is_the_gated_formula_of_width_384_on_each_bag_alone():
    head = build(embed_dim=6)
    p = {key: value.detach().numpy() for key, value in head.named_parameters()}
    assert p["score.value.0.weight"].shape == p["score.gate.0.weight"].shape == (384, 6)
    torch.manual_seed(0)
    features = torch.randn(len(SIZES), max(SIZES), D, dtype=torch.float64)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES).unsqueeze(1)
    output = head(features.masked_fill(~mask.unsqueeze(-1), math.nan), mask)
    for b, n in enumerate(SIZES):
        logits, attention = by_hand(p, features[b, :n].numpy())
        np.testing.assert_allclose(output.logits[b].detach(), logits, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(output.attention()[b, 0, :n].detach(), attention, rtol=1e-10)
    assert head.aux_loss(output, torch.zeros(len(SIZES), dtype=torch.long), EACH) is None


def test_gabmil_is_abmil_with_another_width():
    gated, plain = build(), HEADS.build("abmil", D, C, attn_dim=384).double().eval()
    plain.load_state_dict(gated.state_dict())
    features, mask = torch.randn(2, 5, D, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(gated(features, mask).logits, plain(features, mask).logits)


def test_the_gate_of_gabmil_is_no_option():
    with pytest.raises(UserError, match="no option 'gated'"):
        HEADS.build("gabmil", D, C, gated=False)


@pytest.mark.parametrize(("option", "value"), [("embed_dim", 6), ("attn_dim", 5), ("norm", False)])
def test_gabmils_options_reach_abmil(option, value):
    mine = HEADS.build("gabmil", D, C, **{option: value})
    reference = HEADS.build("abmil", D, C, **{"attn_dim": 384, option: value})
    assert {k: v.shape for k, v in mine.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
