"""Grading: ordered classes, learned as classes or as the thresholds between them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import UserError
from e2e.metrics.values import Array
from e2e.tasks.base import TASKS, TaskExample, check_choice
from e2e.tasks.classification import Classification

LOSSES = ("ce", "coral", "corn")


@TASKS.register("grading")
class Grading(Classification):
    """Ordered grades 0 to K - 1, evaluated by the quadratic weighted kappa.

    ``ce`` learns the grades as classes. ``coral`` and ``corn`` have K - 1 outputs o_k, one for each
    threshold between two grades, and are rank-consistent: P(y > k) never increases with k. For a bag of
    grade y::

        coral   P(y > k) = sigmoid(o_0 - sum_{j=1..k} softplus(o_j))
                loss = -sum_k ( [y > k] log P(y > k) + [y <= k] log P(y <= k) )
        corn    P(y > k | y > k - 1) = sigmoid(o_k);  P(y > k) = prod_{j<=k} sigmoid(o_j)
                loss = -sum_{k <= y} ( [y > k] log sigmoid(o_k) + [y = k] log(1 - sigmoid(o_k)) )

    The predicted grade is the number of thresholds with P(y > k) > 1/2.

    Sources: CORAL, Cao, Mirjalili & Raschka 2020, arXiv:1901.07884; CORN, Shi, Cao & Raschka 2021,
    arXiv:2111.08851. CORAL differs from the paper, where all thresholds share the weights of the last
    layer and only their biases are learned. Here the head has its own last layer, so the order comes
    from steps that cannot be negative; with steps that do not depend on the slide it is the paper's
    model. CORN differs in that the sum is not divided by the number of conditional examples, which
    makes it the negative log-likelihood of the grade.

    The ABMILX recipe (arXiv:2506.02408) trains on PANDA's ISUP grades with cross-entropy and reports
    accuracy; set ``monitor=balanced_accuracy`` to select epochs as it does.

    Parameters
    ----------
    classes : list of str
        The grades as written in the label table, from the lowest to the highest.
    column : str
        Column of the label table that holds the grade.
    loss : str
        ``ce`` (cross-entropy of classes), or thresholds: ``coral`` or ``corn``.
    label_smoothing : float
        Label smoothing of ``ce``, in [0, 1).
    class_weights : str
        ``none``, or ``balanced``: each grade has the same total weight; see :class:`Classification`.
    monitor : str
        Metric that selects the epoch.

    Raises
    ------
    UserError
        An option is out of range.
    """

    def __init__(
        self,
        *,
        classes: list[str],
        column: str = "label",
        loss: str = "ce",
        label_smoothing: float = 0.0,
        class_weights: str = "none",
        monitor: str = "kappa_quadratic",
    ) -> None:
        self.ordinal = check_choice("loss", loss, LOSSES) != "ce"
        self.conditional = loss == "corn"
        super().__init__(
            classes=classes,
            column=column,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            monitor=monitor,
        )
        if self.ordinal and label_smoothing:
            raise UserError(
                f"task.label_smoothing={label_smoothing:g} does not apply to task.loss={loss}\n"
                "  set task.loss=ce, or task.label_smoothing=0"
            )
        self.num_outputs -= self.ordinal

    @classmethod
    def examples(cls) -> list[TaskExample]:
        """See :class:`~e2e.tasks.base.Task`."""
        grades = ["low", "middle", "high"]
        rows = [{"label": name} for name in grades * 3]
        variants = ({}, {"loss": "coral"}, {"loss": "corn", "class_weights": "balanced"})
        return [TaskExample({"classes": grades, **options}, rows) for options in variants]

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """Return the class number; for ``coral`` and ``corn`` a float32 grade, NaN for an empty cell.

        Their outputs are thresholds and no output belongs to a grade, so the target must not pass for a
        class number in heads that use one.
        """
        number = super().encode(cells)
        if not self.ordinal:
            return number
        return number.float() if self.is_labelled(number) else torch.tensor(math.nan)

    def _unweighted_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if not self.ordinal:
            return super()._unweighted_loss(logits, target)
        grade = target.unsqueeze(1)
        threshold = torch.arange(self.num_outputs, device=logits.device)
        levels = logits if self.conditional else ordered_levels(logits)
        loss = F.binary_cross_entropy_with_logits(
            levels, (grade > threshold).float(), reduction="none"
        )
        counts = grade >= threshold if self.conditional else grade.isfinite()
        return torch.where(counts, loss, 0.0).sum(dim=1)

    def predict(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the grades, (B, K)."""
        if not self.ordinal:
            return super().predict(logits)
        if self.conditional:
            above = logits.float().sigmoid().cumprod(dim=1)
        else:
            above = ordered_levels(logits.float()).sigmoid()
        return -F.pad(above, (1, 0), value=1.0).diff(dim=1, append=torch.zeros_like(above[:, :1]))

    def _decide(self, probabilities: Array) -> NDArray[np.int64]:
        if not self.ordinal:
            return super()._decide(probabilities)
        return (probabilities.cumsum(axis=1)[:, :-1] < 0.5).sum(axis=1)

    def _output_of_class(self, number: int) -> int:
        return max(0, number - 1) if self.ordinal else number


def ordered_levels(outputs: Tensor) -> Tensor:
    """Return logits that never increase along the last dimension, (B, K) for any (B, K) numbers."""
    first, steps = outputs[:, :1], F.softplus(outputs[:, 1:])
    return torch.cat([first, first - steps.cumsum(dim=1)], dim=1)
