"""Main memory that is used again; and how many chunks may keep their graphs, by what memory is left."""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Slabs:
    """Main memory for chunk after chunk, handed out again when its last tensor is gone.

    The first touch of new memory costs as much as half a JPEG decode of what goes into it. At most
    :data:`MOST` slabs wait to be used again; each grows to the largest chunk it was asked for.
    """

    MOST = 8

    def __init__(self) -> None:
        # Its methods are atomic: no lock to wait for. What comes back last is still in the cache.
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=self.MOST)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(*shape) of any content."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if memory.size < size:
            memory = np.empty(size, np.uint8)  # NumPy asks for huge pages
        lent = memory[:size]  # the tensor holds this one, and nobody else does
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on the device; on the CPU this process's share of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_free_of_machine(), _free_of_container()) / neighbours


def _free_of_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2.0**32  # no Linux: a careful guess
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), 0)
    return 1024.0 * float(kib)


def _free_of_container() -> float:
    """By the limits of control groups, version 2 and 1; infinite where there is none."""
    root = Path("/sys/fs/cgroup")
    free = float("inf")
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, float(limit.read_text()) - float(used.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return free
