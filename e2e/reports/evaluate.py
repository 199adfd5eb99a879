"""Predictions for whole slides, their metrics with intervals, and the files that hold them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bags.loader import full_bag
from e2e.bags.prefetch import prefetch
from e2e.bags.readers import PixelRowReader, RowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.cohort.folds import tcga_sites
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.files import write_atomically, write_json
from e2e.heads.base import HeadOutput
from e2e.log import Screen
from e2e.losses.base import log_attention
from e2e.metrics.bootstrap import by_group, case_weights, confidence_interval
from e2e.metrics.figures import write_figures
from e2e.metrics.values import Array
from e2e.parallel import Strategy
from e2e.reports.heatmap import draw_heatmap, patch_scores
from e2e.tasks.base import Numbers, Task
from e2e.training.checkpoint import check_weights, load_checkpoint, select_prefix

Metrics = dict[str, dict[str, float | None]]
Draw = Callable[[LabelledSlide, HeadOutput, list[float]], None]
UNKNOWN = "unknown"
"""The centre of slides for which the label table names none, where it does for others."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one slide."""

    case: str
    slide: str
    split: str
    values: list[float]
    """The numbers of :meth:`e2e.tasks.base.Task.predict`."""
    target: Numbers
    """What the task made of the label; NaN where there is none."""
    entropy: float | None = None
    """Of the attention, from 0 (one patch) to 1 (uniform); None for a head without."""
    centre: str = ""
    """As the label table has it; empty where it does not say."""


@torch.no_grad()
def predict(
    model: MILModel,
    items: Sequence[LabelledSlide],
    *,
    task: Task,
    view: BagSpec,
    strategy: Strategy,
    screen: Screen,
    draw: Draw | None = None,
) -> list[Prediction]:
    """All patches of each slide, streamed through the encoder; each slide once over all ranks.

    ``draw`` is called for each slide on the rank that has it, with its output and prediction.
    """
    model.eval()
    ours: list[Prediction] = []
    share = items[strategy.rank :: strategy.world_size]
    bags = ((full_bag(item, view, model.chunk), item) for item in share)
    for done, (bag, item) in enumerate(prefetch(bags, strategy.device)):
        output = model(bag, strategy.device)[0]
        values = task.predict(output.logits)[0].cpu().double().tolist()
        slide = item.slide
        said = (slide.case, slide.id, slide.split, values, task.numbers(item.target))
        ours.append(Prediction(*said, attention_entropy(output), slide.centre))
        if draw is not None:
            draw(item, output, values)
        screen.step(done + 1, len(share), f"slides evaluated ({slide.split or 'new'})")
    screen.pause()
    everyone = [p for per_rank in strategy.gather_objects(ours) for p in per_rank]
    return sorted(everyone, key=lambda p: (p.split, p.slide))


def attention_entropy(output: HeadOutput) -> float | None:
    """Entropy of a slide's attention over log N, its maximum; mean over maps. 1 for one patch."""
    if output.attention_logits is None:
        return None
    if output.attention_logits.shape[-1] == 1:
        return 1.0
    logs, _ = log_attention(output)
    entropy = -(logs.exp() * logs).sum(dim=-1) / math.log(logs.shape[-1])
    return float(entropy.mean())


def score(predictions: Sequence[Prediction], task: Task, *, draws: int, seed: int = 0) -> Metrics:
    """Metric -> value with its 95 % percentile interval over ``draws`` resamples of the cases."""
    return score_centres(predictions, task, [], draws=draws, seed=seed)[0]


def score_centres(
    predictions: Sequence[Prediction],
    task: Task,
    centres: Sequence[str],
    *,
    draws: int,
    seed: int = 0,
) -> tuple[Metrics, dict[str, dict[str, Any]]]:
    """:func:`score`, and the same centre by centre, under the same resamples.

    Args:
        centres: of each prediction; or nothing, and nothing comes of it.

    Returns:
        The metrics; centre -> ``slides``, ``cases`` and the metrics.
    """
    cases, arrays = [p.case for p in predictions], arrays_of(predictions)
    weights = case_weights(cases, draws, seed)
    whole = {
        name: confidence_interval(values) for name, values in task.metrics(*arrays, weights).items()
    }
    if not centres:
        return whole, {}
    groups = by_group(task.metrics, *arrays, weights, groups=centres, cases=cases)
    return whole, {
        centre: {
            "slides": group.bags,
            "cases": group.cases,
            **{name: confidence_interval(values) for name, values in group.values.items()},
        }
        for centre, group in groups.items()
    }


def centres_of(predictions: Sequence[Prediction]) -> list[str]:
    """The centre of each, where there are two or more; else nothing.

    That of the label table, ``unknown`` where it has none; or if it has none of all, and all cases are
    TCGA barcodes, the one of these.
    """
    if any(p.centre for p in predictions):
        found = [p.centre or UNKNOWN for p in predictions]
    else:
        try:
            sites = tcga_sites(p.case for p in predictions)
        except UserError:
            return []
        found = [sites[p.case] for p in predictions]
    return found if len(set(found)) > 1 else []


def arrays_of(predictions: Sequence[Prediction]) -> tuple[Array, Array]:
    """Predictions and targets, a row each."""
    values, targets = ([p.values for p in predictions], [p.target for p in predictions])
    return np.array(values, np.float64), np.array(targets, np.float64)


def write_predictions(predictions: Sequence[Prediction], task: Task, path: Path) -> None:
    """predictions.csv: case, slide, split, centre (where the table names them), the label (where there is
    one), what is predicted, and how widely the head looked (:func:`attention_entropy`)."""
    rows: list[dict[str, Any]] = []
    placed = any(p.centre for p in predictions)
    for p in predictions:
        row: dict[str, Any] = {"case": p.case, "slide": p.slide, "split": p.split}
        row |= {"centre": p.centre} if placed else {}
        row |= zip(task.label_columns, task.words(p.target), strict=True)
        row |= zip(task.prediction_columns, p.values, strict=True)
        row["attention_entropy"] = p.entropy
        rows.append(row)
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False).encode())


