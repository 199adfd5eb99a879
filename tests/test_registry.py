"""The registry: names, options by signature, and messages with the nearest name."""

from __future__ import annotations

import functools
import inspect

import pytest

from e2e.errors import UserError
from e2e.registry import Registry, suggest


@pytest.fixture
def registry() -> Registry:
    made: Registry = Registry("engine")

    @made.register("steam")
    class Steam:
        def __init__(self, wheels: int, *, pressure: float = 2.5, fuel: str) -> None:
            self.values = (wheels, pressure, fuel)

    @made.register("diesel")
    def diesel(*, power: int | None = None) -> int | None:
        return power

    return made


def test_what_is_registered_is_built_with_its_options(registry):
    assert registry.names() == ["diesel", "steam"]
    assert registry.build("steam", 4, fuel="coal").values == (4, 2.5, "coal")
    assert registry.build("diesel", power=7) == 7


def test_options_are_the_keyword_only_arguments(registry):
    assert registry.options("steam") == {
        "pressure": (float, 2.5),
        "fuel": (str, inspect.Parameter.empty),
    }
    assert registry.options("diesel") == {"power": (int | None, None)}


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="engine 'steam' is registered twice"):
        registry.register("steam")(lambda: None)


def test_an_unknown_name_is_told_the_nearest(registry):
    with pytest.raises(UserError) as error:
        registry.build("stem")
    assert str(error.value) == (
        "unknown engine 'stem'; did you mean 'steam'?\n  known: diesel, steam"
    )
    with pytest.raises(UserError) as error:
        registry.build("qqqq")
    assert str(error.value) == "unknown engine 'qqqq'\n  known: diesel, steam"


def test_an_unknown_option_is_told_the_nearest(registry):
    with pytest.raises(UserError) as error:
        registry.build("steam", 4, presure=1.0)
    assert str(error.value) == (
        "engine 'steam' has no option 'presure'; did you mean 'pressure'?\n  known: fuel, pressure"
    )
    with pytest.raises(UserError, match="no option 'wheels'"):  # positional: not the user's
        registry.build("steam", wheels=4)


def test_another_librarys_names_are_accepted_and_not_ours(registry):
    def other(name: str, *, gears: int = 3) -> tuple[str, int]:
        return name, gears

    registry.add_family(lambda: ["boat", "plane"], lambda name: functools.partial(other, name))
    assert registry.build("boat.tag", gears=5) == ("boat.tag", 5)
    assert registry.options("boat") == {"gears": (int, 3)}
    assert registry.names() == ["diesel", "steam"]
    with pytest.raises(
        UserError, match=r"did you mean 'plane'\?\n.*and 2 names of other libraries"
    ):
        registry.build("plan")


def test_a_suggestion_is_made_only_when_one_is_near():
    assert suggest("lrr", ["lr", "epochs"]) == "; did you mean 'lr'?\n  known: epochs, lr"
    assert suggest("zzz", ["lr"]) == "\n  known: lr"
    assert suggest("x", []) == "\n  known: none"
