"""The two-stage mode: heads on frozen features, from files to results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from e2e.bags.epoch_plan import WINDOW, group_by_size, plan_epoch
from e2e.bags.loader import TrainingLoader, full_bag
from e2e.bags.readers import FeatureRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.encoders.base import ENCODERS
from e2e.engine.model import MILModel, pad
from e2e.features.check import describe_encoder
from e2e.features.reader import open_features
from e2e.heads.base import HEADS
from e2e.slides import Slide
from e2e.tasks.base import TASKS
from launch import evaluate, predict, train
from tests.helpers.commands import TORCHRUN, call
from tests.helpers.feature_cohort import COUNTS, D, arguments, features_of, write_slide
from tests.helpers.feature_cohort import cohort as cohort
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")


def write_unusable(folder: Path, k: int) -> None:
    """A slide with NaN, of as many patches as no other has: it is not read to find copies."""
    found = features_of(k, 20 + k)
    found[4, 3] = np.nan
    write_slide(folder, f"s{k:02d}", found)


def items_of(cohort: Path) -> list[LabelledSlide]:
    store = open_features(cohort / "feats")
    return [
        LabelledSlide(Slide(slide, slide, "train", {}), store, torch.tensor(k % 2))
        for k, slide in enumerate(COUNTS)
    ]


def model_of(head: str = "abmil", **options: object) -> MILModel:
    torch.manual_seed(0)
    encoder = ENCODERS.build("features", dim=D)
    return MILModel(encoder, HEADS.build(head, D, 2, **options), chunk=sys.maxsize)


# --- batches ---


@pytest.mark.parametrize("head", ["abmil", "max", "transmil", "clam_mb"])
def test_a_batch_of_features_is_its_bags_one_by_one(cohort, head):
    items, view, model = items_of(cohort), BagSpec(FeatureRowReader(1 << 20)), model_of(head).eval()
    loader = TrainingLoader(items, view, bags=len(items), chunk=1, single_chunk_per_bag=True)
    ((bag, count),) = loader.epoch(0, rank=0, world_size=1)
    (together,) = model(bag, CPU)
    assert count == len(items)
    for row, slide in enumerate(bag.slides):
        item = next(item for item in items if item.slide.id == slide)
        (alone,) = model(full_bag(item, view, model.chunk), CPU)
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_padding_is_0_its_mask_says_so_and_half_precision_becomes_single():
    rows = [torch.ones(2, 3, dtype=torch.float16), torch.full((4, 3), 2.0, dtype=torch.float16)]
    padded, mask = pad(rows)
    assert padded.dtype == torch.float32
    assert padded.sum(dim=2).tolist() == [[3, 3, 0, 0], [6, 6, 6, 6]]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_the_features_are_those_of_the_files_in_the_order_that_was_drawn(cohort):
    view = BagSpec(FeatureRowReader(0), seed=3, bag_size=4)
    item = items_of(cohort)[10]
    loader = TrainingLoader([item], view, bags=1, chunk=1, single_chunk_per_bag=True)
    ((bag, _),) = loader.epoch(0, rank=0, world_size=1)
    (rows,), _ = view.rows(item, 0)
    stored = features_of(10, COUNTS["s10"])
    np.testing.assert_array_equal(bag.pixels(0, 4, CPU).numpy(), stored[rows.indices])
    np.testing.assert_array_equal(bag.coords[0].numpy()[:, 0], rows.indices % 4 * 256)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 5)
)
def test_every_slide_is_in_one_update_of_full_size_but_for_the_last(sizes, bags, epoch):
    plan = plan_epoch(len(sizes), bags, seed=1, epoch=epoch, sizes=sizes)
    assert sorted(k for update in plan for k in update) == list(range(len(sizes)))
    assert all(len(update) == bags for update in plan[:-1])
    assert 0 < len(plan[-1]) <= bags
    assert plan == plan_epoch(len(sizes), bags, seed=1, epoch=epoch, sizes=sizes)


def padding(plan: list[list[int]], sizes: list[int]) -> float:
    """Share of padded rows that is no patch."""
    padded = sum(len(update) * max(sizes[k] for k in update) for update in plan)
    return 1 - sum(sizes) / padded


def test_slides_of_like_size_share_an_update_yet_others_in_the_next_epoch():
    sizes = np.random.default_rng(0).integers(500, 4001, 1000).tolist()
    plans = [plan_epoch(1000, 8, seed=0, epoch=k, sizes=sizes) for k in range(2)]
    assert max(padding(plan, sizes) for plan in plans) < 0.15
    assert padding(plan_epoch(1000, 8, seed=0, epoch=0), sizes) > 0.3
    partners = [{frozenset((a, b)) for u in plan for a in u for b in u if a < b} for plan in plans]
    assert len(partners[0] & partners[1]) < 0.1 * len(partners[0])
    means = [np.mean([sizes[k] for k in update]) for update in plans[0]]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3  # no walk from small to large


def test_a_window_is_as_many_updates_as_it_says():
    plan = group_by_size(range(200), list(range(200)), 2, seed=0, epoch=0)
    first = {k for update in plan[:WINDOW] for k in update}
    assert first == set(range(2 * WINDOW))


# --- the cache ---


class Counted:
    """A store that remembers what was read."""

    def __init__(self, store) -> None:
        self.store, self.path, self.read = store, store.path, []

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def features(self, slide: str) -> Tensor:
        self.read.append(slide)
        return self.store.features(slide)


def test_what_is_known_of_a_slide_is_read_once(cohort):
    store = open_features(cohort / "feats")
    first = store.record("s04")
    (cohort / "feats" / "s04.h5").unlink()
    assert store.record("s04") is first


def test_features_are_read_once_as_far_as_the_memory_goes(cohort):
    store = Counted(open_features(cohort / "feats"))
    items = [LabelledSlide(item.slide, store, item.target) for item in items_of(cohort)]
    sizes = {slide: store.store.features(slide).nbytes for slide in COUNTS}
    for budget, kept in ((sum(sizes.values()), 16), (0, 0), (sum(sizes.values()) // 2, None)):
        cache = FeatureRowReader(budget)
        for _ in range(2):
            store.read.clear()
            for item in items:
                bag = full_bag(item, BagSpec(cache), sys.maxsize)
                bag.pixels(0, bag.num_patches, CPU)
        assert cache.cached_bytes <= budget
        missed = 16 - len(store.read)
        assert missed == kept if kept is not None else 0 < missed < 16


# --- whole runs ---


def test_a_head_learns_from_features_and_leaves_what_every_run_leaves(cohort, monkeypatch, capsys):
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, "optim.epochs=40"))
    assert code == 0, said
    report = json.loads((cohort / "run" / "metrics.json").read_text())
    assert report["test"]["ema"]["auc"]["value"] == 1.0
    table = pd.read_csv(cohort / "run" / "predictions.csv")
    assert len(table) == 8
    heat = pd.read_csv(cohort / "run" / "heatmaps" / "s13.csv")
    assert len(heat) == COUNTS["s13"]
    assert (cohort / "run" / "heatmaps" / "s13.png").stat().st_size > 1000
    again = call(evaluate.main, monkeypatch, capsys, cohort / "run", "--out", cohort / "again")
    assert again[0] == 0, again[1]
    pd.testing.assert_frame_equal(pd.read_csv(cohort / "again" / "predictions.csv"), table)


@pytest.mark.slow
def test_two_ranks_train_a_head_as_one_process_does(cohort, monkeypatch, capsys):
    code, message = call(
        train.main, monkeypatch, capsys, *arguments(cohort, f"run.out={cohort}/run1")
    )
    assert code == 0, message
    line = [*TORCHRUN, "--standalone", "--nproc-per-node=2", ROOT / "launch" / "train.py"]
    line += arguments(cohort, f"run.out={cohort}/run2")
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    tables = [pd.read_csv(cohort / run / "predictions.csv") for run in ("run1", "run2")]
    probabilities = [table.filter(like="prob_").to_numpy() for table in tables]
    np.testing.assert_allclose(*probabilities, atol=2e-5)
    assert np.ptp(probabilities[0]) > 0.1


def test_the_attentions_entropy_is_raised_where_its_weight_is(cohort, monkeypatch, capsys):
    entropy = {}
    for weight in (0.0, 1.0):
        out = cohort / f"aem{weight}"
        more = ("optim.epochs=30", f"aem.weight={weight}", f"run.out={out}")
        code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, *more))
        assert code == 0, said
        maps = [pd.read_csv(file)["score"].to_numpy() for file in (out / "heatmaps").glob("*.csv")]
        entropy[weight] = np.mean([-(p * np.log(np.clip(p, 1e-12, 1))).sum() for p in maps])
    assert entropy[1.0] > entropy[0.0] + 0.1


# --- mistakes ---


def refusal(cohort: Path, monkeypatch, capsys, *more: str) -> str:
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, *more))
    assert code == 2, said
    assert "Traceback" not in said
    return said


def test_features_that_are_missing_are_told_with_how_to_make_them(cohort, monkeypatch, capsys):
    said = refusal(cohort, monkeypatch, capsys, "data.features=[]")
    assert "needs data.labels=FILE.csv and data.features=[FOLDER]" in said
    assert "none.lmdb --encoder NAME --out FOLDER" in said
    said = refusal(cohort, monkeypatch, capsys, f"data.features=[{cohort}/nowhere]")
    assert f"features not found: {cohort}/nowhere" in said


def test_features_of_two_widths_are_refused_with_both_slides(cohort, monkeypatch, capsys):
    write_slide(cohort / "feats", "s05", np.zeros((3, D + 1), np.float32))
    said = refusal(cohort, monkeypatch, capsys)
    assert "'s05' has 13" in said
    write_slide(cohort / "more", "s99", np.zeros((3, D + 1), np.float32))


def test_features_that_are_not_finite_are_refused_with_their_slide(cohort, monkeypatch, capsys):
    bad = features_of(4, COUNTS["s04"])
    bad[1, 3] = np.nan
    write_slide(cohort / "feats", "s04", bad)
    said = refusal(cohort, monkeypatch, capsys)
    assert "slide 's04'" in said
    assert "first in row 1" in said


def test_features_of_val_and_test_that_are_not_finite_stop_a_run_before_it_begins(
    cohort, monkeypatch, capsys
):
    for k in (9, 13, 15):  # one of validation, two of the test
        write_unusable(cohort / "feats", k)
    said = refusal(cohort, monkeypatch, capsys)
    assert "the features of 3 slide(s) cannot be used" in said
    assert all(f"slide 's{k:02d}' have NaN or Inf, first in row 4" in said for k in (9, 13, 15))
    assert not (cohort / "run").exists()  # mended, the same command goes


def test_features_that_are_not_finite_are_left_out_where_the_user_says_so(
    cohort, monkeypatch, capsys
):
    for k in (2, 13):  # one of training, one of the test
        write_unusable(cohort / "feats", k)
    code, said = call(
        train.main, monkeypatch, capsys, *arguments(cohort, "data.unmatched=drop", "optim.epochs=1")
    )
    assert code == 0, said
    listed = pd.read_csv(cohort / "run" / "problems.csv")
    assert listed["slide"].tolist() == ["s02", "s13"]
    assert listed["problem"].str.contains("have NaN or Inf, first in row 4").all()
    report = json.loads((cohort / "run" / "metrics.json").read_text())
    assert report["test"]["slides"] == 3
    assert sum(report["left_out"].values()) == 2


@pytest.mark.slow
def test_each_rank_looks_over_a_share_and_one_that_finds_nothing_stops_too(cohort):
    write_unusable(cohort / "feats", 13)
    line = [sys.executable, ROOT / "launch" / "torchrun.py", "--standalone", "--nproc-per-node=2"]
    line += [ROOT / "launch" / "train.py", *arguments(cohort)]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("slide 's13' have NaN or Inf") == 1
    assert not (cohort / "run").exists()


def test_a_case_of_slides_is_looked_over_too(cohort, monkeypatch, capsys):
    write_unusable(cohort / "feats", 15)
    assert "the features of 1 slide(s) cannot be used" in refusal(
        cohort, monkeypatch, capsys, "data.unit=case"
    )


def test_an_empty_bag_is_listed(cohort, monkeypatch, capsys):
    write_slide(cohort / "feats", "s02", np.zeros((0, D), np.float32))
    said = refusal(cohort, monkeypatch, capsys)
    assert "s02" in said
    assert "no patch" in said


def test_a_slide_whose_row_cannot_be_used_is_listed_once(cohort, monkeypatch, capsys):
    table = cohort / "labels.csv"
    lines = table.read_text().splitlines()
    lines[4] = lines[4].replace("marked", "weird")
    lines[5] = lines[5].replace("plain", "")
    table.write_text("\n".join(lines) + "\n")
    said = refusal(cohort, monkeypatch, capsys)
    assert "do not match: 2 row(s) or slide(s) cannot be used, 14 can" in said
    assert said.count("s03") == said.count("s04") == 1


def test_a_label_outside_the_classes_is_listed(cohort, monkeypatch, capsys):
    table = pd.read_csv(cohort / "labels.csv")
    table.loc[3, "label"] = "perhaps"
    table.to_csv(cohort / "labels.csv", index=False)
    assert "perhaps (1); task.classes is [" in refusal(cohort, monkeypatch, capsys)


def test_features_without_coords_are_refused_where_coords_are_needed(cohort, monkeypatch, capsys):
    write_slide(cohort / "feats", "s01", features_of(1, COUNTS["s01"]), coords=False)
    said = refusal(cohort, monkeypatch, capsys, "sampler.name=regions", "bag.patches=2")
    assert "slide 's01' has no patch coordinates" in said


def test_a_head_option_of_another_type_is_refused(cohort, monkeypatch, capsys):
    assert "head.attn_dim" in refusal(cohort, monkeypatch, capsys, "head.attn_dim=wide")


def test_an_encoder_and_an_unknown_name_are_told_what_a_model_may_be(cohort, monkeypatch, capsys):
    said = refusal(cohort, monkeypatch, capsys, "--model", "abmill")
    assert "did you mean 'abmil'" in said
    assert "a head alone is trained on frozen features" in said


def test_weights_of_another_head_are_refused(cohort, monkeypatch, capsys):
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, "optim.epochs=1"))
    assert code == 0, said
    line = (cohort / "run", "--out", cohort / "again", "head.name=max")
    code, said = call(evaluate.main, monkeypatch, capsys, *line)
    assert code == 2, said
    assert "best.safetensors" in said


def test_weights_of_another_head_that_would_fit_are_refused(cohort, monkeypatch, capsys):
    line = arguments(cohort, "--model", "mean", "optim.epochs=1")
    assert call(train.main, monkeypatch, capsys, *line)[0] == 0
    again = (cohort / "run", "--out", cohort / "again", "head.name=max")
    code, said = call(evaluate.main, monkeypatch, capsys, *again)
    assert code == 2, said
    assert "weights of the head 'mean', not of 'max'" in said
    assert not (cohort / "again").exists()


def test_features_without_labels_are_predicted_as_the_run_judged_them(cohort, monkeypatch, capsys):
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, "optim.epochs=1"))
    assert code == 0, said
    write_slide(cohort / "new", "s14", features_of(14, COUNTS["s14"]))
    write_slide(cohort / "new", "placeless", features_of(3, 4), coords=False)
    line = ("--run", cohort / "run", "--out", cohort / "p")
    code, said = call(predict.main, monkeypatch, capsys, cohort / "new", *line)
    assert code == 0, said
    found, known = (
        pd.read_csv(cohort / folder / "predictions.csv").set_index("slide")
        for folder in ("p", "run")
    )
    assert sorted(found.index) == ["placeless", "s14"]
    chances = ["prob_plain", "prob_marked"]
    np.testing.assert_allclose(found.loc["s14", chances], known.loc["s14", chances])
    assert [path.stem for path in (cohort / "p" / "heatmaps").glob("*.png")] == ["s14"]
    write_slide(cohort / "wide", "s14", np.ones((3, D + 1), np.float32))
    for folder, words in (
        ("wide", f"width: {D} in training, {D + 1} now"),
        ("none", "no features"),
    ):
        code, said = call(predict.main, monkeypatch, capsys, cohort / folder, *line)
        assert code == 2
        assert words in said
    (cohort / "run" / "features.json").unlink()  # a run of before it was noted
    assert call(predict.main, monkeypatch, capsys, cohort / "new", *line)[0] == 0


def test_all_of_a_cohort_that_the_run_has_never_seen_is_its_test(cohort, monkeypatch, capsys):
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, "data.cut.val=0.1"))
    assert code == 0, said
    table = pd.read_csv(cohort / "labels.csv").drop(columns="split")
    table["case"] = [f"other{k}" for k in range(len(table) - 1)] + ["c0"]
    table.to_csv(cohort / "other.csv", index=False)
    line = (cohort / "run", "--external", f"data.labels={cohort}/other.csv")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, line)])
    evaluate.main()
    said = capsys.readouterr().out
    assert "1 case(s) have names that also occur in the run's training or validation cases" in said
    assert "\n  c0\n" in said
    found = pd.read_csv(cohort / "run" / "external" / "predictions.csv").set_index("slide")
    assert sorted(found.index) == sorted(COUNTS)
    assert set(found["split"]) == {"test"}
    known = pd.read_csv(cohort / "run" / "predictions.csv").set_index("slide")
    chances = ["prob_plain", "prob_marked"]
    np.testing.assert_allclose(found.loc[known.index, chances], known[chances])
    report = json.loads((cohort / "run" / "external" / "metrics.json").read_text())
    assert report["test"]["slides"] == len(COUNTS)
    assert "val" not in report
    code, said = call(evaluate.main, monkeypatch, capsys, *(w for w in line if w != "--external"))
    assert code == 2
    assert "lacks column(s) split" in said


def test_a_head_that_needs_coords_is_refused_without_them(cohort, monkeypatch, capsys):
    write_slide(cohort / "feats", "s15", features_of(15, COUNTS["s15"]), coords=False)
    assert call(train.main, monkeypatch, capsys, *arguments(cohort, "optim.epochs=1"))[0] == 0
    monkeypatch.setattr(HEADS.factory("abmil"), "needs_coords", True)
    said = refusal(cohort, monkeypatch, capsys, f"run.out={cohort}/other")
    assert "slide 's15' has no patch coordinates" in said


def test_a_regulariser_that_needs_coords_is_refused_without_those_of_training(
    cohort, monkeypatch, capsys
):
    more = ("--model", "clam_sb", "spatial.weight=1", "optim.epochs=1")
    write_slide(
        cohort / "feats", "s15", features_of(15, COUNTS["s15"]), coords=False
    )  # of the test
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, *more))
    assert code == 0, said
    write_slide(cohort / "feats", "s03", features_of(3, COUNTS["s03"]), coords=False)
    said = refusal(cohort, monkeypatch, capsys, *more, f"run.out={cohort}/other")
    assert "slide 's03' has no patch coordinates" in said


def test_features_of_two_encoders_are_refused_with_both(cohort, monkeypatch, capsys):
    for name in ("feats", "more"):
        write_slide(cohort / name, f"of_{name}", np.zeros((3, D), np.float32))
        for file in (cohort / name).glob("*.h5"):
            with h5py.File(file, "r+") as h5:
                h5["features"].attrs["encoder"] = f"encoder_{name}"
    more = f"data.features=[{cohort}/feats, {cohort}/more]"
    said = refusal(cohort, monkeypatch, capsys, more, "data.unmatched=drop")
    assert "encoder_feats" in said
    assert "encoder_more" in said


def test_features_of_another_encoder_than_in_training_are_refused(cohort, monkeypatch, capsys):
    def mark(encoder: str) -> None:
        for file in (cohort / "feats").glob("*.h5"):
            with h5py.File(file, "r+") as h5:
                h5["features"].attrs["encoder"] = encoder

    again = [str(cohort / "run"), "--out", str(cohort / "again")]
    mark("one")
    assert call(train.main, monkeypatch, capsys, *arguments(cohort, "optim.epochs=1"))[0] == 0
    assert call(evaluate.main, monkeypatch, capsys, *again)[0] == 0
    mark("other")
    for main, argv in ((evaluate.main, again), (train.main, ["--resume", f"{cohort}/run"])):
        code, said = call(main, monkeypatch, capsys, *argv)
        assert code == 2
        assert "was trained on other features\n  encoder: one in training, other now" in said


def test_features_that_lost_the_note_on_their_weights_are_evaluated_still(
    cohort, monkeypatch, capsys
):
    for file in (cohort / "feats").glob("*.h5"):
        with h5py.File(file, "r+") as h5:
            h5["features"].attrs["encoder"] = "r50"
    folder = (cohort / "feats").rename(cohort / "features_r50")
    note = cohort / "_config_feats_r50.json"
    note.write_text(json.dumps({"encoder": "r50", "weights": "abc"}))
    known = (f"data.features=[{folder}]", "optim.epochs=1")
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, *known))
    assert code == 0, said
    again = [cohort / "run", "--out", cohort / "again"]
    note.unlink()
    code, said = call(evaluate.main, monkeypatch, capsys, *again)
    assert code == 0, said
    note.write_text(json.dumps({"encoder": "r50", "weights": "xyz"}))
    code, said = call(evaluate.main, monkeypatch, capsys, *again)
    assert code == 2
    assert "encoder: r50 abc in training, r50 xyz now" in said


def test_a_run_is_not_evaluated_with_its_classes_in_another_order(cohort, monkeypatch, capsys):
    few = arguments(cohort, "optim.epochs=1", "run.heatmaps=0")
    assert call(train.main, monkeypatch, capsys, *few)[0] == 0
    turned = "task.classes=[marked,plain]"
    code, said = call(evaluate.main, monkeypatch, capsys, cohort / "run", turned)
    assert (code, "are, in this order, plain, marked; found marked, plain" in said) == (2, True)


def test_a_file_in_the_place_of_a_folder_is_one_message(cohort, monkeypatch, capsys):
    (cohort / "file").write_text("")
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, f"run.out={cohort}/file"))
    assert (code, "file exists" in said) == (2, True)
    few = arguments(cohort, "optim.epochs=1", "run.heatmaps=0")
    assert call(train.main, monkeypatch, capsys, *few)[0] == 0
    out = cohort / "file" / "again"
    code, said = call(evaluate.main, monkeypatch, capsys, cohort / "run", "--out", out)
    assert (code, f"cannot create the folder {out}: Not a directory" in said) == (2, True)


def test_the_published_protocol_chooses_on_test_fits_on_all_and_says_so(
    cohort, monkeypatch, capsys
):
    table = pd.read_csv(cohort / "labels.csv")
    task = ("task.class_weights=balanced", "optim.epochs=2", "run.protocol=as_published")
    seen = []
    known = TASKS.factory("classification").fit

    def fit(self, targets, cases):
        seen.extend(cases)
        known(self, targets, cases)

    monkeypatch.setattr(TASKS.factory("classification"), "fit", fit)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(cohort, *task)])
    train.main()
    assert (
        "warning: run.protocol=as_published: validation slides are part of the test, the epoch is selected"
        in capsys.readouterr().out
    )
    assert len(seen) == len(COUNTS)
    report = json.loads((cohort / "run" / "metrics.json").read_text())
    assert report["chosen_on"] == "test"
    assert "val" not in report
    assert (
        report["test"]["slides"]
        == (table["split"] != "train").sum()
        > (table["split"] == "test").sum()
    )
    lines = (cohort / "run" / "metrics.jsonl").read_text().splitlines()
    validated = [json.loads(line)["val"]["ema"] for line in lines if '"val"' in line]
    best = max(validation["auc"] for validation in validated)
    assert report["test"]["ema"]["auc"]["value"] == pytest.approx(best)


def test_the_published_protocol_trains_on_the_cases_that_validation_would_cost(
    cohort, monkeypatch, capsys
):
    path = cohort / "labels.csv"
    path.write_text(path.read_text().replace(",val,", ",test,"))
    trained = (pd.read_csv(path)["split"] == "train").sum()
    more = ("data.cut.val=0.3", "optim.epochs=1")
    for protocol in ("honest", "as_published"):
        own = (f"run.out={cohort}/{protocol}", f"run.protocol={protocol}")
        code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, *more, *own))
        assert code == 0, said
    honest, published = (
        pd.read_csv(cohort / protocol / "cohort.csv")["split"].value_counts()
        for protocol in ("honest", "as_published")
    )
    assert published["train"] == trained > honest["train"]
    assert "val" in honest
    assert "val" not in published
    code, said = call(
        train.main, monkeypatch, capsys, *arguments(cohort, f"run.out={cohort}/uncut")
    )
    assert code == 2
    assert "no slide has the split 'val'" in said


def test_a_run_is_judged_on_a_table_that_would_teach_nothing(cohort, monkeypatch, capsys):
    assert call(train.main, monkeypatch, capsys, *arguments(cohort, "optim.epochs=1"))[0] == 0
    table = pd.read_csv(cohort / "labels.csv")
    alike = table[(table["split"] != "train") | (table["label"] == "plain")]
    alike.to_csv(cohort / "labels.csv", index=False)
    more = ("data.unmatched=drop", f"run.out={cohort}/other")
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, *more))
    assert code == 2
    assert "needs slides of two or more classes" in said
    again = (cohort / "run", "--out", cohort / "again", "data.unmatched=drop")
    code, said = call(evaluate.main, monkeypatch, capsys, *again)
    assert code == 0, said


def test_the_weights_that_extraction_noted_are_part_of_who_made_features(tmp_path):
    recipes = []
    for weights in ("a", "b"):
        folder = tmp_path / weights / "20x_256px_0px_overlap" / "features_r50"
        write_slide(folder, "s", np.zeros((3, D), np.float32))
        with h5py.File(folder / "s.h5", "r+") as h5:
            h5["features"].attrs["encoder"] = "r50"
        note = folder.with_name("_config_feats_r50.json")
        note.write_text(json.dumps({"encoder": "r50", "weights": weights}))
        recipes.append(open_features(tmp_path / weights).recipe)
    assert [describe_encoder(recipe) for recipe in recipes] == ["r50 a", "r50 b"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("head.embed_dim=0", "embed_dim=0 must be 1 or more"),
        ("head.attn_dim=-1", "attn_dim=-1 must be 1 or more"),
        ("head.dropout=1.5", "head 'abmil' cannot be built: dropout probability"),
        ("head.dropout=nan", "dropout is not finite"),
        ("encoder.dim=999", "encoder.dim=999, but the features are of width 12"),
        ("aem.top_k=0", "aem.top_k=0 must be 1 or more"),  # even where its weight is 0
        ("head.gated=3", "head.gated must be true or false, found '3'"),
    ],
)
def test_a_head_option_out_of_range_is_refused(cohort, monkeypatch, capsys, option, message):
    assert message in refusal(cohort, monkeypatch, capsys, option)
