"""Memory and time of one forward and backward of a head, against the number of patches.

tools/bench_heads.py
tools/bench_heads.py --head abmilx --patches 1000 5000 20000 --dense-up-to 5000
tools/bench_heads.py --head abmil --patches 100000 --device cuda --options embed_dim=256

Each figure comes from a process of its own: the most memory it held, less what it held before the
forward. "dense" allows only the kernels that write attention matrices out. One JSON line a figure,
then a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import subprocess
import time
from contextlib import nullcontext
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import e2e.heads  # noqa: F401
from e2e.errors import UserError, exit_code
from e2e.heads.base import HEADS, Head

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", default="abmilx")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--in-dim", type=int, default=1024)
    parser.add_argument("--patches", type=int, nargs="+", default=[1000, 5000, 20000])
    parser.add_argument("--padding", type=float, default=0.1, help="share of patches masked out")
    parser.add_argument("--dense-up-to", type=int, default=5000, help="largest N run dense as well")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--one", choices=("fused", "dense"), help="measure here, print JSON")
    return parser.parse_args(argv)


def options(pairs: list[str]) -> dict[str, Any]:
    """``["heads=4"]`` -> ``{"heads": 4}``; UserError when there is no ``=``."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--options wants KEY=VALUE, found '{pair}'")
    split = (pair.split("=", 1) for pair in pairs)
    return {key: yaml.safe_load(value) for key, value in split}


def host_memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, or ``VmHWM`` at most since the last reset."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"{STATUS} has no {field}; memory on the host is measured on Linux alone")


def step(head: Head, features: torch.Tensor, mask: torch.Tensor, args: argparse.Namespace) -> None:
    """One forward and backward."""
    kernel = sdpa_kernel(SDPBackend.MATH) if args.one == "dense" else nullcontext()
    with kernel:
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            logits = head(features, mask).logits
        logits.float().sum().backward()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes above the start, and seconds, of one step on one bag."""
    torch.manual_seed(0)
    n, device = args.patches[0], args.device
    head = HEADS.build(args.head, args.in_dim, 2, **options(args.options)).to(device)
    mask = (torch.arange(n) < n * (1 - args.padding)).unsqueeze(0).to(device)
    features = torch.randn(1, n, args.in_dim, device=device)
    step(head, features[:, :8], torch.ones_like(mask[:, :8]), args)  # libraries load on first use
    head.zero_grad(set_to_none=True)
    features.requires_grad_()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        RESET_PEAK.write_text("5")
        before = host_memory("VmRSS")
    start = time.perf_counter()
    step(head, features, mask, args)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else host_memory("VmHWM")
    return {
        "head": args.head,
        "options": options(args.options),
        "kernel": args.one,
        "patches": n,
        "in_dim": args.in_dim,
        "padding": args.padding,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast" if args.bf16 else "float32",
        "peak_mib": round((peak - before) / 2**20, 1),
        "seconds": round(seconds, 3),
    }


def in_own_process(args: argparse.Namespace, n: int, kernel: str) -> dict[str, Any]:
    """``measure`` in a fresh interpreter."""
    command = [sys.executable, __file__, "--one", kernel, "--head", args.head]
    command += ["--patches", str(n), "--in-dim", str(args.in_dim), "--device", args.device]
    command += ["--padding", str(args.padding), *(["--bf16"] if args.bf16 else [])]
    command += ["--options", *args.options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{n} patches, {kernel}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    """Measure every size, print as it goes, then the table."""
    args = parse()
    if args.one:
        print(json.dumps(measure(args)))
        return
    table = Table("patches", "kernel", "peak above start (MiB)", "seconds")
    for n in args.patches:
        for kernel in ("fused", "dense"):
            if kernel == "dense" and n > args.dense_up_to:
                continue
            found = in_own_process(args, n, kernel)
            print(json.dumps(found), flush=True)
            table.add_row(f"{n:,}", kernel, f"{found['peak_mib']:,}", f"{found['seconds']:,}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(exit_code(main))
