"""From settings to parts: the one place where a section becomes the objects it describes."""

from __future__ import annotations

import glob
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import e2e.encoders
import e2e.heads
import e2e.losses
import e2e.tasks  # noqa: F401  (each import registers its plug-ins)
from e2e.config import CONFIGS, BagSettings, Cut, Data, Engine, Optim, Plugin, Select, Settings
from e2e.data.augment import AUGMENTS
from e2e.data.cases import by_case, check_single
from e2e.data.cluster import read_index
from e2e.data.cohort import (
    Problem,
    Slide,
    check_sides,
    match_scales,
    match_stores,
    read_table,
    write_problems,
)
from e2e.data.decode import build_decoder, decoder_threads
from e2e.data.feature_rows import FeatureCache
from e2e.data.features import FeatureStore, common_width, made_by, may_be_same, open_features
from e2e.data.loader import LabelledSlide, TrainingLoader, View, label_slides, some_slides
from e2e.data.pixels import Look, PixelCache
from e2e.data.sampler import SAMPLERS
from e2e.data.seed_lmdb import open_store
from e2e.data.split_files import Folds, names_cases, pick_fold, read_splits
from e2e.data.splits import (
    HONEST,
    Protocol,
    assign,
    check_cases,
    check_copies,
    check_splits,
    cut,
    missing_classes,
)
from e2e.data.store import Store
from e2e.encoders.base import ENCODERS
from e2e.errors import DamagedDataError, UserError, listing
from e2e.files import write_atomically
from e2e.heads.base import HEADS, Head
from e2e.log import Screen
from e2e.losses.base import REGULARISERS, Regulariser
from e2e.memory import free_memory, parse_bytes
from e2e.model import MILModel
from e2e.parallel import Strategy, autocast_dtype, float32_precision
from e2e.parallel import build_strategy as named_strategy
from e2e.tasks.base import TASKS, Task
from e2e.trainer import Schedule

TASK = "task.json"
"""In a run's folder: what its task took from the training slides."""

REGISTRIES = {
    "encoder": ENCODERS,
    "head": HEADS,
    "task": TASKS,
    "sampler": SAMPLERS,
    "augment": AUGMENTS,
    "losses": REGULARISERS,
}


def build_task(plugin: Plugin) -> Task:
    """The task of the settings, which has seen no training slides yet."""
    return TASKS.build(plugin.name, **plugin.options)


def load_task(plugin: Plugin, run: Path) -> Task:
    """The task of a run folder, with what it took from the training slides.

    Raises:
        UserError: the folder has no task.json, or that of another task.
    """
    task, file = build_task(plugin), run / TASK
    if not file.is_file():
        raise UserError(
            f"{run} has no {TASK}, which holds what its task took from the training slides\n"
            "  start the run anew"
        )
    try:
        task.load_state(json.loads(file.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not fit the task '{plugin.name}' of the settings: {error}\n"
            "  leave its options as the run has them"
        ) from error
    return task


def on_features(settings: Settings) -> bool:
    """Whether the run reads frozen features (the two-stage mode), and not patches."""
    return bool(getattr(ENCODERS.factory(settings.encoder.name), "given", False))


def build_model(
    settings: Settings,
    task: Task,
    device: torch.device,
    *,
    trained: bool,
    width: int | None = None,
) -> MILModel:
    """Encoder and head, initialised from the run's seed.

    Args:
        width: of the cohort's features; None for patches.
        trained: weights will be loaded from a checkpoint, so none are fetched for the encoder.
    """
    engine = settings.engine
    options = dict(settings.encoder.options)
    pretrained = bool(options.get("pretrained") or options.get("weights"))
    if width is not None:
        if options["dim"] not in (0, width):
            raise UserError(
                f"encoder.dim={options['dim']}, but the features are of width {width}\n"
                "  leave encoder.dim out, or set data.features to those of the encoder meant"
            )
        options["dim"] = width
    if trained:
        options |= {k: v for k, v in (("pretrained", False), ("weights", None)) if k in options}
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.run.seed)
        encoder = ENCODERS.build(settings.encoder.name, **options)
        head = build_head(settings.head, encoder.dim, task.num_outputs)
    regularisers = build_regularisers(settings, head, encoder.dim)
    policy = engine.batch_norm
    has_norms = any(isinstance(module, _BatchNorm) for module in encoder.modules())
    if policy == "auto":
        policy = "frozen" if pretrained or not has_norms else "chunk"
    if has_norms:
        _check_policy(engine, policy)
    if engine.checkpoint_blocks:
        encoder.checkpoint_blocks()
    model = MILModel(
        encoder,
        head,
        chunk=sys.maxsize if encoder.given else engine.chunk,
        batch_norm=policy,
        # Not where weights may lie in pieces; a compiled encoder fuses by itself; blocks that are
        # checkpointed are encoded again when the folded weights are gone.
        fold=engine.fold
        and not engine.compile
        and not engine.checkpoint_blocks
        and engine.strategy in ("auto", "ddp"),
        train_encoder=settings.optim.train_encoder,
        autocast=autocast_dtype(engine.precision, device),
        keep_graphs=engine.keep_graphs,
        verify=engine.verify,
        regularisers=regularisers,
    )
    if engine.compile and not encoder.given:
        _check_graphs(engine, device)
        model.compile(cuda_graphs=engine.cuda_graphs)
    return model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def build_head(plugin: Plugin, in_dim: int, num_outputs: int) -> Head:
    """The head of the settings; UserError where an option's value makes no head."""
    endless = [
        k for k, v in plugin.options.items() if isinstance(v, float) and not math.isfinite(v)
    ]
    try:
        if endless:
            raise ValueError(f"{endless[0]} is not finite")
        return HEADS.build(plugin.name, in_dim, num_outputs, **plugin.options)
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        given = ", ".join(f"{key}={value}" for key, value in plugin.options.items())
        raise UserError(
            f"head '{plugin.name}' cannot be built: {error}\n  its options are {given}"
        ) from error


