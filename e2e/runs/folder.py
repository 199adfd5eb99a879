"""The files of a run folder, and the lock that keeps a second process out of it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from e2e.bags.spec import LabelledSlide
from e2e.cohort.report import write_cohort, write_problems
from e2e.cohort.table import Problem
from e2e.errors import DamagedDataError, UserError
from e2e.features.check import check_features
from e2e.files import lock_file, read_json, write_atomically, write_json
from e2e.settings.layers import dump_settings
from e2e.settings.paths import DATA_PATHS, WEIGHTS, resolve_paths
from e2e.settings.schema import Settings
from e2e.tasks.base import TASKS, Task

BEST = "best.safetensors"
"""Weights of the selected epoch."""
COHORT = "cohort.csv"
"""The slides of the run, and those that were left out."""
TASK = "task.json"
"""What the task was fitted to on the training slides."""
FEATURES = "features.json"
"""Which features a two-stage run was trained on."""
EXPORTED = frozenset(
    ("settings.yaml", TASK, FEATURES, "recipes.json", BEST, "metrics.json", "README.md")
)
"""Files of an exported model."""
LOCK = ".lock"
"""Held by the process that trains in the folder."""
WRITTEN = (
    *("settings.yaml", COHORT, "problems.csv", TASK, FEATURES, "recipes.json", "metrics.jsonl"),
    *(BEST, "last.safetensors", "patch_scores_*.safetensors", "tensorboard", "wandb"),
    *("metrics.json", "predictions.csv", "figures", "heatmaps", ".*.part", LOCK),
)
"""Patterns of what training writes into a run folder."""


MAX_TEXT = 16 * 2**20
"""Maximum size in bytes of a file of an exported model that is not its weights."""


@contextmanager
def open_run(run: Path) -> Iterator[Path]:
    """Yield a run folder; an exported ``.zip`` is unpacked until the end of the block.

    Raises
    ------
    UserError
        The file is not an exported model.
    """
    if not run.is_file():
        yield run
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack_run(run, Path(folder))
        yield Path(folder)


def results_folder(run: Path, name: str) -> Path:
    """Return where results of a run go if the user does not say: in its folder, or beside a .zip."""
    return (run.with_suffix("") if run.is_file() else run) / name


def unpack_run(file: Path, folder: Path) -> None:
    """Unpack a model that ``e2e export`` wrote as a ``.zip``.

    Raises
    ------
    UserError
        The file is not such a model.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                _check_entry(entry, file)
                # Not extract(): entries are plain files, and their names are known.
                with archive.open(entry) as source, (folder / entry.filename).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DamagedDataError(f"{file} cannot be read as an exported model: {error}") from error


def _check_entry(entry: zipfile.ZipInfo, file: Path) -> None:
    """Raise DamagedDataError for what `e2e export` does not write: the file may come from anywhere."""
    is_weights = entry.filename == BEST
    is_small = is_weights or entry.file_size <= MAX_TEXT
    if entry.filename not in EXPORTED or not is_small or entry.compress_type != zipfile.ZIP_STORED:
        raise DamagedDataError(
            f"{file} is not an exported model: it holds {entry.filename!r} of {entry.file_size:,} bytes"
        )


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


def check_is_new(folder: Path, *, overwrite: bool) -> None:
    """Check that a training may start in ``folder``.

    Parameters
    ----------
    folder : Path
        The run folder.
    overwrite : bool
        Whether it may hold an earlier run.

    Raises
    ------
    UserError
        The folder holds anything but a lock file; with ``overwrite``, anything that training did not write.
    """
    if folder.is_dir():
        entries = set(os.listdir(folder)) - {LOCK}
    else:
        entries = {folder.name} if folder.exists() else set()
    if not entries:
        return
    if not overwrite:
        raise UserError(
            f"the run folder {folder} exists\n"
            f"  to resume it: --resume {folder}; to replace it: --overwrite; or choose another folder: "
            "run.out=FOLDER"
        )
    others = sorted(name for name in entries if not any(fnmatchcase(name, p) for p in WRITTEN))
    if others or "settings.yaml" not in entries:
        reason = f"it holds {', '.join(others[:3])}" if others else "it has no settings.yaml"
        raise UserError(
            f"--overwrite replaces what e2e train wrote, and {folder} is not that alone: {reason}\n"
            "  move this elsewhere, or choose another folder: run.out=FOLDER"
        )


def remove_run(folder: Path) -> None:
    """Delete what training wrote into ``folder``, but nothing that symbolic links point to.

    The settings go last: if this is stopped, the same command can be given again.
    """
    entries = [path for path in folder.iterdir() if path.name != LOCK]
    for path in sorted(entries, key=lambda path: path.name == "settings.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
    encoder = settings.encoder
    weights = {k: resolve_paths(v, Path.cwd()) for k, v in encoder.options.items() if k == WEIGHTS}
    encoder = replace(encoder, options={**encoder.options, **weights})
    settings = replace(settings, data=replace(settings.data, **paths), encoder=encoder)
    write_atomically(folder / "settings.yaml", dump_settings(settings).encode())
    write_cohort(slides, problems, folder / COHORT)
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
        task.load_state(read_json(file))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not fit the task '{name}' of the settings: {error}\n"
            "  leave the task's options as the run has them"
        ) from error
    return task


def check_same_features(features: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError if ``features`` differ from what the run recorded of those it was trained on."""
    if (folder / FEATURES).is_file():
        check_features(features, read_json(folder / FEATURES), folder)
