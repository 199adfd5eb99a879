"""The settings of a run: sections as dataclasses, each field with its default, help text and check.

The sections of plug-ins (encoder, head, task, sampler, augment, regularisers) have no class here: the
keyword-only arguments of a plug-in's constructor are its settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from e2e.errors import UserError
from e2e.sizes import parse_bytes


@dataclass(frozen=True)
class Requirement:
    """What a value must be, in words and as a predicate."""

    text: str
    """Completes the sentence "must be ..."."""
    holds: Callable[[Any], bool]


def setting(default: Any, help: str, must_be: Requirement | None = None) -> Any:
    """Return a dataclass field with its help text and the requirement its value must meet."""
    metadata = {"help": help, "must_be": must_be}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(is_valid: bool, path: str, value: object, must_be: str) -> None:
    """Raise UserError for the setting ``path`` unless ``is_valid``."""
    if not is_valid:
        raise UserError(f"setting {path} must be {must_be}, found {value!r}")


def one_of(*names: str) -> Requirement:
    """One of these words."""
    return Requirement(" or ".join(names), lambda value: value in names)


def some_of(*names: str) -> Requirement:
    """A list of any of these words."""
    return Requirement(f"some of {names}", lambda values: set(values) <= set(names))


def at_least(least: int) -> Requirement:
    """A number that is not smaller than ``least``."""
    return Requirement(f"at least {least}", lambda value: value >= least)


def or_null(requirement: Requirement) -> Requirement:
    """What ``requirement`` allows, or null."""
    return Requirement(
        f"{requirement.text} or null", lambda value: value is None or requirement.holds(value)
    )


def size_in_bytes(*words: str) -> Requirement:
    """A size such as 8GiB, or one of ``words``."""
    alternatives = f"{', '.join(words)} or " if words else ""
    return Requirement(
        f"{alternatives}a size such as 8GiB", lambda value: value in words or _is_size(value)
    )


def _is_size(text: str) -> bool:
    try:
        parse_bytes(text)
    except ValueError:
        return False
    return True


POSITIVE = Requirement("greater than 0", lambda value: value > 0)
POSITIVE_FINITE = Requirement("greater than 0 and finite", lambda value: 0 < value < math.inf)
NON_NEGATIVE_FINITE = Requirement("at least 0 and finite", lambda value: 0 <= value < math.inf)
FRACTION = Requirement("in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class Section:
    """Base of the sections; checks every field when one is created.

    Raises
    ------
    UserError
        A value does not meet its requirement; the message names the setting.
    """

    path: ClassVar[str] = ""
    """Dotted name of the section."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            requirement: Requirement | None = item.metadata.get("must_be")
            if requirement is not None:
                value = getattr(self, item.name)
                is_valid = requirement.holds(value)
                require(is_valid, f"{self.path}.{item.name}", value, requirement.text)
        self.check_together()

    def check_together(self) -> None:
        """Check the fields that depend on each other."""


@dataclass(frozen=True)
class Columns(Section):
    """The label table's own names for the columns that every cohort has."""

    path = "data.columns"

    slide: str = setting("slide", "column of the slide id")
    case: str | None = setting(
        "case", "column of the case (patient); null: each row is a case of its own"
    )
    split: str | None = setting("split", "column of the split; null: see data.split_file, data.cut")
    centre: str | None = setting(
        None, "column of the centre, for metrics by centre; null: taken from TCGA barcodes"
    )


@dataclass(frozen=True)
class Cut(Section):
    """Splits drawn from the training cases where the table and the split file have none."""

    path = "data.cut"

    val: float = setting(
        0.0, "fraction of the training cases to draw for validation if there is none", FRACTION
    )
    test: float = setting(
        0.0, "fraction of the training cases to draw for the test if there is none", FRACTION
    )


