"""The fenced code blocks of README.md and docs/, and the `e2e` commands in them."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = "Not run by the tests"
"""The title of a block of commands that the tests do not execute begins with this, and gives the reason."""


@dataclass(frozen=True)
class Fence:
    """A fenced code block."""

    page: str
    language: str
    title: str
    text: str

    @property
    def is_run(self) -> bool:
        """Whether the tests execute it, as far as its title says."""
        return not self.title.startswith(NOT_RUN)


def fences(page: Path, language: str) -> list[Fence]:
    """Return the blocks of a page in one language, in order."""
    pattern = r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$'
    return [
        Fence(page.name, found_language, title, text)
        for found_language, title, text in re.findall(
            pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        if found_language == language
    ]


def commands(fence: Fence) -> list[list[str]]:
    """Return the words of each command of a block, without comments."""
    lines = fence.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def python_command(words: list[str]) -> list[str]:
    """Return how this interpreter runs the command `e2e VERB ...`, without an installed package."""
    program, verb, *rest = words
    assert program == "e2e", f"{shlex.join(words)}: only e2e commands are run; mark the block"
    return [sys.executable, "-m", "e2e", verb, *rest]
