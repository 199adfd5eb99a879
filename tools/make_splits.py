"""Cut a cohort into folds; the same as ``e2e splits``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.cli import run_verb
from e2e.errors import exit_code


def main() -> int:
    """Run ``e2e splits`` on the arguments of this process."""
    return run_verb("splits", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))
