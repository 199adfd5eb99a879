"""Commands that are killed, and commands whose disk is full, and whether they complete afterwards."""

from __future__ import annotations

import os
import random
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py

from e2e import cli
from e2e.errors import exit_code
from e2e.store.lmdb import PatchStore
from tools.faults.children import SIGNALS as BLOCKED
from tools.faults.children import Ended, run, start, wait
from tools.faults.outcomes import Outcome
from tools.faults.project import EXTRACT, MODEL, PACK, Project, call, digest

SIGNALS = (signal.SIGKILL,) * 3 + (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Signal -> exit code of a command that it ends in good order."""
MAX_KILLS = 4
"""Most faults in a row, before a command may complete."""
Results = dict[str, str]
"""Name of a result -> digest of its content."""


@dataclass(frozen=True)
class Command:
    """A command, what continues it, and what it makes."""

    words: Callable[[Project, Path], list[object]]
    """The command that writes to a folder."""
    results: Callable[[Path], Results]
    """Digests of what it wrote there."""
    continued: Callable[[Project, Path], list[object]] | None = None
    """The command to give after a stop; None: the same."""

    def again(self, project: Project, out: Path) -> list[object]:
        """The words of the command to give after a stop."""
        return (self.continued or self.words)(project, out)


def kill_command(
    project: Project, folder: Path, command: Command, count: int, seed: int
) -> Counter[Outcome]:
    """Kill the command at random moments, one to four times in a row, then let it complete."""
    draw = random.Random(f"{seed} {folder.name}")
    expected, duration = _reference(project, folder, command)

    def one_fault(out: Path) -> Outcome | None:
        log = out.with_suffix(".log")
        child = start(lambda: call_with_signals(*command.again(project, out)), log)
        time.sleep(draw.uniform(0, 1.1 * duration))
        sent = draw.choice(SIGNALS)
        # A second signal stops at once.
        for _ in range(1 if sent == signal.SIGKILL or draw.random() < 0.7 else 2):
            _send(child.number, sent)
        return _fault_outcome(wait(child), {-sent, INTERRUPTED.get(sent, -sent), 0})

    return _repeat(project, folder, command, count, draw, one_fault, expected)


def limit_command(
    project: Project, folder: Path, command: Command, count: int, seed: int
) -> Counter[Outcome]:
    """Let writing fail beyond a random size of a file, then let the command complete."""
    draw = random.Random(f"{seed} {folder.name}")
    expected, _ = _reference(project, folder, command)
    largest = max(p.stat().st_size for p in (folder / "reference").rglob("*") if p.is_file())

    def one_fault(out: Path) -> Outcome | None:
        log, limit = out.with_suffix(".log"), round(largest * draw.random() ** 3)
        ended = run(lambda: call(*command.again(project, out)), log, file_size=limit)
        return _fault_outcome(ended, {0, 2, 3})

    return _repeat(project, folder, command, count, draw, one_fault, expected)


def call_with_signals(*words: object) -> int:
    """Run a command; signals that wait reach it once it handles them, and not this program."""

    def command() -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
        try:
            return cli.run([str(word) for word in words])
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)

    return exit_code(command)


def _reference(project: Project, folder: Path, command: Command) -> tuple[Results, float]:
    """Return the results of the undisturbed command, and its seconds."""
    out, started = folder / "reference", time.monotonic()
    out.mkdir()
    ended = run(lambda: call(*command.words(project, out)), out.with_suffix(".log"))
    if ended.code:
        raise RuntimeError(f"{folder.name} fails without a fault:\n{ended.text}")
    return command.results(out), time.monotonic() - started


def _repeat(
    project: Project,
    folder: Path,
    command: Command,
    count: int,
    draw: random.Random,
    one_fault: Callable[[Path], Outcome | None],
    expected: Results,
) -> Counter[Outcome]:
    """Try some faults in a row on a new folder, let the command complete and compare; until ``count``."""
    outcomes: Counter[Outcome] = Counter()
    while outcomes.total() < count:
        out = folder / str(outcomes.total())
        out.mkdir()
        faults = [
            one_fault(out) for _ in range(min(draw.randint(1, MAX_KILLS), count - outcomes.total()))
        ]
        log = out.with_suffix(".log")
        ended = run(partial(call, *command.again(project, out)), log)
        is_same = ended.code == 0 and command.results(out) == expected
        if not is_same:
            print(f"{out}: exit code {ended.code}, the results differ\n{ended.text[-2000:]}")
        outcomes.update(fault or (Outcome.SAME if is_same else Outcome.LOST) for fault in faults)
    return outcomes


def _fault_outcome(ended: Ended, allowed: set[int]) -> Outcome | None:
    """Return what is wrong with how a disturbed command ended; None if nothing is."""
    if "Traceback" in ended.text:
        print(ended.text[-3000:])
        return Outcome.TRACEBACK
    if ended.code not in allowed:
        print(f"exit code {ended.code}, allowed: {sorted(allowed)}\n{ended.text[-2000:]}")
        return Outcome.CRASH
    return None


def _send(number: int, sent: signal.Signals) -> None:
    try:
        os.kill(number, sent)
    except ProcessLookupError:  # it has ended
        return


def _files(*names: str) -> Callable[[Path], Results]:
    """Results that are files, equal to the byte."""

    def digests(out: Path) -> Results:
        return {name: digest((out / name).read_bytes()) for name in names}

    return digests


def _packed(out: Path) -> Results:
    store = PatchStore(out / "s.lmdb")
    results = {}
    for slide in store.slides:
        record = store.record(slide)
        jpegs = store.read(slide, range(record.num_patches))
        results[slide] = digest(
            b"".join(jpegs) + record.require_coords().tobytes() + repr(record.mpp).encode()
        )
    return results


def _extracted(out: Path) -> Results:
    results = {}
    for path in sorted(out.rglob("*.h5")):
        with h5py.File(path) as file:
            features: Any = file["features"]
            results[path.name] = digest(features[()].tobytes())
    return results


def _exported(out: Path) -> Results:
    with zipfile.ZipFile(out / "model.zip") as archive:
        return {name: digest(archive.read(name)) for name in archive.namelist()}


def _resume(project: Project, out: Path) -> list[object]:
    has_settings = (out / "run" / "settings.yaml").is_file()
    return ["train", "--resume", out / "run"] if has_settings else _train(project, out)


def _train(project: Project, out: Path) -> list[object]:
    return ["train", "--datasets", project.cohort, *MODEL, f"run.out={out / 'run'}"]


TRAINED = tuple(
    f"run/{name}" for name in ("best.safetensors", "metrics.json", "predictions.csv", "task.json")
)
COMMANDS = {
    "pack": Command(
        lambda project, out: ["pack", "--slides", project.slides, "--out", out / "s.lmdb", *PACK],
        _packed,
    ),
    "train": Command(_train, _files(*TRAINED), _resume),
    "extract": Command(
        lambda project, out: ["extract", "--stores", project.store, "--out", out, *EXTRACT],
        _extracted,
    ),
    "evaluate": Command(
        lambda project, out: ["evaluate", project.run, "--out", out / "e"],
        _files("e/metrics.json", "e/predictions.csv"),
    ),
    "predict": Command(
        lambda project, out: [
            "predict",
            project.new_slides,
            "--run",
            project.run,
            "--out",
            out / "p",
        ],
        _files("p/predictions.csv"),
    ),
    "export": Command(
        lambda project, out: ["export", project.run, "--out", out / "model.zip", "--overwrite"],
        _exported,
    ),
}
"""Name -> command."""
