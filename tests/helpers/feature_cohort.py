"""A small cohort of frozen features, and the command line of a run on it."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

D = 12


COUNTS = {f"s{k:02d}": 2 + 3 * k % 11 for k in range(16)}


def features_of(k: int, count: int) -> np.ndarray:
    """Bags of odd numbers have one patch that tells."""
    found = np.random.default_rng(k).normal(size=(count, D)).astype(np.float32)
    found[count // 2, 0] += 12 * (k % 2)
    return found


def write_slide(folder: Path, slide: str, features: np.ndarray, *, coords: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide}.h5", "w") as file:
        file["features"] = features
        if coords:
            n = np.arange(len(features))
            file["coords"] = np.stack([n % 4, n // 4], 1).astype(np.int32) * 256


@pytest.fixture
def cohort(tmp_path) -> Path:
    """A folder of features of 16 slides, half precision on every third, and its label table."""
    for k, (slide, count) in enumerate(COUNTS.items()):
        found = features_of(k, count)
        write_slide(tmp_path / "feats", slide, found.astype(np.float16) if k % 3 == 0 else found)
    splits = ["train"] * 8 + ["val"] * 4 + ["test"] * 4
    rows = [
        {"case": f"c{k}", "slide": slide, "split": splits[k], "label": ("plain", "marked")[k % 2]}
        for k, slide in enumerate(COUNTS)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    (tmp_path / "cohort.yaml").write_text(
        f"data: {{labels: {tmp_path}/labels.csv, features: [{tmp_path}/feats], stores: [none.lmdb]}}\n"
        "task: {name: classification, classes: [plain, marked]}\n"
    )
    return tmp_path


def arguments(cohort: Path, *more: str) -> list[str]:
    return [
        "--datasets", f"{cohort}/cohort.yaml", "--model", "abmil", "head.embed_dim=8",
        "head.dropout=0.0", "optim.epochs=6", "optim.bags=3", "optim.lr=1e-2", "engine.device=cpu",
        "run.bootstrap=20", f"run.out={cohort}/run", *more,
    ]  # fmt: skip
