"""What a run tells: one progress line, tables, metrics.jsonl; TensorBoard, Weights & Biases when asked."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from e2e.errors import optional_import
from e2e.files import write_atomically


class Screen:
    """A progress line on a terminal, plain lines elsewhere, nothing on ranks that do not lead."""

    PAUSE = 15.0  # seconds between two plain lines

    def __init__(self, is_leader: bool) -> None:
        self.is_leader = is_leader
        width = None if sys.stdout.isatty() else 140
        self.console = Console(quiet=not is_leader, highlight=False, soft_wrap=True, width=width)
        self._progress: Progress | None = None
        self._said = 0.0

    def say(self, text: str) -> None:
        """One line, above the progress line."""
        if self.console.is_terminal or not self.is_leader:
            self.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def step(self, done: int, total: int, text: str) -> None:
        """Move the progress line to ``done`` of ``total``."""
        if not self.is_leader:
            return
        if not self.console.is_terminal:
            now = time.monotonic()
            if now - self._said >= self.PAUSE:
                self._said = now
                print(f"{done}/{total} {text}", flush=True)
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

    def pause(self) -> None:
        """Take the progress line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of text."""
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
    """Another place for the metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of one step; steps never fall within a run of the program."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class MetricsLog:
    """metrics.jsonl of a run: one JSON object a line, in order of the optimiser steps.

    Args:
        path: the file; None writes nothing anywhere.
        trackers: other places, which get the numbers, nested names joined by a slash.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.path = path
        self._trackers = trackers

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps later than ``step``: a resumed run writes them again."""
        if self.path is None or not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())

    def write(self, **values: Any) -> None:
        """Append one line; ``step`` is among the values."""
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for tracker in self._trackers:
            tracker.log(dict(_numbers(values)), values["step"])

    def close(self) -> None:
        """Finish what was sent elsewhere."""
        for tracker in self._trackers:
            tracker.close()


def _numbers(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield before + name, value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut off when the run was stopped


class TensorBoard:
    """Event files in ``folder/tensorboard``. Of a resumed run, later steps written before are hidden."""

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


class Wandb:
    """Weights & Biases; ``offline`` writes to ``folder/wandb``, for ``wandb sync`` to send or not."""

    def __init__(self, folder: Path, settings: str, *, mode: str = "offline") -> None:
        with optional_import("tracking", use="run.track=[wandb]"):
            import wandb

        # A resumed run goes on under its own name; no code and no console output is taken along.
        own = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        quiet = wandb.Settings(console="off", disable_git=True, save_code=False)
        self._run = wandb.init(
            project="e2e",
            name=folder.name,
            dir=folder,
            id=os.environ.get("WANDB_RUN_ID", own),  # a sweep's agent has names of its own
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            config={"settings": settings},
            settings=quiet,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "wandb-online": partial(Wandb, mode="online"),
}
"""Name -> what makes a tracker of a run's folder and its settings as text."""


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
