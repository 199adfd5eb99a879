"""Main memory that is used again; and how many chunks may keep their graphs, by what memory is left."""

from __future__ import annotations

import math
import os
import re
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from e2e.errors import OneRankError

UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """``8GiB``, ``500 MB``, ``1000000`` -> bytes; ValueError when it is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise ValueError(f"{text!r} is no size such as 8GiB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def show_bytes(count: float) -> str:
    """``1.5 GiB``, ``200 MiB``."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


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


class GraphBudget:
    """Which chunks of a batch keep their graphs for the backward: the last ones, as memory allows.

    The very last always does: the backward wants it first, and it needs the memory of one chunk anyway.
    It never changes a result. The first training batch, whose last chunk and heads are measured, keeps
    only that one; so ``auto`` looks for free memory when optimiser state and averages are there.

    Args:
        keep: ``all``; ``none``; ``auto``; or a size such as ``8GiB`` for all graphs together.
        chunk: most patches in a chunk.

    Raises:
        OneRankError: (while measuring) the size given holds not one chunk.
    """

    SHARE: ClassVar = {"cuda": 0.85, "cpu": 0.5}
    """Of the free memory that ``auto`` takes: allocators waste some, and a machine's main memory
    serves other programs too."""

    def __init__(self, keep: str, chunk: int) -> None:
        self.keep = keep
        self.chunk = chunk
        self.given = None if keep in ("all", "none", "auto") else parse_bytes(keep)
        self._row: float | None = None
        self._measured = 0
        self._head_row: float | None = None
        self._free: float | None = None

    def first_kept(self, rows: Sequence[int], model: nn.Module, device: torch.device) -> int:
        """The first chunk to keep, of chunks with so many patches each."""
        if self.keep == "all":
            return 0
        room, last = self._room(sum(rows), model, device), len(rows) - 1
        for k in range(last, -1, -1):
            room -= rows[k] * (self._row or 0.0)
            if room < 0 and k < last:
                return k + 1
        return 0 if room >= 0 else last

    def measure_chunk(self, rows: int, model: nn.Module) -> AbstractContextManager[None]:
        """Around the last chunk: its graph is measured, if none so large was before.

        Part of a graph is the same for a chunk of any size (low-precision copies of weights), so a
        small chunk's says too much of a patch.
        """
        known = rows <= self._measured or not torch.is_grad_enabled()
        if known or self.keep in ("all", "none"):
            return nullcontext()
        return self._measure_chunk(rows, model)

    def measure_heads(self, rows: int, model: nn.Module) -> AbstractContextManager[None]:
        """Around the heads of a batch with so many patches: the first time, theirs are measured."""
        if self._head_row is not None or self.keep != "auto":
            return nullcontext()
        return self._measure_heads(rows, model)

    def _room(self, rows: int, model: nn.Module, device: torch.device) -> float:
        """Bytes for graphs in a batch of so many rows; -1 when only the last chunk may keep its own."""
        if self._row is None or self.keep == "none":
            return -1.0
        if self.given is not None:
            return self.given
        if self._free is None:
            self._free = free_memory(device)
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        # One more chunk's worth, for what the backward of a chunk makes besides.
        head = (self._head_row or 0.0) * rows
        return self.SHARE[device.type] * self._free - gradients - head - self._row * self.chunk

    @contextmanager
    def _measure_chunk(self, rows: int, model: nn.Module) -> Iterator[None]:
        with saved_bytes(model) as sizes:
            yield
        held = sum(sizes.values())
        self._row, self._measured = held / rows, rows
        if self.given is not None and self.given < held:
            raise OneRankError(
                f"engine.keep_graphs={self.keep} holds not one chunk: the graph of {rows} patches "
                f"(engine.chunk={self.chunk}) takes {show_bytes(held)}\n"
                "  give more, lower engine.chunk, or set engine.keep_graphs=auto or none"
            )

    @contextmanager
    def _measure_heads(self, rows: int, model: nn.Module) -> Iterator[None]:
        with saved_bytes(model) as sizes:
            yield
        # Twice: the backward makes a gradient beside much of what the forward saved.
        self._head_row = 2 * sum(sizes.values()) / rows


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that autograd saves inside, by storage; those of parameters and buffers left out."""
    own: set[int] = set()
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not own:  # not before: folded weights stand in for parameters while a chunk is encoded
            own.update(t.untyped_storage().data_ptr() for t in _tensors(model))
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


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
