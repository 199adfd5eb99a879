"""Attention over a slide: a picture and a table, on the very coordinates of the store."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from e2e.bags.spec import LabelledSlide
from e2e.cohort.cases import CaseStore
from e2e.errors import DamagedDataError
from e2e.files import write_atomically
from e2e.heads.base import HeadOutput
from e2e.images.decode import Decoder, UndecodableError
from e2e.store.records import PatchReader, SlideRecord

SIDE = 768  # px of the longer side of each panel
GROUND = 245  # grey where the slide has no patch
PATCH = 200  # grey of a patch whose pixels are not at hand


def patch_scores(
    output: HeadOutput, shown: int, alone: Callable[[Tensor], Tensor]
) -> NDArray[np.float64] | None:
    """(N,) what one slide's patches weigh.

    Attention averaged over maps, or that of the output ``shown`` where each output has a map; of a head
    without attention what each patch says by itself; None when it has neither. Where the head says so,
    its instance scores of ``shown`` as they are, attention or not.

    Args:
        alone: (N, C) instance logits -> (N,); see :meth:`e2e.tasks.base.Task.of_patches`.
    """
    attention, logits = output.attention(), output.instance_logits
    if output.show_scores and logits is not None:
        found = logits[0, :, shown]
    elif attention is not None:
        found = attention[0, shown] if output.class_maps else attention[0].mean(dim=0)
    elif logits is not None:
        found = alone(logits[0].float())
    else:
        return None
    return found.double().cpu().numpy()


def draw_heatmap(
    item: LabelledSlide,
    scores: NDArray[np.float64],
    *,
    decoder: Decoder | None,
    caption: str,
    path: Path,
) -> None:
    """Write ``path``.png (the slide from its patches, beside it the scores over it) and ``.csv``.

    Colours are percentile ranks within the slide, because raw attention is often one hot patch on
    a field of near zeros; where patches overlap it is their mean. Without a decoder there is no slide to
    show. The table holds each patch's slide (of a case there may be several), its x, y and side there
    (level-0 px), the raw score and its percentile.

    Raises:
        DamagedDataError: a patch cannot be read; names it.
    """
    record = item.record
    ranks = percentile_ranks(scores)
    mean = _mean(record, ranks)
    heat = colormaps["turbo"](np.nan_to_num(mean))[..., :3] * 255
    covered = np.isfinite(mean)[..., None]
    if decoder is None:
        tissue = np.where(covered, PATCH, GROUND).astype(np.uint8).repeat(3, axis=2)
    else:
        tissue = _mosaic(item, record, decoder)
    blend = np.where(covered, 0.45 * tissue + 0.55 * heat, tissue).astype(np.uint8)
    write_atomically(path.with_name(path.name + ".png"), _panels(tissue, blend, caption))
    slides, places = item.slide.id, record.require_coords()
    if isinstance(item.store, CaseStore):
        slides, places = item.store.origins()
    table = pd.DataFrame(
        {
            "slide": slides,
            "x": places[:, 0],
            "y": places[:, 1],
            "side": round(record.level0_px, 2),
            "score": scores,
            "percentile": np.round(100 * ranks, 2),
        }
    )
    write_atomically(path.with_name(path.name + ".csv"), table.to_csv(index=False).encode())


def percentile_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each score within its slide, 0 to 1; ties share the mean; equal scores are 0.5."""
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle = last - (counts - 1) / 2 - 1
    return middle[which] / max(1, len(scores) - 1) if len(scores) > 1 else np.full(1, 0.5)


def _geometry(record: SlideRecord) -> tuple[NDArray[np.int64], int, tuple[int, int]]:
    """Upper left corner of each patch on the picture, a patch's side there, (height, width)."""
    side = record.level0_px or _spacing(record.require_coords())
    low = record.require_coords().min(axis=0)
    extent = record.require_coords().max(axis=0) - low + side
    scale = SIDE / max(extent)
    # Up, so that neighbours never leave a line of ground between them; but not by a rounding error.
    cell = max(1, math.ceil(side * scale - 1e-6))
    corners = np.round((record.require_coords() - low) * scale).astype(np.int64)
    height, width = (int(corners[:, axis].max()) + cell for axis in (1, 0))
    return corners, cell, (height, width)


def _spacing(places: NDArray[np.int32]) -> float:
    """The smallest step between columns or rows of patches, where nobody says how large they are."""
    steps = [np.diff(np.unique(places[:, axis])) for axis in (0, 1)]
    return float(min((step.min() for step in steps if len(step)), default=1))


def _mean(record: SlideRecord, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(height, width) mean of the patches that lie there; NaN where none does."""
    corners, cell, shape = _geometry(record)
    total, patches = np.zeros(shape), np.zeros(shape)
    for (x, y), value in zip(corners, values, strict=True):
        total[y : y + cell, x : x + cell] += value
        patches[y : y + cell, x : x + cell] += 1
    return np.divide(total, patches, out=np.full(shape, np.nan), where=patches > 0)


def _mosaic(item: LabelledSlide, record: SlideRecord, decoder: Decoder) -> NDArray[np.uint8]:
    """The slide put together from its own patches."""
    corners, cell, shape = _geometry(record)
    picture = np.full((*shape, 3), GROUND, np.uint8)
    store = cast(PatchReader, item.store)
    for start in range(0, record.num_patches, 256):
        rows = range(start, min(start + 256, record.num_patches))
        jpegs = store.read(item.slide.id, rows)
        try:
            images = decoder.decode(jpegs).permute(0, 2, 3, 1).numpy()
        except UndecodableError as error:
            raise DamagedDataError(
                f"{store.path}: slide '{item.slide.id}' patch {rows[error.index]} {error}\n"
                "  tools/inspect_lmdb.py --verify lists all of them; pack the slide again"
            ) from error
        for row, image in zip(rows, images, strict=True):
            x, y = corners[row]
            small = Image.fromarray(image).resize((cell, cell), Image.Resampling.BOX)
            picture[y : y + cell, x : x + cell] = np.asarray(small)
    return picture


def _panels(left: NDArray[np.uint8], right: NDArray[np.uint8], caption: str) -> bytes:
    height, width = left.shape[:2]
    bar = 24
    words = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(caption)
    size = (max(2 * width + 72, math.ceil(words) + 8), height + bar)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(Image.fromarray(left), (0, bar))
    canvas.paste(Image.fromarray(right), (width + 8, bar))
    ramp = colormaps["turbo"](np.linspace(1, 0, height))[:, None, :3] * 255
    scale = np.repeat(ramp.astype(np.uint8), 14, axis=1)
    canvas.paste(Image.fromarray(scale), (2 * width + 16, bar))
    pen = ImageDraw.Draw(canvas)
    pen.text((4, 6), caption, fill="black")
    pen.text((2 * width + 34, bar), "high", fill="black")
    pen.text((2 * width + 34, height + bar - 14), "low", fill="black")
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
