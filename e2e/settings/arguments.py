"""From a parsed command line to settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e2e.errors import UserError
from e2e.registry import Registry
from e2e.settings.configs import config_names
from e2e.settings.layers import load_settings, model_title, saved_settings
from e2e.settings.schema import Settings


def settings_from_args(
    args: argparse.Namespace, registries: Mapping[str, Registry[Any]]
) -> tuple[Settings, Path]:
    """Return the settings and the run folder of a command line of ``e2e train``.

    Parameters
    ----------
    args : argparse.Namespace
        Of :func:`e2e.settings.cli.train_parser`.
    registries : mapping
        See :func:`e2e.settings.layers.load_settings`.

    Raises
    ------
    UserError
        A setting is wrong, ``--datasets`` or ``--model`` is missing, or ``--resume`` stands with others.
    """
    if args.resume:
        if args.datasets or args.model or args.config or args.overrides or args.overwrite:
            raise UserError(
                "--resume continues with the settings of the run; give nothing else with it\n"
                "  to train with other settings, start another run"
            )
        return saved_settings(Path(args.resume), [], registries), Path(args.resume)
    if not args.datasets or not args.model:
        raise UserError(
            "give --datasets and --model, such as --datasets panda --model e2e_r18_abmilx\n"
            f"  datasets: {', '.join(config_names('datasets'))}"
        )
    settings, _ = common_settings(args, registries)
    title = model_title(args.model, settings, registries["head"].names())
    return settings, Path(settings.run.out or f"runs/{Path(args.datasets).stem}_{title}")


def common_settings(
    args: argparse.Namespace, registries: Mapping[str, Registry[Any]]
) -> tuple[Settings, list[str]]:
    """Return the settings that several runs share, and the arguments of ``e2e train`` that give them.

    Parameters
    ----------
    args : argparse.Namespace
        Of a parser with the options of :func:`e2e.settings.cli.add_layers`.
    registries : mapping
        See :func:`e2e.settings.layers.load_settings`.
    """
    settings = load_settings(
        datasets=args.datasets,
        model=args.model,
        files=args.config,
        overrides=args.overrides,
        registries=registries,
    )
    layers = [word for path in args.config for word in ("-c", path)]
    return settings, ["--datasets", args.datasets, "--model", args.model, *layers, *args.overrides]
