"""Which patches stand for a slide: pure functions of (seed, epoch, slide).

No generator is kept anywhere, so any rank, any worker and any resumed run draws the same.
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
    """Base of the ways to choose patches of one scale of a slide; a subclass writes ``_draw``."""

    uses_coords = False
    """Whether ``coords`` must be handed in."""
    uses_scores = False
    """Whether ``scores`` are worth making and handing in."""

    def choose(
        self,
        slide: str,
        count: int,
        size: int | None,
        *,
        seed: int,
        epoch: int,
        scale: int = 0,
        turn: int = 0,
        coords: ArrayLike | None = None,
        scores: ArrayLike | None = None,
    ) -> NDArray[np.int64]:
        """Indices of the patches that stand for ``slide`` in this epoch, none twice.

        Args:
            slide: slide id.
            count: patches in the store for this slide, >= 1.
            size: most patches to choose; None for all. A slide of fewer gives all it has.
            seed: of the run.
            epoch: 0-based.
            scale: number of the store, so that scales of equal count are drawn independently.
            turn: how often the slide came before in this epoch, see ``epoch_plan.repeat_counts``.
            coords: (count, 2) x and y of the patches, in any unit.
            scores: (count,) what the patches are worth, higher is better; None where not known.

        Returns:
            Sorted unique indices, min(size, count) of them. Sorted, because the store then reads
            its pages forwards.

        Raises:
            ValueError: the slide has no patches, ``size`` is below 1, or coords are needed.
            UserError: coords or scores are not finite, or not one a patch.
        """
        if count < 1:
            raise ValueError(f"slide '{slide}' has no patches")
        if size is not None and size < 1:
            raise ValueError(f"bag_size must be at least 1, got {size}")
        if self.uses_coords and coords is None:
            raise ValueError(f"slide '{slide}': {type(self).__name__} needs coords")
        places = None if coords is None else _checked("coords", coords, (count, 2), slide)
        worth = None if scores is None else _checked("scores", scores, (count,), slide)
        if size is None or size >= count:
            return np.arange(count)
        rng = np.random.default_rng(mix_seed(seed, epoch, slide, "patches", *_which(scale, turn)))
        return np.sort(self._draw(rng, count, size, places, worth))

    def _draw(
        self,
        rng: np.random.Generator,
        count: int,
        size: int,
        coords: NDArray[np.float64] | None,
        scores: NDArray[np.float64] | None,
    ) -> NDArray[np.int64]:
        """``size`` < ``count`` different indices, in any order."""
        raise NotImplementedError


def _checked(
    what: str, values: ArrayLike, shape: tuple[int, ...], slide: str
) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.shape != shape:
        raise UserError(
            f"slide '{slide}': {what} have shape {array.shape}, its patches ask for {shape}\n"
            "  were they made from another store?"
        )
    wrong = np.flatnonzero(~np.isfinite(array.reshape(shape[0], -1)).all(axis=1))
    if len(wrong):
        raise UserError(
            f"slide '{slide}': {what} of {len(wrong)} of {shape[0]} patches are not finite, "
            f"first of patch {wrong[0]}: {array[wrong[0]]}"
        )
    return array


def _which(scale: int, turn: int) -> tuple[int, ...]:
    # The first is left out: what has one scale and no turns draws as it did before there were any.
    return (scale, turn) if scale or turn else ()


@SAMPLERS.register("random")
class RandomSampler(Sampler):
    """Uniform without replacement: every set of ``size`` patches is equally likely."""

    def _draw(self, rng, count, size, coords, scores) -> NDArray[np.int64]:
        return rng.choice(count, size, replace=False)


@SAMPLERS.register("strata")
class StrataSampler(Sampler):
    """One random patch of each of ``size`` equal intervals of the patch order (1-D strata).

    Intervals differ by at most one patch. They begin at a random patch and the last goes on at the
    first patch: else, with intervals of 1 and 2, some patches would come always and others every
    second time. So each patch is drawn with probability size / count, exactly.

    Source: the ABMILX project's ``num_group_1d``; there a fixed number of fixed intervals, filled
    up at random.
    """

    def _draw(self, rng, count, size, coords, scores) -> NDArray[np.int64]:
        edges = np.arange(size + 1) * count // size
        return (rng.integers(edges[:-1], edges[1:]) + rng.integers(count)) % count


@SAMPLERS.register("regions")
class RegionSampler(Sampler):
    """Patches drawn as evenly as can be over a grid of regions of the tissue (2-D strata).

    Regions hold equally many patches, to within one: ``grid`` columns by x, each cut into ``grid``
    rows by y. A grid of equal areas would draw the few patches of a fragment or of a ragged edge as
    often as the hundreds of a full cell: every bag would show the head more edge than the slide has.
    Here each patch has about the same chance, as 1 / m to 1 / (m + 1) where regions hold m or m + 1.

    The regions' draws differ by at most one; who gets one more is drawn anew each epoch.

    Source: the ABMILX project's "regional random" (2, 4, 8); its own rule is not published in working
    order.

    Args:
        grid: regions a side, >= 1.
    """

    uses_coords = True

    def __init__(self, *, grid: int = 4) -> None:
        if grid < 1:
            raise UserError(f"sampler 'regions': grid must be at least 1, got {grid}")
        self.grid = grid

    def _draw(self, rng, count, size, coords, scores) -> NDArray[np.int64]:
        assert coords is not None
        region = equal_regions(coords, self.grid)
        shuffled = rng.permutation(count)
        lap = np.empty(count, np.int64)
        lap[shuffled] = _position_within(region[shuffled])
        # Lap by lap one patch of each region; the last lap, cut short, by the regions' lots.
        lot = rng.permutation(self.grid**2)[region]
        return np.lexsort((lot, lap))[:size]


def equal_regions(coords: NDArray[np.float64], grid: int) -> NDArray[np.int64]:
    """(n,) region of each patch, below grid**2; regions hold n / grid**2 patches to within one.

    ``grid`` columns of equally many patches by x, each cut into ``grid`` rows by y; among equals
    the other coordinate decides, then the index.
    """
    n = len(coords)
    x, y = coords.T
    column = np.empty(n, np.int64)
    column[np.lexsort((y, x))] = np.arange(n) * grid // n
    by_row = np.lexsort((x, y, column))
    held = np.bincount(column, minlength=grid)[column[by_row]]
    row = np.empty(n, np.int64)
    row[by_row] = _position_within(column[by_row]) * grid // held
    return column * grid + row


def _position_within(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of the same group come before each: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
    by_group = np.argsort(groups, kind="stable")
    position = np.empty(len(groups), np.int64)
    _, first, held = np.unique(groups[by_group], return_index=True, return_counts=True)
    position[by_group] = np.arange(len(groups)) - np.repeat(first, held)
    return position


@SAMPLERS.register("attention")
class AttentionSampler(Sampler):
    """The patches of the highest scores, and random ones of the others.

    A slide without scores yet is drawn at random. Of equal scores any
    may win: a head that weighs all patches alike draws them at random.

    Source: the ABMILX project's attention sampling, which is ``top=1``: nothing but the highest, scored
    by the moving average of the model.

    Args:
        top: share of the bag that goes to the highest scores, 0 to 1, rounded to whole patches
            (halves up). 0 is the sampler ``random``.
    """

    uses_scores = True

    def __init__(self, *, top: float = 0.5) -> None:
        if not 0 <= top <= 1:
            raise UserError(f"sampler 'attention': top must lie between 0 and 1, got {top}")
        self.top = top

    def _draw(self, rng, count, size, coords, scores) -> NDArray[np.int64]:
        number = 0 if scores is None else math.floor(self.top * size + 0.5)
        order = np.arange(count)
        if scores is not None and number:
            order = np.lexsort((rng.permutation(count), -scores))
        others = np.sort(order[number:])
        return np.concatenate([order[:number], rng.choice(others, size - number, replace=False)])


def sample_patches(
    slide: str, num_patches: int, bag_size: int | None, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The sampler ``random``: see :meth:`Sampler.choose`."""
    return RandomSampler().choose(slide, num_patches, bag_size, seed=seed, epoch=epoch)


