"""The inspector: it shows what is in a store, finds every fault, and draws what it says."""

from __future__ import annotations

import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from e2e.errors import UserError
from e2e.runs.inspect import CELL, main, span
from e2e.store.lmdb import StoreWriter
from tests.helpers.abmilx_lmdb import write_seed
from tests.helpers.paths import ROOT
from tests.helpers.stores import RECIPE, jpeg, patches, record, write_store

TOOL = ROOT / "tools" / "inspect_lmdb.py"


def inspect(capsys, *arguments: object) -> tuple[int, list[str]]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out.splitlines()


def write(path: Path, **slides: list[bytes]) -> Path:
    with StoreWriter(path, RECIPE) as writer:
        for slide, values in slides.items():
            writer.add(record(slide, len(values)), values)
    return path


def test_a_store_is_told_in_totals_and_rows(tmp_path, capsys):
    path = tmp_path / "cohort.lmdb"
    write_store(path, {"a": 3, "slide-b": 1204})
    code, lines = inspect(capsys, path)
    assert code == 0
    assert lines == [
        f"{path}: {path.stat().st_size:,} bytes",
        "  recipe: mpp=0.5, patch_px=32",
        "  slides: 2",
        "  patches: 1,207",
        "  patches per slide: 3 to 1,204, median 603",
        "  patch size: 32 px",
        "  mpp: 0.5 um/px",
        "  slide    patches  mpp  level-0 side  size      source",
        "  a        3        0.5  64            1000x900  a.svs (12,345 bytes)",
        "  slide-b  1,204    0.5  64            1000x900  slide-b.svs (12,345 bytes)",
    ]


def test_long_stores_are_listed_in_part_or_whole(tmp_path, capsys):
    path = tmp_path / "x.lmdb"
    write_store(path, {f"s{n:02}": 1 for n in range(25)})
    _, lines = inspect(capsys, path)
    assert [line for line in lines if line.startswith("  s0")][-1].startswith("  s09")
    assert lines[-1] == "  ... and 15 more slides; --all lists them"
    _, lines = inspect(capsys, path, "--first", 3)
    assert sum(line.startswith("  s0") for line in lines) == 3
    _, lines = inspect(capsys, path, "--all")
    assert lines[-1].startswith("  s24")


def test_what_is_not_known_is_told_as_unknown(tmp_path, capsys):
    with StoreWriter(tmp_path / "x.lmdb", {}) as writer:
        writer.add(record("a", 1, mpp=None, width=0, height=0), patches("a", 1))
    _, lines = inspect(capsys, tmp_path / "x.lmdb")
    assert "  recipe: none" in lines
    assert "  mpp: unknown um/px" in lines
    assert lines[-1].split() == ["a", "1", "unknown", "64", "unknown", "a.svs", "(12,345", "bytes)"]
    assert span([0.25, None, 0.5]) == "0.25 to 0.5 (1 unknown)"


def test_an_empty_store_is_no_fault(tmp_path, capsys):
    StoreWriter(tmp_path / "x.lmdb", RECIPE).close()
    code, lines = inspect(capsys, tmp_path / "x.lmdb", "--verify")
    assert code == 0
    assert "  slides: 0" in lines
    assert lines[-1] == "  verified 0 patches: 0 fault(s)"


def test_a_sound_store_is_verified(tmp_path, capsys):
    write_store(tmp_path / "x.lmdb", {"a": 70, "b": 130})
    code, lines = inspect(capsys, tmp_path / "x.lmdb", "--verify")
    assert code == 0
    assert lines[-1] == "  verified 200 patches: 0 fault(s)"


