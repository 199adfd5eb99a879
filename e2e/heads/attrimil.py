"""AttriMIL: attribute scores of each patch for each class, ranked against those of other slides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import (
    HEADS,
    BagLoss,
    GatherBags,
    Head,
    HeadOutput,
    class_membership,
    class_numbers,
    clear_padding,
    mask_logits,
    resolve_mask,
)
from e2e.heads.layers import AttentionMLP


@HEADS.register("attrimil")
class AttriMIL(Head):
    """A branch for each class c: gated attention a, a score r, and from both the attribute score s::

        h_n    = x_n + W_2 relu(W_1 x_n + b_1) + b_2            residual adaptor, D -> D/2 -> D
        a_cn   = w_c . (tanh(V_c h_n) * sigmoid(U_c h_n))       D -> D/2 -> 1
        r_cn   = u_c . h_n + d_c
        s_cn   = r_cn exp(a_cn - l_c),    l_c = log( mean_n exp(a_cn) )
        logits = mean_n s_n + b           = sum_n softmax_n(a_cn) r_cn + b_c,  b from 0

    The sign of s_cn says whether patch n is evidence for class c or against it, its size how strong. The
    regulariser ``spatial`` (published with weight 1) makes nearby patches similar. Heatmaps show s_cn of the
    predicted class, as in the publication; tables of heatmaps keep the sign.

    **Ranking across slides.** The patch of each slide with the strongest evidence for class c is stored, as
    a feature, in one of two banks of c: one for slides of class c, one for the other slides. With
    v = max_n s_cn of a slide, and s' the score that the current weights give the oldest patch of the
    *opposite* bank, the loss is

        slide of class c     [s' - v]+ + [-v]+ + [s']+       c the background:  [-v]+ + [s']+
        another slide        [v - s']+ + [v]+                c the background:  [v]+ + [-s']+

    averaged over classes, times ``rank_weight``. The gradient flows through s' too. The slide's patch is
    then appended to its bank; a full bank drops its oldest patch. A slide without a label (a negative class
    number) has no loss and stores no patch. Slides of an update are compared with the banks as they were
    before it, and enter them in the order of their seeds, which is the same on any number of ranks. Banks
    are buffers, saved with the weights.

    Source: Cai et al. 2025, "AttriMIL: Revisiting attention-based multiple instance learning for
    whole-slide pathological image classification from a perspective of instance attributes", Medical
    Image Analysis, arXiv:2404.00351; layers, loss terms and constants as in the authors' code.

    Differences from that code, where it is wrong or unspecific: s is relative to the bag's level l_c (there
    r exp(a), which overflows, and whose scale the constraints can shrink without changing the logits,
    since a softmax ignores it); a patch in a bank keeps the level of its bag; w_c has no bias, because l_c
    cancels it; no class is the background unless one is named (there always class 0); terms without s' count
    from the first slide on (there only once the bank is not empty); banks persist over epochs; one top
    patch, k = 1. The adapters of the backbone are not part of the head.

    The publication calls a slide out of distribution if all its logits are below 0 (or 2).

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    rank_weight : float
        Weight of the ranking loss, where the task's loss has 1; 0 disables the loss and the banks.
    bank_size : int
        Number of patches in each bank.
    background : int | None
        Number of the class whose patches all other slides contain too (normal tissue); None: no such class.

    Raises
    ------
    UserError
        ``rank_weight`` is negative, ``bank_size`` below 1, or ``background`` not a class number.
    """

    aux_loss_needs = "class number"

    bank: Tensor
    """(C, 2, bank_size, D + 1)."""
    filled: Tensor
    """(C, 2) the number of patches in each bank."""

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        rank_weight: float = 5.0,
        bank_size: int = 4,
        background: int | None = None,
    ) -> None:
        super().__init__()
        if not rank_weight >= 0 or bank_size < 1:
            raise UserError(
                f"attrimil: head.rank_weight={rank_weight:g} must be 0 or more, and "
                f"head.bank_size={bank_size} 1 or more"
            )
        if background is not None and not 0 <= background < num_outputs:
            raise UserError(
                f"attrimil: head.background={background} is not a class number, 0 to {num_outputs - 1}\n"
                "  set head.background=null if no class is the background"
            )
        self.rank_weight = rank_weight
        self.background = background
        half = max(1, in_dim // 2)
        self.adapt = nn.Sequential(nn.Linear(in_dim, half), nn.ReLU(), nn.Linear(half, in_dim))
        self.attend = nn.ModuleList(
            AttentionMLP(in_dim, half, gated=True) for _ in range(num_outputs)
        )
        self.value = nn.Linear(in_dim, num_outputs)
        self.bias = nn.Parameter(torch.zeros(num_outputs))
        self._recorded: list[Tensor] | None = None
        if rank_weight:
            # For each class the bank of other slides and that of its slides, the oldest patch first.
            # A row is the patch's feature, with the level of its bag in the last column.
            self.register_buffer("bank", torch.zeros(num_outputs, 2, bank_size, in_dim + 1))
            self.register_buffer("filled", torch.zeros(num_outputs, 2, dtype=torch.long))

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Score each patch for each class; the logit of a bag is the mean score of its patches.

        Parameters
        ----------
        features : Tensor of shape (B, N, D)
            Floating point.
        mask : Tensor of shape (B, N), optional
            bool, True for real patches; None: all are real.
        coords : Tensor of shape (B, N, 2), optional
            Unused.

        Returns
        -------
        HeadOutput
            logits (B, C); attention_logits (B, C, N), the a_cn, with one map for each class;
            instance_logits (B, N, C), the attribute scores s_cn, which are 0 on padding.
        """
        mask = resolve_mask(features, mask)
        x_BND = clear_padding(features, mask)
        value_BNC, attention_BNC = self._branches(x_BND)
        logits_BCN = mask_logits(attention_BNC.transpose(1, 2), mask)
        share_BNC = logits_BCN.softmax(dim=-1).transpose(1, 2) * value_BNC
        score_BNC = share_BNC * mask.sum(dim=1).view(-1, 1, 1)
        aux = self._key_patches(x_BND, score_BNC, logits_BCN, mask) if self.rank_weight else None
        logits_BC = share_BNC.sum(dim=1) + self.bias
        return HeadOutput(logits_BC, logits_BCN, score_BNC, aux, class_maps=True, show_scores=True)

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and a, (..., C) each, of features (..., D)."""
        h = x + self.adapt(x)
        attention = torch.cat([branch(h) for branch in self.attend], dim=-1)
        # float32: in bfloat16 patches tie, and their order would decide which one is the top patch.
        with torch.autocast(h.device.type, enabled=False):
            return self.value(h.to(self.value.weight.dtype)), attention

    def _key_patches(
        self, x_BND: Tensor, score_BNC: Tensor, logits_BCN: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Return what the ranking loss and the banks need: the top patch of each class, the oldest scores."""
        real_BN1 = mask.unsqueeze(-1)
        top_BC, index_BC = score_BNC.masked_fill(~real_BN1, float("-inf")).max(dim=1)
        feature_BCD = x_BND.gather(1, index_BC.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))
        count_B1 = mask.sum(dim=1, keepdim=True).to(logits_BCN.dtype)
        level_BC = logits_BCN.logsumexp(dim=-1) - count_B1.log()
        row_BCW = torch.cat([feature_BCD, level_BC.unsqueeze(-1)], dim=-1)
        oldest = {"oldest": self._score_oldest(), "has_oldest": self.filled.transpose(0, 1) > 0}
        return {"top": top_BC, "row": row_BCW.detach(), **oldest}

    def _score_oldest(self) -> Tensor:
        """Return (2, C) the s' of both banks of each class."""
        feature_C2D, level_C21 = self.bank[:, :, 0].tensor_split([-1], dim=-1)
        value_2C, attention_2C = (
            part_C2C.diagonal(dim1=0, dim2=2) for part_C2C in self._branches(feature_C2D)
        )
        return value_2C * (attention_2C - level_C21.squeeze(-1).transpose(0, 1)).exp()

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor | None:
        """Return ``rank_weight`` times the ranking loss, a mean over bags; None if the weight is 0.

        Parameters
        ----------
        output : HeadOutput
            Of ``forward``.
        target : Tensor
            (B,) class numbers; negative where there is no label.
        loss : BagLoss
            Unused.

        Raises
        ------
        UserError
            The target is no class number.
        """
        if output.aux is None:
            return None
        top_BC, oldest_2C, has_oldest_2C = (output.aux[k] for k in ("top", "oldest", "has_oldest"))
        count = top_BC.shape[1]
        is_member_BC = class_membership(
            target, count, loss_name="AttriMIL's ranking loss", disable_with="head.rank_weight=0"
        )
        numbers_C = class_numbers(count, target.device)
        background_C = numbers_C == (-1 if self.background is None else self.background)
        sign_BC = 1 - 2 * (~is_member_BC).to(
            top_BC.dtype
        )  # 1 where the slide is of the class, else -1
        opposite_BC = torch.where(is_member_BC, oldest_2C[0], oldest_2C[1])
        has_opposite_BC = torch.where(is_member_BC, has_oldest_2C[0], has_oldest_2C[1])

        order_BC = (sign_BC * (opposite_BC - top_BC)).relu() * ~background_C
        other_BC = (sign_BC * opposite_BC).relu() * (is_member_BC | background_C)
        cost_BC = (-sign_BC * top_BC).relu() + torch.where(
            has_opposite_BC, order_BC + other_BC, 0.0
        )
        cost_BC = torch.where((target >= 0).unsqueeze(1), cost_BC, 0.0)
        return self.rank_weight * cost_BC.mean()

    def record_bags(
        self, outputs: Sequence[HeadOutput], target: Tensor, gather_bags: GatherBags
    ) -> None:
        """See :class:`~e2e.heads.base.Head`: stores the top patches of all bags of the update."""
        rows = [output.aux["row"] for output in outputs if output.aux is not None]
        if rows:
            self._recorded = gather_bags([target, torch.cat(rows)])

    @torch.no_grad()
    def after_step(self, good: Tensor) -> None:
        """See :class:`~e2e.heads.base.Head`: adds the recorded patches to the banks, bag by bag."""
        if self._recorded is None:
            return
        bank, filled = self.bank, self.filled
        for number, row_CW in zip(*self._recorded, strict=True):
            is_member_C = number == class_numbers(len(row_CW), row_CW.device)
            moved = add_to_banks(bank, filled, is_member_C, row_CW.to(bank.dtype))
            bank, filled = (
                torch.where(number >= 0, new, old)
                for new, old in zip(moved, (bank, filled), strict=True)
            )
        self._recorded = None
        self.bank.copy_(torch.where(good, bank, self.bank))
        self.filled.copy_(torch.where(good, filled, self.filled))


