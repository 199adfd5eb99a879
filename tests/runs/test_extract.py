"""Extraction: what training sees, in files that other readers and ours read; stopped, it goes on."""

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
from PIL import Image

from e2e.bags.loader import full_bag
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.encoders.base import ENCODERS
from e2e.engine.model import MILModel
from e2e.errors import UserError, exit_code
from e2e.features.reader import open_features
from e2e.heads.base import Head, HeadOutput
from e2e.images.decode import build_decoder
from e2e.runs.extract import encoder_options, extract, magnification, weights_digest
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.records import SlideRecord
from launch import extract as command
from tests.helpers.commands import TORCHRUN
from tests.helpers.paths import ROOT
from tests.helpers.stores import jpeg, patches, record, write_store

COUNTS = {"s1": 7, "s2": 3, "s3": 5, "s4": 1}
ENCODER = "test_resnet"
RANDOM = {"pretrained": False}
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path) -> PatchStore:
    return write_store(tmp_path / "cohort.lmdb", COUNTS)


def run(store: PatchStore, out: Path, **options) -> int:
    how = {"size": None, "batch": 4, "precision": "fp32", "dtype": "float32", "device": "cpu"}
    return extract([store], ENCODER, RANDOM, out, **(how | options))


def call(monkeypatch, capsys, *argv: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["extract.py", *map(str, argv)])
    code = exit_code(command.main)
    said = capsys.readouterr()
    return code, said.out, said.err


def features_of(out: Path) -> Path:
    [folder] = out.glob("*/features_*")
    return folder


class Seen(Head):
    """A head that keeps what it is given."""

    def forward(self, features, mask, coords=None) -> HeadOutput:
        self.features = features[0].clone()
        return HeadOutput(features.mean(1))


def evaluated(store: PatchStore, slide: str, *, size: int | None = None) -> torch.Tensor:
    """Features as a model end to end has them in evaluation."""
    torch.manual_seed(0)
    model = MILModel(ENCODERS.build(ENCODER, **RANDOM), Seen(), chunk=4)  # type: ignore[arg-type]
    model.to(memory_format=torch.channels_last).eval()
    item = LabelledSlide(Slide(slide, slide, "", {}), store, torch.tensor(0.0))
    view = BagSpec(PixelRowReader(build_decoder("auto", CPU), size))
    with torch.no_grad():
        model(full_bag(item, view, 4), CPU)
    return model.head.features  # type: ignore[return-value]


# --- what is written ---


@pytest.mark.parametrize("size", [None, 48])
def test_features_are_those_of_the_evaluation_end_to_end_to_the_bit(store, tmp_path, size):
    assert run(store, tmp_path / "out", size=size) == 0
    found = open_features(features_of(tmp_path / "out"))
    assert {slide: found.num_patches(slide) for slide in found.slides} == COUNTS
    for slide in COUNTS:
        assert torch.equal(found.features(slide), evaluated(store, slide, size=size))


