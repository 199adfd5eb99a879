"""The interface of a task: what labels and outputs mean.

Shape letters: B bags, C outputs of the head, P prediction columns, n slides, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from e2e.errors import UserError
from e2e.metrics.figures import Figure
from e2e.metrics.values import LOWER_IS_BETTER, Array, Values
from e2e.registry import Registry, did_you_mean

Numbers = float | list[float]
"""A target as metrics take it: one number, or one for each label column."""


class TaskExample(NamedTuple):
    """Options of a task and label rows that fit them, for the contract tests."""

    options: dict[str, Any]
    rows: list[dict[str, str]]
    """Column -> cell, one row for each slide; enough of them to fit the task."""


class Task:
    """Turns table cells into targets, and outputs into loss, predictions and metrics.

    A missing label is NaN, or a negative class number. It adds nothing to the loss, and no metric
    counts it. Constructor: keyword-only options.
    """

    columns: tuple[str, ...]
    """Columns of the label table that it reads; the first also stratifies a split."""
    classes: tuple[str, ...] = ()
    """Words that the first of ``columns`` may hold, in the order of the classes; empty if the column
    holds something else."""
    num_outputs: int
    """C, the number of outputs of the head."""
    output_names: tuple[str, ...]
    """What is predicted, for figures and messages: the classes, the labels, or the one number."""
    prediction_columns: tuple[str, ...]
    """The columns of predictions.csv that hold :meth:`predict`, one for each of its P numbers."""
    label_columns: tuple[str, ...] = ("label",)
    """The columns of predictions.csv that hold the label; see :meth:`format_labels`."""
    monitor: str
    """The metric that selects the epoch."""
    tie_break_metric: str
    """The metric that decides between epochs with an equal ``monitor``."""
    main_metrics: tuple[str, ...] = ()
    """The metrics that a summary shows besides ``monitor``; metrics.json has all."""
    is_case_level = False
    """Whether the label belongs to the case, so that all slides of a case must have the same."""
    loss_couples_bags = False
    """Whether the loss of a bag depends on the other bags of its update. Then :meth:`loss` must get
    the bags of all ranks at once, and is meaningless for a single bag."""

    can_pool_folds = True
    """Whether predictions of models fitted to other cases can be evaluated as one set."""

    fits_predictions = False
    """Whether :meth:`fit_to_predictions` is needed, which costs a pass over the training slides."""

    @classmethod
    def examples(cls) -> list[TaskExample]:
        """Return one example for each variant of the task that the contract tests run."""
        raise NotImplementedError

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """Return the target of one slide.

        Parameters
        ----------
        cells : Mapping of str to str
            Column -> cell for :attr:`columns`; an empty cell is a missing label.

        Raises
        ------
        UserError
            A cell is not a valid label.
        """
        raise NotImplementedError

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """Estimate what the task needs (class weights, time intervals ...) from the training slides.

        Parameters
        ----------
        targets : Sequence of Tensor
            The target of each training slide.
        cases : Sequence of str
            The case of each. Targets of a case (a time to an event) count once per case.

        Raises
        ------
        UserError
            Nothing can be learned from these targets.
        """

    def state(self) -> dict[str, Any]:
        """Return what :meth:`fit` and :meth:`fit_to_predictions` estimated, as JSON; saved with the run."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state`.

        Raises
        ------
        KeyError, ValueError, TypeError
            The state is that of a task with other options.
        """

    def fit_to_predictions(
        self, weights_name: str, predicted: Array, targets: Array, cases: Sequence[str]
    ) -> None:
        """Estimate, after training, what depends on the predictions for the training slides.

        Parameters
        ----------
        weights_name : str
            The weights that made the predictions, ``model`` or ``ema``; see :meth:`for_weights`.
        predicted, targets : Array
            As in :meth:`metrics`, for the training slides.
        cases : Sequence of str
            The case of each training slide.
        """

    def for_weights(self, name: str) -> Task:
        """Return the task for outputs of the weights ``name`` (``model`` or ``ema``).

        It uses what :meth:`fit_to_predictions` estimated for these weights, if anything.
        """
        return self

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each bag, (B,) float32.

        The trainer divides the sum by the number of bags of the update.

        Parameters
        ----------
        logits : Tensor of shape (B, C)
            Of any precision.
        target : Tensor of shape (B,) or (B, ...)
            Targets from :meth:`encode`.
        """
        raise NotImplementedError

    def predict(self, logits: Tensor) -> Tensor:
        """Return the prediction for each bag, (B, P) in at least float32: probabilities, a risk, a number."""
        raise NotImplementedError

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """Return metric -> (R,) values, one for each resample; NaN where the metric is undefined.

        Parameters
        ----------
        predicted : Array of shape (n, P)
            From :meth:`predict`.
        targets : Array of shape (n,) or (n, ...)
            From :meth:`target_values`.
        weights : Array of shape (R, n)
            How often each slide counts in each resample.
        """
        raise NotImplementedError

    def fitted_reference(self, metric: str) -> object:
        """Return what ``metric`` takes from the training cases; runs are comparable where it is equal."""
        return ()

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """Return the figures of an evaluation, for the same arguments as :meth:`metrics`."""
        raise NotImplementedError

    def selection_key(self, values: Mapping[str, float | None]) -> tuple[float, float]:
        """Return the key by which epochs are compared, the larger the better.

        It is ``monitor``, then ``tie_break_metric``. An undefined metric (None) is worse than any value.
        """
        first, second = (
            _larger_is_better(name, values[name]) for name in (self.monitor, self.tie_break_metric)
        )
        return first, second

    def is_labelled(self, target: Tensor) -> bool:
        """Return whether at least a part of the label is present."""
        is_present = target.isfinite() & ((target >= 0) | target.is_floating_point())
        return bool(is_present.any())

    def target_values(self, target: Tensor) -> Numbers:
        """Return a target as metrics take it, NaN where it is missing."""
        return target.double().tolist()

    def format_labels(self, values: Numbers) -> list[str]:
        """Return the cells of :attr:`label_columns` in predictions.csv; empty where missing.

        Parameters
        ----------
        values : float or list of float
            From :meth:`target_values`.
        """
        numbers = values if isinstance(values, list) else [values]
        return ["" if math.isnan(value) else f"{value:.12g}" for value in numbers]

    def format_prediction(self, predicted: Sequence[float]) -> str:
        """Return the prediction in words, such as the class, for the column ``predicted``.

        Empty where the numbers of :attr:`prediction_columns` are the prediction.

        Parameters
        ----------
        predicted : Sequence of P floats
            The slide's row of :meth:`predict`.
        """
        return ""

    def parse_labels(self, cells: Sequence[str]) -> Numbers:
        """Return the values whose :meth:`format_labels` are ``cells``.

        Raises
        ------
        ValueError
            A cell is not a number.
        """
        values = [float(cell) if cell else math.nan for cell in cells]
        return values if len(self.label_columns) > 1 else values[0]

    def heatmap_output(self, predicted: Sequence[float]) -> tuple[int, str]:
        """Return the number of the output whose heatmap is drawn, and the caption of the heatmap.

        Parameters
        ----------
        predicted : Sequence of P floats
            The slide's row of :meth:`predict`.
        """
        raise NotImplementedError

    def patch_predictions(self, logits: Tensor, predicted: Sequence[float]) -> Tensor:
        """Return (N,) the number shown for the slide, as predicted for each patch alone.

        Parameters
        ----------
        logits : Tensor of shape (N, C)
            Instance logits of the patches.
        predicted : Sequence of P floats
            The slide's row of :meth:`predict`, which decides what is shown.
        """
        return self.predict(logits)[:, 0]

    def group(self, target: Tensor) -> int:
        """Return the group of a slide; with ``optim.balance`` each group is drawn equally often."""
        raise NotImplementedError

    def categories(self, target: Tensor) -> list[str]:
        """Return the names of what every split needs at least one slide of, as far as this slide has it.

        For example its class: without a slide of each class some metrics are undefined.
        """
        return []

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Return one line about the targets of a split, such as the count of each class."""
        raise NotImplementedError


TASKS: Registry[Task] = Registry("task")


def choose_monitor(monitor: str, default: str, metrics: Iterable[str]) -> str:
    """Return ``monitor``, or ``default`` if that is empty.

    Raises
    ------
    UserError
        It is not one of ``metrics``.
    """
    monitor, metrics = monitor or default, list(metrics)
    if monitor not in metrics:
        raise UserError(f"unknown metric task.monitor={monitor}{did_you_mean(monitor, metrics)}")
    return monitor


def check_choice(option: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value``; UserError unless it is one of the ``choices`` of ``task.<option>``."""
    if value not in choices:
        raise UserError(f"unknown value task.{option}={value}{did_you_mean(value, choices)}")
    return value


