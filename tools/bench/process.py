"""Measurements in a fresh interpreter, and the memory of a process.

``python tools/bench/process.py MODULE:FUNCTION JSON THREADS`` calls a function and prints its result as
JSON; :func:`call_in_fresh_process` starts it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from e2e.errors import UserError, exit_code

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


def call_in_fresh_process(
    function: Callable[..., dict[str, Any]],
    arguments: Mapping[str, Any],
    *,
    label: str,
    threads: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Return ``function(**arguments)`` as computed by an interpreter of its own.

    Parameters
    ----------
    function
        A function of an importable module.
    arguments
        Values that JSON can hold.
    label
        Names the measurement in an error message.
    threads
        CPU threads of PyTorch.
    environment
        Variables set for the process, besides those of this one.
    timeout
        Seconds after which the process is stopped.

    Raises
    ------
    UserError
        The process failed; the message holds its output.
    subprocess.TimeoutExpired
        It took longer than ``timeout``.
    """
    name = f"{function.__module__}:{function.__name__}"
    command = [sys.executable, __file__, name, json.dumps(dict(arguments)), str(threads)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (environment or {}),
    )
    if done.returncode:
        raise UserError(f"{label}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def process_memory() -> dict[str, int]:
    """Return the memory of this process in bytes, by the names of Linux: VmRSS, VmHWM, RssFile, ..."""
    if not STATUS.is_file():
        raise UserError(f"there is no {STATUS}: memory of the host is measured on Linux only")
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {
        words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0].startswith(("Vm", "Rss"))
    }


def reset_peak_memory() -> None:
    """Let VmHWM, the peak of :func:`process_memory`, start again from the present memory."""
    RESET_PEAK.write_text("5")


def peak_above(before: Mapping[str, int]) -> int:
    """Return the peak bytes since ``before`` was measured and the peak reset, without file pages.

    Pages of a store's file belong to the page cache.
    """
    after = process_memory()
    return (after["VmHWM"] - before["VmRSS"]) - (after["RssFile"] - before["RssFile"])


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Call the function that the command line names and print its result."""
    name, arguments, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    module, function = name.split(":")
    print(json.dumps(getattr(import_module(module), function)(**json.loads(arguments))))


if __name__ == "__main__":
    sys.exit(exit_code(main))
