"""Make the environment .venv from requirements.txt; does nothing when it is up to date.

Runs on a bare Python: standard library only. An interrupted installation continues the next time.
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
INPUTS = ("requirements.txt", "pyproject.toml")
OLDEST, NEWEST = (3, 11), (3, 13)


def main() -> int:
    """Check, create, install, stamp."""
    digests = [hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in INPUTS]
    state = "\n".join([sys.version, *digests])
    if STAMP.is_file() and STAMP.read_text() == state:
        return 0
    if problem := find_problem():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"making {VENV} (about 7 GB, some minutes) ...", flush=True)
    STAMP.unlink(missing_ok=True)
    if not install():
        return 2
    STAMP.write_text(state)
    return 0


def install() -> bool:
    """Create the environment, install into it, and return whether every step succeeded."""
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    requirements = ROOT / "requirements.txt"
    steps = [
        [sys.executable, "-m", "venv", str(VENV)],
        [*pip, "install", "--quiet", "-r", str(requirements)],
        [*pip, "install", "--quiet", "--no-deps", "--editable", str(ROOT)],
        [*pip, "check"],
    ]
    if not all(run(step) for step in steps):
        return False
    if (VENV / "bin" / "torchrun").exists():
        return True
    # Earlier versions of this project replaced PyTorch's torchrun, and took it with them.
    torch = next(
        line for line in requirements.read_text().splitlines() if line.startswith("torch=")
    )
    return run([*pip, "install", "--quiet", "--no-deps", "--force-reinstall", torch])


def run(step: list[str]) -> bool:
    """Run a command and return whether it succeeded."""
    # DeepSpeed's compiled operators are not built at installation.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    if subprocess.run(step, env=environment, check=False).returncode == 0:
        return True
    print(f"error: this step failed: {' '.join(step)}", file=sys.stderr)
    print("  fix what it reports above, then run make env again", file=sys.stderr)
    return False


def find_problem() -> str | None:
    """Return why this Python cannot make the environment and what to do; None if it can."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return (
            f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 to 3.13 is needed\n"
            "  choose another: make env PYTHON=python3.11"
        )
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        return (
            f"{sys.executable} cannot make environments: the module venv or ensurepip is missing\n"
            "  install it (Debian: apt-get install python3-venv), or choose another Python:"
            " make env PYTHON=/path/to/python3.11"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
