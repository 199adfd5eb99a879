"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """Return the number of bytes that ``text`` states.

    Parameters
    ----------
    text : str
        A number with a unit or none, such as ``8GiB``, ``500 MB`` or ``1000000``.

    Raises
    ------
    ValueError
        The text is not a size.

    Examples
    --------
    >>> parse_bytes("8GiB")
    8589934592
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"{text!r} is not a size such as 8GiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def show_bytes(count: float) -> str:
    """Return ``count`` bytes in words, such as ``1.5 GiB`` or ``200 MiB``."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
