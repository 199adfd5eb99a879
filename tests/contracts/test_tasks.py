"""The contract of a task, over all that are registered."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import e2e.tasks  # noqa: F401  (registers them)
from e2e.errors import UserError
from e2e.heads.base import HEADS
from e2e.parallel import Strategy
from e2e.tasks.base import TASKS, Task, choose_monitor, is_code, other_code
from e2e.training.losses import bag_losses
from tests.helpers.models import make_bag, make_model
from tests.helpers.tasks import EXAMPLES

VARIANTS = [
    *((name, {}) for name in EXAMPLES),
    ("classification", {"class_weights": "balanced", "focal_gamma": 2.0, "label_smoothing": 0.1}),
    ("classification", {"classes": ["low", "high"]}),
    ("grading", {"loss": "coral"}),
    ("grading", {"loss": "corn", "class_weights": "balanced"}),
    ("multilabel", {"loss": "asymmetric"}),
    ("multilabel", {"class_weights": "balanced"}),
    ("regression", {"loss": "huber"}),
    ("survival", {"loss": "cox"}),
    ("survival", {"loss": "cox", "ties": "breslow"}),
    ("survival", {"alpha": 0.4}),
]


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request) -> tuple[Task, list[torch.Tensor]]:
    """A fitted task and targets."""
    return fitted(*request.param)


def fitted(name: str, options: dict) -> tuple[Task, list[torch.Tensor]]:
    base, rows = EXAMPLES[name]
    task = TASKS.build(name, **(base | options))
    words = [row for row in rows if row.get("label") in (None, *task.output_names, *task.columns)
             or name == "regression"]  # fmt: skip
    targets = [task.encode(row) for row in words]
    task.fit(targets, [str(k) for k in range(len(targets))])
    return task, targets


def logits_of(task: Task, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, task.num_outputs, generator=generator)


def unlabelled(task: Task) -> torch.Tensor:
    return task.encode(dict.fromkeys(task.columns, ""))


def values_of(task: Task, targets, logits, *, draws: int = 2):
    predicted = task.predict(logits).double().numpy()
    numbers = np.array([task.numbers(t) for t in targets], np.float64)
    weights = np.ones((1 + draws, len(targets)))
    weights[1:, ::2] = 2
    return task.metrics(predicted, numbers, weights)


def test_every_task_has_an_example_here():
    assert set(EXAMPLES) == set(TASKS.names())


def test_a_loss_a_bag_in_single_precision_and_numbers_for_every_column(variant):
    task, targets = variant
    logits = logits_of(task, len(targets)).requires_grad_()
    losses = task.loss(logits, torch.stack(targets))
    assert losses.shape == (len(targets),)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert logits.grad.abs().sum() > 0
    predicted = task.predict(logits.detach())
    assert predicted.shape == (len(targets), len(task.prediction_columns))
    assert predicted.dtype in (torch.float32, torch.float64)
    assert len(task.label_columns) == len(task.words(task.numbers(targets[0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits_lose_nothing(variant, dtype):
    task, targets = variant
    for scale in (1.0, 100.0):
        half = (logits_of(task, len(targets)) * scale).to(dtype)
        wide, target = half.float().requires_grad_(), torch.stack(targets)
        losses = task.loss(wide, target)
        torch.testing.assert_close(task.loss(half, target), losses.detach(), rtol=0, atol=0)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert wide.grad.isfinite().all()
        assert task.predict(half).isfinite().all()


def test_a_bag_without_a_label_costs_nothing_and_changes_no_other(variant):
    task, targets = variant
    logits = logits_of(task, len(targets) + 1).requires_grad_()
    losses = task.loss(logits, torch.stack([unlabelled(task), *targets]))
    assert losses[0] == 0
    losses.sum().backward()
    assert logits.grad[0].abs().sum() == 0
    alone = task.loss(logits[1:].detach(), torch.stack(targets))
    torch.testing.assert_close(losses[1:].detach(), alone, rtol=1e-6, atol=1e-6)


def test_a_bag_without_a_label_is_in_no_metric(variant):
    task, targets = variant
    logits = logits_of(task, len(targets) + 2)
    more = [*targets, unlabelled(task), unlabelled(task)]
    found = values_of(task, more, logits)
    expected = values_of(task, targets, logits[: len(targets)])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)


def test_without_any_label_no_metric_is_defined(variant):
    task, _ = variant
    found = values_of(task, [unlabelled(task)] * 3, logits_of(task, 3))
    assert all(np.isnan(values).all() for values in found.values()), found


def test_the_epoch_is_selected_by_metrics_that_there_are(variant):
    task, targets = variant
    found = values_of(task, targets, logits_of(task, len(targets)))
    assert {task.monitor, task.tie_break} <= found.keys()
    assert all(values.shape == (3,) for values in found.values())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_a_metric_that_there_is_not_cannot_select_the_epoch(name, options):
    with pytest.raises(UserError, match=r"unknown metric in task.monitor: 'nonsense'"):
        TASKS.build(name, **(EXAMPLES[name][0] | options | {"monitor": "nonsense"}))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_what_training_told_a_task_is_saved_as_json_and_taken_up_again(name, options):
    task, targets = fitted(name, options)
    logits, target = logits_of(task, len(targets)), torch.stack(targets)
    fresh = TASKS.build(name, **(EXAMPLES[name][0] | options))
    fresh.load_state(json.loads(json.dumps(task.state())))
    assert fresh.state() == task.state()
    torch.testing.assert_close(
        fresh.loss(logits, target), task.loss(logits, target), rtol=0, atol=0
    )
    ours, theirs = (values_of(t, targets, logits) for t in (fresh, task))
    for metric, values in theirs.items():
        np.testing.assert_array_equal(ours[metric], values)


def test_what_the_kept_weights_say_of_the_training_slides_is_read_by_their_name(variant):
    task, targets = variant
    logits, numbers = logits_of(task, len(targets)), [task.numbers(t) for t in targets]
    predicted, cases = task.predict(logits).double().numpy(), [str(k) for k in range(len(targets))]
    if task.fits_predictions:
        task.fit_to_predictions("ema", predicted, np.array(numbers, np.float64), cases)
    assert task.predict(logits).shape == predicted.shape  # as in training
    json.dumps(task.state(), allow_nan=False)
    for kept in ("ema", "model"):
        told = task.of(kept)
        found = told.predict(100 * logits)
        assert found.shape == (len(targets), len(told.prediction_columns))
        assert found.isfinite().all()
        assert told.shown(found[0].tolist())[0] < task.num_outputs
        assert told.metrics(found.double().numpy(), np.array(numbers), np.ones((2, len(targets))))
    names = [set(values_of(task.of(kept), targets, logits)) for kept in ("ema", "model")]
    assert names[0] == names[1]  # of both kinds of weights a table has the same rows


def test_words_of_the_predictions_table_become_the_same_numbers(variant):
    task, targets = variant
    for target in [*targets, unlabelled(task)]:
        numbers = task.numbers(target)
        np.testing.assert_array_equal(np.array(task.read(task.words(numbers))), np.array(numbers))
        assert any(task.words(numbers)) == task.is_labelled(target)


def test_a_picture_shows_an_output_that_there_is_and_says_something(variant):
    task, _ = variant
    for values in task.predict(logits_of(task, 20)).tolist():
        output, said = task.shown(values)
        assert 0 <= output < task.num_outputs
        assert said


def test_what_is_shown_of_a_patch_is_what_would_be_shown_of_a_slide_that_is_this_patch(variant):
    task, _ = variant
    logits = logits_of(task, 6)
    for predicted in task.predict(logits).tolist():
        found = task.of_patches(logits, predicted)
        assert found.shape == (6,)
        columns = [
            n for n, of_all in enumerate(task.predict(logits).T) if torch.equal(of_all, found)
        ]
        assert columns
        said = task.shown(predicted)[1]
        numbers = {f"{predicted[n]:{form}}" for n in columns for form in (".2f", ".3g", ".4g")}
        assert said == "none" or any(number in said for number in numbers)


def test_slides_are_told_in_a_line_and_have_a_kind(variant):
    task, targets = variant
    assert task.describe(targets)
    assert task.describe([])
    assert {type(task.group(t)) for t in [*targets, unlabelled(task)]} == {int}


def test_epochs_are_compared_by_the_metric_whichever_way_it_is_better():
    task = TASKS.build("regression")
    assert (task.monitor, task.tie_break) == ("rmse", "mae")
    small, large = ({"rmse": v, "mae": 0.3} for v in (1.0, 2.0))
    assert (
        task.selection_key(small)
        > task.selection_key(large)
        > task.selection_key({"rmse": None, "mae": 0.1})
    )
    assert task.selection_key(small) > task.selection_key(small | {"mae": 0.4})
    up = TASKS.build("regression", monitor="r2")
    assert up.selection_key({"r2": 0.9, "mae": 1}) > up.selection_key({"r2": 0.5, "mae": 0})


@pytest.mark.parametrize("head", ["clam_sb", "dsmil", "dtfd", "mean"])
def test_heads_with_losses_of_their_own_take_a_task_or_say_why_not(variant, head):
    task, targets = variant
    model = make_model(head=head)
    model.head = HEADS.build(head, 6, task.num_outputs).double()
    strategy = Strategy(torch.device("cpu"))
    strategy.setup(model, None, clip=None)
    bag = replace(make_bag((5, 3, 4)), target=torch.stack(targets[:3]))
    numbers = torch.stack(targets).dtype is torch.int64
    refused = (head == "clam_sb" and not numbers) or (
        head in ("dsmil", "dtfd") and task.whole_update
    )
    if refused:
        with pytest.raises(UserError, match=r"class number a slide|compares all bags of an update"):
            bag_losses(strategy, bag, task)
    else:
        losses = bag_losses(strategy, bag, task)
        assert losses.isfinite().all()
        losses.sum().backward()


def test_codes_are_the_same_text_or_the_same_number():
    assert is_code("1.0", "1")
    assert is_code("DECEASED", "Deceased")
    assert not is_code("10", "1")
    assert not is_code("1:dead", "1")
    assert other_code("censored", "1", "", "censored") == "0"
    with pytest.raises(UserError, match=r"task\.censored must say which code means censored"):
        other_code("censored", "dead", "", "censored")
    with pytest.raises(UserError, match="and its opposite"):
        other_code("censored", "1", "1.0", "censored")


def test_an_unknown_metric_is_refused_with_the_nearest_one():
    assert choose_monitor("", "a", ["a", "b"]) == "a"
    with pytest.raises(UserError, match="did you mean 'c_index'"):
        choose_monitor("c_indx", "", ["c_index", "mae"])
