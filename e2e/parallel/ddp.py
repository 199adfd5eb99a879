"""Many processes: what they tell each other, and DistributedDataParallel."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from e2e.errors import LostRankError, UserError, format_list
from e2e.parallel.base import MakeOptimizer, Strategy

LOST = re.compile(
    r"Connection (closed|reset|refused)|Read error|Broken pipe|timed out|timeout|remote (process|error)",
    re.IGNORECASE,
)
"""What backends say when another rank is gone, or does not answer."""


class DistributedStrategy(Strategy):
    """A process group, and what its ranks tell each other; the base of the distributed strategies.

    Args:
        timeout: seconds after which a rank that does not answer is taken for lost.
    """

    def __init__(self, device: torch.device, *, timeout: float = 1800) -> None:
        super().__init__(device)
        self.timeout = timedelta(seconds=timeout)
        self._excepthook = (
            sys.excepthook
        )  # init_process_group sets its own, and never restores this one
        backend = "nccl" if device.type == "cuda" else "gloo"
        with self.detect_lost_ranks():
            if dist.is_initialized():  # by another strategy of this process
                dist.set_timeout(self.timeout)
            elif "RANK" in os.environ:
                dist.init_process_group(backend, timeout=self.timeout)
            else:  # not under torchrun
                store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
                dist.init_process_group(backend, store=store, rank=0, world_size=1)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """See :class:`Strategy`."""
        if counts[self.rank] != len(rows):
            raise ValueError(f"rank {self.rank} has {len(rows)} rows; counts are {counts}")
        gathered: Tensor = _GatherRows.apply(rows, self.rank, counts)  # pyright: ignore[reportAssignmentType]
        return gathered

    def total(self, tensor: Tensor) -> Tensor:
        """See :class:`Strategy`."""
        summed: Tensor = _Total.apply(tensor)  # pyright: ignore[reportAssignmentType]
        return summed

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """See :class:`Strategy`."""
        dist.all_reduce(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        """See :class:`Strategy`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """See :class:`Strategy`."""
        dist.barrier()

    def close(self) -> None:
        """See :class:`Strategy`."""
        dist.destroy_process_group()
        sys.excepthook = self._excepthook

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """See :class:`Strategy`."""
        everyone = self.gather_objects(dict(facts))
        faults = []
        for name in sorted({name for found in everyone for name in found}):
            ranks: dict[str, list[int]] = {}
            for rank, found in enumerate(everyone):
                ranks.setdefault(found.get(name, "(nothing)"), []).append(rank)
            if len(ranks) > 1:
                told = (f"{value} on rank {_numbers(those)}" for value, those in ranks.items())
                faults.append(f"{name}: {'; '.join(told)}")
        if faults:
            raise UserError(
                f"the processes of this run do not agree\n{format_list(faults)}\n"
                "  start all of them with the same settings, data and software"
            )

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """See :class:`Strategy`."""
        try:
            yield
        except RuntimeError as error:
            said = re.sub(r"^\[\S*\] ", "", str(error)).splitlines()[0] if str(error) else ""
            if not LOST.search(str(error)):
                raise
            raise LostRankError(
                f"rank {self.rank} lost contact with another rank: {said.partition('. ')[0]}\n"
                "  the log of the rank that failed first says why; the others stop here\n"
                "  go on from the last checkpoint: --resume RUN"
            ) from error


class DDP(DistributedStrategy):
    """A replica of the model in each process; gradients are averaged over ranks once a step."""

    def _wrap(self, make_optimizer: MakeOptimizer) -> None:
        # Buffers are ours to keep alike: BatchNorm is merged, not copied.
        self.module = DistributedDataParallel(
            self.model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        self.optimizer = make_optimizer(self.model)

    def _backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # the reducer takes the mean, the update needs the sum


class _GatherRows(torch.autograd.Function):
    """All-gather of ragged rows; backward keeps the own rows, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, counts: list[int]) -> Tensor:
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ctx.ranks = len(counts)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.own] * ctx.ranks, None, None


class _Total(torch.autograd.Function):
    """Sum over ranks, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Total.forward(ctx, gradients[0])


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
