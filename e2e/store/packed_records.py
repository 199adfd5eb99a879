"""How the record of a slide is stored: a line of JSON, then coordinates and the checksums of its patches."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2e.errors import DamagedDataError
from e2e.store.records import SlideRecord

STORED_FIELDS = ("level0_px", "mpp", "patch_px", "width", "height", "source", "source_bytes")
"""Fields of a record that every store has; older ones have no identity."""


def _checksum(meta: dict[str, Any], arrays: bytes) -> str:
    return hashlib.blake2b(json.dumps(meta).encode() + arrays, digest_size=16).hexdigest()


def read_metadata(value: Any) -> dict[str, Any]:
    """Return the line of JSON at the start of a packed record."""
    head = bytes(value[:4096])
    return json.loads(head[: head.index(b"\n")])


def unpack_record(value: bytes, path: Path, slide: str) -> tuple[SlideRecord, NDArray[np.uint32]]:
    """Return the record of a slide and the CRC-32 of its patches, from what :func:`pack_record` returned.

    Raises
    ------
    DamagedDataError
        The checksum of the record does not match.
    """
    meta = read_metadata(value)
    arrays = value[value.index(b"\n") + 1 :]
    num_patches, has_coords = meta["count"], meta.get("coords", True)
    checksum = meta.pop("checksum")
    num_bytes = (12 if has_coords else 4) * num_patches
    if len(arrays) != num_bytes or _checksum(meta, arrays) != checksum:
        raise DamagedDataError(f"{path}: the record of slide '{slide}' is damaged")
    coords = None
    if has_coords:
        coords = np.frombuffer(arrays, "<i4", 2 * num_patches).reshape(-1, 2).astype(np.int32)
    checksums = np.frombuffer(arrays, "<u4", num_patches, offset=len(arrays) - 4 * num_patches)
    fields = {name: meta[name] for name in STORED_FIELDS} | {"identity": meta.get("identity", "")}
    return SlideRecord(slide=slide, num_patches=num_patches, coords=coords, **fields), checksums


def pack_record(record: SlideRecord, number: int, checksums: list[int]) -> bytes:
    """Return the record of a slide as it is stored.

    Parameters
    ----------
    record : SlideRecord
        The slide.
    number : int
        Its number in the keys of its patches.
    checksums : list of int
        CRC-32 of its patches.
    """
    if len(checksums) != record.num_patches:
        raise ValueError(
            f"slide '{record.slide}' has {record.num_patches} patches, but {len(checksums)} JPEGs "
            "were given"
        )
    coords = record.coords
    arrays = b"" if coords is None else np.asarray(coords, "<i4").tobytes()
    arrays += np.asarray(checksums, "<u4").tobytes()
    meta: dict[str, Any] = {"coords": False} if coords is None else {}
    meta |= {"number": number, "count": len(checksums), "id": zlib.crc32(record.slide.encode())}
    meta |= {name: getattr(record, name) for name in STORED_FIELDS}
    meta |= {"identity": record.identity} if record.identity else {}
    meta["source"] = record.source[-300:]  # the line must stay below 4,096 bytes, however escaped
    meta["checksum"] = _checksum(meta, arrays)
    return json.dumps(meta).encode() + b"\n" + arrays


def check_complete(metadata: Mapping[str, Mapping[str, Any]], num_entries: int) -> None:
    """Check that a store of ``num_entries`` entries has lost or renamed no slide.

    Raises
    ------
    ValueError
        There are patches of slides that it does not list, or a slide's id is not as it was written.
    """
    expected = 1 + sum(1 + meta["count"] for meta in metadata.values())
    if num_entries > expected:
        raise ValueError(f"it has {num_entries:,} entries, and the slides it lists {expected:,}")
    for slide, meta in metadata.items():
        digest = zlib.crc32(slide.encode())
        if meta.get("id", digest) != digest:  # older stores have none
            raise ValueError(f"the id of slide '{slide}' is not as it was written")
