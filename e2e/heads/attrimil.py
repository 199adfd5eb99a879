"""AttriMIL: how much each patch speaks for or against each class, ranked against other slides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import (
    HEADS,
    BagLoss,
    Head,
    HeadOutput,
    OfUpdate,
    class_membership,
    class_numbers,
    clear_padding,
    mask_logits,
)
from e2e.heads.layers import AttentionMLP


@HEADS.register("attrimil")
class AttriMIL(Head):
    """A branch for each class c: gated attention a, a score r, and of both the attribute score s::

        h_n    = x_n + W_2 relu(W_1 x_n + b_1) + b_2            residual adaptor, D -> D/2 -> D
        a_cn   = w_c . (tanh(V_c h_n) * sigmoid(U_c h_n))       D -> D/2 -> 1
        r_cn   = u_c . h_n + d_c
        s_cn   = r_cn exp(a_cn - l_c),    l_c = log( mean_n exp(a_cn) )
        logits = mean_n s_n + b           = sum_n softmax_n(a_cn) r_cn + b_c,  b from 0

    The sign of s_cn says whether patch n speaks for class c or against it, its size how much. Patches
    near each other are made alike by the regulariser ``spatial`` (published with weight 1). Heatmaps show
    s_cn of the predicted class, as the publication's do; their tables have its sign.

    **Ranking across slides.** Of each slide the patch that speaks most for class c goes, as a feature,
    into one of c's two banks: that of slides of class c or that of the others. With v = max_n s_cn of a
    slide, and s' the score that the weights of this moment give the oldest patch of the *opposite* bank,

        slide of class c     [s' - v]+ + [-v]+ + [s']+       c the background:  [-v]+ + [s']+
        another slide        [v - s']+ + [v]+                c the background:  [v]+ + [-s']+

    meaned over classes, times ``rank_weight``. The gradient flows through s' too. That patch then goes
    to the end of its bank; a full bank drops its oldest. A slide without a label (a negative class number)
    costs nothing and leaves no patch. Slides of one update are compared with what the banks held before
    it, and enter them in the order of their seeds: alike on any number of ranks. Banks are buffers, saved
    with the weights.

    Source: Cai et al. 2025, "AttriMIL: Revisiting attention-based multiple instance learning for
    whole-slide pathological image classification from a perspective of instance attributes", Medical
    Image Analysis, arXiv:2404.00351; layers, terms and figures as in the authors' program.

    Differs from that program, where it is at fault or silent: s is taken relative to the bag's level l_c
    (there r exp(a), which overflows, and whose scale the constraints can shrink at no cost to the logits,
    since a softmax is free of it); a patch in a bank keeps the level of its bag; w_c has no bias, because
    l_c cancels it; no class is the background unless one is named (there class 0, also where it is none);
    terms without s' count from the first slide on (there none while the bank is empty); banks live on
    over epochs; a top patch is one, of k = 1. The backbone's adapters are no part of a head.

    The publication calls a slide out of distribution if all its logits lie under 0 (or 2).

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        rank_weight: of the ranking loss, the task's being 1; 0 leaves it and the banks out.
        bank_size: patches a bank holds.
        background: the class that all other slides also have (normal tissue); None: no such class.

    Raises:
        UserError: a negative ``rank_weight``, ``bank_size`` under 1, a ``background`` that is no class.
    """

    bank: Tensor
    filled: Tensor

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
                "AttriMIL needs rank_weight >= 0 and bank_size >= 1, "
                f"found {rank_weight} and {bank_size}"
            )
        if background is not None and not 0 <= background < num_outputs:
            raise UserError(
                f"AttriMIL's background is a class number, 0 to {num_outputs - 1}, found {background}"
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
        self._seen: list[Tensor] | None = None
        if rank_weight:
            # Of each class the banks of other slides and of its own, the oldest patch first: its
            # feature, and in the last column the level of its bag.
            self.register_buffer("bank", torch.zeros(num_outputs, 2, bank_size, in_dim + 1))
            self.register_buffer("filled", torch.zeros(num_outputs, 2, dtype=torch.long))

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Score each patch for each class; a bag's logit is the mean of its patches'.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C); one attention map a class, attention_logits (B, C, N), the a_cn;
            instance_logits (B, N, C), the attribute scores s_cn, which are 0 on padding.
        """
        x_BND = clear_padding(features, mask)
        value_BNC, attention_BNC = self._branches(x_BND)
        logits_BCN = mask_logits(attention_BNC.transpose(1, 2), mask)
        share_BNC = logits_BCN.softmax(dim=-1).transpose(1, 2) * value_BNC
        score_BNC = share_BNC * mask.sum(dim=1).view(-1, 1, 1)
        aux = self._key_patches(x_BND, score_BNC, logits_BCN, mask) if self.rank_weight else None
        logits_BC = share_BNC.sum(dim=1) + self.bias
        return HeadOutput(logits_BC, logits_BCN, score_BNC, aux, class_maps=True, show_scores=True)

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> r and a, (..., C) each."""
        h = x + self.adapt(x)
        attention = torch.cat([branch(h) for branch in self.attend], dim=-1)
        # float32: in bfloat16 patches tie, and their order would choose a class's top patch.
        with torch.autocast(h.device.type, enabled=False):
            return self.value(h.to(self.value.weight.dtype)), attention

    def _key_patches(
        self, x_BND: Tensor, score_BNC: Tensor, logits_BCN: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """What the ranking loss and the banks need of each class's top patch, and of the banks."""
        real_BN1 = mask.unsqueeze(-1)
        top_BC, place_BC = score_BNC.masked_fill(~real_BN1, float("-inf")).max(dim=1)
        feature_BCD = x_BND.gather(1, place_BC.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))
        count_B1 = mask.sum(dim=1, keepdim=True).to(logits_BCN.dtype)
        level_BC = logits_BCN.logsumexp(dim=-1) - count_B1.log()
        row_BCW = torch.cat([feature_BCD, level_BC.unsqueeze(-1)], dim=-1)
        oldest = {"oldest": self._score_oldest(), "there": self.filled.transpose(0, 1) > 0}
        return {"top": top_BC, "row": row_BCW.detach(), **oldest}

    def _score_oldest(self) -> Tensor:
        """(2, C) the s' of each class's two banks, for that class."""
        feature_C2D, level_C21 = self.bank[:, :, 0].tensor_split([-1], dim=-1)
        value_2C, attention_2C = (
            part_C2C.diagonal(dim1=0, dim2=2) for part_C2C in self._branches(feature_C2D)
        )
        return value_2C * (attention_2C - level_C21.squeeze(-1).transpose(0, 1)).exp()

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor | None:
        """``rank_weight`` times the ranking loss, mean over bags; None if that weight is 0.

        Args:
            output: of ``forward``.
            target: (B,) class numbers; negative where there is no label.
            loss: unused.

        Raises:
            UserError: the target is no class number.
        """
        if output.aux is None:
            return None
        top_BC, oldest_2C, there_2C = (output.aux[k] for k in ("top", "oldest", "there"))
        count = top_BC.shape[1]
        own_BC = class_membership(
            target, count, loss="AttriMIL's ranking loss", without="head.rank_weight=0"
        )
        numbers_C = class_numbers(count, target.device)
        background_C = numbers_C == (-1 if self.background is None else self.background)
        sign_BC = 1 - 2 * (~own_BC).to(top_BC.dtype)  # 1 where the slide is of the class, else -1
        opposite_BC = torch.where(own_BC, oldest_2C[0], oldest_2C[1])
        there_BC = torch.where(own_BC, there_2C[0], there_2C[1])

        order_BC = (sign_BC * (opposite_BC - top_BC)).relu() * ~background_C
        other_BC = (sign_BC * opposite_BC).relu() * (own_BC | background_C)
        cost_BC = (-sign_BC * top_BC).relu() + torch.where(there_BC, order_BC + other_BC, 0.0)
        cost_BC = torch.where((target >= 0).unsqueeze(1), cost_BC, 0.0)
        return self.rank_weight * cost_BC.mean()

    def remember(self, outputs: Sequence[HeadOutput], target: Tensor, of_update: OfUpdate) -> None:
        """See :class:`Head`: the top patches of all bags of the update."""
        rows = [output.aux["row"] for output in outputs if output.aux is not None]
        if rows:
            self._seen = of_update([target, torch.cat(rows)])

    @torch.no_grad()
    def after_step(self, good: Tensor) -> None:
        """See :class:`Head`: the banks take the top patches in, one bag after the other."""
        if self._seen is None:
            return
        bank, filled = self.bank, self.filled
        for number, row_CW in zip(*self._seen, strict=True):
            own_C = number == class_numbers(len(row_CW), row_CW.device)
            moved = turn(bank, filled, own_C, row_CW.to(bank.dtype))
            bank, filled = (
                torch.where(number >= 0, new, old)
                for new, old in zip(moved, (bank, filled), strict=True)
            )
        self._seen = None
        self.bank.copy_(torch.where(good, bank, self.bank))
        self.filled.copy_(torch.where(good, filled, self.filled))


