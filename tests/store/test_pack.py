"""Packing: what goes into a store, what does not, and that no kill spoils it."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from e2e.errors import DamagedDataError, UserError
from e2e.store.coords import read_coords
from e2e.store.identity import join_identity
from e2e.store.mpp_table import read_mpp
from e2e.store.pack import Progress, _BadSlideError, _Conveyor, pack, worker_pool
from e2e.store.patch_folders import PatchFolders
from e2e.store.records import SlideRecord
from e2e.store.sources import (
    CoordsFiles,
    SlideFiles,
    encode_jpeg,
)
from e2e.wsi.slide import WholeSlide, find_slides
from e2e.wsi.tiling import Tiling
from tests.helpers.packing import (
    TILING,
    TOOL,
    Jobs,
    cohort,
    contents,
    damage,
    run_tool,
    source,
    table,
    write_slide,
)
from tests.helpers.paths import ROOT
from tests.helpers.paths import SHARED_DATA as SHARED

# --- what is in the store ---


def test_a_store_holds_the_patches_of_the_grid_as_jpeg(tmp_path):
    canvas = write_slide(tmp_path / "a.b.tif", seed=3)
    report = pack(source(tmp_path), tmp_path / "out.lmdb", workers=0, batch_size=7)
    recipe, found = contents(tmp_path / "out.lmdb")
    assert Tiling.from_recipe(recipe) == TILING
    fields, coords, jpegs = found["a.b"]
    assert fields == {
        "slide": "a.b",
        "num_patches": len(coords),
        "level0_px": pytest.approx(32),
        "mpp": 4,
        "patch_px": 32,
        "width": 320,
        "height": 256,
        "source": "a.b.tif",
        "source_bytes": (tmp_path / "a.b.tif").stat().st_size,
        "identity": join_identity([tmp_path / "a.b.tif"], None),
    }
    inside = (canvas == 243).all(axis=2)
    assert [c for c in coords if inside[c[1] : c[1] + 32, c[0] : c[0] + 32].all()] == []
    assert len(coords) == (~inside).sum() / 32**2 == report.packed[0].patches
    for (x, y), data in zip(coords, jpegs, strict=True):
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size) == ("JPEG", (32, 32))
        error = np.asarray(image).astype(int) - canvas[y : y + 32, x : x + 32]
        assert np.abs(error).mean() < 8


def test_processes_and_chunks_do_not_change_the_store(tmp_path):
    slides = cohort(tmp_path / "slides")
    pack(source(slides), tmp_path / "one.lmdb", workers=0)
    pack(source(slides), tmp_path / "two.lmdb", workers=2, batch_size=3)
    one, two = contents(tmp_path / "one.lmdb"), contents(tmp_path / "two.lmdb")
    assert one == two
    assert list(one[1]) == ["s0", "s1", "s2"]


def test_an_override_of_mpp_changes_the_cut(tmp_path):
    slides = cohort(tmp_path / "slides", 2)
    (tmp_path / "mpp.csv").write_text("slide,mpp\ns0,2\ns1.tif,4.2\nelsewhere,1\n")
    mpp = read_mpp(tmp_path / "mpp.csv")
    pack(source(slides, mpp=mpp), tmp_path / "out.lmdb", workers=0)
    _, found = contents(tmp_path / "out.lmdb")
    assert found["s0"][0]["level0_px"] == 64
    assert found["s1"][0]["level0_px"] == pytest.approx(32 * 4 / 4.2)
    assert found["s0"][0]["mpp"] == found["s1"][0]["mpp"] == 4


def test_tables_of_trident_and_blanks_in_headers_are_read(tmp_path):
    (tmp_path / "mpp.csv").write_text(" wsi , mpp \nbatch/s0.svs, 0.25\nbatch/s1.svs,\n\n")
    assert read_mpp(tmp_path / "mpp.csv") == {"s0.svs": 0.25}
    (tmp_path / "mpp.csv").write_text("Slide, MPP\ns0 , 0.5\n")
    assert read_mpp(tmp_path / "mpp.csv") == {"s0": 0.5}


@pytest.mark.parametrize(
    "text",
    ["slide;mpp\na;1\n", "slide,mpp\na,fast\n", "slide,mpp\na,-1\n", "slide,mpp\na,1\na,2\n", ""],
)
def test_a_wrong_override_table_is_refused(tmp_path, text):
    (tmp_path / "mpp.csv").write_text(text)
    with pytest.raises(UserError, match=r"mpp\.csv"):
        read_mpp(tmp_path / "mpp.csv")


def test_all_wrong_rows_of_an_override_table_are_named(tmp_path):
    rows = ["slide,mpp", "a,fast", "b,0.5", "b,0.25", ",1", "c,-1"]
    (tmp_path / "mpp.csv").write_text("\n".join(rows))
    with pytest.raises(UserError) as error:
        read_mpp(tmp_path / "mpp.csv")
    assert str(error.value).splitlines()[:-1] == [
        f"{tmp_path}/mpp.csv has 4 row(s) that cannot be used",
        "  line 2: slide 'a' has mpp 'fast'",
        "  line 4: slide 'b' occurs twice",
        "  line 5: slide '' has mpp '1'",
        "  line 6: slide 'c' has mpp '-1'",
    ]


def test_the_picture_shows_outline_and_grid(tmp_path):
    slides = cohort(tmp_path / "slides", 1)
    pack(source(slides), tmp_path / "out.lmdb", workers=0)
    pixels = np.asarray(Image.open(tmp_path / "out_overview" / "s0.png"))
    assert pixels.shape == (512, 640, 3)
    assert (pixels == (0, 60, 255)).all(axis=2).sum() > 1000
    assert (pixels == (0, 150, 0)).all(axis=2).sum() > 100


def test_memory_is_bounded_workers_never_run_far_ahead(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()

    class Watch(Progress):
        total = 0
        most = 0

        def written(self, patches):
            self.total += patches
            self.most = max(self.most, len(list(marks.iterdir())) - self.total)

    watch = Watch()
    jobs = [Marking("a", marks), Marking("b", marks)]
    pack(Jobs(jobs), tmp_path / "out.lmdb", workers=2, batch_size=1, progress=watch)
    assert watch.total == 2 * Marking.count
    assert watch.most <= 5


@dataclass(frozen=True)
class Marking:
    """A slide of many one-patch chunks that leaves a file for each it has encoded."""

    slide: str
    path: Path
    count = 40

    def remark(self, record):
        return ""

    def plan(self, overview):
        coords = np.zeros((self.count, 2), np.int32)
        return SlideRecord(self.slide, self.count, coords, level0_px=8, mpp=1, patch_px=8)

    def encode(self, part, start):
        (self.path / f"{self.slide}{start}").touch()
        return [b"x"]


class Dying(Marking):
    def encode(self, part, start):
        if start == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return [b"x"]


def test_a_worker_that_dies_ends_the_run_with_advice_and_keeps_what_is_packed(tmp_path):
    jobs = [Marking("a", tmp_path), Dying("b", tmp_path), Marking("c", tmp_path)]
    with pytest.raises(UserError, match=r"(?s)worker process died.*fewer --workers than 2"):
        pack(Jobs(jobs), tmp_path / "out.lmdb", workers=2, batch_size=1)
    assert list(contents(tmp_path / "out.lmdb")[1]) == ["a"]
    assert [row["slide"] for row in table(tmp_path / "out.lmdb.report.csv")] == ["a"]


# --- bad slides ---


def test_bad_slides_are_named_with_a_reason_and_the_others_go_on(tmp_path):
    slides = cohort(tmp_path / "slides", 5)
    damage(slides / "s1.tif", 7)  # met in the middle of the patches: the overview reads level 1
    (slides / "s2.tif").write_bytes(b"no slide")
    write_slide(slides / "s3.tif", resolution=False)
    write_slide(slides / "glass.tif", tissue=False)
    write_slide(slides / "coarse.tif", mpp=8)
    report = pack(source(slides), tmp_path / "out.lmdb", workers=2, batch_size=2)
    assert [row.slide for row in report.packed] == ["s0", "s4"]
    assert list(contents(tmp_path / "out.lmdb")[1]) == ["s0", "s4"]
    listed = {row["slide"]: row for row in table(tmp_path / "out.lmdb.quarantine.csv")}
    assert list(next(iter(listed.values()))) == ["slide", "path", "reason"]
    assert listed.keys() == {"s1", "s2", "s3", "glass", "coarse"}
    assert listed["s1"]["path"] == str(slides / "s1.tif")
    for slide, words in {
        "s1": "cannot be read at x=",
        "s2": "has a format that OpenSlide does not know",
        "s3": "--mpp-override",
        "glass": "no patch with enough tissue",
        "coarse": "magnified",
    }.items():
        assert words in listed[slide]["reason"]
    status = {row["slide"]: row["status"] for row in table(tmp_path / "out.lmdb.report.csv")}
    assert status == {
        "s0": "packed",
        "s4": "packed",
        "glass": "no tissue",
        **dict.fromkeys(["s1", "s2", "s3", "coarse"], "quarantined"),
    }


def test_what_is_unusual_about_patches_is_in_the_report(tmp_path, capfd):
    slides = cohort(tmp_path / "slides", 1)
    write_slide(slides / "grey.tif", tissue=False)
    full = np.random.default_rng(0).integers(-20, 20, (256, 320, 1)) + np.array([200, 120, 170])
    tifffile.imwrite(
        slides / "full.tif", full.astype(np.uint8), tile=(64, 64), photometric="rgb",
        resolution=(2500, 2500), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    pack(source(slides), tmp_path / "out.lmdb", workers=0)
    reason = {row["slide"]: row["reason"] for row in table(tmp_path / "out.lmdb.report.csv")}
    assert reason["s0"] == ""
    assert reason["full"] == "nearly all of it is taken for tissue: look at the overview"
    assert "grey counts as background" in reason["grey"]
    assert "--tissue 0 takes every patch" in reason["grey"]


def test_invented_coordinates_are_announced_and_mixed_sizes_refused(tmp_path):
    for slide, names in {
        "named": ["0_0", "0_1"],
        "numbered": ["a1", "a2"],
        "mixed": ["1_size256", "1_size512", "1_size1024"],
        "same": ["1_size256", "2_size256"],
    }.items():
        (tmp_path / "patches" / slide).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / "patches" / slide / f"{name}.png")
    pack(PatchFolders(tmp_path / "patches"), tmp_path / "out.lmdb", workers=0)
    rows = {row["slide"]: row for row in table(tmp_path / "out.lmdb.report.csv")}
    assert rows["named"]["reason"] == ""
    assert "coordinates are invented" in rows["numbered"]["reason"]
    assert rows["mixed"]["status"] == "quarantined"
    assert "by their names: 256, 512, 1024" in rows["mixed"]["reason"]
    assert rows["same"]["status"] == "packed"


def test_many_bad_slides_in_the_middle_of_reading_do_not_stall_the_rest(tmp_path):
    slides = cohort(tmp_path / "slides", 9)
    for k in range(8):
        damage(slides / f"s{k}.tif", 7)
    report = pack(source(slides), tmp_path / "out.lmdb", workers=1, batch_size=1)
    assert [row.slide for row in report.packed] == ["s8"]


def test_a_bad_slide_gives_back_the_room_of_its_chunks(tmp_path):
    slides = cohort(tmp_path / "slides", 3)
    damage(slides / "s0.tif", 7)
    damage(slides / "s1.tif", 7)
    with worker_pool(0) as here:
        jobs = source(slides).jobs()
        conveyor = _Conveyor(here, jobs, tmp_path, workers=4, batch_size=1, progress=Progress())
        room, bad = conveyor._room, 0
        for lane in conveyor.lanes():
            try:
                list(conveyor.jpegs(lane))
            except _BadSlideError:
                bad += 1
        assert (bad, conveyor._room) == (2, room)


def test_output_that_cannot_be_written_ends_the_run_and_blames_no_slide(tmp_path):
    slides = cohort(tmp_path / "slides", 1)
    (tmp_path / "out_overview").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        pack(source(slides), tmp_path / "out.lmdb", workers=0)
    with pytest.raises(UserError, match="cannot write"):
        pack(source(slides), tmp_path / "out.lmdb", workers=1)
    assert table(tmp_path / "out.lmdb.quarantine.csv") == []


# --- going on ---


def test_going_on_skips_what_is_stored_and_reports_all(tmp_path):
    slides = cohort(tmp_path / "slides", 2)
    out = tmp_path / "out.lmdb"
    first = pack(source(slides), out, workers=0)
    cohort(slides, 3)
    (slides / "s0.tif").unlink()  # need not be there any more
    second = pack(source(slides), out, workers=0)
    assert [row.slide for row in second.rows] == ["s0", "s1", "s2"]
    assert [row.patches for row in second.rows[:2]] == [row.patches for row in first.rows]
    assert [row["status"] for row in table(second.path)] == ["packed"] * 3


def test_going_on_in_another_way_is_refused(tmp_path):
    slides = cohort(tmp_path / "slides", 1)
    pack(source(slides), tmp_path / "out.lmdb", workers=0)
    with pytest.raises(UserError, match=r"(?s)overlap: 0 in the store, 8 requested"):
        pack(source(slides, Tiling(4, 32, overlap=8)), tmp_path / "out.lmdb", workers=0)


KILL_AFTER = """
import os, signal, sys
from pathlib import Path
from e2e.store.pack import Progress, pack
from e2e.store.sources import SlideFiles
from e2e.wsi.slide import find_slides
from e2e.wsi.tiling import Tiling

