"""Slide classification: one of C classes; also grades, judged as the classes they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import UserError
from e2e.metrics import classification_metrics
from e2e.registry import suggest
from e2e.tasks.base import TASKS, Task


@TASKS.register("classification")
class Classification(Task):
    """Softmax cross-entropy over C classes.

    Args:
        classes: the table's words, in the order of the outputs; two or more.
        column: the table's column.
        label_smoothing: in [0, 1).
        monitor: metric that selects the epoch; empty: AUC for two classes, else balanced accuracy.
    """

    tie_break = "log_loss"

    def __init__(
        self,
        *,
        classes: list[str],
        column: str = "label",
        label_smoothing: float = 0.0,
        monitor: str = "",
    ) -> None:
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise UserError(
                f"task.classes needs two or more different words, found {list(classes)}"
            )
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing must be in [0, 1), found {label_smoothing}")
        self.columns = (column,)
        self.output_names = tuple(classes)
        self.num_outputs = len(classes)
        self.label_smoothing = label_smoothing
        names = list(self.metrics(np.eye(2, len(classes)), np.arange(2.0), np.ones((1, 2))))
        if monitor and monitor not in names:
            raise UserError(f"unknown metric in task.monitor: '{monitor}'{suggest(monitor, names)}")
        self.monitor = monitor or ("auc" if len(classes) == 2 else "balanced_accuracy")

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """Class number, int64."""
        word = words[self.columns[0]]
        if word not in self.output_names:
            read = {"True", "False"} & set(self.output_names)
            hint = " (YAML reads yes and no as True and False: quote them)" if read else ""
            raise UserError(
                f"label '{word}' in column '{self.columns[0]}' is none of task.classes: "
                f"{', '.join(self.output_names)}{hint}"
            )
        return torch.tensor(self.output_names.index(word))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`Task`."""
        return F.cross_entropy(
            logits.float(), target, label_smoothing=self.label_smoothing, reduction="none"
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """See :class:`Task`."""
        return logits.float().softmax(dim=-1)

    def metrics(
        self,
        probabilities: NDArray[np.float64],
        targets: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> dict[str, NDArray[np.float64]]:
        """See :mod:`e2e.metrics`."""
        return classification_metrics(probabilities, targets.astype(np.int64), weights)

    def group(self, target: Tensor) -> int:
        """Its class."""
        return int(target)

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Count of each class."""
        counts = np.bincount([int(t) for t in targets], minlength=self.num_outputs)
        return ", ".join(f"{n} {name}" for name, n in zip(self.output_names, counts, strict=True))


@TASKS.register("grading")
class Grading(Classification):
    """Grades trained as classes; the epoch is chosen by the quadratic weighted kappa.

    The ABMILX recipe (arXiv 2506.02408) trains PANDA's ISUP grades with cross-entropy and reports
    accuracy; set ``monitor=balanced_accuracy`` to select as it does.
    """

    def __init__(
        self,
        *,
        classes: list[str],
        column: str = "label",
        label_smoothing: float = 0.0,
        monitor: str = "kappa_quadratic",
    ) -> None:
        super().__init__(
            classes=classes, column=column, label_smoothing=label_smoothing, monitor=monitor
        )
