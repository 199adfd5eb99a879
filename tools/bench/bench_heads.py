"""Memory and time of one forward and backward of a head, against the number of patches.

  tools/bench/bench_heads.py
  tools/bench/bench_heads.py --head abmilx --patches 1000 5000 20000 --dense-up-to 5000
  tools/bench/bench_heads.py --head abmil --patches 100000 --device cuda --options embed_dim=256
  tools/bench/bench_heads.py --table  # every head at 1,000, 10,000 and 50,000 patches
  tools/bench/bench_heads.py --table abmil dsmil --in-dim 512 --patches 2000 --memory 4GiB
  tools/bench/bench_heads.py --check  # all that training on features must show; exit 1 if short

Each figure comes from a process of its own: the most memory it held, less what it held before the
forward. "dense" allows only the kernels that write attention matrices out. The loss has what the head
adds to it. One JSON line a figure, then a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import resource
import statistics
import subprocess
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import e2e.heads  # noqa: F401
from e2e.errors import UserError, exit_code
from e2e.heads.base import HEADS, Head
from e2e.sizes import parse_bytes

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")
SIZES = (1000, 10_000, 50_000)
"""Patches of the table: a biopsy, a section, a large section cut finely."""
STEPS = 3
"""Of which the median is timed."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", default="abmilx")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--in-dim", type=int, default=1024)
    parser.add_argument("--patches", type=int, nargs="+")
    parser.add_argument("--padding", type=float, default=0.1, help="share of patches masked out")
    parser.add_argument("--dense-up-to", type=int, default=5000, help="largest N run dense as well")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--memory", default="8GiB", help="no figure may need more")
    parser.add_argument("--limit", type=float, default=600, help="nor more seconds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--table", nargs="*", metavar="HEAD", help="every head, or these")
    parser.add_argument("--one", choices=("fused", "dense"), help="measure here, print JSON")
    parser.add_argument("--check", action="store_true", help="every figure that must hold")
    parser.add_argument("--rows", nargs="*", help="--check: only these rows")
    parser.add_argument("--bags", type=int, default=1000, help="--check: bags of an epoch")
    parser.add_argument("--updates", type=int, help="--check: only so many of the epoch's updates")
    parser.add_argument("--turn", type=int, default=2, help="--check: updates timed at a time")
    args = parser.parse_args(argv)
    args.patches = args.patches or list(
        SIZES if args.check or args.table is not None else (1000, 5000, 20_000)
    )
    return args


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
    """One forward and backward, of all that the head trains by."""
    kernel = sdpa_kernel(SDPBackend.MATH) if args.one == "dense" else nullcontext()
    target = torch.zeros(1, dtype=torch.long, device=features.device)
    with kernel:
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            output = head(features, mask)
        loss, own = by_bag(output.logits, target).mean(), head.aux_loss(output, target, by_bag)
        (loss if own is None else loss + own).backward()


def by_bag(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B,) losses of classification."""
    return cross_entropy(logits.float(), target, reduction="none")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes above the start, and seconds, of one step on one bag; or why there are none."""
    torch.manual_seed(0)
    n, device = args.patches[0], args.device
    head = HEADS.build(args.head, args.in_dim, 2, **options(args.options)).to(device)
    found: dict[str, Any] = {
        "head": args.head,
        "options": options(args.options),
        "kernel": args.one,
        "patches": n,
        "in_dim": args.in_dim,
        "padding": args.padding,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast" if args.bf16 else "float32",
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
    }
    mask = (torch.arange(n) < n * (1 - args.padding)).unsqueeze(0).to(device)
    features = torch.randn(1, n, args.in_dim, device=device)
    step(head, features[:, :8], torch.ones_like(mask[:, :8]), args)  # libraries load on first use
    head.zero_grad(set_to_none=True)
    features.requires_grad_()
    allow_more(parse_bytes(args.memory), device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        RESET_PEAK.write_text("5")
        before = host_memory("VmRSS")
    try:
        seconds = [timed_step(head, features, mask, args)]
    except RuntimeError as error:  # a GPU's OutOfMemoryError is one
        if "memory" not in str(error):
            raise
        return found | {"failed": f"over {args.memory}"}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else host_memory("VmHWM")
    while len(seconds) < STEPS and sum(seconds) < args.limit / 10:
        seconds.append(timed_step(head, features, mask, args))
    wall = statistics.median(seconds)
    return found | {"peak_mib": round((peak - before) / 2**20, 1), "seconds": round(wall, 4)}


def timed_step(head: Head, features: torch.Tensor, mask: torch.Tensor, args: Any) -> float:
    """Seconds of a step whose gradients are new; processor seconds where one thread does it all."""
    head.zero_grad(set_to_none=True)
    features.grad = None
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    start = clock()
    step(head, features, mask, args)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def allow_more(size: int, device: str) -> None:
    """Whatever asks for more than ``size`` bytes beyond what there is now fails."""
    if device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        share = (torch.cuda.memory_reserved() + size) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    else:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (host_memory("VmSize") + size, most))


def in_own_process(args: argparse.Namespace, head: str, n: int, kernel: str) -> dict[str, Any]:
    """``measure`` in a fresh interpreter; ``failed`` says why there is no figure."""
    command = [sys.executable, __file__, "--one", kernel, "--head", head]
    for name in ("in_dim", "device", "padding", "memory", "limit", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--patches", str(n), *(["--bf16"] if args.bf16 else [])]
    command += ["--options", *args.options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        said = {"head": head, "kernel": kernel, "patches": n}
        return said | {"failed": f"over {args.limit:g} s"}
    if done.returncode:
        raise UserError(
            f"{head}, {n} patches, {kernel}: exit code {done.returncode}\n{done.stderr}"
        )
    return json.loads(done.stdout)


def figures(args: argparse.Namespace, heads: Iterable[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """Head -> patches -> its figures, printed as they come."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for head in heads:
        for n in args.patches:
            line = in_own_process(args, head, n, "fused")
            print(json.dumps(line), flush=True)
            found.setdefault(head, {})[n] = line
    return found


def shown(line: dict[str, Any]) -> str:
    """``0.12 s, 340 MiB``, or why not."""
    if "failed" in line:
        return line["failed"]
    return f"{line['seconds']:.3g} s, {line['peak_mib']:,.0f} MiB"


def show_table(args: argparse.Namespace) -> None:
    """A line a head."""
    found = figures(args, args.table or HEADS.names())
    table = Table("head", "parameters", *(f"N = {n:,}" for n in args.patches), box=box.MARKDOWN)
    for head, lines in found.items():
        counts = {line["parameters"] for line in lines.values() if "parameters" in line}
        count = f"{counts.pop():,}" if counts else "-"
        table.add_row(head, count, *(shown(lines[n]) for n in args.patches))
    Console(width=160).print(table)


def show_kernels(args: argparse.Namespace) -> None:
    """One head, fused against dense."""
    table = Table("patches", "kernel", "peak above start (MiB)", "seconds")
    for n in args.patches:
        for kernel in ("fused", "dense"):
            if kernel == "dense" and n > args.dense_up_to:
                continue
            found = in_own_process(args, args.head, n, kernel)
            print(json.dumps(found), flush=True)
            peak, seconds = (found.get(key, found.get("failed")) for key in ("peak_mib", "seconds"))
            table.add_row(f"{n:,}", kernel, f"{peak}", f"{seconds}")
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Check, or measure every size, print as it goes, then the table."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args)))
    elif args.check:
        from check_heads import check

        return check(args.rows, args)
    elif args.table is not None:
        show_table(args)
    else:
        show_kernels(args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
