"""Stores and features that cannot be opened are named together."""

from __future__ import annotations

import numpy as np
import pytest

from e2e.cohort.readers import open_feature_readers, open_patch_readers
from e2e.errors import UserError
from tests.helpers.feature_cohort import write_slide
from tests.helpers.stores import write_store


def test_all_stores_that_cannot_be_used_are_named(tmp_path):
    for name in "ad":
        write_store(tmp_path / f"{name}.lmdb", {name: 3})
    content = (tmp_path / "a.lmdb").read_bytes()
    (tmp_path / "b.lmdb").write_bytes(content[:-5000])
    (tmp_path / "c.lmdb").write_text("no store")
    with pytest.raises(UserError) as error:
        open_patch_readers([[f"{tmp_path}/*.lmdb"]])
    lines = str(error.value).splitlines()
    assert lines[0] == "2 of 4 stores cannot be used"
    assert "b.lmdb was cut short" in lines[1]
    assert "c.lmdb is not a patch store" in lines[2]
    assert lines[-1].endswith("leave them out of data.stores")


def test_a_single_store_that_cannot_be_used_keeps_its_message(tmp_path):
    write_store(tmp_path / "a.lmdb", {"a": 3})
    with pytest.raises(UserError, match=r"^no patch store at .*b\.lmdb\n  make it with e2e pack"):
        open_patch_readers([[f"{tmp_path}/a.lmdb", f"{tmp_path}/b.lmdb"]])


def test_all_features_that_cannot_be_used_are_named(tmp_path):
    write_slide(tmp_path / "good", "s", np.ones((2, 3), np.float32))
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "notes.txt").write_text("text")
    entries = [str(tmp_path / name) for name in ("good", "empty", "other")]
    with pytest.raises(UserError, match=r"^2 of 3 features cannot be used\n.*empty.*\n.*other"):
        open_feature_readers(entries)
