"""A command that starts trainings: they end with it, in good order, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.runs.processes import child_environment
from e2e.training.checkpoint import load_checkpoint
from tests.helpers.commands import deliver_interrupts
from tests.helpers.patch_cohort import arguments
from tests.helpers.patch_cohort import cohort as cohort

pytestmark = pytest.mark.slow


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes_of(folder: Path) -> list[str]:
    """Numbers of the processes whose command line names the folder."""
    done = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False)
    return done.stdout.split()


@pytest.fixture
def crossval(cohort, tmp_path):
    """A cross-validation of two runs at once, both of which have saved a checkpoint."""
    out = tmp_path / "crossval"
    words = arguments(cohort, out, "optim.epochs=500", "run.save_every=1")[:-1]
    words = [word for word in words if not word.startswith("run.out=")]
    options = ["--folds", "2", "--at-once", "2", "--out", str(out), "run.save_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "e2e", "crossval", *words, *options, "optim.epochs=500"],
        cwd=tmp_path, env=child_environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=deliver_interrupts,
    )  # fmt: skip

    def have_saved() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return len(list(out.glob("runs/*/last.safetensors"))) == 2

    wait_until(have_saved)
    yield process, out
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_once_and_every_run_saves_its_update(crossval, number, code):
    process, out = crossval
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    line = f"interrupted; finished runs are in {out}; the same command continues"
    assert errors.strip().splitlines() == [line]
    assert not processes_of(out)
    for run in (out / "runs").iterdir():
        if run.is_dir():
            log = run.with_name(f"{run.name}.log").read_text()
            assert log.count("stopping after the current update") == 1
            assert f"to continue: e2e train --resume {run}" in log
            assert load_checkpoint(run / "last.safetensors")[1]["step"] > 0


def test_runs_end_when_the_command_that_started_them_is_killed(crossval):
    process, out = crossval
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(out))
    for log in out.glob("runs/*.log"):
        assert "interrupted; checkpoint" in log.read_text()