def build_regularisers(settings: Settings, head: Head, dim: int) -> list[Regulariser]:
    """Those with a weight, each asked whether it goes with the head."""
    # All are built, so that a wrong option is told even where the weight is 0.
    built = [REGULARISERS.build(name, **options) for name, options in settings.losses.items()]
    made = [regulariser for regulariser in built if regulariser.weight.peak]
    if made:
        with torch.random.fork_rng([]):
            example = head(torch.zeros(1, 2, dim), torch.ones(1, 2, dtype=torch.bool))
        for regulariser in made:
            regulariser.check(example)
    return made


@contextmanager
def process_settings(settings: Settings) -> Iterator[None]:
    """Apply what the settings say of the whole process inside the block, and restore it afterwards.

    These are the precision of float32 products and the number of decoder threads.
    """
    with float32_precision(settings.engine.precision), decoder_threads(settings.data.workers):
        yield


def build_strategy(engine: Engine, device: torch.device) -> Strategy:
    """Where and over how many processes the run goes."""
    file = Path(engine.deepspeed)
    return named_strategy(
        device,
        engine.strategy,
        deepspeed=file if file.is_file() else CONFIGS.parent / file,
        timeout=60 * engine.timeout,
    )


def _check_graphs(engine: Engine, device: torch.device) -> None:
    """UserError where CUDA graphs are asked for without CUDA."""
    if engine.cuda_graphs and device.type != "cuda":
        raise UserError(
            f"engine.cuda_graphs=true needs a CUDA device; this run is on {device.type}\n"
            "  set engine.cuda_graphs=false"
        )


def _check_policy(engine: Engine, policy: str) -> None:
    """UserError where an option of the engine does not go with the BatchNorm policy."""
    for option in ("compile", "checkpoint_blocks"):
        if getattr(engine, option) and policy != "frozen":
            why = {
                "compile": "pads chunks to one shape, and padding would enter the statistics",
                "checkpoint_blocks": "runs BatchNorm a second time, which would move the statistics",
            }[option]
            raise UserError(
                f"engine.{option}=true does not go with engine.batch_norm={policy}: it {why}\n"
                f"  set engine.batch_norm=frozen, or engine.{option}=false"
            )


def build_view(data: Data, bag: BagSettings, device: torch.device, *, features: bool) -> View:
    """What evaluation sees of a slide: all patches, as stored but for their size; or all features."""
    if features:
        free = free_memory(torch.device("cpu")) / 2
        return View(FeatureCache(int(free) if data.cache == "auto" else parse_bytes(data.cache)))
    return View(Look(build_decoder(data.decoder, device), bag.size, bgr=data.bgr))


