"""Runs in processes of their own: what trains many of them starts, resumes and keeps them alike."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.errors import UserError, format_list
from e2e.files import write_json

ROOT = Path(__file__).resolve().parents[2]


def start_or_resume(command: Sequence[str], folder: Path) -> list[str]:
    """What launch/train.py is told for the run in ``folder``: ``command``, or to go on where it stopped."""
    if (folder / "settings.yaml").is_file():
        return ["--resume", str(folder)]
    return [*command, f"run.out={folder}"]


def is_done(folder: Path) -> bool:
    """Whether the run in ``folder`` was trained and evaluated."""
    return (folder / "metrics.json").is_file()


def run_command(script: str, arguments: Sequence[str], log: Path, slot: str = "") -> int:
    """Run one of the project's commands to its end, its output at the end of ``log``; its exit code.

    Args:
        script: such as ``launch/train.py``.
        slot: GPU numbers that it may see, such as ``0,1`` (then with a process for each); empty:
            whatever the machine has, one process.
    """
    start, seen = [sys.executable], dict(os.environ)
    if slot:
        seen["CUDA_VISIBLE_DEVICES"] = slot
    if (ranks := len(slot.split(","))) > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, str(ROOT / script), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        return subprocess.run(command, stdout=file, stderr=file, env=seen, check=False).returncode


def write_plan(file: Path, ours: Mapping[str, Any], what: str) -> None:
    """Write down what the runs beside ``file`` are; UserError where it says that they are others."""
    if file.is_file():
        found = json.loads(file.read_bytes())
        differ = [
            f"{k}: {found.get(k)} there, {v} now" for k, v in ours.items() if found.get(k) != v
        ]
        if differ:
            raise UserError(
                f"{file.parent} holds another {what}\n{format_list(differ)}\n  choose another --out"
            )
    write_json(file, ours)
