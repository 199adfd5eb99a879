"""Ordinal grading: losses by hand, and probabilities that keep the order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import e2e.tasks  # noqa: F401
from e2e.errors import UserError
from e2e.metrics.values import confusion, kappa
from e2e.tasks.base import TASKS

GRADES = ["0", "1", "2", "3"]


def task(loss: str, **options):
    return TASKS.build("grading", classes=GRADES, loss=loss, **options)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def softplus_inverse(x: float) -> float:
    return math.log(math.expm1(x))


def test_corns_loss_by_hand_is_the_likelihood_of_the_grade():
    # Passing the thresholds with 0.8, 0.5, 0.25, each given the one before.
    logits = torch.tensor([[logit(0.8), logit(0.5), logit(0.25)]]).expand(4, 3)
    chance = [0.2, 0.8 * 0.5, 0.8 * 0.5 * 0.75, 0.8 * 0.5 * 0.25]
    loss = task("corn").loss(logits, torch.arange(4.0))
    assert loss.tolist() == pytest.approx([-math.log(p) for p in chance], rel=1e-5)
    assert task("corn").predict(logits)[0].tolist() == pytest.approx(chance, rel=1e-5)


def test_corals_loss_by_hand_is_a_yes_or_no_for_every_threshold():
    above = (0.9, 0.6, 0.1)
    steps = [softplus_inverse(logit(a) - logit(b)) for a, b in itertools.pairwise(above)]
    logits = torch.tensor([[logit(above[0]), *steps]]).expand(4, 3)
    expected = [
        -sum(math.log(p if grade > k else 1 - p) for k, p in enumerate(above)) for grade in range(4)
    ]
    assert task("coral").loss(logits, torch.arange(4.0)).tolist() == pytest.approx(
        expected, rel=1e-5
    )
    chances = task("coral").predict(logits)[0].tolist()
    assert chances == pytest.approx([0.1, 0.3, 0.5, 0.1], rel=1e-5)


@pytest.mark.parametrize("loss", ["coral", "corn"])
@given(st.lists(st.floats(-50, 50), min_size=3, max_size=3))
def test_probabilities_are_a_distribution_that_keeps_the_order(loss, outputs):
    chances = task(loss).predict(torch.tensor([outputs]))[0]
    assert (chances >= -1e-6).all()
    assert float(chances.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("loss", ["coral", "corn"])
def test_the_grade_counts_the_thresholds_that_are_likelier_passed_than_not(loss):
    # The likeliest grade of the first is 0, yet 0.6 of the chance lies above.
    chances = np.array([[0.4, 0.3, 0.2, 0.1], [0.0, 0.1, 0.1, 0.8], [0.6, 0.2, 0.1, 0.1]])
    grades = np.array([1.0, 3.0, 2.0])
    result = task(loss).metrics(chances, grades, np.ones((1, 3)))
    table = confusion(np.array([1, 3, 0]), grades.astype(int), 4, np.ones((1, 3)))
    assert result["kappa_quadratic"] == kappa(table, 2)
    assert result["kappa"] == kappa(table, 0)
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert task(loss).heatmap_output([0.4, 0.3, 0.2, 0.1]) == (0, "1 (0.30)")
    assert task("ce").metrics(chances, grades, np.ones((1, 3)))["accuracy"] == pytest.approx(1 / 3)


def test_ordinal_targets_are_no_class_numbers_for_heads_that_ask():
    assert task("coral").encode({"label": "2"}).dtype == torch.float32
    assert task("ce").encode({"label": "2"}).dtype == torch.int64
    assert [task(loss).num_outputs for loss in ("ce", "coral", "corn")] == [4, 3, 3]


@pytest.mark.parametrize("loss", ["coral", "corn"])
def test_descent_on_the_loss_finds_the_grades(loss):
    torch.manual_seed(0)
    x, grades = torch.rand(64, 1), None
    grades = (x[:, 0] * 4).floor()
    layer, built = torch.nn.Linear(1, 3), task(loss)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.3)
    for _ in range(150):
        optimiser.zero_grad()
        built.loss(layer(x), grades).mean().backward()
        optimiser.step()
    chances = built.predict(layer(x)).detach().double().numpy()
    result = built.metrics(chances, grades.double().numpy(), np.ones((1, 64)))
    assert result["kappa_quadratic"] > 0.9


def test_smoothing_goes_with_cross_entropy_alone_and_losses_are_known():
    with pytest.raises(
        UserError, match=r"label_smoothing=0\.1 does not apply to task\.loss=corn\n.*loss=ce"
    ):
        task("corn", label_smoothing=0.1)
    with pytest.raises(UserError, match="did you mean 'coral'"):
        task("corall")
