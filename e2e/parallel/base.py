"""The face all strategies have, and the one that is a single process on a single device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from e2e.errors import UserError

Tensors = dict[str, Tensor]
MakeOptimizer = Callable[[nn.Module], Optimizer]
STEP = "step"
"""The slot that counts steps: one number, whole on every rank; on the device only when fused."""


class Strategy:
    """One process on one device; the face all strategies have.

    After :meth:`setup`, ``module`` is what a training forward is called on and ``optimizer`` holds
    the groups whose ``lr`` may be set; ``model`` is the plain model, which :meth:`setup` was given.
    One update is one forward of ``module``, one :meth:`backward`, one :meth:`step`.

    A rank may hold a mere piece of the weights. ``shards()`` are the live pieces, under the names
    of the plain model's state dict; whatever is done to each element alone (a moving average, a
    copy) is done to them. ``whole`` and ``scatter`` lead from pieces to full tensors and back, so
    that what one strategy saves any other loads.
    """

    rank = 0
    world_size = 1
    model: nn.Module
    module: nn.Module
    optimizer: Optimizer
    shapes: dict[str, torch.Size]
    """Of the plain model's state dict, whatever pieces the ranks hold."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clip: float | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    # The update

    def setup(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None, *, clip: float | None
    ) -> None:
        """Place the model and make its optimiser.

        Args:
            model: alike on all ranks.
            make_optimizer: called with the model when its parameters are those to be updated.
                None: the model is only evaluated, and lies whole on every rank.
            clip: largest joint L2 norm of the gradients; None for no limit.
        """
        self.model, self.clip = model.to(self.device), clip
        self.shapes = {name: value.shape for name, value in model.state_dict().items()}
        if make_optimizer is None:
            self.module = self.model
        else:
            self._wrap(make_optimizer)

    def _wrap(self, make_optimizer: MakeOptimizer) -> None:
        self.module = self.model
        self.optimizer = make_optimizer(self.model)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum over ranks of ``loss``.

        A loss that is not finite makes every gradient NaN, so that :meth:`step` skips the update on
        all ranks without asking them.
        """
        poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self._backward(loss * poison.to(loss.dtype))

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip, update the weights if all gradients are finite, clear the gradients.

        Returns:
            The gradients' joint norm before clipping, and whether the update was made: 0-d tensors
            on the device, the same on every rank. The host waits for them only where the optimiser
            is not fused, or the weights are sharded.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self._gradient_norm([p.grad for p in parameters if p.grad is not None])
        good = norm.isfinite()
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self._update(good)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, good

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.nn.utils.get_total_norm(gradients)

    def _update(self, good: Tensor) -> None:
        if all(group.get("fused") for group in self.optimizer.param_groups):
            # A fused optimiser reads this flag on the device and leaves weights and state alone.
            vars(self.optimizer)["found_inf"] = (~good).to(torch.float32)
            self.optimizer.step()
        elif bool(good):
            self.optimizer.step()

    # What ranks tell each other

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows of all ranks, in rank order, on every rank; counts may differ, and be 0.

        For a bag that is sharded over ranks: the head works on all rows on every rank, with a loss
        of weight 1/world_size on each. The gradient that reaches this rank's rows is the incoming
        one times world_size: summed over ranks, the encoder's gradients and the head's are then
        those of the whole bag. Not for a head whose work differs over ranks.

        Args:
            rows: (counts[rank], D).
            counts: rows of each rank.

        Returns:
            (sum(counts), D).
        """
        return rows

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; its gradient is the sum over ranks of the gradients."""
        return tensor

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""

    def gather_objects(self, value: Any) -> list[Any]:
        """One value of each rank, in rank order, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Until every rank is here."""

    def close(self) -> None:
        """Leave the process group."""

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Compare what all ranks must have alike, such as settings and cohort.

        Raises:
            UserError: on every rank, naming the entries that differ and the ranks.
        """

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """Around the run: a rank that is lost ends the others with a LostRankError."""
        yield

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """A UserError that any rank raises inside the block ends every rank with its message.

        Every rank must enter and leave the block, and no collective may run inside.
        """
        message: str | None = None
        try:
            yield
        except UserError as error:
            message = str(error)
        messages = self.gather_objects(message)
        failed = [rank for rank, text in enumerate(messages) if text is not None]
        if failed:
            only = (
                ""
                if len(failed) == len(messages)
                else f"\n  (on rank {failed[0]} of {len(messages)})"
            )
            raise UserError(f"{messages[failed[0]]}{only}")

    # Weights

    def shards(self) -> Tensors:
        """This rank's piece of every parameter and buffer of the state dict, sharing its memory."""
        state = self.model.state_dict(keep_vars=True)
        return {name: self._piece(value) for name, value in state.items()}

    def _piece(self, value: Tensor) -> Tensor:
        return value.detach()

    def full_tensors(self, shards: Mapping[str, Tensor]) -> Tensors:
        """Full tensors on the CPU from pieces like :meth:`shards`. Every rank must call it.

        Returns:
            A copy, on rank 0; nothing elsewhere.
        """
        if not self.is_leader:
            return {}
        return {name: value.detach().to("cpu", copy=True) for name, value in shards.items()}

    def shard(self, whole: Mapping[str, Tensor]) -> Tensors:
        """This rank's pieces, new and on the device, of full tensors which every rank gives."""
        state = self.model.state_dict(keep_vars=True)
        return {name: self._cut(state[name], value) for name, value in whole.items()}

    def _cut(self, like: Tensor, value: Tensor) -> Tensor:
        # Laid out in memory as the model's own (channels_last): fused optimisers go by address.
        return torch.empty_like(like, device=self.device, requires_grad=False).copy_(value)

    @torch.no_grad()
    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Put full weights, which every rank gives, in the place of the model's.

        Raises:
            KeyError: a parameter or buffer is missing.
        """
        shards, state = self.shards(), self.model.state_dict(keep_vars=True)
        for name, shard in shards.items():
            shard.copy_(self._cut(state[name], whole[name]))

    @contextmanager
    def full_parameters(self, shards: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The plain model, which each rank may call by itself inside, as often as it likes.

        Not for training. Every rank enters and leaves.

        Args:
            shards: weights to have inside instead of the model's own, such as their average; the
                own are put back after.
        """
        if shards is None:
            with self._gathered():
                yield self.model
            return
        live = self.shards()
        own = {name: value.clone() for name, value in live.items()}
        _copy(live, shards)
        try:
            with self._gathered():
                yield self.model
        finally:
            _copy(self.shards(), own)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        yield

    # The optimiser's state

    def optimizer_tensors(self) -> Tensors:
        """The optimiser's state as full CPU tensors ``<parameter>.<slot>``; see :meth:`full_tensors`."""
        found: Tensors = {}
        for slot, pieces in sorted(self._slots().items()):
            full = (
                Strategy.full_tensors(self, pieces) if slot == STEP else self.full_tensors(pieces)
            )
            found |= {f"{name}.{slot}": value for name, value in full.items()}
        return found

    def _slots(self) -> dict[str, Tensors]:
        """Slot -> parameter's name -> this rank's piece."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        slots: dict[str, Tensors] = {}
        for parameter, state in self.optimizer.state.items():
            for slot, value in state.items():
                if isinstance(value, Tensor):
                    slots.setdefault(slot, {})[names[id(parameter)]] = self._piece(value)
        return slots

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`optimizer_tensors` of any strategy gave; every rank gives all."""
        parameters = dict(self.model.named_parameters())
        on_device = {
            id(parameter): bool(group.get("fused") or group.get("capturable"))
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }
        for key, value in tensors.items():
            name, slot = key.rsplit(".", 1)
            parameter = parameters[name]
            if slot == STEP:
                place = self.device if on_device[id(parameter)] else torch.device("cpu")
                placed = value.to(place, copy=True)
            else:
                placed = self._slot_of(parameter, self._cut(parameter, value))
            self.optimizer.state[parameter][slot] = placed

    def _slot_of(self, parameter: nn.Parameter, piece: Tensor) -> Tensor:
        # In the parameter's own order of memory (channels_last, say): a fused kernel goes through
        # parameter and slots side by side and does not look.
        return torch.empty_like(parameter.detach(), dtype=piece.dtype).copy_(piece)


def lay_out_plainly(model: nn.Module) -> None:
    """Contiguous parameters: what cuts them into pieces cannot cut those in channels_last.

    Not by ``contiguous()``, which leaves a 1x1 convolution its strange strides.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in into.items():
        value.copy_(values[name])