def build_loader(
    settings: Settings,
    items: Sequence[LabelledSlide],
    view: View,
    *,
    model: MILModel,
    task: Task,
) -> TrainingLoader:
    """The bags of the training slides; ``view`` is that of evaluation."""
    engine, bag = settings.engine, settings.bag
    sight = view.look
    if isinstance(sight, Look):
        sight = replace(
            sight,
            augment=AUGMENTS.build(settings.augment.name, bag.size, **settings.augment.options),
            keep=None if engine.keep == "none" else engine.keep,
        )
    return TrainingLoader(
        items=items,
        view=View(
            sight,
            seed=settings.run.seed,
            bag_size=bag.patches,
            sampler=SAMPLERS.build(settings.sampler.name, **settings.sampler.options),
            shares=tuple(bag.shares),
            copies=bag.copies,
            shared_crops=bag.shared_crops,
        ),
        bags=settings.optim.bags,
        chunk=engine.chunk,
        shard_over={"slide": None, "bag": 0, "auto": engine.shard_over}[engine.shard],
        full=engine.compile,
        one_piece=model.batch_norm.one_piece,
        whole=model.encoder.given,
        groups=[task.group(item.target) for item in items] if settings.optim.balance else None,
    )


def build_validation(
    settings: Settings, items: Sequence[LabelledSlide], view: View, task: Task
) -> tuple[list[LabelledSlide], View]:
    """What the epochs are compared on: slides of validation, and what is seen of them each time."""
    select, seed = settings.select, settings.run.seed
    cache = PixelCache(parse_bytes(select.cache)) if isinstance(view.look, Look) else None
    seen = replace(view, seed=seed, bag_size=select.patches, cache=cache)
    return some_slides(items, select.slides, group=task.group, seed=seed), seen


def judged_weights(optim: Optim, select: Select) -> str:
    """Whose validation selects the epoch, and whose predictions count: ``model`` or ``ema``."""
    judged = select.weights
    if judged == "auto":
        judged = "ema" if optim.ema else "model"
    if judged == "ema" and not optim.ema:
        raise UserError("select.weights=ema needs optim.ema over 0")
    return judged


def build_schedule(
    optim: Optim, select: Select, *, save_every: int, max_bad_steps: int, rescore: int
) -> Schedule:
    """What the trainer needs of the settings."""
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
        judged=judged_weights(optim, select),
        save_every=save_every,
        max_bad_steps=max_bad_steps,
        rescore=rescore,
    )


def load_cohort(
    data: Data,
    task: Task,
    *,
    name: str,
    seed: int,
    problems_file: Path | None,
    size: int | None = None,
    features: bool = False,
    protocol: Protocol = HONEST,
) -> tuple[list[LabelledSlide], list[Problem]]:
    """The cohort's slides, or its cases, checked, split and matched with their patches.

    Args:
        problems_file: where the whole list of unusable rows goes; None on ranks that do not lead,
            which say nothing either.
        size: to which all patches are brought; None: they stay as stored.
        features: take ``data.features`` in place of the stores.
        protocol: what the splits are used for.

    Returns:
        The slides, and what was left out under ``data.unmatched=drop``.

    Raises:
        UserError: data are missing, a row is unusable, or the splits are not honest.
    """
    require_files(data, name, task.columns, features=features)
    slides, problems = read_table(
        data.labels,
        columns=_columns(data),
        targets=task.columns,
        split_names=data.splits,
        slide_suffix=data.slide_suffix,
        slide_separator=data.slide_separator,
    )
    used, strange = _split_by_file(slides, data)
    known, unknown = _with_known_labels(used, task)
    # A store's slide that no known slide is may yet have its row.
    rows = {slide.id for slide in slides} | {problem.slide for problem in problems}
    aside = rows - {slide.id for slide in known}
    scales = [open_feature_stores(data)] if features else open_scales(data)
    first, unmatched = match_stores(known, scales[0])
    problems += [*strange, *unknown, *(p for p in unmatched if p.slide not in aside)]
    _settle(problems, data, name, problems_file)
    screen = Screen(leads=problems_file is not None)
    kept = [slide for slide in known if slide.id in first]
    kept = _resplit(kept, protocol, data.cut, by=task.columns[0], seed=seed, screen=screen)
    check_splits(kept, needs=protocol.needs)
    trained = [slide for slide in kept if slide.split == "train"]
    more, lacking = match_scales(trained, scales[1:])
    problems += lacking
    _settle(problems, data, name, problems_file)
    kept = [slide for slide in kept if slide.split != "train" or slide.id in more]
    check_splits(kept, needs=protocol.needs)
    stores = {slide.id: [first[slide.id], *more.get(slide.id, [])] for slide in kept}
    if not features:
        check_sides(stores, size)
    check_copies(kept, first)
    if data.unit == "case":
        kept, stores = by_case(kept, stores)
    elif task.of_cases:
        for line in check_single(kept):
            screen.say(f"NOTE {line}")
    items = label_slides(kept, stores, task.encode)
    for line in check_classes(items, task):
        screen.say(f"NOTE {line}")
    return items, problems


