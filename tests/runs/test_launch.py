"""The commands as a user types them: what they write, and one message with exit code 2 for mistakes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

from e2e.store.lmdb import PatchStore, StoreWriter
from launch import evaluate, predict, train
from tests.helpers.commands import TORCHRUN, call
from tests.helpers.patch_cohort import COUNTS, arguments, splits
from tests.helpers.patch_cohort import cohort as cohort
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Every run sums in the same order: torchrun gives its processes one thread, a shell does not.

    The variable is for the processes the tests start; this one read it when torch was imported.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory) -> Path:
    """A run trained to its end by ``python launch/train.py``."""
    out = tmp_path_factory.mktemp("runs") / "run"
    command = [sys.executable, "launch/train.py", *arguments(cohort, out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def test_a_run_folder_holds_all_that_is_promised(finished):
    report = json.loads((finished / "metrics.json").read_text())
    for split in ("val", "test"):
        for weights in ("model", "ema"):
            auc = report[split][weights]["auc"]
            assert 0 <= auc["low"] <= auc["value"] <= auc["high"] <= 1
    predictions = pd.read_csv(finished / "predictions.csv", dtype={"slide": str})
    of_slide, numbers = ["case", "slide", "split", "label"], ["prob_bright", "prob_dark"]
    assert list(predictions) == [*of_slide, "predicted", *numbers, "attention_entropy"]
    assert predictions["attention_entropy"].between(0, 1).all()
    assert sorted(predictions["slide"]) == list(COUNTS)[9:]
    np.testing.assert_allclose(predictions[numbers].sum(axis=1), 1)
    maps = sorted(path.name for path in (finished / "heatmaps").glob("*.png"))
    assert maps == [f"{slide}.png" for slide in list(COUNTS)[12:]]
    assert set(pd.read_csv(finished / "cohort.csv")["slide"]) == set(COUNTS)
    lines = metric_lines(finished)
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 10))
    assert sum("val" in line for line in lines) == 3
    weights = load_file(finished / "best.safetensors")
    assert any(name.startswith("ema.encoder.") for name in weights)
    assert any(name.startswith("model.head.") for name in weights)


def test_evaluation_of_a_run_gives_the_same_numbers(finished, monkeypatch, capsys):
    code, _ = call(evaluate.main, monkeypatch, capsys, finished)
    assert code == 0
    for name in ("metrics.json", "predictions.csv"):
        assert (finished / name).read_bytes() == (finished / "evaluation" / name).read_bytes()


@pytest.mark.slow
def test_settings_saved_with_a_run_alone_repeat_it_to_the_bit(
    finished, cohort, tmp_path, monkeypatch, capsys
):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(finished / "settings.yaml", again)
    code, _ = call(train.main, monkeypatch, capsys, "--resume", again)
    assert code == 0
    assert_same_weights(finished, again)


@pytest.mark.slow
def test_a_run_stopped_before_it_first_saved_begins_with_the_pretrained_weights(
    cohort, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(7)
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = (f"encoder.weights={weights}", "optim.epochs=1", "run.heatmaps=0")
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, whole, *more))
    assert code == 0, said
    stopped.mkdir()
    shutil.copy(whole / "settings.yaml", stopped)
    assert call(train.main, monkeypatch, capsys, "--resume", stopped)[0] == 0
    assert_same_weights(whole, stopped)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(finished, cohort, tmp_path):
    """Killed with SIGKILL after its k-th line of metrics, three times over, then left to finish."""
    out = tmp_path / "killed"
    command = [sys.executable, "launch/train.py", *arguments(cohort, out, "run.save_every=2")]
    for lines in (2, 5, 9):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and count_lines(out / "metrics.jsonl") < lines:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = [sys.executable, "launch/train.py", "--resume", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_weights(finished, out)
    steps = [[line["step"] for line in metric_lines(folder)] for folder in (finished, out)]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_a_run_that_goes_on_already_is_not_resumed_by_a_second_process(
    finished, cohort, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    command = [sys.executable, "launch/train.py", *arguments(cohort, out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and count_lines(out / "metrics.jsonl") < 1:
            pass
        process.send_signal(signal.SIGSTOP)
        code, said = call(train.main, monkeypatch, capsys, "--resume", out)
        process.send_signal(signal.SIGCONT)
    assert process.returncode == 0
    assert code == 2
    assert f"is in use: process {process.pid} on " in said
    assert_same_weights(finished, out)
    assert call(train.main, monkeypatch, capsys, "--resume", out)[0] == 0  # it let go of it


@pytest.mark.slow
def test_a_run_that_draws_by_attention_stores_its_scores_and_goes_on_by_them(cohort, tmp_path):
    more = ["sampler.name=attention", "bag.patches=2", "optim.epochs=4", "run.save_every=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    commands = [
        [sys.executable, "launch/train.py", *arguments(cohort, out, *more)]
        for out in (whole, killed)
    ]
    subprocess.run(commands[0], cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(commands[1], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and count_lines(killed / "metrics.jsonl") < 7:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = [sys.executable, "launch/train.py", "--resume", str(killed)]
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
    assert_same_weights(whole, killed)
    assert sorted(path.name for path in whole.glob("patch_scores_*")) == [
        "patch_scores_2.safetensors",
        "patch_scores_3.safetensors",
    ]
    scores = load_file(whole / "patch_scores_3.safetensors")
    assert {slide: len(values) for slide, values in scores.items()} == {
        slide: count for k, (slide, count) in enumerate(COUNTS.items()) if splits(k) == "train"
    }
    for values in scores.values():
        assert float(values.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        ["engine.strategy=ddp"],
        ["engine.strategy=fsdp", "engine.shard=bag"],
        ["engine.strategy=deepspeed", "engine.deepspeed=configs/deepspeed/zero3.json"],
    ],
    ids=lambda engine: engine[0],
)
def test_torchrun_with_two_ranks_reports_the_losses_of_one(finished, cohort, tmp_path, engine):
    out = tmp_path / "two"
    command = [
        *TORCHRUN,
        "--nproc-per-node",
        "2",
        "launch/train.py",
        *arguments(cohort, out, *engine),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("val auc") == 3  # one rank speaks
    losses = [
        [line["loss"] for line in metric_lines(run) if "lr" in line] for run in (finished, out)
    ]
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=1e-4)  # before AdamW drifts
    assert len(pd.read_csv(out / "predictions.csv")) == 7  # no slide twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "code"),
    [
        ([sys.executable, ROOT / "launch/torchrun.py"], 2),
        ([sys.executable, ROOT / "launch/torchrun.py", "--nproc-per-node", "2"], 2),
        (TORCHRUN, 1),
        ([*TORCHRUN, "--nproc-per-node", "2"], 1),
    ],
)
def test_the_users_own_command_without_data_says_what_to_do(tmp_path, start, code):
    """Our launcher keeps the exit code 2; PyTorch's torchrun makes it 1 and adds a report of its own."""
    model = ["--datasets", "panda", "--model", "e2e_r18_abmilx"]
    command = [*start, ROOT / "launch/train.py", *model]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    for word in (
        "data/panda/panda.csv",
        "data/panda/panda.lmdb",
        "e2e pack",
        "e2e demo",
    ):
        assert word in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    assert code == 1 or done.stderr.count("error:") == 1


