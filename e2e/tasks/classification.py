"""Slide classification: one of C classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import UserError
from e2e.metrics.figures import Figure, classification_figures
from e2e.metrics.values import Array, Values, classification_metrics
from e2e.tasks.base import TASKS, Numbers, Task, check_at_least, check_choice, choose_monitor

NO_LABEL = -1


@TASKS.register("classification")
class Classification(Task):
    """Softmax cross-entropy over C classes, for a bag of class y with probability p_y::

        w_y (1 - p_y)^gamma (-log p_y)

    Source of the focal factor: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5,
    arXiv:1708.02002; with ``label_smoothing`` it weighs the smoothed cross-entropy.

    Args:
        classes: the table's words, in the order of the outputs; two or more.
        column: the table's column.
        label_smoothing: in [0, 1).
        class_weights: none, or balanced: w_y = n / (C n_y) for n_y of n training slides, so that
            every class weighs the same and a training slide 1 in the mean.
        focal_gamma: gamma; 0: no focal factor.
        monitor: metric that selects the epoch; empty: AUC for two classes, else balanced accuracy.
    """

    tie_break = "log_loss"

    def __init__(
        self,
        *,
        classes: list[str],
        column: str = "label",
        label_smoothing: float = 0.0,
        class_weights: str = "none",
        focal_gamma: float = 0.0,
        monitor: str = "",
    ) -> None:
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise UserError(
                f"task.classes needs two or more different words, found {list(classes)}"
            )
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing must be in [0, 1), found {label_smoothing}")
        self.columns = (column,)
        self.classes = tuple(classes)
        self.output_names = tuple(classes)
        self.prediction_columns = tuple(f"prob_{name}" for name in classes)
        self.num_outputs = len(classes)
        self.label_smoothing = label_smoothing
        self.class_weights = check_choice("class_weights", class_weights, ("none", "balanced"))
        self.focal_gamma = check_at_least("focal_gamma", focal_gamma, 0)
        self.weights = [1.0] * len(classes)
        default = "auc" if len(classes) == 2 else "balanced_accuracy"
        tried = self.metrics(np.eye(2, len(classes)), np.arange(2.0), np.ones((1, 2)))
        self.monitor = choose_monitor(monitor, default, tried)

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """Class number, int64; -1 for an empty word."""
        word = words[self.columns[0]]
        if not word:
            return torch.tensor(NO_LABEL)
        if word not in self.output_names:
            raise UserError(
                f"label '{word}' in column '{self.columns[0]}' is none of task.classes: "
                f"{', '.join(self.output_names)}{self._hint(word)}"
            )
        return torch.tensor(self.output_names.index(word))

    def _hint(self, word: str) -> str:
        if word.removesuffix(".0") in self.output_names:
            return " (numbers with a point: a table with blanks was saved so; save it as text)"
        return ""

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """The classes' weights; UserError where only one class is there to learn from."""
        counts = self._counts(targets)
        absent = [name for name, n in zip(self.output_names, counts, strict=True) if not n]
        if len(absent) > self.num_classes - 2:
            alone = [name for name in self.output_names if name not in absent]
            said = [
                f"all training slides have {self.columns[0]}={name}: one class alone teaches nothing"
                for name in alone
            ]
            raise UserError(
                f"{''.join(said) or 'no training slide has a label'}\n"
                f"  they are of one class at most ({self.describe(targets)}):"
                " there is nothing to tell apart\n"
                "  look at the label table and its splits: data.columns.split, data.split_file, data.cut"
            )
        if self.class_weights == "balanced":
            if absent:
                raise UserError(
                    f"no training slide is of class {', '.join(absent)}, so task.class_weights=balanced "
                    "has no weight for it\n  set it to none, or take the class out of task.classes"
                )
            self.weights = (counts.sum() / (self.num_classes * counts)).tolist()

    @property
    def num_classes(self) -> int:
        """Classes, whatever the number of outputs."""
        return len(self.output_names)

    def _counts(self, targets: Sequence[Tensor]) -> NDArray[np.int64]:
        numbers = [int(target) for target in targets if self.is_labelled(target)]
        return np.bincount(np.array(numbers, np.int64), minlength=self.num_classes)

    def state(self) -> dict[str, Any]:
        """The weight of each class."""
        return {"class_weights": dict(zip(self.output_names, self.weights, strict=True))}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Task`."""
        self.weights = [float(state["class_weights"][name]) for name in self.output_names]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`Task`; 0 where the class is not known."""
        weights = logits.new_tensor(self.weights, dtype=torch.float32)
        number = target.nan_to_num(nan=NO_LABEL).long().clamp_min(0)
        return self._cost(logits.float(), target) * weights[number]

    def _cost(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,) without the classes' weights."""
        cost = F.cross_entropy(
            logits,
            target,
            label_smoothing=self.label_smoothing,
            ignore_index=NO_LABEL,
            reduction="none",
        )
        if self.focal_gamma:
            own = target.clamp_min(0).unsqueeze(1)
            missed = -torch.expm1(logits.log_softmax(dim=-1).gather(1, own).squeeze(1))
            # Not 0, where the slope of a power under 1 has no end.
            cost = cost * missed.clamp_min(1e-8) ** self.focal_gamma
        return cost

    def predict(self, logits: Tensor) -> Tensor:
        """(B, C) probabilities."""
        return logits.float().softmax(dim=-1)

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :mod:`e2e.metrics.values`."""
        known = np.isfinite(targets)
        chances, labels = predicted[known], targets[known].astype(np.int64)
        return classification_metrics(
            chances, labels, weights[:, known], decided=self._decide(chances)
        )

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.classification_figures`."""
        known = np.isfinite(targets)
        chances, labels = predicted[known], targets[known].astype(np.int64)
        return classification_figures(chances, labels, self.output_names, self._decide(chances))

    def _decide(self, probabilities: Array) -> NDArray[np.int64]:
        """(n,) the class that is predicted."""
        return probabilities.argmax(axis=1)

    def numbers(self, target: Tensor) -> Numbers:
        """Class number; NaN without a label."""
        return float(target) if self.is_labelled(target) else math.nan

    def words(self, numbers: Numbers) -> list[str]:
        """The class in the table's word."""
        assert isinstance(numbers, float)
        return ["" if math.isnan(numbers) else self.output_names[int(numbers)]]

    def read(self, words: Sequence[str]) -> Numbers:
        """See :class:`Task`; UserError for a word that is no class."""
        return self.numbers(self.encode({self.columns[0]: words[0]}))

    def shown(self, predicted: Sequence[float]) -> tuple[int, str]:
        """The class that is predicted."""
        top = self._top(predicted)
        return self._output_of(top), f"{self.output_names[top]} ({predicted[top]:.2f})"

    def of_patches(self, logits: Tensor, predicted: Sequence[float]) -> Tensor:
        """The probability of the class that is predicted."""
        return self.predict(logits)[:, self._top(predicted)]

    def _top(self, predicted: Sequence[float]) -> int:
        return int(self._decide(np.array([predicted]))[0])

    def _output_of(self, number: int) -> int:
        """The output that speaks for a class."""
        return number

    def group(self, target: Tensor) -> int:
        """Its class; -1 where that is not known."""
        return int(target) if self.is_labelled(target) else NO_LABEL

    def kinds(self, target: Tensor) -> list[str]:
        """Its class."""
        number = self.group(target)
        return [] if number == NO_LABEL else [f"{self.columns[0]}={self.output_names[number]}"]

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Count of each class."""
        counts = zip(self._counts(targets), self.output_names, strict=True)
        return ", ".join(f"'{name}' {n}" for n, name in counts)
