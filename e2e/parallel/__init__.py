"""Where training runs: one process, or several under DDP, FSDP2 or DeepSpeed, behind one interface.

This package is the only user of ``torch.distributed``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from e2e.errors import UserError
from e2e.parallel.base import MakeOptimizer as MakeOptimizer
from e2e.parallel.base import Strategy as Strategy
from e2e.parallel.ddp import DDP as DDP

STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")
"""Values of the setting ``engine.strategy``."""
TIMEOUT = 1800.0
"""Seconds; longer than any rank computes between two collectives."""


def pick_device(name: str) -> torch.device:
    """Return the device of this process.

    Parameters
    ----------
    name
        ``cpu``; ``cuda`` (under ``torchrun`` the GPU numbered ``LOCAL_RANK``) or ``cuda:N``; or ``auto``:
        ``cuda`` if PyTorch sees a GPU, otherwise ``cpu``.

    Returns
    -------
    torch.device
        A CUDA device is also made the current one.

    Raises
    ------
    UserError
        The name is unknown, or PyTorch sees no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"engine.device={name}: unknown device\n  Use auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"engine.device={name}: PyTorch sees no CUDA device (torch.cuda.is_available() is False).\n"
            "  Use engine.device=cpu, or check the driver and CUDA_VISIBLE_DEVICES."
        )
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    return device


def build_strategy(
    device: torch.device,
    name: str = "auto",
    *,
    deepspeed: Path | None = None,
    timeout: float = TIMEOUT,
) -> Strategy:
    """Build a strategy by its name.

    Parameters
    ----------
    device
        The device of this process; see :func:`pick_device`.
    name
        One of :data:`STRATEGIES`. ``auto`` and ``ddp`` give DDP if ``WORLD_SIZE`` is above 1 (as
        ``torchrun`` sets it), otherwise a single process.
    deepspeed
        Path of DeepSpeed's JSON file, such as configs/deepspeed/zero2.json.
    timeout
        Seconds after which a rank that does not answer counts as lost.

    Returns
    -------
    Strategy
        Not set up yet; see :meth:`Strategy.setup`.

    Raises
    ------
    UserError
        DeepSpeed was requested without its configuration file.
    """
    if name == "fsdp":
        from e2e.parallel.fsdp import FSDP2

        return FSDP2(device, timeout=timeout)
    if name == "deepspeed":
        from e2e.parallel.deepspeed import DeepSpeed

        if deepspeed is None:
            raise UserError(
                "engine.strategy=deepspeed needs DeepSpeed's configuration file\n"
                "  Set engine.deepspeed=configs/deepspeed/zero2.json."
            )
        return DeepSpeed(device, deepspeed, timeout=timeout)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return DDP(device, timeout=timeout)
    return Strategy(device)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast, or None for float32.

    Parameters
    ----------
    precision
        ``bf16``: bfloat16. ``auto``: bfloat16 on a GPU that supports it. ``tf32`` or ``fp32``: None.
    device
        Where the model runs.
    """
    if precision == "bf16":
        return torch.bfloat16
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "auto" and has_bf16 else None


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Let a GPU use TF32 for float32 products inside the block, unless ``precision`` is ``fp32``.

    PyTorch has two interfaces to this (``allow_tf32`` and ``fp32_precision``) and raises an error where
    they disagree, for example in ``torch.export``. Both are set inside the block and restored after it.
    On the CPU, products are computed in full float32.

    Parameters
    ----------
    precision
        The setting ``engine.precision``.
    """
    backends: Any = torch.backends
    on_gpu = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    operations = (*on_gpu, backends.mkldnn.matmul)
    before = [operation.fp32_precision for operation in operations]
    for operation in operations:  # where the two disagree, PyTorch refuses to read the older one
        operation.fp32_precision = "ieee"
    matmul_before = torch.get_float32_matmul_precision()
    use_tf32 = precision != "fp32"
    try:
        backends.cuda.matmul.allow_tf32 = use_tf32
        backends.cudnn.allow_tf32 = use_tf32
        for operation in on_gpu:
            operation.fp32_precision = "tf32" if use_tf32 else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(matmul_before)
        backends.cudnn.allow_tf32 = before[1] == "tf32"
        for operation, value in zip(operations, before, strict=True):
            operation.fp32_precision = value
