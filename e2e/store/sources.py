"""What a store can be made from: slides, other tools' coordinates on slides, folders of patches.

A source makes jobs; a job is one slide, and what a worker process has to know of it.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage.morphology import erosion

from e2e.errors import DamagedDataError, UserError, format_list
from e2e.files import write_atomically
from e2e.store.records import SlideRecord
from e2e.wsi import tissue
from e2e.wsi.slide import WholeSlide
from e2e.wsi.tiling import Tiling, coords_from_names, grid

LONGEST_OVERVIEW = 4096
"""Pixels; bounds the memory of the tissue mask on the largest slides."""

PICTURE_PX = (640, 1280)
"""Longest side of the picture that shows mask and grid, at least and at most."""

PATCH_SUFFIXES = (".jpg", ".jpeg", ".png")


class Job(Protocol):
    """One slide to pack. Travels to worker processes, so it holds names and numbers only."""

    @property
    def slide(self) -> str:
        """The slide's id."""
        ...

    @property
    def path(self) -> Path:
        """Its file or folder."""
        ...

    def plan(self, picture: Path) -> SlideRecord:
        """Where its patches lie; writes ``picture``. UserError when the slide cannot be used."""
        ...

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        """JPEGs of ``part.coords``, which are the slide's from index ``start`` on."""
        ...


class Source(Protocol):
    """A set of slides that are packed in one way."""

    def recipe(self) -> dict[str, Any]:
        """How patches are made, for the store's header: JSON values, nothing of this machine."""
        ...

    def jobs(self) -> list[Job]:
        """One for each slide, in the order of packing."""
        ...


@dataclass(frozen=True)
class SlideFiles:
    """Slides that are cut by a grid of ours."""

    paths: Sequence[Path]
    tiling: Tiling
    quality: int = 80
    mpp: Mapping[str, float] = field(default_factory=dict)
    """Slide id or file name -> um per level-0 pixel, instead of what the file says."""

    def recipe(self) -> dict[str, Any]:
        """Enough to cut a new slide in the same way: see ``Tiling.from_recipe``."""
        return {
            "source": "slides",
            **self.tiling.recipe(),
            "quality": self.quality,
            "tissue_method": tissue.METHOD,
        }

    def jobs(self) -> list[Job]:
        """One for each file."""
        return [
            _CutSlide(path, self.quality, _override(self.mpp, path), self.tiling)
            for path in self.paths
        ]


@dataclass(frozen=True)
class CoordsFiles:
    """Slides cut where CLAM or TRIDENT chose to: ``<slide>.h5`` or ``<slide>_patches.h5``."""

    folder: Path
    paths: Sequence[Path]
    """The slides."""
    patch_px: int | None = None
    """Side of the stored patches; None takes the files' own ``patch_size``."""
    quality: int = 80
    mpp: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def files(self) -> list[Path]:
        """The coordinate files of ``folder``, or of its subfolder ``patches``."""
        for folder in (self.folder, self.folder / "patches"):
            found = sorted(folder.glob("*.h5"))
            if found:
                return found
        raise UserError(
            f"no .h5 file in {self.folder} or {self.folder / 'patches'}\n"
            "  --coords wants the folder 'patches' that CLAM or TRIDENT wrote"
        )

    @cached_property
    def stored_px(self) -> int:
        """``patch_px``, or the one size all files agree on."""
        if self.patch_px is not None:
            return self.patch_px
        sizes: dict[int, Path] = {}
        for file in self.files:
            try:
                sizes.setdefault(read_coords(file).patch_px, file)
            except DamagedDataError:
                continue  # its own job reports it
        if len(sizes) != 1:
            found = format_list(f"{px} px, for one {file.name}" for px, file in sizes.items())
            raise UserError(
                f"the coordinates in {self.folder} have {len(sizes)} patch sizes, and a store has "
                f"one: give it with --patch-size\n{found}"
            )
        return next(iter(sizes))

    def recipe(self) -> dict[str, Any]:
        """The grid is another tool's, so only what we did to its patches."""
        return {"source": "coords", "patch_px": self.stored_px, "quality": self.quality}

    def jobs(self) -> list[Job]:
        """One for each slide; a slide without coordinates, or the reverse, fails when planned."""
        coords = {file.stem: file for file in self.files}
        px = self.stored_px
        made: list[Job] = []
        for path in self.paths:
            file = coords.pop(path.stem, None) or coords.pop(f"{path.stem}_patches", None)
            made.append(_CutAtCoords(path, self.quality, _override(self.mpp, path), px, file))
        for stem, file in coords.items():
            made.append(_NoSlide(stem.removesuffix("_patches"), file))
        return made


