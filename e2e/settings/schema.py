"""Typed settings: dataclass defaults <- YAML layers <- ``section.key=value``. Owns argv.

A plug-in's section (encoder, head, task) is typed by its constructor: the keyword-only arguments
are the keys. A wrong key, type or value is an error that names the dotted path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from e2e.errors import UserError
from e2e.sizes import parse_bytes


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
    weights: str = setting("auto", "model | ema: which is selected; auto: ema where there is one")
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
