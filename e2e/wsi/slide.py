"""Read whole-slide images with OpenSlide: RGB patches, overviews and micrometres per pixel."""

from __future__ import annotations

import glob
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
"""File names of the formats that OpenSlide 4 reads."""

OTHER_SUFFIXES = (
    *(".qptiff", ".vsi", ".isyntax", ".i2syntax", ".mds", ".mdsx", ".kfb", ".kfbf", ".sdpc"),
    *(".tmap", ".tron", ".afi", ".lif", ".zvi", ".jp2", ".j2k", ".ome.zarr"),
)
"""File names of slides in formats that OpenSlide does not read, or not under this name."""

PLAUSIBLE_MPP = (0.02, 20.0)
"""Range of um/px at level 0. TIFF writers put 72 dpi (353 um/px) if they do not know the resolution."""

OME_UNITS = {"um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
"""Unit of lengths in OME-XML -> micrometres; the letter before m has two Unicode forms."""

LEVEL_SLACK = 1.01
"""Pyramid levels are rounded to whole pixels: a level of 4.016 is used for a downsample of 4."""

BLOCK_PX = 2048
"""Side of the blocks an overview is read in, so that slides without a pyramid do not fill the memory."""


class WholeSlide:
    """A slide file, opened when first needed, once in each process.

    It can be pickled and used after a fork: only the file name is carried over. After an error the
    handle of OpenSlide is unusable, so it is dropped and the next call opens a new one.

    Parameters
    ----------
    path
        The slide's file (for MIRAX and Hamamatsu VMS the index file beside the data).
    mpp
        Micrometres per level-0 pixel, in place of what the file says.
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
        """Width in level-0 pixels."""
        return self._open().dimensions[0]

    @property
    def height(self) -> int:
        """Height in level-0 pixels."""
        return self._open().dimensions[1]

    @property
    def mpp(self) -> float:
        """Micrometres per level-0 pixel: the override, or what the file says.

        Raises
        ------
        UserError
            The file does not say, or its value is implausible.
        """
        return self._mpp if self._mpp is not None else _stated_mpp(self._open(), self.path)

    def read_patch(self, x: int, y: int, level0_px: float, patch_px: int) -> NDArray[np.uint8]:
        """Read a square patch.

        It is read from the coarsest level that is fine enough, then reduced with an antialiasing
        filter. What is outside the slide or was not scanned is white.

        Parameters
        ----------
        x, y
            Upper left corner in level-0 pixels.
        level0_px
            Side in level-0 pixels.
        patch_px
            Side of the result in pixels.

        Returns
        -------
        ndarray of uint8
            (patch_px, patch_px, 3) RGB.

        Raises
        ------
        DamagedDataError
            OpenSlide cannot read the patch.
        """
        return np.asarray(self._region(x, y, level0_px, level0_px, (patch_px, patch_px)))

    def overview(self, max_side: int) -> tuple[NDArray[np.uint8], float]:
        """Read the whole slide at a low resolution; it is never magnified.

        Parameters
        ----------
        max_side
            Maximum of the longer side in pixels.

        Returns
        -------
        image : ndarray of uint8
            (H, W, 3) RGB.
        scale : float
            Level-0 pixels per pixel of the overview, along both axes.

        Raises
        ------
        DamagedDataError
            OpenSlide cannot read a part of the slide.
        """
        scale = max(1.0, max(self.width, self.height) / max_side)
        width, height = math.ceil(self.width / scale), math.ceil(self.height / scale)
        image = np.full((height, width, 3), 255, np.uint8)
        step = max(1, int(BLOCK_PX * self._pick_level(scale)[1] / scale))
        for top in range(0, height, step):
            for left in range(0, width, step):
                size = min(step, width - left), min(step, height - top)
                block = self._region(
                    round(left * scale), round(top * scale), size[0] * scale, size[1] * scale, size
                )
                image[top : top + size[1], left : left + size[0]] = np.asarray(block)
        return image, scale

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        self._handle = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_mpp": self._mpp, "_handle": None, "_pid": 0}

    def _open(self) -> openslide.OpenSlide:
        # A handle opened before a fork shares its file offset with the parent, so both read garbage.
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = _open_handle(self.path), os.getpid()
        return self._handle

    def _pick_level(self, downsample: float) -> tuple[int, float]:
        """Return the level to read for ``downsample`` level-0 pixels per pixel, and its downsample."""
        levels = self._open().level_downsamples
        level = max(i for i, d in enumerate(levels) if i == 0 or d <= downsample * LEVEL_SLACK)
        return level, levels[level]

    def _region(
        self, x: int, y: int, width: float, height: float, size: tuple[int, int]
    ) -> Image.Image:
        """Read the box at (x, y), ``width`` x ``height`` level-0 pixels, as RGB of ``size`` (w, h)."""
        level, downsample = self._pick_level(min(width / size[0], height / size[1]))
        # Within a thousandth of a pixel of a whole number, resampling would change nothing.
        box = round(width / downsample, 3), round(height / downsample, 3)
        read_size = math.ceil(box[0]), math.ceil(box[1])
        try:
            rgba = self._open().read_region((int(x), int(y)), level, read_size)
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


def find_slides(*sources: Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """Find slides: files, all in folders and the folders below, or those that match a pattern.

    In a folder, slides are recognised by the suffix of the file; links to folders are followed. The files
    of one DICOM series are one slide, the first by name.

    Parameters
    ----------
    *sources
        Each a file, a folder, or a pattern such as ``slides/*.svs``.
    suffixes
        What the names of slides in folders end in; empty: any of :data:`SUFFIXES`.

    Returns
    -------
    list of Path
        The files, sorted by path.

    Raises
    ------
    UserError
        A source does not exist, there is no slide, or two files have the same slide id.
    """
    endings = tuple(suffix.lower() for suffix in suffixes or SUFFIXES)
    files = {file for source in sources for file in _files_of(source, endings)}
    paths = _one_per_series(sorted(files))
    names = ", ".join(map(str, sources))
    if not paths:
        unread = "".join(f"\n  {line}" for line in describe_unread(*sources))
        raise UserError(
            f"no slide in {names} or the folders below it{unread}\n"
            f"  looked for: {' '.join(endings)}\n"
            "  if it has JPEG or PNG patches, use --patches in place of --slides"
        )
    by_id: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_id[path.stem].append(path)
    repeated = {slide: files for slide, files in by_id.items() if len(files) > 1}
    if repeated:
        lines = [f"{slide}: {', '.join(map(str, files))}" for slide, files in repeated.items()]
        example = next(iter(repeated.values()))[0].suffix
        raise UserError(
            f"{len(repeated)} slide ids (file names without suffix) belong to more than one file in "
            f"{names}\n{format_list(lines)}\n"
            f"  choose by suffix, such as --suffix {example}, or rename or remove one of each"
        )
    return paths


def describe_unread(*sources: Path) -> list[str]:
    """Return a warning if folders hold slides in formats that OpenSlide does not read."""
    files = [
        f for source in sources if source.is_dir() for f in _list_files(source, OTHER_SUFFIXES)
    ]
    if not files:
        return []
    counts = Counter(file.suffix.lower() for file in files)
    shown = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    return [
        f"warning: {len(files)} file(s) are passed over, because OpenSlide does not read their format: "
        f"{shown}\n  convert them to tiled TIFF, for example with Bio-Formats or QuPath"
    ]


def _files_of(source: Path, endings: tuple[str, ...]) -> list[Path]:
    if source.is_dir():
        return _list_files(source, endings)
    if source.is_file():
        return [source]
    matches = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    if not matches:
        raise UserError(
            f"no slide, folder or matching file at {source.absolute()}\n"
            "  give a slide, a folder of slides, or a pattern in quotes, such as 'slides/*.svs'"
        )
    return [file for match in matches for file in _files_of(match, endings)]


def _list_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return the files in a folder and those below whose names, in lower case, end in one of ``endings``."""
    paths: list[Path] = []
    visited: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above would be followed for ever.
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        # "._slide.svs" is a file that macOS leaves on other disks, not a slide.
        names = (f for f in files if not f.startswith(".") and f.lower().endswith(endings))
        paths += [Path(root, name) for name in names]
    return sorted(paths)


def _one_per_series(paths: list[Path]) -> list[Path]:
    """Drop the further files of a DICOM series; a file that does not open stays, to be reported."""
    series: set[str] = set()
    slides = []
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
        slides.append(path)
    return slides


def _open_handle(path: Path) -> openslide.OpenSlide:
    if not path.is_file():
        raise DamagedDataError(f"slide '{path.stem}': no file {path}")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise DamagedDataError(
            f"slide '{path.stem}' has a format that OpenSlide does not know: {path}\n"
            f"  it reads {' '.join(SUFFIXES)}; convert a plain JPEG or PNG to a tiled TIFF first, or use "
            "--patches for folders of patches"
        ) from error
    except openslide.OpenSlideError as error:
        raise DamagedDataError(
            f"slide '{path.stem}' cannot be opened: {error}\n  file: {path}"
        ) from error


def _on_white(rgba: Image.Image) -> Image.Image:
    """Return an RGBA region as RGB, with transparent parts white."""
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _stated_mpp(handle: openslide.OpenSlide, path: Path) -> float:
    """Return um per level-0 pixel: the first plausible value of the scanner, the description or the tags."""
    properties = handle.properties
    remedy = (
        f"set it with --mpp-override FILE.csv (columns slide,mpp; row '{path.stem},<um per pixel>')"
    )
    description = properties.get("tiff.ImageDescription", "")
    values = [
        _read_numbers(properties, "openslide.mpp-x", "openslide.mpp-y"),
        _mpp_of_ome(description),
        _mpp_of_motic(description),
        _mpp_of_tags(properties),
    ]
    stated = [value for value in values if value is not None]
    if not stated:
        objective = properties.get("openslide.objective-power")
        hint = f" (its objective is {objective}x)" if objective else ""
        raise UserError(f"slide '{path.stem}' does not say its um per pixel{hint}\n  {remedy}")
    x, y = next(filter(_is_plausible, stated), stated[0])
    if not _is_plausible((x, y)):
        raise UserError(
            f"slide '{path.stem}' says {x:g} x {y:g} um per pixel, which is implausible for a slide "
            f"scanner\n  {remedy}"
        )
    if max(x, y) > 1.1 * min(x, y):
        raise UserError(
            f"slide '{path.stem}' says {x:g} um per pixel horizontally and {y:g} vertically, but pixels of "
            f"a slide are square\n  {remedy}"
        )
    return math.sqrt(x * y)


def _is_plausible(mpp: tuple[float, float]) -> bool:
    return all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in mpp)


def _mpp_of_ome(description: str) -> tuple[float, float] | None:
    """Return um per pixel of an OME-XML description: of its first image, which is the slide."""
    sizes = {}
    for axis in "XY":
        size = re.search(rf'\bPhysicalSize{axis}="([^"]+)"', description)
        unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]+)"', description)
        in_um = OME_UNITS.get(unit[1] if unit else "um")
        if size is None or in_um is None:
            return None
        sizes[axis] = (size[1], in_um)
    numbers = _read_numbers({axis: size for axis, (size, _) in sizes.items()}, "X", "Y")
    return numbers and (numbers[0] * sizes["X"][1], numbers[1] * sizes["Y"][1])


def _mpp_of_motic(description: str) -> tuple[float, float] | None:
    """Return um per pixel of a description of the form ``...|AppMag = 40|MPP = 0.257290``."""
    value = re.search(r"\|\s*MPP\s*=\s*([^|\s]+)", description)
    return _read_numbers({"mpp": value[1]}, "mpp", "mpp") if value else None


def _mpp_of_tags(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """Return um per pixel of the TIFF resolution tags."""
    resolution = _read_numbers(properties, "tiff.XResolution", "tiff.YResolution")
    unit = {"inch": 25_400.0, "centimeter": 10_000.0}.get(properties.get("tiff.ResolutionUnit", ""))
    if resolution is None or unit is None:
        return None
    return unit / resolution[0], unit / resolution[1]


def _read_numbers(properties: Mapping[str, str], *names: str) -> tuple[float, float] | None:
    """Return two positive finite numbers from OpenSlide's text properties; None if one is missing."""
    numbers = []
    for name in names:
        try:
            numbers.append(float(properties[name]))
        except (KeyError, ValueError):
            return None
    return (numbers[0], numbers[1]) if all(0 < n < math.inf for n in numbers) else None
