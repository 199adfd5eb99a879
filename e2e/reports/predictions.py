"""Predictions for slides from all of their patches, and predictions.csv."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from e2e.bags.loader import full_bag
from e2e.bags.prefetch import prefetch
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.files import write_atomically
from e2e.heads.base import HeadOutput
from e2e.log import Screen
from e2e.losses.base import log_attention
from e2e.metrics.values import Array
from e2e.parallel import Strategy
from e2e.reports.heatmap import scores_of_prediction
from e2e.tasks.base import Numbers, Task

OnSlide = Callable[[LabelledSlide, HeadOutput, list[float]], None]
"""Function called with each slide, the output of its head and its predicted values."""


@dataclass(frozen=True)
class Prediction:
    """What the model predicts for one slide."""

    case: str
    """The case of the slide."""
    slide: str
    """Id of the slide."""
    split: str
    """Split of the slide; empty for new slides."""
    values: list[float]
    """The numbers of :meth:`e2e.tasks.base.Task.predict`."""
    target: Numbers
    """The label as the task encodes it; NaN where there is none."""
    entropy: float | None = None
    """Normalised entropy of the attention; see :func:`attention_entropy`."""
    centre: str = ""
    """Centre in the label table; empty if it has none."""


@torch.no_grad()
def predict(
    model: MILModel,
    items: Sequence[LabelledSlide],
    *,
    task: Task,
    view: BagSpec,
    strategy: Strategy,
    screen: Screen,
    on_slide: OnSlide | None = None,
    weights_name: str = "",
) -> list[Prediction]:
    """Predict every slide from all of its patches, each slide once over all ranks.

    Parameters
    ----------
    model
        The model; left in eval mode.
    items
        The slides; the same list on every rank.
    task
        Turns logits into predictions.
    view
        How patches of a slide are read.
    strategy
        Ranks and device.
    screen
        Shows progress, with ``weights_name``: which weights the model has.
    on_slide
        Called for each slide on the rank that predicts it.

    Returns
    -------
    list of Prediction
        The predictions of all ranks, on every rank, sorted by split and slide.
    """
    model.eval()
    predictions: list[Prediction] = []
    share = items[strategy.rank :: strategy.world_size]
    splits = [item.slide.split for item in items[:1]]
    kind = ", ".join(filter(None, [*splits, weights_name])) or "new"
    bags = ((full_bag(item, view, model.chunk), item) for item in share)
    for num_done, (bag, item) in enumerate(prefetch(bags, strategy.device), start=1):
        output = model(bag, strategy.device)[0]
        values = task.predict(output.logits)[0].cpu().double().tolist()
        predictions.append(_as_prediction(item, values, output, task))
        if on_slide is not None:
            on_slide(item, output, values)
        screen.step(num_done, len(share), f"slides evaluated ({kind})")
    screen.pause()
    of_all_ranks = [p for of_rank in strategy.gather_objects(predictions) for p in of_rank]
    return sorted(of_all_ranks, key=lambda prediction: (prediction.split, prediction.slide))


def _as_prediction(
    item: LabelledSlide, values: list[float], output: HeadOutput, task: Task
) -> Prediction:
    return Prediction(
        case=item.slide.case,
        slide=item.slide.id,
        split=item.slide.split,
        values=values,
        target=task.target_values(item.target),
        entropy=attention_entropy(output),
        centre=item.slide.centre,
    )


def attention_entropy(output: HeadOutput) -> float | None:
    """Return the entropy of the attention over one slide, divided by that of uniform attention, log N.

    It is averaged over attention maps. It is 1 for a slide of one patch, and None for a head without
    attention.
    """
    if output.attention_logits is None:
        return None
    num_patches = output.attention_logits.shape[-1]
    if num_patches == 1:
        return 1.0
    logs, _ = log_attention(output)
    entropy = -(logs.exp() * logs).sum(dim=-1) / math.log(num_patches)
    return float(entropy.mean())


def score_patches(
    model: MILModel,
    items: Sequence[LabelledSlide],
    task: Task,
    view: BagSpec,
    strategy: Strategy,
    screen: Screen,
) -> dict[str, Tensor]:
    """Return slide -> (N,) float32 scores of all its patches, on every rank.

    Raises
    ------
    UserError
        The head has neither attention nor instance scores.
    """
    scores_of: dict[str, Tensor] = {}

    def keep_scores(item: LabelledSlide, output: HeadOutput, values: list[float]) -> None:
        scores = scores_of_prediction(output, task, values)
        if scores is None:
            raise UserError(
                "the head has no attention and no instance scores to sample patches by\n"
                "  choose another head, or another sampler.name"
            )
        scores_of[item.slide.id] = torch.from_numpy(scores).float()

    predict(
        model, items, task=task, view=view, strategy=strategy, screen=screen, on_slide=keep_scores
    )
    gathered = strategy.gather_objects(scores_of)
    return {slide: scores for of_rank in gathered for slide, scores in of_rank.items()}


def to_arrays(predictions: Sequence[Prediction]) -> tuple[Array, Array]:
    """Return predicted values and targets as float64 arrays, one row for each slide."""
    values = [prediction.values for prediction in predictions]
    targets = [prediction.target for prediction in predictions]
    return np.array(values, np.float64), np.array(targets, np.float64)


def write_predictions(predictions: Sequence[Prediction], task: Task, path: Path) -> None:
    """Write a CSV of case, slide, split, label, and what was predicted; see :func:`predicted_cells`.

    There is a column ``centre`` if a slide has one.
    """
    rows: list[dict[str, Any]] = []
    has_centres = any(prediction.centre for prediction in predictions)
    for prediction in predictions:
        row: dict[str, Any] = {
            "case": prediction.case,
            "slide": prediction.slide,
            "split": prediction.split,
        }
        if has_centres:
            row["centre"] = prediction.centre
        row |= zip(task.label_columns, task.format_labels(prediction.target), strict=True)
        rows.append(row | predicted_cells(prediction, task))
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False).encode())


def predicted_cells(prediction: Prediction, task: Task) -> dict[str, Any]:
    """Return the columns of a table that say what was predicted for a slide.

    These are ``predicted`` if the task has a word for it, the numbers, and the attention's entropy.
    """
    in_words = task.format_prediction(prediction.values)
    return {
        **({"predicted": in_words} if in_words else {}),
        **dict(zip(task.prediction_columns, prediction.values, strict=True)),
        "attention_entropy": prediction.entropy,
    }
