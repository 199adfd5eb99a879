"""Memory and time of one forward and backward of a head."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import e2e.heads  # noqa: F401
from e2e.heads.base import HEADS, Head
from e2e.sizes import parse_bytes
from tools.bench.process import (
    call_in_fresh_process,
    process_memory,
    reset_peak_memory,
    synchronise,
)

STEPS = 3
"""Steps of which the median is reported."""


@dataclass(frozen=True)
class HeadStep:
    """A head and the bag on which its step is measured."""

    head: str
    options: dict[str, Any] = field(default_factory=dict)
    in_dim: int = 1024
    patches: int = 1000
    padding: float = 0.1
    """Fraction of the patches that is masked out."""
    kernel: str = "fused"
    """``fused``, or ``dense``: only kernels that write attention matrices out."""
    device: str = "cpu"
    bf16: bool = False
    """Whether to compute under bfloat16 autocast."""
    memory: str = "8GiB"
    """Memory limit; a step that needs more fails."""
    limit: float = 600.0
    """Seconds after which the process is stopped."""
    threads: int = 1


def measure(step: HeadStep) -> dict[str, Any]:
    """Return :func:`step_costs` as measured by a process of its own.

    ``failed`` is the limit that was exceeded, if one was.
    """
    try:
        return call_in_fresh_process(
            step_costs,
            dataclasses.asdict(step),
            label=f"{step.head}, {step.patches} patches, {step.kernel}",
            threads=step.threads,
            timeout=step.limit,
        )
    except subprocess.TimeoutExpired:
        return {
            "head": step.head,
            "kernel": step.kernel,
            "patches": step.patches,
            "failed": f"over {step.limit:g} s",
        }


def step_costs(**fields: Any) -> dict[str, Any]:
    """Return parameters, peak MiB above the memory before the forward, and seconds of a step.

    Parameters
    ----------
    **fields
        Fields of a :class:`HeadStep`.
    """
    step = HeadStep(**fields)
    torch.manual_seed(0)
    n, device = step.patches, step.device
    head = HEADS.build(step.head, step.in_dim, 2, **step.options).to(device)
    description: dict[str, Any] = {
        "head": step.head,
        "options": step.options,
        "kernel": step.kernel,
        "patches": n,
        "in_dim": step.in_dim,
        "padding": step.padding,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast" if step.bf16 else "float32",
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
    }
    mask = (torch.arange(n) < n * (1 - step.padding)).unsqueeze(0).to(device)
    features = torch.randn(1, n, step.in_dim, device=device)
    # Libraries load on first use.
    forward_backward(head, features[:, :8], torch.ones_like(mask[:, :8]), step)
    head.zero_grad(set_to_none=True)
    features.requires_grad_()
    limit_memory(parse_bytes(step.memory), device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        reset_peak_memory()
        before = process_memory()["VmRSS"]
    try:
        seconds = [timed_step(head, features, mask, step)]
    except RuntimeError as error:  # a GPU's OutOfMemoryError is one
        if "memory" not in str(error):
            raise
        return description | {"failed": f"over {step.memory}"}
    on_gpu = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else process_memory()["VmHWM"]
    while len(seconds) < STEPS and sum(seconds) < step.limit / 10:
        seconds.append(timed_step(head, features, mask, step))
    costs = {
        "peak_mib": round((peak - before) / 2**20, 1),
        "seconds": round(statistics.median(seconds), 4),
    }
    return description | costs


def timed_step(head: Head, features: torch.Tensor, mask: torch.Tensor, step: HeadStep) -> float:
    """Return the seconds of a step without earlier gradients; CPU seconds on one CPU thread."""
    head.zero_grad(set_to_none=True)
    features.grad = None
    on_one_thread = step.device == "cpu" and step.threads == 1
    clock = time.process_time if on_one_thread else time.perf_counter
    start = clock()
    forward_backward(head, features, mask, step)
    synchronise(features.device)
    return clock() - start


def forward_backward(
    head: Head, features: torch.Tensor, mask: torch.Tensor, step: HeadStep
) -> None:
    """Compute one forward and backward of the whole loss, with the head's auxiliary loss.

    Parameters
    ----------
    features
        (1,N,D).
    mask
        (1,N) bool.
    """
    kernel = sdpa_kernel(SDPBackend.MATH) if step.kernel == "dense" else nullcontext()
    target = torch.zeros(1, dtype=torch.long, device=features.device)
    with kernel:
        with torch.autocast(step.device, dtype=torch.bfloat16, enabled=step.bf16):
            output = head(features, mask)
        loss = loss_per_bag(output.logits, target).mean()
        aux_loss = head.aux_loss(output, target, loss_per_bag)
        (loss if aux_loss is None else loss + aux_loss).backward()


def loss_per_bag(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (B,) cross entropies."""
    return cross_entropy(logits.float(), target, reduction="none")


def limit_memory(size: int, device: str) -> None:
    """Let allocations of more than ``size`` bytes beyond the present memory fail."""
    if device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        share = (torch.cuda.memory_reserved() + size) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    else:
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        limits = (process_memory()["VmSize"] + size, hard_limit)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def describe_costs(costs: dict[str, Any]) -> str:
    """Return ``0.12 s, 340 MiB``, or the limit that was exceeded."""
    if "failed" in costs:
        return costs["failed"]
    return f"{costs['seconds']:.3g} s, {costs['peak_mib']:,.0f} MiB"
