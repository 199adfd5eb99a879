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
    built = task(loss="asymmetric", gamma_positive=1.0, gamma_negative=2.0, shift=0.05)
    expected = (-math.log(0.75) / 4 - 0.45**2 * math.log(0.55)) / 3
    loss = built.loss(logits, torch.tensor([[1.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_gammas_and_shift_the_asymmetric_loss_is_the_plain_one():
    logits, target = torch.randn(5, 3) * 5, torch.randint(0, 2, (5, 3)).float()
    built = task(loss="asymmetric", gamma_positive=0.0, gamma_negative=0.0, shift=0.0)
    torch.testing.assert_close(built.loss(logits, target), task().loss(logits, target))


def balanced(**options):
    """er: 1 of 4 slides; pr: 3 of 4; her2: 1 of 2 where it is known."""
    rows = [[1.0, 1.0, NAN], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, NAN]]
    built = task(class_weights="balanced", **options)
    built.fit([torch.tensor(row) for row in rows], [*"abcd"])
    return built


def test_balanced_weights_are_those_of_the_training_slides_of_each_label_and_1_in_the_mean():
    weights = {"er": [4 / 6, 4 / 2], "pr": [4 / 2, 4 / 6], "her2": [1.0, 1.0]}
    assert balanced().state() == {"class_weights": weights}
    logits, target = torch.randn(3), torch.tensor([1.0, 0.0, NAN])
    for loss in ("bce", "asymmetric"):
        each = torch.stack(
            [
                task(loss=loss).loss(logits[None], torch.where(own, target, NAN)[None])[0]
                for own in torch.eye(3, dtype=torch.bool)
            ]
        )
        expected = each @ torch.tensor([2.0, 2.0, 1.0])
        result = balanced(loss=loss).loss(logits[None], target[None])[0]
        torch.testing.assert_close(result, expected)


def test_runs_from_before_class_weights_have_none_and_the_weights_of_other_labels_do_not_fit():
    task().load_state({})
    assert task().state() == {}
    for state in ({}, {"class_weights": {"a": [1.0, 1.0]}}):
        with pytest.raises(KeyError):
            task(class_weights="balanced").load_state(state)


def test_words_become_labels_and_an_empty_cell_is_not_known():
    built = task(positive="pos", negative="neg")
    result = built.encode({"er": "Pos", "pr": "", "her2": "neg"})
    np.testing.assert_array_equal(result.numpy(), [1, NAN, 0])
    assert built.is_labelled(result)
    assert built.format_labels(built.target_values(result)) == ["1", "", "0"]
    assert built.group(result) == 1
    with pytest.raises(UserError, match=r"'equivocal' in column 'pr' is neither task\.positive"):
        built.encode({"er": "pos", "pr": "equivocal", "her2": "neg"})


def test_a_label_that_is_the_same_on_all_training_slides_is_refused():
    rows = torch.tensor([[1.0, 0.0, NAN], [0.0, 0.0, NAN]])
    with pytest.raises(UserError, match="label 'pr' is absent on all training slides"):
        task().fit([*rows], ["a", "b"])
    with pytest.raises(UserError, match="label 'her2' is missing on all"):
        TASKS.build("multilabel", labels=["er", "her2"]).fit([*rows[:, [0, 2]]], ["a", "b"])


def test_labels_are_counted_by_name():
    rows = torch.tensor([[1.0, 0.0, NAN], [0.0, 0.0, 1.0]])
    assert task().describe([*rows]) == "er 1/2, pr 0/2, her2 1/1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": []}, "task.labels=[] must name one or more"),
        ({"labels": ["a", "a"]}, "task.labels=['a', 'a'] must name one or more different columns"),
        ({"shift": 1.0}, "task.shift=1 must be in [0, 1)"),
        ({"class_weights": "balance"}, "task.class_weights=balance; did you mean 'balanced'?"),
        (
            {"positive": "pos"},
            "task.negative is missing, and cannot be inferred from the code 'pos'",
        ),
        ({"monitor": "auc_erx"}, "did you mean 'auc_er'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        task(**options)
    assert message in str(error.value)


def test_a_label_is_not_called_as_the_mean_of_all_is():
    with pytest.raises(UserError, match="'macro' is the name of the mean over labels"):
        TASKS.build("multilabel", labels=["macro", "b"])
