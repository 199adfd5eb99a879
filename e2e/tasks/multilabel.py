"""Several labels a slide, each there or not, each by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from e2e.errors import UserError
from e2e.metrics.figures import Figure, score_figures
from e2e.metrics.values import Array, Values, multilabel_metrics
from e2e.tasks.base import (
    TASKS,
    Task,
    check_at_least,
    check_choice,
    choose_monitor,
    is_code,
    other_code,
)

LOSSES = ("bce", "asymmetric")


@TASKS.register("multilabel")
class Multilabel(Task):
    """L labels with probabilities p = sigmoid(o); the loss of a bag is a mean over L, where what is
    not known adds 0::

        bce          -log p            for a label that is there, -log(1 - p) for one that is not
        asymmetric   -(1 - p)^a log p, and -q^b log(1 - q) with q = max(p - shift, 0)

    each times w_1 where the label is there, w_0 where it is not (``class_weights``).

    Source of ``asymmetric``: Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification",
    arXiv:2009.14119: easy absent labels, which are most, weigh less or nothing.

    Args:
        labels: the table's columns, one a label.
        positive: the code of a label that is there.
        negative: of one that is not; empty: the other one of 0 and 1. An empty cell is not known.
        loss: bce or asymmetric.
        gamma_positive: a.
        gamma_negative: b.
        shift: in [0, 1).
        class_weights: none, or balanced, for each label: w_1 = n / (2 n_1) and w_0 = n / (2 n_0) for n_1
            of n training slides with the label and n_0 without, so that both weigh the same and a
            training slide 1 in the mean.
        monitor: metric that selects the epoch, such as auc_macro or auc_<label>.
    """

    tie_break = "log_loss"

    def __init__(
        self,
        *,
        labels: list[str],
        positive: str = "1",
        negative: str = "",
        loss: str = "bce",
        gamma_positive: float = 0.0,
        gamma_negative: float = 4.0,
        shift: float = 0.05,
        class_weights: str = "none",
        monitor: str = "auc_macro",
    ) -> None:
        if len(set(labels)) != len(labels) or not labels:
            raise UserError(f"task.labels needs one or more different columns, found {labels}")
        if "macro" in labels:  # auc_macro is the mean
            raise UserError(
                "task.labels: 'macro' is the name of the labels' mean; rename the column"
            )
        if not 0 <= shift < 1:
            raise UserError(f"task.shift must be in [0, 1), found {shift:g}")
        self.columns = self.output_names = tuple(labels)
        self.prediction_columns = tuple(f"prob_{name}" for name in labels)
        self.label_columns = tuple(f"label_{name}" for name in labels)
        self.num_outputs = len(labels)
        self.positive = positive
        self.negative = other_code("negative", positive, negative, "that a label is not there")
        self.asymmetric = check_choice("loss", loss, LOSSES) == "asymmetric"
        self.gammas = (
            check_at_least("gamma_positive", gamma_positive, 0),
            check_at_least("gamma_negative", gamma_negative, 0),
        )
        self.shift = shift
        self.class_weights = check_choice("class_weights", class_weights, ("none", "balanced"))
        self.weights = [[1.0, 1.0] for _ in labels]
        """Of each label where it is not there, and where it is."""
        none = np.zeros((0, len(labels)))
        self.monitor = choose_monitor(
            monitor, "auc_macro", self.metrics(none, none, np.ones((1, 0)))
        )

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """(L,) float32: 1 there, 0 not there, NaN not known."""
        return torch.tensor([self._value(column, words[column]) for column in self.columns])

    def _value(self, column: str, word: str) -> float:
        if not word:
            return math.nan
        if is_code(word, self.positive):
            return 1.0
        if is_code(word, self.negative):
            return 0.0
        raise UserError(
            f"'{word}' in column '{column}' is neither task.positive ('{self.positive}') nor "
            f"task.negative ('{self.negative}')"
        )

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """The labels' weights; UserError for one that is there, or not, on all training slides."""
        table = torch.stack([*targets])
        counts = torch.stack([(table == k).sum(dim=0) for k in (0, 1)], dim=1).tolist()
        for name, (absent, present) in zip(self.columns, counts, strict=True):
            if not absent or not present:
                found = "absent" if absent else "present" if present else "not known"
                raise UserError(
                    f"label '{name}' is {found} on all training slides, so it cannot be learned\n"
                    "  take it out of task.labels, or look at the splits"
                )
        if self.class_weights == "balanced":
            self.weights = [[sum(both) / (2 * n) for n in both] for both in counts]

    def state(self) -> dict[str, Any]:
        """The weights of each label, where they are balanced."""
        if self.class_weights == "none":
            return {}
        return {"class_weights": dict(zip(self.columns, self.weights, strict=True))}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Task`."""
        if self.class_weights == "balanced":
            known = state["class_weights"]
            self.weights = [[float(weight) for weight in known[name]] for name in self.columns]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`Task`."""
        logits, known = logits.float(), target.isfinite()
        there = target == 1
        if not self.asymmetric:
            cost = F.binary_cross_entropy_with_logits(logits, there.float(), reduction="none")
        else:
            cost = torch.where(there, *self._costs(logits))
        absent, present = logits.new_tensor(self.weights).unbind(dim=1)
        return torch.where(known, cost * torch.where(there, present, absent), 0.0).mean(dim=1)

    def _costs(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of labels that are there, and of those that are not."""
        a, b = self.gammas
        chance = logits.sigmoid()
        missed = (1 - chance).clamp_min(1e-8)  # not 0: there a power under 1 has no finite slope
        shifted = (chance - self.shift).clamp(1e-8, 1 - 1e-7)
        absent = -F.logsigmoid(-logits) if not self.shift else -torch.log1p(-shifted)
        return -F.logsigmoid(logits) * missed**a, absent * shifted**b

    def predict(self, logits: Tensor) -> Tensor:
        """(B, L) probabilities."""
        return logits.float().sigmoid()

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :func:`e2e.metrics.values.multilabel_metrics`."""
        return multilabel_metrics(predicted, targets, weights, names=self.output_names)

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.score_figures`; of each label the slides where it is known."""
        scores = {}
        for name, score, target in zip(self.output_names, predicted.T, targets.T, strict=True):
            known = np.isfinite(target)
            scores[name] = (score[known], target[known] == 1)
        return score_figures(scores)

    def read(self, words: Sequence[str]) -> list[float]:
        """See :class:`Task`."""
        return [float(word) if word else math.nan for word in words]

    def shown(self, predicted: Sequence[float]) -> tuple[int, str]:
        """The likeliest label; and all that are likelier than not."""
        there = [
            f"{name} ({p:.2f})"
            for name, p in zip(self.output_names, predicted, strict=True)
            if p > 0.5
        ]
        return int(np.argmax(predicted)), ", ".join(there) or "none"

    def of_patches(self, logits: Tensor, predicted: Sequence[float]) -> Tensor:
        """The probability of the likeliest label."""
        return self.predict(logits)[:, int(np.argmax(predicted))]

    def group(self, target: Tensor) -> int:
        """Which labels are there, as a number."""
        return sum(1 << k for k, value in enumerate(target.tolist()) if value == 1)

    def kinds(self, target: Tensor) -> list[str]:
        """Of each label whether it is there, as far as that is known."""
        codes = {0.0: self.negative, 1.0: self.positive}
        values = zip(self.columns, target.tolist(), strict=True)
        return [f"{name}={codes[value]}" for name, value in values if value in codes]

    def describe(self, targets: Sequence[Tensor]) -> str:
        """How often each label is there, of how many that are known."""
        if not targets:
            return "no label"
        table = torch.stack([*targets])
        counts = zip(self.columns, (table == 1).sum(0), table.isfinite().sum(0), strict=True)
        return ", ".join(f"{name} {int(n)}/{int(known)}" for name, n, known in counts)
