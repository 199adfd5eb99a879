"""Where training runs: one process, or many under DistributedDataParallel. The only user of
``torch.distributed``."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Strategy:
    """One process on one device; the face all strategies have."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward take part in the collectives."""
        return model.to(self.device)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum over ranks of ``loss``."""
        loss.backward()

    def sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""

    def gather(self, value: Any) -> list[Any]:
        """One value of each rank, in rank order, on every rank."""
        return [value]

    def wait(self) -> None:
        """Until every rank is here."""

    def close(self) -> None:
        """Leave the process group."""


class DDP(Strategy):
    """A replica of the model in each process; gradients are averaged over ranks once a step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        """See :class:`Strategy`. Buffers are ours to keep alike: BatchNorm is merged, not copied."""
        ids = [self.device.index] if self.device.type == "cuda" else None
        model = model.to(self.device)
        return DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)

    def backward(self, loss: Tensor) -> None:
        """See :class:`Strategy`; the reducer takes the mean, the update needs the sum."""
        (loss * self.world_size).backward()

    def sum(self, tensor: Tensor) -> None:
        """See :class:`Strategy`."""
        dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """See :class:`Strategy`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """See :class:`Strategy`."""
        dist.barrier()

    def close(self) -> None:
        """See :class:`Strategy`."""
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """``auto``: this process's GPU when there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    return device


def build_strategy(device: torch.device) -> Strategy:
    """DDP under ``torchrun`` with more than one process, else a single process."""
    return DDP(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Strategy(device)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """``auto``: bfloat16 on a GPU that has it, else float32; ``bf16`` and ``fp32`` as they say."""
    if precision == "bf16":
        return torch.bfloat16
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "auto" and has_bf16 else None
