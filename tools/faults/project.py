"""Small real inputs of every kind: slides, patches, a store, features, tables, a trained run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import tifffile
import torch
from PIL import Image

from e2e import cli
from e2e.errors import exit_code
from tools.faults.children import run

CLASSES = ("bright", "dark")
SPLITS = ("train",) * 4 + ("val",) * 2 + ("test",) * 3
WIDTH = 6
MODEL = (
    *("--model", "e2e_r18_abmilx", "encoder.name=test_resnet", "encoder.pretrained=false"),
    *(
        "encoder.weights=null",
        "head.embed_dim=16",
        "head.heads=2",
        "bag.patches=4",
        "bag.size=null",
    ),
    *(
        "optim.epochs=3",
        "optim.bags=2",
        "optim.lr=1e-3",
        "select.patience=null",
        "run.save_every=1",
    ),
    *("engine.device=cpu", "engine.chunk=6", "run.bootstrap=20", "run.heatmaps=1"),
)
"""A run of six updates, a checkpoint after each."""
PACK = ("--mpp", "4", "--patch-size", "32", "--workers", "0")
EXTRACT = ("--encoder", "test_resnet", "encoder.pretrained=false", "--device", "cpu")


@dataclass(frozen=True)
class Project:
    """The inputs; each property is a file or folder."""

    folder: Path

    @property
    def slides(self) -> Path:
        """Slides with labels."""
        return self.folder / "slides"

    @property
    def new_slides(self) -> Path:
        """Slides without labels."""
        return self.folder / "new_slides"

    @property
    def images(self) -> Path:
        """A folder of patches for each of three slides."""
        return self.folder / "images"

    @property
    def store(self) -> Path:
        """The slides, packed."""
        return self.folder / "slides.lmdb"

    @property
    def features(self) -> Path:
        """Their features, as ``e2e extract`` writes them."""
        return next(self.folder.glob("features/*/features_*"))

    @property
    def labels(self) -> Path:
        """The label table."""
        return self.folder / "labels.csv"

    @property
    def cohort(self) -> Path:
        """The YAML of the cohort."""
        return self.folder / "cohort.yaml"

    @property
    def run(self) -> Path:
        """A trained run."""
        return self.folder / "run"


def call(*words: object) -> int:
    """Run a command of ``e2e`` in this process, and return its exit code."""
    return exit_code(lambda: cli.run([str(word) for word in words]))


def digest(content: bytes) -> str:
    """Return a short digest, by which contents are compared."""
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def make_project(folder: Path) -> Project:
    """Make all inputs in a new folder."""
    project = Project(folder)
    for kind, names in (("slides", [f"s{k}" for k in range(9)]), ("new_slides", ["n0", "n1"])):
        (folder / kind).mkdir(parents=True)
        for number, name in enumerate(names):
            write_slide(folder / kind / f"{name}.tif", seed=number, dark=number % 2)
    for number in range(3):
        (folder / "images" / f"p{number}").mkdir(parents=True)
        for k in range(4):
            suffix = "jpg" if k % 2 else "png"
            path = folder / "images" / f"p{number}" / f"{32 * k}_{32 * number}.{suffix}"
            Image.fromarray(texture(32, seed=10 * number + k)).save(path)
    header = ["slide", "case", "split", "label"]
    rows = [[f"s{k}", f"c{k}", split, CLASSES[k % 2]] for k, split in enumerate(SPLITS)]
    project.labels.write_text(to_csv([header, *rows]))
    project.cohort.write_text(
        f"data: {{labels: {project.labels}, stores: [{project.store}]}}\n"
        f"task: {{name: classification, classes: [{', '.join(CLASSES)}]}}\n"
    )
    commands = (
        ("pack", "--slides", project.slides, "--out", project.store, *PACK),
        ("extract", "--stores", project.store, "--out", folder / "features", *EXTRACT),
        ("train", "--datasets", project.cohort, *MODEL, f"run.out={project.run}"),
    )
    for words in commands:
        ended = run(partial(call, *words), folder / "log")
        if ended.code:
            raise RuntimeError(f"e2e {words[0]} fails on undamaged inputs\n{ended.text}")
    return project


def write_slide(path: Path, *, seed: int, dark: int) -> None:
    """Write a tiled TIFF of 4 um per pixel with pink tissue on glass."""
    canvas = np.full((160, 192, 3), 243, np.uint8)
    shade = np.array([150, 70, 120]) if dark else np.array([210, 130, 180])
    canvas[32:-32, 32:-32] = np.clip(texture(192, seed)[32:128, 32:160] % 40 + shade - 20, 0, 255)
    with tifffile.TiffWriter(path) as out:
        out.write(
            canvas,
            tile=(64, 64),
            photometric="rgb",
            compression="deflate",
            metadata=None,
            resolution=(2500, 2500),
            resolutionunit="CENTIMETER",
        )


def texture(side: int, seed: int) -> np.ndarray:
    """Return a random image of blocks, which JPEG hardly changes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), np.uint8)
    return np.kron(coarse, np.ones((4, 4, 1), np.uint8))


def to_csv(rows: list[list[str]]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def foreign_features(folder: Path, kind: str) -> Path:
    """Write features of nine slides as other programs do: ``h5``, ``pt`` or ``npy`` files in a folder."""
    folder.mkdir()
    for k in range(len(SPLITS)):
        values = np.random.default_rng(k).normal(size=(3 + k, WIDTH)).astype(np.float32)
        path = folder / f"s{k}.{kind}"
        if kind == "h5":
            with h5py.File(path, "w") as file:
                file["features"] = values
                file["coords"] = np.stack([np.arange(3 + k) * 256, np.zeros(3 + k)], 1).astype(int)
        elif kind == "pt":
            torch.save(torch.from_numpy(values), path)
        else:
            np.save(path, values)
    return folder


def coords_files(folder: Path, project: Project) -> Path:
    """Write coordinates of every slide as TRIDENT does."""
    (folder / "patches").mkdir(parents=True)
    for slide in sorted(project.slides.glob("*.tif")):
        with h5py.File(folder / "patches" / f"{slide.stem}_patches.h5", "w") as file:
            coords = file.create_dataset("coords", data=np.array([[32, 32], [64, 32], [96, 64]]))
            coords.attrs.update(patch_size=32, patch_size_level0=32, level0_width=192)
            coords.attrs.update(level0_height=160, level0_magnification=2.5)
            coords.attrs.update(target_magnification=2.5, overlap=0, name=slide.stem)
    return folder


def store_index(folder: Path, project: Project) -> Path:
    """Write an index over one store file, as packing on a cluster does."""
    shutil.copy(project.store, folder / "all.host-0.lmdb")
    entry = {"file": "all.host-0.lmdb", "patches": 9, "slides": [f"s{k}" for k in range(9)]}
    index = {"format": "e2e patch store index", "version": 1, "recipe": {}, "stores": [entry]}
    path = folder / "all.stores.json"
    path.write_text(json.dumps(index, indent=1))
    return path
