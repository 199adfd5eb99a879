"""A small cohort of slides for the studies in tools/."""

from __future__ import annotations

import pandas as pd
import pytest

from e2e.store.lmdb import StoreWriter
from tests.helpers.stores import jpeg, picture, record


@pytest.fixture
def cohort(tmp_path):
    """A cohort YAML of 14 slides, dark or bright, of 6 patches."""
    rows = []
    with StoreWriter(tmp_path / "s.lmdb", {"source": "slides"}) as writer:
        for k in range(14):
            images = [
                picture(50 * k + n).point(lambda v, dark=k % 2: v // 2 if dark else 128 + v // 2)
                for n in range(6)
            ]
            writer.add(record(f"s{k:02d}", 6), [jpeg(image) for image in images])
            split = "train" if k < 6 else "val" if k < 10 else "test"
            rows.append(
                {"case": f"c{k}", "slide": f"s{k:02d}", "split": split, "label": "ab"[k % 2]}
            )
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    (tmp_path / "cohort.yaml").write_text(
        f"data: {{labels: {tmp_path}/labels.csv, stores: [{tmp_path}/s.lmdb]}}\n"
        "task: {name: classification, classes: [a, b]}\n"
        "encoder: {name: test_resnet, pretrained: false}\nengine: {device: cpu}\n"
    )
    return tmp_path
