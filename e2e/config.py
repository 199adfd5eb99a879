"""Typed settings: dataclass defaults <- YAML layers <- ``section.key=value``. Owns argv.

A plug-in's section (encoder, head, task) is typed by its constructor: the keyword-only arguments
are the keys. A wrong key, type or value is an error that names the dotted path.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import omegaconf
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from e2e.errors import UserError
from e2e.memory import parse_bytes
from e2e.registry import Registry, suggest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its one-line description, which ``--help`` prints."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _check(ok: bool, path: str, found: object, need: str) -> None:
    if not ok:
        raise UserError(f"setting {path} must be {need}, found {found!r}")


def _check_bytes(path: str, found: str, others: str = "") -> None:
    try:
        parse_bytes(found)
    except ValueError:
        _check(False, path, found, f"{others}a size such as 8GiB")


@dataclass(frozen=True)
class Columns:
    """The label table's own names for what every cohort has."""

    slide: str = setting("slide", "column of the slide id")
    case: str | None = setting("case", "column of the case (patient); null: each row is a case")
    split: str | None = setting("split", "column of the split; null: see data.cut")
    centre: str | None = setting(
        None, "column of the centre, for results centre by centre; null: that of TCGA barcodes"
    )


@dataclass(frozen=True)
class Cut:
    """Splits cut from the training cases where table and split file have none."""

    val: float = setting(0.0, "share of the training cases for validation, where there is none")
    test: float = setting(0.0, "share of the training cases for the test, where there is none")

    def __post_init__(self) -> None:
        for name in ("val", "test"):
            share = getattr(self, name)
            _check(0 <= share < 1, f"data.cut.{name}", share, "in [0, 1)")


@dataclass(frozen=True)
class Data:
    """The cohort: its table and stores."""

    labels: str = setting("", "label table, .csv or .tsv")
    stores: list[str] = setting([], "patch stores that hold the slides; files or globs")
    scales: list[list[str]] = setting(
        [], "patch stores of further magnifications, a list each; see bag.shares"
    )
    features: list[str] = setting(
        [], "frozen features of the slides, for --model <head>: folders, files or globs"
    )
    cache: str = setting("auto", "memory for features, each rank; auto: half of what is free")
    coords: str | None = setting(None, "folder of h5 coords, for stores that have none themselves")
    columns: Columns = field(default_factory=Columns)
    splits: dict[str, str] = setting(
        {"train": "train", "val": "val", "test": "test"}, "the table's word -> train, val or test"
    )
    split_file: str | None = setting(
        None, "splits of their own file, or a folder of such; in place of data.columns.split"
    )
    fold: str | None = setting(None, "the fold of data.split_file; null: its only one")
    cut: Cut = field(default_factory=Cut)
    slide_suffix: str = setting("", "taken off the end of the table's slide ids")
    slide_separator: str | None = setting(
        None, "between the slide ids of a row that names several slides, such as ';'"
    )
    unit: str = setting("slide", "what a bag holds: a slide, or all slides of a case")
    unmatched: str = setting("error", "slides on one side only, bad rows: error, or drop and list")
    decoder: str = setting("auto", "JPEG decoder")
    workers: int | None = setting(None, "threads that decode; null: a rank's share of the cores")
    bgr: bool = setting(False, "blue and red swapped, as the ABMILX project's models saw them")
    source: str = setting("", "where the slides and labels come from (text, for messages)")
    pack: str = setting("", "options of tools/pack_lmdb.py for this cohort (text, for messages)")

    def __post_init__(self) -> None:
        _check(
            self.unmatched in ("error", "drop"), "data.unmatched", self.unmatched, "error or drop"
        )
        _check(
            self.slide_separator != "", "data.slide_separator", "", "null, or a sign such as ';'"
        )
        _check(self.unit in ("slide", "case"), "data.unit", self.unit, "slide or case")
        for word in self.splits.values():
            _check(word in ("train", "val", "test"), "data.splits", word, "train, val or test")
        _check(
            self.fold is None or bool(self.split_file),
            "data.fold",
            self.fold,
            "null where data.split_file names no file",
        )
        if self.cache != "auto":
            _check_bytes("data.cache", self.cache, "auto or ")
        _check(
            self.workers is None or self.workers > 0, "data.workers", self.workers, "over 0 or null"
        )