def metric_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the screen: a row a metric, a column a split and kind of weights."""
    columns = {
        f"{split} ({name})": report[split][name]
        for split in ("val", "test")
        for name in ("model", "ema")
        if name in report.get(split, {})
    }

    def text(metric: Mapping[str, float | None]) -> str:
        if metric["value"] is None:
            return "undefined"
        if metric["low"] is None:
            return f"{metric['value']:.3f}"
        return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"

    names = next(iter(columns.values()), {})
    rows = [[name, *(text(metrics[name]) for metrics in columns.values())] for name in names]
    return ["metric", *columns], rows


def evaluate_run(
    model: MILModel,
    best: Path,
    items: Sequence[LabelledSlide],
    *,
    task: Task,
    view: BagSpec,
    selected: str,
    chosen_on: str,
    draws: int,
    heatmaps: int | None,
    out: Path,
    strategy: Strategy,
    screen: Screen,
) -> dict[str, Any]:
    """Judge a run's best epoch on validation and test, and write what it says.

    Writes to ``out``: predictions.csv and heatmaps/ by the ``selected`` weights (``model`` or
    ``ema``), of the test split figures/ too; metrics.json for both, and for the selected ones also
    centre by centre. Returns the content of metrics.json.
    """
    strategy.barrier()  # for the rank that writes it
    tensors, state = load_checkpoint(best)
    report: dict[str, Any] = {"epoch": state["best_epoch"] + 1, "selected_weights": selected}
    report["chosen_on"] = chosen_on
    kept: list[Prediction] = []
    for name in ("model", "ema"):
        weights = select_prefix(name, tensors)
        if not weights:
            continue
        check_weights(strategy.shapes, weights, best)
        told = task.of(name)
        for split in ("val", "test"):
            chosen = [item for item in items if item.slide.split == split]
            if not chosen:
                continue
            draw = None
            if name == selected and split == "test":
                drawn = [item for item in chosen[:heatmaps] if item.record.coords is not None]
                draw = heatmap_drawer(told, view.reader, out / "heatmaps", drawn)
                if len(drawn) < len(chosen[:heatmaps]):
                    screen.say("no heatmap of slides without coords; see the setting data.coords")
            with strategy.full_parameters(strategy.shard(weights)):
                found = predict(
                    model,
                    chosen,
                    task=told,
                    view=view,
                    strategy=strategy,
                    screen=screen,
                    draw=draw,
                )
            kept += found if name == selected else []
            centres = centres_of(found) if name == selected else []
            own = report.setdefault(split, {"slides": len(chosen)})
            own[name], by_centre = score_centres(found, told, centres, draws=draws)
            if by_centre:
                own["centres"] = by_centre
    if strategy.is_leader:
        write_predictions(kept, task.of(selected), out / "predictions.csv")
        tested = [p for p in kept if p.split == "test"]
        if tested:
            write_figures(task.of(selected).figures(*arrays_of(tested)), out / "figures")
        write_json(out / "metrics.json", report)  # the last: a run that has it is done
    title = f"epoch {report['epoch']}, chosen on {chosen_on} by {selected}"
    screen.table(title, *metric_table(report))
    return report


def patch_attention(
    model: MILModel,
    items: Sequence[LabelledSlide],
    task: Task,
    view: BagSpec,
    strategy: Strategy,
    screen: Screen,
) -> dict[str, Tensor]:
    """Slide -> (N,) float32 what the head makes of all patches of its first store; on every rank.

    Raises:
        UserError: the head weighs no patches.
    """
    found: dict[str, Tensor] = {}

    def collect(item: LabelledSlide, output: HeadOutput, values: list[float]) -> None:
        scores = _scores_of(task, output, values)
        if scores is None:
            raise UserError(
                "the head has no attention and no instance scores to draw patches by\n"
                "  choose another head, or another sampler.name"
            )
        found[item.slide.id] = torch.from_numpy(scores).float()

    predict(model, items, task=task, view=view, strategy=strategy, screen=screen, draw=collect)
    return {
        slide: v for per_rank in strategy.gather_objects(found) for slide, v in per_rank.items()
    }


def _scores_of(
    task: Task, output: HeadOutput, predicted: Sequence[float]
) -> NDArray[np.float64] | None:
    alone = functools.partial(task.of_patches, predicted=predicted)
    return patch_scores(output, task.shown(predicted)[0], alone)


def heatmap_drawer(
    task: Task, reader: RowReader, folder: Path, chosen: Sequence[LabelledSlide]
) -> Draw:
    """A ``draw`` for :func:`predict` that writes a heatmap of each slide in ``chosen``.

    Of features there are no patches to show: the scores stand alone.
    """
    decoder = reader.decoder if isinstance(reader, PixelRowReader) else None
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {item.slide.id for item in chosen}

    def draw(item: LabelledSlide, output: HeadOutput, values: list[float]) -> None:
        if item.slide.id not in wanted or (scores := _scores_of(task, output, values)) is None:
            return
        words = zip(task.label_columns, task.words(task.numbers(item.target)), strict=True)
        label = ", ".join(f"{column} {word}" for column, word in words if word)
        name = item.slide.id.replace("/", "_")  # an id of a table is no way out of the folder
        caption = f"{item.slide.id}   predicted {task.shown(values)[1]}   {label}".rstrip()
        draw_heatmap(item, scores, decoder=decoder, caption=caption, path=folder / name)

    return draw