@pytest.mark.slow
def test_a_crash_ends_with_another_code_and_its_traceback(cohort, tmp_path):
    script = tmp_path / "crash.py"
    script.write_text("raise RuntimeError('broken on purpose')\n")
    done = subprocess.run([*TORCHRUN, script], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["head.name=abmillx"], ["unknown head 'abmillx'", "did you mean 'abmilx'"]),
        (["encoder.name=resnet19"], ["unknown encoder 'resnet19'", "did you mean 'resnet1"]),
        (["optim.lrr=1"], ["unknown setting 'optim.lrr'", "did you mean 'lr'"]),
        (["optim.lr=fast"], ["optim.lr", "'fast'"]),
        (["head.heads=3"], ["heads", "16"]),
        (["data.labels=nowhere.csv"], ["label table not found: nowhere.csv"]),
        (["data.columns.case=patient"], ["lacks column(s) patient", "it has: case, slide"]),
        (
            ["task.classes=[bright,pale]"],
            ["column 'label' holds bright (", "dark (", "task.classes is [bright, pale]"],
        ),
        (["encoder.weights=nowhere.pt"], ["no weights at nowhere.pt"]),
        (["engine.batch_norm=sync"], ["in one chunk", "engine.chunk is 6"]),
        (["select.weights=ema", "optim.ema=0"], ["select.weights=ema needs a moving average"]),
    ],
)
def test_a_wrong_setting_is_one_message(cohort, tmp_path, monkeypatch, capsys, change, words):
    out = tmp_path / "run"
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, out, *change))
    assert code == 2
    assert said.startswith("error: ")
    for word in words:
        assert word in said
    assert not (out / "last.safetensors").exists()


def test_unknown_cohort_and_model_name_the_nearest(monkeypatch, capsys):
    code, said = call(
        train.main, monkeypatch, capsys, "--datasets", "panta", "--model", "e2e_r18_abmil"
    )
    assert (code, "did you mean 'panda'" in said) == (2, True)
    code, said = call(
        train.main, monkeypatch, capsys, "--datasets", "panda", "--model", "r18abmilx"
    )
    assert (code, "e2e_<encoder>_<head>" in said) == (2, True)


