"""Which chunks keep their graphs for the backward pass, as memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from e2e.errors import OneRankError
from e2e.memory import free_memory
from e2e.sizes import parse_bytes, show_bytes


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
