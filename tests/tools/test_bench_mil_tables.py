"""The bench on tables of bags: how it reads, cuts, standardises and trains; what it refuses."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2e.errors import exit_code
from e2e.heads.base import HEADS
from e2e.heads.mean import MeanMIL
from tests.helpers.paths import ROOT
from tools.bench import mil_tables as bench
from tools.bench.mil_tables import (
    BagTable,
    fit,
    make_folds,
    pad,
    read_table,
    run_seed,
    summary,
)

pytestmark = pytest.mark.slow


def table_of(labels: list[int], *, seed: int = 0, signal: float = 3.0) -> BagTable:
    """Bags of 1 to 5 rows of 16 features, of which the one with the label's number is higher."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, len(labels))
    offsets = np.r_[0, np.cumsum(sizes)]
    features = rng.normal(size=(offsets[-1], 16))
    features[np.arange(offsets[-1]), np.repeat(labels, sizes)] += signal
    return BagTable(Path("drawn.csv"), features, offsets, np.array(labels), (0.0, 1.0))


HALF = table_of([0, 1] * 15)


@pytest.fixture
def short(monkeypatch):
    """A recipe of few epochs."""
    monkeypatch.setattr(bench, "EPOCHS", 12)
    monkeypatch.setattr(bench, "RATE", 5e-3)


def write(path: Path, table: BagTable) -> Path:
    """A file of the table; each bag's label is on its first row alone, its other rows have 0."""
    lines = []
    for bag, (first, end) in enumerate(zip(table.offsets, table.offsets[1:], strict=False)):
        for row in range(first, end):
            label = table.labels[bag] if row == first else 0
            lines.append(",".join(map(str, [label, f"bag{bag}", *table.features[row]])))
    path.write_text("\n".join(lines) + "\n")
    return path


ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), min_size=2, max_size=12)


@given(ROWS, st.randoms())
def test_a_bags_label_is_the_largest_of_its_rows_wherever_they_stand(
    tmp_path_factory, rows, random
):
    rows = [("p", 0), ("p", 1), ("n", 0), *rows]
    random.shuffle(rows)
    path = tmp_path_factory.mktemp("rows") / "t.csv"
    path.write_text("".join(f"{label},{bag},{k}\n" for k, (bag, label) in enumerate(rows)))
    table = read_table(path)
    for bag, name in enumerate(sorted({bag for bag, _ in rows})):
        mine = [(k, label) for k, (other, label) in enumerate(rows) if other == name]
        assert table.labels[bag] == max(label for _, label in mine)
        found = table.features[table.offsets[bag] : table.offsets[bag + 1], 0]
        assert found.tolist() == [k for k, _ in mine]


