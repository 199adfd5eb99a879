"""Multi-label classification: several labels of a slide, each present or absent."""

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
    TaskExample,
    check_at_least,
    check_choice,
    choose_monitor,
    matches_code,
    opposite_code,
)

LOSSES = ("bce", "asymmetric")


@TASKS.register("multilabel")
class Multilabel(Task):
    """L labels with probabilities p = sigmoid(o).

    The loss of a bag is the mean over the L labels, to which a missing label adds 0::

        bce          -log p            for a label that is present, -log(1 - p) for one that is absent
        asymmetric   -(1 - p)^a log p, and -q^b log(1 - q) with q = max(p - shift, 0)

    each times w_1 where the label is present, and w_0 where it is absent (``class_weights``).

    Source of ``asymmetric``: Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification",
    arXiv:2009.14119. Absent labels, most of which are easy, weigh less or nothing.

    Parameters
    ----------
    labels : list of str
        Columns of the label table, one for each label.
    positive : str
        Code of a label that is present.
    negative : str
        Code of a label that is absent; empty: the other one of 0 and 1. An empty cell is a missing label.
    loss : str
        ``bce`` (binary cross-entropy) or ``asymmetric``.
    gamma_positive : float
        Exponent a of ``asymmetric``.
    gamma_negative : float
        Exponent b of ``asymmetric``.
    shift : float
        Probability below which an absent label costs nothing with ``asymmetric``, in [0, 1).
    class_weights : str
        ``none``, or ``balanced``, label by label: w_1 = n / (2 n_1) and w_0 = n / (2 n_0), where n_1 of
        the n labelled training slides have the label and n_0 do not, so that both have the same total
        weight and the mean weight of a training slide is 1.
    monitor : str
        Metric that selects the epoch, such as ``auc_macro`` or ``auc_<label>``.

    Raises
    ------
    UserError
        An option is out of range.
    """

    tie_break_metric = "log_loss"
    main_metrics = ("auc_macro", "ap_macro", "f1_macro")

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
            raise UserError(f"task.labels={labels} must name one or more different columns")
        if "macro" in labels:  # auc_macro is the mean over labels
            raise UserError(
                "task.labels: 'macro' is the name of the mean over labels\n  rename the column"
            )
        if not 0 <= shift < 1:
            raise UserError(f"task.shift={shift:g} must be in [0, 1)")
        self.columns = self.output_names = tuple(labels)
        self.prediction_columns = tuple(f"prob_{name}" for name in labels)
        self.label_columns = tuple(f"label_{name}" for name in labels)
        self.num_outputs = len(labels)
        self.positive = positive
        self.negative = opposite_code("negative", positive, negative, "the label is absent")
        self.asymmetric = check_choice("loss", loss, LOSSES) == "asymmetric"
        self.gammas = (
            check_at_least("gamma_positive", gamma_positive, 0),
            check_at_least("gamma_negative", gamma_negative, 0),
        )
        self.shift = shift
        self.class_weights = check_choice("class_weights", class_weights, ("none", "balanced"))
        self.weights = [[1.0, 1.0] for _ in labels]
        """For each label the weights w_0 and w_1."""
        no_slides = np.zeros((0, len(labels)))
        metrics = self.metrics(no_slides, no_slides, np.ones((1, 0)))
        self.monitor = choose_monitor(monitor, "auc_macro", metrics)

    @classmethod
    def examples(cls) -> list[TaskExample]:
        """See :class:`~e2e.tasks.base.Task`."""
        rows = [{"er": er, "pr": pr} for er, pr in zip("0101101", "1100110", strict=True)]
        variants = ({}, {"loss": "asymmetric"}, {"class_weights": "balanced"})
        return [TaskExample({"labels": ["er", "pr"], **options}, rows) for options in variants]

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """Return (L,) float32: 1 present, 0 absent, NaN missing."""
        return torch.tensor([self._label_value(column, cells[column]) for column in self.columns])

    def _label_value(self, column: str, cell: str) -> float:
        if not cell:
            return math.nan
        if matches_code(cell, self.positive):
            return 1.0
        if matches_code(cell, self.negative):
            return 0.0
        raise UserError(
            f"'{cell}' in column '{column}' is neither task.positive ('{self.positive}') nor "
            f"task.negative ('{self.negative}')\n"
            "  set both to the codes of the table; an empty cell is a missing label"
        )

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """Compute the weights of the labels.

        Raises
        ------
        UserError
            A label is present, absent or missing on all training slides.
        """
        table = torch.stack([*targets])
        counts = torch.stack([(table == k).sum(dim=0) for k in (0, 1)], dim=1).tolist()
        for name, (absent, present) in zip(self.columns, counts, strict=True):
            if not absent or not present:
                state = "absent" if absent else "present" if present else "missing"
                raise UserError(
                    f"label '{name}' is {state} on all training slides, so it cannot be learned\n"
                    "  remove it from task.labels, or check the splits"
                )
        if self.class_weights == "balanced":
            self.weights = [[sum(both) / (2 * n) for n in both] for both in counts]

    def state(self) -> dict[str, Any]:
        """Return the weights of each label if they are balanced."""
        if self.class_weights == "none":
            return {}
        return {"class_weights": dict(zip(self.columns, self.weights, strict=True))}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~e2e.tasks.base.Task`."""
        if self.class_weights == "balanced":
            weights = state["class_weights"]
            self.weights = [[float(weight) for weight in weights[name]] for name in self.columns]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`~e2e.tasks.base.Task`."""
        logits = logits.float()
        is_present = target == 1
        if not self.asymmetric:
            loss = F.binary_cross_entropy_with_logits(logits, is_present.float(), reduction="none")
        else:
            loss = torch.where(is_present, *self._asymmetric_losses(logits))
        absent, present = logits.new_tensor(self.weights).unbind(dim=1)
        weighted = loss * torch.where(is_present, present, absent)
        return torch.where(target.isfinite(), weighted, 0.0).mean(dim=1)

    def _asymmetric_losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of present labels, and those of absent labels."""
        a, b = self.gammas
        probability = logits.sigmoid()
        missed = (1 - probability).clamp_min(
            1e-8
        )  # not 0: a power below 1 has no finite slope there
        shifted = (probability - self.shift).clamp(1e-8, 1 - 1e-7)
        absent = -F.logsigmoid(-logits) if not self.shift else -torch.log1p(-shifted)
        return -F.logsigmoid(logits) * missed**a, absent * shifted**b

    def predict(self, logits: Tensor) -> Tensor:
        """Return the probability of each label, (B, L)."""
        return logits.float().sigmoid()

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :func:`e2e.metrics.values.multilabel_metrics`."""
        return multilabel_metrics(predicted, targets, weights, names=self.output_names)

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.score_figures`; for each label its labelled slides."""
        scores = {}
        for name, score, target in zip(self.output_names, predicted.T, targets.T, strict=True):
            is_labelled = np.isfinite(target)
            scores[name] = (score[is_labelled], target[is_labelled] == 1)
        return score_figures(scores)

    def parse_labels(self, cells: Sequence[str]) -> list[float]:
        """See :class:`~e2e.tasks.base.Task`; a list even for one label."""
        return [float(cell) if cell else math.nan for cell in cells]

    def format_prediction(self, predicted: Sequence[float]) -> str:
        """Return the labels with a probability above 1/2, separated by semicolons; ``none`` without any."""
        pairs = zip(self.output_names, predicted, strict=True)
        return ";".join(name for name, probability in pairs if probability > 0.5) or "none"

    def heatmap_output(self, predicted: Sequence[float]) -> tuple[int, str]:
        """Return the most probable label, and all labels with a probability above 1/2."""
        probable = [
            f"{name} ({p:.2f})"
            for name, p in zip(self.output_names, predicted, strict=True)
            if p > 0.5
        ]
        return int(np.argmax(predicted)), ", ".join(probable) or "none"

    def patch_predictions(self, logits: Tensor, predicted: Sequence[float]) -> Tensor:
        """Return the probability of the slide's most probable label."""
        return self.predict(logits)[:, int(np.argmax(predicted))]

    def group(self, target: Tensor) -> int:
        """Return the set of labels that are present, as a number."""
        return sum(1 << k for k, value in enumerate(target.tolist()) if value == 1)

    def categories(self, target: Tensor) -> list[str]:
        """Return ``column=code`` for each label that is not missing."""
        codes = {0.0: self.negative, 1.0: self.positive}
        values = zip(self.columns, target.tolist(), strict=True)
        return [f"{name}={codes[value]}" for name, value in values if value in codes]

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Return for each label how often it is present, of how many labelled slides."""
        if not targets:
            return "no label"
        table = torch.stack([*targets])
        counts = zip(self.columns, (table == 1).sum(0), table.isfinite().sum(0), strict=True)
        return ", ".join(f"{name} {int(n)}/{int(labelled)}" for name, n, labelled in counts)
