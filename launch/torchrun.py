"""PyTorch's ``torchrun``, which keeps the exit codes of the commands (2: a user error, already printed)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.parallel.launcher import run_torchrun


def main() -> int:
    """Run ``torchrun`` on the arguments of this process."""
    return run_torchrun(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
