"""The contract a task obeys: it alone knows what labels and outputs mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from e2e.errors import UserError
from e2e.metrics.figures import Figure
from e2e.metrics.values import LOWER_IS_BETTER, Array, Values
from e2e.registry import Registry, suggest

Numbers = float | list[float]


class Task:
    """From a table's words to targets, from outputs to loss, predictions and metrics.

    A label that is not known is a target of NaN, or of a negative class number; it costs nothing
    and no metric counts it.
    """

    columns: tuple[str, ...]
    """Columns of the label table that it reads; the first also stratifies a split."""
    classes: tuple[str, ...] = ()
    """Words that the first of ``columns`` may hold, in the order of the classes; empty if the column
    holds something else."""
    num_outputs: int
    """C, of the head."""
    output_names: tuple[str, ...]
    """What it tells, in words, for pictures and messages: classes, labels, or the one number."""
    prediction_columns: tuple[str, ...]
    """A column of predictions.csv for each number of :meth:`predict`."""
    label_columns: tuple[str, ...] = ("label",)
    """Its columns that hold the label; see :meth:`words`."""
    monitor: str
    """The metric by which the best epoch is chosen."""
    tie_break: str
    """The metric that decides between epochs equal in ``monitor``."""
    of_cases = False
    """Whether the label is the case's, so that its slides must have the same."""
    whole_update = False
    """Whether a bag's loss hangs on the other bags of its update: :meth:`loss` then has to see the
    bags of all ranks at once, and means nothing for one alone."""

    pools = True
    """Whether predictions of models that were fitted to other cases can be evaluated as one set."""

    fits_predictions = False
    """Whether :meth:`settle` is wanted, which costs a pass over the training slides."""

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """The target of one slide; not known where the word is empty; UserError when it is strange."""
        raise NotImplementedError

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """Take from the training slides, and from them alone, what the task needs of them.

        Args:
            targets: of each training slide.
            cases: of each; what is of a case (a time to an event) counts once a case.

        Raises:
            UserError: nothing can be learned from them.
        """

    def state(self) -> dict[str, Any]:
        """What :meth:`fit` and :meth:`settle` found, as JSON has it; saved with the run."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state`.

        Raises:
            KeyError, ValueError, TypeError: it is of a task with other options.
        """

    def fit_to_predictions(
        self, kept: str, predicted: Array, targets: Array, cases: Sequence[str]
    ) -> None:
        """After the training: take what is wanted of what the kept weights say of the training slides.

        Args:
            kept: the name of the weights, model or ema, to ask for it by :meth:`of`.
            predicted, targets: as of :meth:`metrics`, of each training slide.
            cases: of each.
        """

    def of(self, kept: str) -> Task:
        """The task that reads these weights' outputs, by what :meth:`settle` took of them, if it did."""
        return self

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,) loss of each bag, float32. The trainer divides the sum by the bags of the update.

        Args:
            logits: (B, C); of any precision.
            target: (B,) or (B, ...).
        """
        raise NotImplementedError

    def predict(self, logits: Tensor) -> Tensor:
        """(B, P) in at least float32: probabilities, a risk, a number."""
        raise NotImplementedError

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """Name -> (R,) values under the R rows of ``weights`` (R, n); NaN: not defined.

        Args:
            predicted: (n, P) of :meth:`predict`.
            targets: (n,) or (n, ...) of :meth:`numbers`.
        """
        raise NotImplementedError

    def fitted_reference(self, metric: str) -> object:
        """What of the training cases ``metric`` is measured by; runs are compared where it is the same."""
        return ()

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """What shows how well it went, for the same arguments as :meth:`metrics`."""
        raise NotImplementedError

    def selection_key(self, found: Mapping[str, float | None]) -> tuple[float, float]:
        """What epochs are compared by, more being better: ``monitor``, then ``tie_break``.

        ``found`` are metrics; one that is not defined (None) is worse than any other.
        """
        first, second = (_worth(name, found[name]) for name in (self.monitor, self.tie_break))
        return first, second

    def is_labelled(self, target: Tensor) -> bool:
        """Whether there is a label, be it in part."""
        there = target.isfinite() & ((target >= 0) | target.is_floating_point())
        return bool(there.any())

    def numbers(self, target: Tensor) -> Numbers:
        """A target as metrics take it, NaN where it is not known."""
        return target.double().tolist()

    def words(self, numbers: Numbers) -> list[str]:
        """What ``label_columns`` of predictions.csv say of :meth:`numbers`; empty where not known."""
        values = numbers if isinstance(numbers, list) else [numbers]
        return ["" if math.isnan(value) else f"{value:.12g}" for value in values]

    def read(self, words: Sequence[str]) -> Numbers:
        """:meth:`words` back; ValueError where they are no numbers."""
        values = [float(word) if word else math.nan for word in words]
        return values if len(self.label_columns) > 1 else values[0]

    def shown(self, predicted: Sequence[float]) -> tuple[int, str]:
        """The output whose heatmap is drawn, and what is written over it."""
        raise NotImplementedError

    def of_patches(self, logits: Tensor, predicted: Sequence[float]) -> Tensor:
        """(N,) what of ``predicted`` is shown, as each patch by itself would have it.

        Args:
            logits: (N, C) of the patches.
            predicted: of the slide.
        """
        return self.predict(logits)[:, 0]

    def group(self, target: Tensor) -> int:
        """The kind of slide it is, where slides of each kind are to be drawn equally often."""
        raise NotImplementedError

    def kinds(self, target: Tensor) -> list[str]:
        """What a slide is, in words, of what there is some of in every split that metrics can judge."""
        return []

    def describe(self, targets: Sequence[Tensor]) -> str:
        """One line on a split's targets, such as the count of each class."""
        raise NotImplementedError


TASKS: Registry[Task] = Registry("task")


def choose_monitor(asked: str, default: str, names: Iterable[str]) -> str:
    """``asked``, or if that is empty ``default``; UserError unless it is one of ``names``."""
    chosen, names = asked or default, list(names)
    if chosen not in names:
        raise UserError(f"unknown metric in task.monitor: '{chosen}'{suggest(chosen, names)}")
    return chosen


def check_choice(option: str, word: str, known: Sequence[str]) -> str:
    """``word``; UserError unless it is known."""
    if word not in known:
        raise UserError(f"unknown task.{option} '{word}'{suggest(word, known)}")
    return word


def check_at_least(option: str, value: float, least: float) -> float:
    """``value``; UserError when it is less or endless."""
    if not least <= value < math.inf:
        raise UserError(f"task.{option} must be at least {least:g} and finite, found {value:g}")
    return value


def is_code(word: str, code: str) -> bool:
    """Whether a table's ``word`` is this ``code``: the same text but for case, or the same number."""
    if word.casefold() == code.casefold():
        return True
    try:
        return float(word) == float(code)
    except ValueError:
        return False


def other_code(option: str, code: str, other: str, of: str) -> str:
    """``other``, or if that is empty what 0 and 1 stand against.

    Raises:
        UserError: it cannot be inferred, or is the same.
    """
    other = other or {"0": "1", "1": "0"}.get(code, "")
    if not other:
        raise UserError(
            f"task.{option} must say which code means {of}: '{code}' is neither 0 nor 1"
        )
    if is_code(code, other):
        raise UserError(f"task.{option}: '{other}' cannot mean {of} and its opposite")
    return other


def _worth(name: str, value: float | None) -> float:
    if value is None:
        return -math.inf
    return -value if name in LOWER_IS_BETTER else value
