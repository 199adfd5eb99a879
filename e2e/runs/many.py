"""Runs in processes of their own: what trains many of them starts, resumes and keeps them alike."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.errors import UserError, format_list
from e2e.files import write_json
from e2e.runs.processes import child_environment, command_line


def start_or_resume(command: Sequence[str], folder: Path) -> list[str]:
    """The arguments of ``e2e train`` for the run in ``folder``: ``command``, or to go on where it stopped."""
    if (folder / "settings.yaml").is_file():
        return ["--resume", str(folder)]
    return [*command, f"run.out={folder}"]


def is_done(folder: Path) -> bool:
    """Whether the run in ``folder`` was trained and evaluated."""
    return (folder / "metrics.json").is_file()


def run_command(command: str, arguments: Sequence[str], log: Path, slot: str = "") -> int:
    """Run ``e2e <command>`` to its end and return its exit code.

    Parameters
    ----------
    command : str
        Such as ``train``.
    arguments : sequence of str
        Its arguments.
    log : Path
        File to which the output is appended.
    slot : str
        GPU numbers that it may use, such as ``0,1``, with a process for each; empty: whatever the machine
        has, one process.
    """
    changes = {"CUDA_VISIBLE_DEVICES": slot} if slot else {}
    num_ranks = len(slot.split(","))
    ranks = [f"--gpus={num_ranks}"] if num_ranks > 1 else []
    words = command_line(command, [*arguments, *ranks])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        print(f"$ {shlex.join(words)}", file=file, flush=True)
        environment = child_environment(changes)
        done = subprocess.run(words, stdout=file, stderr=file, env=environment, check=False)
    return done.returncode


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
