"""The files of a run folder, and the lock that keeps a second process out of it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from e2e.bags.spec import LabelledSlide
from e2e.cohort.report import write_cohort, write_problems
from e2e.cohort.table import Problem
from e2e.errors import UserError
from e2e.features.check import check_features
from e2e.files import lock_file, write_atomically, write_json
from e2e.settings.layers import dump_settings
from e2e.settings.paths import DATA_PATHS, resolve_paths
from e2e.settings.schema import Settings
from e2e.tasks.base import TASKS, Task

BEST = "best.safetensors"
"""Weights of the selected epoch."""
TASK = "task.json"
"""What the task was fitted to on the training slides."""
FEATURES = "features.json"
"""Which features a two-stage run was trained on."""
LOCK = ".lock"
"""Held by the process that trains in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder`` until the end of the block.

    Where the file system has no locks, or the folder cannot be written, nothing is locked.

    Raises
    ------
    UserError
        Another process holds the lock.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock_file(path)
    except OSError:
        yield
        return
    if handle is None:
        raise UserError(
            f"the run folder {folder} is in use: {path.read_text() or 'a process'} trains there\n"
            "  wait for it to finish, or stop it; then run the same command again"
        )
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(handle)


def check_is_new(folder: Path) -> None:
    """Raise UserError if ``folder`` holds anything but a lock file."""
    if folder.is_dir():
        entries = set(os.listdir(folder)) - {LOCK}
    else:
        entries = {folder.name} if folder.exists() else set()
    if entries:
        raise UserError(
            f"the run folder {folder} exists\n"
            f"  to resume it: --resume {folder}; or choose another folder: run.out=FOLDER"
        )


def write_inputs(
    folder: Path,
    settings: Settings,
    *,
    slides: Sequence[LabelledSlide],
    problems: Sequence[Problem],
    task: Task,
    features: Mapping[str, Any] | None,
) -> None:
    """Write what a training or an evaluation starts from: settings, cohort and fitted task.

    The settings are written first: a run that is stopped right after can be resumed.
    """
    # Absolute, because a run is used from any directory.
    paths = {key: resolve_paths(getattr(settings.data, key), Path.cwd()) for key in DATA_PATHS}
    settings = replace(settings, data=replace(settings.data, **paths))
    write_atomically(folder / "settings.yaml", dump_settings(settings).encode())
    write_cohort(slides, problems, folder / "cohort.csv")
    if problems:
        write_problems(problems, folder / "problems.csv")
    write_json(folder / TASK, task.state())
    if features:
        write_json(folder / FEATURES, features)


def load_task(name: str, options: Mapping[str, Any], folder: Path) -> Task:
    """The task ``name``, as it was fitted to the training slides of the run in ``folder``.

    Raises
    ------
    UserError
        The folder has no task.json, or one of another task.
    """
    task, file = TASKS.build(name, **options), folder / TASK
    if not file.is_file():
        raise UserError(
            f"{folder} has no {TASK}, which holds what its task was fitted to\n  train the run again"
        )
    try:
        task.load_state(json.loads(file.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not fit the task '{name}' of the settings: {error}\n"
            "  leave the task's options as the run has them"
        ) from error
    return task


def check_same_features(features: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError if ``features`` differ from what the run recorded of those it was trained on."""
    if (folder / FEATURES).is_file():
        check_features(features, json.loads((folder / FEATURES).read_bytes()), folder)
