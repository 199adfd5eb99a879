"""Where training runs: one process, or many under DDP, FSDP2 or DeepSpeed, behind one face.
The only user of ``torch.distributed``."""

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
TIMEOUT = 1800.0
"""Seconds; longer than any rank computes between two collectives."""


def pick_device(name: str) -> torch.device:
    """``auto``: this process's GPU when there is one, else the CPU; UserError where it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"the device '{name}' is not to be had here\n  choose auto, cpu or cuda")
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
    """The strategy called ``name``.

    Args:
        name: ``auto``: DDP under ``torchrun`` with more than one process, else a single process.
        deepspeed: JSON file of ``deepspeed``, such as configs/deepspeed/zero2.json.
        timeout: seconds after which a rank that does not answer is taken for lost.
    """
    if name == "fsdp":
        from e2e.parallel.fsdp import FSDP2

        return FSDP2(device, timeout=timeout)
    if name == "deepspeed":
        from e2e.parallel.deepspeed import DeepSpeed

        if deepspeed is None:
            raise UserError(
                "DeepSpeed needs its configuration file, such as configs/deepspeed/zero2.json"
            )
        return DeepSpeed(device, deepspeed, timeout=timeout)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return DDP(device, timeout=timeout)
    return Strategy(device)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """``auto``: bfloat16 on a GPU that has it, else none; ``bf16``, ``tf32`` and ``fp32`` as they say."""
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
