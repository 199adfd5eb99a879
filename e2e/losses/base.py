"""The contract a regulariser obeys: an extra loss that goes with any head."""

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
    """The weight of a loss over the course of a training.

    Parameters
    ----------
    peak : float
        The weight itself.
    schedule : str
        ``constant``, or ``cosine``: half a cosine from ``peak`` to 0 at the end.
    warmup : float
        Share of the training over which it first rises from 0, as a factor on the above.

    Raises
    ------
    UserError
        A value out of range.
    """

    peak: float
    schedule: str = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.peak < math.inf:
            raise UserError(f"weight of a loss: must be at least 0 and finite, found {self.peak}")
        if self.schedule not in ("constant", "cosine"):
            raise UserError(
                f"schedule of a loss: must be constant or cosine, found '{self.schedule}'"
            )
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup of a loss: must be in [0, 1), found {self.warmup}")

    def at(self, progress: float) -> float:
        """The weight when this share of the training, 0 to 1, is done."""
        rise = min(1.0, progress / self.warmup) if self.warmup else 1.0
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1.0
        return self.peak * rise * fall


class Regulariser(nn.Module):
    """``forward(output, target, coords) -> (B,)``: an extra loss of each bag, in at least float32.

    It has no parameters. State (a bank, a queue) is buffers, which are saved with the run; it may
    read them in ``forward`` and moves them on in ``after_step`` alone. What an output has for
    padding is told by its ``attention_logits``, which are -inf there.

    Constructor: keyword-only options, among them ``weight``, ``schedule`` and ``warmup``, which make
    :attr:`weight`; a weight of 0 leaves the regulariser out of the run. Its registered name is its
    section of the settings.
    """

    weight: Weight

    needs_coords = False
    """Whether it cannot do without the coords of a training slide."""

    def forward(self, output: HeadOutput, target: Tensor, coords: Tensor | None) -> Tensor:
        """(B,) for the B bags of ``output``.

        Parameters
        ----------
        output : HeadOutput
            Of the head.
        target : Tensor
            (B,) or (B, ...) what the task made of the labels.
        coords : Tensor | None
            (B,N,2) level-0 pixels; None where nobody knows them.
        """
        raise NotImplementedError

    def check(self, output: HeadOutput) -> None:
        """UserError where a head with outputs like this one (with their graph) cannot be regularised so."""

    def after_step(self, good: Tensor) -> None:
        """As :meth:`e2e.heads.base.Head.after_step`."""


REGULARISERS: Registry[Regulariser] = Registry("regulariser")


def log_attention(output: HeadOutput) -> tuple[Tensor, Tensor]:
    """(B,A,N) log attention, 0 on padding, and the mask (B,A,N) of what is real.

    Raises
    ------
    ValueError
        The head has no attention.
    """
    if output.attention_logits is None:
        raise ValueError("the head has no attention")
    real = output.attention_logits > -math.inf
    logs = output.attention_logits.log_softmax(dim=-1)
    return torch.where(real, logs, 0.0), real
