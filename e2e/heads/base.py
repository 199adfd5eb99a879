"""The contract a MIL head obeys.

Shape letters: B bags, N patches of the longest bag, D width of the encoder's features,
C outputs of the task, A attention maps, H attention heads, E width inside the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.registry import Registry

BagLoss = Callable[[Tensor, Tensor], Tensor]
"""(B, C) logits, (B, ...) targets -> (B,) losses."""

OfUpdate = Callable[[Sequence[Tensor]], list[Tensor]]
"""Tensors with a row for each bag of this rank -> the same with one for each bag of the update, in an order
that is the same on every rank. Every rank calls it, or none does."""


class HeadOutput(NamedTuple):
    """What every head returns, always."""

    logits: Tensor
    """(B, C)."""
    attention_logits: Tensor | None = None
    """(B, A, N), at least float32, before the softmax over patches; -inf on padding."""
    instance_logits: Tensor | None = None
    """(B, N, C) for methods that score single patches; what padding holds means nothing."""
    aux: dict[str, Tensor] | None = None
    """What the head's own ``aux_loss`` needs; nobody else reads it."""
    class_maps: bool = False
    """Whether attention map c is that of output c."""
    show_scores: bool = False
    """Whether heatmaps show ``instance_logits``, as the publication's do, and not the attention."""

    def attention(self) -> Tensor | None:
        """(B, A, N) >= 0, sums to 1 over real patches, exactly 0 on padding."""
        return None if self.attention_logits is None else self.attention_logits.softmax(dim=-1)


class Head(nn.Module):
    """``forward(features (B,N,D), mask (B,N), coords (B,N,2) or None) -> HeadOutput``.

    A head never sees labels, file names, devices or ranks. Padded patches (``mask`` False)
    change nothing, whatever they hold, NaN included; every row of the mask has one True.
    Its input is left untouched. Constructor: ``(in_dim, num_outputs, *, options)``.
    """

    needs_coords = False
    """Whether a slide without coords cannot be pooled."""

    order_free = True
    """Whether the result is free of the order of the patches."""

    zero_gradient: tuple[str, ...] = ()
    """Parameters whose gradient is zero by the mathematics (name as in ``named_parameters``)."""

    teachers: Mapping[str, str] = MappingProxyType({})
    """Teacher submodule -> the submodule (its student) whose exponential moving average it is, by attribute.

    A teacher has the student's parameters and buffers. The model freezes it, and after each optimiser step
    that was made moves it by :meth:`e2e.parallel.base.Strategy.average_into`, before :meth:`after_step`."""

    teacher_decay: float = 0.999
    """Weight of a teacher's old value in its moving average, 0 to 1."""

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Pool each bag's features and map them to the task's outputs."""
        raise NotImplementedError

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor | None:
        """Mean over bags of the extra loss some methods need. Has no parameters of its own.

        Args:
            output: of ``forward``.
            target: (B,) or (B, ...) what the task made of the labels.
            loss: the task's own, for methods that use it on more than the slide's logits; what a
                target means is the task's business.
        """
        return None

    def remember(self, outputs: Sequence[HeadOutput], target: Tensor, of_update: OfUpdate) -> None:
        """Take from the bags of an update what :meth:`after_step` puts into queues. Without gradients.

        Args:
            outputs: of ``forward``, which together are those of this rank's bags.
            target: (B,) or (B, ...) of these bags.
            of_update: for what all ranks must know of each other's bags.
        """

    def after_step(self, good: Tensor) -> None:
        """Move on what is no parameter (queues, teachers), once per optimiser step.

        ``good`` (0-d bool on the device): False where the step was skipped and nothing may move.
        """


HEADS: Registry[Head] = Registry("head")


def class_numbers(outputs: int, device: torch.device) -> Tensor:
    """(C,) the class of each output; a single output is that of class 1."""
    return torch.arange(outputs, device=device) + (outputs == 1)


def class_membership(target: Tensor, outputs: int, *, loss: str, without: str) -> Tensor:
    """(B, C) whether a bag is of the class of each output; of none where its label is not known.

    Args:
        target: (B,) class numbers; negative where there is no label.
        outputs: C.
        loss: whose loss needs them, for the message.
        without: what to set to train the head without that loss, for the message.

    Raises:
        UserError: the target is no class number.
    """
    if target.dim() != 1 or target.is_floating_point():
        raise UserError(
            f"{loss} needs one class number a slide, found targets of shape "
            f"{tuple(target.shape)} and type {target.dtype}\n"
            f"  set {without} to train the head without it"
        )
    return target.unsqueeze(1) == class_numbers(outputs, target.device)


def clear_padding(features: Tensor, mask: Tensor) -> Tensor:
    """``features`` (B,N,D) with exact zeros on padding, so that no NaN or Inf there can spread."""
    return torch.where(mask.unsqueeze(-1), features, features.new_zeros(()))


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """(B,A,N) logits in at least float32, with -inf where ``mask`` (B,N) is False.

    float32, because a softmax over 20,000 patches underflows in half precision.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.masked_fill(~mask.unsqueeze(1), float("-inf"))
