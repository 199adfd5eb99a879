"""Which slides make up the updates of an epoch, and in which order: pure functions of (seed, epoch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from e2e.seeds import mix_seed

WINDOW = 16
"""Updates within which slides are sorted by size. More would need less padding, but mix slides less."""


def plan_epoch(
    num_slides: int,
    bags: int,
    *,
    seed: int,
    epoch: int,
    groups: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the updates of one epoch: all slides in random order, ``bags`` in each update.

    Parameters
    ----------
    num_slides : int
        Slides of the training split.
    bags : int
        Slides of an update, over all ranks.
    seed : int
        Seed of the run.
    epoch : int
        Number of the epoch, from 0.
    groups : sequence of int, optional
        Group of each slide, for example its class. The groups are then drawn equally often, see
        :func:`balanced_order`. None draws every slide once.
    sizes : sequence of int, optional
        Patches of each slide. Slides of similar size then share an update, see :func:`group_by_size`.

    Returns
    -------
    list of lists of int
        Slide numbers of each update; the last update may be short. The plan does not depend on the
        number of ranks.

    Raises
    ------
    ValueError
        If ``groups`` has another length than ``num_slides``.
    """
    if groups is None:
        rng = np.random.default_rng(mix_seed(seed, epoch, "slides"))
        order = rng.permutation(num_slides).tolist()
    elif len(groups) != num_slides:
        raise ValueError(
            f"groups has {len(groups)} entries, expected one for each of {num_slides} slides"
        )
    else:
        order = balanced_order(groups, seed=seed, epoch=epoch).tolist()
    if sizes is not None:
        return group_by_size(order, sizes, bags, seed=seed, epoch=epoch)
    return [order[start : start + bags] for start in range(0, num_slides, bags)]


def group_by_size(
    order: Sequence[int], sizes: Sequence[int], bags: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Cut a random order of slides into updates of slides of similar size.

    The order is cut into windows of :data:`WINDOW` updates. Within a window slides are sorted by size
    and cut into updates, which come in random order. Which slides share an update is thus drawn anew in
    each epoch, and a batch that is padded to its largest bag wastes little.

    Parameters
    ----------
    order : sequence of int
        Slide numbers in random order.
    sizes : sequence of int
        Patches of each slide, indexed by slide number.
    bags : int
        Slides of an update.
    seed : int
        Seed of the run.
    epoch : int
        Number of the epoch, from 0.

    Returns
    -------
    list of lists of int
        Slide numbers of each update. Only the last update of the epoch may be short.
    """
    rng = np.random.default_rng(mix_seed(seed, epoch, "alike"))
    plan = []
    for first in range(0, len(order), WINDOW * bags):
        window = list(order[first : first + WINDOW * bags])
        rest = len(window) % bags
        short = [window[len(window) - rest :]] if rest else []
        by_size = sorted(window[: len(window) - rest], key=lambda slide: sizes[slide])
        updates = [by_size[start : start + bags] for start in range(0, len(by_size), bags)]
        plan += [updates[k] for k in rng.permutation(len(updates))] + short
    return plan


def balanced_order(groups: Sequence[int], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return as many draws as there are slides, the groups taking turns.

    All epochs together are one endless sequence of draws: draw s belongs to group s mod G, and an epoch
    is the next ``len(groups)`` draws. Within a group no slide is drawn again before all others have been
    drawn. It follows that

    - any b successive draws, and so every update, hold each group floor(b / G) or ceil(b / G) times: at
      least once if b >= G (in survival analysis: an event in every update of 2 or more);
    - the numbers of draws of two groups differ by at most one, in an epoch and over all epochs so far;
    - the numbers of draws of two slides of a group differ by at most one, in an epoch and over all epochs
      so far: slides of a large group that one epoch leaves out come first in the next;
    - an update holds a slide twice only if it draws more slides of the group than the group has.

    Which slides an epoch draws follows from one permutation for each group and run. Their order within
    the epoch, and so which slides share an update, is drawn anew in each epoch.

    Parameters
    ----------
    groups : sequence of int
        Group of each slide.
    seed : int
        Seed of the run.
    epoch : int
        Number of the epoch, from 0.

    Returns
    -------
    (len(groups),) int64 array
        Slide numbers.
    """
    labels, group_of_slide = np.unique(np.asarray(groups), return_inverse=True)
    draws = np.arange(len(groups)) + epoch * len(groups)
    order = np.empty(len(groups), np.int64)
    for group in range(len(labels)):
        positions = np.flatnonzero(draws % len(labels) == group)
        cycle = np.random.default_rng(mix_seed(seed, group, "cycle")).permutation(
            np.flatnonzero(group_of_slide == group)
        )
        queue = np.roll(cycle, -int(draws[positions[0]] // len(labels)))
        rng = np.random.default_rng(mix_seed(seed, epoch, group, "cycle"))
        order[positions] = _draw_in_rounds(queue, len(positions), rng)
    return order


def _draw_in_rounds(
    queue: NDArray[np.int64], draws: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """``draws`` slides in rounds over the whole queue; its first slides come once more than the others.

    All rounds of an epoch have the same order, so a slide comes again only after all the others.
    """
    extra = draws % len(queue)
    round_ = np.concatenate([rng.permutation(queue[:extra]), rng.permutation(queue[extra:])])
    return np.resize(round_, draws)


def repeat_counts(plan: Sequence[Sequence[int]]) -> list[list[int]]:
    """Count for each slide of a plan how often the epoch drew it before.

    Each draw of a slide gets other patches and random numbers.

    Parameters
    ----------
    plan : sequence of sequences of int
        Slide numbers of each update, see :func:`plan_epoch`.

    Returns
    -------
    list of lists of int
        In the form of ``plan``.
    """
    draws: Counter[int] = Counter()
    counts: list[list[int]] = []
    for update in plan:
        counts.append([])
        for slide in update:
            counts[-1].append(draws[slide])
            draws[slide] += 1
    return counts
