"""A source of patches: folders of image files, one for each slide."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from e2e.errors import DamagedDataError, UserError
from e2e.store.identity import identity_of_folder
from e2e.store.records import SlideRecord
from e2e.store.sources import Job, encode_jpeg
from e2e.wsi.tiling import coords_from_names, sizes_in_names

PATCH_SUFFIXES = (".jpg", ".jpeg", ".png")
PATCH_FORMATS = ("JPEG", "PNG")
"""What Pillow may take such a file for: its other readers are many and start programs."""
MAX_PATCH_PX = 8192
"""Largest side of a patch."""


@dataclass(frozen=True)
class PatchFolders:
    """Patches as image files, one folder per slide. JPEGs are stored as they are."""

    folder: Path
    """The parent of the slides' folders."""
    patch_px: int | None = None
    """Side in pixels to resize to; None stores patches as they are, all of the size of the first."""
    quality: int = 80
    """JPEG quality of PNGs and of what is resized."""
    mpp: float | None = None
    """Micrometres per pixel of the patches."""
    mpp_of: Mapping[str, float] = field(default_factory=dict)
    """Slide -> micrometres per pixel, where it differs from `mpp`."""

    @cached_property
    def stored_px(self) -> int:
        """`patch_px`, or the side of the first image that can be read."""
        if self.patch_px is not None:
            return self.patch_px
        for folder in self.slide_folders():
            for file in _list_images(folder):
                try:
                    with Image.open(file, formats=PATCH_FORMATS) as image:
                        if max(image.size) <= MAX_PATCH_PX:  # a header can claim any size
                            return image.width
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                    continue
        raise UserError(f"no readable .jpg or .png in the folders of {self.folder}")

    def recipe(self) -> dict[str, Any]:
        """Return how the images are stored."""
        return {
            "source": "patches",
            "mpp": self.mpp,
            "patch_px": self.stored_px,
            "resize": self.patch_px is not None,
            "quality": self.quality,
        }

    def jobs(self) -> list[Job]:
        """Return one job per folder."""
        px, resize = self.stored_px, self.patch_px is not None
        return [
            _FolderJob(folder, px, resize, self.quality, self.mpp_of.get(folder.name, self.mpp))
            for folder in self.slide_folders()
        ]

    def slide_folders(self) -> list[Path]:
        """Return the folders of the slides, sorted."""
        if not self.folder.is_dir():
            raise UserError(
                f"no folder {self.folder}\n  --patches takes one folder per slide: DIR/<slide>/*.jpg"
            )
        folders = sorted(f for f in self.folder.iterdir() if f.is_dir() and f.name[0] != ".")
        if not folders:
            raise UserError(
                f"no folder in {self.folder}\n"
                "  --patches takes one folder per slide: DIR/<slide>/*.jpg"
            )
        return folders


@dataclass(frozen=True)
class _FolderJob:
    """A slide as a folder of image files."""

    path: Path
    patch_px: int
    resize: bool
    quality: int
    mpp: float | None

    @property
    def slide(self) -> str:
        return self.path.name

    def identity(self) -> str:
        return identity_of_folder(_list_images(self.path), self.mpp)

    def remark(self, record: SlideRecord) -> str:
        stems = [file.stem for file in _list_images(self.path)]
        if coords_from_names(stems, self.slide, self.patch_px)[2]:
            return ""
        return (
            "coordinates are invented (patches side by side), because the file names do not give them; "
            "heatmaps show no places, and heads that use places must not be trained on it"
        )

    def plan(self, overview: Path) -> SlideRecord:
        files = _list_images(self.path)
        if not files:
            raise UserError(f"no .jpg or .png in {self.path}")
        stems = [file.stem for file in files]
        if sizes := sizes_in_names(stems):
            raise UserError(
                f"{self.path} mixes patches of several sizes, by their names: {', '.join(sizes)}\n"
                "  a bag holds patches of one magnification: give each size a folder and store of its own"
            )
        coords, level0_px, _ = coords_from_names(stems, self.slide, self.patch_px)
        return SlideRecord(
            slide=self.slide,
            num_patches=len(coords),
            coords=coords,
            level0_px=level0_px,
            mpp=self.mpp,
            patch_px=self.patch_px,
            width=0,
            height=0,
            source=self.path.name,
            source_bytes=sum(file.stat().st_size for file in files),
            identity=self.identity(),
        )

    def encode(self, part: SlideRecord, start: int) -> list[bytes]:
        files = _list_images(self.path)[start : start + part.num_patches]
        if len(files) != part.num_patches:
            raise DamagedDataError(f"{self.path} lost files while it was packed")
        return [self._encode_image(file) for file in files]

    def _encode_image(self, file: Path) -> bytes:
        try:
            data = file.read_bytes()
            image = Image.open(io.BytesIO(data), formats=PATCH_FORMATS)
            if max(image.size) > MAX_PATCH_PX:
                raise ValueError(f"{image.width}x{image.height} pixels are no patch")
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DamagedDataError(f"{file} cannot be read as an image: {error}") from error
        size = self.patch_px, self.patch_px
        if image.size != size and not self.resize:
            raise UserError(
                f"{file} has {image.width}x{image.height} pixels, but the store's patches have "
                f"{size[0]}x{size[1]}\n  give --patch-size PX to resize all to one size"
            )
        if image.size == size and image.format == "JPEG" and image.mode in ("RGB", "L"):
            return data
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = to_rgb(image, file)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return encode_jpeg(image, self.quality)


def to_rgb(image: Image.Image, file: Path) -> Image.Image:
    """Return an image with 8 bits a channel; of 16-bit grey values the upper 8 bits count.

    Raises
    ------
    DamagedDataError
        Its values have no known range.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DamagedDataError(
                f"{file}: grey values beyond 16 bits; save it with 8 bits a channel"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DamagedDataError(f"{file}: floating-point values; save it with 8 bits a channel")
    return image.convert("RGB")


def _list_images(folder: Path) -> tuple[Path, ...]:
    """Return the image files of a folder in natural order: 2 before 10."""
    return _list_images_as_of(folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _list_images_as_of(folder: Path, modified: int) -> tuple[Path, ...]:
    def natural_key(file: Path) -> list[tuple[int, str]]:
        return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", file.name)]

    files = (f for f in folder.iterdir() if f.suffix.lower() in PATCH_SUFFIXES and f.name[0] != ".")
    return tuple(sorted(files, key=natural_key))
