"""Reading the rows of a bag: pixels decoded and augmented on demand, or features from memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bags.bag import PixelSource
from e2e.errors import DamagedDataError
from e2e.features.reader import FeatureFiles
from e2e.images.augment import Augment
from e2e.images.decode import Decoder, UndecodableError
from e2e.images.geometry import resize
from e2e.images.jpeg_header import Buffer
from e2e.seeds import patch_seeds
from e2e.store.records import PatchReader, SlideReader

T = TypeVar("T")
R = TypeVar("R", bound=SlideReader)
R_co = TypeVar("R_co", bound=SlideReader, covariant=True)
R_contra = TypeVar("R_contra", bound=SlideReader, contravariant=True)

InputKind = Literal["pixels", "features"]
"""What the rows of a bag are."""


@dataclass(frozen=True)
class SlideRows(Generic[R_co]):
    """Rows of a bag: patches of one slide at one scale."""

    reader: R_co
    slide: str
    """Slide id."""
    indices: NDArray[np.int64]
    """(n,) patch numbers within the slide."""
    patch_px: int
    """Side of the stored patches in pixels."""
    seed: int
    """Seed of the slide's augmentation draws."""
    crop_seeds: NDArray[np.uint64] | None = None
    """(n,) seeds for the crops alone, where patches share crop rectangles."""
    level0_px: float = 0.0
    """Side of the patches in level-0 pixels; 0 if unknown."""

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, start: int, stop: int) -> SlideRows[R_co]:
        """Return rows ``start`` to ``stop`` of these."""
        crop_seeds = None if self.crop_seeds is None else self.crop_seeds[start:stop]
        return replace(self, indices=self.indices[start:stop], crop_seeds=crop_seeds)

    def seeds(self) -> NDArray[np.uint64]:
        """Return the seed of each patch, (n,)."""
        return patch_seeds(self.seed, self.indices)


def cut_rows(rows: Sequence[SlideRows[R]], start: int, stop: int) -> list[SlideRows[R]]:
    """Return rows ``start`` to ``stop`` of the concatenation of ``rows``."""
    parts, first = [], 0
    for part in rows:
        low, high = max(start - first, 0), min(stop - first, len(part))
        if low < high:
            parts.append(part.part(low, high))
        first += len(part)
    return parts


def share_crops(rows: Sequence[SlideRows[R]], num_rectangles: int, seed: int) -> list[SlideRows[R]]:
    """Let neighbouring rows share crop rectangles, as the ABMILX project does.

    Parameters
    ----------
    rows : sequence of SlideRows
        All rows of a rank's update.
    num_rectangles : int
        Number of rectangles. The rows are cut into as many equal runs, and a run shares one.
    seed : int
        Seed of the rectangles.

    Returns
    -------
    list of SlideRows
        ``rows`` with ``crop_seeds``.
    """
    total = sum(map(len, rows))
    rectangle = np.arange(total) * num_rectangles // max(1, total)
    seeds = patch_seeds(seed, rectangle)
    ends = np.cumsum([len(part) for part in rows])[:-1]
    return [
        replace(part, crop_seeds=crop_seeds)
        for part, crop_seeds in zip(rows, np.split(seeds, ends), strict=True)
    ]


class RowReader(Protocol[R_contra]):
    """Reads the rows of bags from readers of slides: of patches or of features."""

    @property
    def input_kind(self) -> InputKind:
        """What the rows are."""
        ...

    @property
    def decoder(self) -> Decoder | None:
        """Decoder of the patches; None where rows are features."""
        ...

    def describe(self) -> str:
        """Return a few words for the summary of a run."""
        ...

    def for_training(self, augment: Augment, keep: str | None) -> RowReader[R_contra]:
        """Return the reader of training bags.

        Parameters
        ----------
        augment : Augment
            Augmentation of the patches. Features are not augmented.
        keep : {"jpeg", "uint8", "float"}, optional
            What is kept in memory of patches that will be reread: JPEG bytes, decoded pixels, or
            pixels as the encoder sees them. None keeps nothing.
        """
        ...

    def source(self, rows: Sequence[SlideRows[R_contra]]) -> PixelSource:
        """Return the pixel source of a bag of these rows."""
        ...