PLAIN = "0,1,0.5,7\n0,1,1.5,8\n1,2,2.5,9\n0,2,3.5,10\n"
LOOKS = {
    "plain": PLAIN,
    "names": "label,bag,f0,f1\n" + PLAIN,
    "quoted": '"label","bag","f0","f1"\n' + PLAIN,
    "blank lines": "\n\nlabel,bag,f0,f1\n\n" + PLAIN,
    "byte order mark": "\ufeff" + PLAIN,
    "floats": "0.0,1,0.5,7\n0.0,1,1.5,8\n1.0,2,2.5,9\n0.0,2,3.5,10\n",
    "minus one": "-1,1,0.5,7\n-1,1,1.5,8\n1,2,2.5,9\n-1,2,3.5,10\n",
    "words": "0,NA,0.5,7\n0,NA,1.5,8\n1,null,2.5,9\n0,null,3.5,10\n",
    "interleaved": "0,1,0.5,7\n1,2,2.5,9\n0,1,1.5,8\n0,2,3.5,10\n",
    "spaces": "0, 1, 0.5, 7\n0, 1, 1.5, 8\n1, 2, 2.5, 9\n0, 2, 3.5, 10\n",
    "windows": PLAIN.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", LOOKS.values(), ids=LOOKS)
def test_all_ways_to_write_a_table_are_read_alike(tmp_path, text, packed):
    path = tmp_path / "t.csv"  # a gzipped one is known by its content
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    table = read_table(path)
    assert table.features.tolist() == [[0.5, 7], [1.5, 8], [2.5, 9], [3.5, 10]]
    assert table.offsets.tolist() == [0, 2, 4]
    assert table.labels.tolist() == [0, 1]


REAL = {"musk1": (92, 47, 166), "elephant": (200, 100, 230), "ucsb_breast_cancer": (58, 26, 708)}


@pytest.mark.parametrize("name", REAL)
def test_the_classic_tables_are_as_published(shared_data, name):
    bags, positive, width = REAL[name]
    table = read_table(shared_data / "mil_tables" / f"{name}.csv.gz")
    assert table.name == name
    assert (len(table.labels), table.labels.sum(), table.features.shape[1]) == (
        bags,
        positive,
        width,
    )


@given(st.integers(2, 6), st.integers(0, 30), st.integers(0, 30), st.integers(0, 99))
def test_folds_are_disjoint_cover_all_bags_and_share_each_class_out_evenly(folds, a, b, seed):
    table = table_of([0] * (folds + a) + [1] * (folds + b))
    everyone = np.arange(len(table.labels))
    found = make_folds(table, folds, seed)
    assert len(found) == folds
    for train, test in found:
        assert np.array_equal(np.sort(np.r_[train, test]), everyone)
    assert np.array_equal(np.sort(np.concatenate([test for _, test in found])), everyone)
    for label in (0, 1):
        sizes = [(table.labels[test] == label).sum() for _, test in found]
        assert max(sizes) - min(sizes) <= 1


def test_each_seed_cuts_its_own_folds():
    tests = [[test.tolist() for _, test in make_folds(HALF, 5, seed)] for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_a_batch_holds_its_bags_rows_and_the_mask_says_which():
    rows = torch.from_numpy(HALF.features)
    features, mask = pad(HALF, rows, np.array([7, 2, 11]))
    for k, bag in enumerate((7, 2, 11)):
        mine = rows[HALF.offsets[bag] : HALF.offsets[bag + 1]]
        assert torch.equal(features[k][mask[k]], mine)
    assert mask.sum(1).max() == features.shape[1]


def changed(table: BagTable, bags: np.ndarray) -> BagTable:
    """Other features in these bags."""
    features = table.features.copy()
    for bag in bags:
        features[table.offsets[bag] : table.offsets[bag + 1]] += 100.0
    return BagTable(table.path, features, table.offsets, table.labels, table.classes)


def test_what_is_trained_depends_on_the_training_bags_alone(short):
    train, test = make_folds(HALF, 5, seed=0)[0]

    def weights(table: BagTable) -> torch.Tensor:
        head, _ = fit(table, "abmil", train, seed=0)
        return torch.cat([p.detach().flatten() for p in head.parameters()])

    first = weights(HALF)
    assert torch.equal(first, weights(changed(HALF, test)))
    assert not torch.equal(first, weights(changed(HALF, train[:1])))


def test_features_have_mean_0_and_variance_1_over_the_training_rows():
    bags = np.arange(10)
    rows = bench.standardise(changed(HALF, np.arange(20, 30)), bags)[: HALF.offsets[10]]
    torch.testing.assert_close(rows.mean(0), torch.zeros(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.var(0, correction=0), torch.ones(16))


def accuracy(table: BagTable, *, shuffled: bool) -> float:
    found = [run_seed(table, "abmil", seed, folds=3, shuffled=shuffled) for seed in range(2)]
    return float(np.mean([fold["accuracy"] for seed in found for fold in seed]))


def test_what_can_be_learnt_is_learnt_and_shuffled_labels_are_near_chance(short):
    table = table_of([0, 1] * 30, signal=6.0)
    assert accuracy(table, shuffled=False) > 0.9
    assert abs(accuracy(table, shuffled=True) - 0.5) < 0.2


def test_a_seed_gives_the_same_figures_again_and_another_seed_others(short):
    def figures(seed: int) -> list[list[float]]:
        found = run_seed(table_of([0, 1] * 15, signal=0.5), "abmil", seed, folds=3, shuffled=False)
        return [[fold[key] for key in bench.METRICS] for fold in found]

    assert figures(0) == figures(0) != figures(1)


@pytest.mark.parametrize("name", HEADS.names())
def test_every_registered_head_can_be_named(name, monkeypatch):
    monkeypatch.setattr(bench, "EPOCHS", 1)
    found = run_seed(HALF, name, 0, folds=2, shuffled=False)
    assert len(found) == 2
    assert all(0 <= fold[key] <= 1 for fold in found for key in bench.METRICS)


def test_three_classes_are_told_apart(short):
    table = table_of([0, 1, 2] * 10, signal=6.0)
    table = BagTable(table.path, table.features, table.offsets, table.labels, (0.0, 1.0, 2.0))
    found = run_seed(table, "abmil", 0, folds=3, shuffled=False)
    assert np.mean([fold["auc"] for fold in found]) > 0.8


def test_a_heads_own_loss_is_trained_on_with_class_numbers(short, monkeypatch):
    plain, _ = fit(HALF, "mean", np.arange(30), seed=0)
    targets: list[torch.Tensor] = []

    def aux_loss(self, output, target, loss):
        targets.append(target)
        return 100 * output.logits.square().mean()

    monkeypatch.setattr(MeanMIL, "aux_loss", aux_loss)
    held, rows = fit(HALF, "mean", np.arange(30), seed=0)
    assert torch.cat(targets).dtype == torch.int64
    assert torch.cat(targets).sum() == 15 * bench.EPOCHS
    spread = [bench.predict(head, HALF, rows, np.arange(30)).std() for head in (plain, held)]
    assert spread[1] < 0.2 * spread[0]


def test_the_mean_over_seeds_has_its_standard_error_and_t_interval():
    # Seeds' means 1/2 and 1: mean 3/4, deviation sqrt(1/8), error 1/4; t(1 degree) is 12.7062.
    found = summary([[0.0, 1.0], [1.0, 1.0]])
    assert found["seeds"] == [0.5, 1.0]
    assert (found["mean"], found["se"]) == pytest.approx((0.75, 0.25))
    assert (found["low"], found["high"]) == pytest.approx(
        (0.75 - 3.17655, 0.75 + 3.17655), abs=1e-4
    )
    assert summary([[0.0, 1.0]])["se"] is None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mil_tables.py", *map(str, arguments)])
    return exit_code(bench.main)


BAD = {
    "": "cannot read",
    "0,a\n1,b\n": "has 2 column(s)",
    "0\n1\n": "as a table|column",
    "label,bag,f0\n": "cannot read",
    "1,a,2\n1,b,3\n": "all 2 bags",
    "0,a,2\n1,b,nan\n": "has 'nan' in data row 2, column 3",
    "0,a,2\n1,b,inf\n": "has 'inf' in data row 2, column 3",
    "0,a,2,4\n1,b,3\n": "in data row 2, column 4",
    "0,a,2\n1,b,3,4\n": "Expected 3 fields",
    "0,a,much\n1,b,3\n": "has 'much' in data row 1, column 3",
    "0,a,1\nbad,b,3\n": "has 'bad' in data row 2, column 1",
    "label,bag,f\n0,a,1\n1,,3\n": "no bag id in data row 2",
    "0,a,1\n0,b,1\n1,c,3\n": "1 bag(s) of label 1, fewer than 2 folds",
}


@pytest.mark.parametrize("text", BAD, ids=BAD.values())
def test_a_table_that_is_none_is_refused_in_one_message(monkeypatch, tmp_path, capsys, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert run(monkeypatch, "--table", path, "--folds", 2, "--heads", "abmil") == 2
    said = capsys.readouterr()
    assert any(part in said.err for part in BAD[text].split("|"))
    assert str(path) in said.err
    assert not said.out


def test_a_torn_or_missing_file_is_refused(monkeypatch, tmp_path, capsys):
    torn = tmp_path / "t.csv.gz"
    torn.write_bytes(gzip.compress(PLAIN.encode() * 99)[:-30])
    for path in (torn, tmp_path / "none.csv", tmp_path):
        assert run(monkeypatch, "--table", path) == 2
        assert f"cannot read {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--heads", "abmil,abmill"], "unknown head 'abmill'; did you mean 'abmil'?"),
        (["--heads", ","], "--heads names no head"),
        (["--folds", 1], "--folds 1: must be 2 or more"),
        (["--seeds", 0], "--seeds 0: must be 1 or more"),
        (["--workers", 0], "--workers 0: must be 1 or more"),
        (["--heads", "abmil", "--folds", 16], "15 bag(s) of label 0, fewer than 16 folds"),
        (["--heads", "abmil", "--json", "/proc/none/out.json"], "cannot write"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_runs(
    monkeypatch, tmp_path, capsys, arguments, said
):
    path = write(tmp_path / "t.csv", HALF)
    assert run(monkeypatch, "--table", path, *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_table_and_two_heads_give_lines_a_file_and_a_table(tmp_path):
    path, out = write(tmp_path / "drawn.csv", HALF), tmp_path / "new" / "out.json"
    given = ["--table", path, "--heads", "mean,abmil", "--folds", 2, "--seeds", 2, "--json", out]
    done = subprocess.run(
        [sys.executable, "tools/bench/mil_tables.py", *map(str, given), "--workers", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    report = json.loads(out.read_text())
    assert report["results"] == lines
    assert [(line["table"], line["head"]) for line in lines] == [
        ("drawn", "mean"),
        ("drawn", "abmil"),
    ]
    assert lines[0]["bags"] == {"0": 15, "1": 15}
    assert all(len(line["accuracy"]["seeds"]) == 2 for line in lines)
    assert "│ drawn │ abmil │" in done.stdout


@pytest.mark.parametrize(
    ("name", "real", "control", "code", "mark"),
    [
        ("musk1", 0.86, 0.5, 0, "ok  "),
        ("musk1", 0.84, 0.5, 1, "FAIL"),
        ("musk1", 0.95, 0.9, 1, "FAIL"),  # the bar holds nothing that shuffled labels clear
        ("other", 0.10, 0.5, 0, "    "),
    ],
)
def test_the_check_fails_where_abmil_is_under_the_bar_or_the_control_is_not(
    monkeypatch, tmp_path, capsys, name, real, control, code, mark
):
    def measure(tables, heads, args, *, shuffled):
        figure = summary([[control if shuffled else real]] * 5)
        return [{"accuracy": figure, "auc": figure} for _ in tables]

    monkeypatch.setattr(bench, "measure", measure)
    path = write(tmp_path / f"{name}.csv", HALF)
    assert run(monkeypatch, "--check", "--table", path) == code
    said = capsys.readouterr().out
    assert said.startswith(mark)
    assert f"{real:.3f} +- 0.000" in said