@dataclass(frozen=True)
class PatchFolders:
    """Patches that lie as image files in one folder a slide. JPEGs are stored as they are."""

    folder: Path
    patch_px: int | None = None
    """Resize to this; None stores the patches as they are, all of the first one's size."""
    quality: int = 80
    """Of the PNGs and of what is resized."""
    mpp: float | None = None
    mpp_of: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def stored_px(self) -> int:
        """``patch_px``, or the side of the first image that can be read."""
        if self.patch_px is not None:
            return self.patch_px
        for folder in self._folders():
            for file in _images(folder):
                try:
                    with Image.open(file) as image:
                        return image.width
                except (OSError, SyntaxError, ValueError):
                    continue
        raise UserError(f"no readable .jpg or .png in the folders of {self.folder}")

    def recipe(self) -> dict[str, Any]:
        """What was done to the files."""
        return {
            "source": "patches",
            "mpp": self.mpp,
            "patch_px": self.stored_px,
            "resize": self.patch_px is not None,
            "quality": self.quality,
        }

    def jobs(self) -> list[Job]:
        """One for each folder."""
        px, resize = self.stored_px, self.patch_px is not None
        return [
            _PatchFolder(folder, px, resize, self.quality, self.mpp_of.get(folder.name, self.mpp))
            for folder in self._folders()
        ]

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            raise UserError(f"no folder {self.folder}: --patches wants DIR/<slide>/*.jpg")
        found = sorted(f for f in self.folder.iterdir() if f.is_dir() and f.name[0] != ".")
        if not found:
            raise UserError(
                f"no folder in {self.folder}: --patches wants one folder a slide, DIR/<slide>/*.jpg"
            )
        return found


@dataclass(frozen=True)
class _OnSlide:
    """What the two jobs that read pixels from a slide share."""

    path: Path
    quality: int
    mpp: float | None

    @property
    def slide(self) -> str:
        return self.path.stem

    def open(self) -> WholeSlide:
        return _open_slide(self.path, self.mpp, self.path.stat().st_mtime_ns)

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        slide = self.open()
        pixels = (slide.read_patch(x, y, part.level0_px, part.patch_px) for x, y in part.places)
        return [jpeg(Image.fromarray(p), self.quality) for p in pixels]

    def record(
        self, coords: NDArray[np.int32], level0_px: float, mpp: float | None, patch_px: int
    ) -> SlideRecord:
        slide = self.open()
        return SlideRecord(
            slide=self.slide,
            coords=coords,
            level0_px=level0_px,
            mpp=mpp,
            patch_px=patch_px,
            width=slide.width,
            height=slide.height,
            source=self.path.name,
            source_bytes=self.path.stat().st_size,
        )


@dataclass(frozen=True)
class _CutSlide(_OnSlide):
    tiling: Tiling

    def plan(self, picture: Path) -> SlideRecord:
        slide = self.open()
        level0_px = self.tiling.level0_px(slide.mpp)
        overview, scale = _overview(slide)
        mask = tissue.tissue_mask(overview, slide.mpp * scale)
        coords = grid(mask, scale, slide.width, slide.height, slide.mpp, self.tiling)
        draw(picture, overview, scale, coords, level0_px, mask)
        return self.record(coords, level0_px, self.tiling.mpp, self.tiling.patch_px)


