"""Files of features that differ from the usual, and those that cannot be used."""

from __future__ import annotations

import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from e2e.cohort.match import match_slides
from e2e.errors import DamagedDataError, UserError
from e2e.features.reader import open_features
from e2e.slides import Slide

VALUES = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


def write_h5(file: Path, features: np.ndarray = VALUES, **attrs: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as h5:
        h5["features"] = features
        h5["coords"] = np.arange(6).reshape(3, 2)
        h5["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, **attrs})


@pytest.mark.parametrize("suffix", [".h5", ".H5", ".npy", ".pt"])
def test_a_batch_of_one_slide_is_squeezed(tmp_path, suffix):
    file = tmp_path / f"s{suffix}"
    if suffix.lower() == ".h5":
        write_h5(file, VALUES[None])
    elif suffix == ".npy":
        np.save(file, VALUES[None])
    else:
        torch.save(torch.from_numpy(VALUES[None]), file)
    assert np.array_equal(open_features(tmp_path).features("s").numpy(), VALUES)


def test_a_vector_is_a_bag_of_one(tmp_path):
    np.save(tmp_path / "s.npy", VALUES[0])
    assert open_features(tmp_path).features("s").shape == (1, 4)


def test_a_folder_for_each_patient_is_read(tmp_path):
    for patient in ("p1", "p2"):
        write_h5(tmp_path / patient / f"{patient}-a.h5")
    assert open_features(tmp_path).slides == ["p1-a", "p2-a"]


def test_the_richer_folder_of_attrimil_is_read(tmp_path):
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.from_numpy(VALUES), tmp_path / "pt_files" / "s.pt")
    with h5py.File(tmp_path / "s.h5", "w") as h5:
        h5["features"], h5["coords"] = VALUES, np.arange(6).reshape(3, 2)
    (tmp_path / "h5_coords_files").mkdir()
    (tmp_path / "s.h5").rename(tmp_path / "h5_coords_files" / "s.h5")
    assert open_features(tmp_path).record("s").coords is not None


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, "None", [1, 2, 3], b"x"])
@pytest.mark.parametrize("name", ["patch_size", "mpp", "level0_width", "encoder"])
def test_odd_attributes_are_unknown_values(tmp_path, name, odd):
    write_h5(tmp_path / "s.h5", **{name: odd})
    assert open_features(tmp_path).record("s").num_patches == 3


@pytest.mark.parametrize("kind", ["link", "storage", "virtual"])
def test_values_in_another_file_are_not_read(tmp_path, kind):
    folder = tmp_path / "features"
    write_h5(folder / "a.h5")
    write_h5(tmp_path / "secret.h5")
    with h5py.File(folder / "b.h5", "w") as h5:
        if kind == "link":
            h5["features"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "features")
        elif kind == "storage":
            file = [(str(tmp_path / "secret.h5"), 0, 48)]
            h5.create_dataset("features", (3, 4), np.float32, external=file)
        else:
            layout = h5py.VirtualLayout((3, 4), np.float32)
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "features", (3, 4))
            h5.create_virtual_dataset("features", layout)
    reader = open_features(folder)
    with pytest.raises(DamagedDataError, match="another file"):
        reader.features("b")


def test_a_dataset_of_more_rows_than_memory_is_an_error(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as h5:
        h5.create_dataset("features", (2**40, 4), np.float32, chunks=(1024, 4))
        h5["features"].attrs["encoder"] = "x"
    with pytest.raises(DamagedDataError, match="free memory"):
        open_features(tmp_path).features("s")


def test_a_compressed_pt_that_would_expand_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(DamagedDataError, match="10,000,000 bytes"):
        open_features(tmp_path).features("s")


def test_all_files_that_cannot_be_used_are_problems_and_the_others_match(tmp_path):
    for name in "abcdef":
        np.save(tmp_path / f"{name}.npy", VALUES)
    (tmp_path / "a.npy").write_bytes(b"")
    (tmp_path / "c.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:20])
    np.save(tmp_path / "d.npy", VALUES[:, :3])
    np.save(tmp_path / "e.npy", np.ones((2, 3, 4), np.float32))
    reader = open_features(tmp_path)
    assert reader.width == 4
    slides = [Slide(name, name, "", {}) for name in "abcdef"]
    matches, problems = match_slides(slides, [reader])
    assert (sorted(matches), sorted(p.slide for p in problems)) == (["b", "f"], list("acde"))


def test_a_slide_in_two_folders_of_patients_is_named(tmp_path):
    for patient in ("p1", "p2"):
        write_h5(tmp_path / patient / "a.h5")
    with pytest.raises(UserError, match="twice"):
        open_features(tmp_path)
