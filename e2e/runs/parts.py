"""From settings to the parts of a run: cohort, task, model, loader."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import e2e.encoders
import e2e.heads
import e2e.losses
import e2e.tasks  # noqa: F401  (each import registers its plug-ins)
from e2e.bags.cache import PixelCache
from e2e.bags.loader import TrainingLoader, subset_slides
from e2e.bags.readers import FeatureRowReader, PixelRowReader
from e2e.bags.sampler import SAMPLERS
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.cohort.features import describe_features
from e2e.cohort.load import load_cohort
from e2e.cohort.splits import AS_PUBLISHED, HONEST, SplitProtocol
from e2e.cohort.table import Problem
from e2e.encoders.base import ENCODERS
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head
from e2e.images.augment import AUGMENTS
from e2e.images.decode import build_decoder
from e2e.losses.base import REGULARISERS, Regulariser
from e2e.memory import free_memory
from e2e.parallel import autocast_dtype
from e2e.runs.cohort import cohort_spec
from e2e.runs.folder import check_same_features, load_task
from e2e.runs.recipes import PatchKind, find_patch_kinds
from e2e.settings.schema import BagSettings, Data, Engine, Optim, Plugin, Select, Settings
from e2e.sizes import parse_bytes
from e2e.tasks.base import TASKS, Task
from e2e.training.losses import check_losses
from e2e.training.trainer import Schedule

REGISTRIES = {
    "encoder": ENCODERS,
    "head": HEADS,
    "task": TASKS,
    "sampler": SAMPLERS,
    "augment": AUGMENTS,
    "losses": REGULARISERS,
}


PROTOCOLS = {"honest": HONEST, "as_published": AS_PUBLISHED}


def build_task(plugin: Plugin) -> Task:
    """Return the task of the settings, not yet fitted to training slides."""
    return TASKS.build(plugin.name, **plugin.options)


def on_features(settings: Settings) -> bool:
    """Return whether the run reads frozen features (two-stage training) instead of patches."""
    return ENCODERS.plugin_class(settings.encoder.name).input_kind == "features"


def build_model(
    settings: Settings,
    task: Task,
    device: torch.device,
    *,
    trained: bool,
    width: int | None = None,
) -> MILModel:
    """Build encoder and head, initialised from the run's seed.

    Parameters
    ----------
    trained
        Weights will be loaded from a checkpoint, so none are fetched for the encoder.
    width
        Width of the cohort's features; None for patches.

    Raises
    ------
    UserError
        The settings make no model, or contradict each other.
    """
    engine = settings.engine
    options = dict(settings.encoder.options)
    if width is not None:
        if options["dim"] not in (0, width):
            raise UserError(
                f"encoder.dim={options['dim']}, but the features are of width {width}\n"
                "  leave encoder.dim out, or set data.features to features of that width"
            )
        options["dim"] = width
    if trained:
        options |= {k: v for k, v in (("pretrained", False), ("weights", None)) if k in options}
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.run.seed)
        encoder = ENCODERS.build(settings.encoder.name, **options)
        head = build_head(settings.head, encoder.dim, task.num_outputs)
    regularisers = build_regularisers(settings, head, encoder.dim)
    policy = batch_norm_policy(engine.batch_norm, encoder, settings.encoder.options)
    if _has_batch_norm(encoder):
        _check_policy(engine, policy)
    if engine.checkpoint_blocks:
        encoder.checkpoint_blocks()
    model = MILModel(
        encoder,
        head,
        chunk=sys.maxsize if encoder.input_kind == "features" else engine.chunk,
        batch_norm=policy,
        fold=_may_fold(engine),
        train_encoder=settings.optim.train_encoder,
        autocast=autocast_dtype(engine.precision, device),
        keep_graphs=engine.keep_graphs,
        verify=engine.verify,
        regularisers=regularisers,
    )
    if engine.compile and encoder.input_kind == "pixels":
        _check_graphs(engine, device)
        model.compile(cuda_graphs=engine.cuda_graphs)
    return model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _may_fold(engine: Engine) -> bool:
    """Whether frozen BatchNorms may be folded into convolutions, if the settings allow it.

    Not with sharded weights; not where torch.compile fuses by itself, nor where blocks are checkpointed,
    which are encoded again when the folded weights are gone.
    """
    has_whole_weights = engine.strategy in ("auto", "ddp")
    is_eager = not engine.compile and not engine.checkpoint_blocks
    return engine.fold and is_eager and has_whole_weights


def batch_norm_policy(policy: str, encoder: nn.Module, options: Mapping[str, Any]) -> str:
    """Return the BatchNorm policy that ``auto`` stands for; any other is returned as it is.

    Parameters
    ----------
    policy : str
        ``auto``, or a policy of :mod:`e2e.engine.batchnorm`.
    encoder : nn.Module
        The encoder.
    options : mapping
        The options it was built with, which say whether its weights are pretrained.
    """
    if policy != "auto":
        return policy
    is_pretrained = bool(options.get("pretrained") or options.get("weights"))
    return "frozen" if is_pretrained or not _has_batch_norm(encoder) else "chunk"


def _has_batch_norm(encoder: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in encoder.modules())


def build_head(plugin: Plugin, in_dim: int, num_outputs: int) -> Head:
    """Build the head of the settings.

    Raises
    ------
    UserError
        The value of an option is invalid.
    """
    try:
        for name, value in plugin.options.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is not finite")
        return HEADS.build(plugin.name, in_dim, num_outputs, **plugin.options)
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        options = ", ".join(f"{key}={value}" for key, value in plugin.options.items())
        raise UserError(
            f"head '{plugin.name}' cannot be built: {error}\n  its options are {options}"
        ) from error


def build_regularisers(settings: Settings, head: Head, dim: int) -> list[Regulariser]:
    """Build the regularisers with a weight above 0, and check that each fits the head."""
    # All are built, so that an invalid option is reported even where the weight is 0.
    regularisers = [
        REGULARISERS.build(name, **options) for name, options in settings.losses.items()
    ]
    active = [regulariser for regulariser in regularisers if regulariser.weight.peak]
    if active:
        with torch.random.fork_rng([]):
            example = head(torch.zeros(1, 2, dim), torch.ones(1, 2, dtype=torch.bool))
        for regulariser in active:
            regulariser.check(example)
    return active


def _check_graphs(engine: Engine, device: torch.device) -> None:
    """Raise UserError if CUDA graphs are wanted without a CUDA device."""
    if engine.cuda_graphs and device.type != "cuda":
        raise UserError(
            f"engine.cuda_graphs=true needs a CUDA device; this run is on {device.type}\n"
            "  set engine.cuda_graphs=false"
        )


def _check_policy(engine: Engine, policy: str) -> None:
    """Raise UserError if an option of the engine does not work with the BatchNorm policy."""
    for option in ("compile", "checkpoint_blocks"):
        if getattr(engine, option) and policy != "frozen":
            why = {
                "compile": "pads chunks to one shape, and padding would enter the statistics",
                "checkpoint_blocks": "runs BatchNorm a second time, which would move the statistics",
            }[option]
            raise UserError(
                f"engine.{option}=true does not work with engine.batch_norm={policy}: it {why}\n"
                f"  set engine.batch_norm=frozen, or engine.{option}=false"
            )


def build_view(data: Data, bag: BagSettings, device: torch.device, *, features: bool) -> BagSpec:
    """Return how evaluation reads a slide: all of its patches, resized and not augmented, or all features."""
    if features:
        free = free_memory(torch.device("cpu")) / 2
        return BagSpec(
            FeatureRowReader(int(free) if data.cache == "auto" else parse_bytes(data.cache))
        )
    return BagSpec(PixelRowReader(build_decoder(data.decoder, device), bag.size, bgr=data.bgr))


def build_loader(
    settings: Settings,
    items: Sequence[LabelledSlide],
    view: BagSpec,
    *,
    model: MILModel,
    task: Task,
) -> TrainingLoader:
    """Return the loader of the training slides; ``view`` is how evaluation reads them."""
    engine, bag = settings.engine, settings.bag
    augment = AUGMENTS.build(settings.augment.name, bag.size, **settings.augment.options)
    keep = None if engine.keep == "none" else engine.keep
    return TrainingLoader(
        items=items,
        spec=BagSpec(
            view.reader.for_training(augment, keep),
            seed=settings.run.seed,
            bag_size=bag.patches,
            sampler=SAMPLERS.build(settings.sampler.name, **settings.sampler.options),
            shares=tuple(bag.shares),
            fill_with_copies=bag.copies,
            shared_crops=bag.shared_crops,
        ),
        bags=settings.optim.bags,
        chunk=engine.chunk,
        shard_over={"slide": None, "bag": 0, "auto": engine.shard_over}[engine.shard],
        fixed_size_chunks=engine.compile,
        single_chunk_per_rank=model.batch_norm.single_chunk,
        single_chunk_per_bag=model.encoder.input_kind == "features",
        groups=[task.group(item.target) for item in items] if settings.optim.balance else None,
    )


def build_validation(
    settings: Settings, items: Sequence[LabelledSlide], view: BagSpec, task: Task
) -> tuple[list[LabelledSlide], BagSpec]:
    """Return the slides to validate on after an epoch, and how they are read."""
    select, seed = settings.select, settings.run.seed
    cache = None
    if view.reader.input_kind == "pixels":
        cache = PixelCache(parse_bytes(select.cache))
    subset = subset_slides(items, select.slides, group=task.group, seed=seed)
    return subset, replace(view, seed=seed, bag_size=select.patches, cache=cache)


def selected_weights(optim: Optim, select: Select) -> str:
    """Return which weights are evaluated and select the epoch: ``model`` or ``ema``."""
    selected = select.weights
    if selected == "auto":
        selected = "ema" if optim.ema else "model"
    if selected == "ema" and not optim.ema:
        raise UserError(
            "select.weights=ema needs a moving average of the weights, but optim.ema=0\n"
            "  set optim.ema=0.9997, or select.weights=model"
        )
    return selected


def build_schedule(
    optim: Optim, select: Select, *, save_every: int, max_bad_steps: int, rescore: int
) -> Schedule:
    """Return what the trainer needs of the settings."""
    return Schedule(
        lr=optim.lr,
        encoder_lr=optim.encoder_lr,
        layer_decay=optim.layer_decay,
        optimizer=optim.name,
        schedule=optim.schedule,
        weight_decay=optim.weight_decay,
        epochs=optim.epochs,
        warmup_epochs=optim.warmup_epochs,
        clip=optim.clip,
        ema=optim.ema,
        validate_every=select.every,
        patience=select.patience,
        min_epochs=select.min_epochs,
        selected_weights=selected_weights(optim, select),
        save_every=save_every,
        max_bad_steps=max_bad_steps,
        rescore=rescore,
    )


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before a strategy wraps the model."""

    task: Task
    items: list[LabelledSlide]
    view: BagSpec
    """How evaluation reads a slide: all of its patches, or features."""
    model: MILModel
    problems: list[Problem]
    """Rows and slides of the cohort that were left out."""
    features: dict[str, Any] | None
    """Which features the run uses, in the two-stage mode; see :func:`describe_features`."""

    @cached_property
    def patch_kinds(self) -> list[PatchKind]:
        """The kinds of patches that the slides have; empty for features."""
        return [] if self.features is not None else find_patch_kinds(self.items)

    def of_split(self, split: str) -> list[LabelledSlide]:
        """The slides of one split."""
        return [item for item in self.items if item.slide.split == split]


