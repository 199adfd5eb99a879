"""The spatial constraint: nearby patches have similar scores."""

from __future__ import annotations

import torch
from torch import Tensor

from e2e.errors import UserError
from e2e.heads.base import HeadOutput
from e2e.losses.base import REGULARISERS, Regulariser, Weight

WIDE = 1 << 31
"""More than a grid has columns or rows, so that column * WIDE + row identifies a cell."""
PADDING = 1 << 62
"""The cell of padding, far from any other."""
NEIGHBOURS = [x * WIDE + y for x in (-1, 0, 1) for y in (-1, 0, 1)]
"""Offsets from the number of a cell to those of the 3 x 3 cells around it."""
SPARSE = 1.25
"""A gap of more than this times the side of a patch is not the step of a grid."""
FREQUENCY_RATIO = 10
"""A gap between patches is frequent if it occurs at least 1/10 as often as the most frequent gap."""


@REGULARISERS.register("spatial")
class SpatialConstraint(Regulariser):
    """The difference between each patch's score s and the strongest score near it, as in AttriMIL::

        loss = sum_c mean_n | tanh(s_cn - s_cm) |,    m = argmax_{j in R(n)} |s_cj|

    R(n) are n and those of its 8 neighbours on the slide's grid that are in the bag; c runs over all outputs
    but the background. It applies to any head with attention and patch scores (``attrimil``, ``dsmil``,
    ``clam_*`` ...): s are its ``instance_logits``.

    The grid is found from the coords: its step is the smallest frequent gap between patches in a row or a
    column, and the side of a patch where that is larger, as in a bag with few of a slide's patches. Coords
    rounded to pixels, pieces of tissue with grids of their own, and several patches in one cell are
    handled. A bag with few of a slide's patches has few neighbours, so ``bag.patches=null`` is the full
    constraint. Time and memory grow as N log N, not N x N.

    Source: Cai et al. 2025, AttriMIL, arXiv:2404.00351: the region-wise attribute constraint, with the
    tanh and the signed maximum of the authors' code (first version of the paper: the mean difference from
    the neighbours).

    Differences from that code, where it is wrong: every class counts unless one is named the background
    (there never class 0); neighbours are found by grid cell, not by exact offsets of 256 pixels. Equal scores
    everywhere are the trivial minimum; ``detach`` at least keeps strong scores from being pulled down.

    Parameters
    ----------
    weight : float
        Weight of the loss; 0 disables it. Published: 1.
    schedule : str
        ``constant``, or ``cosine``: to 0 at the end of training.
    warmup : float
        Fraction of the training over which the weight rises from 0.
    background : int | None
        Number of the class without the constraint, such as normal tissue; null: none.
    detach : bool
        Send no gradient through the strongest score, only through the patch's own.

    Raises
    ------
    UserError
        An option is out of range.
    """

    needs_coords = True

    def __init__(
        self,
        *,
        weight: float = 0.0,
        schedule: str = "constant",
        warmup: float = 0.0,
        background: int | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__()
        self.weight = Weight(weight, schedule, warmup)
        self.background = background
        self.detach = detach

    def check(self, output: HeadOutput) -> None:
        """See :class:`~e2e.losses.base.Regulariser`."""
        scores = output.instance_logits
        if scores is None or not scores.requires_grad or output.attention_logits is None:
            raise UserError(
                f"spatial.weight={self.weight.peak:g}, but the head does not have both patch scores and "
                "attention\n  choose another head (attrimil, dsmil, ...), or set spatial.weight=0"
            )
        count = scores.shape[-1]
        if self.background is not None and not (0 <= self.background < count and count > 1):
            raise UserError(
                f"spatial.background={self.background} must be one of the {count} outputs, counted from 0, "
                "and not the only one\n  set spatial.background=null if no class is the background"
            )

    def forward(
        self, output: HeadOutput, target: Tensor, coords: Tensor | None, sides: Tensor
    ) -> Tensor:
        """See :class:`~e2e.losses.base.Regulariser`."""
        scores, attention = output.instance_logits, output.attention_logits
        assert scores is not None
        assert attention is not None
        if coords is None:
            raise UserError(
                f"spatial.weight={self.weight.peak:g}, but a training slide has no patch coordinates\n"
                "  use stores or features with coordinates (see data.coords), or set spatial.weight=0"
            )
        real_BN = attention[:, 0] > -torch.inf
        classes = [c for c in range(scores.shape[-1]) if c != self.background]
        exact = scores[..., classes].to(torch.promote_types(scores.dtype, torch.float32))
        score_BNC = torch.where(real_BN.unsqueeze(-1), exact, 0.0)
        strongest_BNC = strongest_near(score_BNC, coords, real_BN, sides)
        if self.detach:
            strongest_BNC = strongest_BNC.detach()
        difference_BN = (score_BNC - strongest_BNC).tanh().abs().sum(dim=-1)
        return torch.where(real_BN, difference_BN, 0.0).sum(dim=1) / real_BN.sum(dim=1)


def strongest_near(
    score_BNC: Tensor, coords_BN2: Tensor, real_BN: Tensor, side_B: Tensor | None = None
) -> Tensor:
    """Return the score with the largest absolute value among each patch and its neighbours, (B, N, C).

    Of two that differ in sign only it is the positive one. Values on padding are meaningless.

    Parameters
    ----------
    score_BNC : Tensor of shape (B, N, C)
        Finite.
    coords_BN2 : Tensor of shape (B, N, 2)
        Level-0 pixels.
    real_BN : Tensor of shape (B, N)
        bool, True for real patches.
    side_B : Tensor of shape (B,)
        Side of the patches in level-0 pixels; NaN where it is unknown; None: everywhere.
    """
    if side_B is None:
        side_B = torch.full((len(score_BNC),), torch.nan, device=score_BNC.device)
    cell_BN = grid_cells(coords_BN2, real_BN, side_B)
    sorted_BN, order_BN = cell_BN.sort(dim=1)
    is_first_BN = sorted_BN.diff(dim=1, prepend=sorted_BN[:, :1] - 1) != 0
    slot_BN = is_first_BN.cumsum(dim=1) - 1  # where the values of a sorted patch's cell are stored

    slot_BNC = slot_BN.unsqueeze(-1).expand_as(score_BNC)
    by_cell_BNC = score_BNC.take_along_dim(order_BN.unsqueeze(-1), dim=1)
    lowest, highest = (torch.full_like(score_BNC, end) for end in (torch.inf, -torch.inf))
    lowest = lowest.scatter_reduce(1, slot_BNC, by_cell_BNC, "amin")
    highest = highest.scatter_reduce(1, slot_BNC, by_cell_BNC, "amax")

    around_BK = (cell_BN.unsqueeze(-1) + cell_BN.new_tensor(NEIGHBOURS)).flatten(1)
    self_BK = cell_BN.repeat_interleave(len(NEIGHBOURS), dim=1)
    at_BK = torch.searchsorted(sorted_BN, around_BK).clamp(max=cell_BN.shape[1] - 1)
    exists_BK = sorted_BN.gather(1, at_BK) == around_BK
    at_BK = torch.where(exists_BK, at_BK, torch.searchsorted(sorted_BN, self_BK))
    near_BK1 = slot_BN.gather(1, at_BK).unsqueeze(-1)

    def at_neighbours(cells_BNC: Tensor) -> Tensor:
        return cells_BNC.take_along_dim(near_BK1, dim=1).unflatten(1, (-1, len(NEIGHBOURS)))

    low_BNC, high_BNC = at_neighbours(lowest).amin(dim=2), at_neighbours(highest).amax(dim=2)
    return torch.where(high_BNC >= -low_BNC, high_BNC, low_BNC)


def grid_cells(coords_BN2: Tensor, real_BN: Tensor, side_B: Tensor) -> Tensor:
    """Return (B, N) the number of the grid cell of each patch; ``PADDING`` on padding."""
    position_BN2 = _relative_to_corner(coords_BN2, real_BN)
    step_B = grid_step(position_BN2, real_BN)
    # Patches of a grid touch or overlap. A larger step, or none, comes from a bag with few of its patches.
    is_sparse_B = (step_B > SPARSE * side_B) | ((step_B == 1) & (side_B > 1))
    step_B11 = torch.where(is_sparse_B, side_B, step_B).view(-1, 1, 1)
    column_BN, row_BN = ((position_BN2 / step_B11).round().long() + 1).unbind(dim=-1)
    return torch.where(real_BN, column_BN * WIDE + row_BN, PADDING)


def grid_step(coords_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """Return (B,) float64 the distance of neighbours on each bag's grid; 1 if no two share a row or column.

    It is the smallest frequent gap, averaged over the gaps that differ from it by one pixel at most, as
    they do after rounding. It need not be the most frequent one: in a bag with few of a slide's patches, gaps
    of many steps are as frequent as those of one. Nor is it the smallest of all: two pieces of tissue with
    grids of their own may share a row by chance.
    """
    position_BN2 = _relative_to_corner(coords_BN2, real_BN)
    gaps = [_gaps(position_BN2, real_BN), _gaps(position_BN2.flip(-1), real_BN)]
    gap_BM = torch.cat(gaps, dim=1).sort(dim=1).values
    exists_BM = gap_BM < torch.inf
    count_BM = torch.searchsorted(gap_BM, gap_BM, right=True) - torch.searchsorted(gap_BM, gap_BM)
    count_BM = torch.where(exists_BM, count_BM, 0)
    is_frequent_BM = exists_BM & (FREQUENCY_RATIO * count_BM >= count_BM.amax(dim=1, keepdim=True))
    smallest_B1 = gap_BM.where(is_frequent_BM, torch.inf).amin(dim=1, keepdim=True)
    is_step_BM = exists_BM & ((gap_BM - smallest_B1).abs() <= 1)
    total_B, count_B = gap_BM.where(is_step_BM, 0.0).sum(dim=1), is_step_BM.sum(dim=1)
    return torch.where(count_B > 0, total_B / count_B.clamp(min=1), 1.0)


def _relative_to_corner(coords_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """Return float64 coords relative to the bag's smallest ones, (B, N, 2); 0 on padding."""
    position_BN2, real_BN1 = coords_BN2.double(), real_BN.unsqueeze(-1)
    corner_B12 = position_BN2.where(real_BN1, torch.inf).amin(dim=1, keepdim=True)
    return (position_BN2 - corner_B12).where(real_BN1, 0.0)


def _gaps(position_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """Return (B, N) the distance of each patch to the next with the same second coordinate, or inf."""
    key_BN = position_BN2[..., 1].round().long() * WIDE + position_BN2[..., 0].round().long()
    order_BN = torch.where(real_BN, key_BN, PADDING).argsort(dim=1)
    along_BN, across_BN = position_BN2.take_along_dim(order_BN.unsqueeze(-1), dim=1).unbind(dim=-1)
    real_BN = real_BN.take_along_dim(order_BN, dim=1)
    gap_BN = along_BN.diff(dim=1, append=along_BN[:, -1:])
    same_BN = across_BN.diff(dim=1, append=across_BN[:, -1:]) == 0
    # The distance between copies is 0, as is that of the last patch of a bag to itself.
    follows_BN = real_BN & real_BN.roll(-1, dims=1) & same_BN & (gap_BN > 0)
    return gap_BN.where(follows_BN, torch.inf)
