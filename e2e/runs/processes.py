"""The commands of this package in processes of their own, one or one a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from e2e.errors import UserError

PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def command_line(command: str, arguments: Sequence[str]) -> list[str]:
    """Return what starts ``e2e <command>`` with the interpreter of this process."""
    return [sys.executable, "-m", "e2e", command, *arguments]


def child_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a child process: this one's, where Python finds this very package.

    Parameters
    ----------
    changes : mapping, optional
        Variables to set.
    """
    paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(changes or {})}


def needs_ranks(num_ranks: int | None, *, on_cpu: bool) -> bool:
    """Return whether this process has to start ranks, as ``--gpus N`` asks.

    Parameters
    ----------
    num_ranks : int or None
        Value of ``--gpus``.
    on_cpu : bool
        Whether the settings name the CPU as the device.

    Raises
    ------
    UserError
        The machine has fewer GPUs, or this process is a rank of another number of them already.
    """
    if num_ranks is None:
        return False
    world_size = os.environ.get("WORLD_SIZE")
    if world_size is not None:
        if int(world_size) != num_ranks:
            raise UserError(
                f"--gpus {num_ranks}: torchrun has started {world_size} processes already\n"
                "  leave --gpus out, or start the command without torchrun"
            )
        return False
    if on_cpu:
        return num_ranks > 1
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise UserError(
            f"--gpus {num_ranks}: PyTorch sees no CUDA device (torch.cuda.device_count() is 0)\n"
            "  check the driver and CUDA_VISIBLE_DEVICES; for processes on the CPU: engine.device=cpu"
            " (extract: --device cpu)"
        )
    if num_gpus < num_ranks:
        raise UserError(
            f"--gpus {num_ranks}: this machine has {num_gpus} (torch.cuda.device_count())\n"
            f"  --gpus {num_gpus}"
        )
    return num_ranks > 1


def run_ranks(command: str, arguments: Sequence[str] | None, num_ranks: int | None) -> int:
    """Run ``e2e <command>`` on several ranks of this machine and return the exit code.

    Parameters
    ----------
    command : str
        A command that works under ``torchrun``, such as ``train``.
    arguments : sequence of str, optional
        Its arguments; by default those of this process.
    num_ranks : int
        Number of processes, one a GPU.
    """
    from e2e.parallel.launcher import run_torchrun  # costs a second that one process need not wait

    words = sys.argv[1:] if arguments is None else arguments
    start = ["--standalone", f"--nproc-per-node={num_ranks}", "--module", "e2e", command]
    with _replaced_environment(child_environment()):
        return run_torchrun([*start, *words])


@contextmanager
def _replaced_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
