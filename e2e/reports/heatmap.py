"""Heatmaps: the scores of the patches of a slide, as an image and a table."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from e2e.bags.readers import RowReader
from e2e.bags.spec import LabelledSlide
from e2e.errors import DamagedDataError
from e2e.files import write_atomically
from e2e.heads.base import HeadOutput
from e2e.images.decode import Decoder, UndecodableError
from e2e.log import Screen, warn_of_failure
from e2e.slides import file_name
from e2e.store.records import PatchReader, SlideRecord
from e2e.tasks.base import Task

PANEL_PX = 768
"""Longer side of each panel."""
BACKGROUND = 245
"""Grey level where the slide has no patch."""
NO_PIXELS = 200
"""Grey level of patches whose pixels are unavailable, as with features."""
OVERLAY = 0.55
"""Opacity of the scores over the tissue."""


def heatmap_writer(
    task: Task, reader: RowReader, folder: Path, items: Sequence[LabelledSlide], screen: Screen
) -> Callable[[LabelledSlide, HeadOutput, list[float]], None]:
    """Return a function that writes a heatmap of each slide of ``items`` when it is predicted.

    It is meant as ``on_slide`` of :func:`e2e.reports.predictions.predict`.

    Parameters
    ----------
    task
        Determines the output that is shown, and the words of the caption.
    reader
        Decodes the patches; a reader of features has no pixels, and the scores are drawn over grey.
    folder
        Where heatmaps are written; it is created.
    items
        The slides to draw.
    screen
        Prints a warning for a heatmap that cannot be drawn or written.
    """
    decoder = reader.decoder
    ids = {item.slide.id for item in items}

    def write(item: LabelledSlide, output: HeadOutput, values: list[float]) -> None:
        if item.slide.id not in ids:
            return
        scores = scores_of_prediction(output, task, values)
        if scores is None:
            return
        words = zip(
            task.label_columns, task.format_labels(task.target_values(item.target)), strict=True
        )
        label = ", ".join(f"{column} {word}" for column, word in words if word)
        caption = f"{item.slide.id}   predicted {task.heatmap_output(values)[1]}   {label}".rstrip()
        with warn_of_failure(screen, f"no heatmap of slide '{item.slide.id}'"):
            path = folder / file_name(item.slide.id)
            draw_heatmap(item, scores, decoder=decoder, caption=caption, path=path)

    return write


def scores_of_prediction(
    output: HeadOutput, task: Task, predicted: Sequence[float]
) -> NDArray[np.float64] | None:
    """Return :func:`patch_scores` of the output that the heatmap of this prediction shows."""
    shown, _ = task.heatmap_output(predicted)
    return patch_scores(output, shown, partial(task.patch_predictions, predicted=predicted))


def patch_scores(
    output: HeadOutput, shown: int, score_instances: Callable[[Tensor], Tensor]
) -> NDArray[np.float64] | None:
    """Return the (N,) scores of the patches of one slide; None if the head has none.

    The first that applies: the instance logits of output ``shown``, if the head asks for them
    (``show_scores``); the attention map of ``shown``, if each output has its own; the attention averaged
    over maps; ``score_instances`` of the instance logits.

    Parameters
    ----------
    output
        Output of the head for one slide.
    shown
        Index of the output that the heatmap shows.
    score_instances
        (N, C) instance logits -> (N,); see :meth:`e2e.tasks.base.Task.patch_predictions`.
    """
    attention, logits = output.attention(), output.instance_logits
    if output.show_scores and logits is not None:
        scores = logits[0, :, shown]
    elif attention is not None:
        scores = attention[0, shown] if output.class_maps else attention[0].mean(dim=0)
    elif logits is not None:
        scores = score_instances(logits[0].float())
    else:
        return None
    return scores.double().cpu().numpy()


def draw_heatmap(
    item: LabelledSlide,
    scores: NDArray[np.float64],
    *,
    decoder: Decoder | None,
    caption: str,
    path: Path,
) -> None:
    """Write ``path``.png, the slide beside the same slide overlaid with the scores, and ``path``.csv.

    Colours are percentile ranks within the slide, because raw attention often has one large value among
    near zeros; where patches overlap, the mean is shown. The table has for each patch its slide, its x, y
    and side in level-0 pixels, the raw score and its percentile.

    Parameters
    ----------
    item
        The slide, which must have coordinates.
    scores
        (N,) scores, one for each patch.
    decoder
        Decodes the patches; None: there are no pixels to show.
    caption
        Text above the panels.
    path
        Path of the files, without suffix.

    Raises
    ------
    DamagedDataError
        A patch cannot be read; the message names it.
    """
    record = item.record
    ranks = percentile_ranks(scores)
    mean_rank = _mean_over_patches(record, ranks)
    colours = colormaps["turbo"](np.nan_to_num(mean_rank))[..., :3] * 255
    covered = np.isfinite(mean_rank)[..., None]
    if decoder is None:
        tissue = np.where(covered, NO_PIXELS, BACKGROUND).astype(np.uint8).repeat(3, axis=2)
    else:
        tissue = _mosaic(item, record, decoder)
    blend = np.where(covered, (1 - OVERLAY) * tissue + OVERLAY * colours, tissue).astype(np.uint8)
    write_atomically(path.with_name(f"{path.name}.png"), _panels(tissue, blend, caption))
    records = item.reader.slide_records(item.slide.id)
    slides = [origin.slide for origin in records for _ in range(origin.num_patches)]
    coords = np.concatenate([origin.require_coords() for origin in records])
    table = pd.DataFrame(
        {
            "slide": slides,
            "x": coords[:, 0],
            "y": coords[:, 1],
            "side": round(record.level0_px, 2),
            "score": scores,
            "percentile": np.round(100 * ranks, 2),
        }
    )
    write_atomically(path.with_name(f"{path.name}.csv"), table.to_csv(index=False).encode())


def percentile_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each score, from 0 to 1; ties share their mean rank, a single score has 0.5."""
    if len(scores) == 1:
        return np.full(1, 0.5)
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts) - 1
    mean_rank = last_rank - (counts - 1) / 2
    return mean_rank[which] / (len(scores) - 1)


