"""Run a command and write its peak resident memory in KiB to a file: peak_memory.py FILE COMMAND ...

Linux counts a child's memory from its parent's, and a study is as large as a small run, so the parent has
to be small: start this with ``python -I -S``. Exits with the exit code of the command.
"""

import os
import subprocess
import sys


def main() -> int:
    """Run the command and return its exit code."""
    process = subprocess.Popen(sys.argv[2:])
    _, status, usage = os.wait4(process.pid, 0)
    with open(sys.argv[1], "w") as file:
        file.write(str(usage.ru_maxrss))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
