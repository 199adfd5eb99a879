"""The interface of a regulariser: an extra loss that can be added to any head.

Shape letters: B bags, A attention maps, N patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HeadOutput
from e2e.registry import Registry


@dataclass(frozen=True)
class Weight:
    """The weight of a loss over the course of training.

    Parameters
    ----------
    peak : float
        The weight itself.
    schedule : str
        ``constant``, or ``cosine``: half a cosine from ``peak`` to 0 at the end.
    warmup : float
        Fraction of the training over which a factor on the above rises linearly from 0 to 1.

    Raises
    ------
    UserError
        A value is out of range.
    """

    peak: float
    schedule: str = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.peak < math.inf:
            raise UserError(
                f"the weight of a loss must be a finite number of at least 0, found {self.peak}"
            )
        if self.schedule not in ("constant", "cosine"):
            raise UserError(
                f"the schedule of a loss must be constant or cosine, found '{self.schedule}'"
            )
        if not 0 <= self.warmup < 1:
            raise UserError(f"the warmup of a loss must be in [0, 1), found {self.warmup}")

    def at(self, progress: float) -> float:
        """Return the weight at ``progress``, the completed fraction of the training in 0..1."""
        rise = min(1.0, progress / self.warmup) if self.warmup else 1.0
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1.0
        return self.peak * rise * fall


class Regulariser(nn.Module):
    """Base class of regularisers: ``forward(output, target, coords, sides) -> (B,)``, in at least float32.

    A regulariser has no parameters. Its state (a bank, a queue) is buffers, saved with the run, which
    ``forward`` may read and only ``after_step`` changes. Padding is where ``attention_logits`` are -inf.

    Constructor: keyword-only options, among them ``weight``, ``schedule`` and ``warmup``, which make
    :attr:`weight`; a weight of 0 disables the regulariser. Its registered name is the name of its section in
    the settings.
    """

    weight: Weight
    """The weight of the loss."""

    needs_coords = False
    """Whether training slides must have ``coords``."""

    def forward(
        self, output: HeadOutput, target: Tensor, coords: Tensor | None, sides: Tensor
    ) -> Tensor:
        """Return the loss of each bag, (B,).

        Parameters
        ----------
        output : HeadOutput
            Output of the head.
        target : Tensor of shape (B,) or (B, ...)
            Targets of the task.
        coords : Tensor of shape (B, N, 2) | None
            Level-0 pixels; None if unknown.
        sides : Tensor of shape (B,)
            Side of a bag's patches in level-0 pixels; NaN where it is unknown.
        """
        raise NotImplementedError

    def check(self, output: HeadOutput) -> None:
        """Raise UserError if a head with an output like this one (with its graph) cannot be regularised."""

    def after_step(self, good: Tensor) -> None:
        """See :meth:`e2e.heads.base.Head.after_step`."""


REGULARISERS: Registry[Regulariser] = Registry("regulariser")


def log_attention(output: HeadOutput) -> tuple[Tensor, Tensor]:
    """Return the log attention (B, A, N), 0 on padding, and a mask (B, A, N) of the real patches.

    Raises
    ------
    ValueError
        The head has no attention.
    """
    if output.attention_logits is None:
        raise ValueError("the head has no attention")
    is_real = output.attention_logits > -math.inf
    logs = output.attention_logits.log_softmax(dim=-1)
    return torch.where(is_real, logs, 0.0), is_real
