"""Folders of the repository, and of the real data that lie beside it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = Path(os.environ.get("E2E_SHARED", ROOT.parent / "shared")) / "data"
"""Real slides, label tables and weights, which are no part of the repository."""
