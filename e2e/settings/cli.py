"""Command lines and their help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from e2e.errors import UserError
from e2e.registry import Registry
from e2e.settings.layers import CONFIGS, load_settings, saved_settings
from e2e.settings.schema import SECTIONS, Settings


def train_parser(doc: str) -> argparse.ArgumentParser:
    """The command line of ``launch/train.py``."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=settings_help(),
    )
    parser.add_argument("--datasets", help="a YAML of configs/datasets, or a path to one")
    parser.add_argument(
        "--model", help="a YAML of configs/models, e2e_<encoder>_<head>, or <head> on features"
    )
    parser.add_argument("-c", "--config", action="append", default=[], help="a further YAML layer")
    parser.add_argument("--resume", metavar="RUN", help="go on with a stopped run")
    parser.add_argument("--print-config", action="store_true", help="show the settings and end")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def many_runs_parser(doc: str) -> argparse.ArgumentParser:
    """The command line of what trains many runs that have most settings in common."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", required=True, help="as for launch/train.py")
    parser.add_argument("--model", required=True, help="as for launch/train.py")
    parser.add_argument("-c", "--config", action="append", default=[], help="a further YAML layer")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and the tables")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, for every run"
    )
    return parser


def common_settings(
    args: argparse.Namespace, registries: Mapping[str, Registry[Any]]
) -> tuple[Settings, list[str]]:
    """The settings that a :func:`many_runs_parser` was asked for, and the words that ask launch/train.py."""
    settings = load_settings(
        datasets=args.datasets,
        model=args.model,
        files=args.config,
        overrides=args.overrides,
        registries=registries,
    )
    layers = [word for path in args.config for word in ("-c", path)]
    return settings, ["--datasets", args.datasets, "--model", args.model, *layers, *args.overrides]


def settings_help() -> str:
    """Every setting with its default and meaning."""
    lines = [
        "settings (section.key=value), besides the options of the plug-ins, whose",
        "names are those of encoder, head, task, sampler, augment, and of each regulariser (aem):",
    ]

    def walk(path: str, cls: Any) -> None:
        for item in dataclasses.fields(cls):
            nested = item.default_factory
            if nested is not MISSING and dataclasses.is_dataclass(nested):
                walk(f"{path}.{item.name}", nested)
                continue
            value = item.default if nested is MISSING else nested()
            shown = "null" if value is None else value
            lines.append(f"  {path}.{item.name}={shown}  {item.metadata['help']}")

    for section, cls in SECTIONS.items():
        walk(section, cls)
    return "\n".join(lines)


def settings_from_args(
    args: argparse.Namespace, registries: Mapping[str, Registry[Any]]
) -> tuple[Settings, Path]:
    """The settings and run folder that the command line of ``launch/train.py`` asks for."""
    if args.resume:
        if args.datasets or args.model or args.config or args.overrides:
            raise UserError(
                "--resume goes on with the run's own settings; give nothing else with it\n"
                "  to train with other settings, start another run"
            )
        return saved_settings(Path(args.resume), [], registries), Path(args.resume)
    if not args.datasets or not args.model:
        raise UserError(
            "give --datasets and --model, such as --datasets panda --model e2e_r18_abmilx\n"
            f"  datasets: {', '.join(sorted(p.stem for p in (CONFIGS / 'datasets').glob('*.yaml')))}"
        )
    settings, _ = common_settings(args, registries)
    names = "_".join(Path(name).stem for name in (args.datasets, args.model))
    return settings, Path(settings.run.out or Path("runs") / names)