def prepare(
    settings: Settings,
    device: torch.device,
    *,
    run: Path | None,
    problems_file: Path | None,
    protocol: SplitProtocol | None = None,
) -> Parts:
    """Load the cohort, fit the task and build the model.

    Parameters
    ----------
    run
        Folder of a trained run, from which the fitted task is read and whose weights will be loaded, so
        that no pretrained ones are fetched; None for a new run.
    problems_file
        Where unusable rows are listed; None on ranks other than the leader.
    protocol
        What the splits are used for; None for the run's own.
    """
    plugin = settings.task
    task = build_task(plugin) if run is None else load_task(plugin.name, plugin.options, run)
    two_stage = on_features(settings)
    items, problems = load_slides(
        settings,
        task,
        features=two_stage,
        problems_file=problems_file,
        protocol=protocol or PROTOCOLS[settings.run.protocol],
    )
    if run is None:
        fit_task(settings, task, items)
    features = describe_features(items) if two_stage else None
    if features and run is not None:
        check_same_features(features, run)
    return make_parts(
        settings, task, items, device, trained=run is not None, problems=problems, features=features
    )


def load_slides(
    settings: Settings,
    task: Task,
    *,
    features: bool,
    problems_file: Path | None,
    protocol: SplitProtocol,
) -> tuple[list[LabelledSlide], list[Problem]]:
    """Load the cohort of the settings; see :func:`e2e.cohort.load.load_cohort`.

    Raises
    ------
    UserError
        See there; or an update has too few bags for the loss of the task.
    """
    if task.loss_couples_bags and settings.optim.bags < 2:
        raise UserError(
            "the task's loss compares the bags of an update: optim.bags must be 2 or more, found 1"
        )
    return load_cohort(
        cohort_spec(settings.data, name=settings.names.get("datasets", "")),
        task,
        seed=settings.run.seed,
        size=settings.bag.size,
        problems_file=problems_file,
        features=features,
        protocol=protocol,
    )


