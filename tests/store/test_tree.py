"""A damaged tree of an LMDB file is an error, before LMDB follows it out of the file or loses a slide."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e.errors import DamagedDataError, UserError
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.tree import check_tree
from tests.helpers.stores import RECIPE, patches, record, write_store

PAGE = 4096


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store of 40 slides, one transaction each, whose patches lie in pages of their own."""
    path = tmp_path_factory.mktemp("tree") / "s.lmdb"
    with StoreWriter(path, RECIPE) as writer:
        for k in range(40):
            jpegs = [jpeg + bytes(5000 + 10 * k) for jpeg in patches(f"s{k}", 12)]
            writer.add(record(f"s{k}", 12), jpegs)
    return path


def check(path: Path) -> None:
    """Check a file that no writer has open in this process."""
    newest = max(struct.unpack_from("<Q", path.read_bytes(), k * PAGE + 144)[0] for k in (0, 1))
    check_tree(path, newest)


def tree_pages(content: bytes) -> list[int]:
    """Numbers of the pages that the newest snapshot consists of, but for values."""
    metas = [struct.unpack_from("<QQQQ", content, k * PAGE + 120) for k in (0, 1)]
    _, root, _, _ = max(metas, key=lambda meta: meta[3])
    pages, pending = [], [root]
    while pending:
        page = pending.pop()
        pages.append(page)
        flags, lower = struct.unpack_from("<HH", content, page * PAGE + 10)
        for k in range((lower - 16) // 2 if flags & 1 else 0):
            [offset] = struct.unpack_from("<H", content, page * PAGE + 16 + 2 * k)
            low, middle, high = struct.unpack_from("<HHH", content, page * PAGE + offset)
            pending.append(low | middle << 16 | high << 32)
    return pages


def long_values(content: bytes, page: int) -> Iterator[int]:
    """Where the nodes of patches that lie in pages of their own start."""
    flags, lower = struct.unpack_from("<HH", content, page * PAGE + 10)
    for k in range((lower - 16) // 2 if flags & 2 else 0):
        [offset] = struct.unpack_from("<H", content, page * PAGE + 16 + 2 * k)
        kind, key = struct.unpack_from("<HH", content, page * PAGE + offset + 4)
        if (kind, key) == (1, 9):
            yield page * PAGE + offset


def damaged(store: Path, folder: Path, start: int, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "damaged.lmdb"
    shutil.copy(store, path)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)
    return path


def test_a_store_as_it_was_written_is_right(store):
    check(store)
    assert len(tree_pages(store.read_bytes())) > 5  # branches and leaves


def test_a_store_of_one_slide_and_an_empty_one_are_right(tmp_path):
    write_store(tmp_path / "a.lmdb", {"a": 1})
    check(tmp_path / "a.lmdb")
    StoreWriter(tmp_path / "b.lmdb", RECIPE).close()
    check(tmp_path / "b.lmdb")
    lmdb.open(str(tmp_path / "c.lmdb"), subdir=False).close()
    check(tmp_path / "c.lmdb")


@pytest.mark.parametrize(
    ("offset", "content", "fault"),
    [
        (0, b"\x07", "is not a page of its tree"),  # its number
        (10, b"\x08", "is not a page of its tree"),  # its kind
        (12, b"\xff\xff", "is not a page of its tree"),  # the end of its offsets
        (12, b"\x12\x00", "entries"),  # all nodes but one are lost
        (16, b"\x02\x00", "outside its page"),  # the first offset
        (16, b"\xff\xff", "outside its page"),
    ],
)
def test_a_page_whose_header_has_changed_is_named(store, tmp_path, offset, content, fault):
    leaf = tree_pages(store.read_bytes())[-1]
    path = damaged(store, tmp_path, leaf * PAGE + offset, content)
    with pytest.raises(DamagedDataError, match=fault):
        StoreWriter(path, RECIPE)
    with pytest.raises(DamagedDataError, match=fault):
        PatchStore(shutil.copy(path, tmp_path / "copy.lmdb"))


def test_a_value_that_leads_out_of_the_file_is_refused(store, tmp_path):
    content = store.read_bytes()
    node = next(n for page in tree_pages(content)[::-1] for n in long_values(content, page))
    for offset, changed in ((0, b"\xff\xff\xff\xff"), (8 + 9, b"\xff" * 4), (4, b"\x06")):
        with pytest.raises(DamagedDataError, match="is damaged"):
            PatchStore(damaged(store, tmp_path / str(offset), node + offset, changed))


@pytest.mark.parametrize("page", [0, 1])
def test_an_older_snapshot_is_not_taken_for_the_newest(store, tmp_path, page):
    """A transaction's number that has changed would bring back the store without its last slide."""
    path = damaged(store, tmp_path, page * PAGE + 144, bytes(8))
    with pytest.raises(UserError, match="is damaged"):
        PatchStore(path)


def test_an_id_that_has_changed_is_noticed(store, tmp_path):
    content = store.read_bytes()
    pages = tree_pages(content)
    at = next(p * PAGE + k for p in pages if (k := content[p * PAGE :][:PAGE].find(b"s:s39{")) > 0)
    path = damaged(store, tmp_path, at, b"s:s38x"[:5])
    with pytest.raises(DamagedDataError, match="is damaged"):
        PatchStore(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_change_of_a_page_of_the_tree_gives_other_patches(store, tmp_path_factory, data):
    pages = tree_pages(store.read_bytes())
    page = data.draw(st.sampled_from([0, 1, *pages]))
    start = data.draw(st.integers(0, PAGE - 1))
    changed = data.draw(st.binary(min_size=1, max_size=16))
    path = damaged(store, tmp_path_factory.mktemp("any"), page * PAGE + start, changed)
    expected = PatchStore(store)
    try:
        opened = PatchStore(path)
        content = {s: opened.read(s, range(opened.num_patches(s))) for s in opened.slides}
    except UserError:
        return
    assert content == {s: expected.read(s, range(expected.num_patches(s))) for s in expected.slides}
