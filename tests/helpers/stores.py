"""Random JPEGs and small real stores made of them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.records import SlideRecord

RECIPE = {"mpp": 0.5, "patch_px": 32}


def picture(seed: int = 0, width: int = 32, height: int | None = None) -> Image.Image:
    """A smooth random RGB image: unlike noise, it survives JPEG almost as it is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height or width), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | int = 0, *, width: int = 32, **options: object) -> bytes:
    """JPEG bytes of an image, or of ``picture(seed)``."""
    image = picture(image, width) if isinstance(image, int) else image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def record(slide: str, count: int, **changes: object) -> SlideRecord:
    """A record with ``count`` different coords on a grid."""
    x, y = np.arange(count) % 7 * 64, np.arange(count) // 7 * 64
    coords = changes.get("coords")
    values: dict[str, object] = {
        "num_patches": len(coords) if isinstance(coords, np.ndarray) else count,
        "coords": np.stack([x, y], axis=1).astype(np.int32),
        "level0_px": 64.0,
        "mpp": 0.5,
        "patch_px": 32,
        "width": 1000,
        "height": 900,
        "source": f"{slide}.svs",
        "source_bytes": 12345,
    }
    return SlideRecord(slide=slide, **(values | changes))  # type: ignore[arg-type]


def patches(slide: str, count: int) -> list[bytes]:
    """JPEGs that differ from patch to patch and from slide to slide."""
    first = zlib.crc32(slide.encode()) * 1000
    return [jpeg(first + index) for index in range(count)]


def write_store(path: Path, counts: Mapping[str, int]) -> PatchStore:
    """A real store of ``{slide: patches}``."""
    with StoreWriter(path, RECIPE) as writer:
        for slide, count in counts.items():
            writer.add(record(slide, count), patches(slide, count))
    return PatchStore(path)


def pixels_of(jpegs: list[bytes]) -> NDArray[np.uint8]:
    """(n,H,W,3) as Pillow decodes them."""
    return np.stack([np.asarray(Image.open(io.BytesIO(value)).convert("RGB")) for value in jpegs])