@dataclass(frozen=True)
class _CutAtCoords(_OnSlide):
    patch_px: int
    file: Path | None

    def plan(self, picture: Path) -> SlideRecord:
        slide = self.open()
        if self.file is None:
            # CLAM writes no file for a slide it found no tissue on.
            return self.record(np.zeros((0, 2), np.int32), 0.0, None, self.patch_px)
        found = read_coords(self.file)
        size = slide.width, slide.height
        outside = (found.coords < 0) | (found.coords >= size)
        if found.size not in (None, size) or outside.any():
            raise DamagedDataError(
                f"{self.file} belongs to another slide: its places do not lie on '{self.slide}', "
                f"which has {size[0]} x {size[1]} level-0 pixels"
            )
        coords = found.coords.astype(np.int32)
        mpp = slide.mpp * found.level0_px / self.patch_px
        overview, scale = _overview(slide)
        draw(picture, overview, scale, coords, found.level0_px, None)
        return self.record(coords, found.level0_px, mpp, self.patch_px)


@dataclass(frozen=True)
class _NoSlide:
    """Coordinates whose slide is missing."""

    slide: str
    path: Path

    def plan(self, picture: Path) -> SlideRecord:
        raise UserError(f"{self.path} has coordinates, but --slides has no slide '{self.slide}'")

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        raise NotImplementedError


@dataclass(frozen=True)
class _PatchFolder:
    path: Path
    patch_px: int
    resize: bool
    quality: int
    mpp: float | None

    @property
    def slide(self) -> str:
        return self.path.name

    def plan(self, picture: Path) -> SlideRecord:
        files = _images(self.path)
        if not files:
            raise UserError(f"no .jpg or .png in {self.path}")
        stems = [file.stem for file in files]
        coords, level0_px = coords_from_names(stems, self.slide, self.patch_px)
        return SlideRecord(
            slide=self.slide,
            coords=coords,
            level0_px=level0_px,
            mpp=self.mpp,
            patch_px=self.patch_px,
            width=0,
            height=0,
            source=self.path.name,
            source_bytes=sum(file.stat().st_size for file in files),
        )

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        files = _images(self.path)[start : start + part.count]
        if len(files) != part.count:
            raise DamagedDataError(f"{self.path} lost files while it was packed")
        return [self._jpeg(file) for file in files]

    def _jpeg(self, file: Path) -> bytes:
        try:
            data = file.read_bytes()
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DamagedDataError(f"{file} cannot be read as an image: {error}") from error
        size = self.patch_px, self.patch_px
        if image.size != size and not self.resize:
            raise UserError(
                f"{file} has {image.width}x{image.height} pixels, and the store's patches have "
                f"{size[0]}x{size[1]}; --patch-size resizes all to one size"
            )
        if image.size == size and image.format == "JPEG" and image.mode in ("RGB", "L"):
            return data
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return jpeg(image, self.quality)


@dataclass(frozen=True)
class Coords:
    """What a coordinate file of another tool says."""

    coords: NDArray[np.int64]
    """(N, 2) level-0 x, y."""
    level0_px: float
    patch_px: int
    """Side of the patches at the magnification the tool was asked for."""
    size: tuple[int, int] | None
    """Of the slide at level 0, where the tool wrote it down."""


def read_coords(file: Path) -> Coords:
    """Read patch places from CLAM's or TRIDENT's HDF5.

    CLAM's ``patch_size`` is in pixels of ``patch_level``, whose ``downsample`` is in the file;
    TRIDENT's is at the target magnification, with ``patch_size_level0`` beside it.

    Raises:
        DamagedDataError: not HDF5, no ``coords``, or attributes of neither tool.
    """
    try:
        with h5py.File(file) as h5:
            found = h5["coords"]
            coords = np.asarray(found)
            attrs: dict[str, Any] = dict(found.attrs)
    except (OSError, KeyError) as error:
        raise DamagedDataError(f"{file} holds no readable dataset 'coords': {error}") from error
    try:
        patch_px = int(attrs["patch_size"])
        if "patch_size_level0" in attrs:
            level0_px = float(int(attrs["patch_size_level0"]))
        else:
            downsample = float(np.ravel(attrs["downsample"])[0])
            level0_px = patch_px * downsample * float(attrs.get("custom_downsample", 1))
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedDataError(
            f"{file}: the attributes of 'coords' are neither CLAM's nor TRIDENT's ({error})\n"
            f"  it has: {', '.join(sorted(attrs)) or 'none'}"
        ) from error
    coords = coords.reshape(0, 2) if coords.size == 0 else coords
    if coords.ndim != 2 or coords.shape[1] != 2 or level0_px < 1 or patch_px < 1:
        raise DamagedDataError(
            f"{file}: coords of shape {coords.shape} with patches of {patch_px} px "
            f"({level0_px:g} at level 0) make no sense"
        )
    # TRIDENT writes the text "None" for what it does not know.
    written = [str(attrs.get(f"level0_{side}")) for side in ("width", "height")]
    size = (int(written[0]), int(written[1])) if all(map(str.isdigit, written)) else None
    return Coords(coords.astype(np.int64), level0_px, patch_px, size)