@dataclass(frozen=True)
class PixelRowReader:
    """Reads patches: JPEG bytes, decoded, then augmented or resized."""

    decoder: Decoder
    """Decoder of the JPEG bytes."""
    size: int | None = None
    """Side of the patches in pixels without ``augment``; None leaves them as stored."""
    augment: Augment | None = None
    """Augmentation; None for evaluation."""
    bgr: bool = False
    """Whether blue and red are swapped, as in the training of the ABMILX project's models."""
    keep: str | None = None
    """What is kept in memory of patches that will be reread, see :meth:`RowReader.for_training`."""

    @property
    def input_kind(self) -> InputKind:
        """Pixels."""
        return "pixels"

    def describe(self) -> str:
        """Return the name of the decoder, and why it is not the fastest one."""
        return f"JPEG {self.decoder.name} {self.decoder.note}".rstrip()

    def for_training(self, augment: Augment, keep: str | None) -> PixelRowReader:
        """Return this reader with augmentation; see :class:`RowReader`."""
        return replace(self, augment=augment, keep=keep)

    def source(self, rows: Sequence[SlideRows[PatchReader]]) -> StoredPixels:
        """Return the pixel source of a bag of these rows."""
        return StoredPixels(rows, self)


class _Request(NamedTuple):
    """One call of a pixel source."""

    rows: list[list[SlideRows[PatchReader]]]
    """Runs of neighbours whose patches have one size; a run is decoded and augmented together."""
    span: tuple[int, int]
    device: torch.device
    will_be_reread: bool


