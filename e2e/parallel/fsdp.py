"""FSDP2: every rank keeps a piece of each parameter, gradient and optimiser slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from e2e.parallel.base import MakeOptimizer, Tensors, lay_out_plainly
from e2e.parallel.ddp import DistributedStrategy


class FSDP2(DistributedStrategy):
    """Sharded at the root alone: one all-gather before the forward, one reduce-scatter after backward.

    So ranks may cut their bags into different numbers of chunks: a collective per block would hang.
    What it saves is the optimiser's state, the average and the gradients' resting place; within a
    step each rank holds the whole weights and gradients.
    """

    def _wrap(self, make_optimizer: MakeOptimizer) -> None:
        lay_out_plainly(self.model)
        sharded = fully_shard(self.model, reshard_after_forward=False)
        sharded.set_gradient_divide_factor(1.0)  # the sum over ranks, not the mean
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        self.module = self.model
        self.optimizer = make_optimizer(self.model)

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        square = super()._gradient_norm([self._piece(g) for g in gradients]).square()
        dist.all_reduce(square)
        return square.sqrt()

    def _update(self, good: Tensor) -> None:
        if bool(good):
            self.optimizer.step()

    def shards(self) -> Tensors:
        """See :class:`Strategy`."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        return super().shards()

    def _piece(self, value: Tensor) -> Tensor:
        value = value.detach()
        return value.to_local() if isinstance(value, DTensor) else value

    def full_tensors(self, shards: Mapping[str, Tensor]) -> Tensors:
        """See :class:`Strategy`."""
        live = self.model.state_dict(keep_vars=True)
        found: Tensors = {}
        for name, piece in shards.items():
            full = _like(live[name], piece)
            full = full.full_tensor() if isinstance(full, DTensor) else full
            if self.is_leader:
                found[name] = full.detach().to("cpu", copy=True)
        return found

    def _cut(self, like: Tensor, value: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return super()._cut(like, value)
        value = value.to(self.device, like.dtype).contiguous()
        full = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return full.to_local().clone()

    def _slot_of(self, parameter: nn.Parameter, piece: Tensor) -> Tensor:
        return _like(parameter.detach(), piece)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if not isinstance(self.model, FSDPModule):
            yield
            return
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()


def _like(like: Tensor, piece: Tensor) -> Tensor:
    """The tensor of ``like``'s full shape that is made of each rank's ``piece``."""
    if not isinstance(like, DTensor):
        return piece
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