def damaged(folder: Path) -> Path:
    """A store with a fault of each kind; the bytes are changed behind our code's back."""
    values = {slide: patches(slide, 80) for slide in "abc"}
    values["a"][7] = jpeg(1)[:-40]  # cut short before it was packed: its checksum holds
    values["a"][70] = jpeg(1, width=48)
    values["b"][0] = b"no jpeg"
    values["b"][79] = jpeg(2)
    write(folder / "first.lmdb", **values)
    path = folder / "x.lmdb"
    shutil.copy(folder / "first.lmdb", path)
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as env, env.begin(write=True) as txn:
        key = b"p" + struct.pack(">II", 2, 5)
        txn.put(key, jpeg(99))  # another patch than was packed: only the checksum tells
        txn.delete(b"p" + struct.pack(">II", 2, 6))
        coords = txn.get(b"s:b")
        txn.put(b"s:b", coords[:-700] + bytes([coords[-700] ^ 1]) + coords[-699:])
    return path


def test_every_fault_is_named(tmp_path, capsys):
    path = damaged(tmp_path)
    code, lines = inspect(capsys, path, "--verify")
    assert code == 3
    faults = [line.removeprefix("  FAULT ") for line in lines if line.startswith("  FAULT ")]
    assert faults[0] == f"{path}: the record of slide 'b' is damaged"
    assert faults[1].startswith("slide 'a' patch 7: is not a readable JPEG (")
    assert faults[2] == "slide 'a' patch 70: is 48x48 px, but the record says 32 px"
    assert faults[3:] == ["slide 'c' patch 5: checksum differs", "slide 'c' patch 6: missing"]
    assert lines[-1] == "  verified 160 patches: 5 fault(s)"


def test_a_slide_of_another_size_throughout_is_a_fault_in_every_patch(tmp_path, capsys):
    write(tmp_path / "x.lmdb", a=[jpeg(n, width=48) for n in range(3)])
    code, lines = inspect(capsys, tmp_path / "x.lmdb", "--verify")
    assert code == 3
    assert sum("is 48x48 px, but the record says 32 px" in line for line in lines) == 3


def test_a_damaged_record_is_told_even_without_verifying(tmp_path, capsys):
    code, lines = inspect(capsys, damaged(tmp_path))
    assert code == 3
    assert [line for line in lines if "FAULT" in line] == [
        f"  FAULT {tmp_path / 'x.lmdb'}: the record of slide 'b' is damaged"
    ]


def test_several_stores_are_shown_and_one_fault_is_enough(tmp_path, capsys):
    write_store(tmp_path / "good.lmdb", {"a": 2})
    write(tmp_path / "bad.lmdb", b=[b"no jpeg"])
    code, lines = inspect(capsys, tmp_path / "bad.lmdb", tmp_path / "good.lmdb", "--verify")
    assert code == 3
    assert [line for line in lines if "verified" in line] == [
        "  verified 1 patches: 1 fault(s)",
        "  verified 2 patches: 0 fault(s)",
    ]


# --- the contact sheet ---


