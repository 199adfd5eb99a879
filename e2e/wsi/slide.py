"""Whole slides through OpenSlide: RGB patches and overviews, um per pixel, damage reported."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from e2e.errors import DamagedDataError, UserError, format_list

SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".vms", ".vmu"),
    *(".scn", ".svslide", ".bif", ".dcm", ".czi"),
)
"""What OpenSlide 4 reads, by file name."""

PLAUSIBLE_MPP = (0.02, 20.0)
"""um/px at level 0. TIFF writers leave 72 dpi (353 um/px) where they know nothing better."""

LEVEL_SLACK = 1.01
"""Pyramid levels are rounded to whole pixels: a level of 4.016 serves a wish of 4."""

BLOCK_PX = 2048
"""Side of what an overview reads at once: slides without a pyramid must not fill the memory."""


class WholeSlide:
    """One slide file, opened when first needed and once in each process.

    May be pickled and carried over a fork: only the file name travels. After an error
    OpenSlide's own handle is dead, so it is dropped and the next call opens a new one.

    Args:
        path: the slide's file (for MIRAX and Hamamatsu VMS the index file beside the data).
        mpp: um per level-0 pixel, instead of what the file says.
    """

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        self.path = Path(path)
        self._mpp = mpp
        self._handle: openslide.OpenSlide | None = None
        self._pid = 0

    @property
    def id(self) -> str:
        """The file name without its last suffix."""
        return self.path.stem

    @property
    def width(self) -> int:
        """Level-0 pixels."""
        return self._open().dimensions[0]

    @property
    def height(self) -> int:
        """Level-0 pixels."""
        return self._open().dimensions[1]

    @property
    def mpp(self) -> float:
        """um per level-0 pixel: the override, or what the file says.

        Raises:
            UserError: the file does not say, or cannot be believed.
        """
        return self._mpp if self._mpp is not None else _stated_mpp(self._open(), self.path)

    def read_patch(self, x: int, y: int, level0_px: float, patch_px: int) -> NDArray[np.uint8]:
        """The square at (x, y), ``level0_px`` level-0 pixels wide, as (patch_px, patch_px, 3) RGB.

        Read from the coarsest level that is no coarser than wanted, then reduced with an
        antialiasing filter. What lies outside the slide or was never scanned is white.

        Raises:
            DamagedDataError: OpenSlide cannot read the place.
        """
        return np.asarray(self._region(x, y, level0_px, level0_px, (patch_px, patch_px)))

    def overview(self, max_side: int) -> tuple[NDArray[np.uint8], float]:
        """The whole slide, its longer side at most ``max_side`` pixels, never magnified.

        Returns:
            (H, W, 3) uint8 and the level-0 pixels an overview pixel stands for, along both axes.
        """
        scale = max(1.0, max(self.width, self.height) / max_side)
        width, height = math.ceil(self.width / scale), math.ceil(self.height / scale)
        image = np.full((height, width, 3), 255, np.uint8)
        step = max(1, int(BLOCK_PX * self._downsample(scale)[1] / scale))
        for top in range(0, height, step):
            for left in range(0, width, step):
                size = min(step, width - left), min(step, height - top)
                block = self._region(
                    round(left * scale), round(top * scale), size[0] * scale, size[1] * scale, size
                )
                image[top : top + size[1], left : left + size[0]] = np.asarray(block)
        return image, scale

    def close(self) -> None:
        """Release the file; the next call opens it again."""
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        self._handle = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_mpp": self._mpp, "_handle": None, "_pid": 0}

    def _open(self) -> openslide.OpenSlide:
        # A handle from before a fork shares its file offset with the parent: both read rubbish.
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = _open(self.path), os.getpid()
        return self._handle

    def _downsample(self, wanted: float) -> tuple[int, float]:
        """The level to read for ``wanted`` level-0 pixels a pixel, and its own downsample."""
        levels = self._open().level_downsamples
        level = max(i for i, d in enumerate(levels) if i == 0 or d <= wanted * LEVEL_SLACK)
        return level, levels[level]

    def _region(
        self, x: int, y: int, width: float, height: float, size: tuple[int, int]
    ) -> Image.Image:
        """The box at (x, y), ``width`` x ``height`` level-0 pixels, as RGB of ``size`` (w, h)."""
        level, downsample = self._downsample(min(width / size[0], height / size[1]))
        # Within a thousandth of a pixel of a whole number nothing is gained by resampling.
        box = round(width / downsample, 3), round(height / downsample, 3)
        whole = math.ceil(box[0]), math.ceil(box[1])
        try:
            rgba = self._open().read_region((int(x), int(y)), level, whole)
        except openslide.OpenSlideError as error:
            self.close()
            raise DamagedDataError(
                f"slide '{self.id}' cannot be read at x={x}, y={y} (level 0), level {level}: "
                f"{error}\n  file: {self.path}"
            ) from error
        rgb = _on_white(rgba)
        if rgb.size == size and box == size:
            return rgb
        return rgb.resize(size, Image.Resampling.BICUBIC, box=(0, 0, *box))


def find_slides(folder: Path) -> list[Path]:
    """All slides under ``folder``, sorted by path; links to folders are followed.

    Files are told by their suffix. The files of one DICOM series are one slide: the first by name.

    Raises:
        UserError: no such folder, no slide in it, or two files with one slide id.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --slides wants the folder that holds the slides")
    paths = _one_per_series(_walk(folder))
    if not paths:
        raise UserError(
            f"no slide in {folder} or the folders below\n"
            f"  looked for: {' '.join(SUFFIXES)}\n"
            "  folders of JPEG or PNG patches are read with --patches"
        )
    by_id: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_id[path.stem].append(path)
    twice = [f"{slide}: {', '.join(map(str, p))}" for slide, p in by_id.items() if len(p) > 1]
    if twice:
        raise UserError(
            f"{len(twice)} slide ids (file names without suffix) are taken by more than one file "
            f"under {folder}; rename or remove one of each\n{format_list(twice)}"
        )
    return paths


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link that leads back up would be walked for ever.
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # "._slide.svs" is what macOS leaves on foreign disks, not a slide.
        names = (f for f in files if not f.startswith(".") and f.lower().endswith(SUFFIXES))
        found += [Path(root, name) for name in names]
    return sorted(found)


