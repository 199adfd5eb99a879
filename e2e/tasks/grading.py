"""Grades: classes in an order, learned as classes or as the thresholds between them."""

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
from e2e.tasks.base import TASKS, check_choice
from e2e.tasks.classification import Classification

LOSSES = ("ce", "coral", "corn")


@TASKS.register("grading")
class Grading(Classification):
    """Grades 0 to C - 1; the epoch is chosen by the quadratic weighted kappa.

    ``ce`` learns them as classes. The others have C - 1 outputs o_k, one for each threshold between
    two grades, and are rank-consistent: P(y > k) never rises with k. For a bag of grade y::

        coral   P(y > k) = sigmoid(o_0 - sum_{j=1..k} softplus(o_j))
                loss = -sum_k ( [y > k] log P(y > k) + [y <= k] log P(y <= k) )
        corn    P(y > k | y > k - 1) = sigmoid(o_k);  P(y > k) = prod_{j<=k} sigmoid(o_j)
                loss = -sum_{k <= y} ( [y > k] log sigmoid(o_k) + [y = k] log(1 - sigmoid(o_k)) )

    The predicted grade counts the thresholds with P(y > k) > 1/2.

    Sources: CORAL of Cao, Mirjalili & Raschka 2020, arXiv:1901.07884; CORN of Shi, Cao & Raschka
    2021, arXiv:2111.08851. CORAL differs: there all thresholds share the last
    layer's weights, and only their biases are learned. A head here makes its own last layer, so the
    order is had from steps that cannot be negative; steps that do not depend on the slide are the
    paper's model. CORN differs: its sum is not divided by the number of conditional examples; so it
    is the negative log-likelihood of the grade.

    The ABMILX recipe (arXiv:2506.02408) trains PANDA's ISUP grades with cross-entropy and reports
    accuracy; set ``monitor=balanced_accuracy`` to select as it does.

    Args:
        classes: the table's words, from the lowest grade to the highest.
        column: the table's column.
        loss: ce, coral or corn.
        label_smoothing: in [0, 1), with ``ce``.
        class_weights: none or balanced; see :class:`Classification`.
        monitor: metric that selects the epoch.
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
            raise UserError(f"task.label_smoothing goes with task.loss=ce, not with {loss}")
        self.num_outputs -= self.ordinal

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """Class number as classes have it; of thresholds a float32 grade, NaN for an empty word.

        No output speaks for the slide's own grade then, so the target is no class number for a head
        that asks for one.
        """
        number = super().encode(words)
        if not self.ordinal:
            return number
        return number.float() if self.is_labelled(number) else torch.tensor(math.nan)

    def _cost(self, logits: Tensor, target: Tensor) -> Tensor:
        if not self.ordinal:
            return super()._cost(logits, target)
        grade = target.unsqueeze(1)
        threshold = torch.arange(self.num_outputs, device=logits.device)
        levels = logits if self.conditional else ordered_levels(logits)
        cost = F.binary_cross_entropy_with_logits(
            levels, (grade > threshold).float(), reduction="none"
        )
        counts = grade >= threshold if self.conditional else grade.isfinite()
        return torch.where(counts, cost, 0.0).sum(dim=1)

    def predict(self, logits: Tensor) -> Tensor:
        """(B, C) probabilities of the grades."""
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

    def _output_of(self, number: int) -> int:
        return max(0, number - 1) if self.ordinal else number


def ordered_levels(outputs: Tensor) -> Tensor:
    """(B, K) any numbers -> (B, K) logits that never rise along K."""
    first, steps = outputs[:, :1], F.softplus(outputs[:, 1:])
    return torch.cat([first, first - steps.cumsum(dim=1)], dim=1)
