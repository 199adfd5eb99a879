"""Settings from defaults, YAML layers and ``section.key=value``, merged and checked."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import omegaconf
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from e2e.errors import UserError
from e2e.registry import Registry, did_you_mean
from e2e.settings.configs import config_folder, config_names, find_config, is_shipped
from e2e.settings.paths import resolve_data_paths
from e2e.settings.schema import SECTIONS, Plugin, Settings, require
from e2e.settings.yaml_text import parse_yaml
from e2e.slides import file_name

Layer = tuple[str, dict[str, Any]]
"""Where values come from (for messages), and section -> key -> value."""

DEFAULTS: Layer = (
    "defaults",
    {"sampler": {"name": "random"}, "augment": {"name": "turns"}},
)
"""The lowest layer: the plug-ins of a run that names none."""

MOVED = {
    "bag.flip": "augment.flip (turns, mirrors or none)",
    "bag.crop": "augment.crop",
    "run.wandb": "run.track=[wandb] or [wandb-online]",
}
"""Settings of earlier versions, and what to write instead."""

KINDS_OF_CONFIGS = {"datasets": "cohort", "models": "model"}
"""Folder of configs/ -> what its files describe."""

EXPLANATIONS = {
    r"Value '(.*)' of type '\w+' could not be converted to Float": r"must be a number, found '\1'",
    r"Value '(.*)' of type '\w+' could not be converted to Integer": r"must be a whole number, found '\1'",
    r"Value '(.*)' is not a valid bool": r"must be true or false, found '\1'",
    r"Incompatible value 'None' for field of type": "must have a value, found null",
    r"Invalid value assigned: AnyNode is not a ListConfig": "must be a list, such as [a,b]",
}
"""Pattern of a message of OmegaConf -> the same in the words of this package."""


def load_settings(
    *,
    datasets: str,
    model: str,
    files: Sequence[str],
    overrides: Sequence[str],
    registries: Mapping[str, Registry[Any]],
) -> Settings:
    """Merge all layers into checked settings.

    Parameters
    ----------
    datasets, model
        Names in configs/, or paths of YAML files; ``model`` may also be ``e2e_<encoder>_<head>``, or
        the name of a head, which is then trained on frozen features.
    files
        Further YAML files; later ones win.
    overrides
        ``section.key=value``; they win over all files.
    registries
        Registry of each plug-in section (encoder, head, task, sampler, augment), and ``losses``: each
        of its plug-ins has a section of its own name.

    Raises
    ------
    UserError
        A file or plug-in does not exist, or a setting is unknown, has the wrong type or an invalid value.
    """
    heads = registries["head"].names()
    layers = [DEFAULTS, _config_layer("datasets", datasets), _model_layer(model, heads)]
    layers += [_read_yaml(find_config(path)) for path in files]
    layers += [_override_layer(text) for text in overrides]
    return _merge_layers(layers, registries, {"datasets": datasets, "model": model})


def load_model_plugins(
    model: str,
    options: Mapping[str, Mapping[str, Any]],
    registries: Mapping[str, Registry[Any]],
) -> dict[str, Plugin]:
    """Return the encoder and the head of a model, without the rest of the settings.

    Parameters
    ----------
    model
        As for :func:`load_settings`.
    options
        Section (``encoder``, ``head``) -> options that replace those of the model.
    registries
        As for :func:`load_settings`.

    Raises
    ------
    UserError
        There is no such model, encoder or head, or an option is wrong.
    """
    source, tree = _model_layer(model, registries["head"].names())
    sections = ("encoder", "head")
    layers: list[Layer] = [
        (source, {section: tree[section] for section in sections if section in tree}),
        (f"model '{model}'", {section: dict(options.get(section, {})) for section in sections}),
    ]
    names = {section: _required_plugin_name(section, layers) for section in sections}
    schema = {s: _option_schema(s, registries[s], names[s]) for s in sections}
    values = _to_objects(_merge_trees(layers, schema, names))
    return {s: Plugin(names[s], dataclasses.asdict(values[s])) for s in sections}


def saved_settings(
    run: Path, overrides: Sequence[str], registries: Mapping[str, Registry[Any]]
) -> Settings:
    """Return the settings of the run folder ``run``, changed by ``overrides``."""
    if not (run / "settings.yaml").is_file():
        raise UserError(
            f"{run} is not a run folder: it has no settings.yaml\n"
            "  give the folder that e2e train wrote (run.out)"
        )
    source, tree = _read_yaml(run / "settings.yaml", is_relative=False)
    names = tree.pop("names", None) or {}
    layers = [DEFAULTS, (source, tree), *map(_override_layer, overrides)]
    return _merge_layers(layers, registries, names)


def dump_settings(settings: Settings) -> str:
    """Return the settings as YAML; :func:`saved_settings` reads them back unchanged."""
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
    """Return dotted name -> value, as text, of every setting."""
    return _flatten("", yaml.safe_load(dump_settings(settings)))


def _flatten(path: str, node: Any) -> dict[str, str]:
    if not isinstance(node, dict):
        return {path: str(node)}
    flat: dict[str, str] = {}
    for key, value in node.items():
        flat |= _flatten(f"{path}.{key}" if path else str(key), value)
    return flat


def _merge_layers(
    layers: Sequence[Layer], registries: Mapping[str, Registry[Any]], names: dict[str, str]
) -> Settings:
    regularisers = registries["losses"]
    registries = {key: value for key, value in registries.items() if key != "losses"}
    plugins = {section: _required_plugin_name(section, layers) for section in registries}
    schema: dict[str, Any] = dict(SECTIONS)
    for section, registry in registries.items():
        schema[section] = _option_schema(section, registry, plugins[section])
    for name in regularisers.names():
        schema[name] = _option_schema(name, regularisers, name)
    sections = _to_objects(_merge_trees(layers, schema, plugins))
    for section in registries:
        options = dataclasses.asdict(sections[section])
        sections[section] = Plugin(plugins[section], options)
    losses = {name: dataclasses.asdict(sections.pop(name)) for name in regularisers.names()}
    settings = Settings(**sections, losses=losses, names=names)
    _check_scales(settings)
    return settings


def _check_scales(settings: Settings) -> None:
    """Raise UserError unless ``bag.shares`` has one number for each magnification."""
    shares, num_scales = settings.bag.shares, 1 + len(settings.data.scales)
    if num_scales == 1:
        must_be = "empty without data.scales, the stores of other magnifications"
        require(not shares, "bag.shares", shares, must_be)
    else:
        must_be = f"{num_scales} numbers, for data.stores and each of data.scales"
        require(len(shares) == num_scales, "bag.shares", shares, must_be)


def _merge_trees(
    layers: Sequence[Layer], schema: Mapping[str, Any], plugins: Mapping[str, str]
) -> Any:
    """Merge the layers, later ones over earlier ones, into one OmegaConf tree."""
    tree: Any = OmegaConf.create({key: OmegaConf.structured(cls) for key, cls in schema.items()})
    for number, (source, layer) in enumerate(layers):
        for section, values in layer.items():
            if section not in schema:
                raise UserError(
                    f"{source}: unknown section '{section}'{did_you_mean(section, schema)}"
                )
            if not isinstance(values, dict):
                raise UserError(f"{source}: section '{section}' must hold keys, found {values!r}")
            if section in plugins:
                # Options of another plug-in than the one named by the last layer do not count.
                if _plugin_name(section, layers[: number + 1]) not in (None, plugins[section]):
                    continue
                values = {key: value for key, value in values.items() if key != "name"}
            tree[section] = _merge_section(tree[section], values, schema[section], section, source)
    return tree


def _to_objects(tree: Any) -> dict[str, Any]:
    """Turn the sections of the tree into the dataclasses of their schemas, which check their values."""
    try:
        return {str(section): OmegaConf.to_object(tree[section]) for section in tree}
    except MissingMandatoryValue as error:
        raise UserError(f"setting {error.full_key} is missing and has no default") from error
    except OmegaConfBaseException as error:
        raise UserError(f"setting {error.full_key} {_explain(error)}") from error


def _merge_section(node: Any, values: dict[str, Any], schema: Any, path: str, source: str) -> Any:
    _reject_unknown_keys(values, schema, path, source)
    try:
        return OmegaConf.merge(node, values)
    except TypeError as error:  # keys where a list belongs
        raise UserError(f"{source}: section '{path}': {error}: {values}") from error
    except OmegaConfBaseException as error:
        # For an element of a tuple, OmegaConf has a message template without values.
        reason = _explain(error) if error.msg else f"cannot take {values}"
        raise UserError(f"{source}: setting {error.full_key or path} {reason}") from error


def _explain(error: OmegaConfBaseException) -> str:
    """Return what a setting must be, and what it is."""
    first_line = str(error.msg).splitlines()[0]
    for pattern, explanation in EXPLANATIONS.items():
        if match := re.match(pattern, first_line):
            return match.expand(explanation)
    return f"cannot be used: {first_line}"


def _reject_unknown_keys(values: dict[str, Any], schema: Any, path: str, source: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(schema)}
    for key, value in values.items():
        name = f"{path}.{key}"
        if name in MOVED:
            raise UserError(f"{source}: {name} is now {MOVED[name]}")
        if key not in fields:
            raise UserError(f"{source}: unknown setting '{name}'{did_you_mean(str(key), fields)}")
        if fields[key].type in (bool, "bool") and str(value).isdigit():
            raise UserError(f"{source}: setting {name} must be true or false, found {value!r}")
        # OmegaConf accepts nested lists where single values belong.
        is_flat = str(fields[key].type) in ("list[str]", "list[float]")
        if is_flat and isinstance(value, list) and any(isinstance(v, list | dict) for v in value):
            raise UserError(
                f"{source}: setting {name} must be a list of single values, found {value!r}"
            )
        section = fields[key].default_factory
        if dataclasses.is_dataclass(section):
            if not isinstance(value, dict):
                raise UserError(f"{source}: setting {name} must hold keys, found {value!r}")
            _reject_unknown_keys(value, section, name, source)


def _required_plugin_name(section: str, layers: Sequence[Layer]) -> str:
    name = _plugin_name(section, layers)
    if name is None:
        raise UserError(f"setting {section}.name is missing: no layer names the {section}")
    return name


def _plugin_name(section: str, layers: Sequence[Layer]) -> str | None:
    """Return the plug-in's name in the last layer that has one."""
    for _, layer in reversed(layers):
        values = layer.get(section)
        if isinstance(values, dict) and values.get("name") is not None:
            return str(values["name"])
    return None


