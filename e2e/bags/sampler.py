"""Which patches of a slide make up its bag: pure functions of (seed, epoch, slide).

No random generator is kept, so every rank, every worker and every resumed run draws the same patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from e2e.errors import UserError
from e2e.registry import Registry
from e2e.seeds import mix_seed

SAMPLERS: Registry[Sampler] = Registry("sampler")


class Sampler:
    """Base class: chooses patches of one scale of a slide. A subclass implements ``_draw``.

    Attributes
    ----------
    uses_coords : bool
        Whether :meth:`choose` needs ``coords``.
    uses_scores : bool
        Whether :meth:`choose` makes use of ``scores``.
    """

    uses_coords = False
    uses_scores = False

    def choose(
        self,
        slide: str,
        num_patches: int,
        bag_size: int | None,
        *,
        seed: int,
        epoch: int,
        scale: int = 0,
        repeat: int = 0,
        coords: ArrayLike | None = None,
        scores: ArrayLike | None = None,
    ) -> NDArray[np.int64]:
        """Return the indices of the patches in the slide's bag of this epoch.

        Parameters
        ----------
        slide : str
            Slide id.
        num_patches : int
            Patches of the slide, at least 1.
        bag_size : int, optional
            Most patches to choose; None chooses all. A slide with fewer gives all it has.
        seed, epoch : int
            Seed of the run; number of the epoch, from 0.
        scale : int
            Number of the scale. Scales of equal size are drawn independently.
        repeat : int
            How often the epoch drew the slide before, see ``epoch_plan.repeat_counts``.
        coords : (num_patches, 2) array, optional
            x and y of the patches, in any unit.
        scores : (num_patches,) array, optional
            Scores of the patches, higher is better; None where there are none yet.

        Returns
        -------
        (min(bag_size, num_patches),) int64 array
            Unique indices, sorted so that the store reads its pages forwards.

        Raises
        ------
        ValueError
            If the slide has no patches, ``bag_size`` is below 1, or coords are needed and None.
        UserError
            If coords or scores are not finite or have the wrong shape.
        """
        if num_patches < 1:
            raise ValueError(f"slide '{slide}' has no patches")
        if bag_size is not None and bag_size < 1:
            raise ValueError(f"bag_size must be at least 1, got {bag_size}")
        if self.uses_coords and coords is None:
            raise ValueError(f"slide '{slide}': {type(self).__name__} needs coords")
        xy = None if coords is None else _finite_array("coords", coords, (num_patches, 2), slide)
        values = None if scores is None else _finite_array("scores", scores, (num_patches,), slide)
        if bag_size is None or bag_size >= num_patches:
            return np.arange(num_patches)
        draw_seed = mix_seed(seed, epoch, slide, "patches", *_draw_key(scale, repeat))
        return np.sort(
            self._draw(np.random.default_rng(draw_seed), num_patches, bag_size, xy, values)
        )

    def _draw(
        self,
        rng: np.random.Generator,
        num_patches: int,
        bag_size: int,
        coords: NDArray[np.float64] | None,
        scores: NDArray[np.float64] | None,
    ) -> NDArray[np.int64]:
        """``bag_size`` different indices below ``num_patches``, in any order."""
        raise NotImplementedError


def _finite_array(
    name: str, values: ArrayLike, shape: tuple[int, ...], slide: str
) -> NDArray[np.float64]:
    """``values`` as an array; UserError unless it has this shape and is finite."""
    array = np.asarray(values, np.float64)
    if array.shape != shape:
        raise UserError(
            f"slide '{slide}': {name} have shape {array.shape}, expected {shape} for its patches\n"
            f"  use the store that the {name} were made from"
        )
    bad_rows = np.flatnonzero(~np.isfinite(array.reshape(shape[0], -1)).all(axis=1))
    if len(bad_rows):
        raise UserError(
            f"slide '{slide}': {name} of {len(bad_rows)} of {shape[0]} patches are not finite, "
            f"first patch {bad_rows[0]}: {array[bad_rows[0]]}"
        )
    return array


def _draw_key(scale: int, repeat: int) -> tuple[int, ...]:
    # Empty for the first draw at the first scale, so that seeds of runs with neither stay as they were.
    return (scale, repeat) if scale or repeat else ()


@SAMPLERS.register("random")
class RandomSampler(Sampler):
    """Draws uniformly without replacement: every set of ``bag_size`` patches is equally likely."""

    def _draw(self, rng, num_patches, bag_size, coords, scores) -> NDArray[np.int64]:
        return rng.choice(num_patches, bag_size, replace=False)


@SAMPLERS.register("strata")
class StrataSampler(Sampler):
    """Draws one random patch from each of ``bag_size`` equal intervals of the patch order (1-D strata).

    Intervals differ in length by at most one patch. They begin at a random patch, and the last one
    continues at the first patch: with fixed intervals of 1 and 2 patches, some patches would be drawn
    always and others every second time. So each patch is drawn with probability bag_size / num_patches.

    References
    ----------
    The ABMILX project's ``num_group_1d``, which has a fixed number of fixed intervals, filled up at random.
    """

    def _draw(self, rng, num_patches, bag_size, coords, scores) -> NDArray[np.int64]:
        edges = np.arange(bag_size + 1) * num_patches // bag_size
        in_interval = rng.integers(edges[:-1], edges[1:])
        return (in_interval + rng.integers(num_patches)) % num_patches


@SAMPLERS.register("regions")
class RegionSampler(Sampler):
    """Draws patches as evenly as possible from a grid of regions of the tissue (2-D strata).

    Regions hold equal numbers of patches, to within one: ``grid`` columns by x, each cut into ``grid``
    rows by y. A grid of equal areas would draw the few patches of a fragment or of a ragged edge as often
    as the hundreds of a full cell, so every bag would show the head more edge than the slide has. Here
    each patch has nearly the same probability: the ratio is m to m + 1 where regions hold m or m + 1.

    The numbers of patches drawn from two regions differ by at most one; which regions give one more is
    drawn anew each epoch.

    Parameters
    ----------
    grid : int
        Regions along each side, at least 1.

    References
    ----------
    The ABMILX project's "regional random" (2, 4, 8), whose own rule was not published in working order.
    """

    uses_coords = True

    def __init__(self, *, grid: int = 4) -> None:
        if grid < 1:
            raise UserError(f"sampler 'regions': grid must be at least 1, got {grid}")
        self.grid = grid

    def _draw(self, rng, num_patches, bag_size, coords, scores) -> NDArray[np.int64]:
        assert coords is not None
        region = equal_regions(coords, self.grid)
        shuffled = rng.permutation(num_patches)
        round_ = np.empty(num_patches, np.int64)
        round_[shuffled] = _position_within(region[shuffled])
        # Each round takes one patch of each region. A random order of the regions cuts the last one short.
        tie_break = rng.permutation(self.grid**2)[region]
        return np.lexsort((tie_break, round_))[:bag_size]


def equal_regions(coords: NDArray[np.float64], grid: int) -> NDArray[np.int64]:
    """Assign each patch to a region of a grid in which all regions hold as many patches.

    ``grid`` columns with equal numbers of patches by x, each cut into ``grid`` rows by y. Ties are broken
    by the other coordinate, then by the index.

    Parameters
    ----------
    coords : (n, 2) array
        x and y of the patches.
    grid : int
        Columns, and rows of each column.

    Returns
    -------
    (n,) int64 array
        Numbers below ``grid ** 2``; each occurs n / grid**2 times, to within one.
    """
    n = len(coords)
    x, y = coords.T
    column = np.empty(n, np.int64)
    column[np.lexsort((y, x))] = np.arange(n) * grid // n
    by_row = np.lexsort((x, y, column))
    column_sizes = np.bincount(column, minlength=grid)[column[by_row]]
    row = np.empty(n, np.int64)
    row[by_row] = _position_within(column[by_row]) * grid // column_sizes
    return column * grid + row


def _position_within(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier elements are of the same group: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
    by_group = np.argsort(groups, kind="stable")
    position = np.empty(len(groups), np.int64)
    _, first, sizes = np.unique(groups[by_group], return_index=True, return_counts=True)
    position[by_group] = np.arange(len(groups)) - np.repeat(first, sizes)
    return position


@SAMPLERS.register("attention")
class AttentionSampler(Sampler):
    """Draws the patches with the highest scores, and random ones of the others.

    A slide without scores is drawn at random. Ties are broken at random: a head that weighs all patches
    alike gives a random draw.

    Parameters
    ----------
    top : float
        Fraction of the bag for the highest scores, 0 to 1, rounded to whole patches (halves up). 0 is the
        sampler ``random``.

    References
    ----------
    The ABMILX project's attention sampling is ``top=1``: only the highest scores, from the exponential
    moving average of the model.
    """

    uses_scores = True

    def __init__(self, *, top: float = 0.5) -> None:
        if not 0 <= top <= 1:
            raise UserError(f"sampler 'attention': top must be between 0 and 1, got {top}")
        self.top = top

    def _draw(self, rng, num_patches, bag_size, coords, scores) -> NDArray[np.int64]:
        num_top = 0 if scores is None else math.floor(self.top * bag_size + 0.5)
        order = np.arange(num_patches)
        if scores is not None and num_top:
            order = np.lexsort((rng.permutation(num_patches), -scores))
        others = np.sort(order[num_top:])
        return np.concatenate(
            [order[:num_top], rng.choice(others, bag_size - num_top, replace=False)]
        )


def sample_patches(
    slide: str, num_patches: int, bag_size: int | None, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return the draw of the sampler ``random``; see :meth:`Sampler.choose`."""
    return RandomSampler().choose(slide, num_patches, bag_size, seed=seed, epoch=epoch)


