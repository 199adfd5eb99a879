"""The campaign of faults finds what goes wrong: it is shown readers that are wrong on purpose."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from e2e.errors import UserError
from tests.helpers.paths import ROOT
from tools.faults import children
from tools.faults.formats import FORMATS, Format, mutate_format
from tools.faults.mutations import BYTES, TEXT
from tools.faults.outcomes import BAD, Outcome, table
from tools.faults.project import Project


def text_file(_: Project, folder: Path) -> Path:
    (folder / "a.txt").write_text("a=1, b=2\nc=3\n")
    return folder / "a.txt"


def faults(tmp_path: Path, read, **options) -> dict[Outcome, int]:
    (tmp_path / "work").mkdir()
    what = Format(text_file, read, **options)
    return dict(mutate_format(Project(tmp_path), tmp_path / "work", what, 12, 0))


def refuse(file: Path) -> str:
    if file.read_bytes() != b"a=1, b=2\nc=3\n":
        raise UserError("damaged")
    return "right"


def crash(file: Path) -> str:
    if file.read_bytes() != b"a=1, b=2\nc=3\n":
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)
    return "right"


def raise_key_error(file: Path) -> str:
    return {b"a=1, b=2\nc=3\n": "right"}[file.read_bytes()]


@pytest.mark.parametrize(
    ("read", "options", "outcome"),
    [
        (refuse, {}, Outcome.REFUSED),
        (lambda file: "always the same", {}, Outcome.SAME),
        (lambda file: file.read_bytes(), {}, Outcome.OTHER),
        (lambda file: file.read_bytes(), {"has_checksums": True}, Outcome.WRONG),
        (raise_key_error, {"is_text": True}, Outcome.TRACEBACK),
        (crash, {}, Outcome.CRASH),
    ],
)
def test_what_a_reader_does_with_damage_is_counted(tmp_path, read, options, outcome):
    counts = faults(tmp_path, read, **options)
    assert counts[outcome] >= 10  # a change may leave a file as it was
    assert sum(counts.values()) == 12


def test_an_input_that_cannot_be_read_undamaged_stops_the_campaign(tmp_path):
    def fail(file: Path) -> str:
        raise UserError("never")

    with pytest.raises(RuntimeError, match="cannot be read: error: never"):
        faults(tmp_path, fail)


@pytest.mark.parametrize("kind", dict.fromkeys((*BYTES, *TEXT)), ids=lambda kind: kind.__name__)
def test_each_kind_of_damage_changes_a_file_and_is_repeatable(kind):
    content = "".join(f'{{"a": {k}, "b": [2, 3.5]}}\nslide,s{k}\n' for k in range(20)).encode()
    changed = [kind(content, random.Random(seed)) for seed in range(20)]
    assert changed == [kind(content, random.Random(seed)) for seed in range(20)]
    assert sum(one != content for one in changed) >= 12  # a word may be replaced by itself


def test_the_table_sums_every_outcome():
    text = table({"a": Counter(same=2, lost=1), "b": Counter(same=3)})  # type: ignore[arg-type]
    assert text.splitlines()[-1].split()[:3] == ["all", "6", "5"]
    assert Outcome.LOST in BAD


def test_a_full_disk_is_an_error_of_the_write_and_output_is_still_seen(tmp_path):
    def write() -> int:
        os.write(1, b"before")  # pytest captures print
        (tmp_path / "big").write_bytes(bytes(10_000))
        return 0

    ended = children.run(write, tmp_path / "log", file_size=5_000)
    assert ended.code == 70
    assert "before" in ended.text


@pytest.mark.slow
def test_a_short_campaign_finds_nothing_wrong(tmp_path):
    command = [sys.executable, "-m", "tools.faults", "--share", "0.04", "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert {"kill train", "full disk pack", "replaced store", *FORMATS} <= {*rows}
