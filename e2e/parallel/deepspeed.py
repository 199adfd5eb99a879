"""DeepSpeed: ZeRO 0 to 3 from a JSON file, under our own clipping, schedule and precision."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from e2e.errors import UserError, format_list
from e2e.parallel.base import STEP, MakeOptimizer, Tensors, lay_out_plainly
from e2e.parallel.ddp import DistributedStrategy

OURS = {
    "optimizer": "optim.*",
    "scheduler": "optim.lr, optim.warmup_epochs and optim.epochs",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "activation_checkpointing": "engine.chunk",
    "gradient_accumulation_steps": "optim.bags",
    "train_batch_size": "optim.bags",
    "train_micro_batch_size_per_gpu": "optim.bags",
    "sparse_gradients": "",
    "elasticity": "launch/slurm.sh",
    "gradient_clipping": "optim.clip",
    "zero_allow_untested_optimizer": "",
    "zero_force_ds_cpu_optimizer": "",
}
"""Keys of the JSON which this program writes itself, and the setting that says what."""


class DeepSpeed(DistributedStrategy):
    """The optimiser's state (stage 1), also gradients (2), also weights (3) in a piece on each rank.

    Float32 weights. At stage 3 all weights are gathered once before the forward and let go in
    :meth:`step`, not module by module: ranks with different numbers of chunks would hang otherwise.

    Args:
        config: JSON of DeepSpeed; see configs/deepspeed/.
        timeout: see :class:`DistributedStrategy`.
    """

    def __init__(self, device: torch.device, config: Path, *, timeout: float = 1800) -> None:
        self._config_file = config
        self._asked = read_config(config)
        self._restore = ExitStack()
        super().__init__(device, timeout=timeout)

    def _wrap(self, make_optimizer: MakeOptimizer) -> None:
        wide = {n for n, p in self.model.named_parameters() if p.dtype != torch.float32}
        if wide:
            raise UserError(f"DeepSpeed needs float32 weights; these are not\n{format_list(wide)}")
        lay_out_plainly(self.model)
        config = complete_config(
            self._asked, self._config_file, clip=self.clip, world_size=self.world_size
        )
        self.optimizer = make_optimizer(self.model)
        # ZeRO makes one flat tensor of each group, and cannot of none.
        groups = self.optimizer.param_groups
        groups[:] = [group for group in groups if group["params"]]
        with _environment(self.device), _quiet():
            deepspeed = _import_deepspeed()
            logger = logging.getLogger("DeepSpeed")
            self._restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            deepspeed.init_distributed(verbose=False)
            self._engine: Any = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=config
            )[0]
        for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed's own have the default
            dist.set_timeout(self.timeout, group)
        self.stage: int = self._engine.zero_optimization_stage()
        if self.stage == 3:
            self._engine.optimizer.parameter_offload._remove_module_hooks()
            self.model.register_forward_pre_hook(lambda *_: self._all_gather())
        self.module = self._engine

    def close(self) -> None:
        """See :class:`Strategy`."""
        self._restore.close()
        super().close()

    def _backward(self, loss: Tensor) -> None:
        with _quiet():
            self._engine.backward(loss * self.world_size)

    def step(self) -> tuple[Tensor, Tensor]:
        """See :class:`Strategy`."""
        if self.stage == 0:
            return super().step()
        with _quiet():
            self._engine.step()
        # ZeRO finds a gradient that is not finite on any rank, and leaves the weights alone.
        good = not self._engine.optimizer.overflow
        norm = self._engine.get_global_grad_norm() if good else torch.nan
        told = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        return told, torch.tensor(good, device=self.device)

    def _update(self, good: Tensor) -> None:
        if bool(good):
            self.optimizer.step()

    # Weights: whole on each rank but at stage 3

    def _piece(self, value: Tensor) -> Tensor:
        return _partition(value).detach() if _is_partitioned(value) else super()._piece(value)

    def full_tensors(self, shards: Mapping[str, Tensor]) -> Tensors:
        """See :class:`Strategy`."""
        live = self.model.state_dict(keep_vars=True)
        found: Tensors = {}
        for name, piece in shards.items():
            like: Any = live[name]
            if _is_partitioned(like):
                at = self.rank * len(piece)
                count = max(0, min(len(piece), like.ds_numel - at))
                piece = self._assemble(piece[:count], at, like.ds_shape)
            if self.is_leader:
                found[name] = piece.detach().to("cpu", copy=True)
        return found

    def _assemble(self, piece: Tensor, at: int, shape: torch.Size) -> Tensor:
        """The full tensor of whose flat form each rank has a ``piece`` that starts ``at`` ..."""
        full = torch.zeros(shape, dtype=piece.dtype, device=self.device)
        full.view(-1)[at : at + len(piece)] = piece
        dist.all_reduce(full)
        return full

    def _cut(self, like: Tensor, value: Tensor) -> Tensor:
        if not _is_partitioned(like):
            return super()._cut(like, value)
        partition = _partition(like)
        piece = torch.zeros_like(partition)
        own = value.flatten()[self.rank * len(piece) : (self.rank + 1) * len(piece)]
        piece[: len(own)] = own
        return piece

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """See :class:`Strategy`; ZeRO's own copies of the weights follow."""
        super().load(whole)
        if hasattr(self, "_engine") and self.stage > 0:
            self._engine.optimizer.refresh_fp32_params()

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        self._all_gather()
        try:
            yield
        finally:
            for parameter in self._partitioned():
                parameter.partition()

    def _all_gather(self) -> None:
        parameters = self._partitioned()
        if parameters and "NOT_AVAILABLE" in str(parameters[0].ds_status):
            with _quiet():
                parameters[0].all_gather(parameters)

    def _partitioned(self) -> list[Any]:
        return [p for p in self.model.parameters() if _is_partitioned(p)]

    # The optimiser's state: in flat pieces, but at stage 0

    def optimizer_tensors(self) -> Tensors:
        """See :class:`Strategy`."""
        if self.stage == 0:
            return super().optimizer_tensors()
        found: Tensors = {}
        fragments = self._fragments()
        slots = {slot for f in fragments.values() for slot in self.optimizer.state[f.flat]}
        for slot in sorted({slot for part in self.gather_objects(slots) for slot in part}):
            for name, fragment in fragments.items():
                value = self.optimizer.state[fragment.flat].get(slot)
                if slot == STEP:
                    full = torch.as_tensor(value, dtype=torch.float32)
                else:
                    flat = fragment.flat if value is None else value
                    piece = flat[fragment.start : fragment.start + fragment.count]
                    full = self._assemble(piece, fragment.at, fragment.shape)
                if self.is_leader:
                    found[f"{name}.{slot}"] = full.detach().to("cpu", copy=True)
        return found

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Strategy`."""
        if self.stage == 0:
            super().load_optimizer(tensors)
            return
        fragments = self._fragments()
        for key, value in tensors.items():
            name, slot = key.rsplit(".", 1)
            fragment = fragments[name]
            state = self.optimizer.state[fragment.flat]
            if slot == STEP:
                state[slot] = value.to(self.device if _fused(self.optimizer) else "cpu", copy=True)
                continue
            flat = state.setdefault(slot, torch.zeros_like(fragment.flat))
            own = value.flatten()[fragment.at : fragment.at + fragment.count]
            flat[fragment.start : fragment.start + fragment.count] = own.to(flat.device)

    def _fragments(self) -> dict[str, _Fragment]:
        """Trained parameter's name -> where this rank's piece of it lies in ZeRO's flat tensors."""
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found: dict[str, _Fragment] = {}
        groups = zero.fp16_groups if self.stage == 3 else zero.bit16_groups
        flats = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        for group, flat in zip(groups, flats, strict=True):
            start = 0
            for parameter in group:
                if self.stage == 3:
                    size = len(_partition(parameter))
                    at = self.rank * size
                    count = max(0, min(size, parameter.ds_numel - at))
                    fragment = _Fragment(flat, start, count, at, parameter.ds_shape)
                    start += size
                elif (mapping := parameter._hp_mapping) is None:
                    fragment = _Fragment(flat, 0, 0, 0, parameter.shape)
                else:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    fragment = _Fragment(flat, here.start, here.numel, there.start, parameter.shape)
                found[names[id(parameter)]] = fragment
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Fragment:
    """``flat[start:start + count]`` is ``parameter.flatten()[at:at + count]``."""

    flat: Tensor
    start: int
    count: int
    at: int
    shape: torch.Size


def read_config(path: Path) -> dict[str, Any]:
    """The JSON file; UserError when it is none, or says what the settings say."""
    try:
        asked = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"no DeepSpeed configuration {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    zero = asked.get("zero_optimization") if isinstance(asked, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}")
    return asked


def complete_config(
    asked: Mapping[str, Any], path: Path, *, clip: float | None, world_size: int
) -> dict[str, Any]:
    """``asked`` with what our settings say; UserError naming the keys that say otherwise."""
    ours = {
        "gradient_clipping": clip or 0.0,  # silent, DeepSpeed would clip at 1.0
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    zero = {"stage3_param_persistence_threshold": 0}  # persistent ones would not be in pieces
    faults = []
    for key in asked.keys() & OURS.keys():
        if not _says_nothing(asked[key]) and asked[key] != ours.get(key):
            faults.append(f"{key} is {asked[key]!r}: {_advice(key, ours)}")
    for key, value in zero.items():
        if asked["zero_optimization"].get(key, value) != value:
            faults.append(f"zero_optimization.{key} must be {value}, or left out")
    if faults:
        raise UserError(f"{path} contradicts the settings\n{format_list(sorted(faults))}")
    rest = {key: value for key, value in asked.items() if key not in OURS}
    rest["zero_optimization"] = {**asked["zero_optimization"], **zero}
    return {"steps_per_print": None, **rest, **ours}


def _says_nothing(value: object) -> bool:
    return value == "auto" or (isinstance(value, dict) and value.get("enabled") is False)


def _advice(key: str, ours: Mapping[str, Any]) -> str:
    setting = f", and is set by {OURS[key]}" if OURS[key] else ""
    return (
        f"take it out; it is {ours[key]!r} here{setting}"
        if key in ours
        else (f"take it out{setting.replace(', and is', '; it is')}")
    )


@contextmanager
def _environment(device: torch.device) -> Iterator[None]:
    """Set the variables that DeepSpeed reads inside the block; restore all variables afterwards."""
    before = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # one process, not under torchrun
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # Its first use would compile for minutes, to add up small tensors faster on one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's own warnings are not the user's: it calls PyTorch by names that are going."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="deepspeed")
        warnings.filterwarnings("ignore", r"`torch\.distributed\S* is deprecated", FutureWarning)
        yield


def _is_partitioned(value: Tensor) -> bool:
    return hasattr(value, "ds_tensor")


def _partition(parameter: Any) -> Tensor:
    """This rank's piece: flat, and of the same length on every rank, so padded on the last."""
    return parameter.ds_tensor


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)