def test_batch_norms_have_their_running_statistics(store, tmp_path):
    run(store, tmp_path / "four")
    run(store, tmp_path / "one", batch=1)
    four, one = (open_features(features_of(tmp_path / name)) for name in ("four", "one"))
    for slide in COUNTS:
        torch.testing.assert_close(one.features(slide), four.features(slide), rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped(store, tmp_path):
    how = {"precision": "fp32", "dtype": "float32", "device": "cpu", "batch": 4}
    extract([store], ENCODER, {**RANDOM, "drop_path": 0.9}, tmp_path / "out", **how)
    found = open_features(features_of(tmp_path / "out"))
    assert all(torch.equal(found.features(slide), evaluated(store, slide)) for slide in COUNTS)


def test_half_precision_is_the_rounded_one(store, tmp_path):
    run(store, tmp_path / "out", dtype="float16")
    found = open_features(features_of(tmp_path / "out")).features("s1")
    assert torch.equal(found, evaluated(store, "s1").half())


def test_bf16_is_close_to_fp32(store, tmp_path):
    run(store, tmp_path / "out", precision="bf16")
    found = open_features(features_of(tmp_path / "out")).features("s1")
    exact = evaluated(store, "s1")
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_files_have_tridents_layout_and_attributes(store, tmp_path):
    run(store, tmp_path / "out")
    grid = tmp_path / "out" / "20x_32px_0px_overlap"
    folder = grid / f"features_{ENCODER}"
    assert sorted(p.name for p in folder.iterdir()) == [f"{slide}.h5" for slide in COUNTS]
    assert [p.name for p in grid.glob("*.json")] == [f"_config_feats_{ENCODER}.json"]
    with h5py.File(folder / "s1.h5") as h5:
        assert set(h5.keys()) == {"features", "coords"}
        assert h5["features"].dtype == np.float32
        assert dict(h5["features"].attrs) == {
            "name": "s1",
            "savetodir": str(folder),
            "encoder": ENCODER,
        }
        assert h5["coords"].dtype == np.int64
        assert np.array_equal(h5["coords"][:], store.record("s1").require_coords())
        assert dict(h5["coords"].attrs) == {
            "patch_size": 32,
            "patch_size_level0": 64,
            "level0_magnification": 40.0,
            "target_magnification": 20.0,
            "overlap": 0,
            "name": "s1",
            "savetodir": str(grid),
            "level0_width": 1000,
            "level0_height": 900,
            "mpp": 0.5,
        }


def test_our_reader_gets_back_what_the_store_knew(store, tmp_path):
    run(store, tmp_path / "out")
    found = open_features(tmp_path / "out" / "20x_32px_0px_overlap")
    assert found.recipe["format"] == "trident"
    assert found.recipe["encoder"] == ENCODER
    for slide in COUNTS:
        ours, theirs = store.record(slide), found.record(slide)
        assert np.array_equal(theirs.require_coords(), ours.require_coords())
        for name in ("level0_px", "mpp", "patch_px", "width", "height"):
            assert getattr(theirs, name) == getattr(ours, name)


def test_slides_whose_places_nobody_knows_have_features_without_coords(tmp_path):
    unknown = {"coords": None, "level0_px": 0.0, "mpp": None, "width": 0, "height": 0}
    known = {"patch_px": 32, "source": "a", "source_bytes": 1}
    with StoreWriter(tmp_path / "s.lmdb", {}) as writer:
        writer.add(SlideRecord(slide="a", num_patches=3, **unknown, **known), patches("a", 3))
    assert run(PatchStore(tmp_path / "s.lmdb"), tmp_path / "out") == 0
    found = open_features(tmp_path / "out" / "unknown_32px_0px_overlap")
    assert found.record("a").coords is None
    assert found.features("a").shape == (3, found.width)


@pytest.mark.parametrize(
    ("mpp", "wanted"),
    [(0.5, 20), (0.499, 20), (0.2527, 40), (0.46, 20), (1.0, 10), (8.0, 1.25), (0.7, 14.29)],
)
def test_the_magnification_is_the_nominal_one_where_there_is_one(mpp, wanted):
    assert magnification(mpp) == wanted
    assert magnification(None) is None


# --- going on ---


def test_what_is_there_is_left_alone(store, tmp_path):
    run(store, tmp_path / "out")
    folder = features_of(tmp_path / "out")
    (folder / "s2.h5").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert run(store, tmp_path / "out") == 0
    after = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert after.keys() == before.keys() | {"s2.h5"}
    assert all(after[name] == before[name] for name in before)


@pytest.mark.parametrize("fault", ["cut short", "without its last byte", "of other patches"])
def test_what_is_there_but_not_whole_is_made_again(store, tmp_path, fault):
    run(store, tmp_path / "out")
    folder = features_of(tmp_path / "out")
    whole = (folder / "s1.h5").read_bytes()
    content = {
        "cut short": whole[: len(whole) // 2],
        "without its last byte": whole[:-1],
        "of other patches": (folder / "s2.h5").read_bytes(),
    }
    (folder / "s1.h5").write_bytes(content[fault])
    assert run(store, tmp_path / "out") == 0
    assert len(open_features(folder).features("s1")) == COUNTS["s1"]


KILLED = """
import os, signal, sys
from pathlib import Path
from e2e.runs import extract
from e2e.store.lmdb import PatchStore

write, left = extract.write_atomically, [2]

def write_or_die(path, content):
    if path.suffix == ".h5":
        left[0] -= 1
        if left[0] < 0:
            path.with_name(f".{path.name}.part").write_bytes(content[:100])
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

extract.write_atomically = write_or_die
how = dict(batch=4, precision="fp32", dtype="float32", device="cpu")
stores, options = [PatchStore(sys.argv[1])], {"pretrained": False}
extract.extract(stores, sys.argv[2], options, Path(sys.argv[3]), **how)
"""


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_it_is_as_if_it_never_was(store, tmp_path):
    command = [sys.executable, "-c", KILLED, str(store.path), ENCODER, str(tmp_path / "out")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert open_features(features_of(tmp_path / "out")).slides == ["s1", "s2"]
    assert run(store, tmp_path / "out") == 0
    assert run(store, tmp_path / "whole") == 0
    folders = [features_of(tmp_path / name) for name in ("out", "whole")]
    names = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == [f"{slide}.h5" for slide in COUNTS]
    again, whole = map(open_features, folders)
    assert all(torch.equal(again.features(s), whole.features(s)) for s in COUNTS)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"size": 40}, "size"), ({"dtype": "float16"}, "dtype"), ({"precision": "bf16"}, "precision")],
)
def test_features_made_in_another_way_are_not_mixed(store, tmp_path, change, word):
    run(store, tmp_path / "out")
    with pytest.raises(
        UserError, match=rf"made in another way\n  {word}: .* in the folder, .* now"
    ):
        run(store, tmp_path / "out", **change)


