"""The command ``e2e``: one verb for each thing that can be done.

The command lines are read without PyTorch, so that help and mistakes appear at once; the module that does
the work is imported afterwards.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import e2e
from e2e.errors import UserError, exit_code
from e2e.registry import did_you_mean
from e2e.settings.cli import CommandParser


class Verb(NamedTuple):
    """One command."""

    summary: str
    """A line for ``e2e --help``."""
    parser: str
    """``module:function`` that makes its command line."""
    module: str
    """The module whose ``main(argv)`` does the work and returns the exit code."""


VERBS = {
    "pack": Verb(
        "cut slides into patches, in a patch store",
        "e2e.settings.data_cli:pack_parser",
        "e2e.runs.pack",
    ),
    "inspect": Verb(
        "show and check patch stores", "e2e.settings.data_cli:inspect_parser", "e2e.runs.inspect"
    ),
    "check": Verb(
        "check a cohort before a run", "e2e.settings.data_cli:check_parser", "e2e.runs.check"
    ),
    "splits": Verb(
        "cut a cohort into folds, or convert published splits",
        "e2e.settings.data_cli:splits_parser",
        "e2e.runs.splits",
    ),
    "train": Verb(
        "train encoder and head from slide labels, then evaluate",
        "e2e.settings.cli:train_parser",
        "e2e.runs.train",
    ),
    "evaluate": Verb(
        "evaluate a run again, or on another cohort",
        "e2e.settings.cli:evaluate_parser",
        "e2e.runs.evaluate",
    ),
    "predict": Verb(
        "predict slides without labels", "e2e.settings.cli:predict_parser", "e2e.runs.predict"
    ),
    "export": Verb(
        "export a trained run as a model for others",
        "e2e.settings.cli:export_parser",
        "e2e.runs.export",
    ),
    "extract": Verb(
        "extract frozen features of slides", "e2e.settings.cli:extract_parser", "e2e.runs.extract"
    ),
    "crossval": Verb(
        "train a run for each fold and seed",
        "e2e.settings.cli:crossval_parser",
        "e2e.runs.crossval",
    ),
    "sweep": Verb(
        "search for the best settings", "e2e.settings.cli:sweep_parser", "e2e.runs.sweep"
    ),
    "compare": Verb(
        "compare two runs on the same slides",
        "e2e.settings.cli:compare_parser",
        "e2e.runs.compare",
    ),
    "convert": Verb(
        "convert an LMDB of the ABMILX project",
        "e2e.settings.data_cli:convert_parser",
        "e2e.runs.convert",
    ),
    "demo": Verb(
        "draw slides, train and evaluate on them",
        "e2e.settings.data_cli:demo_parser",
        "e2e.runs.demo",
    ),
}


def main() -> int:
    """Run ``e2e`` on the arguments of this process and return the exit code."""
    return exit_code(lambda: run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str
        The verb and its arguments.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    UserError
        There is no such verb, or see the verb.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"e2e {e2e.__version__}")
        return 0
    return run_verb(argv[0], argv[1:])


def run_verb(name: str, argv: Sequence[str]) -> int:
    """Run the verb ``name`` with its arguments and return the exit code.

    Raises
    ------
    UserError
        There is no such verb, or see the verb.
    """
    if name not in VERBS:
        raise UserError(f"unknown command '{name}'{did_you_mean(name, VERBS)}\n  see: e2e --help")
    try:
        parser_of(name).parse(argv)  # before the import of PyTorch, which takes seconds
    except SystemExit as end:  # --help
        return int(end.code or 0)
    work: Callable[[Sequence[str]], int] = importlib.import_module(VERBS[name].module).main
    return work(argv)


def parser_of(name: str) -> CommandParser:
    """Return the command line of the verb ``name``."""
    module, _, function = VERBS[name].parser.partition(":")
    return getattr(importlib.import_module(module), function)()


def usage() -> str:
    """Return the text of ``e2e --help``."""
    lines = [f"  {name:10}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: e2e COMMAND ...",
            "",
            "Train a patch encoder and a multiple-instance head end to end on whole-slide images.",
            "",
            *lines,
            "",
            "e2e COMMAND --help    the options of a command",
            "e2e --version",
            "",
            "Exit codes: 0 done; 2 user error, with a message; 3 done, except for some slides, which are",
            "listed; 4 another process of the run was lost; 130 interrupted.",
        ]
    )