def sheet(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_the_sheet_shows_the_slides_patches(tmp_path, capsys):
    colours = {"red": (220, 20, 20), "green": (20, 200, 20)}
    slides = {
        name: [jpeg(Image.new("RGB", (32, 32), colour), quality=95)] * 5
        for name, colour in colours.items()
    }
    path = write(tmp_path / "x.lmdb", **slides)
    code, _ = inspect(capsys, path, "--sheet", tmp_path / "new" / "s.png", "--sheet-patches", 3)
    assert code == 0
    picture = sheet(tmp_path / "new" / "s.png")
    assert picture.shape == (2 * (CELL + 22) + 4, 3 * (CELL + 4) + 4, 3)
    for row, name in enumerate(["green", "red"]):  # in the order of their ids
        for column in range(3):
            y = 4 + row * (CELL + 22) + 18 + CELL // 2
            x = 4 + column * (CELL + 4) + CELL // 2
            assert picture[y, x] == pytest.approx(np.array(colours[name]), abs=4)
        caption = picture[4 + row * (CELL + 22) : 4 + row * (CELL + 22) + 16, 4:100]
        assert caption.min() < 50  # something is written over the row


def test_the_sheet_is_random_but_the_same_for_a_seed(tmp_path, capsys):
    path = tmp_path / "x.lmdb"
    write_store(path, {f"s{n}": 40 for n in range(5)})

    def drawn(seed: int) -> bytes:
        out = tmp_path / f"{seed}.png"
        inspect(capsys, path, "--sheet", out, "--seed", seed, "--sheet-slides", 3)
        return out.read_bytes()

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_broken_patch_is_red_on_the_sheet(tmp_path, capsys):
    path = write(tmp_path / "x.lmdb", **{"スライド 1": [b"no jpeg", jpeg(1)]})
    inspect(capsys, path, "--sheet", tmp_path / "s.png")
    picture = sheet(tmp_path / "s.png")
    assert picture[60, 50].tolist() == [220, 0, 0]
    assert picture[60, 50 + CELL + 4].tolist() != [220, 0, 0]


def test_a_store_of_the_abmilx_project_is_inspected_like_any(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_seed(Path("theirs.lmdb"), {"a": 5, "b": 2})
    assert main(["theirs.lmdb", "--verify", "--sheet", "s.png"]) == 0
    said = capsys.readouterr().out
    assert "slides: 2" in said
    assert "patches: 7" in said
    assert "verified 7 patches: 0 fault(s)" in said
    assert Path("s.png").is_file()
    damaged = write_seed(Path("damaged.lmdb"), {"a": 5})
    with lmdb.open(str(damaged), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"a-3", pickle.dumps(b"no JPEG"))
    assert main(["damaged.lmdb", "--verify"]) == 3
    assert "FAULT" in capsys.readouterr().out


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing.lmdb"], "no patch store at nothing.lmdb"),
        (["x.lmdb", "nothing.lmdb"], "no patch store at nothing.lmdb"),
        (["text.lmdb"], "is not a patch store (not an LMDB file)"),
        (["cut.lmdb", "--verify"], "was cut short"),
        (["newer.lmdb"], "store version 9; this program reads up to 2"),
        (["other.lmdb"], "an LMDB of another kind"),
        (["x.lmdb", "--sheet", "s.jpg"], "--sheet s.jpg: must end in .png"),
        (["x.lmdb", "--first", "-1"], "--first -1: must be a number of rows"),
        (
            ["x.lmdb", "--sheet-patches", "0"],
            "--sheet-patches 0: must be a number of rows or patches",
        ),
        (["x.lmdb", "--decoder", "pilow"], "did you mean 'pillow'"),
        (["empty.lmdb", "--sheet", "s.png"], "there are no patches"),
        (["x.lmdb", "--sheet", "text.lmdb/s.png"], "cannot write"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    write_store(Path("x.lmdb"), {"a": 20})
    Path("text.lmdb").write_text("hello")
    Path("cut.lmdb").write_bytes(Path("x.lmdb").read_bytes()[:-5000])
    for name, values in {
        "newer.lmdb": {b"header": b'{"format": "e2e patch store", "version": 9, "recipe": {}}'},
        "other.lmdb": {b"a key": b"a value"},
    }.items():
        with lmdb.open(name, subdir=False) as env, env.begin(write=True) as txn:
            for key, value in values.items():
                txn.put(key, value)
    StoreWriter("empty.lmdb", RECIPE).close()
    with pytest.raises(UserError) as error:
        main(arguments)
    assert expected in str(error.value)


def test_it_runs_as_a_program_from_anywhere(tmp_path):
    damaged(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    faulty = run("x.lmdb", "--verify")
    assert faulty.returncode == 3
    assert "slide 'c' patch 5: checksum differs" in faulty.stdout
    assert faulty.stderr == ""
    missing = run("nothing.lmdb")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: no patch store at nothing.lmdb")
    assert "Traceback" not in missing.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("script") is None, reason="no program 'script' to make a terminal")
def test_on_a_terminal_ids_are_never_cut_short(tmp_path):
    name = "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291[x]"
    path = write(tmp_path / "x.lmdb", **{name: patches("a", 1)})
    command = f"stty cols 70; {sys.executable} {TOOL} {path} --verify"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, text=True, check=True
    )
    column = "".join(
        line.split("│")[1].strip() for line in done.stdout.splitlines() if line.count("│") == 7
    )
    assert column == name
    assert "verified 1 patches: 0 fault(s)" in done.stdout
