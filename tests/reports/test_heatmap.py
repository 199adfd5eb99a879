"""Heatmaps: the scores of the head, at the coordinates of the store."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image
from scipy.stats import rankdata

import e2e.heads
import e2e.tasks  # noqa: F401  (each registers its plug-ins)
from e2e.bags.readers import FeatureRowReader
from e2e.bags.spec import LabelledSlide
from e2e.errors import DamagedDataError
from e2e.heads.base import HEADS, HeadOutput
from e2e.images.decode import build_decoder
from e2e.log import Screen
from e2e.reports.heatmap import draw_heatmap, heatmap_writer, patch_scores, percentile_ranks
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.tasks.base import TASKS
from tests.helpers.stores import RECIPE, jpeg, record

SIDE = 768  # px of the longer side of a panel
BAR = 24  # px of the caption over it


@given(st.lists(st.sampled_from([-1.5, 0.0, 1e-9, 0.25, 3.0]) | st.floats(-10, 10), min_size=2))
def test_percentile_ranks_equal_scipy_and_lie_in_0_to_1(scores):
    values = np.array(scores)
    expected = (rankdata(values) - 1) / (len(values) - 1)
    np.testing.assert_allclose(percentile_ranks(values), expected, atol=1e-12)


def test_equal_scores_have_rank_one_half():
    assert percentile_ranks(np.array([0.3])).tolist() == [0.5]
    assert percentile_ranks(np.full(4, 0.3)).tolist() == [0.5] * 4
    assert percentile_ranks(np.array([5.0, 1.0, 5.0])).tolist() == [0.75, 0.0, 0.75]


def unasked(logits: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"the task was asked of {tuple(logits.shape)}")


def test_attention_is_averaged_over_its_maps():
    logits = torch.tensor([[[0.0, 0.0, float("-inf")], [3.0, 3.0, 3.0]]])
    scores = patch_scores(HeadOutput(torch.zeros(1, 2), attention_logits=logits), 1, unasked)
    expected = [(1 / 2 + 1 / 3) / 2, (1 / 2 + 1 / 3) / 2, (0 + 1 / 3) / 2]
    assert scores is not None
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_class_maps_show_the_map_of_the_class():
    logits = torch.tensor([[[0.0, 0.0, float("-inf")], [3.0, 3.0, 3.0]]])
    output = HeadOutput(torch.zeros(1, 2), attention_logits=logits, class_maps=True)
    for shown, expected in ((0, [1 / 2, 1 / 2, 0]), (1, [1 / 3] * 3)):
        scores = patch_scores(output, shown, unasked)
        assert scores is not None
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_head_without_attention_shows_the_probability_of_the_class():
    logits = torch.tensor([[[1.0, 3.0], [6.0, 2.0]]]).log()
    output = HeadOutput(torch.zeros(1, 2), instance_logits=logits)
    for shown, expected in ((0, [1 / 4, 6 / 8]), (1, [3 / 4, 2 / 8])):
        scores = patch_scores(output, shown, lambda logits, k=shown: logits.softmax(dim=-1)[:, k])
        assert scores is not None
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert patch_scores(HeadOutput(torch.zeros(1, 2)), 0, unasked) is None


def max_of_five(outputs: int) -> tuple[HeadOutput, list[HeadOutput]]:
    """What the max head makes of five patches, and of each alone."""
    torch.manual_seed(0)
    head = HEADS.build("max", 8, outputs).eval()
    features = torch.randn(1, 5, 8)
    with torch.no_grad():
        output = head(features, torch.ones(1, 5, dtype=torch.bool))
        alone = [head(features[:, n : n + 1], torch.ones(1, 1, dtype=torch.bool)) for n in range(5)]
    assert output.attention() is None
    return output, alone


def test_scores_of_the_max_head_are_those_of_its_patches():
    output, alone = max_of_five(3)
    scores = patch_scores(output, 2, lambda logits: logits.softmax(dim=-1)[:, 2])
    assert scores is not None
    expected = [single.logits.softmax(dim=-1)[0, 2].item() for single in alone]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_with_one_output_a_patch_has_the_logit_of_a_slide_of_that_patch():
    output, alone = max_of_five(1)
    scores = patch_scores(output, 0, lambda logits: logits[:, 0])
    assert scores is not None
    np.testing.assert_allclose(scores, [single.logits.item() for single in alone], rtol=1e-5)
    assert len(set(scores)) == 5
    assert scores.max() == pytest.approx(output.logits.item())


def test_a_head_that_shows_its_scores_keeps_their_sign():
    logits, scores = torch.zeros(1, 2, 3), torch.tensor([[[1.0, -4.0], [-2.0, 5.0], [0.0, 0.5]]])
    output = HeadOutput(torch.zeros(1, 2), logits, scores, class_maps=True, show_scores=True)
    for shown in (0, 1):
        of_output = patch_scores(output, shown, unasked)
        assert of_output is not None
        np.testing.assert_array_equal(of_output, scores[0, :, shown])


@pytest.mark.parametrize("outputs", [1, 3])
def test_attrimil_map_is_the_contribution_of_each_patch_to_the_class_logit(outputs):
    torch.manual_seed(0)
    head = HEADS.build("attrimil", 8, outputs).eval()
    with torch.no_grad():
        output = head(torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool))
    for shown in range(outputs):
        scores = patch_scores(output, shown, unasked)
        assert scores is not None
        assert scores.min() < 0 < scores.max()
        expected = float((output.logits[0, shown] - head.bias[shown]).detach())
        assert scores.mean() == pytest.approx(expected, abs=1e-6)


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (120, 120, 120)]
COORDS = [(1000, 500), (1064, 500), (1128, 500), (1000, 564), (1128, 564)]  # 3 x 2, one missing


@pytest.fixture
def item(tmp_path):
    coords = np.array(COORDS, np.int32)
    jpegs = [jpeg(Image.new("RGB", (32, 32), colour), quality=95) for colour in COLOURS]
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", 5, coords=coords), jpegs)
    slide = Slide("s", "s", "test", {})
    return LabelledSlide(slide, PatchStore(tmp_path / "x.lmdb"), torch.tensor(0))


SCORES = np.array([0.1, 0.4, 0.2, 0.25, 0.05])


def drawn(item, tmp_path) -> np.ndarray:
    path = tmp_path / "maps" / "s.v1"  # an id with a dot
    draw_heatmap(item, SCORES, decoder=build_decoder(), caption="s: LUAD 0.9", path=path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["s.v1.csv", "s.v1.png"]
    return np.asarray(Image.open(io.BytesIO((path.parent / "s.v1.png").read_bytes())))


def test_the_table_has_the_coordinates_of_the_store_and_the_raw_scores(item, tmp_path):
    drawn(item, tmp_path)
    table = pd.read_csv(tmp_path / "maps" / "s.v1.csv")
    assert list(table.columns) == ["slide", "x", "y", "side", "score", "percentile"]
    assert set(table.slide) == {item.slide.id}
    assert list(zip(table.x, table.y, strict=True)) == COORDS
    assert set(table.side) == {64.0}
    np.testing.assert_array_equal(table.score, SCORES)
    assert table.percentile.tolist() == [25, 100, 50, 75, 0]


def cell(picture: np.ndarray, x: int, y: int, panel: int) -> np.ndarray:
    """The middle of the grid cell (x, y) of 3 x 2, in the left (0) or right (1) panel."""
    step = SIDE / 3
    left = panel * (SIDE + 8)
    return picture[BAR + int((y + 0.5) * step), left + int((x + 0.5) * step)].astype(int)


def test_the_image_shows_tissue_on_the_left_and_scores_over_it_on_the_right(item, tmp_path):
    picture = drawn(item, tmp_path)
    assert picture.shape == (2 * SIDE // 3 + BAR, 2 * SIDE + 72, 3)
    cells = [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]
    for (x, y), colour, rank in zip(cells, COLOURS, [0.25, 1.0, 0.5, 0.75, 0.0], strict=True):
        assert cell(picture, x, y, 0) == pytest.approx(np.array(colour), abs=4)
        heat = np.array(colormaps["turbo"](rank)[:3]) * 255
        assert cell(picture, x, y, 1) == pytest.approx(0.45 * np.array(colour) + 0.55 * heat, abs=4)
    for panel in (0, 1):
        assert cell(picture, 1, 1, panel).tolist() == [245] * 3  # no patch, no colour


def test_an_id_with_slashes_stays_in_the_folder(tmp_path):
    name = "out/s"
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record(name, 2), [jpeg(0), jpeg(1)])
    slide = LabelledSlide(
        Slide(name, name, "test", {}), PatchStore(tmp_path / "x.lmdb"), torch.tensor(0)
    )
    task = TASKS.build("classification", classes=["a", "b"])
    folder = tmp_path / "run" / "heatmaps"
    draw = heatmap_writer(task, FeatureRowReader(1 << 20), folder, [slide], Screen(is_leader=True))
    draw(slide, HeadOutput(torch.zeros(1, 2), attention_logits=torch.zeros(1, 1, 2)), [0.25, 0.75])
    assert [path.name for path in folder.glob("*.png")] == ["out%2Fs.png"]
    assert sorted(path.name for path in tmp_path.glob("*") if path.suffix == "") == ["run"]


def test_a_heatmap_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", 2), [jpeg(0), jpeg(1)])
    slide = LabelledSlide(
        Slide("s", "s", "test", {}), PatchStore(tmp_path / "x.lmdb"), torch.tensor(0)
    )
    task = TASKS.build("classification", classes=["a", "b"])
    (tmp_path / "heatmaps").write_text("a file where the folder belongs")
    screen = Screen(is_leader=True)
    draw = heatmap_writer(task, FeatureRowReader(1 << 20), tmp_path / "heatmaps", [slide], screen)
    draw(slide, HeadOutput(torch.zeros(1, 2), attention_logits=torch.zeros(1, 1, 2)), [0.25, 0.75])
    assert "warning: no heatmap of slide 's': " in capsys.readouterr().out


def test_overlapping_patches_show_their_mean(tmp_path):
    coords = np.array([(0, 0), (32, 0), (64, 0)], np.int32)  # of 64 px, each half on the next
    black = jpeg(Image.new("RGB", (32, 32), "black"), quality=95)
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", 3, coords=coords), [black] * 3)
    slide = LabelledSlide(
        Slide("s", "s", "test", {}), PatchStore(tmp_path / "x.lmdb"), torch.tensor(0)
    )
    scores = np.array([0.0, 1.0, 2.0])  # ranks 0, 0.5, 1
    draw_heatmap(slide, scores, decoder=build_decoder(), caption="", path=tmp_path / "s")
    with Image.open(tmp_path / "s.png") as image:
        row = np.asarray(image).astype(int)[BAR + 10, SIDE + 8 :]
    for part, mean in enumerate((0.0, 0.25, 0.75, 1.0)):
        expected = 0.55 * np.array(colormaps["turbo"](mean)[:3]) * 255
        assert row[int((part + 0.5) * SIDE / 4)] == pytest.approx(expected, abs=4)


def test_patches_touch_without_gaps(item, tmp_path):
    picture = drawn(item, tmp_path)
    row = picture[BAR + SIDE // 6, :SIDE].astype(int)
    ground = (np.abs(row - 245).max(axis=1) < 3).sum()
    assert ground == 0


def strip(tmp_path, columns: int, rows: int, caption: str) -> np.ndarray:
    """The picture of a grid without a patch missing."""
    coords = np.array([(64 * x, 64 * y) for y in range(rows) for x in range(columns)], np.int32)
    black = jpeg(Image.new("RGB", (32, 32), "black"), quality=95)
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", len(coords), coords=coords), [black] * len(coords))
    slide = LabelledSlide(
        Slide("s", "s", "test", {}), PatchStore(tmp_path / "x.lmdb"), torch.tensor(0)
    )
    scores = np.arange(float(len(coords)))
    path = tmp_path / "s"
    draw_heatmap(slide, scores, decoder=build_decoder(), caption=caption, path=path)
    with Image.open(tmp_path / "s.png") as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("columns", [7, 175, 180, 256])
def test_patches_touch_however_many_there_are_in_a_row(tmp_path, columns):
    picture = strip(tmp_path, columns, 2, "")
    assert picture[BAR + 1, :SIDE].max() < 20


def test_the_caption_of_a_narrow_slide_is_complete(tmp_path):
    caption = "TCGA-A1-A0SB-01Z-00-DX1.B34C267B   predicted malignant (0.98)   label malignant"
    narrow, wide = (
        strip(tmp_path / name, columns, 40, caption)[:BAR]
        for name, columns in (("narrow", 1), ("wide", 40))
    )
    dark = [int((bar < 128).any(axis=2).sum()) for bar in (narrow, wide)]
    assert dark[0] == dark[1] > 100


def test_an_undecodable_patch_is_named_with_the_fix(tmp_path):
    jpegs = [jpeg(k) for k in range(300)]
    jpegs[270] = b"\xff\xd8 no more"
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", 300), jpegs)
    damaged = LabelledSlide(
        Slide("s", "s", "test", {}), PatchStore(tmp_path / "x.lmdb"), torch.tensor(0)
    )
    with pytest.raises(DamagedDataError, match=r"x.lmdb: slide 's' patch 270 is ") as error:
        draw_heatmap(
            damaged, np.arange(300.0), decoder=build_decoder(), caption="", path=tmp_path / "s"
        )
    assert "e2e inspect --verify" in str(error.value)
    assert not list(tmp_path.glob("s.*"))


def test_a_slide_of_one_patch_has_an_image(tmp_path):
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", 1), [jpeg(0)])
    slide = Slide("s", "s", "test", {})
    single = LabelledSlide(slide, PatchStore(tmp_path / "x.lmdb"), torch.tensor(0))
    path = tmp_path / "s"
    draw_heatmap(single, np.array([1.0]), decoder=build_decoder(), caption="", path=path)
    with Image.open(tmp_path / "s.png") as image:
        assert image.size == (2 * SIDE + 72, SIDE + BAR)