def _resplit(
    slides: list[Slide], protocol: Protocol, shares: Cut, *, by: str, seed: int, screen: Screen
) -> list[Slide]:
    """With the protocol's splits, and those of ``data.cut`` that no slide has yet: a test of the table or of
    a fold stays."""
    slides = [replace(s, split=protocol.joined.get(s.split, s.split)) for s in slides]
    check_cases(slides)  # before the cut, which moves a case whole
    for split in protocol.cuts:
        share = getattr(shares, split)
        if share and any(slide.split == split for slide in slides):
            screen.say(
                f"NOTE data.cut.{split} cuts nothing, since there are slides of '{split}' already"
            )
        elif share:
            slides = cut(slides, split, share, by=by, seed=seed)
    return slides


def _split_by_file(slides: list[Slide], data: Data) -> tuple[list[Slide], list[Problem]]:
    """The slides that the fold of ``data.split_file`` uses, in its splits; and whom it does not know."""
    if not data.split_file:
        return slides, []
    path = Path(data.split_file)
    if not path.exists():
        raise UserError(f"no split file at {path}\n  set data.split_file=FILE, or a folder of them")
    folds = read_folds(data, path)
    fold = pick_fold(folds, data.fold, path)
    cases = names_cases(path, data.columns.slide, data.columns.case)
    return assign(slides, folds[fold], f"{path.name}, fold {fold}", cases=cases)


def read_folds(data: Data, path: Path) -> Folds:
    """:func:`e2e.data.split_files.read_splits`, with slides and cases named as in the label table."""
    return read_splits(
        path,
        data.columns.slide,
        data.columns.case,
        slide_suffix=data.slide_suffix,
        slide_separator=data.slide_separator,
    )


def check_classes(items: Sequence[LabelledSlide], task: Task) -> list[str]:
    """A line for each split that lacks a class which another has, a label, or events."""
    classes = {item.slide.id: task.kinds(item.target) for item in items}
    splits = {item.slide.id: item.slide.split for item in items}
    undefined = "metrics that need every class are not defined there"
    meaning = {"train": "it cannot be learned", "val": f"{undefined}, nor choose an epoch"}
    return [
        f"{split} has no {' and no '.join(lacking)}: {meaning.get(split, undefined)}"
        for split, lacking in missing_classes(splits, classes).items()
    ]


def _settle(problems: Sequence[Problem], data: Data, name: str, file: Path | None) -> None:
    """Write the list of what cannot be used; UserError unless it is to be dropped."""
    if problems and file is not None:
        write_problems(problems, file)
    if problems and data.unmatched == "error":
        where = f"  all of them: {file}\n" if file else ""
        tables = f"{data.labels}, {data.split_file}" if data.split_file else data.labels
        raise UserError(
            f"{tables} and the stores of cohort '{name}' do not agree in {len(problems)} place(s)\n"
            f"{listing(problems)}\n{where}"
            "  mend the table or pack the slides, or set data.unmatched=drop to go on without them"
        )


def open_feature_stores(data: Data) -> list[FeatureStore]:
    """Those of ``data.features``, all of one width."""
    paths = [path for entry in data.features for path in store_files(entry)]
    found = [open_features(path) for path in paths]
    common_width(found)
    return found


def describe_features(items: Sequence[LabelledSlide]) -> dict[str, Any]:
    """``width`` and ``encoder`` (empty where the files do not say) of the slides' features."""
    makers = (made_by(item.store.recipe) for item in items)
    width = cast(FeatureStore, items[0].store).width
    return {"width": width, "encoder": next(filter(None, makers), "")}


def check_features(now: Mapping[str, Any], trained: Mapping[str, Any], run: Path) -> None:
    """UserError where features differ from those a run was trained on, as far as both are known."""
    known = [key for key in trained if now[key] and trained[key]]
    differ = [key for key in known if not may_be_same(str(now[key]), str(trained[key]))]
    if differ:
        lines = [f"{key}: {trained[key]} in training, {now[key]} now" for key in differ]
        raise UserError(
            f"{run} was trained on other features\n{listing(lines)}\n"
            "  set data.features to those of the same encoder and weights"
        )


def check_values(items: Sequence[LabelledSlide], screen: Screen) -> None:
    """Read the features of all ``items``; UserError that names each slide whose ones cannot be used."""
    faults: list[str] = []
    for done, item in enumerate(items):
        try:
            cast(FeatureStore, item.store).features(item.slide.id)
        except DamagedDataError as error:
            faults.append(str(error).splitlines()[0])
        screen.step(done + 1, len(items), "slides' features looked over")
    screen.pause()
    if faults:
        raise UserError(
            f"the features of {len(faults)} slide(s) cannot be used\n{listing(faults)}\n"
            "  extract them again (in bf16 or fp32, if fp16 overflowed), or leave the slides out of "
            "the label table"
        )


