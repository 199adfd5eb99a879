"""Patches for benches: real ones of a store or of slides, or drawn ones, and stores that repeat them."""

from __future__ import annotations

import argparse
import io
import mmap
import pickle
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch import Tensor

from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import LabelledSlide
from e2e.errors import UserError
from e2e.images.augment import Augment
from e2e.images.decode import build_decoder
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.pack import pack
from e2e.store.records import SlideRecord
from e2e.store.sources import SlideFiles
from e2e.wsi.tiling import Tiling

Pixels = Iterator[Tensor]
"""Chunk after chunk, (n,3,H,W) each."""


CPU = torch.device("cpu")


COLD_ROUNDS = 3
"""Rounds of cold reads, each of two slides that were not read before."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    patches: int = 1024
    """Patches of a timed round."""
    chunk: int = 256
    """Patches of a chunk; the default is that of ``engine.chunk``."""
    rounds: int = 9
    crop: float = 0.25
    """Minimum area fraction of the random resized crop, in measurements with one."""
    out: int = 224
    """Side of the patches after it, in pixels."""
    long: int = 50_000
    """Patches of the slide whose peak memory is measured."""
    cold_gib: float = 2.0
    """Minimum size of the store that is read cold."""
    cold_patches: int = 2000
    """Patches of each slide that is read cold."""
    decoder: str = "auto"


class Bench:
    """The patches, and stores of them in a temporary folder.

    Parameters
    ----------
    folder
        The temporary folder.
    jpegs
        Patches, repeated as often as needed.
    side
        Their side in pixels.
    sizes
        How much is measured.
    cores
        CPU cores that this program may use.
    """

    def __init__(
        self, folder: Path, jpegs: Sequence[bytes], side: int, sizes: Sizes, cores: Sequence[int]
    ) -> None:
        self.folder, self.side, self.sizes, self.cores = folder, side, sizes, cores
        self.unique_jpegs = jpegs
        self.jpegs = [jpegs[k % len(jpegs)] for k in range(sizes.patches)]

    @cached_property
    def store(self) -> PatchStore:
        """A store with one slide ``n<patches>``, the name that tools/bench/engine.py gives such a slide."""
        counts = {self.slide: self.sizes.patches}
        path = self.folder / "bench.lmdb"
        write_repeated(path, self.jpegs, counts, self.side)
        return PatchStore(path)

    @property
    def slide(self) -> str:
        """Name of the slide of ``store``."""
        return f"n{self.sizes.patches}"

    @cached_property
    def large(self) -> Path:
        """Path of a store of slide ``long`` and slides ``c0``, ``c1``, ... for cold reads.

        It is never opened in this process, which would keep pages of it in memory.
        """
        # LMDB gives a value of some KB whole pages, with 16 bytes before it.
        pages = [-(-(len(jpeg) + 16) // mmap.PAGESIZE) for jpeg in self.unique_jpegs]
        each = statistics.mean(pages) * mmap.PAGESIZE
        rest = self.sizes.cold_gib * 2**30 - each * self.sizes.long
        count = max(2 * COLD_ROUNDS, int(rest / each / self.sizes.cold_patches) + 1)
        counts = {"long": self.sizes.long}
        counts |= {f"c{k}": self.sizes.cold_patches for k in range(count)}
        path = self.folder / "large.lmdb"
        write_repeated(path, self.unique_jpegs, counts, self.side)
        return path

    @cached_property
    def published(self) -> Path:
        """Path of ``store`` in the ABMILX project's layout: keys slide-index, values pickled JPEG bytes."""
        path = self.folder / "published.lmdb"
        with (
            lmdb.open(str(path), subdir=False, map_size=1 << 40) as env,
            env.begin(write=True) as t,
        ):
            for index, jpeg in enumerate(self.jpegs):
                t.put(f"{self.slide}-{index}".encode(), pickle.dumps(jpeg))
        return path

    def starts(self) -> range:
        """First patch of each chunk."""
        return range(0, self.sizes.patches, self.sizes.chunk)

    def reader(
        self, augment: Augment | None = None, *, decoder: str | None = None, keep: str | None = None
    ) -> PixelRowReader:
        """Return the reader of training; without ``augment`` the patches are unchanged."""
        selected = build_decoder(decoder or self.sizes.decoder)
        return PixelRowReader(selected, augment=augment or Augment(flip="none"), keep=keep)


