"""Several processes: communication between ranks, and DistributedDataParallel."""

from __future__ import annotations

import os
import re
import signal
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
from e2e.signals import received_signal

LOST_RANK_ERRORS = re.compile(
    r"Connection (closed|reset|refused)|Read error|Broken pipe|timed out|timeout|remote (process|error)",
    re.IGNORECASE,
)
"""Messages of the communication backends when another rank is gone or does not answer."""


class DistributedStrategy(Strategy):
    """A process group and the communication of its ranks; base class of the distributed strategies.

    Parameters
    ----------
    device
        The device of this process.
    timeout
        Seconds after which a rank that does not answer counts as lost.
    """

    def __init__(self, device: torch.device, *, timeout: float = 1800) -> None:
        super().__init__(device)
        self.timeout = timedelta(seconds=timeout)
        # init_process_group sets its own hook and never restores this one.
        self._excepthook = sys.excepthook
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

    def describe(self) -> str:
        """See :meth:`Strategy.describe`."""
        return f"{self.world_size} x {self.device.type} ({type(self).__name__})"

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """See :meth:`Strategy.gather_rows`."""
        if counts[self.rank] != len(rows):
            raise ValueError(f"rank {self.rank} has {len(rows)} rows; counts are {counts}")
        gathered: Tensor = _GatherRows.apply(rows, self.rank, counts)  # pyright: ignore[reportAssignmentType]
        return gathered

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """See :meth:`Strategy.differentiable_sum`."""
        summed: Tensor = _DifferentiableSum.apply(tensor)  # pyright: ignore[reportAssignmentType]
        return summed

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """See :meth:`Strategy.all_reduce_sum`."""
        dist.all_reduce(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        """See :meth:`Strategy.gather_objects`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """See :meth:`Strategy.barrier`."""
        dist.barrier()

    def close(self) -> None:
        """See :meth:`Strategy.close`."""
        dist.destroy_process_group()
        sys.excepthook = self._excepthook

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """See :meth:`Strategy.check_agreement`."""
        facts_of_ranks = self.gather_objects(dict(facts))
        differences = []
        for name in sorted({name for rank_facts in facts_of_ranks for name in rank_facts}):
            ranks: dict[str, list[int]] = {}
            for rank, rank_facts in enumerate(facts_of_ranks):
                ranks.setdefault(rank_facts.get(name, "(nothing)"), []).append(rank)
            if len(ranks) > 1:
                values = (f"{value} on rank {_format_ranks(r)}" for value, r in ranks.items())
                differences.append(f"{name}: {'; '.join(values)}")
        if differences:
            raise UserError(
                f"the processes of this run do not agree\n{format_list(differences)}\n"
                "  Start all of them with the same settings, data and software."
            )

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """See :meth:`Strategy.detect_lost_ranks`."""
        try:
            yield
        except RuntimeError as error:
            if not LOST_RANK_ERRORS.search(str(error)):
                raise
            if received_signal() == signal.SIGINT:
                # Ctrl-C goes to every rank; this one did not come to raise it before the others left.
                raise KeyboardInterrupt from error
            first_line = re.sub(r"^\[\S*\] ", "", str(error)).splitlines()[0]
            raise LostRankError(
                f"rank {self.rank} lost contact with another rank: {first_line.partition('. ')[0]}\n"
                "  The log of the rank that failed first has the cause; the other ranks stop here.\n"
                "  Continue from the last checkpoint with --resume RUN."
            ) from error


class DDP(DistributedStrategy):
    """A replica of the model in each process; gradients are reduced over ranks once per step.

    Parameters
    ----------
    device
        The device of this process.
    timeout
        Seconds after which a rank that does not answer counts as lost.
    """

    def _wrap(self, make_optimizer: MakeOptimizer) -> None:
        # Buffers are kept equal by the engine: BatchNorm statistics are merged, not copied from rank 0.
        self.module = DistributedDataParallel(
            self.model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        self.optimizer = make_optimizer(self.model)

    def _backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # the reducer averages, the update needs the sum


class _GatherRows(torch.autograd.Function):
    """All-gather of ragged rows; the backward keeps this rank's rows, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, counts: list[int]) -> Tensor:
        ctx.rows_of_rank = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ctx.ranks = len(counts)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.rows_of_rank] * ctx.ranks, None, None


class _DifferentiableSum(torch.autograd.Function):
    """Sum over ranks, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _DifferentiableSum.forward(ctx, gradients[0])


def _format_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
