"""The interface that all strategies share, and its simplest form: one process on one device."""

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
"""The optimiser slot that counts steps: one number, complete on every rank; on the device only if fused."""


class Strategy:
    """One process on one device; the interface that all strategies share.

    After :meth:`setup`, ``module`` is what a training forward is called on and ``optimizer`` holds
    the groups whose ``lr`` may be set; ``model`` is the plain model that :meth:`setup` was called with.
    One update is one forward of ``module``, one :meth:`backward` and one :meth:`step`.

    A rank may hold only a shard of each weight. :meth:`shards` are the live shards, under the names
    of the plain model's state dict; elementwise work (a moving average, a copy) is done on them.
    :meth:`full_tensors` and :meth:`shard` convert shards to full tensors and back, so that any strategy
    can load what another one saved.

    Parameters
    ----------
    device
        The device of this process.
    """

    rank = 0
    """Number of this process, from 0."""
    world_size = 1
    """Number of processes."""
    model: nn.Module
    """The plain model."""
    module: nn.Module
    """What a training forward is called on: the model, wrapped."""
    optimizer: Optimizer
    """Updates the parameters of ``model``."""
    shapes: dict[str, torch.Size]
    """Full shape of each tensor in the plain model's state dict, however the ranks shard it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clip: float | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and prints: rank 0 does."""
        return self.rank == 0

    def describe(self) -> str:
        """Return the processes and devices in words, such as ``cpu`` or ``8 x cuda (DDP)``."""
        return str(self.device)

    # The update

    def setup(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None, *, clip: float | None
    ) -> None:
        """Move the model to the device, wrap it and build its optimiser.

        Parameters
        ----------
        model
            The same on all ranks.
        make_optimizer
            Called with the model once its parameters are the ones to update. None: the model is only
            evaluated, and every rank holds all of it.
        clip
            Largest joint L2 norm of the gradients; None for no limit.
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
        """Compute the gradients of the sum of ``loss`` over ranks.

        A loss that is not finite makes every gradient NaN, so that :meth:`step` skips the update on
        all ranks without further communication.

        Parameters
        ----------
        loss
            0-d, this rank's part of the update's loss.
        """
        nan_if_not_finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self._backward(loss * nan_if_not_finite.to(loss.dtype))

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip the gradients, update the weights if all gradients are finite, clear the gradients.

        Returns
        -------
        norm
            0-d, the joint norm of the gradients before clipping.
        good
            0-d bool, whether the update was made.

        Both are on the device and the same on every rank. The host waits for them only where the
        optimiser is not fused or the weights are sharded.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self._gradient_norm([p.grad for p in parameters if p.grad is not None])
        good = norm.isfinite()
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self._update_weights(good)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, good

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.nn.utils.get_total_norm(gradients)

    def _update_weights(self, good: Tensor) -> None:
        if all(group.get("fused") for group in self.optimizer.param_groups):
            # A fused optimiser reads this flag on the device and leaves weights and state alone.
            vars(self.optimizer)["found_inf"] = (~good).to(torch.float32)
            self.optimizer.step()
        elif bool(good):
            self.optimizer.step()

    # Communication between ranks

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Concatenate the rows of all ranks, in rank order, on every rank.

        For a bag that is sharded over ranks: the head works on all rows on every rank, with a loss
        of weight 1/world_size on each. The gradient that reaches this rank's rows is the incoming
        one times world_size: summed over ranks, the gradients of the encoder and of the head are then
        those of the full bag. The head must do the same work on every rank.

        Parameters
        ----------
        rows
            (counts[rank], ...) rows of this rank.
        counts
            Number of rows of each rank; they may differ, and be 0.

        Returns
        -------
        Tensor
            (sum(counts), ...).

        Raises
        ------
        ValueError
            ``counts`` does not agree with ``rows``.
        """
        return rows

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; its gradient is the sum of the gradients over ranks."""
        return tensor

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value of each rank, in rank order, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank has come here."""

    def close(self) -> None:
        """Leave the process group."""

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks were started alike, for example with the same settings and cohort.

        Parameters
        ----------
        facts
            Name -> value, which must be the same on every rank.

        Raises
        ------
        UserError
            On every rank, naming the entries that differ and the ranks.
        """

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """Wrap a run: if another rank is lost, raise a LostRankError.

        Raises
        ------
        LostRankError
            A collective failed because another rank died or does not answer.
        """
        yield

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise a UserError that any rank raises inside the block on every rank.

        Every rank must enter and leave the block, and no collective may run inside.

        Raises
        ------
        UserError
            With the message of the first rank that failed.
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

    def shards(self, module: nn.Module | None = None) -> Tensors:
        """Return this rank's shard of every parameter and buffer, sharing its memory.

        Parameters
        ----------
        module
            A submodule of ``model``; by default all of it.

        Returns
        -------
        dict
            Name in the module's state dict -> shard.
        """
        state = (self.model if module is None else module).state_dict(keep_vars=True)
        return {name: self._shard_of(value) for name, value in state.items()}

    def _shard_of(self, value: Tensor) -> Tensor:
        return value.detach()

    def full_tensors(self, shards: Mapping[str, Tensor]) -> Tensors:
        """Return full tensors on the CPU, made of shards like those of :meth:`shards`.

        Every rank must call it.

        Returns
        -------
        dict
            Copies, on rank 0; empty on the other ranks.
        """
        if not self.is_leader:
            return {}
        return {name: value.detach().to("cpu", copy=True) for name, value in shards.items()}

    def shard(self, full: Mapping[str, Tensor]) -> Tensors:
        """Return this rank's shards, new and on the device, of full tensors.

        Parameters
        ----------
        full
            Name in the model's state dict -> full tensor, the same on every rank.
        """
        state = self.model.state_dict(keep_vars=True)
        return {name: self._cut_shard(state[name], value) for name, value in full.items()}

    def _cut_shard(self, like: Tensor, value: Tensor) -> Tensor:
        # In the memory layout of the model's tensor (channels_last): fused optimisers go by address.
        return torch.empty_like(like, device=self.device, requires_grad=False).copy_(value)

    @torch.no_grad()
    def load(self, full: Mapping[str, Tensor]) -> None:
        """Replace the model's weights.

        Parameters
        ----------
        full
            Full tensors, the same on every rank.

        Raises
        ------
        KeyError
            A parameter or buffer is missing.
        """
        shards, state = self.shards(), self.model.state_dict(keep_vars=True)
        for name, shard in shards.items():
            shard.copy_(self._cut_shard(state[name], full[name]))

    @torch.no_grad()
    def average_into(
        self, teacher: nn.Module, student: nn.Module, decay: float, *, good: Tensor | None = None
    ) -> None:
        """Move ``teacher`` towards ``student``: the exponential moving average of a mean teacher.

        teacher = decay * teacher + (1 - decay) * student, for each floating-point parameter and buffer of the
        state dict; integer buffers are copied (Tarvainen & Valpola 2017, arXiv 1703.01780). Elementwise, so
        every rank moves the shards it holds. Call it after :meth:`step`, on every rank.

        Parameters
        ----------
        teacher
            A frozen submodule of ``model``.
        student
            Another submodule, with the same names and shapes.
        decay
            0 to 1.
        good
            0-d bool on the device: False where the step was skipped and the teacher must not move.

        Raises
        ------
        ValueError
            The two differ in names or shapes, or the teacher is trained.
        """
        if any(parameter.requires_grad for parameter in teacher.parameters()):
            raise ValueError("a teacher must be frozen: teacher.requires_grad_(False)")
        averages, values = self.shards(teacher), self.shards(student)
        shapes = [{k: v.shape for k, v in shards.items()} for shards in (averages, values)]
        if shapes[0] != shapes[1]:
            raise ValueError("teacher and student must have the same parameters and buffers")
        if good is None:
            good = torch.ones((), dtype=torch.bool, device=self.device)
        move_averages(averages, values, decay, good)

    @contextmanager
    def full_parameters(self, shards: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Give the plain model, which each rank may call on its own inside, as often as it likes.

        Not for training. Every rank must enter and leave the block.

        Parameters
        ----------
        shards
            Weights to use inside instead of the model's, such as their moving average; the model's
            weights are restored afterwards.
        """
        if shards is None:
            with self._gather_parameters():
                yield self.model
            return
        live = self.shards()
        saved = {name: value.clone() for name, value in live.items()}
        _copy_values(live, shards)
        try:
            with self._gather_parameters():
                yield self.model
        finally:
            _copy_values(self.shards(), saved)

    @contextmanager
    def _gather_parameters(self) -> Iterator[None]:
        yield

    # The optimiser's state

    def optimizer_tensors(self) -> Tensors:
        """Return the optimiser's state as full CPU tensors ``<parameter>.<slot>``.

        Every rank must call it. Rank 0 has them, the others an empty dict; see :meth:`full_tensors`.
        """
        tensors: Tensors = {}
        for slot, shards in sorted(self._optimizer_shards().items()):
            full = (
                Strategy.full_tensors(self, shards) if slot == STEP else self.full_tensors(shards)
            )
            tensors |= {f"{name}.{slot}": value for name, value in full.items()}
        return tensors

    def _optimizer_shards(self) -> dict[str, Tensors]:
        """Slot -> parameter's name -> this rank's shard."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        slots: dict[str, Tensors] = {}
        for parameter, state in self.optimizer.state.items():
            for slot, value in state.items():
                if isinstance(value, Tensor):
                    slots.setdefault(slot, {})[names[id(parameter)]] = self._shard_of(value)
        return slots

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`optimizer_tensors` of any strategy returned.

        Parameters
        ----------
        tensors
            ``<parameter>.<slot>`` -> full tensor, the same on every rank.
        """
        parameters = dict(self.model.named_parameters())
        step_on_device = {
            id(parameter): bool(group.get("fused") or group.get("capturable"))
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }
        for key, value in tensors.items():
            name, slot = key.rsplit(".", 1)
            parameter = parameters[name]
            if slot == STEP:
                device = self.device if step_on_device[id(parameter)] else torch.device("cpu")
                slot_value = value.to(device, copy=True)
            else:
                slot_value = self._slot_like(parameter, self._cut_shard(parameter, value))
            self.optimizer.state[parameter][slot] = slot_value

    def _slot_like(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        # In the parameter's memory layout (for example channels_last): a fused kernel walks through
        # parameter and slots side by side without looking at strides.
        return torch.empty_like(parameter.detach(), dtype=shard.dtype).copy_(shard)


@torch.no_grad()
def move_averages(
    averages: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float, good: Tensor
) -> None:
    """Move exponential averages towards ``values`` in place, after a step that was ``good``.

    Parameters
    ----------
    averages, values
        Tensors of the same names and shapes. Floating-point ones are averaged, others copied.
    decay
        Weight of the old average, 0 to 1.
    good
        0-d bool on the device, so that the host need not wait for it. False: nothing moves.
    """
    floats = [name for name, value in values.items() if value.is_floating_point()]
    for name in values.keys() - set(floats):
        averages[name].copy_(torch.where(good, values[name], averages[name]))
    if not floats:
        return
    targets = [averages[name] for name in floats]
    weight = (1 - decay) * good.to(torch.promote_types(targets[0].dtype, torch.float32))
    moves = torch._foreach_sub([values[name] for name in floats], targets)  # pyright: ignore
    torch._foreach_mul_(moves, weight)  # pyright: ignore
    torch._foreach_add_(targets, moves)  # pyright: ignore


def make_parameters_contiguous(model: nn.Module) -> None:
    """Copy the parameters into contiguous memory: those in channels_last cannot be cut into shards.

    ``contiguous()`` would leave a 1x1 convolution its channels_last strides.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _copy_values(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