@dataclass(frozen=True)
class BagSettings:
    """How many patches stand for a slide in training; the sampler says which."""

    patches: int | None = setting(512, "patches a bag in training; null: all")
    size: int | None = setting(None, "side in pixels the encoder sees; null: as stored")
    shares: list[float] = setting(
        [], "parts of a bag from data.stores and each of data.scales; empty: data.stores alone"
    )
    copies: bool = setting(False, "fill short bags up with copies of their own patches")
    shared_crops: int = setting(
        0, "crop rectangles an update shares on a rank; 0: each patch its own"
    )
    rescore: int = setting(1, "sampler=attention: score the patches anew every so many epochs")

    def __post_init__(self) -> None:
        _check(
            self.patches is None or self.patches > 0, "bag.patches", self.patches, "over 0 or null"
        )
        _check(self.size is None or self.size > 0, "bag.size", self.size, "over 0 or null")
        for share in self.shares:
            _check(0 < share < math.inf, "bag.shares", self.shares, "over 0 and finite")
        _check(self.shared_crops >= 0, "bag.shared_crops", self.shared_crops, "at least 0")
        _check(self.rescore > 0, "bag.rescore", self.rescore, "at least 1")
        _check(
            not self.copies or self.patches is not None,
            "bag.copies",
            self.copies,
            "false where bag.patches is null: all patches make no bag short",
        )


@dataclass(frozen=True)
class Optim:
    """One step of the optimiser an update."""

    name: str = setting(
        "adamw", "adamw | adam (decay in the gradient: L2) | sgd (momentum 0.9, L2)"
    )
    schedule: str = setting("cosine", "of the rate after the warm-up: cosine (to 0) | constant")
    lr: float = setting(2e-4, "peak learning rate of the head, and of the encoder")
    encoder_lr: float | None = setting(None, "of the encoder's last layer; null: optim.lr")
    layer_decay: float = setting(1.0, "each layer of the encoder learns at this of the one above")
    weight_decay: float = setting(1e-5, "of matrices and kernels only")
    bags: int = setting(8, "slides an update, over all ranks")
    epochs: int = setting(100, "passes over the training slides")
    warmup_epochs: float = setting(0.0, "linear warm-up, counted in updates")
    clip: float | None = setting(1.0, "largest norm of all gradients; null: none")
    ema: float = setting(0.9997, "decay of the averaged weights (it warms up); 0: none")
    train_encoder: bool = setting(True, "false leaves the encoder as it is")
    balance: bool = setting(False, "draw slides of each label equally often")

    def __post_init__(self) -> None:
        names, schedules = ("adamw", "adam", "sgd"), ("cosine", "constant")
        _check(self.name in names, "optim.name", self.name, " or ".join(names))
        _check(self.schedule in schedules, "optim.schedule", self.schedule, " or ".join(schedules))
        _check(0 < self.lr < math.inf, "optim.lr", self.lr, "over 0 and finite")
        _check(
            self.encoder_lr is None or 0 < self.encoder_lr < math.inf,
            "optim.encoder_lr",
            self.encoder_lr,
            "over 0 or null (optim.train_encoder=false leaves the encoder as it is)",
        )
        _check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in (0, 1]")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            _check(0 <= value < math.inf, f"optim.{name}", value, "at least 0 and finite")
        _check(self.bags > 0, "optim.bags", self.bags, "at least 1")
        _check(self.epochs > 0, "optim.epochs", self.epochs, "at least 1")
        _check(self.clip is None or self.clip > 0, "optim.clip", self.clip, "over 0 or null")
        _check(0 <= self.ema < 1, "optim.ema", self.ema, "in [0, 1)")


