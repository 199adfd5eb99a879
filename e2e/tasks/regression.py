"""Regression: a number for each slide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from e2e.errors import UserError
from e2e.metrics.figures import Figure, regression_figures
from e2e.metrics.regression import regression_metrics
from e2e.metrics.values import Array, Values
from e2e.tasks.base import TASKS, Task, TaskExample, check_choice, choose_monitor

LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


@TASKS.register("regression")
class Regression(Task):
    """One output z; the prediction is mean + sd z, with mean and standard deviation of the training slides.

    The loss is that of z against (target - mean) / sd, so that learning rates and the threshold of
    ``huber`` (1) do not depend on the unit.

    Parameters
    ----------
    column : str
        Column of the label table that holds the number.
    loss : str
        Loss on the standardised number: ``mse``, ``mae`` or ``huber``.
    monitor : str
        Metric that selects the epoch.

    Raises
    ------
    UserError
        An option is out of range.
    """

    num_outputs = 1
    prediction_columns = ("predicted",)
    tie_break_metric = "mae"
    main_metrics = ("rmse", "mae", "r2", "spearman")

    def __init__(self, *, column: str = "label", loss: str = "mse", monitor: str = "rmse") -> None:
        self.columns = self.output_names = (column,)
        self._elementwise_loss = LOSSES[check_choice("loss", loss, tuple(LOSSES))]
        names = regression_metrics(np.zeros(0), np.zeros(0), np.ones((1, 0)))
        self.monitor = choose_monitor(monitor, "rmse", names)
        self.mean, self.sd = 0.0, 1.0

    @classmethod
    def examples(cls) -> list[TaskExample]:
        """See :class:`~e2e.tasks.base.Task`."""
        rows = [{"label": number} for number in ("1.5", "-2", "3e2", "0", "7", "11")]
        return [TaskExample({}, rows), TaskExample({"loss": "huber"}, rows)]

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """Return the number, float64; NaN for an empty cell.

        Raises
        ------
        UserError
            The cell is not a finite number.
        """
        cell = cells[self.columns[0]]
        try:
            number = float(cell) if cell else math.nan
            if cell and not math.isfinite(number):
                raise ValueError(cell)
        except ValueError:
            hint = "\n  write decimals with a point" if "," in cell else ""
            raise UserError(
                f"'{cell}' in column '{self.columns[0]}' is not a number{hint}"
            ) from None
        return torch.tensor(number, dtype=torch.float64)

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """Compute mean and standard deviation.

        Raises
        ------
        UserError
            The training slides have fewer than two different numbers.
        """
        numbers = self._labelled(targets)
        if len(set(numbers)) < 2:  # the deviation of equal numbers may be a rounding error
            raise UserError(
                f"column '{self.columns[0]}' has {len(set(numbers))} different number(s) on the training "
                "slides: training needs two or more\n  check task.column and the splits"
            )
        self.mean, self.sd = float(numbers.mean()), float(numbers.std())

    def _labelled(self, targets: Sequence[Tensor]) -> Array:
        """The numbers that are not missing."""
        return np.array([float(target) for target in targets if self.is_labelled(target)])

    def state(self) -> dict[str, Any]:
        """Return mean and standard deviation."""
        return {"mean": self.mean, "sd": self.sd}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~e2e.tasks.base.Task`."""
        self.mean, self.sd = float(state["mean"]), float(state["sd"])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`~e2e.tasks.base.Task`; 0 for a missing number."""
        scaled = ((target - self.mean) / self.sd).float()
        is_labelled = scaled.isfinite()
        loss = self._elementwise_loss(
            logits[:, 0].float(), torch.where(is_labelled, scaled, 0.0), reduction="none"
        )
        return torch.where(is_labelled, loss, 0.0)

    def predict(self, logits: Tensor) -> Tensor:
        """Return the number, (B, 1) float64: beside a large mean float32 would leave few digits."""
        return self.mean + self.sd * logits.double()

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :func:`e2e.metrics.regression.regression_metrics`."""
        return regression_metrics(predicted[:, 0], targets, weights)

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.regression_figures`."""
        is_labelled = np.isfinite(targets)
        return regression_figures(predicted[is_labelled, 0], targets[is_labelled], self.columns[0])

    def heatmap_output(self, predicted: Sequence[float]) -> tuple[int, str]:
        """Return the one output and the predicted number."""
        return 0, f"{predicted[0]:.4g}"

    def group(self, target: Tensor) -> int:
        """Return 0: all slides are of one group."""
        return 0

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Return mean, standard deviation and range."""
        numbers = self._labelled(targets)
        if not len(numbers):
            return "no label"
        ends = f"{numbers.min():.4g} to {numbers.max():.4g}"
        return f"{numbers.mean():.4g} +- {numbers.std():.4g}, {ends}"
