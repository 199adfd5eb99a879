"""The registry: names, options by signature, and messages with the nearest name."""

from __future__ import annotations

import functools
import inspect

import pytest

from e2e.errors import UserError
from e2e.registry import Option, Registry, did_you_mean, parse_parameters


class Engine:
    """Something that moves.

    Parameters
    ----------
    pressure : float
        Documented again below.
    fuel, water : str
        What it consumes.
    """


@pytest.fixture
def registry() -> Registry:
    engines: Registry = Registry("engine")

    @engines.register("steam")
    class Steam(Engine):
        """A steam engine::

            power = pressure * area

        Parameters
        ----------
        wheels : int
            Number of wheels.
        pressure : float
            Pressure of the boiler
            in bar.

        Raises
        ------
        UserError
            The boiler bursts.
        """

        def __init__(self, wheels: int, *, pressure: float = 2.5, fuel: str) -> None:
            self.values = (wheels, pressure, fuel)

    @engines.register("diesel")
    def diesel(*, power: int | None = None) -> int | None:
        return power

    return engines


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


def test_an_unknown_name_gets_the_nearest_name(registry):
    with pytest.raises(UserError) as error:
        registry.build("stem")
    assert str(error.value) == (
        "unknown engine 'stem'; did you mean 'steam'?\n  available: diesel, steam"
    )
    with pytest.raises(UserError) as error:
        registry.build("qqqq")
    assert str(error.value) == "unknown engine 'qqqq'\n  available: diesel, steam"


def test_an_unknown_option_gets_the_nearest_option(registry):
    with pytest.raises(UserError) as error:
        registry.build("steam", 4, presure=1.0)
    assert str(error.value) == (
        "engine 'steam' has no option 'presure'; did you mean 'pressure'?\n  available: fuel, pressure"
    )
    with pytest.raises(UserError, match="no option 'wheels'"):  # positional: not the user's
        registry.build("steam", wheels=4)


def test_the_names_of_another_library_are_accepted_but_not_listed(registry):
    def other(name: str, *, gears: int = 3) -> tuple[str, int]:
        return name, gears

    registry.register_library(
        lambda: ["boat", "plane"], lambda name: functools.partial(other, name)
    )
    assert registry.build("boat.tag", gears=5) == ("boat.tag", 5)
    assert registry.options("boat") == {"gears": (int, 3)}
    assert registry.names() == ["diesel", "steam"]
    with pytest.raises(
        UserError, match=r"did you mean 'plane'\?\n.*and 2 names of other libraries"
    ):
        registry.build("plan")


def test_a_suggestion_is_made_only_when_one_is_near():
    assert did_you_mean("lrr", ["lr", "epochs"]) == "; did you mean 'lr'?\n  available: epochs, lr"
    assert did_you_mean("zzz", ["lr"]) == "\n  available: lr"
    assert did_you_mean("x", []) == "\n  available: none"


def test_the_help_of_a_plugin_has_types_defaults_and_the_text_of_the_docstring(registry):
    described = registry.describe("steam")
    assert described.name == "steam"
    assert described.summary == "A steam engine"
    assert described.options == (
        Option("pressure", "float", 2.5, "Pressure of the boiler in bar."),
        Option("fuel", "str", inspect.Parameter.empty, "What it consumes."),  # of the base class
    )
    assert [option.is_required for option in described.options] == [False, True]
    assert registry.describe("diesel").options == (Option("power", "int | None", None, ""),)
    registry.register("fast")(functools.partial(registry.factory("steam"), pressure=9.0))
    assert registry.describe("fast").options[0] == Option(
        "pressure", "float", 9.0, "Pressure of the boiler in bar."
    )


def test_a_parameters_section_ends_where_the_next_begins():
    docstring = """Do it.

    Parameters
    ----------
    time, event : Tensor
        Of each case.
    *rest
        More.

    Returns
    -------
    Tensor
        Not a parameter.
    """
    assert parse_parameters(docstring) == {
        "time": "Of each case.",
        "event": "Of each case.",
        "rest": "More.",
    }
    assert parse_parameters("Do it.") == {}


def test_the_class_of_a_plugin_is_found_behind_partial_and_function(registry):
    assert registry.plugin_class("steam").__name__ == "Steam"
    registry.register("fast")(functools.partial(registry.factory("steam"), pressure=9.0))
    assert registry.plugin_class("fast") is registry.plugin_class("steam")

    @registry.register("built")
    def built() -> Engine:
        return Engine()

    assert registry.plugin_class("built") is Engine
