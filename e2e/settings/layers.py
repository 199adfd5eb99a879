"""Settings from defaults, YAML layers and ``section.key=value``, merged and checked."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import omegaconf
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from e2e.errors import UserError
from e2e.registry import Registry, suggest
from e2e.settings.configs import config_folder, config_names, find_config
from e2e.settings.schema import PLAIN, Plugin, Settings, _check

Layer = tuple[str, dict[str, Any]]


DEFAULTS: Layer = (
    "defaults",
    {"sampler": {"name": "random"}, "augment": {"name": "turns"}},
)
"""Below all layers: the plug-ins of a run that names none."""


MOVED = {
    "bag.flip": "augment.flip (turns, mirrors or none)",
    "bag.crop": "augment.crop",
    "run.wandb": "run.track=[wandb] or [wandb-online]",
}


def load_settings(
    *,
    datasets: str,
    model: str,
    files: Sequence[str],
    overrides: Sequence[str],
    registries: Mapping[str, Registry[Any]],
) -> Settings:
    """Merge and check all layers.

    Args:
        datasets, model: names in configs/, or paths of YAML files.
        files: further YAML files, later ones win.
        overrides: ``section.key=value``, strongest of all.
        registries: of the plug-in sections: encoder, head, task, sampler, augment; and ``losses``, of
            which each has a section of its own name.
    """
    heads = registries["head"].names()
    layers = [DEFAULTS, _layer_of("datasets", datasets), _model_layer(model, heads)]
    layers += [_read_yaml(find_config(path)) for path in files]
    layers += [_override_layer(text) for text in overrides]
    return _build(layers, registries, {"datasets": datasets, "model": model})


def load_model_plugins(
    model: str,
    options: Mapping[str, Mapping[str, Any]],
    registries: Mapping[str, Registry[Any]],
) -> dict[str, Plugin]:
    """Return the encoder and the head of a model, without the rest of the settings.

    Parameters
    ----------
    model : str
        As for :func:`load_settings`.
    options : mapping
        Section (``encoder``, ``head``) -> options that replace those of the model.
    registries : mapping
        As for :func:`load_settings`.

    Raises
    ------
    UserError
        There is no such model, encoder or head, or an option is wrong.
    """
    source, tree = _model_layer(model, registries["head"].names())
    plugins = {}
    for section in ("encoder", "head"):
        values = dict(tree.get(section) or {})
        name = values.pop("name", None)
        if name is None:
            raise UserError(f"{source}: setting {section}.name is missing")
        schema = _option_schema(section, registries[section], name)
        node = OmegaConf.structured(schema)
        node = _merge(node, values, schema, section, source)
        node = _merge(node, dict(options.get(section, {})), schema, section, f"model '{model}'")
        plugins[section] = Plugin(name, dataclasses.asdict(_to_object(node)))
    return plugins


def saved_settings(
    run: Path, overrides: Sequence[str], registries: Mapping[str, Registry[Any]]
) -> Settings:
    """The settings of a run folder, as :func:`dump_settings` wrote them, under ``overrides``."""
    if not (run / "settings.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no settings.yaml")
    source, tree = _read_yaml(run / "settings.yaml")
    names = tree.pop("names", None) or {}
    return _build([DEFAULTS, (source, tree), *map(_override_layer, overrides)], registries, names)


def dump_settings(settings: Settings) -> str:
    """The resolved settings as YAML; read back they are the same."""
    tree: dict[str, Any] = {"names": settings.names}
    for section in dataclasses.fields(settings):
        value = getattr(settings, section.name)
        if isinstance(value, Plugin):
            tree[section.name] = {"name": value.name, **value.options}
        elif section.name == "losses":
            tree |= value
        elif section.name != "names":
            tree[section.name] = dataclasses.asdict(value)
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def flatten_settings(settings: Settings) -> dict[str, str]:
    """Dotted name -> value of every setting, as text."""
    flat: dict[str, str] = {}

    def walk(path: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{path}.{key}" if path else str(key), value)
        else:
            flat[path] = str(node)

    walk("", yaml.safe_load(dump_settings(settings)))
    return flat


def _check_together(settings: Settings) -> None:
    """UserError where two sections contradict each other."""
    shares, scales = settings.bag.shares, 1 + len(settings.data.scales)
    need = f"{scales} numbers, for data.stores and each of data.scales"
    if scales == 1:
        need = "empty without data.scales, the stores of other magnifications"
    _check(len(shares) == (scales if scales > 1 else 0), "bag.shares", shares, need)


def _build(
    layers: Sequence[Layer], registries: Mapping[str, Registry[Any]], names: dict[str, str]
) -> Settings:
    losses = registries["losses"]
    registries = {key: value for key, value in registries.items() if key != "losses"}
    known = [*PLAIN, *registries, *losses.names()]
    plugins: dict[str, str] = {}
    for section in registries:
        name = _plugin_name(section, layers)
        if name is None:
            raise UserError(f"setting {section}.name is missing: no layer names the {section}")
        plugins[section] = name
    schema: dict[str, Any] = dict(PLAIN)
    for section, registry in registries.items():
        schema[section] = _option_schema(section, registry, plugins[section])
    schema |= {name: _option_schema(name, losses, name) for name in losses.names()}
    tree: Any = OmegaConf.create({s: OmegaConf.structured(c) for s, c in schema.items()})
    for number, (source, layer) in enumerate(layers):
        for section, values in layer.items():
            if section not in known:
                raise UserError(f"{source}: unknown section '{section}'{suggest(section, known)}")
            if not isinstance(values, dict):
                raise UserError(f"{source}: section '{section}' must hold keys, found {values!r}")
            if section in plugins:
                # Options given for another plug-in than the one named in the end go with it.
                named = _plugin_name(section, layers[: number + 1])
                if named not in (None, plugins[section]):
                    continue
            values = {k: v for k, v in values.items() if k != "name" or section not in plugins}
            tree[section] = _merge(tree[section], values, schema[section], section, source)
    made: dict[str, Any] = {key: _to_object(tree[key]) for key in schema}
    for section in registries:
        made[section] = Plugin(plugins[section], dataclasses.asdict(made[section]))
    made["losses"] = {name: dataclasses.asdict(made.pop(name)) for name in losses.names()}
    settings = Settings(**made, names=names)
    _check_together(settings)
    return settings


def _to_object(node: Any) -> Any:
    """Return the dataclass of a section; UserError where a setting without a default is missing."""
    try:
        return OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        raise UserError(f"setting {error.full_key} is missing, and has no default") from error
    except OmegaConfBaseException as error:
        raise UserError(f"setting {error.full_key}: {str(error.msg).splitlines()[0]}") from error


def _merge(node: Any, values: dict[str, Any], schema: Any, path: str, source: str) -> Any:
    _reject_unknown_keys(values, schema, path, source)
    try:
        return OmegaConf.merge(node, values)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: keys where a list belongs
        key = getattr(error, "full_key", None) or path
        if isinstance(error, TypeError):
            raise UserError(f"{source}: section '{path}': {error}: {values}") from error
        # What it says of an element of a tuple is a form that nobody filled in.
        said = str(error.msg).splitlines()[0] if error.msg else f"cannot take {values}"
        raise UserError(f"{source}: setting {key}: {said}") from error


def _reject_unknown_keys(values: dict[str, Any], schema: Any, path: str, source: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            if f"{path}.{key}" in MOVED:
                raise UserError(f"{source}: {path}.{key} is {MOVED[f'{path}.{key}']} now")
            raise UserError(f"{source}: unknown setting '{path}.{key}'{suggest(str(key), fields)}")
        if fields[key].type in (bool, "bool") and str(value).isdigit():
            raise UserError(
                f"{source}: setting {path}.{key} must be true or false, found {value!r}"
            )
        # OmegaConf lets lists pass where a list of words belongs.
        flat = str(fields[key].type) in ("list[str]", "list[float]")
        if flat and isinstance(value, list) and any(isinstance(v, list | dict) for v in value):
            raise UserError(
                f"{source}: setting {path}.{key} must be a list of single values, found {value!r}"
            )
        nested = fields[key].default_factory
        if dataclasses.is_dataclass(nested) and not isinstance(value, dict):
            raise UserError(f"{source}: setting {path}.{key} must hold keys, found {value!r}")
        if isinstance(value, dict) and dataclasses.is_dataclass(nested):
            _reject_unknown_keys(value, nested, f"{path}.{key}", source)


def _plugin_name(section: str, layers: Sequence[Layer]) -> str | None:
    """The name that the last of ``layers`` to give one gives."""
    for _, layer in reversed(layers):
        values = layer.get(section)
        if isinstance(values, dict) and values.get("name") is not None:
            return str(values["name"])
    return None


def _option_schema(section: str, registry: Registry[Any], name: str) -> Any:
    fields = []
    for option, (kind, default) in registry.options(name).items():
        if default is inspect.Parameter.empty:
            fields.append((option, kind, field(default=omegaconf.MISSING)))
        elif isinstance(default, (list, dict)):
            fields.append((option, kind, field(default_factory=lambda d=default: type(d)(d))))
        else:
            fields.append((option, kind, field(default=default)))

    return dataclasses.make_dataclass(f"{section}_{name}", fields)


def _layer_of(kind: str, name: str) -> Layer:
    is_file = name.endswith((".yaml", ".yml"))
    path = find_config(name) if is_file else config_folder() / kind / f"{name}.yaml"
    if not path.is_file():
        known = config_names(kind)
        raise UserError(
            f"no {kind} '{name}'{suggest(name, known)}\n  or give the path of a YAML file"
        )
    return _read_yaml(path)


def _model_layer(name: str, heads: Sequence[str]) -> Layer:
    """A YAML of configs/models, or the grammar ``e2e_<encoder>_<head>``, or a head for features."""
    if name.endswith((".yaml", ".yml")) or name in config_names("models"):
        return _layer_of("models", name)
    source = f"--model {name}"
    if name in heads:  # all of a slide's features are at hand
        return source, {
            "encoder": {"name": "features"},
            "head": {"name": name},
            "bag": {"patches": None},
        }
    encoder, head = split_model_name(name, heads)
    return source, {"encoder": {"name": encoder}, "head": {"name": head}}


def split_model_name(name: str, heads: Sequence[str] = ()) -> tuple[str, str]:
    """``e2e_r18_clam_sb`` -> (``r18``, ``clam_sb``): cut at the first two underscores."""
    parts = name.split("_", 2)
    if len(parts) != 3 or parts[0] != "e2e" or not all(parts):
        known = [*config_names("models"), *heads]
        raise UserError(
            f"no model '{name}'{suggest(name, known)}\n  or e2e_<encoder>_<head>, such as e2e_r18_abmil;"
            " a head alone is trained on frozen features"
        )
    return parts[1], parts[2]


class _AsTyped(yaml.SafeLoader):
    """YAML whose scalars are the text that was typed, or null: what a text means, the setting's type says.

    YAML itself would make 202401 of the folder 2024_01, and true of the class yes.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (YAML's own name)
        first: [(tag, form) for tag, form in found if tag == "tag:yaml.org,2002:null"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As YAML demands it and PyYAML does not: each key once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if again := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.constructor.ConstructorError(None, None, f"found '{again[0]}' twice")
        return super().construct_mapping(node, deep=deep)


def _typed(text: str) -> Any:
    """Null, a list, keys or a word in quotes as YAML has them; else the text, whatever signs are in it.

    YAML itself would take what follows a # for a comment, and the column #id for null.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return yaml.load(text, _AsTyped)
    return None if text in ("null", "Null", "NULL", "~") else text


def _override_layer(text: str) -> Layer:
    path, equals, typed = text.partition("=")
    section, dot, rest = path.partition(".")
    if not equals or not dot:
        raise UserError(f"'{text}' is no setting; write section.key=value, such as optim.lr=1e-4")
    try:
        value = _typed(typed)
    except yaml.YAMLError as error:
        raise UserError(f"'{text}' cannot be read: {str(error).splitlines()[0]}") from error
    for key in reversed(rest.split(".")):
        value = {key: value}
    return text, {section: value}


def _read_yaml(path: Path) -> Layer:
    if not path.is_file():
        raise UserError(f"no settings file {path}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _AsTyped)
        if isinstance(tree, dict):
            tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable YAML: {str(error)[:300]}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections, found a {type(tree).__name__}")
    return str(path), {str(key): value for key, value in tree.items()}