def open_scales(data: Data) -> list[list[Store]]:
    """The stores of each magnification, ``data.stores`` first."""
    return [
        [open_store(path, data.coords) for entry in entries for path in store_files(entry)]
        for entries in (data.stores, *data.scales)
    ]


def first_recipe(data: Data) -> dict[str, Any]:
    """How the patches of ``data.stores`` were made; UserError when no file of them is there."""
    for entry in data.stores:
        for path in store_files(entry):
            return open_store(path).recipe
    raise UserError(f"no file matches data.stores={data.stores}")


def store_files(entry: str) -> list[Path]:
    """The files that an entry of ``data.stores`` stands for: a file, a glob, or a pack's index."""
    if any(sign in entry for sign in "*?["):
        return sorted(Path(found) for found in glob.glob(entry, recursive=True))
    path = Path(entry)
    return read_index(path) if path.suffix == ".json" and path.is_file() else [path]


def require_files(data: Data, name: str, targets: Sequence[str], *, features: bool = False) -> None:
    """UserError that says what the cohort needs, where it goes, and how it is made."""
    stores = [entry for entries in (data.stores, *data.scales) for entry in entries]
    kind, entries = ("features", data.features) if features else ("patch store", stores)
    if not data.labels or not entries:
        what = "data.features=[FOLDER]" if features else "data.stores=[FILE.lmdb]"
        raise UserError(
            f"cohort '{name}' needs data.labels=FILE.csv and {what}\n  {_how_made(kind, 'FOLDER', data)}"
        )
    needed = [("label table", data.labels), *((kind, entry) for entry in entries)]
    missing = [
        (kind, path)
        for kind, path in needed
        if not any(file.exists() for file in store_files(path))
    ]
    if not missing:
        return
    lines = [f"the data of cohort '{name}' are not here"]
    lines += [f"  {kind}: {path} is missing" for kind, path in missing]
    if data.source:
        lines.append(f"  source: {data.source}")
    if any(kind == "label table" for kind, _ in missing):
        names = dict.fromkeys(name for name in (*_columns(data).values(), *targets) if name)
        lines.append(
            f"  put the label table at {data.labels} (columns {', '.join(names)}),"
            " or set data.labels=FILE.csv"
        )
    for kind, path in missing:
        if kind != "label table" and "*" not in path:
            lines.append(f"  {_how_made(kind, path, data)}")
    lines.append("  without slides of your own: make demo")
    raise UserError("\n".join(lines))


def _how_made(kind: str, path: str, data: Data) -> str:
    if kind == "features":
        stores = " ".join(data.stores) or "FILE.lmdb"
        return f"make the features: python launch/extract.py --stores {stores} --encoder NAME --out {path}"
    return f"make the store: python tools/pack_lmdb.py --slides SLIDES --out {path} {data.pack}".rstrip()


def write_cohort(items: Sequence[LabelledSlide], problems: Sequence[Problem], path: Path) -> None:
    """cohort.csv of a run: each slide that takes part, and each that was left out, with the reason."""
    rows = [
        {
            "slide": item.slide.id,
            "case": item.slide.case,
            "split": item.slide.split,
            **item.slide.target,
            "patches": item.store.count(item.slide.id),
            "store": str(item.store.path),
            "left_out": "",
        }
        for item in items
    ]
    rows += [{"slide": p.slide, "left_out": f"{p.problem} ({p.where})"} for p in problems]
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False).encode())


def _with_known_labels(slides: Sequence[Slide], task: Task) -> tuple[list[Slide], list[Problem]]:
    """The slides with a label, be it in part; the others, and those whose words the task refuses."""
    known, problems = [], []
    for slide in slides:
        try:
            if task.known(task.encode(slide.target)):
                known.append(slide)
            else:
                blank = ", ".join(column for column, word in slide.target.items() if not word)
                problems.append(Problem(slide.id, "label table", f"no value for {blank}"))
        except UserError as error:
            problems.append(Problem(slide.id, "label table", str(error)))
    return known, problems


def _columns(data: Data) -> dict[str, str | None]:
    """Our word -> the label table's column, of what the splits' own file does not say."""
    columns = data.columns
    split = None if data.split_file else columns.split
    return {
        "case": columns.case,
        "slide": columns.slide,
        "split": split,
        "centre": columns.centre,
    }
