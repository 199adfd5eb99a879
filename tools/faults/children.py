"""Run a function in a forked process, which a fault may end."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT = 60.0
"""Seconds until a process that does not end is killed."""
MEMORY = 8 * 2**30
"""Bytes that a process may allocate."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that a command answers."""


class Ended(NamedTuple):
    """How a forked process ended."""

    code: int
    """Exit code; negative: the signal that ended it."""
    value: Any
    """What the function returned; None if it did not."""
    text: str
    """What the process printed."""
    is_hung: bool = False
    """Whether it did not end by itself."""


@dataclass(frozen=True)
class Child:
    """A forked process."""

    number: int
    output: int
    """The end of a pipe. A file for the output would fall under the limit of file sizes."""
    value_file: Path


def start(work: Callable[[], Any], log: Path, *, file_size: int | None = None) -> Child:
    """Run ``work`` in a forked process.

    Parameters
    ----------
    work
        Returns an exit code, or a result that can be pickled.
    log
        A result goes to ``<log>.value`` in its folder.
    file_size
        Bytes beyond which writing a file fails, as on a full disk.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    value_file = log.with_suffix(".value")
    output, to_parent = os.pipe()
    # A signal waits until the command is ready for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    number = os.fork()
    if number:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(to_parent)
        os.set_blocking(output, False)
        return Child(number, output, value_file)
    code = 70
    try:
        os.dup2(to_parent, 1)
        os.dup2(to_parent, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        value = work()
        code = value if isinstance(value, int) else 0
        if not isinstance(value, int):
            value_file.write_bytes(pickle.dumps(value))
    except BaseException:  # noqa: BLE001 (it is what the campaign looks for)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(work: Callable[[], Any], log: Path, *, file_size: int | None = None) -> Ended:
    """Run ``work`` in a forked process to its end; see :func:`start`."""
    return wait(start(work, log, file_size=file_size))


def wait(child: Child) -> Ended:
    """Wait for a process; one that does not end is killed."""
    deadline = time.monotonic() + TIMEOUT
    text, done, status, is_hung = b"", 0, 0, False
    while not done:
        if time.monotonic() > deadline and not is_hung:
            is_hung = True
            os.kill(child.number, signal.SIGKILL)
        time.sleep(0.002)
        done, status = os.waitpid(child.number, os.WNOHANG)
        text += _read_all(child.output)
    os.close(child.output)
    value = pickle.loads(child.value_file.read_bytes()) if child.value_file.is_file() else None
    child.value_file.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, value, text.decode(errors="replace"), is_hung)


def _read_all(output: int) -> bytes:
    """Return what can be read now."""
    text = b""
    while True:
        try:
            block = os.read(output, 65536)
        except BlockingIOError:
            return text
        if not block:
            return text
        text += block
