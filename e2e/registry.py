"""Names -> constructors. The constructor's keyword-only arguments are the plug-in's options."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from e2e.errors import UserError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown ``name``: the nearest choice and the list of all.

    Parameters
    ----------
    name : str
        What the user wrote.
    choices : iterable of str
        The names that exist.

    Returns
    -------
    str
        ``"; did you mean 'x'?"`` if one of the choices is similar, then a second line with all of them.
    """
    names = sorted(choices)
    return f"{suggest(name, names)}\n  available: {', '.join(names) or 'none'}"


def suggest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the most similar of the names; empty if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


@dataclass(frozen=True)
class Option:
    """One option of a plug-in: a keyword-only argument of its constructor."""

    name: str
    """As in ``section.name=value``."""
    type: str
    """As annotated, such as ``int | None``."""
    default: Any
    """``inspect.Parameter.empty`` if the option is required."""
    text: str
    """Its entry in the docstring's ``Parameters`` section, on one line; empty if there is none."""

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class PluginHelp:
    """What a help page shows of a plug-in."""

    name: str
    summary: str
    """The first sentence of the docstring."""
    options: tuple[Option, ...]
    """In the order of the constructor."""


class Registry(Generic[T]):
    """Plug-ins of one kind (head, encoder, task ...), each registered in the file that defines it.

    Parameters
    ----------
    kind : str
        What the plug-ins are, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}
        self._libraries: list[
            tuple[Callable[[], list[str]], Callable[[str], Callable[..., T]]]
        ] = []

    def register(self, name: str) -> Callable[[F], F]:
        """Return a decorator that registers a class, or a function that builds one, as ``name``.

        Raises
        ------
        ValueError
            The name is taken.
        """

        def add(factory: F) -> F:
            if name in self._factories:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._factories[name] = factory
            return factory

        return add

    def register_library(
        self, names: Callable[[], list[str]], factory: Callable[[str], Callable[..., T]]
    ) -> None:
        """Accept the names of another library too, with or without a tag (``resnet18.a1_in1k``).

        They are not part of :meth:`names`, which lists what is registered one by one.

        Parameters
        ----------
        names : callable
            Returns all names of the library, without tags. Called only for a name that is not registered.
        factory : callable
            Name (with its tag) -> constructor.
        """
        self._libraries.append((names, factory))

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        return sorted(self._factories)

    def library_names(self) -> list[str]:
        """Return the names that other libraries add; see :meth:`register_library`."""
        return [name for names, _ in self._libraries for name in names()]

    def factory(self, name: str) -> Callable[..., T]:
        """Return the constructor registered as ``name``.

        Raises
        ------
        UserError
            There is none; the message has the nearest name.
        """
        if name in self._factories:
            return self._factories[name]
        for names, factory in self._libraries:
            if name.split(".")[0] in names():
                return factory(name)
        others = self.library_names()
        more = f" and {len(others)} names of other libraries" if others else ""
        raise UserError(
            f"unknown {self.kind} '{name}'{suggest(name, [*self.names(), *others])}\n"
            f"  available: {', '.join(self.names()) or 'none'}{more}"
        )

    def plugin_class(self, name: str) -> type[T]:
        """Return the class that :meth:`build` makes an instance of, for its class attributes.

        Of a function that builds the plug-in it is the annotated return type.
        """
        constructor: Any = _unwrap(self.factory(name))
        is_class = isinstance(constructor, type)
        plugin: Any = constructor if is_class else get_type_hints(constructor)["return"]
        return plugin

    def options(self, name: str) -> dict[str, tuple[Any, Any]]:
        """Return option -> (type, default); the default is ``inspect.Parameter.empty`` if required."""
        factory = self.factory(name)
        constructor = _unwrap(factory)
        hints = get_type_hints(
            constructor.__init__ if inspect.isclass(constructor) else constructor
        )
        return {
            p.name: (hints.get(p.name, Any), p.default)
            for p in inspect.signature(factory).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }

    def describe(self, name: str) -> PluginHelp:
        """Return the summary of ``name``, and its options with their types, defaults and documentation.

        The documentation of an option is its entry in the ``Parameters`` section of the class's
        docstring, or of the nearest base class that documents it.
        """
        constructor = _unwrap(self.factory(name))
        classes = inspect.getmro(constructor) if inspect.isclass(constructor) else (constructor,)
        texts: dict[str, str] = {}
        for documented in reversed(classes):
            texts |= parse_parameters(documented.__doc__ or "")
        options = tuple(
            Option(option, inspect.formatannotation(kind), default, texts.get(option, ""))
            for option, (kind, default) in self.options(name).items()
        )
        return PluginHelp(name, _first_paragraph(constructor.__doc__ or ""), options)

    def build(self, name: str, *args: Any, **options: Any) -> T:
        """Return a new plug-in.

        Parameters
        ----------
        name : str
            A registered name, or one of a registered library.
        *args
            The constructor's positional arguments.
        **options
            From the settings.

        Raises
        ------
        UserError
            The name or an option is unknown.
        """
        accepted = self.options(name)
        for option in options.keys() - accepted.keys():
            raise UserError(
                f"{self.kind} '{name}' has no option '{option}'{did_you_mean(option, accepted)}"
            )
        return self.factory(name)(*args, **options)


def import_siblings(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers what it defines.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    path : iterable of str
        Its ``__path__``.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def parse_parameters(docstring: str) -> dict[str, str]:
    """Return parameter -> text of a numpydoc ``Parameters`` section; empty if there is none.

    Parameters
    ----------
    docstring : str
        As in the source: indented or not. An entry such as ``time, event : Tensor`` documents both.

    Returns
    -------
    dict of str to str
        Each text on one line.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines[_section_start(lines, "Parameters") :]:
        if re.fullmatch(
            r"-{3,}", line
        ):  # the underline of the next section, whose title was an entry
            for name in names:
                texts.pop(name, None)
            break
        if line and not line.startswith(" "):
            names = [name.strip().lstrip("*") for name in line.split(" : ")[0].split(",")]
            texts |= dict.fromkeys(names, "")
        else:
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in names}
    return texts


def _section_start(lines: list[str], title: str) -> int:
    """Return the index of the first line below the title's underline; ``len(lines)`` without one."""
    for index in range(len(lines) - 1):
        if lines[index] == title and re.fullmatch(r"-{3,}", lines[index + 1]):
            return index + 2
    return len(lines)


def _first_paragraph(docstring: str) -> str:
    """Return the first paragraph on one line, without the ``::`` that announces a formula."""
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    return " ".join(paragraph.split()).removesuffix("::").rstrip()


def _unwrap(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return the class or function inside a ``functools.partial``."""
    return factory.func if isinstance(factory, functools.partial) else factory
