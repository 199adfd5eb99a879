"""FSDP2: every rank keeps a shard of each parameter, gradient and optimiser slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from e2e.parallel.base import MakeOptimizer, Tensors, make_parameters_contiguous
from e2e.parallel.ddp import DistributedStrategy


class FSDP2(DistributedStrategy):
    """Fully sharded data parallel, sharded at the root only.

    There is one all-gather before the forward and one reduce-scatter after the backward, so ranks may cut
    their bags into different numbers of chunks; a collective for each block would hang. It saves memory for
    the optimiser's state, the moving average and the gradients between steps; within a step each rank
    holds all weights and gradients.

    Parameters
    ----------
    device
        The device of this process.
    timeout
        Seconds after which a rank that does not answer counts as lost.
    """

    def _wrap(self, make_optimizer: MakeOptimizer) -> None:
        make_parameters_contiguous(self.model)
        sharded = fully_shard(self.model, reshard_after_forward=False)
        sharded.set_gradient_divide_factor(1.0)  # the sum over ranks, not the mean
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        self.module = self.model
        self.optimizer = make_optimizer(self.model)

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        square = super()._gradient_norm([self._shard_of(g) for g in gradients]).square()
        dist.all_reduce(square)
        return square.sqrt()

    def _update_weights(self, good: Tensor) -> None:
        if bool(good):
            self.optimizer.step()

    def shards(self, module: nn.Module | None = None) -> Tensors:
        """See :meth:`Strategy.shards`."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        return super().shards(module)

    def _shard_of(self, value: Tensor) -> Tensor:
        value = value.detach()
        return value.to_local() if isinstance(value, DTensor) else value

    def full_tensors(self, shards: Mapping[str, Tensor]) -> Tensors:
        """See :meth:`Strategy.full_tensors`."""
        live = self.model.state_dict(keep_vars=True)
        tensors: Tensors = {}
        for name, shard in shards.items():
            full = _distributed_like(live[name], shard)
            full = full.full_tensor() if isinstance(full, DTensor) else full
            if self.is_leader:
                tensors[name] = full.detach().to("cpu", copy=True)
        return tensors

    def _cut_shard(self, like: Tensor, value: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return super()._cut_shard(like, value)
        value = value.to(self.device, like.dtype).contiguous()
        full = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return full.to_local().clone()

    def _slot_like(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        return _distributed_like(parameter.detach(), shard)

    @contextmanager
    def _gather_parameters(self) -> Iterator[None]:
        if not isinstance(self.model, FSDPModule):
            yield
            return
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()


def _distributed_like(like: Tensor, shard: Tensor) -> Tensor:
    """Return the tensor, distributed as ``like`` is, of which each rank has a ``shard``."""
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
