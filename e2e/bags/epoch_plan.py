"""Which slides make up an epoch's updates, and in which order: pure functions of (seed, epoch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from e2e.seeds import mix_seed

WINDOW = 16
"""Updates among whose slides those of like size are sought: more pad less, and mix less."""


def plan_epoch(
    num_slides: int,
    bags: int,
    *,
    seed: int,
    epoch: int,
    groups: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[list[int]]:
    """The updates of one epoch: ``num_slides`` slides in random order, ``bags`` an update.

    Args:
        num_slides: of the training cohort.
        bags: slides an update, over all ranks.
        seed: of the run.
        epoch: 0-based.
        groups: one number a slide: its class, or event 1 / censored 0. The groups are then drawn
            equally often, see :func:`balanced_order`. None: every slide exactly once.
        sizes: patches of each slide; slides of like size then share an update, see
            :func:`group_by_size`. None: size plays no part.

    Returns:
        Lists of slide numbers; the last may be short. The same for every number of ranks.

    Raises:
        ValueError: not one group a slide.
    """
    if groups is None:
        rng = np.random.default_rng(mix_seed(seed, epoch, "slides"))
        order = rng.permutation(num_slides).tolist()
    elif len(groups) != num_slides:
        raise ValueError(f"{len(groups)} groups for {num_slides} slides: give one a slide")
    else:
        order = balanced_order(groups, seed=seed, epoch=epoch).tolist()
    if sizes is not None:
        return group_by_size(order, sizes, bags, seed=seed, epoch=epoch)
    return [order[start : start + bags] for start in range(0, num_slides, bags)]


def group_by_size(
    order: Sequence[int], sizes: Sequence[int], bags: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Updates of ``bags`` slides of like size, from a random order of slides.

    The order is cut into windows of :data:`WINDOW` updates. Within a window slides are sorted by
    size and cut into updates, which come in random order. So who meets whom is drawn anew in each
    epoch, and a batch that is padded to its largest bag wastes little. A short update is the
    epoch's last, as without sizes.
    """
    rng = np.random.default_rng(mix_seed(seed, epoch, "alike"))
    plan = []
    for first in range(0, len(order), WINDOW * bags):
        window = list(order[first : first + WINDOW * bags])
        rest = len(window) % bags
        short = [window[len(window) - rest :]] if rest else []
        alike = sorted(window[: len(window) - rest], key=lambda slide: sizes[slide])
        updates = [alike[start : start + bags] for start in range(0, len(alike), bags)]
        plan += [updates[k] for k in rng.permutation(len(updates))] + short
    return plan


def balanced_order(groups: Sequence[int], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """As many draws as there are slides, each group's turn after the other's, over all epochs.

    Think of one endless row of draws: draw s belongs to group s mod G, and an epoch is the next
    len(groups) of them. Within its group each slide waits until all others have had their turn.
    It follows that

    - any b draws in a row, so every update, hold each group floor(b / G) or ceil(b / G) times:
      at least once if b >= G (of survival: an event in every update of 2 or more);
    - an epoch draws each group equally often to within one, and so do all epochs so far together;
    - the slides of a group differ by at most one in how often they were drawn, in the epoch and in
      all epochs so far together: whom a large group leaves out comes first in the next epoch;
    - an update holds a slide twice only if it draws more from the group than the group has.

    Which slides share an epoch follows from one permutation a group and run; how they are ordered in
    it, and who meets whom in an update, is drawn anew in each epoch.

    Args:
        groups: one number a slide.
        seed: of the run.
        epoch: 0-based.

    Returns:
        (len(groups),) slide numbers.
    """
    labels, group_of = np.unique(np.asarray(groups), return_inverse=True)
    draws = np.arange(len(groups)) + epoch * len(groups)
    order = np.empty(len(groups), np.int64)
    for group in range(len(labels)):
        own = np.flatnonzero(draws % len(labels) == group)
        cycle = np.random.default_rng(mix_seed(seed, group, "cycle")).permutation(
            np.flatnonzero(group_of == group)
        )
        waiting = np.roll(cycle, -int(draws[own[0]] // len(labels)))
        rng = np.random.default_rng(mix_seed(seed, epoch, group, "cycle"))
        order[own] = _rounds(waiting, len(own), rng)
    return order


def _rounds(waiting: NDArray[np.int64], draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``draws`` of the slides that wait in line, round by round; the first in line come once more.

    Every round of the epoch has one order, so a slide comes back only after all the others.
    """
    more = draws % len(waiting)
    line = np.concatenate([rng.permutation(waiting[:more]), rng.permutation(waiting[more:])])
    return np.resize(line, draws)


def repeat_counts(plan: Sequence[Sequence[int]]) -> list[list[int]]:
    """How often each slide of a plan came before in it: a slide's draws differ in their patches."""
    seen: Counter[int] = Counter()
    found = []
    for update in plan:
        found.append([])
        for slide in update:
            found[-1].append(seen[slide])
            seen[slide] += 1
    return found
