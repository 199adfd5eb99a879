"""Make the environment .venv from requirements.txt; does nothing when it is right already.

Runs on a bare Python: standard library only. An interrupted installation goes on the next time.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "made-from"
OLDEST, NEWEST = (3, 11), (3, 13)


def main() -> int:
    """Check, create, install, stamp."""
    wanted = "\n".join(
        [sys.version, hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()]
    )
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return 0
    fault = trouble()
    if fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print(f"making {VENV} (about 7 GB, some minutes) ...", flush=True)
    STAMP.unlink(missing_ok=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    steps = [
        [sys.executable, "-m", "venv", str(VENV)],
        [*pip, "install", "--quiet", "-r", str(ROOT / "requirements.txt")],
        [*pip, "install", "--quiet", "--no-deps", "--editable", str(ROOT)],
        [*pip, "check"],
    ]
    # DeepSpeed's compiled operators are not wanted at installation.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    for step in steps:
        if subprocess.run(step, env=environment, check=False).returncode:
            print(f"error: this step failed: {' '.join(step)}", file=sys.stderr)
            print("  mend what it says above and run make env again", file=sys.stderr)
            return 2
    STAMP.write_text(wanted)
    return 0


def trouble() -> str | None:
    """Why this Python cannot make the environment, and what to do."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return (
            f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 to 3.13 are needed\n"
            "  name another: make env PYTHON=python3.11"
        )
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        return (
            f"{sys.executable} cannot make environments: it lacks the module venv or ensurepip\n"
            "  install it (Debian: apt-get install python3-venv), or name another Python:"
            " make env PYTHON=/path/to/python3.11"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
