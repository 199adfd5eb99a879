"""``python -m e2e.toy`` makes a cohort of synthetic slides."""

import sys

from e2e.errors import exit_code
from e2e.toy.cohort import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