def add_to_banks(
    bank_C2KW: Tensor, filled_C2: Tensor, is_member_C: Tensor, row_CW: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the banks, and how many patches they hold, after one bag.

    Its top patch of each class is appended to the bank on its side, which drops its oldest patch if it is
    full. In the opposite bank the oldest patch, with which the bag was compared, moves to the end.

    Parameters
    ----------
    bank_C2KW : Tensor of shape (C, 2, K, W)
        The banks.
    filled_C2 : Tensor of shape (C, 2)
        How many patches they hold.
    is_member_C : Tensor of shape (C,)
        bool, whether the bag is of the class.
    row_CW : Tensor of shape (C, W)
        The rows of its top patches.
    """
    size = bank_C2KW.shape[2]
    slot_K = torch.arange(size, device=bank_C2KW.device)
    side_C21 = torch.stack([~is_member_C, is_member_C], dim=1).unsqueeze(-1)
    filled_C21 = filled_C2.unsqueeze(-1)
    shifted_C2K = (slot_K + (filled_C21 == size)).clamp(max=size - 1)
    rotated_C2K = torch.where(slot_K < filled_C21, (slot_K + 1) % filled_C21.clamp(min=1), slot_K)
    source_C2K = torch.where(side_C21, shifted_C2K, rotated_C2K)
    moved_C2KW = bank_C2KW.take_along_dim(source_C2K.unsqueeze(-1), dim=2)
    new_C2K = side_C21 & (slot_K == filled_C21.clamp(max=size - 1))
    rows_C11W = row_CW.unsqueeze(1).unsqueeze(1)
    moved_C2KW = torch.where(new_C2K.unsqueeze(-1), rows_C11W, moved_C2KW)
    return moved_C2KW, (filled_C21 + side_C21).clamp(max=size).squeeze(-1)