def test_other_weights_under_the_same_name_are_noticed(store, tmp_path):
    torch.manual_seed(5)
    other = ENCODERS.build(ENCODER, **RANDOM)
    torch.save(other.net.state_dict(), tmp_path / "w.pt")
    run(store, tmp_path / "out")
    options = {**RANDOM, "weights": str(tmp_path / "w.pt")}
    how = {"precision": "fp32", "dtype": "float32"}
    with pytest.raises(
        UserError, match=r"made in another way\n.*weights: \w+ in the folder, \w+ now"
    ):
        extract([store], ENCODER, options, tmp_path / "out", **how)


def test_a_digest_goes_by_the_weights_alone(tmp_path):
    one, two = (ENCODERS.build(ENCODER, **RANDOM) for _ in range(2))
    assert weights_digest(one) != weights_digest(two)
    two.load_state_dict(one.state_dict())
    two.to(memory_format=torch.channels_last)
    assert weights_digest(one) == weights_digest(two)


def test_what_another_program_made_is_left_alone(store, tmp_path):
    folder = tmp_path / "out" / "20x_32px_0px_overlap" / f"features_{ENCODER}"
    folder.mkdir(parents=True)
    (folder / "s1.h5").touch()
    with pytest.raises(UserError, match="another program made"):
        run(store, tmp_path / "out")
    folder.parent.joinpath(f"_config_feats_{ENCODER}.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        run(store, tmp_path / "out")


# --- what is bad ---


def test_a_damaged_patch_names_slide_and_patch_and_the_others_are_done(tmp_path, capsys):
    with StoreWriter(tmp_path / "s.lmdb", {}) as writer:
        for slide, count in COUNTS.items():
            content = patches(slide, count)
            content[-1:] = [b"rubbish"] if slide in ("s1", "s3") else content[-1:]
            writer.add(record(slide, count), content)
        writer.add(record("s5", 0), [])
    assert run(PatchStore(tmp_path / "s.lmdb"), tmp_path / "out") == 3
    assert open_features(features_of(tmp_path / "out")).slides == ["s2", "s4"]
    said = capsys.readouterr().out
    for words in ("slide 's1' patch 6", "slide 's3' patch 4", "'s5' has no patches", "3 slides"):
        assert words in said


def test_features_that_are_not_finite_are_not_written(store, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = ENCODERS.build(ENCODER, **RANDOM)
    state = encoder.net.state_dict()
    state["bn1.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "w.pt")
    options = {"weights": str(tmp_path / "w.pt")}
    how = {"precision": "fp32", "device": "cpu", "dtype": "float16"}
    assert extract([store], ENCODER, options, tmp_path / "out", **how) == 3
    assert "slide 's1' patch 0: its feature is NaN or infinite" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.h5"))


def test_a_slide_in_two_stores(store, tmp_path):
    other = write_store(tmp_path / "other.lmdb", {"s2": 2})
    with pytest.raises(UserError, match=r"slide 's2' is in .*cohort\.lmdb and in .*other\.lmdb"):
        extract([store, other], ENCODER, RANDOM, tmp_path / "out")
    with pytest.raises(UserError, match="no patch store"):
        extract([], ENCODER, RANDOM, tmp_path / "out")


def test_options_of_the_encoder_are_checked_by_name_and_type():
    given = ["encoder.pretrained=false", "encoder.drop_path=1", "encoder.lora_targets=[qkv]"]
    found = encoder_options("vit_tiny_patch16_224", given)
    assert found == {"pretrained": False, "drop_path": 1, "lora_targets": ["qkv"]}
    assert encoder_options("r18", ["encoder.weights=null"]) == {"weights": None}
    for text, words in {
        "encoder.weight=x": "did you mean 'weights'",
        "encoder.pretrained=1": "encoder.pretrained must be bool, found '1'",
        "encoder.freeze=true": "encoder.freeze must be int, found 'true'",
        "encoder.lora_targets=qkv": "encoder.lora_targets must be",
        "size=3": "write encoder.key=value",
        "encoder.weights=[": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=words):
            encoder_options("r18", [text])


# --- the command ---


def test_the_command_reads_stores_and_says_what_it_did(store, tmp_path, monkeypatch, capsys):
    argv = ["--stores", tmp_path / "*.lmdb", "--encoder", ENCODER, "encoder.pretrained=false",
            "--out", tmp_path / "out", "--device", "cpu"]  # fmt: skip
    code, said, _ = call(monkeypatch, capsys, *argv)
    assert (code, "4 slides to encode, 0 already done" in said) == (0, True)
    assert open_features(features_of(tmp_path / "out")).features("s1").dtype == torch.float16
    code, said, _ = call(monkeypatch, capsys, *argv)
    assert (code, "0 slides to encode, 4 already done" in said) == (0, True)
    code, _, wrong = call(monkeypatch, capsys, *argv, "--size", 48)
    assert (code, wrong.startswith("error: ")) == (2, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--encoder", "resnet19"], ["unknown encoder 'resnet19'", "did you mean"]),
        (["encoder.weights=nowhere.pt"], ["no weights at nowhere.pt"]),
        (["encoder.wights=x"], ["did you mean 'weights'"]),
        (["--stores", "nowhere.lmdb"], ["no patch store at nowhere.lmdb"]),
        (["--stores", "nowhere*.lmdb"], ["no patch store"]),
        (["--batch", "0"], ["--batch and --size must be at least 1, found 0"]),
        (["--size", "-3"], ["must be at least 1, found 256 and -3"]),
        (["--size", "0"], ["must be at least 1, found 256 and 0"]),
        (["--device", "gpu"], ["engine.device=gpu: unknown device"]),
    ],
)
def test_a_mistake_is_one_message(store, tmp_path, monkeypatch, capsys, change, words):
    argv = ["--stores", store.path, "--encoder", ENCODER, "--out", tmp_path / "out"]
    code, _, said = call(monkeypatch, capsys, *argv, *change)
    assert code == 2
    assert said.startswith("error: ")
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_told(store, tmp_path, monkeypatch, capsys):
    argv = ["--stores", store.path, "--encoder", ENCODER, "encoder.pretrained=false", "--out",
            tmp_path / "out", "--device", "cuda"]  # fmt: skip
    code, _, said = call(monkeypatch, capsys, *argv)
    assert code == 2
    assert "engine.device=cuda: PyTorch sees no CUDA device" in said


def test_a_vit_gets_the_size_that_it_is_built_for(store, tmp_path, monkeypatch, capsys):
    argv = ["--stores", store.path, "--encoder", "vit_tiny_patch16_224", "encoder.pretrained=false",
            "--out", tmp_path / "out", "--device", "cpu"]  # fmt: skip
    code, _, said = call(monkeypatch, capsys, *argv)
    assert (code, said) == (0, "")
    [recipe] = (tmp_path / "out").glob("*/*.json")
    assert json.loads(recipe.read_text())["size"] == 224


@pytest.mark.slow
def test_two_ranks_share_the_slides(store, tmp_path):
    argv = ["--stores", store.path, "--encoder", ENCODER, "encoder.pretrained=false", "--out",
            tmp_path / "out", "--device", "cpu", "--dtype", "float32", "--batch", "4"]  # fmt: skip
    ranks = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "launch/extract.py"]
    done = subprocess.run(
        [str(word) for word in (*ranks, *argv)],
        check=False, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 slides to encode") == 1
    run(store, tmp_path / "one")
    two, one = (open_features(features_of(tmp_path / name)) for name in ("out", "one"))
    assert two.slides == one.slides
    assert all(torch.equal(two.features(slide), one.features(slide)) for slide in COUNTS)


@pytest.mark.slow
def test_real_slides_are_cut_and_encoded(shared_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "slides").mkdir()
    slide = "cmu-1-small-region.svs"
    (tmp_path / "slides" / slide).symlink_to(shared_data / "slides" / slide)
    argv = ["--slides", tmp_path / "slides", "--encoder", ENCODER, "encoder.pretrained=false",
            "--out", tmp_path / "out", "--device", "cpu", "--workers", 0]  # fmt: skip
    code, _, said = call(monkeypatch, capsys, *argv)
    assert code == 0, said
    found = open_features(tmp_path / "out" / "20x_256px_0px_overlap")
    [slide] = found.slides
    kept = PatchStore(tmp_path / "out" / "slides.lmdb").record(slide)
    assert found.num_patches(slide) == kept.num_patches > 0
    assert np.array_equal(found.record(slide).require_coords(), kept.require_coords())
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = call(monkeypatch, capsys, *argv)
    assert (code, "works in one process" in said) == (2, True)


def test_real_tissue_and_trained_weights_tell_tumour_from_benign(shared_data, tmp_path):
    index = pd.read_csv(shared_data / "lung_tiles" / "index.csv", dtype=str)
    with StoreWriter(tmp_path / "s.lmdb", {}) as writer:
        for name, rows in index.groupby("cls"):
            folder = shared_data / "lung_tiles" / str(name)
            images = [Image.open(folder / file) for file in rows["file"].iloc[::40]]
            content = [jpeg(image.convert("RGB")) for image in images]
            writer.add(record(str(name), len(content), patch_px=224), content)
    store = PatchStore(tmp_path / "s.lmdb")
    weights = shared_data / "weights" / "tf_efficientnet_lite0_timmkeys.pt"
    name = "tf_efficientnet_lite0"
    assert extract([store], name, {"weights": str(weights)}, tmp_path / "out", device="cpu") == 0
    found = open_features(features_of(tmp_path / "out"))
    assert found.width == 1280
    slides = {slide: found.features(slide).float() for slide in found.slides}
    halves = {slide: (rows[::2].mean(0), rows[1::2]) for slide, rows in slides.items()}
    right = [
        min(halves, key=lambda other: float((row - halves[other][0]).norm())) == slide
        for slide, (_, rows) in halves.items()
        for row in rows
    ]
    assert np.mean(right) > 0.7  # nearest mean of the other half; 1/3 by chance
