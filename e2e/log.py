"""Output of a run: a progress line, tables and messages, metrics.jsonl, and experiment trackers.

TensorBoard and Weights & Biases are used only if the settings name them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from e2e.errors import discard_output, optional_import
from e2e.files import OutputError, write_atomically


class _Console(Console):
    """A console that stays silent once nobody reads what it prints; rich would end the program."""

    def on_broken_pipe(self) -> None:
        """See :class:`rich.console.Console`."""
        discard_output()


class Screen:
    """Prints messages, tables and a progress line.

    On a terminal the progress line is updated in place; elsewhere it is printed again from time to time.

    Parameters
    ----------
    is_leader : bool
        Whether this is the rank that prints; all others print nothing.
    timestamps : bool
        Whether messages and progress lines start with date and time where the output is not a terminal.
    """

    PAUSE = 15.0
    """Seconds between two progress lines where the output is not a terminal."""

    def __init__(self, is_leader: bool, *, timestamps: bool = False) -> None:
        self.is_leader = is_leader
        self._timestamps = timestamps
        width = None if sys.stdout.isatty() else 140
        self.console = _Console(quiet=not is_leader, highlight=False, soft_wrap=True, width=width)
        self._progress: Progress | None = None
        self._last_printed = 0.0
        self._first_step: tuple[float, int] | None = None
        """When the first progress line since a pause was due, and how much was done then."""

    def say(self, text: str) -> None:
        """Print a message, above the progress line."""
        if self.console.is_terminal or not self.is_leader:
            self.console.print(text, markup=False)
        else:
            self._print(text)

    def step(self, done: int, total: int, text: str) -> None:
        """Set the progress line to ``done`` of ``total``, followed by ``text``."""
        if not self.is_leader:
            return
        if not self.console.is_terminal:
            self._print_step(done, total, text)
            return
        if self._progress is None:
            columns = (
                BarColumn(30),
                TextColumn("{task.completed}/{task.total} {task.description}"),
            )
            self._progress = Progress(
                *columns, TimeRemainingColumn(), console=self.console, transient=True
            )
            self._progress.add_task(text, total=total)
            self._progress.start()
        self._progress.update(
            self._progress.task_ids[0], completed=done, total=total, description=text
        )

    def _print_step(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = now, done
        if now - self._last_printed < self.PAUSE:
            return
        self._last_printed = now
        started, already_done = self._first_step
        left = ""
        if done > already_done and done < total:
            seconds = (now - started) / (done - already_done) * (total - done)
            left = f"  {clock(seconds)} left"
        self._print(f"{done}/{total} {text}{left}")

    def _print(self, text: str) -> None:
        stamp = f"{datetime.now():%Y-%m-%d %H:%M:%S} " if self._timestamps else ""
        try:
            print(stamp + text, flush=True)
        except BrokenPipeError:  # whoever read the log has ended; a training goes on
            discard_output()

    def pause(self) -> None:
        """Remove the progress line until the next :meth:`step`."""
        self._first_step = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; long cells are folded."""
        self.pause()
        if not self.is_leader:
            return
        table = Table(title=escape(title), title_justify="left")
        for name in header:
            table.add_column(escape(name), overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)


class Tracker(Protocol):
    """A service or file format that receives the metrics of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one optimiser step; steps never decrease within a process."""
        ...

    def close(self) -> None:
        """Write what is buffered, and stop."""
        ...


class MetricsLog:
    """Writes metrics.jsonl: one JSON object per line, in order of the optimiser steps.

    Parameters
    ----------
    path : Path or None
        The file; None: nothing is written or tracked.
    trackers : sequence of Tracker
        They receive the same numbers; nested names are joined by a slash. One that fails is reported and left
        out from then on.
    screen : Screen, optional
        Prints such reports.
    """

    def __init__(
        self,
        path: Path | None,
        trackers: Sequence[Tracker] = (),
        screen: Screen | None = None,
    ) -> None:
        self.path = path
        self._trackers = list(trackers)
        self._screen = screen or Screen(is_leader=True)

    def forget_after(self, step: int) -> None:
        """Remove the lines of steps after ``step``, which a resumed run writes again."""
        if self.path is None or not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())

    def write(self, **values: Any) -> None:
        """Append one line; ``values`` must contain ``step``."""
        if self.path is None:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}\n"
                f"  free disk space; to continue: e2e train --resume {self.path.parent}"
            ) from error
        working, self._trackers = self._trackers, []
        for tracker in working:
            with warn_of_failure(self._screen, f"nothing more is logged to {_name_of(tracker)}"):
                tracker.log(dict(_numbers(values)), values["step"])
                self._trackers.append(tracker)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            with warn_of_failure(self._screen, f"{_name_of(tracker)} may be incomplete"):
                tracker.close()
        self._trackers = []


def _name_of(tracker: Tracker) -> str:
    return type(tracker).__name__


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among nested values, with their names joined by a slash."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the run was stopped while it wrote this line


class TensorBoard:
    """Writes event files to ``folder/tensorboard``.

    After a run is resumed, TensorBoard hides the steps that are written again.

    Parameters
    ----------
    folder : Path
        The run folder.
    settings : str
        Settings of the run as text; not used.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self._folder, self._writer = folder / "tensorboard", None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        if self._writer is None:
            with optional_import("tracking", use="run.track=[tensorboard]"):
                from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def warn_of_failure(screen: Screen, consequence: str) -> Iterator[None]:
    """Turn an error inside the block, which writes something optional, into a warning.

    Parameters
    ----------
    screen : Screen
        Prints the warning.
    consequence : str
        What there will not be, such as ``no heatmap of slide 's1'``.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 (results never depend on a picture or a tracker)
        reason = (str(error).splitlines() or [""])[0][:200]
        screen.say(f"warning: {consequence}: {type(error).__name__}: {reason}")


class Wandb:
    """Logs to Weights & Biases.

    A resumed run continues under the same id. Neither code nor console output is uploaded.

    Parameters
    ----------
    folder : Path
        The run folder.
    settings : str
        Settings of the run as text; stored with the run.
    mode : str
        ``offline`` writes to ``folder/wandb`` only, from where ``wandb sync`` can upload it; ``online``
        uploads while the run proceeds.
    """

    def __init__(self, folder: Path, settings: str, *, mode: str = "offline") -> None:
        with optional_import("tracking", use="run.track=[wandb]"):
            import wandb

        self._excepthook = sys.excepthook
        run_id = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        wandb_settings = wandb.Settings(console="off", disable_git=True, save_code=False)
        self._run = wandb.init(
            project="e2e",
            name=folder.name,
            dir=folder,
            id=os.environ.get("WANDB_RUN_ID", run_id),  # a wandb sweep sets it
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            config={"settings": settings},
            settings=wandb_settings,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See :class:`Tracker`. Also restores what wandb set for the whole process."""
        self._run.finish()
        os.environ.pop("WANDB_SERVICE", None)
        sys.excepthook = self._excepthook


TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "wandb-online": partial(Wandb, mode="online"),
}
"""Name -> constructor of a tracker, from the run folder and the settings as text."""


def clock(seconds: float) -> str:
    """Return a duration as ``1:02:03``, or ``2:03`` if it is below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