def read_jpegs(args: argparse.Namespace, folder: Path) -> tuple[list[bytes], str]:
    """Return JPEGs of ``args.size`` px and a text that says where they are from."""
    if args.store is None and args.slides is None:
        return drawn_jpegs(args.size), "drawn, not real tissue (give --store or --slides)"
    store = PatchStore(args.store) if args.store else cut_slides(args, folder)
    sides = {slide: store.record(slide).patch_px for slide in store.slides}
    fits = [slide for slide, side in sides.items() if side == args.size]
    if not fits:
        raise UserError(
            f"{store.path} has no patches of {args.size} px, but of {sorted(set(sides.values()))}\n"
            f"  give --size {max(sides.values())}"
        )
    jpegs = [jpeg for slide in fits for jpeg in store.read(slide, range(store.num_patches(slide)))]
    jpegs = jpegs[:4096]  # enough for the bench store, which repeats them
    return jpegs, f"{len(jpegs)} patches of {len(fits)} slides of {store.path.name}"


def cut_slides(args: argparse.Namespace, folder: Path) -> PatchStore:
    """Return a new store of ``args.slides``; UserError where one cannot be cut."""
    mpp_by_name = {path.name: args.slide_mpp for path in args.slides if args.slide_mpp}
    source = SlideFiles(args.slides, Tiling(patch_px=args.size), 80, mpp_by_name)
    report = pack(source, folder / "slides.lmdb", workers=0)
    if report.problems:
        row = report.problems[0]
        raise UserError(
            f"slide '{row.slide}' cannot be cut: {row.reason}\n"
            "  --slide-mpp gives um per level-0 pixel where files do not"
        )
    return PatchStore(report.out)


def drawn_jpegs(side: int) -> list[bytes]:
    """Return patches of the toy cohort's tissue as JPEGs."""
    from PIL import Image

    from e2e.toy.paint import SlideSpec, paint

    jpegs = []
    for number in range(2):
        spec = SlideSpec(f"bench_{number}", f"bench_{number}", "train", "normal")
        image = paint(spec, "micro", 1024, 0).image
        for y in range(0, 1025 - side, side):
            for x in range(0, 1025 - side, side):
                buffer = io.BytesIO()
                Image.fromarray(image[y : y + side, x : x + side]).save(buffer, "JPEG", quality=80)
                jpegs.append(buffer.getvalue())
    return sorted(jpegs, key=len)[len(jpegs) // 2 :]  # the smaller half may be background


def write_repeated(
    path: Path, jpegs: Sequence[bytes], counts: Mapping[str, int], side: int
) -> None:
    """Write a store of slides with ``counts`` patches each, which repeat ``jpegs``.

    Parameters
    ----------
    counts
        Slide -> number of patches.
    side
        Side of the patches in pixels.
    """
    with StoreWriter(path, {"mpp": 0.5, "patch_px": side}) as writer:
        for slide, count in counts.items():
            grid = np.stack(np.divmod(np.arange(count), 200), axis=1) * side
            record = SlideRecord(
                slide=slide,
                num_patches=count,
                coords=grid.astype(np.int32),
                level0_px=float(side),
                mpp=0.5,
                patch_px=side,
                width=200 * side,
                height=(count // 200 + 1) * side,
                source="repeated",
                source_bytes=0,
            )
            writer.add(record, (jpegs[k % len(jpegs)] for k in range(count)))


def item_of(store: PatchStore, slide: str) -> LabelledSlide:
    """Return the slide as the training loader takes it."""
    return LabelledSlide(Slide(slide, slide, "train", {}), store, torch.tensor(0))