def pad_with_copies(
    indices: NDArray[np.int64],
    bag_size: int | None,
    *,
    slide: str,
    seed: int,
    epoch: int,
    scale: int = 0,
    repeat: int = 0,
) -> NDArray[np.int64]:
    """Fill a short bag up to ``bag_size`` with copies of its patches, as the ABMILX project does.

    Copies count like patches and are not masked. Bags of different sizes need no filling here, so this is
    only for reproducing published runs.

    Parameters
    ----------
    indices : (n,) int64 array
        Patches from :meth:`Sampler.choose`, n >= 1.
    bag_size : int, optional
        Size to fill up to. None, or a size of at most n, adds nothing.
    slide : str
        Slide id.
    seed, epoch, scale, repeat : int
        See :meth:`Sampler.choose`.

    Returns
    -------
    (max(n, bag_size),) int64 array
        ``indices``, then copies drawn uniformly with replacement.

    Raises
    ------
    ValueError
        If ``indices`` is empty.
    """
    if len(indices) == 0:
        raise ValueError(f"slide '{slide}' has no patches")
    missing = max(0, (bag_size or 0) - len(indices))
    rng = np.random.default_rng(mix_seed(seed, epoch, slide, "copies", *_draw_key(scale, repeat)))
    return np.concatenate([indices, rng.choice(indices, missing)])


