"""The spatial constraint: what a patch says of a class, the strongest patch near it says too."""

from __future__ import annotations

import torch
from torch import Tensor

from e2e.errors import UserError
from e2e.heads.base import HeadOutput
from e2e.losses.base import REGULARISERS, Regulariser, Weight

WIDE = 1 << 31
"""More than a grid has columns or rows: with it a cell's two numbers are one."""
PADDING = 1 << 62
"""The cell of all that is no patch, far from any other."""
AROUND = [x * WIDE + y for x in (-1, 0, 1) for y in (-1, 0, 1)]
"""From a cell's number to those of the cells around it, itself among them."""
USUAL = 10
"""A gap between patches is usual when it is at least one over this as frequent as the most frequent."""


@REGULARISERS.register("spatial")
class SpatialConstraint(Regulariser):
    """The distance of each patch's score s from the strongest one near it, as AttriMIL has it::

        loss = sum_c mean_n | tanh(s_cn - s_cm) |,    m = argmax_{j in R(n)} |s_cj|

    R(n) are n and its 8 neighbours on the slide's grid, as far as they are in the bag; c runs over
    the outputs but the background. For any head that scores patches and attends (``attrimil``, ``dsmil``,
    ``clam_*`` ...): s are its ``instance_logits``.

    The grid is told by the coords alone: a step is the smallest gap between patches in a row or a column
    that is usual there. Coords that were rounded to pixels, tissue pieces with grids of their own and several
    patches in one cell are allowed for; a bag of few of a slide's patches has few neighbours, so
    ``bag.patches=null`` is the constraint in full. Time and memory grow as N (log N), not as N x N.

    Source: Cai et al. 2025, AttriMIL, arXiv:2404.00351: the region-wise attribute constraint, with the
    tanh and the signed maximum of the authors' program (the paper's first version: the mean
    difference from the neighbours).

    Differs from that program, where it is at fault: every class counts unless one is named the background
    (there never class 0); neighbours are found by grid cell, not by exact offsets of 256 pixels. All
    scores alike is its trivial minimum; ``detach`` at least holds the strong ones where they are.

    Parameters
    ----------
    weight : float
        Of the loss; 0 leaves it out. Published: 1.
    schedule : str
        ``constant`` or ``cosine`` (to 0 at the end of the training).
    warmup : float
        Share of the training over which the weight rises from 0.
    background : int | None
        Number of the class left out, such as normal tissue; null: none.
    detach : bool
        No gradient through the strongest score, only through the patch's own.

    Raises
    ------
    UserError
        An option out of range.
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
        """See :class:`Regulariser`."""
        scores = output.instance_logits
        if scores is None or not scores.requires_grad or output.attention_logits is None:
            raise UserError(
                "spatial.weight is over 0, but the head does not both score its patches and attend to "
                "them\n  choose another head (attrimil, dsmil, ...), or set spatial.weight=0"
            )
        count = scores.shape[-1]
        if self.background is not None and not (0 <= self.background < count and count > 1):
            raise UserError(
                f"spatial.background must be one of the {count} outputs, counted from 0, and not the "
                f"only one, found {self.background}\n  set it to null where no class is the background"
            )

    def forward(self, output: HeadOutput, target: Tensor, coords: Tensor | None) -> Tensor:
        """See :class:`Regulariser`."""
        scores, attention = output.instance_logits, output.attention_logits
        assert scores is not None
        assert attention is not None
        if coords is None:
            raise UserError(
                "spatial.weight is over 0, but nobody knows the coords of a slide's patches\n"
                "  give stores or features with coords, or set spatial.weight=0"
            )
        real_BN = attention[:, 0] > -torch.inf
        kept = [c for c in range(scores.shape[-1]) if c != self.background]
        exact = scores[..., kept].to(torch.promote_types(scores.dtype, torch.float32))
        score_BNC = torch.where(real_BN.unsqueeze(-1), exact, 0.0)
        strongest_BNC = strongest_near(score_BNC, coords, real_BN)
        if self.detach:
            strongest_BNC = strongest_BNC.detach()
        apart_BN = (score_BNC - strongest_BNC).tanh().abs().sum(dim=-1)
        return torch.where(real_BN, apart_BN, 0.0).sum(dim=1) / real_BN.sum(dim=1)


def strongest_near(score_BNC: Tensor, coords_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """(B,N,C) of each patch and its neighbours the score that is largest in size, with its sign.

    Of two that are equal but for the sign, the positive one. What padding gets means nothing.

    Parameters
    ----------
    score_BNC : Tensor
        Finite.
    coords_BN2 : Tensor
        Level-0 pixels.
    real_BN : Tensor
        True where there is a patch.
    """
    cell_BN = grid_cells(coords_BN2, real_BN)
    sorted_BN, order_BN = cell_BN.sort(dim=1)
    begins_BN = sorted_BN.diff(dim=1, prepend=sorted_BN[:, :1] - 1) != 0
    place_BN = begins_BN.cumsum(dim=1) - 1  # of a cell's values below, patch by patch as sorted

    places_BNC = place_BN.unsqueeze(-1).expand_as(score_BNC)
    by_cell_BNC = score_BNC.take_along_dim(order_BN.unsqueeze(-1), dim=1)
    lowest, highest = (torch.full_like(score_BNC, end) for end in (torch.inf, -torch.inf))
    lowest = lowest.scatter_reduce(1, places_BNC, by_cell_BNC, "amin")
    highest = highest.scatter_reduce(1, places_BNC, by_cell_BNC, "amax")

    around_BK = (cell_BN.unsqueeze(-1) + cell_BN.new_tensor(AROUND)).flatten(1)
    own_BK = cell_BN.repeat_interleave(len(AROUND), dim=1)
    at_BK = torch.searchsorted(sorted_BN, around_BK).clamp(max=cell_BN.shape[1] - 1)
    there_BK = sorted_BN.gather(1, at_BK) == around_BK
    at_BK = torch.where(there_BK, at_BK, torch.searchsorted(sorted_BN, own_BK))
    near_BK1 = place_BN.gather(1, at_BK).unsqueeze(-1)

    def of_near(cells_BNC: Tensor) -> Tensor:
        return cells_BNC.take_along_dim(near_BK1, dim=1).unflatten(1, (-1, len(AROUND)))

    low_BNC, high_BNC = of_near(lowest).amin(dim=2), of_near(highest).amax(dim=2)
    return torch.where(high_BNC >= -low_BNC, high_BNC, low_BNC)


def grid_cells(coords_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """(B,N) number of the grid cell each patch lies in; ``PADDING`` where there is none."""
    place_BN2 = _from_corner(coords_BN2, real_BN)
    step_B11 = grid_step(place_BN2, real_BN).view(-1, 1, 1)
    column_BN, row_BN = ((place_BN2 / step_B11).round().long() + 1).unbind(dim=-1)
    return torch.where(real_BN, column_BN * WIDE + row_BN, PADDING)


def grid_step(coords_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """(B,) float64 distance of neighbours on each bag's grid; 1 where no two share a row or a column.

    The smallest usual gap, meaned over the gaps that differ from it by one pixel at most, as rounding
    makes them. It need not be the most frequent: of few of a slide's patches, gaps of many steps are
    as frequent as those of one. And not the smallest of all: two pieces of tissue whose grids are their
    own may share a row by chance.
    """
    place_BN2 = _from_corner(coords_BN2, real_BN)
    gaps = [_gaps(place_BN2, real_BN), _gaps(place_BN2.flip(-1), real_BN)]
    gap_BM = torch.cat(gaps, dim=1).sort(dim=1).values
    some_BM = gap_BM < torch.inf
    times_BM = torch.searchsorted(gap_BM, gap_BM, right=True) - torch.searchsorted(gap_BM, gap_BM)
    times_BM = torch.where(some_BM, times_BM, 0)
    usual_BM = some_BM & (USUAL * times_BM >= times_BM.amax(dim=1, keepdim=True))
    first_B1 = gap_BM.where(usual_BM, torch.inf).amin(dim=1, keepdim=True)
    alike_BM = some_BM & ((gap_BM - first_B1).abs() <= 1)
    total_B, count_B = gap_BM.where(alike_BM, 0.0).sum(dim=1), alike_BM.sum(dim=1)
    return torch.where(count_B > 0, total_B / count_B.clamp(min=1), 1.0)


def _from_corner(coords_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """float64 coords counted from the bag's smallest ones; 0 on padding."""
    place_BN2, real_BN1 = coords_BN2.double(), real_BN.unsqueeze(-1)
    corner_B12 = place_BN2.where(real_BN1, torch.inf).amin(dim=1, keepdim=True)
    return (place_BN2 - corner_B12).where(real_BN1, 0.0)


def _gaps(place_BN2: Tensor, real_BN: Tensor) -> Tensor:
    """(B,N) from each patch to the next one that has the same second coordinate; inf where none is."""
    key_BN = place_BN2[..., 1].round().long() * WIDE + place_BN2[..., 0].round().long()
    order_BN = torch.where(real_BN, key_BN, PADDING).argsort(dim=1)
    along_BN, across_BN = place_BN2.take_along_dim(order_BN.unsqueeze(-1), dim=1).unbind(dim=-1)
    real_BN = real_BN.take_along_dim(order_BN, dim=1)
    gap_BN = along_BN.diff(dim=1, append=along_BN[:, -1:])
    same_BN = across_BN.diff(dim=1, append=across_BN[:, -1:]) == 0
    # Copies of a patch are 0 apart, and so is the last of a bag from itself.
    follows_BN = real_BN & real_BN.roll(-1, dims=1) & same_BN & (gap_BN > 0)
    return gap_BN.where(follows_BN, torch.inf)
