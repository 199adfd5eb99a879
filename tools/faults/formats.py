"""Every file format that the package reads, damaged at random, and what reading it then gives."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import e2e
from e2e.errors import UserError
from e2e.features.reader import open_features
from e2e.runs.folder import load_task, unpack_run
from e2e.runs.parts import REGISTRIES
from e2e.runs.recipes import packing_recipe, recorded_patches
from e2e.runs.saved import read_predictions
from e2e.runs.sweep import read_space
from e2e.settings.layers import load_settings, saved_settings
from e2e.store.index import read_index
from e2e.store.lmdb import PatchStore
from e2e.store.mpp_table import read_mpp
from e2e.training.checkpoint import load_checkpoint
from tools.faults.children import run
from tools.faults.mutations import mutate
from tools.faults.outcomes import Outcome
from tools.faults.project import (
    PACK,
    Project,
    call,
    coords_files,
    digest,
    foreign_features,
    store_index,
)


@dataclass(frozen=True)
class Format:
    """A kind of file: how it is input_path, read and damaged."""

    make: Callable[[Project, Path], Path]
    """Copies or writes an input to a folder and returns the file to damage, or the folder of such files."""
    read: Callable[[Path], object]
    """Reads the input, given what ``make`` returned; what it returns says what was read."""
    has_checksums: bool = False
    """Whether other content must not go unnoticed."""
    is_text: bool = False
    """Whether values are replaced as well as bytes."""
    may_hang: bool = False
    """Whether a library may run in circles in it."""


def mutate_format(
    project: Project, folder: Path, file_format: Format, count: int, seed: int
) -> Counter[Outcome]:
    """Read the input ``count`` times, each time with another damage to one file."""
    draw = random.Random(f"{seed} {folder.name}")
    refused, expected = _read_in_child(
        file_format, file_format.make(project, _new(folder / "reference")), folder / "log"
    )
    if refused is not None:
        raise RuntimeError(f"{folder.name}: the undamaged input cannot be read: {expected}")
    outcomes: Counter[Outcome] = Counter()
    for number in range(count):
        trial = _new(folder / str(number))
        input_path = file_format.make(project, trial)
        files = (
            sorted(p for p in input_path.rglob("*") if p.is_file())
            if input_path.is_dir()
            else [input_path]
        )
        file = draw.choice(files)
        kind = mutate(file, draw, is_text=file_format.is_text)
        outcome, value = _read_in_child(file_format, input_path, folder / "log")
        if outcome is None:
            changed = Outcome.WRONG if file_format.has_checksums else Outcome.OTHER
            outcome = Outcome.SAME if value == expected else changed
        outcomes[outcome] += 1
        if outcome in (Outcome.WRONG, Outcome.TRACEBACK, Outcome.CRASH):
            print(f"{trial}: {kind} of {file.name}: {outcome}")
        else:
            shutil.rmtree(trial)
    return outcomes


def _read_in_child(
    file_format: Format, input_path: Path, log: Path
) -> tuple[Outcome | None, object]:
    """Return the outcome, or None and a digest of what was read."""

    def work() -> str:
        try:
            return hashlib.blake2b(
                repr(file_format.read(input_path)).encode(errors="replace")
            ).hexdigest()
        except UserError as error:
            return f"error: {error}"

    ended = run(work, log)
    if ended.value is None:
        if ended.is_hung and file_format.may_hang:
            return Outcome.HUNG, None
        print(ended.text[-2500:])
        return (Outcome.CRASH if ended.code < 0 else Outcome.TRACEBACK), None
    if ended.value.startswith("error: "):
        return Outcome.REFUSED, ended.value
    return None, ended.value


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def read_store(path: Path) -> object:
    """Read everything in a patch store."""
    store = PatchStore(path)
    content = []
    for slide in store.slides:
        record = store.record(slide)
        jpegs = store.read(slide, range(record.num_patches))
        fields = {name: value for name, value in vars(record).items() if name != "coords"}
        content.append((fields, digest(record.require_coords().tobytes()), digest(b"".join(jpegs))))
    return content


def read_features(path: Path) -> object:
    """Read all features of a folder."""
    features = open_features(path)
    content = []
    for slide in features.slides:
        rows, coords = features.features(slide), features.record(slide).coords
        places = None if coords is None else coords.tolist()
        content.append((slide, digest(rows.numpy().tobytes()), places))
    return content


def read_checkpoint(path: Path) -> object:
    """Read all tensors and counters of a checkpoint."""
    tensors, state = load_checkpoint(path)
    return [(name, digest(tensors[name].numpy().tobytes())) for name in sorted(tensors)], state


def read_export(path: Path) -> object:
    """Read an exported model."""
    folder = _new(path.with_name("unpacked"))
    unpack_run(path, folder)
    return read_run(folder), read_checkpoint(folder / "best.safetensors")


def read_run(folder: Path) -> object:
    """Read the settings, the task and the recipes of a run folder."""
    settings = saved_settings(folder, [], REGISTRIES)
    task = load_task(settings.task.name, settings.task.options, folder)
    recipe = packing_recipe(folder, settings.data)
    return settings, task.state(), recipe, recorded_patches(folder)


def read_run_of(file: Path) -> object:
    """Read the run folder of a file, and its predictions."""
    return read_run(file.parent), read_predictions(file.parent, "test")


def read_labels(file: Path) -> object:
    """Load a cohort with this label table."""
    project = Project(file.parents[2] / "project")
    cohort = e2e.load_cohort(project.cohort, f"data.labels={file}", "data.unmatched=drop")
    return [(item.slide, item.target.tolist()) for item in cohort.slides]


def read_split_table(file: Path) -> object:
    """Load a cohort with this split file."""
    project = Project(file.parents[2] / "project")
    cohort = e2e.load_cohort(project.cohort, f"data.split_file={file}", "data.unmatched=drop")
    return [(item.slide.id, item.slide.split) for item in cohort.slides]


def read_cohort_settings(file: Path) -> object:
    """Merge the settings of a cohort's YAML."""
    return load_settings(
        datasets=str(file), model="e2e_r18_abmilx", files=[], overrides=[], registries=REGISTRIES
    )


