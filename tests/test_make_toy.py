"""The drawn slides: readable by OpenSlide, repeatable, and alike in ink and colour in both classes."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from e2e.errors import exit_code
from e2e.wsi.slide import WholeSlide
from tools import make_toy


def make(monkeypatch, out, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["make_toy.py", "--out", str(out), *map(str, options)])
    return exit_code(make_toy.main)


def test_both_glyphs_have_the_same_ink_in_every_block_that_5x_averages():
    plus, other = make_toy.glyph(plus=True), make_toy.glyph(plus=False)
    assert plus.sum() == other.sum() > 0
    assert not np.array_equal(plus, other)
    blocks = [glyph.reshape(4, 4, 4, 4).sum(axis=(1, 3)) for glyph in (plus, other)]
    np.testing.assert_array_equal(*blocks)


def test_a_cohort_opens_in_openslide_and_does_not_depend_on_workers(tmp_path, monkeypatch):
    options = ("--slides", "6,2,2", "--size", 256, "--seed", 3)
    assert make(monkeypatch, tmp_path / "a", *options, "--workers", 1) == 0
    assert make(monkeypatch, tmp_path / "b", *options, "--workers", 2) == 0
    table = pd.read_csv(tmp_path / "a" / "labels.csv", dtype=str)
    assert list(table) == ["case", "slide", "split", "label"]
    assert table["split"].value_counts().to_dict() == {"train": 6, "val": 2, "test": 2}
    assert (table.groupby("case")[["split", "label"]].nunique() == 1).all(axis=None)
    assert table["case"].nunique() < len(table)  # some cases have two slides
    for slide in table["slide"]:
        first, second = (tmp_path / run / "slides" / f"{slide}.tif" for run in "ab")
        assert first.read_bytes() == second.read_bytes()
        opened = WholeSlide(first)
        assert (opened.width, opened.height, opened.mpp) == (256, 256, pytest.approx(0.5, rel=1e-3))
    truth = pd.read_csv(tmp_path / "a" / "truth.csv")
    anomalous = set(table["slide"][table["label"] == "anomaly"])
    assert set(truth["slide"]) == anomalous


def test_test_slides_are_painted_with_settings_no_training_slide_has(tmp_path, monkeypatch):
    for ranges in (make_toy.COMMON, *make_toy.KINDS.values()):
        for (low, high), (test_low, test_high) in ranges.values():
            assert low <= high
            assert test_low <= test_high
    apart = [n for n, (a, b) in make_toy.COMMON.items() if a[1] < b[0] or b[1] < a[0]]
    assert {"eosin_hue", "hematoxylin_hue", "fibre_period", "nuclei_density"} <= set(apart)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["micro", "macro"])
def test_mean_colour_does_not_tell_the_classes_apart(kind):
    size = make_toy.DEFAULT_SIZE[kind] if kind == "micro" else make_toy.SMALLEST_SIZE[kind]
    count = 120 if kind == "micro" else 24
    specs = [
        make_toy.SlideSpec(f"c{k}", f"train{k:03d}-1", "train", make_toy.LABELS[k % 2])
        for k in range(count)
    ]
    size = 512 if kind == "micro" else size
    colour = np.array([make_toy.paint(s, kind, size, 0).image.mean((0, 1)) for s in specs])
    label = np.arange(count) % 2
    scaled = (colour - colour.mean(0)) / colour.std(0)
    half = count // 2
    model = LogisticRegression().fit(scaled[:half], label[:half])
    auc = roc_auc_score(label[half:], model.predict_proba(scaled[half:])[:, 1])
    # Three standard deviations of the AUC of a coin, with n/2 slides of each class.
    assert abs(auc - 0.5) < 3 * np.sqrt((half + 1) / (12 * (half / 2) ** 2))


@pytest.mark.parametrize(
    "options", [("--slides", "0,1,1"), ("--slides", "a,b,c"), ("--slides", "1,1"), ("--size", 100)]
)
def test_bad_options_are_one_message(tmp_path, monkeypatch, capsys, options):
    assert make(monkeypatch, tmp_path / "x", *options) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_in_use_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert make(monkeypatch, tmp_path, "--slides", "1,1,1") == 2
    assert "empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