def _layout(record: SlideRecord) -> tuple[NDArray[np.int64], int, tuple[int, int]]:
    """Upper left corner of each patch in the panel, side of a patch there, (height, width)."""
    coords = record.require_coords()
    side = record.level0_px or _grid_step(coords)
    low = coords.min(axis=0)
    extent = coords.max(axis=0) - low + side
    scale = PANEL_PX / max(extent)
    # Rounded up, so that no line of background is left between neighbours; but not by a rounding error.
    side_px = max(1, math.ceil(side * scale - 1e-6))
    corners = np.round((coords - low) * scale).astype(np.int64)
    height, width = (int(corners[:, axis].max()) + side_px for axis in (1, 0))
    return corners, side_px, (height, width)


def _grid_step(coords: NDArray[np.int32]) -> float:
    """The smallest step between columns or rows of patches, for records without the patches' side."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    return float(min((step.min() for step in steps if len(step)), default=1))


def _mean_over_patches(record: SlideRecord, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(height, width) mean of the values of the patches at each pixel; NaN where there is no patch."""
    corners, side, shape = _layout(record)
    total, count = np.zeros(shape), np.zeros(shape)
    for (x, y), value in zip(corners, values, strict=True):
        total[y : y + side, x : x + side] += value
        count[y : y + side, x : x + side] += 1
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)


def _mosaic(item: LabelledSlide, record: SlideRecord, decoder: Decoder) -> NDArray[np.uint8]:
    """The slide assembled from its patches."""
    corners, side, shape = _layout(record)
    picture = np.full((*shape, 3), BACKGROUND, np.uint8)
    store: PatchReader = item.reader
    for start in range(0, record.num_patches, 256):
        rows = range(start, min(start + 256, record.num_patches))
        jpegs = store.read(item.slide.id, rows)
        try:
            images = decoder.decode(jpegs).permute(0, 2, 3, 1).numpy()
        except UndecodableError as error:
            raise DamagedDataError(
                f"{store.path}: slide '{item.slide.id}' patch {rows[error.index]} {error}\n"
                "  e2e inspect --verify lists all of them; pack the slide again"
            ) from error
        for row, image in zip(rows, images, strict=True):
            x, y = corners[row]
            small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
            picture[y : y + side, x : x + side] = np.asarray(small)
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