def check_at_least(option: str, value: float, least: float) -> float:
    """Return ``value``; UserError if it is below ``least`` or not finite."""
    if not least <= value < math.inf:
        raise UserError(f"task.{option}={value:g} must be a finite number of at least {least:g}")
    return value


def matches_code(cell: str, code: str) -> bool:
    """Return whether a cell is this code: the same text ignoring case, or the same number."""
    if cell.casefold() == code.casefold():
        return True
    try:
        return float(cell) == float(code)
    except ValueError:
        return False


def opposite_code(option: str, code: str, opposite: str, meaning: str) -> str:
    """Return ``opposite``, or if that is empty the other one of the codes 0 and 1.

    Parameters
    ----------
    option : str
        The option that holds ``opposite``, for messages.
    code : str
        The code whose opposite is wanted.
    opposite : str
        The value of that option.
    meaning : str
        What ``opposite`` means, for messages.

    Raises
    ------
    UserError
        It cannot be inferred, or equals ``code``.
    """
    opposite = opposite or {"0": "1", "1": "0"}.get(code, "")
    if not opposite:
        raise UserError(
            f"task.{option} is missing, and cannot be inferred from the code '{code}'\n"
            f"  set task.{option} to the code that means: {meaning}"
        )
    if matches_code(code, opposite):
        raise UserError(
            f"task.{option}={opposite} cannot mean '{meaning}' and its opposite\n"
            "  set two different codes"
        )
    return opposite


def _larger_is_better(name: str, value: float | None) -> float:
    if value is None:
        return -math.inf
    return -value if name in LOWER_IS_BETTER else value
