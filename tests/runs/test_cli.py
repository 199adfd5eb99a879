"""The command ``e2e``: help without PyTorch, one message for a mistake, exit codes, ranks."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import e2e
from e2e import cli
from e2e.cohort import folds
from e2e.errors import UserError
from e2e.runs.options_help import describe_topic, parameter_texts
from e2e.runs.parts import REGISTRIES
from e2e.runs.processes import child_environment, needs_ranks
from e2e.settings import data_cli
from e2e.training.checkpoint import load_checkpoint
from e2e.wsi.tiling import Tiling
from tests.helpers.commands import deliver_interrupts
from tests.helpers.patch_cohort import arguments
from tests.helpers.patch_cohort import cohort as cohort
from tests.helpers.paths import ROOT

HEAVY = "matplotlib numpy omegaconf pandas rich scipy skimage timm torch".split()  # noqa: SIM905
BUILD_PARSERS = """
import json, sys
from e2e import cli
texts = {name: cli.parser_of(name).format_help() for name in cli.VERBS}
texts["usage"] = cli.usage()
print(json.dumps([texts, sorted(sys.modules)]))
"""


def test_help_needs_no_heavy_module():
    done = subprocess.run(
        [sys.executable, "-c", BUILD_PARSERS], cwd=ROOT, env=child_environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    texts, modules = json.loads(done.stdout)
    assert set(modules).isdisjoint(HEAVY)
    for name in cli.VERBS:
        assert texts[name].startswith(f"usage: e2e {name} ")
        assert f"  {name} " in texts["usage"]
    assert "optim.lr=" in texts["train"]


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_its_work(name):
    assert callable(importlib.import_module(cli.VERBS[name].module).main)


def test_help_and_version_are_printed(capsys):
    assert cli.run([]) == cli.run(["--help"]) == 0
    assert capsys.readouterr().out == f"{cli.usage()}\n" * 2
    assert cli.run(["train", "--help"]) == 0
    assert capsys.readouterr().out == cli.parser_of("train").format_help()
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"e2e {e2e.__version__}\n"


@pytest.mark.parametrize("kind", [kind for kind in REGISTRIES if kind != "losses"])
def test_the_help_of_a_plugin_lists_its_options_with_their_docstrings(kind):
    names = describe_topic(kind, REGISTRIES)
    for name in REGISTRIES[kind].names():
        assert f"\n  {name}" in names
        text = describe_topic(f"{kind}.{name}", REGISTRIES)
        for option in REGISTRIES[kind].options(name):
            assert f"\n  {kind}.{option}=" in text


def test_the_help_of_a_head_a_regulariser_and_a_section(capsys):
    assert cli.run(["train", "--help", "head.abmilx"]) == 0
    text = capsys.readouterr().out
    assert "  head.embed_dim=512  (int)\n      " in text
    assert "  aem.weight=0.0  (float)\n      " in describe_topic("aem", REGISTRIES)
    section = describe_topic("select", REGISTRIES).splitlines()
    assert "  select.every=1  " in section[0]
    assert all(line.startswith("  select.") for line in section)


def test_every_option_of_a_head_or_regulariser_is_documented():
    for kind in ("head", "losses"):
        for name in REGISTRIES[kind].names():
            topic = name if kind == "losses" else f"{kind}.{name}"
            lines = describe_topic(topic, REGISTRIES).splitlines()
            for line, following in zip(lines, [*lines[1:], ""], strict=True):
                if line.startswith(f"  {topic.split('.')[0]}."):
                    assert following.startswith("      "), f"{topic}: {line.split('=')[0]}"


def test_parameters_are_read_from_numpydoc_and_from_args():
    numpydoc = """A head.

    Parameters
    ----------
    width, depth : int
        Width and depth
        of the layers.
    gated : bool
        Whether it is gated.

    Returns
    -------
    Tensor
        Not a parameter.
    """
    args = """A head.

    Args:
        width: of the
            layer.
        gated: whether.

    Raises:
        ValueError: not a parameter.
    """
    assert parameter_texts(numpydoc) == {
        "width": "Width and depth of the layers.",
        "depth": "Width and depth of the layers.",
        "gated": "Whether it is gated.",
    }
    assert parameter_texts(args) == {"width": "of the layer.", "gated": "whether."}
    assert parameter_texts("No parameters.") == {}


def test_the_light_command_lines_know_the_defaults_of_the_code():
    assert Tiling().tissue == data_cli.DEFAULT_TISSUE
    assert data_cli.TCGA == folds.TCGA


# --- ranks ---


def test_ranks_are_started_where_asked_and_not_inside_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not needs_ranks(None, on_cpu=False)
    assert not needs_ranks(1, on_cpu=True)
    assert needs_ranks(2, on_cpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert needs_ranks(4, on_cpu=False)
    with pytest.raises(UserError, match=r"--gpus 8: this machine has 4 (?s:.*)--gpus 4"):
        needs_ranks(8, on_cpu=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        UserError, match=r"--gpus 1: PyTorch sees no CUDA device(?s:.*)engine.device=cpu"
    ):
        needs_ranks(1, on_cpu=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not needs_ranks(2, on_cpu=True)
    with pytest.raises(UserError, match="--gpus 4: torchrun has started 2 processes already"):
        needs_ranks(4, on_cpu=True)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "e2e", *map(str, words)]


@pytest.mark.slow
def test_ranks_keep_the_exit_code_and_one_of_them_prints(tmp_path):
    words = ["train", "--gpus", "2", "--datasets", "panda", "--model", "e2e_r18_abmilx"]
    done = subprocess.run(
        command(*words, "engine.device=cpu"),
        cwd=tmp_path, env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[], ["--gpus", "2"]], ids=["one process", "two ranks"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_its_update_and_says_how_to_continue(
    cohort, tmp_path, ranks, number, code
):
    out = tmp_path / "run"
    words = arguments(cohort, out, "optim.epochs=200", "run.save_every=1")
    process = subprocess.Popen(
        command("train", *ranks, *words), cwd=tmp_path, env=child_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=deliver_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and not (out / "last.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    line = f"interrupted; checkpoint {out}/last.safetensors; to continue: e2e train --resume {out}"
    assert [text for text in errors.splitlines() if text.startswith("interrupted")] == [line]
    assert errors.count("stopping after the current update") == 1
    assert "Traceback" not in errors
    logged = (out / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(text)["step"] for text in logged) == steps_saved(out)


def steps_saved(folder: Path) -> int:
    return load_checkpoint(folder / "last.safetensors")[1]["step"]


def unread(words: list[str], folder: Path, errors: int) -> subprocess.Popen:
    """Start a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        words, cwd=folder, env=child_environment(), stdout=writer, stderr=errors, text=True
    )
    os.close(writer)
    return process


@pytest.mark.slow
def test_a_training_goes_on_when_nobody_reads_its_log(cohort, tmp_path):
    out = tmp_path / "run"
    process = unread(command("train", *arguments(cohort, out)), tmp_path, subprocess.PIPE)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert (out / "metrics.json").is_file()
    assert (out / "predictions.csv").is_file()


def test_a_report_that_nobody_reads_ends_without_a_traceback(cohort, tmp_path):
    for words, code in ((["--help"], 141), (["inspect", cohort / "s.lmdb"], 0)):
        process = unread(command(*words), tmp_path, subprocess.PIPE)
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (code, "")