def test_slides_on_one_side_only_are_all_listed(cohort, tmp_path, monkeypatch, capsys):
    table = pd.read_csv(cohort / "labels.csv", dtype=str)
    table.loc[0, "slide"] = "other"
    table.to_csv(tmp_path / "labels.csv", index=False)
    wrong = arguments(cohort, tmp_path / "run", f"data.labels={tmp_path}/labels.csv")
    code, said = call(train.main, monkeypatch, capsys, *wrong)
    assert code == 2
    assert "other: not in any store" in said
    assert "s00: not in the label table" in said
    listed = pd.read_csv(tmp_path / "run.problems.csv")
    assert list(listed["slide"]) == ["other", "s00"]


def test_a_case_in_two_splits_stops_the_run(cohort, tmp_path, monkeypatch, capsys):
    table = pd.read_csv(cohort / "labels.csv", dtype=str)
    table.loc[15, "case"] = "c0"
    table.to_csv(tmp_path / "labels.csv", index=False)
    wrong = arguments(cohort, tmp_path / "run", f"data.labels={tmp_path}/labels.csv")
    code, said = call(train.main, monkeypatch, capsys, *wrong)
    assert (code, "case 'c0': test, train" in said) == (2, True)


def test_a_store_cut_short_is_told_before_anything_is_written(
    cohort, tmp_path, monkeypatch, capsys
):
    short = tmp_path / "short.lmdb"
    short.write_bytes((cohort / "s.lmdb").read_bytes()[:-8192])
    wrong = arguments(cohort, tmp_path / "run", f"data.stores=[{short}]")
    code, said = call(train.main, monkeypatch, capsys, *wrong)
    assert (code, "was cut short" in said) == (2, True)
    assert not (tmp_path / "run").exists()


def test_a_patch_that_is_no_jpeg_names_slide_and_patch(cohort, tmp_path, monkeypatch, capsys):
    source = PatchStore(cohort / "s.lmdb")
    with StoreWriter(tmp_path / "bad.lmdb", {}) as writer:
        for slide, count in COUNTS.items():
            values = source.read(slide, range(count))
            if slide == "s04":
                values[2] = b"no image"
            writer.add(source.record(slide), values)
    wrong = arguments(
        cohort, tmp_path / "run", f"data.stores=[{tmp_path}/bad.lmdb]", "bag.patches=null"
    )
    code, said = call(train.main, monkeypatch, capsys, *wrong)
    assert (code, "slide 's04' patch 2 is not a readable JPEG" in said) == (2, True)


@pytest.mark.slow
def test_a_run_folder_in_use_is_left_alone(finished, cohort, monkeypatch, capsys):
    before = (finished / "metrics.json").read_bytes()
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, finished))
    assert (code, "exists" in said, "--resume" in said) == (2, True, True)
    assert (finished / "metrics.json").read_bytes() == before


def test_resume_takes_no_other_settings(tmp_path, monkeypatch, capsys):
    code, said = call(train.main, monkeypatch, capsys, "--resume", tmp_path, "optim.lr=1")
    assert (code, "give nothing else" in said) == (2, True)
    code, said = call(train.main, monkeypatch, capsys, "--resume", tmp_path)
    assert (code, "is not a run folder" in said) == (2, True)


@pytest.mark.slow
def test_a_full_disk_while_saving_keeps_the_last_checkpoint(finished, cohort, tmp_path):
    """Files of at most 1.5 MB: best.safetensors fits, last.safetensors with its optimiser does not."""
    limit = (finished / "best.safetensors").stat().st_size + 1000
    assert limit < (finished / "last.safetensors").stat().st_size
    code = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path('launch/train.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, "launch/train.py", *arguments(cohort, tmp_path / "full")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "last.safetensors" in done.stderr
    assert "free disk space" in done.stderr
    assert list((tmp_path / "full").glob(".*.part")) == []
    resumed = [sys.executable, "launch/train.py", "--resume", str(tmp_path / "full")]
    subprocess.run(resumed, cwd=ROOT, check=True, capture_output=True)
    assert_same_weights(finished, tmp_path / "full")


def test_predict_wants_a_run(tmp_path, monkeypatch, capsys):
    code, said = call(predict.main, monkeypatch, capsys, tmp_path, "--run", tmp_path / "none")
    assert (code, "is not a run folder" in said) == (2, True)


def assert_same_weights(one: Path, two: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        for key in first:
            assert np.array_equal(first[key].numpy(), second[key].numpy()), f"{name}: {key}"


def metric_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
