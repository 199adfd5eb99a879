"""Frozen features of whole slides, for the two-stage mode: computed once, written in TRIDENT's layout."""

from __future__ import annotations

import hashlib
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import UnionType
from typing import Any

import torch
import yaml
from torch import Tensor

import e2e.encoders  # noqa: F401  (registers them)
from e2e.bags.bag import Bag
from e2e.bags.loader import full_bag
from e2e.bags.prefetch import prefetch
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.encoders.base import ENCODERS, Encoder
from e2e.engine.batchnorm import FrozenBatchNorm
from e2e.errors import PARTLY_DONE, DamagedDataError, UserError, describe_interrupt
from e2e.files import create_folder, write_atomically, write_json
from e2e.images.decode import build_decoder
from e2e.log import Screen
from e2e.parallel import (
    Strategy,
    autocast_dtype,
    build_strategy,
    float32_precision,
    pick_device,
)
from e2e.registry import did_you_mean
from e2e.runs.feature_folder import (
    FeatureFolder,
    check_recipe,
    is_complete,
    magnification,
    slide_file,
)
from e2e.runs.processes import needs_ranks, run_ranks
from e2e.settings.cli import extract_parser
from e2e.settings.yaml_text import parse_yaml
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore
from e2e.store.mpp_table import check_overrides, read_mpp
from e2e.store.open import expand_store_paths, open_store
from e2e.store.pack import pack
from e2e.store.records import PatchReader
from e2e.store.sources import SlideFiles
from e2e.wsi.slide import describe_unread, find_slides
from e2e.wsi.tiling import Tiling

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e extract`` and return its exit code."""
    args = extract_parser().parse(argv)
    options = encoder_options(args.encoder, args.options)
    if needs_ranks(args.gpus, on_cpu=args.device == "cpu"):
        return run_ranks("extract", argv, args.gpus)
    shared = {
        "size": args.size,
        "batch": args.batch,
        "precision": args.precision,
        "dtype": args.dtype,
        "device": args.device,
    }
    with describe_interrupt(
        lambda: f"interrupted; finished slides are in {args.out}; the same command continues"
    ):
        if args.slides is None:
            files = [file for entry in args.stores for file in expand_store_paths(entry)]
            stores = [open_store(file, args.coords) for file in files]
            return extract(stores, args.encoder, options, args.out, **shared)
        return extract_slides(
            args.slides,
            args.encoder,
            options,
            args.out,
            tiling=Tiling(mpp=args.mpp, patch_px=args.patch_size),
            mpp_override=args.mpp_override,
            workers=args.workers,
            **shared,
        )


class Extractor:
    """Computes the features of a bag's patches, as the evaluation of an end-to-end model does.

    Without gradients; BatchNorms use their running statistics and are folded into convolutions.

    Parameters
    ----------
    encoder
        Is moved to the device and stays in eval mode.
    autocast
        dtype of matrix products; None for float32.
    dtype
        dtype of the features.
    """

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        *,
        autocast: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        encoder.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.encoder = encoder.eval().requires_grad_(False)
        self.device, self.dtype, self._autocast = device, dtype, autocast
        self._chunk_context = FrozenBatchNorm(encoder).evaluating()

    @torch.no_grad()
    def __call__(self, bag: Bag) -> Tensor:
        """Return the (N, D) features of the bag's patches, on the CPU.

        Raises
        ------
        DamagedDataError
            A patch cannot be read, or a feature is NaN or infinite.
        """
        features = torch.cat([self._encode(bag, *chunk[:2]) for chunk in bag.chunks])
        is_bad = ~features.isfinite().all(dim=1)
        if is_bad.any():
            raise DamagedDataError(
                f"slide '{bag.slides[0]}' patch {int(is_bad.nonzero()[0])}: its feature is NaN or infinite\n"
                "  set --dtype float32, or check the encoder's weights"
            )
        return features

    def _encode(self, bag: Bag, start: int, stop: int) -> Tensor:
        pixels = bag.pixels(start, stop, self.device)
        with self._precision(), self._chunk_context(stop - start, False):
            features = self.encoder(pixels)
        return features.float().to("cpu", self.dtype)

    def _precision(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast, cache_enabled=False)


def extract(
    stores: Sequence[PatchReader],
    encoder: str,
    options: Mapping[str, Any],
    out: Path,
    *,
    size: int | None = None,
    batch: int = 256,
    precision: str = "auto",
    dtype: str = "float16",
    device: str = "auto",
) -> int:
    """Write the features of every slide of ``stores`` that has none yet.

    Under ``torchrun`` the processes share the slides. A command that was stopped at any moment can be
    repeated: it continues.

    Parameters
    ----------
    encoder
        A name of :data:`e2e.encoders.base.ENCODERS`, with its ``options``.
    out
        ``<magnification>x_<px>px_<overlap>px_overlap/features_<encoder>/<slide>.h5`` are written here.
    size
        Side in pixels to which patches are resized; None: as stored, or the size the encoder requires.
    batch
        Patches encoded together.
    precision
        ``bf16``, ``fp32``, or ``auto``: bf16 on a GPU that supports it.
    dtype
        dtype of the files, ``float16`` or ``float32``.

    Returns
    -------
    int
        0, or 3 when some slides could not be read; they are listed, the others are done.

    Raises
    ------
    UserError
        The encoder or its weights are missing; the folder holds features of another encoder, weights or
        size; a slide is in two stores; ``size`` or ``batch`` is less than 1.
    """
    if batch < 1 or (size is not None and size < 1):
        raise UserError(f"--batch and --size must be at least 1, found {batch} and {size}")
    if not stores:
        raise UserError("no patch store to read: no file matches --stores")
    with float32_precision(precision):
        strategy = build_strategy(pick_device(device))
        screen = Screen(strategy.is_leader, timestamps=True)
        try:
            with strategy.detect_lost_ranks():
                return _extract_share(
                    stores, encoder, options, out, strategy, screen, size, batch, precision, dtype
                )
        finally:
            screen.pause()
            strategy.close()


def _extract_share(
    stores: Sequence[PatchReader],
    encoder: str,
    options: Mapping[str, Any],
    out: Path,
    strategy: Strategy,
    screen: Screen,
    size: int | None,
    batch: int,
    precision: str,
    dtype: str,
) -> int:
    """Encode the slides of this rank, and report those of all ranks; see :func:`extract`."""
    items, problems = _readable_slides(stores)
    network = _build_encoder(encoder, options)
    size = size or network.required_size
    autocast = autocast_dtype(precision, strategy.device)
    recipe = _describe(encoder, options, network, size, autocast, dtype)
    folders = {item.slide.id: _feature_folder(item, out, encoder) for item in items}
    _write_recipes(set(folders.values()), recipe, strategy)
    missing = _slides_without_features(items, folders, strategy)
    screen.say(
        f"{len(missing)} slides to encode, {len(items) - len(missing)} already done: {encoder} "
        f"({network.dim} features) on {strategy.world_size} x {strategy.device}"
    )
    extractor = Extractor(network, strategy.device, autocast=autocast, dtype=DTYPES[dtype])
    spec = BagSpec(PixelRowReader(build_decoder("auto", strategy.device), size))
    problems += _encode_share(extractor, missing, folders, spec, batch, strategy, screen)
    return _report(strategy.gather_objects(problems), folders, screen)


def extract_slides(
    slides: Path,
    encoder: str,
    options: Mapping[str, Any],
    out: Path,
    *,
    tiling: Tiling,
    mpp_override: Path | None,
    workers: int,
    size: int | None = None,
    batch: int = 256,
    precision: str = "auto",
    dtype: str = "float16",
    device: str = "auto",
) -> int:
    """Pack slides into the store ``out/slides.lmdb``, then extract their features.

    Parameters
    ----------
    slides
        A slide file, or a folder of them.
    tiling
        How the slides are cut.
    mpp_override
        CSV with the columns slide, mpp, for slides that do not state their resolution.
    workers
        Processes that cut slides.

    See :func:`extract` for the other parameters and the exit code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--slides works in one process\n"
            "  pack the slides with e2e pack, then give --stores to torchrun"
        )
    _build_encoder(encoder, options)  # before hours of packing: its weights may be missing
    mpp_by_slide = read_mpp(mpp_override) if mpp_override else {}
    create_folder(out)
    for line in describe_unread(slides):
        print(line)
    paths = find_slides(slides)
    check_overrides(mpp_by_slide, paths)
    source = SlideFiles(paths, tiling, mpp=mpp_by_slide)
    packed = pack(source, out / "slides.lmdb", workers=workers)
    if packed.problems:
        print(f"{len(packed.problems)} slides could not be packed, see {packed.quarantine}")
    code = extract(
        [PatchStore(out / "slides.lmdb")],
        encoder,
        options,
        out,
        size=size,
        batch=batch,
        precision=precision,
        dtype=dtype,
        device=device,
    )
    return code or (PARTLY_DONE if packed.problems else 0)


