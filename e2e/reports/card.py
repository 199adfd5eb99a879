"""The model card of an exported model, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import e2e
from e2e.reports.escape import escape_markdown
from e2e.reports.evaluate import describe_epoch, metric_table

SPLITS = {"train": "training", "val": "validation", "test": "test"}
"""Split -> its name in the card."""


@dataclass(frozen=True)
class ModelFacts:
    """What a card says about a model; it has neither ids of slides nor paths."""

    name: str
    """Name of the model, such as ``e2e_r18_abmilx``."""
    task: str
    """Name of the task, such as ``classification``."""
    outputs: Sequence[str]
    """What is predicted, such as the classes."""
    encoder: str
    head: str
    parameters: int
    """Number of parameters of encoder and head."""
    origin: str
    """A sentence about what the encoder's weights started from, and their licence."""
    inputs: str
    """What the model reads: how slides are cut, or which features."""
    cohort: str
    """Name of the training cohort."""
    source: str
    """Where slides and labels come from (``data.source``); empty if the settings do not say."""
    slides: Mapping[str, tuple[int, int]]
    """Split -> number of slides and of cases."""
    report: Mapping[str, Any]
    """The content of metrics.json; empty for a run that was not evaluated."""
    metrics: Sequence[str]
    """The metrics of the report to show."""
    licence: str
    """SPDX identifier of the model's licence; empty if none was given."""


def count_slides(cohort: Path) -> dict[str, tuple[int, int]]:
    """Return split -> number of slides and of cases, from the cohort.csv of a run."""
    table = pd.read_csv(cohort, dtype=str, keep_default_na=False)
    used = table.loc[table["left_out"] == ""]
    slides = Counter(used["split"])
    cases = Counter(used.drop_duplicates(["split", "case"])["split"])
    return {split: (slides[split], cases[split]) for split in SPLITS if slides[split]}


def write_card(facts: ModelFacts) -> str:
    """Return the card as Markdown, with the header of the Hugging Face hub."""
    header = {
        "library_name": "e2e-mil",
        "license": facts.licence or "other",
        "tags": ["pathology", "whole-slide-images", "multiple-instance-learning", facts.task],
    }
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
            f"# {facts.name}: {facts.task} of whole-slide images",
            "",
            f"Encoder `{facts.encoder}` and multiple-instance head `{facts.head}`, "
            f"{facts.parameters / 1e6:.2f} M parameters, trained with e2e-mil {e2e.__version__} "
            "from slide labels.",
            "",
            f"- **Predicts:** {', '.join(f'`{name}`' for name in facts.outputs)}",
            f"- **Reads:** {facts.inputs}",
            f"- **Cohort:** {facts.cohort}" + (f" ({facts.source})" if facts.source else ""),
            *_slide_lines(facts.slides),
            f"- **Weights:** {facts.origin}",
            "",
            "## Metrics",
            "",
            *_metric_lines(facts.report, facts.metrics),
            "",
            "## Use",
            "",
            "```python",
            "import e2e",
            "",
            'table = e2e.load_run("THIS_FOLDER").predict("slides/")',
            "```",
            "",
            "or `e2e predict slides/ --run THIS_FOLDER`.",
            "",
            "## Licence and limits",
            "",
            _licence_line(facts.licence),
            "The licences of the weights that training started from, and of the training data, also hold for"
            " this model.",
            "For research only: it is not a medical device, and slides from other scanners, stains or"
            " hospitals may give other results.",
            "",
        ]
    )


def _slide_lines(slides: Mapping[str, tuple[int, int]]) -> list[str]:
    counts = [
        f"{num_slides} slides of {num_cases} cases for {SPLITS[split]}"
        for split, (num_slides, num_cases) in slides.items()
    ]
    return [f"- **Slides:** {', '.join(counts)}"] if counts else []


def _metric_lines(report: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    if not report:
        return ["The run was not evaluated."]
    header, rows = metric_table(report, metrics)
    lines = [header, ["---"] * len(header), *rows]
    return [
        f"Weights of {describe_epoch(report)}. 95 % bootstrap intervals over cases; metrics.json has all"
        " metrics.",
        "",
        *(f"| {' | '.join(map(escape_markdown, cells))} |" for cells in lines),
    ]


def _licence_line(licence: str) -> str:
    if licence:
        return f"Licence: {licence}."
    return "No licence was given: ask the authors before any use beyond looking at it."
