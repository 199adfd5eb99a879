"""A small cohort of dark and bright slides in a patch store, and the command line of a run on it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from e2e.store.lmdb import StoreWriter
from tests.helpers.stores import jpeg, picture, record

COUNTS = {f"s{k:02d}": 3 + k % 4 for k in range(16)}


def splits(k: int) -> str:
    return "train" if k < 9 else "val" if k < 12 else "test"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A folder with a store of 16 slides, dark or bright, and its label table."""
    folder = tmp_path_factory.mktemp("cohort")
    with StoreWriter(folder / "s.lmdb", {"source": "slides"}) as writer:
        for k, (slide, count) in enumerate(COUNTS.items()):
            dimmed = [
                picture(100 * k + n).point(lambda v, dark=k % 2: v // 2 if dark else 128 + v // 2)
                for n in range(count)
            ]
            writer.add(record(slide, count), [jpeg(image) for image in dimmed])
    rows = [
        {"case": f"c{k}", "slide": slide, "split": splits(k), "label": ("bright", "dark")[k % 2]}
        for k, slide in enumerate(COUNTS)
    ]
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    (folder / "cohort.yaml").write_text(
        f"data: {{labels: {folder}/labels.csv, stores: [{folder}/s.lmdb]}}\n"
        "task: {name: classification, classes: [bright, dark]}\n"
    )
    return folder


def arguments(cohort: Path, out: Path, *more: str) -> list[str]:
    return [
        "--datasets", f"{cohort}/cohort.yaml", "--model", "e2e_r18_abmilx",
        "encoder.name=test_resnet", "encoder.pretrained=false", "encoder.weights=null",
        "head.embed_dim=16", "head.heads=2", "bag.patches=4", "bag.size=null", "augment.crop=0.5",
        "optim.epochs=3", "optim.bags=4", "optim.lr=1e-3", "select.patience=null",
        "engine.device=cpu", "engine.chunk=6", "engine.verify=true", "run.bootstrap=50",
        f"run.out={out}", *more,
    ]  # fmt: skip
