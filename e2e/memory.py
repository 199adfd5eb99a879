"""Sizes in bytes, free memory, and main memory that is used again."""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Slabs:
    """Main memory for chunk after chunk; a slab is used again when its last tensor is gone.

    The first access to new memory costs as much as half a JPEG decode of what goes into it. At most
    :data:`MAX_FREE` slabs wait to be used again; each grows to the largest chunk it has held.
    """

    MAX_FREE = 8
    """Most slabs that wait to be used again."""

    def __init__(self) -> None:
        # The methods of a deque are atomic, so no lock is needed. The last slab to return is still in
        # the cache.
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=self.MAX_FREE)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous CPU tensor of any content.

        Parameters
        ----------
        shape
            Of the tensor.
        dtype
            Of the tensor.
        """
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if memory.size < size:
            memory = np.empty(size, np.uint8)  # NumPy asks for huge pages
        view = memory[:size]  # held by the tensor and nothing else
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)


def free_memory(device: torch.device) -> float:
    """Return the bytes that are still free on a device; on the CPU this process's share of them.

    Parameters
    ----------
    device
        A GPU, including what PyTorch has reserved there but does not use; or the CPU, within the limits of
        the container and divided by ``LOCAL_WORLD_SIZE`` processes.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_free_on_machine(), _free_in_container()) / num_processes


def _free_on_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2.0**32  # not Linux: a careful guess
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), 0)
    return 1024.0 * float(kib)


def _free_in_container() -> float:
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


def to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start copying a tensor to the host.

    Parameters
    ----------
    values
        1-d, on any device.

    Returns
    -------
    Callable
        Waits for the copy and returns the values.
    """
    if values.device.type != "cuda":
        return values.tolist
    copied, done = values.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return copied.tolist()

    return read
