"""PyTorch's ``torchrun`` in this process, which keeps the exit codes of this package.

A rank that ends with an exit code of its own (:mod:`e2e.errors`) has printed its message already. Plain
``torchrun`` follows that message with a report and a traceback, and ends with 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from e2e.errors import (
    INTERRUPTED,
    LOST_RANK,
    PARTLY_DONE,
    TERMINATED,
    USER_ERROR,
    signal_exit_code,
)

OWN_CODES = (USER_ERROR, PARTLY_DONE, LOST_RANK, INTERRUPTED, TERMINATED)
"""Exit codes whose message the rank itself has printed."""


def run_torchrun(arguments: Sequence[str]) -> int:
    """Run ``torchrun`` and return its exit code.

    Parameters
    ----------
    arguments : sequence of str
        The command line of ``torchrun``.

    Returns
    -------
    int
        0, or the exit code of the rank that failed first, if it is one of :data:`OWN_CODES`.

    Raises
    ------
    ChildFailedError
        A rank crashed.
    """
    try:
        with _quiet_logs():
            torchrun(list(arguments))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code not in OWN_CODES:
            raise
        return code
    except SignalException as error:
        return signal_exit_code(error.sigval)
    return 0


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Drop the log lines of torchrun that only repeat what a rank has printed."""
    filters = {
        "torch.distributed.elastic.multiprocessing.api": _is_news,
        # One thread a process is torchrun's default, and right.
        "torch.distributed.run": _is_not_about_threads,
    }
    for name, keep in filters.items():
        logging.getLogger(name).addFilter(keep)
    try:
        yield
    finally:
        for name, keep in filters.items():
            logging.getLogger(name).removeFilter(keep)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    repeats = any(f"exitcode: {code})" in message for code in OWN_CODES)
    return not repeats and "closing signal" not in message


def _is_not_about_threads(record: logging.LogRecord) -> bool:
    return "OMP_NUM_THREADS" not in record.getMessage()
