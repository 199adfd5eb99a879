"""Ctrl-C, SIGTERM and SIGHUP: none is lost, the first one is answered in good order."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref

import pytest

from e2e.errors import describe_interrupt, exit_code
from e2e.signals import deferred_signals, received_signal, stop_requested


@pytest.fixture
def interrupts_delivered():
    """Ctrl-C is ignored by what a shell has put in the background, and by its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Patch:
    """Something that a weak reference can point to."""


def send_interrupt(_: object = None) -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_python_drops_in_a_callback_comes_again(capsys, interrupts_delivered):
    def work() -> int:
        with describe_interrupt(lambda: "epoch 3 is saved"):
            patch = Patch()
            reference = weakref.ref(patch, send_interrupt)
            del patch
            assert reference() is None
            threading.Event().wait(timeout=60)
        return 0

    hook = sys.unraisablehook
    assert exit_code(work) == 130
    assert capsys.readouterr().err == "\nepoch 3 is saved\n"
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_errors_in_callbacks_are_reported_as_before(monkeypatch, interrupts_delivered):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)

    def work() -> int:
        patch = Patch()
        reference = weakref.ref(patch, lambda _: 1 / 0)
        del patch
        assert reference() is None
        return 0

    assert exit_code(work) == 0
    assert len(reported) == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_the_exit_code_names_the_signal(capsys, interrupts_delivered, number, code):
    def work() -> int:
        with describe_interrupt(lambda: "epoch 3 is saved"):
            signal.raise_signal(number)
        return 0

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert exit_code(work) == code
    assert capsys.readouterr().err == "\nepoch 3 is saved\n"
    assert {n: signal.getsignal(n) for n in before} == before


def test_the_first_deferred_signal_waits_and_the_second_does_not(capfd, interrupts_delivered):
    steps = []

    def work() -> int:
        with describe_interrupt(lambda: "saved"), deferred_signals("finishing the update"):
            assert not stop_requested()
            signal.raise_signal(signal.SIGTERM)
            steps.append(stop_requested())
            send_interrupt()
            steps.append("not reached")
        return 0

    assert exit_code(work) == 130
    assert steps == [True]
    assert capfd.readouterr().err == "\nfinishing the update\n\nsaved\n"


def test_a_deferred_signal_that_nobody_answered_is_raised_at_the_end(interrupts_delivered):
    steps = []

    def work() -> int:
        with deferred_signals("finishing"):
            send_interrupt()
            steps.append("finished")
        steps.append("not reached")
        return 0

    assert exit_code(work) == 130
    assert steps == ["finished"]
    assert not stop_requested()


def test_a_signal_of_an_earlier_command_does_not_end_the_next(interrupts_delivered):
    assert exit_code(send_interrupt) == 130
    received = []
    assert exit_code(lambda: received.append(received_signal())) == 0
    assert received == [None]


def test_a_forked_worker_ends_by_sigterm_as_any_process(interrupts_delivered):
    def work() -> int:
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"!")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        return os.WTERMSIG(os.waitpid(child, 0)[1])

    assert exit_code(work) == signal.SIGTERM


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert exit_code(lambda: send_interrupt()) == 0
    finally:
        signal.signal(signal.SIGINT, before)
