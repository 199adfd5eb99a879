"""Help on settings by topic: the options of a plug-in, the plug-ins of a kind, the settings of a section."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from e2e.errors import UserError
from e2e.registry import Registry, did_you_mean
from e2e.settings.cli import settings_help
from e2e.settings.schema import SECTIONS

ENTRY = re.compile(r"^(\w+(?:, \w+)*) ?:(.*)$")
"""A parameter in a docstring: names, a colon, and its type or its meaning."""


def describe_topic(topic: str, registries: Mapping[str, Registry[Any]]) -> str:
    """Return the help on a topic.

    Parameters
    ----------
    topic : str
        A plug-in (``head.abmilx``), a kind of plug-in (``head``), a regulariser (``aem``) or a section of
        settings (``optim``).
    registries : mapping
        See :func:`e2e.settings.layers.load_settings`.

    Raises
    ------
    UserError
        There is no such topic.
    """
    kind, _, name = topic.partition(".")
    losses = registries["losses"]
    if kind in registries and kind != "losses":
        if name:
            return describe_plugin(registries[kind], name, section=kind)
        return f"{kind}.name is one of:\n" + "\n".join(
            f"  {plugin:16} {_first_sentence(registries[kind], plugin)}"
            for plugin in registries[kind].names()
        )
    if kind in losses.names():
        return describe_plugin(losses, kind, section=kind)
    if kind in SECTIONS:
        lines = [line for line in settings_help().splitlines() if line.startswith(f"  {topic}")]
        if lines:
            return "\n".join(lines)
    topics = [*SECTIONS, *(key for key in registries if key != "losses"), *losses.names()]
    raise UserError(f"--help {topic}: no such topic{did_you_mean(topic, topics)}")


def describe_plugin(registry: Registry[Any], name: str, *, section: str) -> str:
    """Return what a plug-in is, and its options with types, defaults and meanings.

    Parameters
    ----------
    registry : Registry
        Where it is registered.
    name : str
        Its name.
    section : str
        The section of the settings that holds its options.

    Raises
    ------
    UserError
        There is no such plug-in.
    """
    documents = _docstrings(registry.factory(name))
    meanings: dict[str, str] = {}
    for document in documents:
        meanings = parameter_texts(document) | meanings
    lines = [f"{registry.kind} '{name}': {_summary(documents)}", ""]
    options = registry.options(name)
    for option, (kind, default) in options.items():
        value = "(required)" if default is inspect.Parameter.empty else _show(default)
        lines.append(f"  {section}.{option}={value}  ({_type_name(kind)})")
        lines += textwrap.wrap(
            meanings.get(option, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines if options else [*lines, "  It has no options."])


def parameter_texts(docstring: str) -> dict[str, str]:
    """Return the meaning of each parameter that a docstring documents.

    Parameters
    ----------
    docstring : str
        With a section ``Parameters`` (numpydoc) or ``Args:``.

    Examples
    --------
    >>> parameter_texts('''A head.
    ...
    ... Parameters
    ... ----------
    ... width : int
    ...     Width of the hidden layer.
    ... ''')
    {'width': 'Width of the hidden layer.'}
    """
    lines = inspect.cleandoc(docstring).splitlines()
    body, numpydoc = _parameter_section(lines)
    texts: dict[str, list[str]] = {}
    names: list[str] = []
    for line in inspect.cleandoc("\n".join(body)).splitlines():
        entry = ENTRY.match(line)
        if entry is not None:
            names = entry[1].split(", ")
            texts |= {name: [] if numpydoc else [entry[2].strip()] for name in names}
        elif line.strip():
            for name in names:
                texts[name].append(line.strip())
    return {name: " ".join(words) for name, words in texts.items()}


def _parameter_section(lines: list[str]) -> tuple[list[str], bool]:
    """Return the lines of the section on parameters, and whether it is in numpydoc form."""
    for number, line in enumerate(lines):
        if line == "Parameters" and lines[number + 1 : number + 2] == ["-" * len(line)]:
            body = lines[number + 2 :]
            ends = (k - 1 for k, text in enumerate(body) if re.fullmatch("-{3,}", text))
            return body[: next(ends, len(body))], True
        if line == "Args:":
            body = lines[number + 1 :]
            ends = (k for k, text in enumerate(body) if text and not text.startswith(" "))
            return ["", *body[: next(ends, len(body))]], False
    return [], True


def _docstrings(factory: Any) -> list[str]:
    """Return the docstrings of a constructor, its own class first, then those of the base classes."""
    inner = factory.func if isinstance(factory, functools.partial) else factory
    sources = inspect.getmro(inner) if inspect.isclass(inner) else [inner]
    return [source.__doc__ for source in sources if source is not object and source.__doc__]


def _first_sentence(registry: Registry[Any], name: str) -> str:
    return _summary(_docstrings(registry.factory(name)))


def _summary(documents: list[str]) -> str:
    """Return the first paragraph of the first docstring as one line."""
    paragraphs = inspect.cleandoc(documents[0]).split("\n\n") if documents else [""]
    return re.sub("::$", ".", " ".join(paragraphs[0].split()))


def _show(default: Any) -> str:
    """Return a default as a YAML file would have it."""
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(str(default), str(default))


def _type_name(kind: Any) -> str:
    return kind.__name__ if inspect.isclass(kind) else str(kind)
