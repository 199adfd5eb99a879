"""Options and label words of an example of each task."""

from __future__ import annotations

import e2e.tasks  # noqa: F401  (registers them)

CLASSES = ["low", "middle", "high"]


SURVIVAL = [{"event": e, "time": t} for e, t in zip("1011011010", "5328771946", strict=True)]


EXAMPLES = {
    "classification": ({"classes": CLASSES}, [{"label": c} for c in CLASSES * 3]),
    "grading": ({"classes": CLASSES}, [{"label": c} for c in CLASSES * 3]),
    "multilabel": (
        {"labels": ["er", "pr"]},
        [{"er": a, "pr": b} for a, b in zip("0101101", "1100110", strict=True)],
    ),
    "regression": ({}, [{"label": w} for w in ("1.5", "-2", "3e2", "0", "7", "11")]),
    "survival": ({"event": "1", "bins": 3}, SURVIVAL),
}
"""Task -> options and the words of some slides. Who registers a task adds a line."""
