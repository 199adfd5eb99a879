"""Make a cohort of synthetic slides; see :mod:`e2e.toy.cohort`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import exit_code
from e2e.toy.cohort import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
