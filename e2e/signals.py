"""Signals that end a command: Ctrl-C, SIGTERM and SIGHUP. The first one ends it in good order."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""The signals that end a command, and what Python does with each."""

PARENT_VARIABLE = "E2E_END_WITH_PARENT"
"""Environment variable: the process id of a parent with which a child command ends."""

PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>."""

RETRY_INTERRUPT = 0.05
"""Seconds until an interrupt that Python has dropped is raised again."""


@dataclass
class _Received:
    """What the handler of this process has received, and how it answers."""

    signal: int | None = None
    is_deferred: bool = False
    notice: str = ""


_received = _Received()


def received_signal() -> int | None:
    """Return the signal that is ending this command, or None."""
    return _received.signal


def stop_requested() -> bool:
    """Return whether a signal waits for the end of :func:`deferred_signals`."""
    return _received.is_deferred and _received.signal is not None


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, SIGTERM and SIGHUP inside the block.

    No signal is lost: Python drops an exception that is raised while it runs the callback of a weak
    reference or a ``__del__``, prints "Exception ignored in ..." and runs on; here it is raised again a
    moment later. A signal that is ignored (as a shell does for jobs in the background, and ``nohup``) or
    that other code handles is left alone.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    end_with_parent()
    signals = [
        number
        for number, default in DEFAULT_HANDLERS.items()
        if in_main_thread and signal.getsignal(number) is default
    ]
    hook_before = sys.unraisablehook
    retries: list[threading.Timer] = []
    if signals:
        _received.signal = None
        sys.unraisablehook = _raise_again(hook_before, retries)
    for number in signals:
        signal.signal(number, _receive)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, DEFAULT_HANDLERS[number])
        if signals:
            sys.unraisablehook = hook_before
        for timer in retries:
            timer.cancel()


@contextmanager
def deferred_signals(notice: str) -> Iterator[None]:
    """Let the first signal inside the block only set :func:`stop_requested`; the second one interrupts.

    Parameters
    ----------
    notice : str
        What rank 0 prints when the first signal comes: what is finished first.

    Raises
    ------
    KeyboardInterrupt
        At the end of the block, if a signal came that nobody has answered.
    """
    # One that came before the block was raised then, and belongs to what it ended.
    _received.signal, _received.is_deferred, _received.notice = None, True, notice
    try:
        yield
        if stop_requested():
            raise KeyboardInterrupt
    finally:
        _received.is_deferred = False


def end_with_parent() -> None:
    """Receive SIGTERM when the parent named by :data:`PARENT_VARIABLE` is killed (on Linux)."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(int(parent), 0)  # it may have started this process through another
    except ProcessLookupError:  # it was killed before
        os.kill(os.getpid(), signal.SIGTERM)


def _receive(number: int, _: FrameType | None) -> None:
    is_first = _received.signal is None
    _received.signal = number
    if not (is_first and _received.is_deferred):
        raise KeyboardInterrupt
    if os.environ.get("RANK", "0") == "0":
        # Not print: the signal may have come in the middle of one.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{_received.notice}\n".encode()
        )


def _raise_again(
    hook_before: Callable[[sys.UnraisableHookArgs], object], retries: list[threading.Timer]
) -> Callable[[sys.UnraisableHookArgs], None]:
    """Return a hook for exceptions that Python drops; its timers are added to ``retries``."""

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook_before(unraisable)
            return
        main_thread = threading.main_thread().ident
        number = _received.signal or signal.SIGINT
        retries.append(threading.Timer(RETRY_INTERRUPT, signal.pthread_kill, [main_thread, number]))
        retries[-1].start()

    return hook


def _restore_in_child() -> None:
    """A forked worker ends by a signal as any process does."""
    for number, default in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) is _receive:
            signal.signal(number, default)


os.register_at_fork(after_in_child=_restore_in_child)
