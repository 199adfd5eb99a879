"""Cut a cohort into folds, or check published splits; see :mod:`e2e.runs.splits`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import exit_code
from e2e.runs.splits import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