def pad_with_copies(
    indices: NDArray[np.int64],
    size: int | None,
    *,
    slide: str,
    seed: int,
    epoch: int,
    scale: int = 0,
    turn: int = 0,
) -> NDArray[np.int64]:
    """A short bag filled up to ``size`` with copies of its own patches, as the ABMILX project does.

    A copy counts like a patch: nothing masks it. Short bags need no filling here, so this is only
    for repeating what was published.

    Args:
        indices: (n,) what :meth:`Sampler.choose` gave, n >= 1.
        size: patches wanted; None, or no more than n: nothing is added.
        slide: slide id.
        seed: of the run.
        epoch: 0-based.
        scale: as for :meth:`Sampler.choose`; so is ``turn``.

    Returns:
        (max(n, size),): ``indices``, then copies drawn uniformly with replacement.

    Raises:
        ValueError: nothing to copy.
    """
    if len(indices) == 0:
        raise ValueError(f"slide '{slide}' has no patches")
    missing = max(0, (size or 0) - len(indices))
    rng = np.random.default_rng(mix_seed(seed, epoch, slide, "copies", *_which(scale, turn)))
    return np.concatenate([indices, rng.choice(indices, missing)])


def scale_quotas(
    bag_size: int | None, shares: Sequence[float], counts: Sequence[int]
) -> tuple[int, ...]:
    """Patches to draw at each of S scales: multi-scale random instance sampling (MRIS).

    ``bag_size`` is split in proportion to ``shares`` by the largest remainder, equal remainders to
    the first scale. A slide with fewer patches at a scale gives all it has there: the bag is then
    short, for a quota moved to another scale would change the mixture that was asked for.

    The published rule for two scales, sub = s // r and main = s - sub, rounds otherwise: shares (2, 1)
    split 128 into (85, 43), s = 128 and r = 3 into (86, 42). It is had by giving the numbers
    themselves as shares: (96, 32), (86, 42), (692, 76).

    Args:
        bag_size: patches of a bag over all scales; None: all patches of every scale.
        shares: (S,) finite and above 0, in any unit.
        counts: (S,) patches of the slide at each scale.

    Returns:
        (S,) quotas, each at most its count; 0 where a share is too small for one patch.

    Raises:
        UserError: a share is not above 0 or not finite.
        ValueError: shares and counts differ in length, or ``bag_size`` is below 1.

    Source: the ABMILX project's MRIS (two scales).
    """
    if len(shares) != len(counts):
        raise ValueError(f"{len(shares)} shares for {len(counts)} scales: give one a scale")
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise UserError(f"shares of scales must be finite and above 0, got {list(shares)}")
    if bag_size is None:
        return tuple(counts)
    if bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    # Through text: 0.1 is a tenth, as it was written, so that equal remainders are equal.
    written = [Fraction(str(share)) for share in shares]
    exact = [bag_size * share / sum(written) for share in written]
    quotas = [math.floor(quota) for quota in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for scale in by_remainder[: bag_size - sum(quotas)]:
        quotas[scale] += 1
    return tuple(min(quota, count) for quota, count in zip(quotas, counts, strict=True))
