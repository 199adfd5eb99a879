"""Errors that a user can fix, and the exit codes of the commands.

A user error is printed as one message, without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

USER_ERROR = 2
"""Exit code: a mistake the user can fix; the message says how."""

PARTLY_DONE = 3
"""Exit code: done, except for some slides, which are listed."""

LOST_RANK = 4
"""Exit code: another process of the run was lost."""

INTERRUPTED = 130
"""Exit code: interrupted with Ctrl-C, as shells report it."""


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
    """Ctrl-C, with one line that says what was saved and how to continue."""


@contextmanager
def describe_interrupt(describe: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C inside the block into :class:`Interrupted`.

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
    except LostRankError as error:
        # Ctrl-C reaches every rank; the others may have ended before this one came to raise its own.
        if _interrupt_received.is_set():
            raise Interrupted(describe()) from error
        raise


_interrupt_received = threading.Event()

RETRY_INTERRUPT = 0.05
"""Seconds until an interrupt that Python has dropped is sent again."""


@contextmanager
def reliable_interrupts() -> Iterator[None]:
    """Let no Ctrl-C inside the block be lost.

    Python drops an exception that is raised while it runs a weak reference's callback or a ``__del__``,
    KeyboardInterrupt too: it prints "Exception ignored in ..." and the program runs on. Inside the
    block such an interrupt is sent again a moment later. Where Ctrl-C is ignored or handled by other code, as
    in a job that a shell has put in the background, nothing changes.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook_before = sys.unraisablehook
    retries: list[threading.Timer] = []

    def receive(*_: object) -> None:
        _interrupt_received.set()
        raise KeyboardInterrupt

    def retry(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook_before(unraisable)
            return
        main_thread = threading.main_thread().ident
        retries.append(
            threading.Timer(RETRY_INTERRUPT, signal.pthread_kill, [main_thread, signal.SIGINT])
        )
        retries[-1].start()

    _interrupt_received.clear()
    sys.unraisablehook = retry
    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook_before
        for timer in retries:
            timer.cancel()


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
        What ``main`` returns; 2 after a :class:`UserError`, 4 after a :class:`LostRankError` and 130 after
        Ctrl-C, each with its message on stderr.
    """
    is_leader = os.environ.get("RANK", "0") == "0"
    try:
        with reliable_interrupts():
            return main() or 0
    except UserError as error:
        if error.on_every_rank or is_leader:
            _print_error(f"error: {error}")
        return USER_ERROR
    except LostRankError as error:
        _print_error(f"error: {error}")
        return LOST_RANK
    except KeyboardInterrupt as error:
        if is_leader:
            _print_error(f"\n{str(error) or interrupted or 'interrupted'}")
        return INTERRUPTED


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
