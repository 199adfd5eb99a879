"""Classification: words to targets and back, and a loss worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import e2e.tasks  # noqa: F401  (registers them)
from e2e.errors import UserError
from e2e.metrics.values import classification_metrics
from e2e.tasks.base import TASKS, Task

THREE = ["normal", "LUAD", "LUSC"]


def task(name: str = "classification", **options) -> Task:
    return TASKS.build(name, **({"classes": THREE} | options))


@pytest.fixture(params=["classification", "grading"])
def any_task(request: pytest.FixtureRequest) -> Task:
    return task(request.param)


def test_every_task_names_its_columns_outputs_and_metrics(any_task):
    assert any_task.columns == ("label",)
    assert any_task.output_names == tuple(THREE)
    assert any_task.num_outputs == 3
    metrics = any_task.metrics(np.eye(3), np.arange(3.0), np.ones((2, 3)))
    assert {any_task.monitor, any_task.tie_break_metric} <= metrics.keys()
    assert all(values.shape == (2,) for values in metrics.values())


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True))
def test_words_become_the_number_of_their_output(classes):
    built = task(classes=classes, column="diagnosis")
    targets = [built.encode({"diagnosis": word}) for word in classes]
    assert torch.stack(targets).tolist() == list(range(len(classes)))
    assert targets[0].dtype == torch.int64


def test_an_unknown_word_is_named_with_the_known_ones():
    with pytest.raises(UserError) as error:
        task().encode({"label": "luad"})
    assert str(error.value) == (
        "label 'luad' in column 'label' is not one of task.classes: normal, LUAD, LUSC"
    )


def test_the_loss_by_hand():
    # Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().expand(3, 3)
    loss = task().loss(logits, torch.tensor([0, 1, 2]))
    assert loss.tolist() == pytest.approx([math.log(8), math.log(4), math.log(8 / 5)])
    # Smoothing 0.3 takes 0.1 for each class: 0.8 of the true one's loss and 0.1 of the others'.
    smooth = task(label_smoothing=0.3).loss(logits[:1], torch.tensor([1]))
    expected = 0.8 * math.log(4) + 0.1 * (math.log(8) + math.log(8 / 5))
    assert smooth.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_probabilities_are_single_precision_even_of_half_logits(dtype):
    logits = torch.tensor([[12.0, -9.0, 3.0]], dtype=dtype)
    assert task().loss(logits, torch.tensor([1])).tolist() == pytest.approx([21.0001], abs=1e-3)
    probabilities = task().predict(logits)
    assert probabilities.dtype == torch.float32
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)
    assert probabilities.argmax().item() == 0


@pytest.mark.parametrize(
    ("name", "classes", "monitor"),
    [
        ("classification", ["a", "b"], "auc"),
        ("classification", THREE, "balanced_accuracy"),
        ("grading", ["0", "1", "2", "3"], "kappa_quadratic"),
    ],
)
def test_the_epoch_is_selected_by_the_metric_of_the_task(name, classes, monitor):
    assert task(name, classes=classes).monitor == monitor
    assert task(name, classes=classes, monitor="accuracy").monitor == "accuracy"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"classes": ["a"]}, "task.classes=['a'] must name two or more different classes"),
        (
            {"classes": ["a", "b", "a"]},
            "task.classes=['a', 'b', 'a'] must name two or more different classes",
        ),
        ({"label_smoothing": 1.0}, "task.label_smoothing=1 must be in [0, 1)"),
        ({"monitor": "acuracy"}, "task.monitor=acuracy; did you mean 'accuracy'?"),
        ({"monitor": "auc"}, "unknown metric task.monitor=auc"),  # three classes have none
        ({"class_weights": "balance"}, "task.class_weights=balance; did you mean 'balanced'?"),
        ({"focal_gamma": -1.0}, "task.focal_gamma=-1 must be a finite number of at least 0"),
    ],
)
def test_wrong_options_are_named(options, expected):
    with pytest.raises(UserError) as error:
        task(**options)
    assert expected in str(error.value)


def test_metrics_are_those_of_the_metrics_module():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(3), 20), rng.integers(0, 3, 20)
    weights = rng.random((4, 20))
    actual = task().metrics(probabilities, labels.astype(np.float64), weights)
    expected = classification_metrics(probabilities, labels, weights)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=1e-12)


def test_the_targets_of_a_split_are_described_in_a_line(any_task):
    targets = [torch.tensor(n) for n in (2, 0, 2)]
    assert any_task.describe(targets) == "'normal' 1, 'LUAD' 0, 'LUSC' 2"


def targets(*numbers: int) -> list[torch.Tensor]:
    return [torch.tensor(n) for n in numbers]


def test_balanced_weights_are_those_of_the_training_slides_and_1_in_the_mean():
    # 3, 2 and 1 of 6 slides: 6/9, 6/6, 6/3.
    balanced = task(class_weights="balanced")
    balanced.fit(targets(0, 0, 0, 1, 1, 2, -1), ["c"] * 7)
    assert balanced.state() == {"class_weights": {"normal": 2 / 3, "LUAD": 1.0, "LUSC": 2.0}}
    logits, three = torch.randn(3, 3), torch.tensor([0, 1, 2])
    expected = task().loss(logits, three) * torch.tensor([2 / 3, 1, 2])
    torch.testing.assert_close(balanced.loss(logits, three), expected)


def test_the_focal_factor_by_hand():
    # p = 1/4: (3/4)^2 log 4; a sure answer costs nothing, and its slope is finite for powers under 1.
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    focal = task(focal_gamma=2.0).loss(logits, torch.tensor([1]))
    assert focal.tolist() == pytest.approx([9 / 16 * math.log(4)])
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    task(focal_gamma=0.5).loss(sure, torch.tensor([0])).sum().backward()
    assert sure.grad.isfinite().all()


@pytest.mark.parametrize("numbers", [(), (1, 1, 1), (-1, 2)])
def test_training_slides_of_one_class_are_refused(numbers):
    with pytest.raises(
        UserError,
        match=r"(slides have label=|no training slide has a label).*needs slides of two or more classes",
    ):
        task().fit(targets(*numbers), ["c"] * len(numbers))


def test_a_class_that_is_absent_in_training_has_no_balanced_weight():
    task().fit(targets(0, 1), ["a", "b"])
    with pytest.raises(UserError, match=r"no training slide is of class LUSC, so .*balanced"):
        task(class_weights="balanced").fit(targets(0, 1), ["a", "b"])


def test_whole_numbers_that_were_saved_as_decimals_get_a_hint():
    with pytest.raises(UserError, match=r"label '1\.0' .*\n.* was saved as decimals"):
        task(classes=["0", "1"]).encode({"label": "1.0"})


def test_the_weights_of_other_classes_do_not_fit():
    with pytest.raises(KeyError):
        task().load_state({"class_weights": {"a": 1.0}})