@dataclass(frozen=True)
class Data(Section):
    """The cohort: its label table, splits, and stores or features."""

    path = "data"

    labels: str = setting("", "label table, .csv or .tsv")
    stores: list[str] = setting([], "patch stores that hold the slides: files, globs or indexes")
    scales: list[list[str]] = setting(
        [], "patch stores of further magnifications, one list for each; see bag.shares"
    )
    features: list[str] = setting(
        [], "frozen features of the slides, for --model <head>: folders, files or globs"
    )
    cache: str = setting(
        "auto",
        "memory for features in each process; auto: half of what is free",
        size_in_bytes("auto"),
    )
    coords: str | None = setting(
        None, "folder of .h5 files with coordinates, for stores that have none"
    )
    columns: Columns = field(default_factory=Columns)
    splits: dict[str, str] = setting(
        {"train": "train", "val": "val", "test": "test"},
        "value in the split column -> train, val or test",
    )
    split_file: str | None = setting(
        None, "file or folder with the splits, instead of the column data.columns.split"
    )
    fold: str | None = setting(None, "fold of data.split_file to use; null: its only one")
    cut: Cut = field(default_factory=Cut)
    slide_suffix: str = setting("", "suffix to remove from the table's slide ids, such as .svs")
    slide_separator: str | None = setting(
        None,
        "separator between the slide ids of a row that names several slides, such as ';'",
        Requirement("null, or a sign such as ';'", lambda value: value != ""),
    )
    match: list[str] = setting(
        [],
        "how ids in tables may differ from those of the data: file_name (folders before the name are"
        " removed), ignore_case",
        Requirement(
            "a list of file_name and ignore_case",
            lambda values: {*values} <= {"file_name", "ignore_case"},
        ),
    )
    unit: str = setting(
        "slide", "what one bag holds: a slide, or all slides of a case", one_of("slide", "case")
    )
    unmatched: str = setting(
        "error",
        "rows without a slide, slides without a row, invalid rows: stop (error), or leave them out (drop)",
        one_of("error", "drop"),
    )
    verify: bool = setting(
        True, "compare each patch with its checksum when a run reads it for the first time"
    )
    decoder: str = setting("auto", "JPEG decoder")
    workers: int | None = setting(
        None, "decoder threads; null: the process's share of the cores", or_null(POSITIVE)
    )
    bgr: bool = setting(
        False, "swap the red and blue channels, as models of the ABMILX project expect"
    )
    source: str = setting("", "where the slides and labels come from (text for messages)")
    pack: str = setting("", "options of `e2e pack` for this cohort (text for messages)")

    def check_together(self) -> None:
        """Check the values of ``splits``, and ``fold`` against ``split_file``."""
        for split in self.splits.values():
            require(split in ("train", "val", "test"), "data.splits", split, "train, val or test")
        require(
            self.fold is None or bool(self.split_file),
            "data.fold",
            self.fold,
            "null where data.split_file names no file",
        )


@dataclass(frozen=True)
class BagSettings(Section):
    """How many patches represent a slide in training; the sampler decides which."""

    path = "bag"

    patches: int | None = setting(
        512, "patches per bag in training; null: all of them", or_null(POSITIVE)
    )
    size: int | None = setting(
        None, "side in pixels to which patches are resized; null: as stored", or_null(POSITIVE)
    )
    shares: list[float] = setting(
        [],
        "parts of a bag taken from data.stores and from each of data.scales; empty: data.stores alone",
        Requirement(
            "greater than 0 and finite",
            lambda values: all(POSITIVE_FINITE.holds(value) for value in values),
        ),
    )
    copies: bool = setting(False, "fill bags that are too small with copies of their own patches")
    shared_crops: int = setting(
        0,
        "number of crop rectangles that the patches of an update share; 0: one for each patch",
        at_least(0),
    )
    rescore: int = setting(
        1, "epochs between two scorings of the patches (sampler.name=attention)", at_least(1)
    )

    def check_together(self) -> None:
        """Check ``copies`` against ``patches``."""
        require(
            not self.copies or self.patches is not None,
            "bag.copies",
            self.copies,
            "false with bag.patches=null, where every bag has all of its patches",
        )


@dataclass(frozen=True)
class Optim(Section):
    """The optimiser and its schedule."""

    path = "optim"

    name: str = setting(
        "adamw",
        "optimiser: adamw | adam (weight decay as L2) | sgd (momentum 0.9, weight decay as L2)",
        one_of("adamw", "adam", "sgd"),
    )
    schedule: str = setting(
        "cosine",
        "learning rate after the warm-up: cosine (down to 0) | constant",
        one_of("cosine", "constant"),
    )
    lr: float = setting(2e-4, "peak learning rate", POSITIVE_FINITE)
    encoder_lr: float | None = setting(
        None,
        "peak learning rate of the encoder's last layer; null: optim.lr",
        Requirement(
            "greater than 0 or null (optim.train_encoder=false freezes the encoder)",
            lambda value: value is None or POSITIVE_FINITE.holds(value),
        ),
    )
    layer_decay: float = setting(
        1.0,
        "layer-wise learning-rate decay factor of the encoder",
        Requirement("in (0, 1]", lambda value: 0 < value <= 1),
    )
    weight_decay: float = setting(
        1e-5, "weight decay, of matrices and convolution kernels only", NON_NEGATIVE_FINITE
    )
    bags: int = setting(8, "bags per update, over all processes", at_least(1))
    epochs: int = setting(100, "passes over the training slides", at_least(1))
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up", NON_NEGATIVE_FINITE)
    clip: float | None = setting(
        1.0, "maximum norm of the gradients; null: no clipping", or_null(POSITIVE)
    )
    ema: float = setting(
        0.9997, "decay of the moving average of the weights, with warm-up; 0: none", FRACTION
    )
    train_encoder: bool = setting(True, "train the encoder; false freezes it")
    balance: bool = setting(False, "draw slides of each class equally often")


