"""Converting the ABMILX project's LMDBs: the same bytes, every slide accounted for, resumable."""

from __future__ import annotations

import csv
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.errors import UserError
from e2e.runs import convert as convert_lmdb
from e2e.store.lmdb import PatchStore, StoreWriter
from tests.helpers.abmilx_lmdb import put, write_coords, write_seed
from tests.helpers.paths import ROOT
from tests.helpers.stores import jpeg, patches, picture

TOOL = ROOT / "tools" / "convert_lmdb.py"


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def convert(old: Path, out: Path, *options: object) -> int:
    """As from the command line; a run of its own file, for LMDB opens one once in a process."""
    return convert_lmdb.main([str(old), "--out", str(out), *map(str, options)])


def test_the_same_bytes_come_out(tmp_path):
    counts = {"a": 300, "TCGA-1-2": 3}  # more than a batch
    out = tmp_path / "new" / "x.lmdb"
    assert convert(write_seed(tmp_path / "old.lmdb", counts), out, "--mpp", 0.5) == 0
    store = PatchStore(out)
    for slide, count in counts.items():
        record = store.record(slide)
        assert (record.coords, record.num_patches, record.patch_px) == (None, count, 32)
        assert (record.mpp, record.level0_px) == (0.5, 0)
        assert store.read(slide, range(count)) == patches(slide, count)
        assert list(store.find_damage(slide)) == []
    assert [(r["slide"], r["status"], r["patches"]) for r in table(Path(f"{out}.report.csv"))] == [
        ("TCGA-1-2", "packed", "3"),
        ("a", "packed", "300"),
    ]
    assert table(Path(f"{out}.quarantine.csv")) == []


def test_places_come_from_the_coords_and_their_lack_is_told(tmp_path):
    old = write_seed(tmp_path / "old.lmdb", {"a": 4, "b": 2})
    write_coords(tmp_path / "h5", "a", 4)
    assert convert(old, tmp_path / "x.lmdb", "--coords", tmp_path / "h5") == 3
    store = PatchStore(tmp_path / "x.lmdb")
    assert store.slides == ["a"]
    record = store.record("a")
    assert record.coords is not None
    assert (record.coords.tolist(), record.level0_px, record.mpp) == (
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        1024,
        None,
    )
    [row] = table(tmp_path / "x.lmdb.quarantine.csv")
    assert "no .h5 file of slide 'b'" in row["reason"]


def test_slides_that_cannot_be_converted_are_named_and_the_others_go_on(tmp_path):
    counts: dict[str, int] = dict.fromkeys(
        ("good", "mixed", "text", "evil", "short", "zero", "lost", "last"), 3
    )
    listed = {k: n for k, n in counts.items() if k != "lost"} | {"none": 0, "short": 5}
    old = write_seed(tmp_path / "old.lmdb", counts, __pn__=listed)
    evil = b"\x80\x04cos\nsystem\nX\x05\0\0\0touch\x85R."
    put(
        old,
        {
            "mixed-2": pickle.dumps(jpeg(picture(1, 48, 32))),
            "text-1": pickle.dumps(b"no picture"),
            "evil-1": evil,
            "zero-0": b"",
        },
    )
    assert convert(old, tmp_path / "x.lmdb", "--level0-px", 512) == 3
    reasons = {r["slide"]: r["reason"] for r in table(tmp_path / "x.lmdb.quarantine.csv")}
    expected = {
        "mixed": "patch 2 has 48x32 pixels",
        "text": "patch 1 is not a JPEG",
        "evil": "patch 1 is rejected: its pickle would call 'os system'",
        "short": "fewer patches than the 5",
        "zero": "patch 0 has zero bytes",
        "lost": "is in __slide__, but its number of patches is not in __pn__",
        "none": "it has no patches",
    }
    assert reasons.keys() == expected.keys()
    for slide, reason in expected.items():
        assert reason in reasons[slide]
    store = PatchStore(tmp_path / "x.lmdb")
    assert store.slides == ["good", "last"]
    assert store.record("last").level0_px == 512
    assert store.read("last", range(3)) == patches("last", 3)


def limited(old: Path, out: Path, size: int) -> subprocess.CompletedProcess[str]:
    """The tool on a disk with room for ``size`` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-W", "error", str(TOOL), str(old), "--out", str(out)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit
    )


@pytest.mark.slow
def test_a_stopped_conversion_goes_on_where_it_ended(tmp_path):
    counts = {f"s{k}": 20 for k in range(8)}
    old, out = write_seed(tmp_path / "old.lmdb", counts), tmp_path / "x.lmdb"
    stopped = limited(old, out, 100_000)
    assert stopped.returncode == 2, stopped.stderr
    assert "free disk space and run the same command again" in stopped.stderr
    done = len(table(Path(f"{out}.report.csv")))
    assert 0 < done < 8
    again = limited(old, out, 1 << 30)
    assert again.returncode == 0, again.stderr
    assert f"{done} slides are in the store already" in again.stdout
    assert f"1/{8 - done} s{done}: packed, 20 patches" in again.stdout
    store = PatchStore(out)
    assert store.slides == list(counts)
    for slide in counts:
        assert store.read(slide, range(20)) == patches(slide, 20)
    assert len(table(Path(f"{out}.report.csv"))) == 8


def test_a_store_of_other_settings_is_not_gone_on_with(tmp_path):
    old, out = write_seed(tmp_path / "old.lmdb", {"a": 1}), tmp_path / "x.lmdb"
    assert convert(old, out, "--mpp", 0.5) == 0
    with pytest.raises(UserError, match=r"mpp: 0.5 in the store, 0.25 requested"):
        convert(old, out, "--mpp", 0.25)
    with pytest.raises(UserError, match="is the file to convert"):
        convert(old, old)
    with pytest.raises(
        UserError, match="--coords gives the size of the patches\n  omit --level0-px"
    ):
        convert(old, out, "--coords", tmp_path, "--level0-px", 512)
    with pytest.raises(UserError, match="--mpp -1: must be greater than 0"):
        convert(old, out, "--mpp", -1)


def test_what_the_disk_gives_back_is_compared_with_the_source(tmp_path, monkeypatch):
    """A fault that only reading back can show: a byte changes behind the writer's back."""
    add = StoreWriter.add

    def faulty(writer, record, jpegs):
        add(writer, record, jpegs)
        wrong = patches("a", 3)[1]
        data = bytearray(writer.path.read_bytes())
        data[data.index(wrong) + 200] ^= 1
        with writer.path.open("r+b") as file:  # in place: the map shows it
            file.write(data)

    monkeypatch.setattr(StoreWriter, "add", faulty)
    old = write_seed(tmp_path / "old.lmdb", {"a": 3})
    with pytest.raises(UserError, match="slide 'a' patch 1 differs from what was written"):
        convert(old, tmp_path / "x.lmdb")
