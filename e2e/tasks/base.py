"""The contract a task obeys: it alone knows what labels and outputs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from e2e.registry import Registry


class Task:
    """From a table's words to targets, from outputs to loss, probabilities and metrics."""

    columns: tuple[str, ...]
    """Columns of the label table that it reads; the first also stratifies a split."""
    num_outputs: int
    monitor: str
    """The metric by which the best epoch is chosen; higher is better."""
    tie_break: str
    """The metric that decides between epochs equal in ``monitor``; lower is better."""
    output_names: tuple[str, ...]
    """A word for each output, for tables and pictures."""

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """The target of one slide; UserError when a word is not known."""
        raise NotImplementedError

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,) loss of each bag, float32. The trainer divides the sum by the bags of the update."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, num_outputs) float32."""
        raise NotImplementedError

    def metrics(
        self,
        probabilities: NDArray[np.float64],
        targets: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> dict[str, NDArray[np.float64]]:
        """Name -> (R,) values under the R rows of ``weights`` (R, n)."""
        raise NotImplementedError

    def group(self, target: Tensor) -> int:
        """The kind of slide it is, where slides of each kind are to be drawn equally often."""
        raise NotImplementedError

    def describe(self, targets: Sequence[Tensor]) -> str:
        """One line on a split's targets, such as the count of each class."""
        raise NotImplementedError


TASKS: Registry[Task] = Registry("task")
