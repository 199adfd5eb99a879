"""End-to-end training of a patch encoder and a multiple-instance head from slide labels.

The functions below are imported when they are first used, so that ``import e2e`` takes no time.

Examples
--------
>>> import e2e
>>> head = e2e.create_head("abmilx", in_dim=1024, num_outputs=2)
>>> e2e.list_heads("clam*")
['clam_mb', 'clam_sb']
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2e.api import create_head as create_head
    from e2e.api import create_model as create_model
    from e2e.api import create_task as create_task
    from e2e.api import list_encoders as list_encoders
    from e2e.api import list_heads as list_heads
    from e2e.api import load_cohort as load_cohort
    from e2e.api import load_run as load_run
    from e2e.api import open_features as open_features
    from e2e.api import open_store as open_store

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "create_head",
    "create_model",
    "create_task",
    "list_encoders",
    "list_heads",
    "load_cohort",
    "load_run",
    "open_features",
    "open_store",
]

# PyTorch then puts large tensors of the CPU on huge pages, whose first touch costs a fifth. It reads the
# variable once, when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """Import a function of the public API when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'e2e' has no attribute '{name}'")
    function = getattr(importlib.import_module("e2e.api"), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