def encoder_options(encoder: str, texts: Iterable[str]) -> dict[str, Any]:
    """Parse ``encoder.key=value`` texts into options of the encoder, checked by name and type."""
    accepted = ENCODERS.options(encoder)
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        section, _, name = key.partition(".")
        if not equals or section != "encoder" or not name:
            raise UserError(f"'{text}' is not an option; write encoder.key=value")
        if name not in accepted:
            raise UserError(f"unknown option 'encoder.{name}'{did_you_mean(name, accepted)}")
        try:
            options[name] = parse_yaml(value, typed=True)
        except yaml.YAMLError as error:
            raise UserError(f"'{text}' cannot be read: {str(error).splitlines()[0]}") from error
        kind, _ = accepted[name]
        if not _has_type(options[name], kind):
            type_name = kind.__name__ if isinstance(kind, type) else kind
            raise UserError(f"encoder.{name} must be {type_name}, found {value!r}")
    return options


def weights_digest(encoder: Encoder) -> str:
    """Return a digest of the encoder's weights, whatever file they were loaded from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _describe(
    encoder: str,
    options: Mapping[str, Any],
    network: Encoder,
    size: int | None,
    autocast: torch.dtype | None,
    dtype: str,
) -> dict[str, Any]:
    """How the features are made, as it is kept beside them."""
    return {
        "encoder": encoder,
        "options": {name: value for name, value in options.items() if name != "weights"},
        "weights": weights_digest(network),
        "size": size,
        "precision": str(autocast or torch.float32).removeprefix("torch."),
        "dtype": dtype,
    }


def _encode_share(
    extractor: Extractor,
    items: Sequence[LabelledSlide],
    folders: Mapping[str, FeatureFolder],
    spec: BagSpec,
    batch: int,
    strategy: Strategy,
    screen: Screen,
) -> list[str]:
    """Encode and write this rank's share of the slides; return a message for each that failed."""
    share, problems = items[strategy.rank :: strategy.world_size], []
    bags = ((full_bag(item, spec, batch), item) for item in share)
    for num_done, (bag, item) in enumerate(prefetch(bags, strategy.device), start=1):
        try:
            features = extractor(bag)
        except DamagedDataError as error:
            problems.append(str(error))
            continue
        folder = folders[item.slide.id]
        write_atomically(folder.file(item.slide.id), slide_file(features, item.record, folder))
        screen.step(num_done, len(share), "slides encoded")
    return problems