def _option_schema(section: str, registry: Registry[Any], name: str) -> Any:
    """Make a dataclass of the options of a plug-in's constructor."""
    fields = []
    for option, (kind, default) in registry.options(name).items():
        if default is inspect.Parameter.empty:
            fields.append((option, kind, field(default=omegaconf.MISSING)))
        elif isinstance(default, (list, dict)):
            fields.append((option, kind, field(default_factory=lambda d=default: type(d)(d))))
        else:
            fields.append((option, kind, field(default=default)))
    return dataclasses.make_dataclass(f"{section}_{name}", fields)


def _config_layer(kind: str, name: str) -> Layer:
    """Read ``name`` of a folder of configs/, or the YAML file that it is the path of."""
    is_file = name.endswith((".yaml", ".yml"))
    path = find_config(name) if is_file else config_folder() / kind / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"unknown {KINDS_OF_CONFIGS[kind]} '{name}'{did_you_mean(name, config_names(kind))}\n"
            "  or give the path of a YAML file"
        )
    return _read_yaml(path)


def _model_layer(name: str, heads: Sequence[str]) -> Layer:
    """Read a YAML of configs/models, or parse ``e2e_<encoder>_<head>`` or the name of a head."""
    if name.endswith((".yaml", ".yml")) or name in config_names("models"):
        return _config_layer("models", name)
    source = f"--model {name}"
    if name in heads:  # on frozen features, where all of a slide's patches are cheap
        return source, {
            "encoder": {"name": "features"},
            "head": {"name": name},
            "bag": {"patches": None},
        }
    encoder, head = split_model_name(name, heads)
    return source, {"encoder": {"name": encoder}, "head": {"name": head}}