def fit_task(settings: Settings, task: Task, items: Sequence[LabelledSlide]) -> None:
    """Fit the task to the slides of the splits that the run's protocol names."""
    splits = PROTOCOLS[settings.run.protocol].fit_splits
    slides = [item for item in items if item.slide.split in splits]
    task.fit([item.target for item in slides], [item.slide.case for item in slides])


def make_parts(
    settings: Settings,
    task: Task,
    items: list[LabelledSlide],
    device: torch.device,
    *,
    trained: bool,
    problems: list[Problem],
    features: dict[str, Any] | None,
) -> Parts:
    """Build the model and decide how it reads the slides.

    Parameters
    ----------
    trained
        Weights will be loaded, so none are fetched.
    problems
        Rows and slides of the cohort that were left out.
    features
        See :func:`e2e.cohort.features.describe_features`; None for patches.

    Raises
    ------
    UserError
        The settings make no model, or the head needs coordinates that a slide does not have.
    """
    view = build_view(settings.data, settings.bag, device, features=features is not None)
    width = features["width"] if features else None
    model = build_model(settings, task, device, trained=trained, width=width)
    for item in items if model.head.needs_coords else []:
        view.check_coords(item)
    return Parts(task, items, view, model, problems, features)


def check_training(settings: Settings, parts: Parts, device: torch.device, world_size: int) -> None:
    """Raise UserError for everything that can be found before the first update and would stop training."""
    selected_weights(settings.optim, settings.select)
    train, model = parts.of_split("train"), parts.model
    loader = build_loader(settings, train, parts.view, model=model, task=parts.task)
    loader.check(world_size, settings.optim.epochs)
    if any(regulariser.needs_coords for regulariser in model.regularisers):
        for item in train:
            parts.view.check_coords(item)
    check_losses(model, parts.task, train[0].target, device)
