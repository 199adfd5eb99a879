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
from e2e.metrics.values import Array, Values, regression_metrics
from e2e.tasks.base import TASKS, Task, check_choice, choose_monitor

LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


@TASKS.register("regression")
class Regression(Task):
    """One output z; the prediction is mean + sd z, of mean and standard deviation in training.

    The loss is taken of (target - mean) / sd, so that rates and ``huber``'s bend (at 1) do not
    depend on the unit.

    Args:
        column: the table's column of numbers.
        loss: mse, mae or huber.
        monitor: metric that selects the epoch.
    """

    num_outputs = 1
    prediction_columns = ("predicted",)
    tie_break = "mae"

    def __init__(self, *, column: str = "label", loss: str = "mse", monitor: str = "rmse") -> None:
        self.columns = self.output_names = (column,)
        self._cost = LOSSES[check_choice("loss", loss, tuple(LOSSES))]
        names = regression_metrics(np.zeros(0), np.zeros(0), np.ones((1, 0)))
        self.monitor = choose_monitor(monitor, "rmse", names)
        self.mean, self.sd = 0.0, 1.0

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """The number, float64."""
        word = words[self.columns[0]]
        try:
            number = float(word) if word else math.nan
            if word and not math.isfinite(number):
                raise ValueError(word)
        except ValueError:
            hint = " (write decimals with a point)" if "," in word else ""
            raise UserError(f"'{word}' in column '{self.columns[0]}' is no number{hint}") from None
        return torch.tensor(number, dtype=torch.float64)

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """Mean and standard deviation."""
        known = np.array([float(target) for target in targets if self.is_labelled(target)])
        if len(set(known)) < 2:  # the deviation of equal numbers may be a rounding error
            raise UserError(
                f"the training slides have {len(set(known))} different number(s) in column "
                f"'{self.columns[0]}', so there is nothing to learn"
            )
        self.mean, self.sd = float(known.mean()), float(known.std())

    def state(self) -> dict[str, Any]:
        """Mean and standard deviation."""
        return {"mean": self.mean, "sd": self.sd}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Task`."""
        self.mean, self.sd = float(state["mean"]), float(state["sd"])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`Task`; 0 where there is no number."""
        scaled = ((target - self.mean) / self.sd).float()
        known = scaled.isfinite()
        cost = self._cost(logits[:, 0].float(), torch.where(known, scaled, 0.0), reduction="none")
        return torch.where(known, cost, 0.0)

    def predict(self, logits: Tensor) -> Tensor:
        """(B, 1) the number, float64: a large mean leaves few digits in single precision."""
        return self.mean + self.sd * logits.double()

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :func:`e2e.metrics.values.regression_metrics`."""
        return regression_metrics(predicted[:, 0], targets, weights)

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.regression_figures`."""
        known = np.isfinite(targets)
        return regression_figures(predicted[known, 0], targets[known], self.columns[0])

    def shown(self, predicted: Sequence[float]) -> tuple[int, str]:
        """The number."""
        return 0, f"{predicted[0]:.4g}"

    def group(self, target: Tensor) -> int:
        """All alike."""
        return 0

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Mean, standard deviation and range."""
        known = np.array([float(target) for target in targets if self.is_labelled(target)])
        if not len(known):
            return "no label"
        ends = f"{known.min():.4g} to {known.max():.4g}"
        return f"{known.mean():.4g} +- {known.std():.4g}, {ends}"
