"""Where training runs: one process, or many under DDP, FSDP2 or DeepSpeed, behind one face.
The only user of ``torch.distributed``."""

from __future__ import annotations

import os
from pathlib import Path

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


def allow_tf32(precision: str) -> None:
    """Let a GPU round the factors of float32 products to TF32, unless ``fp32`` is asked for."""
    kind = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = kind
    torch.backends.cudnn.conv.fp32_precision = kind  # pyright: ignore[reportAttributeAccessIssue]
