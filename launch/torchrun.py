"""PyTorch's ``torchrun``, keeping a worker's exit code 2.

A worker ends with 2 after it has told the user what to mend. Plain ``torchrun`` would follow that
message with a report of its own and a traceback, and end with 1. Everything else is as it was.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

USER_ERROR = 2


def main() -> None:
    """Run ``torchrun`` on this process's arguments."""
    elastic = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    elastic.addFilter(lambda record: f"exitcode: {USER_ERROR})" not in record.getMessage())
    elastic.addFilter(lambda record: "closing signal" not in record.getMessage())
    # One thread a process is its default, and right.
    starter = logging.getLogger("torch.distributed.run")
    starter.addFilter(lambda record: "OMP_NUM_THREADS" not in record.getMessage())
    try:
        torchrun()
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != USER_ERROR:
            raise
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
