"""Slide classification: one of K classes."""

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
from e2e.tasks.base import (
    TASKS,
    Numbers,
    Task,
    TaskExample,
    check_at_least,
    check_choice,
    choose_monitor,
)

NO_LABEL = -1
"""The target of a slide without a label."""


@TASKS.register("classification")
class Classification(Task):
    """Softmax cross-entropy over K classes.

    The loss of a bag of class y, predicted with probability p_y, is::

        w_y (1 - p_y)^gamma (-log p_y)

    Source of the focal factor: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5,
    arXiv:1708.02002. With ``label_smoothing`` it weights the smoothed cross-entropy.

    Parameters
    ----------
    classes : list of str
        The classes as written in the label table, in the order of the outputs; at least two.
    column : str
        Column of the label table that holds the class.
    label_smoothing : float
        Label smoothing, in [0, 1).
    class_weights : str
        ``none``, or ``balanced``: w_y = n / (K n_y), where n_y of the n training slides are of class y,
        so that all classes have the same total weight and the mean weight of a training slide is 1.
    focal_gamma : float
        Exponent gamma of the focal factor; 0 disables it.
    monitor : str
        Metric that selects the epoch. Empty: ``auc`` for two classes, else ``balanced_accuracy``.

    Raises
    ------
    UserError
        An option is out of range.
    """

    tie_break_metric = "log_loss"

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
            raise UserError(f"task.classes={list(classes)} must name two or more different classes")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing:g} must be in [0, 1)")
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
        of_scores = "auc" if len(classes) == 2 else "auc_macro_ovr"
        self.main_metrics = (of_scores, "balanced_accuracy", "accuracy", "f1_macro")
        metrics = self.metrics(np.eye(2, len(classes)), np.arange(2.0), np.ones((1, 2)))
        self.monitor = choose_monitor(monitor, default, metrics)

    @classmethod
    def examples(cls) -> list[TaskExample]:
        """See :class:`~e2e.tasks.base.Task`."""
        classes = ["low", "middle", "high"]
        rows = [{"label": name} for name in classes * 3]
        extras = {"class_weights": "balanced", "focal_gamma": 2.0, "label_smoothing": 0.1}
        two = [row for row in rows if row["label"] != "middle"]
        return [
            TaskExample({"classes": classes}, rows),
            TaskExample({"classes": classes, **extras}, rows),
            TaskExample({"classes": ["low", "high"]}, two),
        ]

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """Return the class number, int64; -1 for an empty cell.

        Raises
        ------
        UserError
            The cell is not one of the classes.
        """
        label = cells[self.columns[0]]
        if not label:
            return torch.tensor(NO_LABEL)
        if label not in self.output_names:
            raise UserError(
                f"label '{label}' in column '{self.columns[0]}' is not one of task.classes: "
                f"{', '.join(self.output_names)}{self._decimal_hint(label)}"
            )
        return torch.tensor(self.output_names.index(label))

    def _decimal_hint(self, label: str) -> str:
        if label.removesuffix(".0") not in self.output_names:
            return ""
        return (
            "\n  a column of whole numbers with empty cells was saved as decimals;"
            " save it as text, without '.0'"
        )

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """Compute the class weights.

        Raises
        ------
        UserError
            Fewer than two classes have training slides, or one without any needs a weight.
        """
        counts = self._counts(targets)
        pairs = list(zip(self.output_names, counts, strict=True))
        empty = [name for name, count in pairs if not count]
        if len(empty) > self.num_classes - 2:
            present = [f"{self.columns[0]}={name}" for name, count in pairs if count]
            problem = (
                f"all training slides have {present[0]}"
                if present
                else "no training slide has a label"
            )
            raise UserError(
                f"{problem}: training needs slides of two or more classes\n"
                f"  training slides: {self.describe(targets)}\n"
                "  check the label table and its splits: data.columns.split, data.split_file, data.cut"
            )
        if self.class_weights == "balanced":
            if empty:
                raise UserError(
                    f"no training slide is of class {', '.join(empty)}, so task.class_weights=balanced "
                    "has no weight for it\n"
                    "  set task.class_weights=none, or remove the class from task.classes"
                )
            self.weights = (counts.sum() / (self.num_classes * counts)).tolist()

    @property
    def num_classes(self) -> int:
        """K, which differs from the number of outputs in ordinal grading."""
        return len(self.output_names)

    def _counts(self, targets: Sequence[Tensor]) -> NDArray[np.int64]:
        """(K,) the number of targets of each class."""
        numbers = [int(target) for target in targets if self.is_labelled(target)]
        return np.bincount(np.array(numbers, np.int64), minlength=self.num_classes)

    def state(self) -> dict[str, Any]:
        """Return the weight of each class."""
        return {"class_weights": dict(zip(self.output_names, self.weights, strict=True))}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~e2e.tasks.base.Task`."""
        self.weights = [float(state["class_weights"][name]) for name in self.output_names]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`~e2e.tasks.base.Task`; 0 for a missing class."""
        weights = logits.new_tensor(self.weights, dtype=torch.float32)
        number = target.nan_to_num(nan=NO_LABEL).long().clamp_min(0)
        return self._unweighted_loss(logits.float(), target) * weights[number]

    def _unweighted_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,) the loss without the class weights."""
        loss = F.cross_entropy(
            logits,
            target,
            label_smoothing=self.label_smoothing,
            ignore_index=NO_LABEL,
            reduction="none",
        )
        if self.focal_gamma:
            column = target.clamp_min(0).unsqueeze(1)
            missed = -torch.expm1(logits.log_softmax(dim=-1).gather(1, column).squeeze(1))
            # Not 0, where a power below 1 has an infinite slope.
            loss = loss * missed.clamp_min(1e-8) ** self.focal_gamma
        return loss

    def predict(self, logits: Tensor) -> Tensor:
        """Return the class probabilities, (B, K)."""
        return logits.float().softmax(dim=-1)

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :mod:`e2e.metrics.values`."""
        is_labelled = np.isfinite(targets)
        probabilities, labels = predicted[is_labelled], targets[is_labelled].astype(np.int64)
        return classification_metrics(
            probabilities, labels, weights[:, is_labelled], predicted=self._decide(probabilities)
        )

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.classification_figures`."""
        is_labelled = np.isfinite(targets)
        probabilities, labels = predicted[is_labelled], targets[is_labelled].astype(np.int64)
        decided = self._decide(probabilities)
        return classification_figures(probabilities, labels, self.output_names, decided)

    def _decide(self, probabilities: Array) -> NDArray[np.int64]:
        """(n,) the predicted class."""
        return probabilities.argmax(axis=1)

    def target_values(self, target: Tensor) -> Numbers:
        """Return the class number; NaN without a label."""
        return float(target) if self.is_labelled(target) else math.nan

    def format_labels(self, values: Numbers) -> list[str]:
        """Return the class as written in the label table."""
        assert isinstance(values, float)
        return ["" if math.isnan(values) else self.output_names[int(values)]]

    def parse_labels(self, cells: Sequence[str]) -> Numbers:
        """See :class:`~e2e.tasks.base.Task`; UserError for a cell that is not a class."""
        return self.target_values(self.encode({self.columns[0]: cells[0]}))

    def format_prediction(self, predicted: Sequence[float]) -> str:
        """Return the predicted class, as written in the label table."""
        return self.output_names[self._predicted_class(predicted)]

    def heatmap_output(self, predicted: Sequence[float]) -> tuple[int, str]:
        """Return the predicted class and its probability."""
        number = self._predicted_class(predicted)
        caption = f"{self.output_names[number]} ({predicted[number]:.2f})"
        return self._output_of_class(number), caption

    def patch_predictions(self, logits: Tensor, predicted: Sequence[float]) -> Tensor:
        """Return the probability of the predicted class."""
        return self.predict(logits)[:, self._predicted_class(predicted)]

    def _predicted_class(self, predicted: Sequence[float]) -> int:
        return int(self._decide(np.array([predicted]))[0])

    def _output_of_class(self, number: int) -> int:
        """The output that is evidence for a class."""
        return number

    def group(self, target: Tensor) -> int:
        """Return the class number; -1 where it is missing."""
        return int(target) if self.is_labelled(target) else NO_LABEL

    def categories(self, target: Tensor) -> list[str]:
        """Return the class, as ``column=class``."""
        number = self.group(target)
        return [] if number == NO_LABEL else [f"{self.columns[0]}={self.output_names[number]}"]

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Return the count of each class."""
        counts = zip(self._counts(targets), self.output_names, strict=True)
        return ", ".join(f"'{name}' {n}" for n, name in counts)
