"""What goes wrong by a user's mistake: one message, exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake the user can mend. The message says what, where, what was found, what to do.

    Every process of a distributed run meets the same mistake, so only rank 0 prints it.
    """

    on_every_rank = False


class OneRankError(UserError):
    """A mistake that one rank may meet while the others do not: that one prints it."""

    on_every_rank = True


class DamagedDataError(OneRankError):
    """A slide, patch or store that cannot be read."""


class LostRankError(Exception):
    """Another process of a distributed run died or hangs. Nobody's mistake: each that notices says so."""


LOST_RANK = 4
"""Exit code: another process of the run was lost."""


INTERRUPTED = 130
"""Exit code: Ctrl-C, as shells have it."""


def exit_code(main: Callable[[], int | None], *, interrupted: str | None = None) -> int:
    """Run ``main`` and return its exit code; a UserError is printed and becomes 2, a lost rank 4.

    Any other exception goes on its way: a crash exits non-zero with its traceback.

    Args:
        interrupted: what to say of Ctrl-C, in one line and with exit code 130; None: it is no
            other than the rest.
    """
    try:
        return main() or 0
    except UserError as error:
        if error.on_every_rank or os.environ.get("RANK", "0") == "0":
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except LostRankError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return LOST_RANK
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


def format_list(items: Iterable[object], *, most: int = 10) -> str:
    """Indented lines, one an item; what is over ``most`` is counted, not shown."""
    shown = [str(item) for item in items]
    lines = [f"  {item}" for item in shown[:most]]
    if len(shown) > most:
        lines.append(f"  ... and {len(shown) - most} more")
    return "\n".join(lines)
