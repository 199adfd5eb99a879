"""Which chunks keep their graphs for the backward, as memory allows."""

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
    """Decides which chunks of a batch keep their graphs for the backward: the last ones that fit.

    The very last always does: the backward needs it first, and that takes the memory of one chunk anyway.
    The budget never changes a result. The first training batch, in which the last chunk and the heads are
    measured, keeps only that one, so ``auto`` looks for free memory once optimiser state and averages exist.

    Parameters
    ----------
    keep
        ``all``; ``none``; ``auto``; or a size such as ``8GiB`` for all graphs together.
    chunk
        Largest number of patches in a chunk.

    Raises
    ------
    OneRankError
        While measuring: the graph of one chunk is larger than the size.
    """

    SHARE: ClassVar = {"cuda": 0.85, "cpu": 0.5}
    """Fraction of the free memory that ``auto`` uses: allocators waste some, and a machine's main memory
    serves other programs too."""

    def __init__(self, keep: str, chunk: int) -> None:
        self.keep = keep
        self.chunk = chunk
        self.limit = None if keep in ("all", "none", "auto") else parse_bytes(keep)
        self._bytes_per_row: float | None = None
        self._measured_rows = 0
        self._head_bytes_per_row: float | None = None
        self._free: float | None = None

    def first_kept(self, rows: Sequence[int], model: nn.Module, device: torch.device) -> int:
        """Return the number of the first chunk that keeps its graph; those after it do too.

        Parameters
        ----------
        rows
            Number of patches in each chunk of the batch.
        model
            For the size of its gradients.
        device
            Where the graphs lie.
        """
        if self.keep == "all":
            return 0
        available, last = self._available(sum(rows), model, device), len(rows) - 1
        for k in range(last, -1, -1):
            available -= rows[k] * (self._bytes_per_row or 0.0)
            if available < 0 and k < last:
                return k + 1
        return 0 if available >= 0 else last

    def measure_chunk(self, num_rows: int, model: nn.Module) -> AbstractContextManager[None]:
        """Measure the graph of the last chunk inside the block, unless one as large was measured before.

        Part of a graph has the same size for any chunk (low-precision copies of weights), so the
        graph of a small chunk overestimates the bytes per patch.

        Parameters
        ----------
        num_rows
            Number of patches in the chunk.
        model
            Its parameters and buffers are not counted.
        """
        is_measured = num_rows <= self._measured_rows or not torch.is_grad_enabled()
        if is_measured or self.keep in ("all", "none"):
            return nullcontext()
        return self._measure_chunk(num_rows, model)

    def measure_heads(self, num_rows: int, model: nn.Module) -> AbstractContextManager[None]:
        """Measure the graphs of the heads inside the block, the first time.

        Parameters
        ----------
        num_rows
            Number of patches in the batch.
        model
            Its parameters and buffers are not counted.
        """
        if self._head_bytes_per_row is not None or self.keep != "auto":
            return nullcontext()
        return self._measure_heads(num_rows, model)

    def _available(self, num_rows: int, model: nn.Module, device: torch.device) -> float:
        """Bytes for graphs in a batch of so many patches; -1 if only the last chunk may keep its own."""
        if self._bytes_per_row is None or self.keep == "none":
            return -1.0
        if self.limit is not None:
            return self.limit
        if self._free is None:
            self._free = free_memory(device)
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        # The size of one more chunk, for temporary tensors in the backward of a chunk.
        chunk = self._bytes_per_row * self.chunk
        heads = (self._head_bytes_per_row or 0.0) * num_rows
        return self.SHARE[device.type] * self._free - gradients - heads - chunk

    @contextmanager
    def _measure_chunk(self, num_rows: int, model: nn.Module) -> Iterator[None]:
        with saved_bytes(model) as sizes:
            yield
        graph_bytes = sum(sizes.values())
        self._bytes_per_row, self._measured_rows = graph_bytes / num_rows, num_rows
        if self.limit is not None and self.limit < graph_bytes:
            raise OneRankError(
                f"engine.keep_graphs={self.keep} is too small for one chunk: the graph of {num_rows} "
                f"patches (engine.chunk={self.chunk}) takes {show_bytes(graph_bytes)}\n"
                "  Raise engine.keep_graphs, lower engine.chunk, or set engine.keep_graphs=auto or none."
            )

    @contextmanager
    def _measure_heads(self, num_rows: int, model: nn.Module) -> Iterator[None]:
        with saved_bytes(model) as sizes:
            yield
        # Twice: the backward makes a gradient beside much of what the forward saved.
        self._head_bytes_per_row = 2 * sum(sizes.values()) / num_rows


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Measure what autograd saves for the backward inside the block.

    Parameters
    ----------
    model
        Its parameters and buffers are not counted.

    Yields
    ------
    dict
        Address of a storage -> its bytes; filled while the block runs.
    """
    model_storages: set[int] = set()
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Not earlier: folded weights take the place of parameters while a chunk is encoded.
        if not model_storages:
            model_storages.update(t.untyped_storage().data_ptr() for t in _model_tensors(model))
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _model_tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
