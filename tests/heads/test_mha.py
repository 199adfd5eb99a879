"""One-query multi-head attention against its formula, written out in NumPy loops, float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head
from tests.helpers.kernels import Watch

EACH = functools.partial(nn.functional.cross_entropy, reduction="none")
"""The loss of a classification task."""

D, C = 10, 4
SIZES = (7, 1, 4)


def bags() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(len(SIZES), max(SIZES), D, dtype=torch.float64)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES).unsqueeze(1)
    return features.masked_fill(~mask.unsqueeze(-1), math.nan), mask


def build(**options: object) -> Head:
    torch.manual_seed(1)
    head = HEADS.build("mha", D, C, **options).double().eval()
    for parameter in head.parameters():  # nothing stays at a 0 or a 1 that could hide a mistake
        nn.init.normal_(parameter, std=0.5)
    return head


def by_hand(p: dict[str, NDArray], x: NDArray, heads: int) -> tuple[NDArray, NDArray]:
    """Logits (C,) and attention logits (heads, n) of one bag."""

    def linear(name: str, vector: NDArray) -> NDArray:
        return p[f"{name}.weight"] @ vector + p[f"{name}.bias"]

    hidden = [np.maximum(p["project.0.weight"] @ patch, 0) for patch in x]
    query = linear("query", p["token"])
    keys, values = ([linear(name, h) for h in hidden] for name in ("key", "value"))
    width = len(query) // heads
    scores, pooled = np.zeros((heads, len(x))), []
    for j in range(heads):
        own = slice(j * width, (j + 1) * width)
        for n in range(len(x)):
            scores[j, n] = query[own] @ keys[n][own] / math.sqrt(width)
        attention = np.exp(scores[j]) / np.exp(scores[j]).sum()
        pooled.append(sum(a * v[own] for a, v in zip(attention, values, strict=True)))
    slide = linear("merge", np.concatenate(pooled))
    centred = slide - slide.mean()
    slide = centred / math.sqrt((centred**2).mean() + 1e-6) * p["norm.weight"] + p["norm.bias"]
    return linear("classify", slide), scores


@pytest.mark.parametrize(("embed_dim", "heads"), [(6, 3), (6, 1), (16, 8)])
def test_mha_is_its_formula_on_each_bag_alone(embed_dim, heads):
    head = build(embed_dim=embed_dim, heads=heads)
    p = {key: value.detach().numpy() for key, value in head.named_parameters()}
    linears = ("query", "key", "value", "merge", "norm", "classify")
    assert set(p) == {"token", "project.0.weight"} | {
        f"{name}.{kind}" for name in linears for kind in ("weight", "bias")
    }
    features, mask = bags()
    output = head(features, mask)
    for b, n in enumerate(SIZES):
        logits, scores = by_hand(p, features[b, :n].numpy(), heads)
        np.testing.assert_allclose(output.logits[b].detach(), logits, rtol=1e-10, atol=1e-12)
        result = output.attention_logits[b, :, :n].detach()
        np.testing.assert_allclose(result, scores, rtol=1e-10, atol=1e-12)
    assert head.aux_loss(output, torch.zeros(len(SIZES), dtype=torch.long), EACH) is None


def test_mha_is_pytorchs_multi_head_attention():
    head = build(embed_dim=16, heads=4)
    reference = nn.MultiheadAttention(16, 4, batch_first=True).double()
    mine = (head.query, head.key, head.value)
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([layer.weight for layer in mine]),
            "in_proj_bias": torch.cat([layer.bias for layer in mine]),
            "out_proj.weight": head.merge.weight,
            "out_proj.bias": head.merge.bias,
        }
    )
    features, mask = bags()
    features = features.nan_to_num()
    x, query = head.project(features), head.token.expand(len(SIZES), 1, -1)
    slide, attention = reference(query, x, x, key_padding_mask=~mask, average_attn_weights=False)
    output = head(features, mask)
    torch.testing.assert_close(output.attention(), attention.squeeze(2))
    torch.testing.assert_close(output.logits, head.classify(head.norm(slide.squeeze(1))))


def test_mha_starts_from_a_tiny_query_and_keys_that_learn_all_the_same():
    torch.manual_seed(0)
    head = HEADS.build("mha", D, C, embed_dim=512)
    assert 0.9e-6 < head.token.std().item() < 1.1e-6
    features, mask = bags()
    output = head(features.float(), mask)
    output.logits.square().sum().backward()
    assert output.attention()[0].std(dim=-1).min() > 1e-5  # not flat
    assert head.key.weight.grad.norm() > 1e-4 * head.value.weight.grad.norm()


def test_mhas_key_bias_changes_no_attention():
    head = build(embed_dim=16)
    features, mask = bags()
    before = head(features, mask)
    nn.init.normal_(head.key.bias, std=3.0)
    torch.testing.assert_close(head(features, mask).logits, before.logits)
    assert not torch.allclose(head(features, mask).attention_logits, before.attention_logits)


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do(heads):
    with pytest.raises(
        UserError, match=rf"heads={heads} does not divide head.embed_dim=12\n.*\[1, 2, 3, 4, 6, 12"
    ):
        HEADS.build("mha", D, C, embed_dim=12, heads=heads)


def test_mha_holds_nothing_larger_than_the_patches_themselves():
    n = 2000
    head = HEADS.build("mha", 16, 2, embed_dim=32)
    features = torch.randn(2, n, 16, requires_grad=True)
    with Watch() as watch:
        head(features, torch.ones(2, n, dtype=torch.bool)).logits.sum().backward()
    assert watch.largest <= 2 * n * 32
