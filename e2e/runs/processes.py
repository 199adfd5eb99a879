"""The commands of this package in processes of their own, one or one a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from e2e.errors import UserError
from e2e.signals import PARENT_VARIABLE, received_signal

PACKAGE_PARENT = Path(__file__).resolve().parents[2]

Process = subprocess.Popen[bytes]


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


class Children:
    """Commands that run beside this process and end with it.

    They are in sessions of their own, where Ctrl-C does not reach them: :meth:`wait` passes each signal on
    that this process receives, once, so that every child ends in good order. If this process is killed, they
    receive SIGTERM (on Linux).
    """

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self._signal: int | None = None

    def start(
        self,
        command: Sequence[str],
        output: IO[bytes] | None = None,
        changes: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a command.

        Parameters
        ----------
        command : sequence of str
            Program and arguments.
        output : file, optional
            Where stdout and stderr go; by default those of this process.
        changes : mapping, optional
            Variables to set in the child's environment.
        """
        environment = child_environment({**(changes or {}), PARENT_VARIABLE: str(os.getpid())})
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        self._processes.append(process)
        if self._signal is not None:  # it was started while the others were told to end
            process.send_signal(self._signal)
        return process

    def wait(self, wait: Callable[[], object]) -> None:
        """Wait, and pass on each signal that this process receives meanwhile.

        Parameters
        ----------
        wait : callable
            Returns when all that the caller waits for has ended.

        Raises
        ------
        KeyboardInterrupt
            There was a signal; all children have received it and ended.
        """
        try:
            wait()
            return
        except KeyboardInterrupt:
            self._send_signal()
        while True:
            try:
                for process in self._processes:
                    process.wait()
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                if all(process.poll() is not None for process in self._processes):
                    raise
                self._send_signal()

    def _send_signal(self) -> None:
        self._signal = received_signal() or signal.SIGINT
        for process in self._processes:
            process.send_signal(self._signal)  # nothing is sent to one that has ended


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