def model_title(model: str, settings: Settings, heads: Sequence[str]) -> str:
    """Return a short name of the model that ``settings`` describe, for the run folder.

    This is ``model``, the name or path given with ``--model``, unless other settings replaced its encoder or
    head: then ``e2e_<encoder>_<head>``.
    """
    _, layer = _model_layer(model, heads)
    encoder, head = settings.encoder.name, settings.head.name
    replaced = [
        name
        for section, name in (("encoder", encoder), ("head", head))
        if layer.get(section, {}).get("name", name) != name
    ]
    return file_name(f"e2e_{encoder}_{head}") if replaced else Path(model).stem


def split_model_name(name: str, heads: Sequence[str] = ()) -> tuple[str, str]:
    """Split ``e2e_r18_clam_sb`` into ``r18`` and ``clam_sb``, at the first two underscores.

    Raises
    ------
    UserError
        ``name`` has no such form; the message suggests a name of configs/models or of ``heads``.
    """
    parts = name.split("_", 2)
    if len(parts) != 3 or parts[0] != "e2e" or not all(parts):
        names = [*config_names("models"), *heads]
        raise UserError(
            f"unknown model '{name}'{did_you_mean(name, names)}\n"
            "  or e2e_<encoder>_<head>, such as e2e_r18_abmil; a head alone is trained on frozen features"
        )
    return parts[1], parts[2]


def _parse_value(text: str) -> Any:
    """Parse null, lists, mappings and quoted text as YAML; anything else stays as it is.

    Plain YAML would take what follows a # for a comment, and so the column #id for null.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text)
    return None if text in ("null", "Null", "NULL", "~") else text


def _override_layer(text: str) -> Layer:
    path, equals, value_text = text.partition("=")
    section, dot, rest = path.partition(".")
    if not equals or not dot:
        raise UserError(
            f"'{text}' is not a setting; write section.key=value, such as optim.lr=1e-4"
        )
    try:
        value = _parse_value(value_text)
    except yaml.YAMLError as error:
        raise UserError(f"'{text}' cannot be read: {str(error).splitlines()[0]}") from error
    for key in reversed(rest.split(".")):
        value = {key: value}
    return text, {section: value}


def _read_yaml(path: Path, *, is_relative: bool = True) -> Layer:
    """Read a layer; its paths of data are relative to the file, unless that comes with the package.

    With ``is_relative=False`` they stay as they are, as in the folders of runs of earlier versions.
    """
    if not path.is_file():
        raise UserError(f"no settings file {path}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict):
            tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not readable YAML: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable YAML: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections, found a {type(tree).__name__}")
    layer = {str(key): value for key, value in tree.items()}
    if is_relative and not is_shipped(path):
        layer = resolve_data_paths(layer, path.parent)
    return str(path), layer