def turn(
    bank_C2KW: Tensor, filled_C2: Tensor, own_C: Tensor, row_CW: Tensor
) -> tuple[Tensor, Tensor]:
    """The banks, and how far they are filled, after one bag.

    Its row of each class goes to the end of the bank on its side (``own_C``: whether it is of the class),
    which drops its oldest if it is full. On the opposite side the oldest, which the bag was compared with,
    goes to the end.
    """
    size = bank_C2KW.shape[2]
    place_K = torch.arange(size, device=bank_C2KW.device)
    side_C21 = torch.stack([~own_C, own_C], dim=1).unsqueeze(-1)
    filled_C21 = filled_C2.unsqueeze(-1)
    shifted_C2K = (place_K + (filled_C21 == size)).clamp(max=size - 1)
    rotated_C2K = torch.where(
        place_K < filled_C21, (place_K + 1) % filled_C21.clamp(min=1), place_K
    )
    source_C2K = torch.where(side_C21, shifted_C2K, rotated_C2K)
    moved_C2KW = bank_C2KW.take_along_dim(source_C2K.unsqueeze(-1), dim=2)
    new_C2K = side_C21 & (place_K == filled_C21.clamp(max=size - 1))
    rows_C11W = row_CW.unsqueeze(1).unsqueeze(1)
    moved_C2KW = torch.where(new_C2K.unsqueeze(-1), rows_C11W, moved_C2KW)
    return moved_C2KW, (filled_C21 + side_C21).clamp(max=size).squeeze(-1)
