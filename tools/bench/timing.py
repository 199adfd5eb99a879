"""Times of ways of doing the same, side by side in ABBA order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import active_children
from typing import NamedTuple

import numpy as np


class Times(NamedTuple):
    """Seconds of one way, a value for each round."""

    cpu: list[float]
    wall: list[float]

    def line(self, patches: int) -> dict[str, float]:
        """Return the median speed and CPU time of rounds of ``patches`` patches."""
        return {
            "patches_per_s": round(patches / statistics.median(self.wall), 1),
            "cpu_us_a_patch": round(1e6 * statistics.median(self.cpu) / patches, 1),
        }


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median over rounds of ``a / b``; both ran next to each other in each round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def spread(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the quartiles of the rounds' ratios."""
    low, high = np.percentile([x / y for x, y in zip(a, b, strict=True)], [25, 75])
    return float(low), float(high)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its living children."""
    # The clock of another process by its id: clock_getcpuclockid(3) makes the same number.
    clocks = [~child.pid << 3 | 2 for child in active_children() if child.pid]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def time_ways(ways: Mapping[str, Callable[[], Iterable[object]]], rounds: int) -> dict[str, Times]:
    """Return the times of each way in each round, in ABBA order, after one round to warm up."""
    times = {name: Times([], []) for name in ways}
    for number in range(-1, rounds):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in ways[name]():
                pass
            if number >= 0:
                times[name].cpu.append(cpu_seconds() - cpu)
                times[name].wall.append(time.perf_counter() - wall)
    return times