def scale_quotas(
    bag_size: int | None, shares: Sequence[float], counts: Sequence[int]
) -> tuple[int, ...]:
    """Return how many patches to draw at each of S scales: multi-scale random instance sampling (MRIS).

    ``bag_size`` is split in proportion to ``shares`` by the largest remainder; ties go to the first scale.
    A slide with fewer patches at a scale gives all of them, and its bag is then short: moving the rest to
    another scale would change the requested mixture.

    The published rule for two scales, sub = s // r and main = s - sub, rounds differently: shares (2, 1)
    split 128 into (85, 43), s = 128 and r = 3 into (86, 42). To reproduce it, give the numbers of patches
    as shares: (96, 32), (86, 42), (692, 76).

    Parameters
    ----------
    bag_size : int, optional
        Patches of a bag over all scales. None takes all patches of every scale.
    shares : sequence of float
        Share of each scale, finite and above 0, in any unit.
    counts : sequence of int
        Patches of the slide at each scale.

    Returns
    -------
    tuple of int
        Patches to draw at each scale, at most its count; 0 where a share is too small for one patch.

    Raises
    ------
    UserError
        If a share is not finite or not above 0.
    ValueError
        If ``shares`` and ``counts`` differ in length, or ``bag_size`` is below 1.

    References
    ----------
    The ABMILX project's MRIS (two scales).
    """
    if len(shares) != len(counts):
        raise ValueError(
            f"{len(shares)} shares for {len(counts)} scales, expected one for each scale"
        )
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise UserError(f"shares of scales must be finite and above 0, got {list(shares)}")
    if bag_size is None:
        return tuple(counts)
    if bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    # Through text: 0.1 is exactly a tenth, as the user wrote it, so that equal remainders are equal.
    fractions = [Fraction(str(share)) for share in shares]
    exact = [bag_size * share / sum(fractions) for share in fractions]
    quotas = [math.floor(quota) for quota in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for scale in by_remainder[: bag_size - sum(quotas)]:
        quotas[scale] += 1
    return tuple(min(quota, count) for quota, count in zip(quotas, counts, strict=True))