@dataclass(frozen=True)
class Engine:
    """How a bag goes through the encoder, and over how many processes."""

    chunk: int = setting(256, "most patches encoded at once")
    keep_graphs: str = setting(
        "auto", "memory for chunks encoded but once: auto | none | all | a size such as 8GiB"
    )
    keep: str = setting(
        "jpeg", "what of a patch waits for its second pass: jpeg | uint8 | float | none"
    )
    batch_norm: str = setting(
        "auto", "frozen | chunk | sync; auto: frozen with pretrained weights, else chunk"
    )
    fold: bool = setting(True, "put frozen BatchNorms into their convolutions")
    precision: str = setting("auto", "fp32 | tf32 | bf16; auto: the fastest the GPU has, else fp32")
    compile: bool = setting(False, "compile the encoder for chunks of one shape (frozen BatchNorm)")
    cuda_graphs: bool = setting(
        False,
        "with compile: replay CUDA graphs for chunks encoded twice (not under fsdp, deepspeed)",
    )
    checkpoint_blocks: bool = setting(
        False, "the encoder's own gradient checkpointing inside a chunk (frozen BatchNorm)"
    )
    verify: bool = setting(False, "compare the features of the two passes over a chunk")
    device: str = setting("auto", "cpu | cuda; auto: the GPU if there is one")
    strategy: str = setting("auto", "ddp | fsdp | deepspeed; auto: one process, or ddp on many")
    deepspeed: str = setting("configs/deepspeed/zero2.json", "DeepSpeed's own settings")
    shard: str = setting(
        "auto", "bag: every large bag over all ranks; slide: none; auto: shard_over"
    )
    shard_over: int = setting(4096, "shard=auto: bags of more patches go over all ranks")
    max_bad_steps: int = setting(10, "stop after so many steps without a finite gradient")
    timeout: float = setting(30.0, "minutes to wait for another rank")

    def __post_init__(self) -> None:
        _check(self.chunk > 0, "engine.chunk", self.chunk, "at least 1")
        _check(self.shard_over > 0, "engine.shard_over", self.shard_over, "at least 1")
        _check(self.max_bad_steps > 0, "engine.max_bad_steps", self.max_bad_steps, "at least 1")
        _check(self.timeout > 0, "engine.timeout", self.timeout, "over 0 (minutes)")
        for name, known in (
            ("keep", ("jpeg", "uint8", "float", "none")),
            ("batch_norm", ("auto", "frozen", "chunk", "sync")),
            ("precision", ("auto", "fp32", "tf32", "bf16")),
            ("strategy", ("auto", "ddp", "fsdp", "deepspeed")),
            ("shard", ("auto", "slide", "bag")),
        ):
            value = getattr(self, name)
            _check(value in known, f"engine.{name}", value, " or ".join(known))
        if self.cuda_graphs:
            _check(
                self.compile, "engine.cuda_graphs", True, "false, or engine.compile=true with it"
            )
            _check(
                self.strategy in ("auto", "ddp"),
                "engine.cuda_graphs",
                True,
                f"false with engine.strategy={self.strategy}, whose weights move in memory",
            )
        if self.keep_graphs not in ("auto", "none", "all"):
            _check_bytes("engine.keep_graphs", self.keep_graphs, "auto, none, all or ")


@dataclass(frozen=True)
class Select:
    """Which epoch is kept; decided on the validation split alone."""

    every: int = setting(1, "validate every so many epochs (and after the last)")
    patience: int | None = setting(None, "stop after so many validations without a better one")
    min_epochs: int = setting(0, "never stop before this epoch")
    weights: str = setting("auto", "model | ema: which is judged; auto: ema where there is one")
    slides: int | None = setting(None, "validate on so many slides, always the same; null: all")
    patches: int | None = setting(None, "validate on so many patches a slide, always the same")
    cache: str = setting("1GiB", "memory for decoded patches of validation, each rank; 0: none")

    def __post_init__(self) -> None:
        _check(self.every > 0, "select.every", self.every, "at least 1")
        for name in ("patience", "slides", "patches"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"select.{name}", value, "over 0 or null")
        _check_bytes("select.cache", self.cache)
        known = ("auto", "model", "ema")
        _check(self.weights in known, "select.weights", self.weights, " or ".join(known))


