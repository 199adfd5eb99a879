"""Several labels: losses by hand, labels that are not known, codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import e2e.tasks  # noqa: F401
from e2e.errors import UserError
from e2e.tasks.base import TASKS

NAN = math.nan


def task(**options):
    return TASKS.build("multilabel", **({"labels": ["er", "pr", "her2"]} | options))


def test_a_loss_by_hand_is_the_mean_over_the_labels_with_0_for_those_not_known():
    # Probabilities 1/2, 3/4, anything: (log 2 + log 4) / 3.
    logits = torch.tensor([[0.0, math.log(3), 9.0]])
    target = torch.tensor([[1.0, 0.0, NAN]])
    assert task().loss(logits, target).item() == pytest.approx((math.log(2) + math.log(4)) / 3)


def test_the_asymmetric_loss_by_hand():
    # p = 3/4 present: (1/4)^1 (-log 3/4). p = 1/2 absent: q = 0.45, -0.45^2 log 0.55. p = 0.04: nothing.
    logits = torch.tensor([[math.log(3), 0.0, math.log(0.04 / 0.96)]])
    made = task(loss="asymmetric", gamma_positive=1.0, gamma_negative=2.0, shift=0.05)
    expected = (-math.log(0.75) / 4 - 0.45**2 * math.log(0.55)) / 3
    loss = made.loss(logits, torch.tensor([[1.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_gammas_and_shift_the_asymmetric_loss_is_the_plain_one():
    logits, target = torch.randn(5, 3) * 5, torch.randint(0, 2, (5, 3)).float()
    made = task(loss="asymmetric", gamma_positive=0.0, gamma_negative=0.0, shift=0.0)
    torch.testing.assert_close(made.loss(logits, target), task().loss(logits, target))


def test_words_become_labels_and_an_empty_cell_is_not_known():
    made = task(positive="pos", negative="neg")
    found = made.encode({"er": "Pos", "pr": "", "her2": "neg"})
    np.testing.assert_array_equal(found.numpy(), [1, NAN, 0])
    assert made.known(found)
    assert made.words(made.numbers(found)) == ["1", "", "0"]
    assert made.group(found) == 1
    with pytest.raises(UserError, match=r"'equivocal' in column 'pr' is neither task\.positive"):
        made.encode({"er": "pos", "pr": "equivocal", "her2": "neg"})


def test_a_label_that_is_the_same_on_all_training_slides_is_refused():
    rows = torch.tensor([[1.0, 0.0, NAN], [0.0, 0.0, NAN]])
    with pytest.raises(UserError, match="label 'pr' is absent on all training slides"):
        task().fit([*rows], ["a", "b"])
    with pytest.raises(UserError, match="label 'her2' is not known on all"):
        TASKS.build("multilabel", labels=["er", "her2"]).fit([*rows[:, [0, 2]]], ["a", "b"])


def test_labels_are_counted_by_name():
    rows = torch.tensor([[1.0, 0.0, NAN], [0.0, 0.0, 1.0]])
    assert task().describe([*rows]) == "er 1/2, pr 0/2, her2 1/1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": []}, "task.labels needs one or more"),
        ({"labels": ["a", "a"]}, "task.labels needs one or more different columns"),
        ({"shift": 1.0}, "task.shift must be in"),
        ({"positive": "pos"}, "task.negative must say which code means"),
        ({"monitor": "auc_erx"}, "did you mean 'auc_er'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UserError) as error:
        task(**options)
    assert said in str(error.value)
