"""The contract of a task, tested on the examples of every registered task."""

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
from e2e.tasks.base import TASKS, Task, TaskExample, choose_monitor, matches_code, opposite_code
from e2e.training.losses import bag_losses
from tests.helpers.models import make_bag, make_model

VARIANTS = [
    (name, example) for name in TASKS.names() for example in TASKS.plugin_class(name).examples()
]
IDS = [f"{name}-{example.options}" for name, example in VARIANTS]


@pytest.fixture(params=VARIANTS, ids=IDS)
def variant(request) -> tuple[Task, list[torch.Tensor]]:
    """A fitted task and targets."""
    return fitted(*request.param)


def fitted(name: str, example: TaskExample) -> tuple[Task, list[torch.Tensor]]:
    task = TASKS.build(name, **example.options)
    targets = [task.encode(row) for row in example.rows]
    task.fit(targets, [str(k) for k in range(len(targets))])
    return task, targets


@pytest.mark.parametrize("name", TASKS.names())
def test_every_option_has_a_text_in_the_docstring(name):
    described = TASKS.describe(name)
    assert described.summary
    for option in described.options:
        assert option.text, f"{name}: the option {option.name} is not in the Parameters section"


def logits_of(task: Task, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, task.num_outputs, generator=generator)


def unlabelled(task: Task) -> torch.Tensor:
    return task.encode(dict.fromkeys(task.columns, ""))


def values_of(task: Task, targets, logits, *, draws: int = 2):
    predicted = task.predict(logits).double().numpy()
    numbers = np.array([task.target_values(t) for t in targets], np.float64)
    weights = np.ones((1 + draws, len(targets)))
    weights[1:, ::2] = 2
    return task.metrics(predicted, numbers, weights)


def test_the_metrics_of_a_summary_are_metrics_of_the_task(variant):
    task, targets = variant
    metrics = values_of(task, targets, logits_of(task, len(targets)))
    assert {task.monitor, *task.main_metrics} <= metrics.keys()


def test_a_prediction_in_words_is_one_cell_and_the_same_for_every_slide_with_these_numbers(variant):
    task, targets = variant
    rows = task.predict(logits_of(task, len(targets))).tolist()
    words = [task.format_prediction(row) for row in rows]
    assert words == [task.format_prediction(row) for row in rows]
    # Either the numbers are the prediction, or every slide has one in words.
    assert all(words) or not any(words)
    assert "predicted" not in task.prediction_columns or not any(words)


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_has_examples_of_its_own_with_a_row_for_several_slides(name):
    task = TASKS.plugin_class(name)
    assert "examples" in vars(task)
    assert task.examples()[0].options.keys() <= TASKS.options(name).keys()
    assert all(len(example.rows) > 2 for example in task.examples())


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
    assert len(task.label_columns) == len(task.format_labels(task.target_values(targets[0])))


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
    values_of_more = values_of(task, more, logits)
    expected = values_of(task, targets, logits[: len(targets)])
    for name, values in expected.items():
        np.testing.assert_allclose(values_of_more[name], values, rtol=1e-12, err_msg=name)


def test_without_any_label_no_metric_is_defined(variant):
    task, _ = variant
    undefined = values_of(task, [unlabelled(task)] * 3, logits_of(task, 3))
    assert all(np.isnan(values).all() for values in undefined.values()), undefined


def test_the_epoch_is_selected_by_metrics_that_exist(variant):
    task, targets = variant
    metrics = values_of(task, targets, logits_of(task, len(targets)))
    assert {task.monitor, task.tie_break_metric} <= metrics.keys()
    assert all(values.shape == (3,) for values in metrics.values())


@pytest.mark.parametrize(("name", "example"), VARIANTS, ids=IDS)
def test_an_unknown_metric_cannot_select_the_epoch(name, example):
    with pytest.raises(UserError, match=r"unknown metric task\.monitor=nonsense"):
        TASKS.build(name, **(example.options | {"monitor": "nonsense"}))


@pytest.mark.parametrize(("name", "example"), VARIANTS, ids=IDS)
def test_a_fitted_task_is_saved_as_json_and_restored(name, example):
    task, targets = fitted(name, example)
    logits, target = logits_of(task, len(targets)), torch.stack(targets)
    fresh = TASKS.build(name, **example.options)
    fresh.load_state(json.loads(json.dumps(task.state())))
    assert fresh.state() == task.state()
    torch.testing.assert_close(
        fresh.loss(logits, target), task.loss(logits, target), rtol=0, atol=0
    )
    restored, expected = (values_of(t, targets, logits) for t in (fresh, task))
    for metric, values in expected.items():
        np.testing.assert_array_equal(restored[metric], values)