class Kill(Progress):
    left = int(sys.argv[3])
    def written(self, patches):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

source = SlideFiles(find_slides(Path(sys.argv[1])), Tiling(4, 32))
pack(source, Path(sys.argv[2]), workers=0, batch_size=4, progress=Kill())
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_slides_and_run_again_it_ends_with_the_same_store(tmp_path):
    slides = cohort(tmp_path / "slides", 4)
    for after in (1, 14, 5):  # of 10 to 12 chunks a slide
        command = [sys.executable, "-c", KILL_AFTER, slides, tmp_path / "out.lmdb", str(after)]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    pack(source(slides), tmp_path / "out.lmdb", workers=0)
    pack(source(slides), tmp_path / "whole.lmdb", workers=0)
    assert contents(tmp_path / "out.lmdb") == contents(tmp_path / "whole.lmdb")
    for kind in ("report", "quarantine"):
        resumed, whole = (tmp_path / f"{s}.lmdb.{kind}.csv" for s in ("out", "whole"))
        assert resumed.read_text() == whole.read_text()


@pytest.mark.slow
def test_the_tool_killed_with_its_workers_busy_leaves_no_process_and_goes_on(tmp_path):
    slides = cohort(tmp_path / "slides", 5)
    command = [sys.executable, str(TOOL), "--slides", slides, "--out", tmp_path / "out.lmdb"]
    command += ["--mpp", "4", "--patch-size", "32", "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        assert running.stdout is not None
        for _ in range(2):
            assert running.stdout.readline()
        running.kill()
        # The workers hold the pipe's other end: it closes when the last of them is gone.
        running.communicate(timeout=60)
    again = run_tool(*command[2:])
    assert again.returncode == 0, again.stderr
    pack(source(slides), tmp_path / "whole.lmdb", workers=0)
    assert contents(tmp_path / "out.lmdb") == contents(tmp_path / "whole.lmdb")


# --- coordinates of other tools ---


def write_clam(path, coords, patch_size=16, downsample=2.0, **attributes):
    with h5py.File(path, "w") as h5:
        data = h5.create_dataset("coords", data=np.array(coords), maxshape=(None, 2))
        data.attrs.update(
            patch_size=patch_size,
            patch_level=1,
            downsample=(downsample, downsample),
            downsampled_level_dim=(160, 128),
            level_dim=(160, 128),
            name="s0",
            save_path="/elsewhere",
            **attributes,
        )


def write_trident(path, coords, **attributes):
    with h5py.File(path, "w") as h5:
        data = h5.create_dataset("coords", data=np.array(coords, np.int64).reshape(-1, 2))
        data.attrs.update(
            {
                "patch_size": 16,
                "patch_size_level0": 32.0,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "name": "s0",
                "savetodir": "/elsewhere",
                "level0_width": 320,
                "level0_height": 256,
                **attributes,
            }
        )


def test_places_of_clam_are_taken_as_they_are(tmp_path):
    slides = cohort(tmp_path / "slides", 1)
    (tmp_path / "clam" / "patches").mkdir(parents=True)
    write_clam(tmp_path / "clam" / "patches" / "s0.h5", [[99, 40], [64, 64], [300, 240]])
    out = tmp_path / "out.lmdb"
    report = pack(CoordsFiles(tmp_path / "clam", find_slides(slides)), out, workers=0)
    assert not report.problems
    recipe, found = contents(out)
    assert recipe == {"source": "coords", "patch_px": 16, "quality": 80}
    fields, coords, jpegs = found["s0"]
    assert coords == [[99, 40], [64, 64], [300, 240]]
    assert (fields["level0_px"], fields["mpp"], fields["patch_px"]) == (32, pytest.approx(8), 16)
    pixels = WholeSlide(slides / "s0.tif").read_patch(99, 40, 32, 16)
    assert jpegs[0] == encode_jpeg(Image.fromarray(pixels), 80)
    assert (tmp_path / "out_overview" / "s0.png").is_file()


def test_places_of_trident_are_taken_as_they_are(tmp_path):
    slides = cohort(tmp_path / "slides", 3)
    write_trident(tmp_path / "s0_patches.h5", [[64, 32], [96, 32]])
    write_trident(tmp_path / "s1_patches.h5", [])
    write_trident(tmp_path / "gone_patches.h5", [[0, 0]])
    out = tmp_path / "out.lmdb"
    report = pack(CoordsFiles(tmp_path, find_slides(slides), patch_px=32), out, workers=0)
    _, found = contents(out)
    fields, coords, _ = found["s0"]
    assert coords == [[64, 32], [96, 32]]
    assert (fields["level0_px"], fields["mpp"], fields["patch_px"]) == (32, pytest.approx(4), 32)
    status = {row.slide: row.status for row in report.problems}
    assert status == {"s1": "no tissue", "s2": "no tissue", "gone": "quarantined"}


def test_places_of_another_slide_are_refused(tmp_path):
    slides = cohort(tmp_path / "slides", 2)
    write_clam(tmp_path / "s0.h5", [[0, 0], [320, 0]])
    write_trident(tmp_path / "s1_patches.h5", [[0, 0]], level0_width=321)
    report = pack(CoordsFiles(tmp_path, find_slides(slides)), tmp_path / "o.lmdb", workers=0)
    assert [row.status for row in report.rows] == ["quarantined"] * 2
    assert all("belongs to another slide" in row.reason for row in report.rows)


def test_a_coordinate_file_says_how_large_patches_are(tmp_path):
    write_clam(tmp_path / "a.h5", [[0, 0]], patch_size=256, downsample=4.0, custom_downsample=2)
    assert read_coords(tmp_path / "a.h5").level0_px == 2048
    write_trident(tmp_path / "b.h5", [[0, 0]], level0_width="None")
    assert read_coords(tmp_path / "b.h5").slide_size is None
    with h5py.File(tmp_path / "c.h5", "w") as h5:
        h5["coords"] = np.zeros((3, 2))
    with pytest.raises(DamagedDataError, match="neither CLAM's nor TRIDENT's"):
        read_coords(tmp_path / "c.h5")
    (tmp_path / "d.h5").write_bytes(b"rubbish")
    with pytest.raises(DamagedDataError, match=r"d\.h5 has no readable"):
        read_coords(tmp_path / "d.h5")


def test_mixed_patch_sizes_ask_for_one(tmp_path):
    slides = cohort(tmp_path / "slides", 2)
    write_clam(tmp_path / "s0.h5", [[0, 0]], patch_size=16)
    write_clam(tmp_path / "s1.h5", [[0, 0]], patch_size=24)
    with pytest.raises(UserError, match=r"(?s)2 patch sizes.*24 px.*s1\.h5.*--patch-size"):
        pack(CoordsFiles(tmp_path, find_slides(slides)), tmp_path / "o.lmdb", workers=0)


# --- folders of patches ---


def write_patch(path, size=(32, 32), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def test_jpegs_are_stored_byte_for_byte_in_natural_order(tmp_path):
    names = ["p2.jpg", "p10.JPG", "p1.jpeg"]
    for k, name in enumerate(names):
        write_patch(tmp_path / "in" / "case-7" / name, seed=k, quality=37 + k)
    pack(PatchFolders(tmp_path / "in", mpp=0.25), tmp_path / "out.lmdb", workers=0, batch_size=2)
    _, found = contents(tmp_path / "out.lmdb")
    fields, coords, jpegs = found["case-7"]
    folder = tmp_path / "in" / "case-7"
    assert jpegs == [(folder / name).read_bytes() for name in ("p1.jpeg", "p2.jpg", "p10.JPG")]
    assert coords == [[0, 0], [0, 32], [0, 64]]
    assert (fields["mpp"], fields["patch_px"], fields["level0_px"]) == (0.25, 32, 32)


def test_pngs_are_encoded_and_names_give_places(tmp_path):
    folder = tmp_path / "in" / "s1"
    pixels = write_patch(folder / "s1_64_0.png")
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.save(folder / "s1_0_128.png")
    pack(PatchFolders(tmp_path / "in"), tmp_path / "out.lmdb", workers=0)
    fields, coords, jpegs = contents(tmp_path / "out.lmdb")[1]["s1"]
    assert coords == [[0, 128], [64, 0]]
    assert fields["mpp"] is None
    assert jpegs[1] == encode_jpeg(Image.fromarray(pixels), 80)
    assert (np.asarray(Image.open(io.BytesIO(jpegs[0]))) == 255).all()


def test_a_folder_with_a_damaged_or_odd_image_is_left_out_whole(tmp_path):
    for slide in ("a", "b", "c", "d"):
        for k in range(5):
            write_patch(tmp_path / "in" / slide / f"{k}.jpg", seed=k)
    (tmp_path / "in" / "e").mkdir()
    cut = (tmp_path / "in" / "b" / "3.jpg").read_bytes()[:-200]
    (tmp_path / "in" / "b" / "3.jpg").write_bytes(cut)
    (tmp_path / "in" / "c" / "4.jpg").write_text("no image")
    write_patch(tmp_path / "in" / "d" / "0.jpg", size=(32, 40))
    report = pack(PatchFolders(tmp_path / "in"), tmp_path / "out.lmdb", workers=0, batch_size=2)
    assert list(contents(tmp_path / "out.lmdb")[1]) == ["a"]
    reasons = {row.slide: row.reason for row in report.problems}
    assert reasons.keys() == {"b", "c", "d", "e"}
    assert "3.jpg cannot be read" in reasons["b"]
    assert "4.jpg cannot be read" in reasons["c"]
    assert "32x40" in reasons["d"]
    assert "no .jpg or .png" in reasons["e"]


def test_a_patch_size_resizes_what_differs(tmp_path):
    write_patch(tmp_path / "in" / "s" / "0.jpg", size=(32, 40))
    write_patch(tmp_path / "in" / "s" / "1.jpg", size=(24, 24))
    pack(PatchFolders(tmp_path / "in", patch_px=24), tmp_path / "out.lmdb", workers=0)
    jpegs = contents(tmp_path / "out.lmdb")[1]["s"][2]
    assert [Image.open(io.BytesIO(j)).size for j in jpegs] == [(24, 24)] * 2
    assert jpegs[1] == (tmp_path / "in" / "s" / "1.jpg").read_bytes()


# --- the tool ---


@pytest.mark.slow
def test_the_tool_tells_by_its_exit_code_whether_every_slide_is_in(tmp_path):
    slides = cohort(tmp_path / "slides", 2)
    common = ["--slides", slides, "--patch-size", 32, "--workers", 0]
    scales = ["--scale", 4, "--scale", 8]
    done = run_tool(*common, *scales, "--out", tmp_path / "x" / "c.lmdb")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x" / "c_4.lmdb").is_file()
    assert Tiling.from_recipe(contents(tmp_path / "x" / "c_8.lmdb")[0]) == Tiling(8, 32)
    assert "1/2 s0: packed, " in done.stdout
    assert f"{tmp_path}/x/c_8.lmdb: 2 slides, " in done.stdout
    write_slide(slides / "empty.tif", tissue=False)
    partly = run_tool(*common, "--mag", 2.5, "--out", tmp_path / "x" / "c_4.lmdb")
    assert partly.returncode == 3, partly.stderr
    assert "2 slides are in the store already" in partly.stdout
    assert "1 slides are NOT in it" in partly.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to pack"),
        (["--slides", "none"], "no slide, folder or matching file"),
        (
            ["--slides", ".", "--patches", "."],
            "--patches cannot be combined with --slides or --coords",
        ),
        (
            ["--slides", ".", "--mpp", "1", "--mag", "20"],
            "contradict each other\n  give one of them",
        ),
        (
            ["--slides", ".", "--coords", ".", "--tissue", "0.1"],
            "--tissue cannot be used with --coords",
        ),
        (["--slides", ".", "--overlap", "300"], "overlap must be in pixels"),
        (["--slides", ".", "--quality", "0"], "--quality 0: must be 1 to 100"),
        (["--slides", ".", "--mpp", "0"], "more than 0, not 0"),
    ],
)
def test_a_mistake_is_explained_before_anything_is_made(
    tmp_path, monkeypatch, capsys, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.svs").touch()
    monkeypatch.setattr(sys, "path", [str(TOOL.parent), *sys.path])
    from e2e.errors import exit_code
    from tools import pack_lmdb

    monkeypatch.setattr(sys, "argv", ["pack_lmdb.py", "--out", "o.lmdb", *options])
    assert exit_code(pack_lmdb.main) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o.lmdb").exists()


@pytest.mark.skipif(not (SHARED / "slides").is_dir(), reason=f"no real slides in {SHARED}")
def test_real_slides_are_packed_and_the_unreadable_one_is_named(tmp_path):
    overrides = {"tcga-cr-7395-01a-01-ts1.svs": 0.25}
    made = SlideFiles(find_slides(SHARED / "slides"), Tiling(), mpp=overrides)
    report = pack(made, tmp_path / "out.lmdb", workers=0)
    patches = {row.slide: row.patches for row in report.packed}
    assert patches.keys() == {"cmu-1-small-region", "tcga-cr-7395-01a-01-ts1"}
    assert all(35 <= count <= 50 for count in patches.values())
    assert [row.slide for row in report.problems] == ["boxes", "unreadable"]
    _, found = contents(tmp_path / "out.lmdb")
    for _, _, jpegs in found.values():
        means = [np.asarray(Image.open(io.BytesIO(j))).mean(axis=(0, 1)) for j in jpegs]
        assert np.median([red - green for red, green, _ in means]) > 20  # stained, not glass