def pack_and_read(input_path: Path, *, option: str) -> object:
    """Pack a folder and read the store."""
    out = input_path.parent / "packed.lmdb"
    options = () if option == "--patches" else PACK
    if option == "--coords":
        options = ("--workers", "0", "--slides", input_path.parents[2] / "project" / "slides")
    code = call("pack", option, input_path, "--out", out, *options)
    if code:  # 3: a slide is left out, and named
        raise UserError("see the log")
    store = PatchStore(out)
    patches = {s: store.read(s, range(store.num_patches(s))) for s in store.slides}
    return [(slide, digest(b"".join(jpegs))) for slide, jpegs in patches.items()]


def _copy(file: str) -> Callable[[Project, Path], Path]:
    """Copies a file or folder of the project."""

    def make(project: Project, folder: Path) -> Path:
        source = getattr(project, file)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        return Path(copy(source, folder / source.name))

    return make


def _of_run(name: str) -> Callable[[Project, Path], Path]:
    """Copies a run folder; a file of it is damaged."""

    def make(project: Project, folder: Path) -> Path:
        shutil.copytree(project.run, folder / "run")
        return folder / "run" / name

    return make


def _text(name: str, text: str) -> Callable[[Project, Path], Path]:
    """Writes a small text file."""

    def make(project: Project, folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def _foreign(kind: str) -> Callable[[Project, Path], Path]:
    return lambda _, folder: foreign_features(folder / "features", kind)


def _exported(project: Project, folder: Path) -> Path:
    path = folder.parent / "model.zip"
    if not path.is_file():
        call("export", project.run, "--out", path)
    return Path(shutil.copy(path, folder / "model.zip"))


SPLIT_TABLE = "slide,split\n" + "".join(
    f"s{k},{split}\n" for k, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 3)
)
SPLIT_LISTS = (
    '{"train_names": ["s0", "s1", "s2", "s3"], "val_names": ["s4", "s5"], '
    '"test_names": ["s6", "s7", "s8"]}'
)
MPP_TABLE = "slide,mpp\ns0,0.5\ns1,0.25\ns2,4\n"
SPACE = "optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}\nhead.embed_dim: [64, 128]\n"

FORMATS = {
    "store": Format(_copy("store"), read_store, has_checksums=True),
    "store index": Format(lambda p, f: store_index(f, p), read_index, is_text=True),
    "features": Format(_copy("features"), read_features, has_checksums=True, may_hang=True),
    "features h5": Format(_foreign("h5"), read_features, may_hang=True),
    "features pt": Format(_foreign("pt"), read_features),
    "features npy": Format(_foreign("npy"), read_features),
    "slides": Format(_copy("new_slides"), partial(pack_and_read, option="--slides")),
    "images": Format(_copy("images"), partial(pack_and_read, option="--patches")),
    "coordinates": Format(
        lambda p, f: coords_files(f / "coords", p),
        partial(pack_and_read, option="--coords"),
        may_hang=True,
    ),
    "mpp table": Format(_text("mpp.csv", MPP_TABLE), read_mpp, is_text=True),
    "label table": Format(_copy("labels"), read_labels, is_text=True),
    "split table": Format(_text("splits.csv", SPLIT_TABLE), read_split_table, is_text=True),
    "split lists": Format(_text("split_0.json", SPLIT_LISTS), read_split_table, is_text=True),
    "cohort settings": Format(_copy("cohort"), read_cohort_settings, is_text=True),
    "search space": Format(_text("space.yaml", SPACE), read_space, is_text=True),
    "checkpoint": Format(_of_run("best.safetensors"), read_checkpoint, has_checksums=True),
    "run settings": Format(_of_run("settings.yaml"), read_run_of, is_text=True),
    "run task": Format(_of_run("task.json"), read_run_of, is_text=True),
    "run recipes": Format(_of_run("recipes.json"), read_run_of, is_text=True),
    "run predictions": Format(_of_run("predictions.csv"), read_run_of, is_text=True),
    "exported model": Format(_exported, read_export, has_checksums=True),
}
"""Name -> format."""
