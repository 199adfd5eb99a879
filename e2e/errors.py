"""Errors that a user can fix, and the exit codes of the commands.

A user error is printed as one message, without a traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from e2e.signals import handle_signals, received_signal

USER_ERROR = 2
"""Exit code: a mistake the user can fix; the message says how."""

PARTLY_DONE = 3
"""Exit code: done, except for some slides, which are listed."""

LOST_RANK = 4
"""Exit code: another process of the run was lost."""

INTERRUPTED = 130
"""Exit code: interrupted with Ctrl-C, as shells report it."""

TERMINATED = 143
"""Exit code: ended by SIGTERM or SIGHUP, as shells report the first."""


BROKEN_PIPE = 141
"""Exit code: nobody reads the output any more, as shells report it."""


ENVIRONMENT = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free disk space and run the same command again"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or the network file system"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""Error numbers of the system that are no fault of the program -> what to do."""


class UserError(Exception):
    """A mistake that the user can fix.

    The first line of the message says what is wrong, the value found and where; the second, indented by
    two spaces, what to do. Every process of a distributed run raises the same error, so only rank 0
    prints it.
    """

    on_every_rank = False


class OneRankError(UserError):
    """A user error that one rank may raise while the others do not: the rank that raises it prints it."""

    on_every_rank = True


class DamagedDataError(OneRankError):
    """A slide, patch or store that cannot be read."""


class LostRankError(Exception):
    """Another process of a distributed run died or hangs. Each process that notices prints it."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command, with one line that says what was saved and how to continue."""


@contextmanager
def describe_interrupt(describe: Callable[[], str]) -> Iterator[None]:
    """Turn the KeyboardInterrupt of a signal inside the block into :class:`Interrupted`.

    Parameters
    ----------
    describe : callable
        Returns the line to print: what was saved and how to continue. Called after the interrupt.

    Raises
    ------
    Interrupted
        The block was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(describe()) from error


@contextmanager
def optional_import(extra: str, *, use: str) -> Iterator[None]:
    """Turn a failed import inside the block into a message that names the extra to install.

    Parameters
    ----------
    extra : str
        The extra of this package that installs the missing package, such as ``search``.
    use : str
        What needs the package: a command or setting, such as ``e2e sweep``.

    Raises
    ------
    UserError
        A package is not installed.

    Examples
    --------
    >>> with optional_import("search", use="e2e sweep"):
    ...     import a_package_that_does_not_exist
    Traceback (most recent call last):
    ...
    e2e.errors.UserError: e2e sweep needs the package 'a_package_that_does_not_exist', which is not installed
      pip install "e2e-mil[search]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{use} needs the package '{error.name}', which is not installed\n"
            f'  pip install "e2e-mil[{extra}]"'
        ) from error


def exit_code(main: Callable[[], int | None], *, interrupted: str | None = None) -> int:
    """Run ``main`` and return its exit code.

    Any exception other than those below is left alone: a crash ends with its traceback.

    Parameters
    ----------
    main : callable
        Returns an exit code, or None for 0.
    interrupted : str, optional
        What to print after Ctrl-C when the exception itself does not say, in one line.

    Returns
    -------
    int
        What ``main`` returns; 2 after a :class:`UserError` or an error of :data:`ENVIRONMENT`, 4 after a
        :class:`LostRankError`, 130 after Ctrl-C and 143 after SIGTERM or SIGHUP, each with its message on
        stderr; 141 if nobody reads the output.
    """
    is_leader = os.environ.get("RANK", "0") == "0"
    try:
        with handle_signals():
            code = main() or 0
            sys.stdout.flush()  # here, where an error can still be answered
            return code
    except UserError as error:
        if error.on_every_rank or is_leader:
            _print_error(f"error: {error}")
        return USER_ERROR
    except BrokenPipeError:  # such as `e2e inspect ... | head`
        discard_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        name = f"{str(error.filename)[:300]}: " if error.filename else ""
        _print_error(f"error: {name}{error.strerror}\n  {ENVIRONMENT[error.errno]}")
        return USER_ERROR
    except LostRankError as error:
        _print_error(f"error: {error}")
        return LOST_RANK
    except KeyboardInterrupt as error:
        if is_leader:
            _print_error(f"\n{str(error) or interrupted or 'interrupted'}")
        return signal_exit_code(received_signal())


def discard_output() -> None:
    """Let everything that is printed from here on vanish: whoever read it has ended."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def signal_exit_code(number: int | None) -> int:
    """Return the exit code after a signal: 130 for Ctrl-C (and None), 143 for others."""
    return INTERRUPTED if number in (None, signal.SIGINT) else TERMINATED


def _print_error(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def format_list(items: Iterable[object], *, most: int = 10) -> str:
    """Return the items as indented lines; those beyond the first ``most`` are counted."""
    shown = [str(item) for item in items]
    lines = [f"  {item}" for item in shown[:most]]
    if len(shown) > most:
        lines.append(f"  ... and {len(shown) - most} more")
    return "\n".join(lines)
