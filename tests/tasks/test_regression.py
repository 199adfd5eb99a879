"""Numbers: scaled by the training slides, told back in their own unit."""

from __future__ import annotations

import pytest
import torch

import e2e.tasks  # noqa: F401
from e2e.errors import UserError
from e2e.tasks.base import TASKS


def fitted(**options):
    task = TASKS.build("regression", **options)
    task.fit([torch.tensor(v, dtype=torch.float64) for v in (10.0, 30.0, float("nan"))], ["c"] * 3)
    return task


@pytest.mark.parametrize(("loss", "expected"), [("mse", 4.0), ("mae", 2.0), ("huber", 1.5)])
def test_a_loss_by_hand_does_not_depend_on_the_unit(loss, expected):
    # Mean 20, standard deviation 10: a target of 40 is 2, the output 0 is 20.
    task = fitted(loss=loss)
    assert task.state() == {"mean": 20.0, "sd": 10.0}
    target = torch.tensor([40.0], dtype=torch.float64)
    assert task.loss(torch.zeros(1, 1), target).tolist() == [expected]
    assert task.predict(torch.tensor([[0.0], [2.0]])).tolist() == [[20.0], [40.0]]


def test_predictions_keep_their_digits_beside_a_large_mean():
    task = TASKS.build("regression")
    task.load_state({"mean": 1e9, "sd": 1.0})
    assert task.predict(torch.tensor([[0.25]])).item() == 1e9 + 0.25


@pytest.mark.parametrize("word", ["high", "inf", "nan", "3,5", "1e999"])
def test_a_word_that_is_no_number_is_named(word):
    with pytest.raises(UserError, match=f"'{word}' in column 'label' is not a number"):
        TASKS.build("regression").encode({"label": word})


def test_training_slides_that_are_all_alike_are_refused():
    with pytest.raises(UserError, match="1 different number"):
        TASKS.build("regression").fit([torch.tensor(2.0)] * 3, ["c"] * 3)
    with pytest.raises(UserError, match="1 different number"):  # their mean is not 0.1
        TASKS.build("regression").fit([torch.tensor(0.1, dtype=torch.float64)] * 3, ["c"] * 3)
    with pytest.raises(UserError, match="0 different number"):
        TASKS.build("regression").fit([], [])
