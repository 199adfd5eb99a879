"""``python -m e2e`` is the command ``e2e``."""

import sys

from e2e.cli import main

if __name__ == "__main__":
    sys.exit(main())
