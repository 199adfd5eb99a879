"""Write the parts of the documentation that come from the code: settings, heads, encoders and tasks.

  python tools/make_docs.py            rewrite docs/settings.md and the tables of the other pages
  python tools/make_docs.py --check    list the pages that are out of date (exit code 2), and write nothing

docs/settings.md is generated completely. The other pages hold the tables between two comments,
`<!-- generated: NAME -->` and `<!-- end of generated text -->`; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from e2e.encoders.base import ENCODERS
from e2e.encoders.foundation import CLIP, FOUNDATION, HALF, IMAGENET, Card
from e2e.encoders.timm import TimmEncoder
from e2e.errors import UserError, exit_code, format_list
from e2e.heads.base import HEADS, Head
from e2e.registry import Registry
from e2e.runs.parts import REGISTRIES
from e2e.settings.schema import SECTIONS, Requirement
from e2e.tasks.base import TASKS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BEGIN, END = "<!-- generated: {} -->", "<!-- end of generated text -->"
REQUIRED = inspect.Parameter.empty
TYPE_NAMES = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    type(None): "null",
    Any: "any",
}
NORMALISATIONS: dict[tuple[tuple[float, ...], ...], str] = {
    IMAGENET: "ImageNet",
    CLIP: "CLIP",
    HALF: "0.5 and 0.5",
}
SECTION_TITLES = {
    "data": "The cohort: label table, stores, splits",
    "bag": "Patches of a slide in training",
    "optim": "Optimiser and schedule",
    "engine": "Memory, precision, devices and processes",
    "select": "Validation and selection of the epoch",
    "run": "The run folder",
    "encoder": "Encoder",
    "head": "Head",
    "task": "Task",
    "sampler": "Sampler: which patches of a slide are used in an epoch",
    "augment": "Augmentation of the training patches",
    "losses": "Regularisers: additional losses of any head",
}


# --- Markdown ---


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; vertical bars inside cells are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(escape(cell) for cell in cells) + " |" for cells in lines)


def escape(cell: str) -> str:
    """Return a cell's text with vertical bars and angle brackets outside of code escaped."""
    parts = re.split(r"(`[^`]*`)", cell)
    parts[::2] = [part.replace("<", "&lt;").replace(">", "&gt;") for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


def code(value: object) -> str:
    """Return a value as YAML writes it, in backticks."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {item}' for key, item in value.items())}}}`"
    if isinstance(value, float):
        return f"`{value:.6g}`"
    return f"`{value}`" if str(value) else "(empty)"


def type_name(hint: Any) -> str:
    """Return the type of a setting in words."""
    if hint in TYPE_NAMES:
        return TYPE_NAMES[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    if origin is list:
        return f"list of {type_name(arguments[0])}" if origin else "list"
    if origin is tuple:
        return f"{len(arguments)} values: {', '.join(map(type_name, arguments))}"
    if origin is dict:
        return "mapping"
    return getattr(hint, "__name__", str(hint))


# --- docstrings ---


def plain_text(text: str) -> str:
    """Return a piece of a docstring on one line, with reStructuredText roles as code."""
    text = re.sub(r":\w+:`~?\.?([\w.]+)`", lambda match: f"`{match[1].split('.')[-1]}`", text)
    return " ".join(text.replace("``", "`").split())


def parameter_help(factory: Callable[..., Any]) -> dict[str, str]:
    """Return parameter -> description, from a numpydoc or a Google docstring."""
    if inspect.isclass(factory):
        inherited: dict[str, str] = {}
        for cls in reversed(factory.__mro__):
            inherited |= docstring_parameters(cls.__doc__ or "")
        return inherited
    return docstring_parameters(factory.__doc__ or "")


def docstring_parameters(docstring: str) -> dict[str, str]:
    """Return parameter -> description of one docstring."""
    lines = inspect.cleandoc(docstring).splitlines()
    numpydoc = [i for i, line in enumerate(lines) if line == "Parameters"]
    if numpydoc:
        return _numpydoc_parameters(lines[numpydoc[0] + 2 :])
    google = [i for i, line in enumerate(lines) if line == "Args:"]
    return _google_parameters(lines[google[0] + 1 :]) if google else {}


def _numpydoc_parameters(lines: Sequence[str]) -> dict[str, str]:
    descriptions: dict[str, list[str]] = {}
    names: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line and not line.startswith(" "):
            if following and set(following) == {"-"}:
                break
            names = [name.strip(" *") for name in line.split(":")[0].split(",")]
            descriptions |= {name: [] for name in names}
        else:
            for name in names:
                descriptions[name].append(line)
    return {name: plain_text("\n".join(text)) for name, text in descriptions.items()}


def _google_parameters(lines: Sequence[str]) -> dict[str, str]:
    descriptions: dict[str, list[str]] = {}
    names: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):
            break
        if match := re.match(r" {4}([a-z_][\w, ]*): ?(.*)", line):
            names = [name.strip() for name in match[1].split(",")]
            descriptions |= {name: [match[2]] for name in names}
        else:
            for name in names:
                descriptions[name].append(line)
    return {name: plain_text("\n".join(text)) for name, text in descriptions.items()}


# --- settings.md ---


def settings_page() -> str:
    """Return docs/settings.md."""
    parts = [
        "# All settings",
        "<!-- Generated by tools/make_docs.py from e2e/settings/schema.py and the registries. -->",
        "Every setting is `section.key=value` on the command line, or the same keys in a YAML file\n"
        "(`-c FILE`). Later layers win: the defaults below, the cohort's YAML, the model's YAML,\n"
        "`-c` files in order, then the command line. `e2e train ... --print-config` prints what a command\n"
        "resolves to.\n"
        "[Training](training.md) explains the settings that are needed most often.",
    ]
    for section, schema in SECTIONS.items():
        parts += [_title(section), _dataclass_table(section, schema)]
    for section in REGISTRIES:
        parts += [_title(section), *plugin_options(section)]
    return "\n\n".join(parts) + "\n"


def _title(section: str) -> str:
    name = "aem, spatial" if section == "losses" else section
    return f"## {name}\n\n{SECTION_TITLES[section]}."


def _dataclass_table(section: str, schema: type) -> str:
    return markdown_table(
        ("setting", "value", "default", "meaning"), list(_dataclass_rows(section, schema))
    )


def _dataclass_rows(path: str, schema: type) -> Iterable[tuple[str, str, str, str]]:
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _dataclass_rows(f"{path}.{item.name}", hint)
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        name = f"`{path}.{item.name}`"
        value = allowed_values(hint, item.metadata.get("must_be"))
        yield name, value, code(default), sentence(item.metadata["help"])


def allowed_values(hint: Any, requirement: Requirement | None) -> str:
    """Return the type of a setting in words, and what its values must be."""
    if requirement is None:
        return type_name(hint)
    is_text = hint is str or hint == str | None
    if is_text:
        return requirement.text
    named = type_name(hint)
    if requirement.text.endswith("or null"):
        named = named.removesuffix(" or null")
    return f"{named}; {requirement.text}"


def plugin_options(section: str) -> list[str]:
    """Return the tables of options of a registry's plug-ins; those with the same options share one."""
    registry = REGISTRIES[section]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in registry.names():
        groups.setdefault(tuple(registry.options(name)), []).append(name)
    parts = []
    for options, names in groups.items():
        heading = ", ".join(f"`{name}`" for name in names)
        if section == "losses":
            heading = f"`{names[0]}.weight` and the other options of `{names[0]}`"
        else:
            heading = f"`{section}.name`: {heading}"
        parts.append(f"### {heading}")
        parts.append(_option_table(section, registry, names) if options else "No options.")
    return parts


def _option_table(section: str, registry: Registry[Any], names: Sequence[str]) -> str:
    documented = parameter_help(constructor(registry, names[0]))
    rows = []
    for option, (hint, _) in registry.options(names[0]).items():
        defaults = {name: registry.options(name)[option][1] for name in names}
        different = len({code(value) for value in defaults.values()}) > 1
        texts = [
            f"{name}: {code(value)}" if different else _default_text(value)
            for name, value in defaults.items()
        ]
        default = "; ".join(texts) if different else texts[0]
        path = f"{names[0]}.{option}" if section == "losses" else f"{section}.{option}"
        rows.append((f"`{path}`", type_name(hint), default, sentence(documented.get(option, ""))))
    return markdown_table(("setting", "type", "default", "meaning"), rows)


def _default_text(value: object) -> str:
    return "required" if value is REQUIRED else code(value)


def constructor(registry: Registry[Any], name: str) -> Callable[..., Any]:
    """Return the class or function behind a registered name."""
    factory = registry.factory(name)
    return factory.func if isinstance(factory, functools.partial) else factory


# --- the tables of the other pages ---


def heads_table() -> str:
    """Return a row per head: what it is, what it needs and what it gives; empty columns are left out."""
    columns = ("head", "what it is", "attention", "patch scores", "loss of its own", "coordinates")
    rows: list[tuple[str, ...]] = [(*columns, "parameters")]
    for name in HEADS.names():
        head = HEADS.build(name, 1024, 2).eval()
        coords = torch.stack([torch.arange(16.0), torch.zeros(16)], dim=1)[None] * 256
        with torch.no_grad():
            output = head(torch.randn(1, 16, 1024), torch.ones(1, 16, dtype=torch.bool), coords)
        millions = sum(parameter.numel() for parameter in head.parameters()) / 1e6
        rows.append(
            (
                f"`{name}`",
                _module_summary(type(head)),
                _yes(output.attention_logits is not None),
                _yes(output.instance_logits is not None),
                _yes(type(head).aux_loss is not Head.aux_loss),
                _yes(head.needs_coords),
                f"{millions:.2f} M",
            )
        )
    used = [column for column in zip(*rows, strict=True) if any(column[1:])]
    header, *body = zip(*used, strict=True)
    return markdown_table(header, body)


def _module_summary(cls: Callable[..., Any]) -> str:
    """Return the first line of the module that defines a class, without the name in front."""
    module = sys.modules[cls.__module__]
    line = (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return sentence(line.partition(": ")[2] or line)


def sentence(text: str) -> str:
    """Return a text with a capital first letter, unless it begins with a value or a name from code."""
    first, *others = text.split(" ", 2) or [""]
    is_word = first.replace("-", "").rstrip(",").isalpha() and others[:1] != ["|"]
    return text[:1].upper() + text[1:] if is_word else text


def _yes(value: bool) -> str:
    return "yes" if value else ""


def encoders_table() -> str:
    """Return a row per encoder registered by name; the networks of timm come besides."""
    rows = []
    for name in ENCODERS.names():
        if name == "features":
            continue
        encoder = ENCODERS.build(name, pretrained=False)
        assert isinstance(encoder, TimmEncoder)
        text = f"timm's `{encoder.model}`, cut after its third stage"
        row = (str(encoder.dim), "any", "that of the weights", text, "see timm's model card")
        rows.append((f"`{name}`", *row))
    for name, card in FOUNDATION.items():
        mean_and_std = NORMALISATIONS.get(card.statistics, "its own")
        row = (str(card.width), str(card.input_px), mean_and_std, _weights_link(card), card.licence)
        rows.append((f"`{name}`", *row))
    columns = ("encoder", "width", "patch side, px", "mean and std", "weights", "licence")
    return markdown_table(columns, rows)


def _weights_link(card: Card) -> str:
    if "://" in card.source:
        return f"[{card.source.split('://')[1]}]({card.source})"
    return f"[{card.source}](https://huggingface.co/{card.source})"


def tasks_table() -> str:
    """Return a row per task with its options and the metric that selects the epoch."""
    rows = []
    for name in TASKS.names():
        options = TASKS.options(name)
        monitor = options["monitor"][1] or "`auc`; of three or more classes `balanced_accuracy`"
        monitor = monitor if "`" in monitor else f"`{monitor}`"
        listed = ", ".join(f"`{option}`" for option in options if option != "monitor")
        rows.append((f"`{name}`", _module_summary(constructor(TASKS, name)), listed, monitor))
    return markdown_table(("`task.name`", "what it is", "options", "selection metric"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "heads": heads_table,
    "encoders": encoders_table,
    "tasks": tasks_table,
}
PAGES = {"heads.md": ("heads", "encoders"), "tasks.md": ("tasks",)}


def replace_table(page: str, name: str, table: str) -> str:
    """Return a page with the text between the comments of the generated table `name` replaced."""
    begin = BEGIN.format(name)
    before, marker, rest = page.partition(begin)
    if not marker or END not in rest:
        raise UserError(f"the page has no '{begin}' ... '{END}'\n  add both comments")
    return f"{before}{begin}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def generated_pages() -> dict[Path, str]:
    """Return the path and text of every page that has generated parts, as they should be."""
    pages = {DOCS / "settings.md": settings_page()}
    for file, names in PAGES.items():
        text = (DOCS / file).read_text(encoding="utf-8")
        for name in names:
            text = replace_table(text, name, TABLES[name]())
        pages[DOCS / file] = text
    return pages


def outdated_pages(pages: dict[Path, str]) -> list[Path]:
    """Return the pages whose file differs from the text it should have."""
    return [
        path
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 2 if outdated"
    )
    args = parser.parse_args()
    pages = generated_pages()
    outdated = outdated_pages(pages)
    if args.check and outdated:
        names = format_list(path.relative_to(ROOT) for path in outdated)
        raise UserError(f"outdated pages\n{names}\n  run: python tools/make_docs.py")
    for path in outdated:
        path.write_text(pages[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
