"""Drawn slides: the planted anomaly, and nothing else, tells the label."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from e2e.errors import UserError
from e2e.toy import cohort as make_toy
from e2e.toy.cohort import main
from e2e.toy.paint import (
    AXIS_RATIO,
    LABELS,
    Box,
    SlideSpec,
    draw_settings,
    glyph,
    paint,
    plan,
    ring_outlines,
)
from tests.helpers.paths import ROOT

TOOL = ROOT / "tools" / "make_toy.py"
SMALLEST = make_toy.SMALLEST_SIZE


def twins(kind, split="train"):
    """One slide painted with either label."""
    pair = [SlideSpec("c", "c-1", split, label) for label in LABELS]
    return [paint(spec, kind, SMALLEST[kind], seed=0) for spec in pair]


@pytest.fixture(scope="module")
def micro():
    return twins("micro")


@pytest.fixture(scope="module")
def macro():
    return twins("macro")


def at_5x(image):
    return np.asarray(Image.fromarray(image).reduce(4))


def ink(image):
    """Counts of black and of white pixels (the ground of slide c-1 is darker than the white)."""
    return np.array([np.count_nonzero(image.max(2) < 30), np.count_nonzero(image.min(2) > 200)])


def inside(boxes, shape):
    mask = np.zeros(shape[:2], bool)
    for x, y, width, height in boxes:
        mask[y : y + height, x : x + width] = True
    return mask


def area_and_perimeter(points):
    following = np.roll(points, -1, axis=0)
    area = np.sum(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0]) / 2
    return abs(area), np.linalg.norm(following - points, axis=1).sum()


def test_plus_and_o_have_the_same_ink_outline_and_blocks():
    plus, o = glyph(plus=True), glyph(plus=False)
    assert plus.sum() == o.sum() == 2 * 16 * 4 - 4 * 4
    for axis in (0, 1):
        edges = [np.abs(np.diff(np.pad(g, 1), axis=axis)).sum() for g in (plus, o)]
        assert edges == [32, 32]
    blocks = [g.reshape(4, 4, 4, 4).sum((1, 3)) for g in (plus, o)]
    np.testing.assert_array_equal(*blocks)
    assert plus[8, 8] == 1
    assert o[8, 8] == 0


def test_a_plus_changes_single_pixels_inside_its_disc_alone(micro):
    normal, anomaly = micro
    assert normal.truth == []
    differ = (normal.image != anomaly.image).any(axis=2)
    assert not (differ & ~inside(anomaly.truth, differ.shape)).any()
    for x, y, width, height in anomaly.truth:
        assert differ[y : y + height, x : x + width].any()


def test_micro_labels_have_one_ink_and_one_image_at_5x(micro):
    normal, anomaly = (painted.image for painted in micro)
    assert (normal != anomaly).any()
    np.testing.assert_array_equal(normal.sum((0, 1), dtype=int), anomaly.sum((0, 1), dtype=int))
    np.testing.assert_array_equal(ink(normal), ink(anomaly))
    np.testing.assert_array_equal(at_5x(normal), at_5x(anomaly))


def test_the_drawn_share_of_discs_carries_the_plus(micro):
    normal, anomaly = micro
    black = np.count_nonzero(normal.image.max(2) < 30)
    discs = black / (math.pi * 14.25**2 - glyph(plus=True).sum())
    share = anomaly.settings["anomalous_share"]
    assert 0.7 * share < len(anomaly.truth) / discs < 1.3 * share


@pytest.mark.parametrize("ratio", [1.0, AXIS_RATIO])
@given(radius=st.floats(330, 450), border=st.floats(68, 84), angle=st.floats(0, math.pi))
def test_circle_and_ellipse_have_the_same_ink(ratio, radius, border, angle):
    outer, inner = (area_and_perimeter(p)[0] for p in ring_outlines(radius, border, angle, ratio))
    assert math.isclose(outer, math.pi * radius**2, rel_tol=1e-3)
    assert math.isclose(inner, math.pi * (radius - border) ** 2, rel_tol=1e-3)


def test_an_ellipse_has_its_axes_and_an_even_border():
    outer, inner = ring_outlines(400, 75, 0.3, AXIS_RATIO)
    reach = np.linalg.norm(outer, axis=1)
    assert math.isclose(reach.min() / reach.max(), AXIS_RATIO, rel_tol=1e-3)
    nearest = np.linalg.norm(outer[:, None] - inner[None], axis=2).min(axis=1)
    assert np.ptp(nearest) < 1
    assert 65 < nearest.mean() < 75


def test_ellipses_change_neither_ink_nor_anything_else(macro):
    normal, anomaly = macro
    assert normal.truth == []
    assert anomaly.truth
    differ = (normal.image != anomaly.image).any(axis=2)
    # A circle may reach out of the ellipse's box where the ellipse is narrow.
    wider = [Box(x - 120, y - 120, w + 240, h + 240) for x, y, w, h in anomaly.truth]
    wider = [Box(max(x, 0), max(y, 0), w, h) for x, y, w, h in wider]
    assert differ.any()
    assert not (differ & ~inside(wider, differ.shape)).any()
    black = [ink(painted.image)[0] for painted in macro]
    assert math.isclose(*black, rel_tol=2e-3)
    # What a shape covers of the tissue differs a little with the shape.
    means = [painted.image.mean((0, 1)) for painted in macro]
    np.testing.assert_allclose(*means, atol=1.0)


def auc(score, label):
    score, label = np.asarray(score), np.asarray(label, bool)
    return float((score[label][:, None] > score[~label][None]).mean())


def colour_auc(colour, label, split):
    """Test AUC of a logistic model on the mean colour, with its 95 % interval (bootstrap)."""
    train, test = split == "train", split == "test"
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(colour[train], label[train])
    score, truth = model.decision_function(colour[test]), label[test]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(truth), (1000, len(truth)))
    again = [auc(score[d], truth[d]) for d in draws if 0 < truth[d].sum() < len(truth)]
    return auc(score, truth), *np.quantile(again, [0.025, 0.975])


@pytest.fixture(scope="module")
def colours():
    """Mean colour over tissue, label and split of 100 small slides."""
    rows = [row for row in plan((60, 1, 40), seed=5) if row.split != "val"]
    colour = []
    for row in rows:
        image = paint(row, "micro", SMALLEST["micro"], seed=5).image
        colour.append(image[np.ptp(image, axis=2) > 25].mean(0))
    label = np.array([row.label == "anomaly" for row in rows])
    return np.array(colour), label, np.array([row.split for row in rows])


def test_mean_colour_does_not_tell_the_label(colours):
    _, low, high = colour_auc(*colours)
    assert low < 0.5 < high


def test_that_check_would_see_a_few_grey_levels(colours):
    colour, label, split = colours
    # Along the colours' tightest direction, as much as they vary there.
    _, spread, axes = np.linalg.svd(colour - colour.mean(0), full_matrices=False)
    shift = 2 * axes[-1] * spread[-1] / math.sqrt(len(colour))
    assert np.linalg.norm(shift) < 12
    _, low, _ = colour_auc(colour + label[:, None] * shift, label, split)
    assert low > 0.5


@pytest.mark.parametrize("kind", list(make_toy.KINDS))
def test_test_slides_are_painted_as_no_training_slide_is(kind):
    rng = np.random.default_rng(0)
    train = [draw_settings(rng, kind, test=False) for _ in range(50)]
    test = [draw_settings(rng, kind, test=True) for _ in range(50)]
    apart = {
        name
        for name in train[0]
        if max(s[name] for s in train) < min(s[name] for s in test)
        or max(s[name] for s in test) < min(s[name] for s in train)
    }
    assert apart >= {"eosin_hue", "hematoxylin_hue", "fibre_period", "nuclei_density", "ground"}
    assert not apart & set(make_toy.KINDS[kind]), "the anomaly is the same in every split"


@given(st.tuples(*[st.integers(2, 40)] * 3), st.integers(0, 99))
def test_cases_keep_their_slides_together_and_labels_balance(slides, seed):
    rows = plan(slides, seed)
    for split, count in zip(make_toy.SPLITS, slides, strict=True):
        of_split = [row for row in rows if row.split == split]
        assert len(of_split) == count
        labels = {row.case: row.label for row in of_split}
        anomalies = sum(label == "anomaly" for label in labels.values())
        assert 2 * anomalies in range(len(labels) - 1, len(labels) + 2)
    assert len({row.slide for row in rows}) == len(rows)
    for case in {row.case for row in rows}:
        assert len({(row.split, row.label) for row in rows if row.case == case}) == 1
    assert set(plan(tuple(n - 1 for n in slides), seed)) <= set(rows)


def test_some_cases_have_two_slides():
    cases = [row.case for row in plan((10, 1, 1), 0) if row.split == "train"]
    assert sorted(cases.count(case) for case in set(cases)) == [1] * 6 + [2] * 2


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "cohort"
    assert main(["--out", str(out), "--slides", "3,1,2", "--size", "512", "--workers", "2"]) == 0
    return out


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_openslide_reads_what_was_painted(cohort):
    row = SlideSpec(**table(cohort / "labels.csv")[0])
    painted = paint(row, "micro", 512, seed=0).image
    with openslide.OpenSlide(cohort / "slides" / f"{row.slide}.tif") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        assert slide.level_dimensions == ((512, 512), (256, 256))
        read = np.asarray(slide.read_region((0, 0), 0, (512, 512)).convert("RGB"))
    # JPEG's loss; swapped or converted colours would be off by tens.
    np.testing.assert_allclose(read.mean((0, 1)), painted.mean((0, 1)), atol=1)
    assert np.abs(read.astype(int) - painted).mean() < 4


def test_labels_of_a_5x_level_are_equal_to_the_byte(tmp_path, micro):
    large = [np.tile(painted.image, (4, 4, 1)) for painted in micro]
    levels = []
    for number, image in enumerate(large):
        make_toy.write_pyramid(tmp_path / f"{number}.tif", image)
        with openslide.OpenSlide(tmp_path / f"{number}.tif") as slide:
            assert slide.level_downsamples[2] == 4
            levels.append(np.asarray(slide.read_region((0, 0), 2, slide.level_dimensions[2])))
    np.testing.assert_array_equal(*levels)


def test_tables_agree_with_the_slides(cohort):
    labels, truth = table(cohort / "labels.csv"), table(cohort / "truth.csv")
    painter = json.loads((cohort / "painter.json").read_text())
    files = {path.stem for path in (cohort / "slides").iterdir()}
    assert files == {row["slide"] for row in labels} == set(painter["slides"])
    assert list(labels[0]) == ["case", "slide", "split", "label"]
    assert list(truth[0]) == ["slide", "x", "y", "width", "height"]
    anomalies = {row["slide"] for row in labels if row["label"] == "anomaly"}
    assert {row["slide"] for row in truth} == anomalies
    for row in truth:
        assert 26 <= int(row["width"]) <= 36
        assert 0 <= int(row["x"]) < int(row["x"]) + int(row["width"]) <= 512


def test_workers_and_counts_change_no_slide(cohort, tmp_path):
    out = tmp_path / "again"
    out.mkdir()
    assert main(["--out", str(out), "--slides", "2,1,1", "--size", "512", "--workers", "1"]) == 0
    for path in (out / "slides").iterdir():
        assert path.read_bytes() == (cohort / "slides" / path.name).read_bytes()
    main(["--out", str(tmp_path / "c"), "--slides", "1,1,1", "--size", "512", "--seed", "1"])
    for path in (tmp_path / "c" / "slides").iterdir():
        assert path.read_bytes() != (cohort / "slides" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slides", "4,0,2"], "--slides 4,0,2"),
        (["--slides", "4,2"], "64,16,48"),
        (["--slides", "4,-1,2"], "64,16,48"),
        (["--size", "500"], "multiple of 256"),
        (["--size", "0"], "at least 256"),
        (["--kind", "macro", "--size", "1024"], "at least 2048"),
        (["--workers", "0"], "--workers 0"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_is_written(tmp_path, arguments, says):
    with pytest.raises(UserError, match=says):
        main(["--out", str(tmp_path / "out"), *arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = subprocess.run(
        [sys.executable, TOOL, "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --out {tmp_path} contains files")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def full(path, image):
        raise OSError("no space left on device")

    monkeypatch.setattr(make_toy, "write_pyramid", full)
    with pytest.raises(OSError, match="no space"):
        main(["--out", str(tmp_path / "o"), "--slides", "1,1,1", "--size", "512", "--workers", "1"])
    assert list(tmp_path.iterdir()) == []
