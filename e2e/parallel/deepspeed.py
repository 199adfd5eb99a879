"""DeepSpeed: ZeRO stages 0 to 3 from a JSON file; clipping, schedule and precision stay with the settings."""

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
from torch import Tensor, nn

from e2e.errors import UserError, format_list, optional_import
from e2e.parallel.base import STEP, MakeOptimizer, Tensors, make_parameters_contiguous
from e2e.parallel.ddp import DistributedStrategy

SETTING_OF_KEY = {
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
"""Keys of the JSON that this program writes itself -> the setting that controls the value, if any."""


class DeepSpeed(DistributedStrategy):
    """DeepSpeed ZeRO: each rank holds a shard of the optimiser's state (stage 1), gradients (2), weights (3).

    Weights are float32. At stage 3 all weights are gathered once before the forward and released in
    :meth:`step`, not module by module: ranks with different numbers of chunks would hang otherwise.

    Parameters
    ----------
    device
        The device of this process.
    config
        DeepSpeed's JSON file; see configs/deepspeed/.
    timeout
        Seconds after which a rank that does not answer counts as lost.

    Raises
    ------
    UserError
        The file cannot be read; in :meth:`setup`: it contradicts the settings, or weights are not float32.
    """

    def __init__(self, device: torch.device, config: Path, *, timeout: float = 1800) -> None:
        self._config_path = config
        self._config = read_config(config)
        self._engine: Any = None
        self._restore = ExitStack()
        super().__init__(device, timeout=timeout)

    def _wrap(self, make_optimizer: MakeOptimizer) -> None:
        others = [n for n, p in self.model.named_parameters() if p.dtype != torch.float32]
        if others:
            raise UserError(
                f"engine.strategy=deepspeed needs float32 weights; these are not\n{format_list(others)}"
            )
        make_parameters_contiguous(self.model)
        config = complete_config(
            self._config, self._config_path, clip=self.clip, world_size=self.world_size
        )
        self.optimizer = make_optimizer(self.model)
        # ZeRO makes one flat tensor of each group, and fails on an empty one.
        groups = self.optimizer.param_groups
        groups[:] = [group for group in groups if group["params"]]
        with _deepspeed_environment(self.device), _quiet():
            deepspeed = _import_deepspeed()
            logger = logging.getLogger("DeepSpeed")
            self._restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            deepspeed.init_distributed(verbose=False)
            self._engine = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=config
            )[0]
        for group in list(
            dist.distributed_c10d._world.pg_map
        ):  # those of DeepSpeed have the default timeout
            dist.set_timeout(self.timeout, group)
        self.stage: int = self._engine.zero_optimization_stage()
        if self.stage == 3:
            self._engine.optimizer.parameter_offload._remove_module_hooks()
            self.model.register_forward_pre_hook(lambda *_: self._all_gather())
        self.module = self._engine

    def close(self) -> None:
        """See :meth:`Strategy.close`."""
        self._restore.close()
        super().close()

    def _backward(self, loss: Tensor) -> None:
        with _quiet():
            self._engine.backward(loss * self.world_size)

    def step(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Strategy.step`."""
        if self.stage == 0:
            return super().step()
        with _quiet():
            self._engine.step()
        # ZeRO finds a gradient that is not finite on any rank, and leaves the weights alone.
        good = not self._engine.optimizer.overflow
        norm = self._engine.get_global_grad_norm() if good else torch.nan
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        return norm, torch.tensor(good, device=self.device)

    def _update_weights(self, good: Tensor) -> None:
        if bool(good):
            self.optimizer.step()

    # Weights: complete on each rank, except at stage 3

    def _shard_of(self, value: Tensor) -> Tensor:
        return _partition(value).detach() if _is_partitioned(value) else super()._shard_of(value)

    def full_tensors(self, shards: Mapping[str, Tensor]) -> Tensors:
        """See :meth:`Strategy.full_tensors`."""
        live = self.model.state_dict(keep_vars=True)
        tensors: Tensors = {}
        for name, shard in shards.items():
            full = shard
            like: Any = live[name]
            if _is_partitioned(like):
                start = self.rank * len(shard)
                count = max(0, min(len(shard), like.ds_numel - start))
                full = self._assemble(shard[:count], start, like.ds_shape)
            if self.is_leader:
                tensors[name] = full.detach().to("cpu", copy=True)
        return tensors

    def _assemble(self, shard: Tensor, start: int, shape: torch.Size) -> Tensor:
        """Return the full tensor; ``shard`` is this rank's part of its flat form, from ``start`` on."""
        full = torch.zeros(shape, dtype=shard.dtype, device=self.device)
        full.view(-1)[start : start + len(shard)] = shard
        dist.all_reduce(full)
        return full

    def _cut_shard(self, like: Tensor, value: Tensor) -> Tensor:
        if not _is_partitioned(like):
            return super()._cut_shard(like, value)
        shard = torch.zeros_like(_partition(like))
        values = value.flatten()[self.rank * len(shard) : (self.rank + 1) * len(shard)]
        shard[: len(values)] = values
        return shard

    def load(self, full: Mapping[str, Tensor]) -> None:
        """See :meth:`Strategy.load`; ZeRO's own copies of the weights follow."""
        super().load(full)
        if self._engine is not None and self.stage > 0:
            self._engine.optimizer.refresh_fp32_params()

    def average_into(
        self, teacher: nn.Module, student: nn.Module, decay: float, *, good: Tensor | None = None
    ) -> None:
        """See :meth:`Strategy.average_into`."""
        super().average_into(teacher, student, decay, good=good)
        for parameter in teacher.parameters():
            if _is_partitioned(parameter):  # a gathered copy would be out of date
                _release(parameter)

    @contextmanager
    def _gather_parameters(self) -> Iterator[None]:
        self._all_gather()
        try:
            yield
        finally:
            for parameter in self._partitioned():
                _release(parameter)

    def _all_gather(self) -> None:
        parameters = self._partitioned()
        if parameters and "NOT_AVAILABLE" in str(parameters[0].ds_status):
            with _quiet():
                parameters[0].all_gather(parameters)

    def _partitioned(self) -> list[Any]:
        return [p for p in self.model.parameters() if _is_partitioned(p)]

    # The optimiser's state: in flat shards, except at stage 0

    def optimizer_tensors(self) -> Tensors:
        """See :meth:`Strategy.optimizer_tensors`."""
        if self.stage == 0:
            return super().optimizer_tensors()
        tensors: Tensors = {}
        fragments = self._fragments()
        slots = {slot for f in fragments.values() for slot in self.optimizer.state[f.flat]}
        for slot in sorted({slot for part in self.gather_objects(slots) for slot in part}):
            for name, fragment in fragments.items():
                value = self.optimizer.state[fragment.flat].get(slot)
                if slot == STEP:
                    full = torch.as_tensor(value, dtype=torch.float32)
                else:
                    flat = fragment.flat if value is None else value
                    shard = flat[fragment.start : fragment.start + fragment.count]
                    full = self._assemble(shard, fragment.offset, fragment.shape)
                if self.is_leader:
                    tensors[f"{name}.{slot}"] = full.detach().to("cpu", copy=True)
        return tensors

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Strategy.load_optimizer`."""
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
            values = value.flatten()[fragment.offset : fragment.offset + fragment.count]
            flat[fragment.start : fragment.start + fragment.count] = values.to(flat.device)

    def _fragments(self) -> dict[str, _Fragment]:
        """Trained parameter's name -> where this rank's piece of it lies in ZeRO's flat tensors."""
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        fragments: dict[str, _Fragment] = {}
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
                    offset = self.rank * size
                    count = max(0, min(size, parameter.ds_numel - offset))
                    fragment = _Fragment(flat, start, count, offset, parameter.ds_shape)
                    start += size
                elif (mapping := parameter._hp_mapping) is None:
                    fragment = _Fragment(flat, 0, 0, 0, parameter.shape)
                else:
                    in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                    fragment = _Fragment(
                        flat, in_flat.start, in_flat.numel, in_parameter.start, parameter.shape
                    )
                fragments[names[id(parameter)]] = fragment
        return dict(sorted(fragments.items()))


@dataclass(frozen=True)
class _Fragment:
    """``flat[start:start + count]`` is ``parameter.flatten()[offset:offset + count]``."""

    flat: Tensor
    start: int
    count: int
    offset: int
    shape: torch.Size


def read_config(path: Path) -> dict[str, Any]:
    """Read DeepSpeed's JSON file.

    Parameters
    ----------
    path
        The file, such as configs/deepspeed/zero2.json.

    Returns
    -------
    dict
        Its content.

    Raises
    ------
    UserError
        There is no such file, it is not JSON, or it has no valid ZeRO stage.
    """
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read DeepSpeed's configuration {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}")
    return config


def complete_config(
    config: Mapping[str, Any], path: Path, *, clip: float | None, world_size: int
) -> dict[str, Any]:
    """Complete DeepSpeed's configuration with the values that the settings control.

    Parameters
    ----------
    config
        Content of the JSON file.
    path
        The file, for messages.
    clip
        Largest joint L2 norm of the gradients; None for no limit.
    world_size
        Number of ranks.

    Raises
    ------
    UserError
        The file contradicts the settings; lists the keys.
    """
    from_settings = {
        "gradient_clipping": clip or 0.0,  # if it is missing, DeepSpeed clips at 1.0
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    zero = {"stage3_param_persistence_threshold": 0}  # persistent parameters would not be sharded
    conflicts = []
    for key in config.keys() & SETTING_OF_KEY.keys():
        if not _is_auto_or_disabled(config[key]) and config[key] != from_settings.get(key):
            conflicts.append(f"{key} is {config[key]!r}: {_advice(key, from_settings)}")
    for key, value in zero.items():
        if config["zero_optimization"].get(key, value) != value:
            conflicts.append(f"zero_optimization.{key} must be {value} or missing")
    if conflicts:
        raise UserError(f"{path} contradicts the settings\n{format_list(sorted(conflicts))}")
    rest = {key: value for key, value in config.items() if key not in SETTING_OF_KEY}
    rest["zero_optimization"] = {**config["zero_optimization"], **zero}
    return {"steps_per_print": None, **rest, **from_settings}


def _is_auto_or_disabled(value: object) -> bool:
    return value == "auto" or (isinstance(value, dict) and value.get("enabled") is False)


def _advice(key: str, from_settings: Mapping[str, Any]) -> str:
    setting = SETTING_OF_KEY[key]
    if key not in from_settings:
        return f"remove it; use {setting}" if setting else "remove it"
    value = f"this run uses {from_settings[key]!r}"
    return f"remove it; {value}, set by {setting}" if setting else f"remove it; {value}"


@contextmanager
def _deepspeed_environment(device: torch.device) -> Iterator[None]:
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
    with optional_import("deepspeed", use="engine.strategy=deepspeed"):
        import deepspeed
        import deepspeed.ops

    # Its first use would compile for minutes, only to sum small tensors faster on one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings that DeepSpeed causes itself: it calls deprecated functions of PyTorch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="deepspeed")
        warnings.filterwarnings("ignore", r"`torch\.distributed\S* is deprecated", FutureWarning)
        yield


def _is_partitioned(value: Tensor) -> bool:
    return hasattr(value, "ds_tensor")


def _partition(parameter: Any) -> Tensor:
    """This rank's shard: flat and of the same length on every rank, so padded on the last."""
    return parameter.ds_tensor


def _release(parameter: Any) -> None:
    """Free the gathered tensor, if there is one; the shard stays."""
    parameter.partition()


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)