class StoredPixels(PixelSource):
    """The pixel source of a bag of stored patches.

    Of rows that will be reread, it keeps in memory what ``reader.keep`` names until they are reread.

    Parameters
    ----------
    rows : sequence of SlideRows
        All rows of the bag.
    reader : PixelRowReader
        How they are decoded and augmented.
    """

    def __init__(self, rows: Sequence[SlideRows[PatchReader]], reader: PixelRowReader) -> None:
        self._rows, self._reader = rows, reader
        self._cache: dict[tuple[int, int], Any] = {}

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        """Return rows ``start`` to ``stop``, (n, 3, H, W); see :class:`PixelSource`.

        Raises
        ------
        DamagedDataError
            If a patch cannot be decoded; names its slide and number.
        """
        rows = _by_patch_px(cut_rows(self._rows, start, stop))
        request = _Request(rows, (start, stop), device, will_be_reread)
        return self._cached("float", request, self._augment)

    def forget(self, start: int, stop: int) -> None:
        """Free what is kept of rows ``start`` to ``stop``."""
        self._cache.pop((start, stop), None)

    def _cached(self, stage: str, request: _Request, compute: Callable[[_Request], T]) -> T:
        """``compute(request)``; from memory if this is the stage that is kept, and it was."""
        if stage != self._reader.keep:
            return compute(request)
        span = request.span
        value = self._cache.pop(span) if span in self._cache else compute(request)
        if request.will_be_reread:
            self._cache[span] = value
        return value

    def _augment(self, request: _Request) -> Tensor:
        decoded = self._cached("uint8", request, self._decode)
        pieces = [
            self._augment_run(pixels, rows)
            for pixels, rows in zip(decoded, request.rows, strict=True)
        ]
        if len({piece.dtype for piece in pieces}) > 1:  # only some of them were resampled
            pieces = [p / 255 if p.dtype == torch.uint8 else p for p in pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _decode(self, request: _Request) -> list[Tensor]:
        if self._reader.keep != "jpeg":
            return [self._read_and_decode(rows, request.device) for rows in request.rows]
        jpegs = self._cached("jpeg", request, _read_jpegs)
        return [
            self._decode_run(rows, buffers, request.device)
            for rows, buffers in zip(request.rows, jpegs, strict=True)
        ]

    def _augment_run(self, pixels: Tensor, rows: Sequence[SlideRows[PatchReader]]) -> Tensor:
        augment = self._reader.augment
        if augment is None:
            return resize(pixels, self._reader.size)
        seeds = np.concatenate([part.seeds() for part in rows])
        crop_seeds = [part.crop_seeds for part in rows if part.crop_seeds is not None]
        return augment(pixels, seeds, np.concatenate(crop_seeds) if crop_seeds else None)

    def _read_and_decode(
        self, rows: Sequence[SlideRows[PatchReader]], device: torch.device
    ) -> Tensor:
        """The pixels of a run. Those of one slide are decoded out of the store's own memory."""
        first, *others = rows
        if others or not self._reader.decoder.borrows:
            return self._decode_run(rows, _copy_jpegs(rows), device)
        return first.reader.borrow(
            first.slide, first.indices, lambda jpegs: self._decode_run(rows, jpegs, device)
        )

    def _decode_run(
        self,
        rows: Sequence[SlideRows[PatchReader]],
        jpegs: Sequence[Buffer],
        device: torch.device,
    ) -> Tensor:
        try:
            pixels = self._reader.decoder.decode(jpegs, device)
        except UndecodableError as error:
            [patch] = cut_rows(rows, error.index, error.index + 1)
            raise DamagedDataError(
                f"{patch.reader.path}: slide '{patch.slide}' patch {patch.indices[0]} {error}\n"
                "  list all damaged patches with e2e inspect --verify, then pack the slide again"
            ) from error
        return pixels.flip(1) if self._reader.bgr else pixels


def _by_patch_px(rows: Sequence[SlideRows[R]]) -> list[list[SlideRows[R]]]:
    """Runs of neighbours whose patches have one size."""
    return [list(run) for _, run in groupby(rows, key=lambda part: part.patch_px)]


def _read_jpegs(request: _Request) -> list[list[bytes]]:
    """The JPEGs of each run."""
    return [_copy_jpegs(rows) for rows in request.rows]


def _copy_jpegs(rows: Sequence[SlideRows[PatchReader]]) -> list[bytes]:
    """The JPEGs of a run, copied out of their stores."""
    return list(chain.from_iterable(part.reader.read(part.slide, part.indices) for part in rows))


class FeatureRowReader:
    """Reads features, which it keeps in memory from the first time on, as far as they fit.

    Parameters
    ----------
    max_bytes : int
        Most bytes to keep, of the slides that are read first. Others are read from disk each time.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.cached_bytes = max_bytes, 0
        self._cache: dict[tuple[str, str], Tensor] = {}
        self._lock = threading.Lock()

    @property
    def input_kind(self) -> InputKind:
        """Features."""
        return "features"

    @property
    def decoder(self) -> None:
        """None: features are not decoded."""
        return None

    def describe(self) -> str:
        """Return a few words for the summary of a run."""
        return "frozen features"

    def for_training(self, augment: Augment, keep: str | None) -> FeatureRowReader:
        """Return this reader: features are neither augmented nor decoded."""
        return self

    def source(self, rows: Sequence[SlideRows[FeatureFiles]]) -> StoredFeatures:
        """Return the source of a bag of these rows."""
        return StoredFeatures(rows, self)

    def rows(self, part: SlideRows[FeatureFiles]) -> Tensor:
        """Return the features of rows of one slide, (n, dim) in the stored type."""
        features = self._slide_features(part.reader, part.slide)
        if np.array_equal(part.indices, np.arange(len(features))):
            return features  # without a copy
        return features[torch.from_numpy(part.indices)]

    def _slide_features(self, reader: FeatureFiles, slide: str) -> Tensor:
        key = (str(reader.path), slide)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        features = reader.features(slide)
        with self._lock:
            fits = self.cached_bytes + features.nbytes <= self.max_bytes
            if fits and key not in self._cache:
                self.cached_bytes += features.nbytes
                self._cache[key] = features
        return features


class StoredFeatures(PixelSource):
    """The source of a bag of stored features; see :class:`FeatureRowReader`.

    Parameters
    ----------
    rows : sequence of SlideRows
        All rows of the bag.
    reader : FeatureRowReader
        Reads them.
    """

    def __init__(self, rows: Sequence[SlideRows[FeatureFiles]], reader: FeatureRowReader) -> None:
        self._rows, self._reader = rows, reader

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        """Return rows ``start`` to ``stop``, (n, dim), float16 or float32 as stored."""
        parts = [self._reader.rows(part) for part in cut_rows(self._rows, start, stop)]
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        return features.to(device, non_blocking=True)
