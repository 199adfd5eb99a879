"""What tells a slide from another of the same name: digests of what its patches were cut from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

FINGERPRINT_BLOCKS = 16
"""Parts of a file that go into its fingerprint."""
FINGERPRINT_BYTES = 1 << 16
"""Size of each."""

FINGERPRINTED_IMAGES = 16
"""Images of a folder whose content goes into its identity; of all others name and size do."""


def fingerprint(path: Path) -> str:
    """Return a digest of a file's size and of parts spread over it, 32 hexadecimal digits.

    It tells one slide from another that was given its name, reads at most 1 MiB, and does not change when
    a file is copied or moved.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        last = max(0, size - FINGERPRINT_BYTES)
        for block in range(FINGERPRINT_BLOCKS):
            file.seek(last * block // (FINGERPRINT_BLOCKS - 1))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def join_identity(files: Sequence[Path], mpp: float | None, *more: str) -> str:
    """Return the identity of a slide: fingerprints of its files, and the resolution given for it.

    Parameters
    ----------
    files : sequence of Path
        What its patches are cut from.
    mpp : float or None
        Micrometres per pixel that were given in place of what the file says.
    *more : str
        Further digests.

    Returns
    -------
    str
        Empty if a file cannot be read.
    """
    try:
        digests = [*map(fingerprint, files), *more]
    except OSError:
        return ""
    text = hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()
    return text if mpp is None else f"{text} mpp={mpp:g}"


def identity_of_folder(images: Sequence[Path], mpp: float | None) -> str:
    """Return the identity of a slide that is a folder of images; see :func:`join_identity`."""
    try:
        names = [f"{file.name}:{file.stat().st_size}" for file in images]
    except OSError:
        return ""
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    step = max(1, len(images) // FINGERPRINTED_IMAGES)
    return join_identity(images[::step], mpp, digest)