def _report(
    problems: Sequence[list[str]], folders: Mapping[str, FeatureFolder], screen: Screen
) -> int:
    """Print the folders and the problems of all ranks, each once; return the exit code."""
    lines = list(dict.fromkeys(line for of_rank in problems for line in of_rank))
    screen.pause()
    for path in sorted({str(folder.folder) for folder in folders.values()}):
        screen.say(f"features: {path}")
    for line in lines:
        screen.say(line)
    if lines:
        screen.say(f"{len(lines)} slides have no features; the others are done")
    return PARTLY_DONE if lines else 0


def _readable_slides(stores: Sequence[PatchReader]) -> tuple[list[LabelledSlide], list[str]]:
    """The slides sorted by id, and a message for each that has no patches or no readable record."""
    items: dict[str, LabelledSlide] = {}
    problems: list[str] = []
    no_target = torch.tensor(float("nan"))
    for store in stores:
        for slide in store.slides:
            if slide in items:
                raise UserError(
                    f"slide '{slide}' is in {items[slide].reader.path} and in {store.path}"
                )
            item = LabelledSlide(Slide(slide, case=slide, split="", target={}), store, no_target)
            try:
                if not item.record.num_patches:
                    problems.append(f"{store.path}: slide '{slide}' has no patches")
                    continue
            except DamagedDataError as error:
                problems.append(str(error))
                continue
            items[slide] = item
    return [items[slide] for slide in sorted(items)], problems


def _build_encoder(name: str, options: Mapping[str, Any]) -> Encoder:
    """Build the encoder; without pretrained weights it has the same random ones each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        encoder = ENCODERS.build(name, **options)
    if encoder.input_kind == "features":
        raise UserError(
            f"the encoder '{name}' reads features and computes none\n  name a network, such as r50 or uni"
        )
    return encoder


def _feature_folder(item: LabelledSlide, out: Path, encoder: str) -> FeatureFolder:
    record, overlap = item.record, int(item.reader.recipe.get("overlap", 0))
    return FeatureFolder(out, magnification(record.mpp), record.patch_px, overlap, encoder)


def _write_recipes(
    folders: Iterable[FeatureFolder], recipe: Mapping[str, Any], strategy: Strategy
) -> None:
    """Write beside each folder how its features are made.

    Raises
    ------
    UserError
        A folder holds features that were made in another way.
    """
    folders = sorted(folders, key=str)
    for folder in folders:
        check_recipe(folder, recipe)
    strategy.barrier()  # until every rank has checked
    if strategy.is_leader:
        for folder in folders:
            write_json(folder.recipe, recipe)


def _slides_without_features(
    items: Sequence[LabelledSlide], folders: Mapping[str, FeatureFolder], strategy: Strategy
) -> list[LabelledSlide]:
    """Slides without a complete and current file, as rank 0 sees it: files may appear meanwhile."""
    complete = {
        item.slide.id
        for item in items
        if strategy.is_leader
        and is_complete(folders[item.slide.id].file(item.slide.id), item.record)
    }
    complete = strategy.gather_objects(complete)[0]
    return [item for item in items if item.slide.id not in complete]


def _has_type(value: object, kind: Any) -> bool:
    """Whether a value read from YAML has the type of a constructor's parameter."""
    if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_has_type(value, alternative) for alternative in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        return isinstance(value, list) and all(_has_type(item, element) for item in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