def test_predictions_are_read_by_the_task_of_the_weights_that_made_them(variant):
    task, targets = variant
    logits, numbers = logits_of(task, len(targets)), [task.target_values(t) for t in targets]
    predicted, cases = task.predict(logits).double().numpy(), [str(k) for k in range(len(targets))]
    if task.fits_predictions:
        task.fit_to_predictions("ema", predicted, np.array(numbers, np.float64), cases)
    assert task.predict(logits).shape == predicted.shape  # as in training
    json.dumps(task.state(), allow_nan=False)
    for name in ("ema", "model"):
        reader = task.for_weights(name)
        values = reader.predict(100 * logits)
        assert values.shape == (len(targets), len(reader.prediction_columns))
        assert values.isfinite().all()
        assert reader.heatmap_output(values[0].tolist())[0] < task.num_outputs
        arrays = values.double().numpy(), np.array(numbers), np.ones((2, len(targets)))
        assert reader.metrics(*arrays)
    names = [set(values_of(task.for_weights(k), targets, logits)) for k in ("ema", "model")]
    assert names[0] == names[1]  # both kinds of weights have the same rows in a table


def test_cells_of_the_predictions_table_become_the_same_numbers(variant):
    task, targets = variant
    for target in [*targets, unlabelled(task)]:
        numbers = task.target_values(target)
        np.testing.assert_array_equal(
            np.array(task.parse_labels(task.format_labels(numbers))), np.array(numbers)
        )
        assert any(task.format_labels(numbers)) == task.is_labelled(target)


def test_a_heatmap_is_of_an_output_that_exists_and_has_a_caption(variant):
    task, _ = variant
    for predicted in task.predict(logits_of(task, 20)).tolist():
        output, caption = task.heatmap_output(predicted)
        assert 0 <= output < task.num_outputs
        assert caption


def test_the_number_shown_for_a_patch_is_that_of_a_slide_with_this_patch_alone(variant):
    task, _ = variant
    logits = logits_of(task, 6)
    for predicted in task.predict(logits).tolist():
        of_patches = task.patch_predictions(logits, predicted)
        assert of_patches.shape == (6,)
        columns = [
            n for n, values in enumerate(task.predict(logits).T) if torch.equal(values, of_patches)
        ]
        assert columns
        caption = task.heatmap_output(predicted)[1]
        numbers = {f"{predicted[n]:{form}}" for n in columns for form in (".2f", ".3g", ".4g")}
        assert caption == "none" or any(number in caption for number in numbers)


def test_targets_are_described_in_a_line_and_slides_have_a_group(variant):
    task, targets = variant
    assert task.describe(targets)
    assert task.describe([])
    assert {type(task.group(t)) for t in [*targets, unlabelled(task)]} == {int}


def test_epochs_are_compared_by_the_metric_whichever_way_it_is_better():
    task = TASKS.build("regression")
    assert (task.monitor, task.tie_break_metric) == ("rmse", "mae")
    small, large = ({"rmse": v, "mae": 0.3} for v in (1.0, 2.0))
    assert (
        task.selection_key(small)
        > task.selection_key(large)
        > task.selection_key({"rmse": None, "mae": 0.1})
    )
    assert task.selection_key(small) > task.selection_key(small | {"mae": 0.4})
    up = TASKS.build("regression", monitor="r2")
    assert up.selection_key({"r2": 0.9, "mae": 1}) > up.selection_key({"r2": 0.5, "mae": 0})


@pytest.mark.parametrize("head", HEADS.names())
def test_the_auxiliary_loss_of_a_head_is_computed_or_the_task_is_refused(variant, head):
    task, targets = variant
    model = make_model(head=head)
    model.head = HEADS.build(head, 6, task.num_outputs).double()
    strategy = Strategy(torch.device("cpu"))
    strategy.setup(model, None, clip=None)
    bag = replace(make_bag((5, 3, 4)), target=torch.stack(targets[:3]))
    are_class_numbers = torch.stack(targets).dtype is torch.int64
    is_refused = {
        "nothing": False,
        "class number": not are_class_numbers,
        "task loss": task.loss_couples_bags,
    }[model.head.aux_loss_needs]
    if is_refused:
        with pytest.raises(UserError, match=r"class number a slide|compares all bags of an update"):
            bag_losses(strategy, bag, task)
    else:
        losses = bag_losses(strategy, bag, task)
        assert losses.isfinite().all()
        losses.sum().backward()


def test_codes_are_the_same_text_or_the_same_number():
    assert matches_code("1.0", "1")
    assert matches_code("DECEASED", "Deceased")
    assert not matches_code("10", "1")
    assert not matches_code("1:dead", "1")
    assert opposite_code("censored", "1", "", "censored") == "0"
    with pytest.raises(UserError, match=r"task\.censored is missing.*\n.*means: censored"):
        opposite_code("censored", "dead", "", "censored")
    with pytest.raises(UserError, match="and its opposite"):
        opposite_code("censored", "1", "1.0", "censored")


def test_an_unknown_metric_is_refused_with_the_nearest_one():
    assert choose_monitor("", "a", ["a", "b"]) == "a"
    with pytest.raises(UserError, match="did you mean 'c_index'"):
        choose_monitor("c_indx", "", ["c_index", "mae"])
