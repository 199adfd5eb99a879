"""The heads' bench: figures of every head, limits that are said, and rows that can fall short."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from e2e.errors import UserError
from tools.bench import check_heads, head_step
from tools.bench import heads as bench
from tools.bench.check_heads import BATCH, WIDTH, Times, Training
from tools.bench.head_step import HeadStep
from tools.bench.rows import Row

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SIZES = [3, 9, 4, 8, 5, 7, 6, 2, 9, 3]


# --- the table ---


def test_a_figure_has_time_memory_and_the_number_of_parameters():
    line = ["--head", "abmil", "--in-dim", "8", "--patches", "30"]
    args = bench.parse([*line, "--options", "embed_dim=4", "attn_dim=3", "gated=false"])
    found = head_step.measure(bench.step_of(args))
    norm, project, score, classify = 16, 8 * 4 + 4, (4 * 3 + 3) + 3, 4 * 2 + 2
    assert found["parameters"] == norm + project + score + classify
    assert found["seconds"] > 0
    assert found["peak_mib"] >= 0
    assert "failed" not in found


@pytest.mark.parametrize(
    ("limit", "said"), [(("--memory", "1MiB"), "over 1MiB"), (("--limit", "0.01"), "over 0.01 s")]
)
def test_a_head_over_a_limit_says_which_and_is_in_the_table(limit, said, capsys):
    size = ("--in-dim", "64", "--patches", "20000")
    assert bench.main(["--table", "mean", *size, *limit]) == 0
    line, *shown = capsys.readouterr().out.splitlines()
    assert json.loads(line)["failed"] == said
    assert any("mean" in row and said in row for row in shown)


def test_the_step_is_of_the_heads_own_loss_too():
    torch.manual_seed(0)
    head = bench.HEADS.build("dsmil", 8, 2)
    features, mask = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    output, target = head(features, mask), torch.zeros(1, dtype=torch.long)
    own = head.aux_loss(output, target, head_step.loss_per_bag)
    assert own is not None
    (head_step.loss_per_bag(output.logits, target).mean() + own).backward()
    expected = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    head_step.forward_backward(head, features, mask, HeadStep("dsmil", in_dim=8))
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_the_table_has_every_head_at_the_sizes_that_were_asked_for(monkeypatch, capsys):
    asked = []

    def figure(step):
        asked.append((step.head, step.patches, step.kernel))
        return {"parameters": 1234, "seconds": 0.5, "peak_mib": 7.0}

    monkeypatch.setattr(head_step, "measure", figure)
    assert bench.main(["--table"]) == 0
    names = bench.HEADS.names()
    assert asked == [(head, n, "fused") for head in names for n in (1000, 10_000, 50_000)]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == names
    assert all("1,234" in row and "0.5 s, 7 MiB" in row for row in rows[1:])


def test_an_option_without_a_value_is_refused():
    with pytest.raises(UserError, match="KEY=VALUE"):
        bench.parse_options(["heads"])


# --- an epoch on cached features ---


@pytest.fixture
def store(tmp_path: Path):
    return check_heads.write_features(tmp_path, SIZES)


@pytest.mark.parametrize("head", ["mean", "clam_sb"])
def test_both_ways_take_the_same_updates_to_the_same_losses(store, head):
    loader = check_heads.loader_over(store, cached=True)
    ready = check_heads.padded_updates(loader, 0, 2, CPU)
    assert [len(update.target) for update in ready] == [BATCH, len(SIZES) - BATCH]
    ours = Training(head, CPU).by_loader(loader, 0, 2)
    assert Training(head, CPU).by_padded(ready) == pytest.approx(ours, abs=1e-6)
    other = [ready[0]._replace(features=ready[0].features + 1), ready[1]]
    assert Training(head, CPU).by_padded(other) != pytest.approx(ours, abs=1e-5)


def test_the_cache_is_warm_or_never_is(store, monkeypatch):
    read = []
    features = type(store).features
    monkeypatch.setattr(
        type(store), "features", lambda self, slide: read.append(slide) or features(self, slide)
    )
    for cached, again in ((True, 0), (False, len(SIZES))):
        loader = check_heads.loader_over(store, cached=cached)
        for _ in range(2):
            read.clear()
            check_heads.padded_updates(loader, 0, 2, CPU)
        assert len(read) == again


def test_the_files_are_tridents_in_half_precision(store):
    assert store.recipe["format"] == "trident"
    found = store.features(store.slides[1])
    assert (tuple(found.shape), found.dtype) == ((SIZES[1], WIDTH), torch.float16)


def test_more_padding_changes_no_loss(store):
    ready = check_heads.padded_updates(check_heads.loader_over(store, cached=True), 0, 2, CPU)
    wide = [check_heads.widened(update) for update in ready]
    assert {update.features.shape[1] for update in wide} == {check_heads.MOST}
    model = Training("mean", CPU).model.head.eval()
    for update, other in zip(ready, wide, strict=True):
        assert not other.mask[:, update.mask.shape[1] :].any()
        torch.testing.assert_close(
            model(*other[:3]).logits, model(*update[:3]).logits, rtol=1e-4, atol=1e-6
        )


def test_turns_are_the_whole_epoch_or_some_of_all_its_parts():
    assert check_heads.turns_of(7, 7, 3) == [(0, 3), (3, 3), (6, 1)]
    assert check_heads.turns_of(125, 20, 5) == [(0, 5), (30, 5), (60, 5), (90, 5)]


def times(training: float, wide: float, *, off: float = 0.0) -> dict[str, Times]:
    def way(factor: float, losses: list[float]) -> Times:
        return Times({0: factor, 1: 2 * factor}, {0: factor, 1: 2 * factor}, losses)

    return {
        "training": way(training, [0.7, 0.6 + off]),
        "resident": way(1.0, [0.7, 0.6]),
        "files": way(1.2, []),
        "resident again": way(1.0, []),
        "wide": way(wide, []),
    }


@pytest.mark.parametrize(
    ("found", "good"),
    [
        (times(1.05, 1.3), True),
        (times(1.11, 1.3), False),
        (times(1.05, 1.04), False),  # what costs more must show
        (times(1.05, 1.3, off=1e-3), False),  # other losses: not the same work
    ],
)
def test_an_epoch_over_the_bar_or_of_other_losses_falls_short(found, good):
    row = check_heads.epoch_row("mean", found, SIZES, CPU)
    assert row.good is good
    assert f"{found['training'].cpu[0]:.3f}" in row.measured


def test_padding_is_the_share_of_rows_without_a_patch():
    assert check_heads.padding_fraction([[0, 1], [2]], [1, 3, 5]) == pytest.approx(2 / 11)
    (row,) = check_heads.padding(HeadStep("mean"), argparse.Namespace(bags=1000))
    assert row.good is True


def test_a_head_whose_memory_grows_faster_than_its_patches_falls_short(monkeypatch):
    def figure(step):
        if step.head == "max" and step.patches > 1000:
            return {"failed": "over 8GiB"}
        power = 2 if step.kernel == "dense" or step.head == "mean" else 1
        return {"parameters": 1, "seconds": 0.1, "peak_mib": (step.patches / 1000) ** power}

    monkeypatch.setattr(head_step, "measure", figure)
    args = bench.parse(["--check", "--patches", "1000", "50000"])
    rows = list(check_heads.heads(bench.step_of(args), args))
    good = {row.what.split(",")[0]: row.good for row in rows}
    assert [head for head, fine in good.items() if not fine] == ["max", "mean"]
    assert sorted(good) == bench.HEADS.names()


def test_a_row_that_falls_short_makes_the_check_fail(monkeypatch, capsys):
    rows = [Row("a", "<= 1", "2", "-", good) for good in (True, None, False)]
    monkeypatch.setitem(check_heads.ROWS, "padding", lambda step, args: iter(rows))
    assert bench.main(["--check", "--rows", "padding"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in said[:3]] == ["ok  ", "    ", "FAIL"]
    assert said[3].startswith("1 short of the bar")


def test_unknown_rows_are_named():
    with pytest.raises(UserError, match=r"no row speeds\n  choose from: epoch, padding, heads"):
        check_heads.check(["speeds"], HeadStep("mean"), bench.parse([]))


def test_the_check_times_both_heads_over_the_training_path(capsys):
    assert bench.main(["--check", "--rows", "epoch", "--bags", "16"]) in (0, 1)
    rows = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert [row.split()[1] for row in rows] == ["mean:", "abmil:"]
    assert all("2 updates of 8 of an epoch of 16 cached bags" in row for row in rows)
    assert all("losses within 0e+00" in row for row in rows)