def read_mpp(table: Path) -> dict[str, float]:
    """Slide id (or file name) -> um per level-0 pixel, from a CSV with columns slide,mpp.

    Raises:
        UserError: no such file, other columns, a slide twice, or what is no length in um.
    """
    try:
        rows = list(csv.DictReader(table.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the --mpp-override table {table}: {error}") from error
    if not rows or not {"slide", "mpp"} <= rows[0].keys():
        found = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise UserError(f"{table} wants the columns slide,mpp and a row a slide; it has {found}")
    mpp: dict[str, float] = {}
    for line, row in enumerate(rows, start=2):
        try:
            value = float(row["mpp"])
        except (TypeError, ValueError):
            value = 0.0
        if not 0 < value < 1000 or not row["slide"]:
            raise UserError(f"{table} line {line}: '{row['slide']}' has mpp '{row['mpp']}'")
        if row["slide"] in mpp:
            raise UserError(f"{table} line {line}: slide '{row['slide']}' is there twice")
        mpp[row["slide"]] = value
    return mpp


def _override(mpp: Mapping[str, float], path: Path) -> float | None:
    return mpp.get(path.stem, mpp.get(path.name))


@lru_cache(maxsize=2)
def _open_slide(path: Path, mpp: float | None, changed: int) -> WholeSlide:
    # Two, because at the end of a slide a worker goes back and forth with the next one. More
    # would keep as many of OpenSlide's caches in memory.
    return WholeSlide(path, mpp=mpp)


def _images(folder: Path) -> tuple[Path, ...]:
    """Image files of a folder, in natural order: 2 before 10."""
    return _listed(folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _listed(folder: Path, changed: int) -> tuple[Path, ...]:
    def natural(file: Path) -> list[tuple[int, str]]:
        return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", file.name)]

    found = (f for f in folder.iterdir() if f.suffix.lower() in PATCH_SUFFIXES and f.name[0] != ".")
    return tuple(sorted(found, key=natural))


def _overview(slide: WholeSlide) -> tuple[NDArray[np.uint8], float]:
    longest = max(slide.width, slide.height)
    wanted = max(1.0, tissue.OVERVIEW_MPP / slide.mpp)
    return slide.overview(min(LONGEST_OVERVIEW, math.ceil(longest / wanted)))


def jpeg(image: Image.Image, quality: int) -> bytes:
    """The RGB image as JPEG with 4:2:0 chroma; the same bytes for the same pixels."""
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def draw(
    path: Path,
    overview: NDArray[np.uint8],
    scale: float,
    coords: NDArray[np.int32],
    level0_px: float,
    mask: NDArray[np.bool_] | None,
) -> None:
    """Write the overview (``scale`` level-0 pixels a pixel) with tissue outlined, patches boxed."""
    longest = max(overview.shape[:2])
    zoom = max(1, PICTURE_PX[0] // longest) if longest <= PICTURE_PX[1] else PICTURE_PX[1] / longest
    size = round(overview.shape[1] * zoom), round(overview.shape[0] * zoom)
    image = Image.fromarray(overview).resize(size, Image.Resampling.BOX)
    if mask is not None:
        big = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        outline = big & ~erosion(big, np.ones((3, 3), bool))
        image.paste((0, 150, 0), mask=Image.fromarray(outline))
    pen = ImageDraw.Draw(image)
    for x, y in coords * (zoom / scale):
        side = level0_px * zoom / scale
        pen.rectangle((x, y, x + side, y + side), outline=(0, 60, 255))
    out = io.BytesIO()
    image.save(out, format="PNG")
    write_atomically(path, out.getvalue())
