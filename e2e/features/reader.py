"""Frozen features as people have them: TRIDENT's, CLAM's, STAMP's and AEM's files, folders of .pt, .npy.

A format is one small function in :data:`FEATURE_FORMATS`. It looks at a path and says which file
holds which slide, or None where the path is none of its own. :class:`FeatureFiles` does the rest,
alike for all. No file is opened before it is needed, but for the first of a folder; none stays open,
so a store may be copied into threads and over a fork.
"""

from __future__ import annotations

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
from e2e.features.formats import (
    ENCODER,
    FEATURE_FORMATS,
    Entry,
    Layout,
    _files,
    _first_line,
    _glance,
    _numbers,
)
from e2e.store.records import PlacelessRecord, SlideReader, SlideRecord


class FeatureReader(SlideReader, Protocol):
    """A reader of frozen features: :class:`FeatureFiles`, or the features of a whole case."""

    @property
    def width(self) -> int:
        """Width D of the features."""
        ...

    def features(self, slide: str) -> Tensor:
        """Return the features of a slide, (N, D), float16 or float32 on the CPU."""
        ...

    def first_rows(self, slide: str, rows: int) -> NDArray[Any]:
        """Return at most the first ``rows`` features of a slide, (n, D)."""
        ...


def open_features(path: str | os.PathLike[str]) -> FeatureFiles:
    """The features at ``path``, in whichever format they are.

    Raises:
        UserError: nothing is there, or what is fits no format, or several.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no features at {path}\n  make them with launch/extract.py")
    found = {name: FEATURE_FORMATS.build(name, path) for name in FEATURE_FORMATS.names()}
    fits = {name: layout for name, layout in found.items() if layout is not None}
    if len(fits) == 1:
        [(name, layout)] = fits.items()
        return FeatureFiles(path, layout, name)
    if fits:
        lines = [f"{name}: {len(layout.files)} slides" for name, layout in fits.items()]
        raise UserError(
            f"{path} holds features in {len(fits)} formats\n{format_list(lines)}\n"
            "  name a folder that holds one of them"
        )
    raise UserError(
        f"{path} holds features in no known format ({', '.join(FEATURE_FORMATS.names())})\n"
        f"  found: {_described(path)}"
    )


class FeatureFiles:
    """Features of many slides, each (N, D), read in place. It can be copied into other processes.

    ``recipe`` holds what the files say of how the features were made, JSON values only; ``format``
    is always in it.
    """

    def __init__(self, path: Path, layout: Layout, format: str) -> None:
        self.path = path
        self.recipe: dict[str, Any] = {"format": format, **layout.recipe}
        self._layout = layout
        self._sizes: dict[str, tuple[int, int]] = {}  # rows and width of those that were looked at
        self._like: str | None = None  # the first of them that has patches
        self._records: dict[str, SlideRecord] = {}  # 8 bytes a patch; a file takes 1 ms to open

    @property
    def slides(self) -> list[str]:
        """Ids of the slides, sorted."""
        return sorted(self._layout.files)

    def __contains__(self, slide: str) -> bool:
        return slide in self._layout.files

    @property
    def width(self) -> int:
        """D, of the first slide that has patches; :meth:`count` holds every other slide to it."""
        for slide in self.slides if self._like is None else [self._like]:
            rows, width = self._size(slide)
            if rows:
                return width
        raise UserError(f"{self.path} has {len(self.slides)} slides, and none has any patch")

    def count(self, slide: str) -> int:
        """Number of patches, maybe 0; without reading the features, where the format allows.

        A TRIDENT ``.pt`` (a pickled array) and a tensor saved before PyTorch 1.6 must be read whole.

        Raises:
            DamagedDataError: the file cannot be read, or has another number of coords.
            UserError: the width differs from that of another slide, which is named.
        """
        rows, width = self._size(slide)
        other = self._like or slide
        if rows and width != self._sizes[other][1]:
            raise UserError(
                f"features of different widths in {self.path}: slide '{other}' has "
                f"{self._sizes[other][1]}, slide '{slide}' has {width}\n"
                "  they are not of one encoder: extract one of them again, or leave it out"
            )
        return rows

    def record(self, slide: str) -> SlideRecord:
        """What is known of the slide besides its features.

        STAMP's coords are in um, and nobody says how many pixels that is at level 0: they come in
        pixels of the patches themselves, as if that were level 0 (``mpp`` is theirs too).

        Raises:
            DamagedDataError: as :meth:`count`; or the coords are no places.
        """
        if slide not in self._records:
            self._records[slide] = self._read_record(slide)
        return self._records[slide]

    def _read_record(self, slide: str) -> SlideRecord:
        count, file = self.count(slide), self._layout.files[slide]
        with self._opened(slide) as entry:
            places = self._layout.places(entry)
        known: dict[str, Any] = {
            "slide": slide,
            "source": file.name,
            "source_bytes": file.stat().st_size,
        }
        if places is None:
            unknown = {"level0_px": 0.0, "mpp": None, "patch_px": 0, "width": 0, "height": 0}
            return PlacelessRecord(**known, **unknown, coords=None, patches=count)
        coords = np.rint(places.coords.reshape(count, 2))
        if not np.all(np.abs(coords) < 2**31):  # NaN is not either
            raise DamagedDataError(f"{file}: coords of slide '{slide}' are no places in pixels")
        return SlideRecord(**known, **places._replace(coords=coords.astype(np.int32))._asdict())

    def features(self, slide: str) -> Tensor:
        """(N, D) on the CPU: float16 or float32 as stored, anything else as float32.

        Raises:
            DamagedDataError: as :meth:`count`; no patches; NaN or Inf, with the first row that has it; zeros
                alone in the last row, as a file ends whose space was taken and not written.
        """
        file = self._layout.files[slide]
        if not self.count(slide):
            raise DamagedDataError(
                f"{file}: slide '{slide}' has no patches\n  leave the slide out of the label table"
            )
        with self._opened(slide) as entry:
            found = _numbers(entry.features[...])
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            raise DamagedDataError(
                f"{file}: features of slide '{slide}' have NaN or Inf, first in row {finite.argmin()} of "
                f"{len(found)}\n  extract the slide again (in bf16 or fp32, if fp16 overflowed)"
            )
        if not found[-1].any():
            written = int(np.flatnonzero(found.any(axis=1)).max(initial=-1)) + 1
            raise DamagedDataError(
                f"{file}: features of slide '{slide}' are zeros alone from row {written} of {len(found)} on: "
                "was the file written to its end?\n  extract the slide again, or cut off rows of filling"
            )
        return torch.from_numpy(found)

    def first_rows(self, slide: str, rows: int) -> NDArray[Any]:
        """(rows, D) at most, as :meth:`features` has them but not looked at for NaN; the rest is not read,
        where the format allows."""
        with self._opened(slide) as entry:
            return _numbers(entry.features[:rows])

    def _size(self, slide: str) -> tuple[int, int]:
        if slide not in self._sizes:
            with self._opened(slide) as entry:
                self._check_maker(slide, entry.attrs)
                shape = tuple(entry.features.shape)
                places = None if entry.coords is None else tuple(entry.coords.shape)
            file = self._layout.files[slide]
            shape = (0, 0) if shape == (0,) else shape  # as TRIDENT writes an empty slide
            if len(shape) != 2:
                raise DamagedDataError(
                    f"{file}: features of slide '{slide}' have the shape {shape}, need (patches, "
                    "width)\n  one vector a slide is no bag of patches"
                )
            if places is not None and places != (shape[0], 2) and (shape[0] or 0 not in places):
                raise DamagedDataError(
                    f"{file}: slide '{slide}' has {shape[0]} features but coords of shape {places}\n"
                    "  which feature lies where is unknown: extract the slide again"
                )
            self._sizes[slide] = shape
            if shape[0] and self._like is None:
                self._like = slide
        return self._sizes[slide]

    def _check_maker(self, slide: str, attrs: Mapping[str, Any]) -> None:
        for name in ENCODER:
            own, first = attrs.get(name), self.recipe.get(name)
            if own and first and own != first:
                raise UserError(
                    f"features of different encoders in {self.path}: {first} in the first file, {own} "
                    f"for slide '{slide}'\n  extract them again with one encoder, or keep folders apart"
                )

    @contextmanager
    def _opened(self, slide: str) -> Iterator[Entry]:
        """The slide's entry; DamagedDataError for whatever reading it may raise inside."""
        try:
            with self._layout.open(slide) as entry:
                yield entry
        except (
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
                f"{_first_line(error)}\n  copy the file again, or extract the slide anew"
            ) from error


# --- the formats ---


# --- files ---


def _described(path: Path) -> str:
    """What a path holds, in a few words."""
    if path.is_file():
        return f"one file, {path.name}; give its folder, unless it holds a group for each slide"
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir())
    held, _ = _glance(_files(path, ".h5"))
    inside = f"; in the .h5: {', '.join(sorted(held))}" if held else ""
    named = ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])])
    return f"{named}{inside}" if named else "an empty folder"
