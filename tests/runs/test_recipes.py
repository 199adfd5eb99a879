"""Every recipe of configs/recipes: its header's command, built as published and run for two real steps."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from e2e.runs.parts import REGISTRIES, build_model, build_task, on_features
from e2e.runs.train import train
from e2e.settings.arguments import settings_from_args
from e2e.settings.cli import train_parser
from e2e.settings.configs import config_folder
from e2e.settings.schema import Settings
from tests.helpers.configured_cohorts import small_cohort
from tests.helpers.feature_cohort import write_slide
from tests.helpers.paths import ROOT
from tests.helpers.stores import write_store

RECIPES = sorted(path.stem for path in (config_folder() / "recipes").glob("*.yaml"))
HEAD_PARAMETERS = {
    "abmilx_r18_panda": 2_546_305,
    "abmilx_r18_brca": 135_265,
    "abmilx_r50_brca": 332_641,
    "abmilx_r18_surv_brca": 135_810,
    "abmilx_uni_brca": 801_028,
}
"""Of the published module, counted (no figure for the others)."""


def header(recipe: str) -> str:
    lines = (config_folder() / "recipes" / f"{recipe}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))


def command(recipe: str) -> list[str]:
    """What the header gives launch/train.py."""
    (line,) = (line for line in header(recipe).splitlines() if "launch/train.py" in line)
    return shlex.split(line.partition("launch/train.py")[2])


def settings_for(recipe: str, *more: str) -> tuple[Settings, Path]:
    return settings_from_args(train_parser().parse([*command(recipe), *more]), REGISTRIES)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    """Headers name the recipe from there."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_header_has_the_command_the_paper_its_figure_and_whether_it_was_run(recipe):
    text = header(recipe)
    for part in ("arXiv:", "Published", "Here: not yet run", "Not as there:"):
        assert part in text.replace("\n", "")
    assert f"--model configs/recipes/{recipe}.yaml" in text
    assert "RTX 3090" in text or "GPU" in text
    settings, folder = settings_for(recipe)
    assert folder.name == f"{settings.names['datasets']}_{recipe}"
    if on_features(settings):
        assert "launch/extract.py" in text
        assert settings.data.features
    if settings.names["datasets"] in ("brca", "surv_brca"):
        assert "Honest here:" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_builds_and_its_head_has_the_published_number_of_parameters(recipe):
    settings, _ = settings_for(recipe)
    width = 1024 if on_features(settings) else None
    task = build_task(settings.task)
    model = build_model(settings, task, torch.device("cpu"), trained=True, width=width)
    count = sum(p.numel() for p in model.head.parameters())
    assert count == HEAD_PARAMETERS.get(recipe, count)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_two_steps_and_is_evaluated(recipe, tmp_path, capsys):
    settings, _ = settings_for(recipe)
    overrides, slides = small_cohort(settings, tmp_path)
    if on_features(settings):
        for k, slide in enumerate(slides):
            found = np.random.default_rng(k).normal(size=(2 + k % 5, 8)).astype(np.float32)
            write_slide(tmp_path / "features", slide, found)
        overrides += [f"data.features=[{tmp_path}/features]"]
    else:
        for name in ("fine", "coarse"):
            write_store(tmp_path / f"{name}.lmdb", {s: 1 + k % 5 for k, s in enumerate(slides)})
        overrides += [
            f"data.stores=[{tmp_path}/fine.lmdb]", f"data.scales=[[{tmp_path}/coarse.lmdb]]",
            "encoder.name=r18", "encoder.pretrained=false", "bag.patches=4", "bag.size=32",
        ]  # fmt: skip
    settings, folder = settings_for(
        recipe, *overrides, "optim.bags=8", "optim.epochs=1", "engine.device=cpu",
        "data.workers=1", "run.bootstrap=10", "run.heatmaps=0", f"run.out={tmp_path}/run",
    )  # fmt: skip
    train(settings, folder, resume=False)
    is_said = "(data.scales) are for training" in capsys.readouterr().out
    assert is_said == bool(settings.data.scales)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in log) == 2
    assert all(np.isfinite(entry["train_loss"]) for entry in log if "train_loss" in entry)
    found = json.loads((folder / "metrics.json").read_text())
    assert found
