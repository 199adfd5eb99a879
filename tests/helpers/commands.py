"""Run the commands of launch/ and tools/ in this process."""

from __future__ import annotations

import signal
import sys

from e2e.errors import exit_code

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
"""PyTorch's own ``torchrun``, which turns the exit code of a rank into 1."""


def call(main, monkeypatch, capsys, *argv: object) -> tuple[int, str]:
    """Run a command in this process; its exit code and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    code = exit_code(main)
    return code, capsys.readouterr().err


def deliver_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
