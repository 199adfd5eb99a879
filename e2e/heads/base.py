"""The interface of a MIL head: features of a bag -> outputs of the task.

Shape letters: B bags, N patches of the longest bag, D width of the features, C outputs of the task,
A attention maps, H attention heads, E width inside the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.registry import Registry

BagLoss = Callable[[Tensor, Tensor], Tensor]
"""The task's loss: logits (B, C) and targets (B, ...) -> (B,)."""

GatherBags = Callable[[Sequence[Tensor]], list[Tensor]]
"""Gathers tensors over ranks: from one row for each bag of this rank to one row for each bag of the
update, in the same order on every rank. All ranks call it, or none."""


class HeadOutput(NamedTuple):
    """The output of every head."""

    logits: Tensor
    """(B, C)."""
    attention_logits: Tensor | None = None
    """(B, A, N), at least float32, before the softmax over patches; -inf on padding."""
    instance_logits: Tensor | None = None
    """(B, N, C) of heads that score single patches; the values on padding are meaningless."""
    aux: dict[str, Tensor] | None = None
    """What the head's own ``aux_loss`` and ``record_bags`` need; nothing else reads it."""
    class_maps: bool = False
    """Whether attention map c belongs to output c."""
    show_scores: bool = False
    """Whether heatmaps show ``instance_logits``, as in the publication, instead of the attention."""

    def attention(self) -> Tensor | None:
        """Return the attention (B, A, N): >= 0, sums to 1 over real patches, exactly 0 on padding."""
        return None if self.attention_logits is None else self.attention_logits.softmax(dim=-1)


class Head(nn.Module):
    """Base class of heads: ``head(features, mask=None, coords=None) -> HeadOutput``.

    A head never sees labels, file names, devices or ranks. Padded patches (``mask`` False) change
    nothing, whatever they hold, NaN included. The input is not modified. Constructor:
    ``(in_dim, num_outputs, *, options)``; the options need defaults.
    """

    needs_coords = False
    """Whether ``coords`` are required."""

    permutation_invariant = True
    """Whether the order of the patches changes nothing."""

    exports_any_size = True
    """Whether ``torch.export`` gives a program for bags of any number of patches."""

    aux_loss_needs: Literal["nothing", "class number", "task loss"] = "nothing"
    """What :meth:`aux_loss` needs: one class number for each bag, or the task's loss of single bags."""

    zero_gradient_parameters: tuple[str, ...] = ()
    """Names of parameters whose gradient is always zero, because the softmax cancels them."""

    teachers: Mapping[str, str] = MappingProxyType({})
    """Teacher submodule -> the submodule (its student) whose exponential moving average it is, by attribute.

    A teacher has the student's parameters and buffers. The model freezes it, and after each optimiser step
    that was made moves it by :meth:`e2e.parallel.base.Strategy.average_into`, before :meth:`after_step`."""

    teacher_decay: float = 0.999
    """Weight of a teacher's old value in its moving average, 0 to 1."""

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Pool the features of each bag and map them to the outputs of the task.

        Parameters
        ----------
        features : Tensor of shape (B, N, D)
            Floating point.
        mask : Tensor of shape (B, N), optional
            bool, True for real patches and False for padding, with at least one True in each row. None: all
            patches are real.
        coords : Tensor of shape (B, N, 2), optional
            x and y of the patches in level-0 pixels.
        """
        raise NotImplementedError

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor | None:
        """Return the extra loss of this head, a mean over bags, or None. It has no parameters of its own.

        Parameters
        ----------
        output : HeadOutput
            From ``forward``.
        target : Tensor of shape (B,) or (B, ...)
            Targets of the task.
        loss : BagLoss
            The task's loss, for heads that apply it to more than the logits of the bag.
        """
        return None

    def record_bags(
        self, outputs: Sequence[HeadOutput], target: Tensor, gather_bags: GatherBags
    ) -> None:
        """Store what :meth:`after_step` needs of the bags of this update. Called without gradients.

        Parameters
        ----------
        outputs : Sequence of HeadOutput
            From ``forward``, together for all bags of this rank.
        target : Tensor of shape (B,) or (B, ...)
            Targets of these bags.
        gather_bags : GatherBags
            For heads that use the bags of all ranks.
        """

    def after_step(self, good: Tensor) -> None:
        """Update state that is not a parameter (queues, teachers), once per optimiser step.

        Parameters
        ----------
        good : Tensor of shape ()
            bool, on the device; False if the step was skipped, and then no state may change.
        """


HEADS: Registry[Head] = Registry("head")


def resolve_mask(features: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``mask``, or a mask of real patches only if it is None.

    Parameters
    ----------
    features : Tensor of shape (B, N, D)
        Checked to have three dimensions.
    mask : Tensor of shape (B, N), optional
        True for real patches.

    Raises
    ------
    ValueError
        ``features`` is not three-dimensional.
    """
    if features.dim() != 3:
        raise ValueError(
            f"features must have the shape (bags, patches, width), got {tuple(features.shape)}\n"
            "  for one bag pass features.unsqueeze(0)"
        )
    if mask is None:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return mask


def class_numbers(num_outputs: int, device: torch.device) -> Tensor:
    """Return (C,) the class of each output; a single output belongs to class 1."""
    return torch.arange(num_outputs, device=device) + (num_outputs == 1)


def class_membership(
    target: Tensor, num_outputs: int, *, loss_name: str, disable_with: str
) -> Tensor:
    """Return (B, C) bool: whether a bag is of the class of each output; False without a label.

    Parameters
    ----------
    target : Tensor of shape (B,)
        Class numbers; negative for a missing label.
    num_outputs : int
        C.
    loss_name : str
        The loss that needs the classes, for the message.
    disable_with : str
        The setting that disables this loss, for the message.

    Raises
    ------
    UserError
        The target is not a class number.
    """
    if target.dim() != 1 or target.is_floating_point():
        raise UserError(
            f"{loss_name} needs one class number a slide, found targets of shape "
            f"{tuple(target.shape)} and type {target.dtype}\n"
            f"  set {disable_with} to train the head without it"
        )
    return target.unsqueeze(1) == class_numbers(num_outputs, target.device)


def clear_padding(features: Tensor, mask: Tensor) -> Tensor:
    """Return ``features`` (B, N, D) with zeros on padding, so that no NaN or Inf spreads from there."""
    return torch.where(mask.unsqueeze(-1), features, features.new_zeros(()))


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Return (B, A, N) logits in at least float32, with -inf where ``mask`` (B, N) is False.

    float32, because a softmax over 20,000 patches underflows in half precision.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.masked_fill(~mask.unsqueeze(1), float("-inf"))