@dataclass(frozen=True)
class Engine(Section):
    """How bags pass through the encoder, and on which devices and processes."""

    path = "engine"

    chunk: int = setting(256, "maximum number of patches encoded together", at_least(1))
    keep_graphs: str = setting(
        "auto",
        "memory for chunks that are encoded once, without recomputation: auto | none | all | a size such as "
        "8GiB",
        size_in_bytes("auto", "none", "all"),
    )
    keep: str = setting(
        "jpeg",
        "what is kept of a patch until its second pass: jpeg | uint8 | float | none",
        one_of("jpeg", "uint8", "float", "none"),
    )
    batch_norm: str = setting(
        "auto",
        "BatchNorm statistics: frozen | chunk | sync; auto: frozen with pretrained weights, else chunk",
        one_of("auto", "frozen", "chunk", "sync"),
    )
    fold: bool = setting(True, "fold frozen BatchNorms into their convolutions")
    precision: str = setting(
        "auto",
        "fp32 | tf32 | bf16; auto: bf16 on a GPU that supports it, else fp32",
        one_of("auto", "fp32", "tf32", "bf16"),
    )
    compile: bool = setting(
        False, "torch.compile the encoder for one chunk shape (frozen BatchNorm only)"
    )
    cuda_graphs: bool = setting(
        False,
        "with engine.compile: CUDA graphs for chunks that are encoded twice (not with fsdp or deepspeed)",
    )
    checkpoint_blocks: bool = setting(
        False, "the encoder's own gradient checkpointing inside a chunk (frozen BatchNorm only)"
    )
    verify: bool = setting(False, "compare the features of the two passes over each chunk")
    device: str = setting("auto", "cpu | cuda; auto: the GPU if there is one")
    strategy: str = setting(
        "auto",
        "ddp | fsdp | deepspeed; auto: a single process, or ddp under torchrun",
        one_of("auto", "ddp", "fsdp", "deepspeed"),
    )
    deepspeed: str = setting("configs/deepspeed/zero2.json", "DeepSpeed's configuration file")
    shard: str = setting(
        "auto",
        "bag: shard every bag over all processes; slide: never; auto: bags of more than engine.shard_over "
        "patches",
        one_of("auto", "slide", "bag"),
    )
    shard_over: int = setting(
        4096, "with engine.shard=auto: shard bags of more patches than this", at_least(1)
    )
    max_bad_steps: int = setting(
        10, "stop after this many updates without a finite gradient", at_least(1)
    )
    timeout: float = setting(
        30.0,
        "minutes to wait for another process before it counts as lost",
        Requirement("greater than 0 (minutes)", lambda value: value > 0),
    )

    def check_together(self) -> None:
        """Check ``cuda_graphs`` against ``compile`` and ``strategy``."""
        if not self.cuda_graphs:
            return
        require(self.compile, "engine.cuda_graphs", True, "false, or set engine.compile=true")
        require(
            self.strategy in ("auto", "ddp"),
            "engine.cuda_graphs",
            True,
            f"false with engine.strategy={self.strategy}, which moves the weights in memory",
        )


@dataclass(frozen=True)
class Select(Section):
    """How the epoch is selected, on the validation split alone."""

    path = "select"

    every: int = setting(
        1, "epochs between two validations (the last epoch is always validated)", at_least(1)
    )
    patience: int | None = setting(
        None,
        "stop after this many validations without improvement; null: never",
        or_null(POSITIVE),
    )
    min_epochs: int = setting(0, "never stop before this epoch")
    weights: str = setting(
        "auto",
        "weights that are evaluated: model | ema; auto: ema if optim.ema is greater than 0",
        one_of("auto", "model", "ema"),
    )
    slides: int | None = setting(
        None,
        "validate on this many slides, always the same; null: all",
        or_null(POSITIVE),
    )
    patches: int | None = setting(
        None,
        "validate on this many patches of each slide, always the same; null: all",
        or_null(POSITIVE),
    )
    cache: str = setting(
        "1GiB",
        "memory for decoded validation patches in each process; 0: none",
        size_in_bytes(),
    )


@dataclass(frozen=True)
class Run(Section):
    """The run itself: folder, seed, protocol, what is logged and drawn."""

    path = "run"

    out: str = setting("", "run folder; empty: runs/<datasets>_<model>")
    seed: int = setting(
        0, "random seed", Requirement("a 63-bit integer", lambda value: abs(value) < 2**63)
    )
    protocol: str = setting(
        "honest",
        "honest | as_published: for comparison with published results only: validation joins the test, which "
        "selects the epoch, and the task is fitted to all cases",
        one_of("honest", "as_published"),
    )
    save_every: int = setting(
        0, "updates between two checkpoints within an epoch; 0: only after each epoch", at_least(0)
    )
    bootstrap: int = setting(
        1000, "bootstrap resamples of the cases for the 95 % confidence intervals", at_least(0)
    )
    heatmaps: int | None = setting(
        None, "maximum number of test slides to draw a heatmap of; null: all", or_null(at_least(0))
    )
    track: list[str] = setting(
        [],
        "also log to: tensorboard, wandb (offline: nothing is uploaded), wandb-online",
        some_of("tensorboard", "wandb", "wandb-online"),
    )


@dataclass(frozen=True)
class Plugin:
    """A registered name and the options of its constructor."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Only :mod:`e2e.runs` reads them; everything below takes plain values."""

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
    """The ``--datasets`` and ``--model`` of the command."""


SECTIONS: dict[str, type[Section]] = {
    section.path: section for section in (Data, BagSettings, Optim, Engine, Select, Run)
}
"""The sections that are not options of plug-ins."""