def _one_per_series(paths: list[Path]) -> list[Path]:
    """Drop the further files of a DICOM series; a file that does not open stays, to be reported."""
    series: set[str] = set()
    kept = []
    for path in paths:
        if path.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(path) as slide:
                    uid = slide.properties.get("dicom.SeriesInstanceUID", str(path))
            except (openslide.OpenSlideError, OSError):
                uid = str(path)
            if uid in series:
                continue
            series.add(uid)
        kept.append(path)
    return kept


def _open(path: Path) -> openslide.OpenSlide:
    if not path.is_file():
        raise DamagedDataError(f"slide '{path.stem}': no file {path}")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise DamagedDataError(
            f"slide '{path.stem}' is in no format that OpenSlide knows: {path}\n"
            f"  it reads {' '.join(SUFFIXES)}; a plain JPEG or PNG must first become a tiled TIFF, "
            "and folders of patches are read with --patches"
        ) from error
    except openslide.OpenSlideError as error:
        raise DamagedDataError(
            f"slide '{path.stem}' cannot be opened: {error}\n  file: {path}"
        ) from error


def _on_white(rgba: Image.Image) -> Image.Image:
    """RGB of an RGBA region, transparent parts white."""
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _stated_mpp(handle: openslide.OpenSlide, path: Path) -> float:
    """um per level-0 pixel from the scanner's entry, or from the TIFF resolution tags."""
    properties = handle.properties
    remedy = (
        f"give it with --mpp-override CSV (columns slide,mpp; here '{path.stem},<um per pixel>')"
    )
    stated = _numbers(properties, "openslide.mpp-x", "openslide.mpp-y")
    if stated is None:
        resolution = _numbers(properties, "tiff.XResolution", "tiff.YResolution")
        unit_um = {"inch": 25_400.0, "centimeter": 10_000.0}.get(
            properties.get("tiff.ResolutionUnit", "")
        )
        if resolution is None or unit_um is None:
            objective = properties.get("openslide.objective-power")
            hint = f" (its objective is {objective}x)" if objective else ""
            raise UserError(f"slide '{path.stem}' does not say its um per pixel{hint}; {remedy}")
        stated = unit_um / resolution[0], unit_um / resolution[1]
    x, y = stated
    if not all(PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] for mpp in stated):
        raise UserError(
            f"slide '{path.stem}' says {x:g} x {y:g} um per pixel, which no slide scanner has; "
            f"{remedy}"
        )
    if max(x, y) > 1.1 * min(x, y):
        raise UserError(
            f"slide '{path.stem}' says {x:g} um per pixel across and {y:g} down: pixels of a slide "
            f"are square, so one is wrong; {remedy}"
        )
    return math.sqrt(x * y)


def _numbers(properties: Mapping[str, str], *names: str) -> tuple[float, float] | None:
    """Two positive finite numbers from OpenSlide's text properties; None where one is missing."""
    found = []
    for name in names:
        try:
            found.append(float(properties[name]))
        except (KeyError, ValueError):
            return None
    return (found[0], found[1]) if all(0 < n < math.inf for n in found) else None
