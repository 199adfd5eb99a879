"""Read frozen features in place, in the formats of TRIDENT, CLAM, STAMP and AEM, or as .pt and .npy.

:class:`FeatureFiles` reads all formats alike; :mod:`e2e.features.formats` says which file holds which
slide. Apart from the first file of a folder, a file is opened only when needed, and none stays open, so a
reader can be used in threads and copied over a fork.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import DamagedDataError, UserError, format_list
from e2e.features.arrays import (
    SlideArrays,
    as_rows,
    copy_floats,
    first_line,
    list_files,
    peek_h5,
    plain_values,
)
from e2e.features.formats import ENCODER_ATTRIBUTES, FEATURE_FORMATS, Layout
from e2e.memory import free_memory
from e2e.store.records import SlideReader, SlideRecord


class FeatureReader(SlideReader, Protocol):
    """A reader of the features of patches, such as :class:`FeatureFiles`."""

    @property
    def width(self) -> int:
        """Number of features of a patch, D."""
        ...

    def features(self, slide: str) -> Tensor:
        """Return the features of all patches of a slide.

        Returns
        -------
        Tensor, shape (N, D)
            On the CPU, float16 or float32.

        Raises
        ------
        DamagedDataError
            If they cannot be read, or are not finite.
        """
        ...

    def first_rows(self, slide: str, rows: int) -> NDArray[Any]:
        """Return at most the first `rows` features of a slide, (n, D)."""
        ...


def open_features(path: str | os.PathLike[str]) -> FeatureFiles:
    """Open the features of slides; the format is recognised by the content.

    Parameters
    ----------
    path : str or path-like
        A folder of TRIDENT, CLAM, STAMP or ``e2e extract``, a folder of ``.pt`` or ``.npy`` files
        named by slide, or an HDF5 file of AEM.

    Returns
    -------
    FeatureFiles
        A :class:`FeatureReader`: `slides` lists the slides, ``features(slide)`` gives a tensor (N, D),
        and ``record(slide)`` the coordinates of the patches.

    Raises
    ------
    UserError
        If the path does not exist, or its content fits no format, or several.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> folder = TemporaryDirectory()
    >>> np.save(f"{folder.name}/slide-1.npy", np.ones((3, 4), np.float32))
    >>> reader = open_features(folder.name)
    >>> reader.slides, reader.num_patches("slide-1"), reader.width
    (['slide-1'], 3, 4)
    >>> reader.features("slide-1").shape
    torch.Size([3, 4])
    >>> folder.cleanup()
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no features at {path}\n  make them with e2e extract")
    layouts = {name: FEATURE_FORMATS.build(name, path) for name in FEATURE_FORMATS.names()}
    matches = {name: layout for name, layout in layouts.items() if layout is not None}
    if len(matches) == 1:
        [(name, layout)] = matches.items()
        return FeatureFiles(path, layout, name)
    if matches:
        lines = [f"{name}: {len(layout.files)} slides" for name, layout in matches.items()]
        raise UserError(
            f"{path} holds features in {len(matches)} formats\n{format_list(lines)}\n"
            "  give a folder that holds one of them"
        )
    raise UserError(
        f"{path} holds features in no known format ({', '.join(FEATURE_FORMATS.names())})\n"
        f"  found: {_describe_content(path)}"
    )


