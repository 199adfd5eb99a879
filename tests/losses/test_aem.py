"""Regularisers: the entropy of attention against its formula, weights over time, their place in a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import e2e.losses  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HeadOutput
from e2e.losses.base import REGULARISERS, Regulariser, Weight
from e2e.parallel import Strategy
from e2e.reports.predictions import attention_entropy
from e2e.tasks.base import TASKS
from e2e.training.losses import bag_losses
from tests.helpers.models import make_bag, make_model

SIZES = (6, 1, 4)
MAPS, N = 2, 9


def output(fill: float = -math.inf) -> HeadOutput:
    """Three bags, two maps; padding holds ``fill``."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(SIZES), MAPS, N, dtype=torch.float64)
    padding = torch.arange(N) >= torch.tensor(SIZES).unsqueeze(1)
    return HeadOutput(torch.zeros(len(SIZES), 2), logits.masked_fill(padding.unsqueeze(1), fill))


def by_hand(*, normalise: bool = False, top_k: int | None = None) -> list[float]:
    """Of each bag, patch by patch."""
    logits, result = output().attention_logits.numpy(), []
    for bag, size in enumerate(SIZES):
        maps = []
        for row in logits[bag, :, :size]:
            p = np.exp(row - row.max())
            p = np.sort(p / p.sum())[::-1][: top_k or size]
            p = p / p.sum()
            entropy = -sum(x * math.log(x) for x in p)
            maps.append(-entropy / math.log(len(p)) if normalise and len(p) > 1 else -entropy)
        result.append(sum(maps) / MAPS)
    return result


def aem(**options: object) -> Regulariser:
    return REGULARISERS.build("aem", weight=1.0, **options)


@pytest.mark.parametrize("name", REGULARISERS.names())
def test_every_option_has_a_default_and_a_text_in_the_docstring(name):
    described = REGULARISERS.describe(name)
    assert described.summary
    assert {"weight", "schedule", "warmup"} <= {option.name for option in described.options}
    for option in described.options:
        assert option.text, f"{name}: the option {option.name} is not in the Parameters section"
        assert not option.is_required


def value(regulariser: Regulariser, given: HeadOutput) -> Tensor:
    return regulariser(given, torch.zeros(len(given.logits)), None, torch.empty(0))


@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("normalise", [False, True])
def test_aem_is_the_negative_entropy_of_real_patches_meaned_over_maps(normalise, top_k):
    result = value(aem(normalise=normalise, top_k=top_k), output())
    expected = by_hand(normalise=normalise, top_k=top_k)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-14)


@given(st.integers(2, 50))
def test_aem_is_minus_log_n_for_uniform_attention_and_0_for_one_patch(n):
    uniform = HeadOutput(torch.zeros(1, 2), torch.full((1, 1, n), 7.0, dtype=torch.float64))
    assert value(aem(), uniform).item() == pytest.approx(-math.log(n))
    assert value(aem(normalise=True), uniform).item() == pytest.approx(-1)
    one = torch.full((1, 1, n), -1e4, dtype=torch.float64)
    one[..., 0] = 0
    assert value(aem(), HeadOutput(torch.zeros(1, 2), one)).item() == 0


@given(st.floats(-1e4, 1e4))
def test_aem_is_free_of_a_shift_of_the_logits(shift):
    moved = output()._replace(attention_logits=output().attention_logits + shift)
    torch.testing.assert_close(value(aem(), moved), value(aem(), output()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_step_against_aems_gradient_spreads_attention_and_leaves_padding_alone(top_k):
    given = output()
    leaf = given.attention_logits.requires_grad_()
    value(aem(top_k=top_k), given).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[leaf == -math.inf] == 0).all()
    before = leaf.softmax(-1).amax(-1)
    after = (leaf.detach() - 0.1 * leaf.grad).softmax(-1).amax(-1)
    assert (after[[0, 2]] < before[[0, 2]]).all()


def test_a_constant_weight_stays_a_cosine_falls_to_0_and_a_warm_up_begins_at_0():
    assert [Weight(0.1).at(t) for t in (0.0, 0.5, 1.0)] == [0.1, 0.1, 0.1]
    cosine = Weight(0.1, "cosine")
    assert [cosine.at(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.05, 0.0])
    warm = Weight(0.1, warmup=0.2)
    assert [warm.at(t) for t in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0.0, 0.05, 0.1, 0.1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "the weight of a loss must be a finite number of at least 0"),
        ({"weight": math.nan}, "the weight of a loss must be a finite number"),
        ({"weight": 1.0, "schedule": "cosinus"}, "must be constant or cosine, found 'cosinus'"),
        ({"weight": 1.0, "warmup": 1.0}, r"the warmup of a loss must be in \[0, 1\)"),
        ({"weight": 1.0, "top_k": 0}, "aem.top_k=0 must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        REGULARISERS.build("aem", **options)


def test_a_head_without_attention_is_refused_before_training():
    with pytest.raises(UserError, match="the head has no attention that is learned"):
        aem().check(HeadOutput(torch.zeros(1, 2)))
    fixed = torch.zeros(1, 1, 2)  # as the head "mean" has it
    with pytest.raises(UserError, match="the head has no attention that is learned"):
        aem().check(HeadOutput(torch.zeros(1, 2), attention_logits=fixed))
    aem().check(HeadOutput(torch.zeros(1, 2), attention_logits=fixed.requires_grad_()))


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_a_bags_loss_holds_the_regulariser_by_its_weight_at_this_moment(progress):
    task = TASKS.build("classification", classes=["a", "b", "c"])
    model, bag = make_model("abmil"), make_bag((5, 3))
    strategy = Strategy(torch.device("cpu"))
    strategy.setup(model, None, clip=None)
    plain = bag_losses(strategy, bag, task)
    outputs = model(bag, torch.device("cpu"))
    model.regularisers = nn.ModuleList([aem(schedule="cosine", normalise=True)])
    added = torch.cat([value(model.regularisers[0], one) for one in outputs])
    weight = (1 + math.cos(math.pi * progress)) / 2
    result = bag_losses(strategy, bag, task, progress)
    torch.testing.assert_close(result, plain + weight * added)
    assert (added < -0.5).all()


def test_the_attentions_entropy_of_a_prediction_is_1_when_uniform_and_0_on_one_patch():
    def of(*row: float) -> float | None:
        return attention_entropy(HeadOutput(torch.zeros(1, 2), torch.tensor([[[*row]]])))

    assert of(2.0, 2.0, 2.0) == pytest.approx(1)
    assert of(0.0, -200.0, -200.0) == pytest.approx(0)
    assert of(3.0) == 1
    half = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert of(math.log(3), 0.0) == pytest.approx(half)
    assert attention_entropy(HeadOutput(torch.zeros(1, 2))) is None
