"""The estimated peak memory of an update against the resident memory of real ones, on the CPU.

    python -m tools.bench.peak_memory

Each model trains for two updates on random data in a process of its own. Prints the estimate that a run
prints, the growth of the process's peak resident memory, and their ratio.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Sequence

import torch

import e2e
from e2e.engine.peak_memory import estimate_peak_memory
from e2e.sizes import show_bytes

CASES = (
    ("abmil", 50_000, 512, 0),
    ("abmilx", 20_000, 1024, 0),
    ("dsmil", 20_000, 512, 0),
    ("transmil", 20_000, 512, 0),
    ("e2e_r18_abmilx", 128, 224, 64),
    ("e2e_r50_abmilx", 64, 224, 64),
)
"""Model, patches in the bag, width of features or side of patches, patches in a chunk (0: features)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case in a process of its own, or the one given with ``--case`` in this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="measure this one only")
    args = parser.parse_args(argv)
    if args.case is not None:
        print(measure(*CASES[args.case]))
        return 0
    for number in range(len(CASES)):
        command = [sys.executable, "-m", "tools.bench.peak_memory", "--case", str(number)]
        subprocess.run(command, check=True)
    return 0


def measure(name: str, patches: int, width: int, chunk: int) -> str:
    """Return a line with estimate, measured peak and their ratio."""
    torch.set_num_threads(1)
    if chunk:
        model = e2e.create_model(name, 2, pretrained=False, chunk=chunk).train()
    else:
        model = e2e.create_model(name, 2, encoder={"dim": width}).train()
    estimate = estimate_peak_memory(
        model, side=width, patches=patches, largest_bag=patches, average=False
    ).total
    optimizer = torch.optim.AdamW(model.parameters())
    before = _peak_resident_memory()
    for _ in range(2):
        if chunk:
            bag = torch.randint(0, 256, (patches, 3, width, width), dtype=torch.uint8)
        else:
            bag = torch.randn(patches, width)
        model(bag).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = _peak_resident_memory() - before
    unit = "px" if chunk else "features"
    return (
        f"{name:15} {patches:6,} patches of {width:4} {unit:8}  estimate {show_bytes(estimate):>8}  "
        f"measured {show_bytes(measured):>8}  {estimate / measured:.2f}-fold"
    )


def _peak_resident_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