class FeatureFiles:
    """Features of many slides, read in place, see :class:`FeatureReader`.

    Attributes
    ----------
    path : Path
        The file or folder.
    recipe : dict
        How the features were made, as far as the files say; JSON values only. ``format`` is always in
        it.

    Parameters
    ----------
    path : Path
        The file or folder.
    layout : Layout
        The files and what is in them.
    format : str
        Name of the format.
    """

    def __init__(self, path: Path, layout: Layout, format: str) -> None:
        self.path = path
        self.recipe: dict[str, Any] = {"format": format, **layout.recipe}
        self._layout = layout
        self._shapes: dict[str, tuple[int, int]] = {}  # of the slides that were opened
        self._reference: str | None = None  # the first of them that has patches
        self._records: dict[str, SlideRecord] = {}  # 8 bytes a patch; a file takes 1 ms to open

    @property
    def slides(self) -> list[str]:
        """Ids of the slides, sorted."""
        return sorted(self._layout.files)

    def __contains__(self, slide: str) -> bool:
        return slide in self._layout.files

    @property
    def width(self) -> int:
        """Number of features of a patch, D, from the first slide that has patches.

        :meth:`num_patches` compares every other slide with it.
        """
        fault: DamagedDataError | None = None
        for slide in self.slides if self._reference is None else [self._reference]:
            try:
                num_patches, width = self._shape(slide)
            except DamagedDataError as error:  # reported with all others when slides are matched
                fault = fault or error
                continue
            if num_patches:
                return width
        if fault is not None:
            raise fault
        raise UserError(f"none of the {len(self.slides)} slides in {self.path} has any patch")

    def num_patches(self, slide: str) -> int:
        """Return the number of patches of a slide, which may be 0.

        The features are not read, except from a TRIDENT ``.pt`` (a pickled array) and from a tensor
        saved before PyTorch 1.6.

        Raises
        ------
        DamagedDataError
            If the file cannot be read, or has another number of coords.
        UserError
            If the width differs from that of another slide, which the message names.
        """
        num_patches, width = self._shape(slide)
        other = self._reference or slide
        if num_patches and width != self._shapes[other][1]:
            raise UserError(
                f"features of different widths in {self.path}: slide '{other}' has "
                f"{self._shapes[other][1]}, slide '{slide}' has {width}\n"
                "  extract one of them again with the encoder of the other, or leave it out"
            )
        return num_patches

    def joined_slides(self, slide: str) -> list[str]:
        """See :class:`e2e.store.records.SlideReader`."""
        return [slide]

    def slide_records(self, slide: str) -> list[SlideRecord]:
        """See :class:`e2e.store.records.SlideReader`."""
        return [self.record(slide)]

    def record(self, slide: str) -> SlideRecord:
        """Return the record of a slide.

        STAMP's coords are in micrometres, and its files do not say how many level-0 pixels that is: they
        are returned in pixels of the patches themselves, as if that were level 0 (so is `mpp`).

        Raises
        ------
        DamagedDataError
            As :meth:`num_patches`; or if the coords are not finite.
        """
        if slide not in self._records:
            self._records[slide] = self._read_record(slide)
        return self._records[slide]

    def features(self, slide: str) -> Tensor:
        """Return the features of all patches of a slide.

        Returns
        -------
        Tensor, shape (N, D)
            On the CPU; float16 or float32 as stored, other types as float32.

        Raises
        ------
        DamagedDataError
            As :meth:`num_patches`; or if the slide has no patches, there are NaN or Inf (the message
            names the first row), or the last row is all zeros, as in a file that was not written to its
            end.
        """
        file = self._layout.files[slide]
        if not self.num_patches(slide):
            raise DamagedDataError(
                f"{file}: slide '{slide}' has no patches\n  leave the slide out of the label table"
            )
        num_bytes = 4 * math.prod(self._shape(slide))
        if num_bytes > file.stat().st_size and num_bytes > free_memory(torch.device("cpu")):
            raise DamagedDataError(
                f"{file}: features of slide '{slide}' claim {num_bytes:,} bytes, more than the free memory\n"
                "  extract the slide again, or use a machine with more memory"
            )
        with self._open_arrays(slide) as arrays:
            values = copy_floats(arrays.features[...])
        is_finite = np.isfinite(values).all(axis=1)
        if not is_finite.all():
            raise DamagedDataError(
                f"{file}: features of slide '{slide}' have NaN or Inf, first in row "
                f"{is_finite.argmin()} of {len(values)}\n"
                "  extract the slide again (in bf16 or fp32, if fp16 overflowed)"
            )
        if not values[-1].any():
            num_written = int(np.flatnonzero(values.any(axis=1)).max(initial=-1)) + 1
            raise DamagedDataError(
                f"{file}: features of slide '{slide}' are all zeros from row {num_written} of "
                f"{len(values)} on; the file may be incomplete\n"
                "  extract the slide again, or remove rows of padding"
            )
        return torch.from_numpy(values)

    def first_rows(self, slide: str, rows: int) -> NDArray[Any]:
        """Return the features of the first patches, without checking them.

        The other rows are not read, where the format allows.

        Returns
        -------
        ndarray, shape (min(rows, N), D)
            As :meth:`features`.
        """
        with self._open_arrays(slide) as arrays:
            return copy_floats(arrays.features[:rows])

    def _read_record(self, slide: str) -> SlideRecord:
        num_patches, file = self.num_patches(slide), self._layout.files[slide]
        with self._open_arrays(slide) as arrays:
            geometry = self._layout.geometry(arrays)
        source, source_bytes = file.name, file.stat().st_size
        if geometry is None:
            return SlideRecord(slide, num_patches, source=source, source_bytes=source_bytes)
        coords = np.rint(geometry.coords.reshape(num_patches, 2))
        if not np.all(np.abs(coords) < 2**31):  # NaN is not either
            raise DamagedDataError(
                f"{file}: coords of slide '{slide}' are not positions in pixels\n"
                "  extract the slide again"
            )
        return SlideRecord(
            slide=slide,
            num_patches=num_patches,
            coords=coords.astype(np.int32),
            level0_px=geometry.level0_px,
            mpp=geometry.mpp,
            patch_px=geometry.patch_px,
            width=geometry.width,
            height=geometry.height,
            source=source,
            source_bytes=source_bytes,
        )

    def _shape(self, slide: str) -> tuple[int, int]:
        """Return the number of patches and the width of a slide; it is opened once."""
        if slide not in self._shapes:
            self._shapes[slide] = self._read_shape(slide)
            if self._shapes[slide][0] and self._reference is None:
                self._reference = slide
        return self._shapes[slide]

    def _read_shape(self, slide: str) -> tuple[int, int]:
        with self._open_arrays(slide) as arrays:
            self._check_encoder(slide, arrays.attrs)
            shape = tuple(arrays.features.shape)
            coords_shape = None if arrays.coords is None else tuple(arrays.coords.shape)
        file = self._layout.files[slide]
        shape = (0, 0) if shape == (0,) else shape  # as TRIDENT writes an empty slide
        if len(shape) != 2:
            raise DamagedDataError(
                f"{file}: features of slide '{slide}' have the shape {shape}, need (patches, width)\n"
                "  extract one row per patch; one vector per slide cannot be used"
            )
        num_patches, width = shape
        if coords_shape not in (None, (num_patches, 2)) and (num_patches or 0 not in coords_shape):
            raise DamagedDataError(
                f"{file}: slide '{slide}' has {num_patches} features but coords of shape "
                f"{coords_shape}\n  extract the slide again: the position of each patch is unknown"
            )
        return num_patches, width

    def _check_encoder(self, slide: str, attrs: Mapping[str, Any]) -> None:
        for name in ENCODER_ATTRIBUTES:
            encoder = plain_values(attrs, (name,)).get(name)
            first = self.recipe.get(name)
            if encoder and first and encoder != first:
                raise UserError(
                    f"features of different encoders in {self.path}: {first} in the first file, "
                    f"{encoder} for slide '{slide}'\n"
                    "  extract them again with one encoder, or use a folder for each"
                )

    @contextmanager
    def _open_arrays(self, slide: str) -> Iterator[SlideArrays]:
        """Open the arrays of a slide; whatever reading them raises becomes a DamagedDataError."""
        try:
            with self._layout.open(slide) as arrays:
                coords = None if arrays.coords is None else as_rows(arrays.coords)
                yield arrays._replace(features=as_rows(arrays.features), coords=coords)
        except (
            MemoryError,
            OverflowError,
            RecursionError,
            SyntaxError,
            OSError,
            EOFError,
            LookupError,
            ValueError,
            TypeError,
            RuntimeError,
            AttributeError,
        ) as error:
            raise DamagedDataError(
                f"{self._layout.files[slide]}: features of slide '{slide}' cannot be read: "
                f"{first_line(error)}\n  copy the file again, or extract the slide again"
            ) from error


def _describe_content(path: Path) -> str:
    """Return what a path holds, in a few words."""
    if path.is_file():
        return f"one file, {path.name}; give its folder, unless it holds a group for each slide"
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir())
    h5_names, _ = peek_h5(list_files(path, ".h5").values())
    suffix = f"; in the .h5: {', '.join(sorted(h5_names))}" if h5_names else ""
    listing = ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])])
    return f"{listing}{suffix}" if listing else "an empty folder"
