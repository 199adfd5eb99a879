"""Names -> constructors. The constructor's keyword-only arguments are the plug-in's options."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, get_type_hints

from e2e.errors import UserError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def suggest(wrong: str, known: Iterable[str]) -> str:
    """The tail of a message: the nearest known name, if one is near, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint}\n  known: {', '.join(names) or 'none'}"


class Registry(Generic[T]):
    """Plug-ins of one kind (head, encoder, task ...), each registered in the file that defines it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}
        self._families: list[tuple[Callable[[], list[str]], Callable[[str], Callable[..., T]]]] = []

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator. Raises ValueError when the name is taken."""

        def add(factory: F) -> F:
            if name in self._factories:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._factories[name] = factory
            return factory

        return add

    def add_family(
        self, names: Callable[[], list[str]], factory: Callable[[str], Callable[..., T]]
    ) -> None:
        """Accept all ``names()`` of another library too (with a ``.tag`` behind them, as timm has).

        They are no part of ``names()``: only what is registered one by one is ours to vouch for.
        """
        self._families.append((names, factory))

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._factories)

    def family_names(self) -> list[str]:
        """Return the names that other libraries add; see :meth:`add_family`."""
        return [name for names, _ in self._families for name in names()]

    def factory(self, name: str) -> Callable[..., T]:
        """The constructor behind ``name``; UserError with the nearest name when unknown."""
        if name in self._factories:
            return self._factories[name]
        for names, factory in self._families:
            if name.split(".")[0] in names():
                return factory(name)
        others = self.family_names()
        near = difflib.get_close_matches(name, [*self.names(), *others], n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        more = f" and {len(others)} names of other libraries" if others else ""
        known = ", ".join(self.names()) or "none"
        raise UserError(f"unknown {self.kind} '{name}'{hint}\n  known: {known}{more}")

    def options(self, name: str) -> dict[str, tuple[Any, Any]]:
        """Option -> (type, default) of ``name``; the default is ``inspect.Parameter.empty`` if required."""
        factory = self.factory(name)
        inner = factory.func if isinstance(factory, functools.partial) else factory
        hints = get_type_hints(inner.__init__ if inspect.isclass(inner) else inner)
        return {
            p.name: (hints.get(p.name, Any), p.default)
            for p in inspect.signature(factory).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }

    def build(self, name: str, *args: Any, **options: Any) -> T:
        """Call the constructor ``name``; ``options`` come from the settings."""
        accepted = self.options(name)
        for option in options.keys() - accepted.keys():
            raise UserError(
                f"{self.kind} '{name}' has no option '{option}'{suggest(option, accepted)}"
            )
        return self.factory(name)(*args, **options)


def import_siblings(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers what it defines."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
