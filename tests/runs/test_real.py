"""On real tissue: two real slides, and a cohort laid out from real lung images, all the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from e2e.images.decode import build_decoder
from e2e.store.lmdb import PatchStore
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def command(*argv: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cohort(shared_data, tmp_path_factory) -> Path:
    """Twelve small lung slides, packed at 1 um/px."""
    folder = tmp_path_factory.mktemp("lung")
    maker = shared_data / "make_cohort.py"
    command(maker, "--out", folder, "--slides-per-split", "6,3,3", "--grid", 6)
    out = ("--out", folder / "s.lmdb", "--mpp", 1.0, "--patch-size", 112, "--workers", 2)
    command("tools/pack_lmdb.py", "--slides", folder / "slides", *out)
    return folder


def train(cohort: Path, run: str, *settings: str) -> tuple[Path, str]:
    """The run folder, and what was said."""
    said = command(
        "launch/train.py", "--datasets", "lung", "--model", "e2e_r18_abmilx", "-c", "configs/demo.yaml",
        f"data.labels={cohort}/labels.csv", f"data.stores=[{cohort}/s.lmdb]", "engine.device=cpu",
        "optim.epochs=2", "optim.bags=3", "bag.patches=6", "bag.size=64", "engine.chunk=12",
        f"run.out={cohort}/{run}", "run.bootstrap=50", "run.heatmaps=1", *settings,
    )  # fmt: skip
    return cohort / run, said


def test_both_real_slides_are_packed_at_half_a_micrometre(shared_data, tmp_path):
    (tmp_path / "mpp.csv").write_text("slide,mpp\ntcga-cr-7395-01a-01-ts1,0.25\n")
    said = command(
        "tools/pack_lmdb.py", "--slides", shared_data / "slides", "--out", tmp_path / "real.lmdb",
        "--mpp", 0.5, "--mpp-override", tmp_path / "mpp.csv", code=3,
    )  # fmt: skip
    assert "unreadable: quarantined" in said
    store = PatchStore(tmp_path / "real.lmdb")
    assert store.slides == ["cmu-1-small-region", "tcga-cr-7395-01a-01-ts1"]
    for slide, level0_px in (
        ("cmu-1-small-region", 256 * 0.5 / 0.499),
        ("tcga-cr-7395-01a-01-ts1", 512),
    ):
        record = store.record(slide)
        assert record.num_patches > 20
        assert record.level0_px == pytest.approx(level0_px)
        pixels = build_decoder().decode(store.read(slide, range(record.num_patches))).float()
        assert pixels.shape == (record.num_patches, 3, 256, 256)
        red, green, blue = pixels.mean((0, 2, 3)).tolist()
        assert green < min(red, blue)  # stained with H&E, in this channel order
    assert not list(store.find_damage("cmu-1-small-region"))


def test_a_lung_cohort_trains_end_to_end_from_random_weights(cohort):
    run, said = train(cohort, "random")
    assert "BatchNorm chunk" in said
    report = json.loads((run / "metrics.json").read_text())
    assert report["test"]["slides"] == 3
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in losses if "loss" in line]).all()


def test_a_lung_cohort_trains_end_to_end_from_imagenet_weights_in_a_file(cohort, shared_data):
    weights = shared_data / "weights" / "tf_efficientnet_lite0_timmkeys.pt"
    run, said = train(
        cohort, "lite0", "encoder.name=tf_efficientnet_lite0", f"encoder.weights={weights}",
        "optim.lr=1e-4",
    )  # fmt: skip
    assert "BatchNorm frozen" in said  # running statistics of trained weights are kept
    assert len(pd.read_csv(run / "predictions.csv")) == 6


def test_new_slides_are_predicted_as_the_run_was_trained(cohort, shared_data, tmp_path):
    run, _ = train(cohort, "for_predict")
    slides = tmp_path / "slides"
    slides.mkdir()
    held = sorted((cohort / "slides").iterdir())[-3:]
    for path in held:
        (slides / path.name).symlink_to(path)
    (slides / "unreadable.svs").symlink_to(shared_data / "slides" / "unreadable.svs")
    out = tmp_path / "out"
    said = command("launch/predict.py", slides, "--run", run, "--out", out, code=3)
    assert "unreadable" in said
    new = pd.read_csv(out / "predictions.csv", dtype={"slide": str}).set_index("slide")
    old = pd.read_csv(run / "predictions.csv", dtype={"slide": str}).set_index("slide")
    columns = ["prob_LUAD", "prob_LUSC"]
    assert list(new.index) == [path.stem for path in held]
    np.testing.assert_allclose(new[columns], old.loc[new.index, columns], rtol=1e-5)
    for slide in new.index:
        heat = pd.read_csv(out / "heatmaps" / f"{slide}.csv")
        assert (
            heat[["x", "y"]].to_numpy() == PatchStore(cohort / "s.lmdb").record(slide).coords
        ).all()
        assert heat["score"].sum() == pytest.approx(1)
