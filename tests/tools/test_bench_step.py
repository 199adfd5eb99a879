"""The step's bench: what it refuses to compare, what it measures, rows that can fall short."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from e2e.errors import UserError
from tests.helpers.paths import ROOT
from tools.bench import check_engine, engine
from tools.bench.engine import Way, Work, parse_way, slope, write_store
from tools.bench.rows import Row

pytestmark = pytest.mark.slow

SMALL = ["--patches", "12", "--size", "32", "--chunk", "5", "--rounds", "1", "--head", "abmil"]


def run(*arguments: str) -> tuple[int, list[dict], str]:
    done = subprocess.run(
        [sys.executable, "tools/bench/step.py", *arguments, *SMALL],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, lines, done.stderr


def test_a_ratio_is_given_where_gradients_agree_and_refused_where_they_do_not():
    code, lines, _ = run("--compare", "exact", "naive", "exact", "other:batch_norm=chunk")
    assert code == 1
    assert [line["way"] for line in lines] == ["exact", "other"]
    assert lines[0]["gradient_difference"] < 1e-5
    assert lines[0]["time_ratio"] > 0
    assert "not the same mathematics" in lines[1]["refused"]
    assert "time_ratio" not in lines[1]


def test_recipes_are_compared_with_their_differences_beside_the_ratio():
    code, lines, _ = run("--compare", "recipe", "a", "b:batch_norm=chunk")
    assert code == 0
    assert lines[0]["differs_in"] == {"batch_norm": ["frozen", "chunk"]}
    assert lines[0]["gradient_difference"] > 1e-3
    assert lines[0]["time_ratio"] > 0


def test_the_bench_gives_speed_waiting_and_memory_of_each_way():
    code, lines, _ = run("exact", "--memory", "12")
    assert code == 0
    memory, speed = lines
    assert memory["patches"] == 12
    assert memory["jpeg_bytes"] > 100
    assert speed["patches_per_s"] > 0
    assert 0 < speed["waiting"] < 1


def test_a_way_is_a_name_with_options_of_their_types():
    way = parse_way("mine:mode=naive,fold=false,keep_graphs=4GiB,dropout=0.5")
    assert way == Way("mine", mode="naive", fold=False, keep_graphs="4GiB", dropout=0.5)
    assert parse_way("kept").keep_graphs == "64GiB"


@pytest.mark.parametrize("text", ["x:speed=fast", "x:fold", "x:mode=best"])
def test_a_way_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=r"no option|must be exact"):
        parse_way(text)


def test_the_slope_is_that_of_the_line():
    assert slope([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx(2.0)


def test_unknown_rows_are_named():
    with pytest.raises(UserError, match=r"no row speeds\n  choose from: gradient, bf16, memory"):
        check_engine.check(["speeds"], long=False)


def test_a_row_that_falls_short_makes_the_check_fail(monkeypatch, capsys):
    rows = [Row("a", "<= 1", "2", "-", good) for good in (True, None, False)]
    monkeypatch.setitem(check_engine.ROWS, "bf16", lambda folder: iter(rows))
    assert check_engine.check(["bf16"], long=False) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in said[:3]] == ["ok  ", "    ", "FAIL"]
    assert said[3].startswith("1 short of the bar")


def test_what_the_controls_break_is_in_the_code():
    for _, file, old, new, test in check_engine.CONTROLS:
        assert (ROOT / file).read_text().count(old) == 1, file
        assert old != new
        name = test.split("::")
        assert f"def {name[1]}(" in (ROOT / name[0]).read_text()


def test_all_ways_step_on_the_same_bag(tmp_path):
    store = write_store(tmp_path, [12], 32)
    work = Work(patches=12, size=32, chunk=5, head="abmil")
    found = [
        engine.gradients(
            engine.build_model(work, way),
            engine.make_update(store, [12], work, way),
            way,
            check_engine.CPU,
        )
        for way in engine.WAYS.values()
    ]
    assert all(engine.relative_distance(one, found[0]) < 1e-5 for one in found)
