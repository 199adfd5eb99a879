"""The sources of patches: slides, and slides with coordinates of other tools.

A source lists jobs. A job is one slide with everything that a worker process needs to know about it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from e2e.errors import DamagedDataError, UserError, format_list
from e2e.store.coords import find_coords_files, read_coords
from e2e.store.identity import join_identity
from e2e.store.overview import draw_patches, read_overview
from e2e.store.records import SlideRecord
from e2e.wsi import tissue
from e2e.wsi.slide import WholeSlide
from e2e.wsi.tiling import Tiling, grid

MOSTLY_TISSUE = 0.95
"""Share of a slide above which its tissue is remarked on: most slides show more glass."""


class Job(Protocol):
    """One slide to pack. It is sent to worker processes, so it holds names and numbers only."""

    @property
    def slide(self) -> str:
        """Id of the slide."""
        ...

    @property
    def path(self) -> Path:
        """Its file or folder."""
        ...

    def identity(self) -> str:
        """Return what the patches are cut from, and the options of this slide alone, as one text.

        A slide in a store with another identity is not this slide, whatever its name. Empty if the file
        or folder cannot be read.
        """
        ...

    def remark(self, record: SlideRecord) -> str:
        """Return why there are no patches, or what is unusual about them; empty if nothing is.

        Parameters
        ----------
        record
            What :meth:`plan` returned.
        """
        ...

    def plan(self, overview: Path) -> SlideRecord:
        """Return the record of the slide, and write its overview.

        Parameters
        ----------
        overview : Path
            The PNG to write, see :func:`e2e.store.overview.draw_patches`.

        Raises
        ------
        UserError
            If the slide cannot be used.
        """
        ...

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        """Return JPEGs of some patches.

        Parameters
        ----------
        part : SlideRecord
            The record of these patches alone.
        start : int
            Index of the first of them in the slide.
        """
        ...


class Source(Protocol):
    """A set of slides that are packed in one way."""

    def recipe(self) -> dict[str, Any]:
        """Return how patches are made, for the header of the store: JSON values, no local paths."""
        ...

    def jobs(self) -> list[Job]:
        """Return one job per slide, in the order of packing."""
        ...


@dataclass(frozen=True)
class SlideFiles:
    """Slides that are cut on a grid of their tissue."""

    paths: Sequence[Path]
    """The slides."""
    tiling: Tiling
    """The grid."""
    quality: int = 80
    """JPEG quality."""
    mpp: Mapping[str, float] = field(default_factory=dict)
    """Slide id or file name -> micrometres per level-0 pixel, instead of what the file says."""

    def recipe(self) -> dict[str, Any]:
        """Return enough to cut a new slide in the same way, see :meth:`Tiling.from_recipe`."""
        return {
            "source": "slides",
            **self.tiling.recipe(),
            "quality": self.quality,
            "tissue_method": tissue.METHOD,
        }

    def jobs(self) -> list[Job]:
        """Return one job per file."""
        return [
            _GridJob(path, self.quality, _override(self.mpp, path), self.tiling)
            for path in self.paths
        ]


@dataclass(frozen=True)
class CoordsFiles:
    """Slides that are cut at the coordinates of CLAM or TRIDENT.

    Their files are named ``<slide>.h5`` or ``<slide>_patches.h5``.
    """

    folder: Path
    """The coordinate files, or their parent folder."""
    paths: Sequence[Path]
    """The slides."""
    patch_px: int | None = None
    """Side of the stored patches in pixels; None takes the ``patch_size`` of the files."""
    quality: int = 80
    """JPEG quality."""
    mpp: Mapping[str, float] = field(default_factory=dict)
    """As in :class:`SlideFiles`."""

    @cached_property
    def files(self) -> list[Path]:
        """The coordinate files."""
        return find_coords_files(self.folder)

    @cached_property
    def stored_px(self) -> int:
        """`patch_px`, or the size that all files have in common."""
        if self.patch_px is not None:
            return self.patch_px
        sizes: dict[int, Path] = {}
        for file in self.files:
            try:
                sizes.setdefault(read_coords(file).patch_px, file)
            except DamagedDataError:
                continue  # the job of this slide reports it
        if len(sizes) != 1:
            lines = format_list(f"{px} px, such as {file.name}" for px, file in sizes.items())
            raise UserError(
                f"the coordinates in {self.folder} have {len(sizes)} patch sizes, but a store has "
                f"one\n{lines}\n  give --patch-size PX to store all patches at one size"
            )
        return next(iter(sizes))

    def recipe(self) -> dict[str, Any]:
        """Return how the patches are stored; the grid is that of another tool."""
        return {"source": "coords", "patch_px": self.stored_px, "quality": self.quality}

    def jobs(self) -> list[Job]:
        """Return one job per slide, and one per coordinate file without a slide, which fails."""
        files = {file.stem: file for file in self.files}
        px = self.stored_px
        jobs: list[Job] = []
        for path in self.paths:
            file = files.pop(path.stem, None) or files.pop(f"{path.stem}_patches", None)
            jobs.append(_CoordsJob(path, self.quality, _override(self.mpp, path), px, file))
        for stem, file in files.items():
            jobs.append(_MissingSlideJob(stem.removesuffix("_patches"), file))
        return jobs


@dataclass(frozen=True)
class _SlideJob:
    """A job that reads its patches from a slide."""

    path: Path
    quality: int
    mpp: float | None

    @property
    def slide(self) -> str:
        return self.path.stem

    def open(self) -> WholeSlide:
        return _open_slide(self.path, self.mpp, self.path.stat().st_mtime_ns)

    def identity(self) -> str:
        return join_identity([self.path], self.mpp)

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        slide = self.open()
        pixels = (
            slide.read_patch(x, y, part.level0_px, part.patch_px) for x, y in part.require_coords()
        )
        return [encode_jpeg(Image.fromarray(patch), self.quality) for patch in pixels]

    def record(
        self, coords: NDArray[np.int32], level0_px: float, mpp: float | None, patch_px: int
    ) -> SlideRecord:
        slide = self.open()
        return SlideRecord(
            slide=self.slide,
            num_patches=len(coords),
            coords=coords,
            level0_px=level0_px,
            mpp=mpp,
            patch_px=patch_px,
            width=slide.width,
            height=slide.height,
            source=self.path.name,
            source_bytes=self.path.stat().st_size,
            identity=self.identity(),
        )


@dataclass(frozen=True)
class _GridJob(_SlideJob):
    tiling: Tiling

    def remark(self, record: SlideRecord) -> str:
        if not record.num_patches:
            return (
                "no patch with enough tissue; grey counts as background, look at the overview;"
                " --tissue 0 takes every patch"
            )
        share = record.num_patches / self.tiling.positions(
            record.width, record.height, record.level0_px
        )
        if self.tiling.tissue and share > MOSTLY_TISSUE:
            return "nearly all of it is taken for tissue: look at the overview"
        return ""

    def plan(self, overview: Path) -> SlideRecord:
        slide = self.open()
        level0_px = self.tiling.level0_px(slide.mpp)
        image, scale = read_overview(slide)
        mask = tissue.tissue_mask(image, slide.mpp * scale)
        coords = grid(mask, scale, slide.width, slide.height, slide.mpp, self.tiling)
        draw_patches(overview, image, scale, coords, level0_px, mask)
        return self.record(coords, level0_px, self.tiling.mpp, self.tiling.patch_px)


@dataclass(frozen=True)
class _CoordsJob(_SlideJob):
    patch_px: int
    file: Path | None

    def remark(self, record: SlideRecord) -> str:
        return "" if record.num_patches else f"no coordinates in {self.file or 'any file'}"

    def identity(self) -> str:
        return join_identity([self.path, *filter(None, [self.file])], self.mpp)

    def plan(self, overview: Path) -> SlideRecord:
        slide = self.open()
        if self.file is None:
            # CLAM writes no file for a slide without tissue.
            return self.record(np.zeros((0, 2), np.int32), 0.0, None, self.patch_px)
        patch_coords = read_coords(self.file)
        size = slide.width, slide.height
        is_outside = (patch_coords.coords < 0) | (patch_coords.coords >= size)
        if patch_coords.slide_size not in (None, size) or is_outside.any():
            raise DamagedDataError(
                f"{self.file} belongs to another slide: its coordinates or slide size do not fit "
                f"'{self.slide}', which has {size[0]} x {size[1]} level-0 pixels"
            )
        coords, level0_px = patch_coords.coords.astype(np.int32), patch_coords.level0_px
        mpp = slide.mpp * level0_px / self.patch_px
        image, scale = read_overview(slide)
        draw_patches(overview, image, scale, coords, level0_px, None)
        return self.record(coords, level0_px, mpp, self.patch_px)


@dataclass(frozen=True)
class _MissingSlideJob:
    """A coordinate file whose slide is missing."""

    slide: str
    path: Path

    def identity(self) -> str:
        return ""

    def remark(self, record: SlideRecord) -> str:
        raise NotImplementedError

    def plan(self, overview: Path) -> SlideRecord:
        raise UserError(f"{self.path} has coordinates, but --slides has no slide '{self.slide}'")

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        raise NotImplementedError


def _override(mpp: Mapping[str, float], path: Path) -> float | None:
    """Return the resolution given for a slide by its id or its file name."""
    return mpp.get(path.stem, mpp.get(path.name))


@lru_cache(maxsize=2)
def _open_slide(path: Path, mpp: float | None, modified: int) -> WholeSlide:
    # Two, because at the end of a slide a worker alternates with the next one. More would keep as many
    # caches of OpenSlide in memory.
    return WholeSlide(path, mpp=mpp)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode an RGB image as JPEG with 4:2:0 chroma; the same pixels give the same bytes.

    Parameters
    ----------
    image : Image
        The image.
    quality : int
        1 to 100.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
