"""Small TIFF slides, and what is in the store that they are packed into."""

import csv
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import tifffile

from e2e.store.lmdb import PatchStore
from e2e.store.sources import (
    SlideFiles,
)
from e2e.wsi.slide import find_slides
from e2e.wsi.tiling import Tiling
from tests.helpers.paths import ROOT

TOOL = ROOT / "tools" / "pack_lmdb.py"


TILING = Tiling(mpp=4, patch_px=32)


def write_slide(path, *, seed=0, size=(320, 256), mpp=4.0, tissue=True, resolution=True):
    """Pink tissue with texture on glass, 4 um a pixel, so that overviews are read from level 1."""
    rng = np.random.default_rng(seed)
    canvas = np.full((size[1], size[0], 3), 243, np.uint8)
    if tissue:
        left = 32 * int(rng.integers(1, 3))
        coarse = rng.integers(-25, 25, (size[1] // 4, size[0] // 4, 1), np.int16)
        texture = np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1)
        canvas[32:-32, left:-32] = (texture + np.array([200, 120, 170]))[32:-32, left:-32]
    with tifffile.TiffWriter(path) as out:
        for k, level in enumerate((canvas, canvas[::2, ::2])):
            tags = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
            out.write(
                level,
                tile=(64, 64),
                photometric="rgb",
                compression="deflate",
                subfiletype=1 if k else 0,
                metadata=None,
                **(tags if resolution else {}),
            )
    return canvas


def damage(path, tile):
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[tile], tiff.pages[0].databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xaa" * count)


def cohort(folder, count=3):
    folder.mkdir(exist_ok=True)
    for k in range(count):
        write_slide(folder / f"s{k}.tif", seed=k)
    return folder


def source(folder, tiling=TILING, **options):
    return SlideFiles(find_slides(folder), tiling, **options)


def contents(store):
    """Everything in a store, of a copy: LMDB opens a file once in a process."""
    copy = store.with_name(f"{store.stem}-copy-{len(list(store.parent.iterdir()))}.lmdb")
    shutil.copy(store, copy)
    opened = PatchStore(copy)
    found = {}
    for slide in opened.slides:
        record = opened.record(slide)
        assert not list(opened.find_damage(slide))
        fields = {k: v for k, v in vars(record).items() if k != "coords"}
        jpegs = opened.read(slide, range(record.num_patches))
        found[slide] = (fields, record.coords.tolist(), jpegs)
    return opened.recipe, found


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def run_tool(*arguments, **options):
    command = [sys.executable, "-W", "error", str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@dataclass(frozen=True)
class Jobs:
    """A source made of given jobs."""

    made: list

    def recipe(self):
        return {"source": "test"}

    def jobs(self):
        return self.made