@dataclass(frozen=True)
class Run:
    """The run itself."""

    out: str = setting("", "run folder; empty: runs/<datasets>_<model>")
    seed: int = setting(0, "of everything random")
    protocol: str = setting(
        "honest",
        "as_published: validation joins the test, which chooses the epoch, and the task is fitted to all "
        "cases; for comparison",
    )
    save_every: int = setting(0, "also save every so many updates within an epoch; 0: no")
    bootstrap: int = setting(1000, "resamples of the cases for the 95 % intervals")
    heatmaps: int | None = setting(None, "draw at most so many test slides; null: all")
    track: list[str] = setting(
        [], "also log to: tensorboard, wandb (its files, sent by nobody), wandb-online"
    )

    def __post_init__(self) -> None:
        known = ("tensorboard", "wandb", "wandb-online")
        _check(abs(self.seed) < 2**63, "run.seed", self.seed, "of 63 bits")
        _check(self.save_every >= 0, "run.save_every", self.save_every, "at least 0")
        _check(self.bootstrap >= 0, "run.bootstrap", self.bootstrap, "at least 0")
        _check(
            self.heatmaps is None or self.heatmaps >= 0,
            "run.heatmaps",
            self.heatmaps,
            "at least 0 or null",
        )
        _check(set(self.track) <= set(known), "run.track", self.track, f"some of {known}")
        ways = ("honest", "as_published")
        _check(self.protocol in ways, "run.protocol", self.protocol, " or ".join(ways))


@dataclass(frozen=True)
class Plugin:
    """A registered name and its constructor's options."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """All settings of a run; each part is handed to the code that uses it."""

    data: Data
    bag: BagSettings
    sampler: Plugin
    augment: Plugin
    encoder: Plugin
    head: Plugin
    task: Plugin
    losses: dict[str, dict[str, Any]]
    """Regulariser -> its options; each has a section of its own name."""
    optim: Optim
    engine: Engine
    select: Select
    run: Run
    names: dict[str, str]
    """What was asked for: datasets and model."""


PLAIN = {
    "data": Data,
    "bag": BagSettings,
    "optim": Optim,
    "engine": Engine,
    "select": Select,
    "run": Run,
}
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

    for section, cls in PLAIN.items():
        walk(section, cls)
    return "\n".join(lines)


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
    layers += [_read_yaml(Path(path)) for path in files]
    layers += [_override_layer(text) for text in overrides]
    return _build(layers, registries, {"datasets": datasets, "model": model})


def saved_settings(
    run: Path, overrides: Sequence[str], registries: Mapping[str, Registry[Any]]
) -> Settings:
    """The settings of a run folder, as :func:`dump_settings` wrote them, under ``overrides``."""
    if not (run / "settings.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no settings.yaml")
    source, tree = _read_yaml(run / "settings.yaml")
    names = tree.pop("names", None) or {}
    return _build([DEFAULTS, (source, tree), *map(_override_layer, overrides)], registries, names)


def settings_of(
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


def flat_settings(settings: Settings) -> dict[str, str]:
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
    try:
        made: dict[str, Any] = {key: OmegaConf.to_object(tree[key]) for key in schema}
    except MissingMandatoryValue as error:
        raise UserError(f"setting {error.full_key} is missing, and has no default") from error
    except OmegaConfBaseException as error:
        raise UserError(f"setting {error.full_key}: {str(error.msg).splitlines()[0]}") from error
    for section in registries:
        made[section] = Plugin(plugins[section], dataclasses.asdict(made[section]))
    made["losses"] = {name: dataclasses.asdict(made.pop(name)) for name in losses.names()}
    settings = Settings(**made, names=names)
    _check_together(settings)
    return settings


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
    folder = CONFIGS / kind
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = [p.stem for p in folder.glob("*.yaml")]
        raise UserError(
            f"no {kind} '{name}'{suggest(name, known)}\n  or give the path of a YAML file"
        )
    return _read_yaml(path)


def _model_layer(name: str, heads: Sequence[str]) -> Layer:
    """A YAML of configs/models, or the grammar ``e2e_<encoder>_<head>``, or a head for features."""
    if name.endswith((".yaml", ".yml")) or (CONFIGS / "models" / f"{name}.yaml").is_file():
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
        known = [*(p.stem for p in (CONFIGS / "models").glob("*.yaml")), *heads]
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
