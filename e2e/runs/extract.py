"""Frozen features of whole slides, for the two-stage mode: computed once, written in TRIDENT's layout."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from torch import Tensor

import e2e.encoders  # noqa: F401  (registers them)
from e2e.bags.bag import Bag
from e2e.bags.loader import full_bag
from e2e.bags.prefetch import prefetch
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.cohort.load import store_files
from e2e.encoders.base import ENCODERS, Encoder
from e2e.engine.batchnorm import FrozenBatchNorm
from e2e.errors import PARTLY_DONE, DamagedDataError, UserError, describe_interrupt, format_list
from e2e.files import write_atomically
from e2e.images.decode import build_decoder
from e2e.log import Screen
from e2e.parallel import (
    Strategy,
    autocast_dtype,
    build_strategy,
    float32_precision,
    pick_device,
)
from e2e.registry import suggest
from e2e.runs.processes import needs_ranks, run_ranks
from e2e.settings.cli import extract_parser
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore
from e2e.store.open import open_store
from e2e.store.pack import pack
from e2e.store.records import PatchReader, SlideRecord
from e2e.store.sources import SlideFiles, read_mpp
from e2e.wsi.slide import find_slides
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
            files = [file for entry in args.stores for file in store_files(entry)]
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
    """Patches -> features as the evaluation of a model end to end has them.

    Without gradients, BatchNorms by their running statistics, folded as there.

    Args:
        encoder: taken over: moved to the device, in eval mode for good.
        autocast: dtype of the matrix products; None for float32.
        dtype: of the features.
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
        self._around = FrozenBatchNorm(encoder).evaluating()

    @torch.no_grad()
    def __call__(self, bag: Bag) -> Tensor:
        """(N, D) features of the bag's patches, on the CPU.

        Raises:
            DamagedDataError: a patch cannot be read, or a feature is NaN or Inf.
        """
        found = torch.cat([self._encode(bag, *chunk[:2]) for chunk in bag.chunks])
        bad = ~found.isfinite().all(dim=1)
        if bad.any():
            raise DamagedDataError(
                f"slide '{bag.slides[0]}' patch {int(bad.nonzero()[0])}: its feature has NaN or Inf\n"
                "  set --dtype float32, or look at the encoder's weights"
            )
        return found

    def _encode(self, bag: Bag, start: int, stop: int) -> Tensor:
        pixels = bag.pixels(start, stop, self.device)
        with self._precision(), self._around(stop - start, False):
            features = self.encoder(pixels)
        return features.float().to("cpu", self.dtype)

    def _precision(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast, cache_enabled=False)


@dataclass(frozen=True)
class FeatureFolder:
    """Where the features of slides of one grid go."""

    out: Path
    magnification: float | None
    patch_px: int
    overlap: int
    encoder: str

    @property
    def grid(self) -> Path:
        """TRIDENT's folder of a grid, such as ``20x_256px_0px_overlap``."""
        scale = "unknown" if self.magnification is None else f"{self.magnification:g}x"
        return self.out / f"{scale}_{self.patch_px}px_{self.overlap}px_overlap"

    @property
    def folder(self) -> Path:
        """The folder of the features."""
        return self.grid / f"features_{self.encoder}"

    @property
    def recipe(self) -> Path:
        """What they were made by."""
        return self.grid / f"_config_feats_{self.encoder}.json"

    def file(self, slide: str) -> Path:
        """Of one slide."""
        return self.folder / f"{slide}.h5"


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
    """Write the features of every slide of ``stores`` that are not there yet.

    Under ``torchrun`` the ranks share the slides. Killed at any moment and started again, it goes on.

    Args:
        encoder: a name of :data:`ENCODERS`, with its ``options``.
        out: ``<magnification>x_<px>px_<overlap>px_overlap/features_<encoder>/<slide>.h5`` go here.
        size: side in pixels the encoder sees; None: as stored, or the one the encoder is built for.
        batch: patches encoded at once.
        precision: ``bf16``, ``fp32``, or ``auto``: bf16 where the GPU has it.
        dtype: of the files, ``float16`` or ``float32``.

    Returns:
        0, or 3 when some slides could not be read: they are named, the others are done.

    Raises:
        UserError: the encoder or its weights cannot be had; a folder holds features of another
            encoder, weights or size; a slide is in two stores; ``size`` or ``batch`` is under 1.
    """
    if batch < 1 or (size is not None and size < 1):
        raise UserError(f"--batch and --size must be at least 1, found {batch} and {size}")
    if not stores:
        raise UserError("no patch store to read: no file fits --stores")
    with float32_precision(precision):
        return _extract(stores, encoder, options, out, size, batch, precision, dtype, device)


def _extract(
    stores: Sequence[PatchReader],
    encoder: str,
    options: Mapping[str, Any],
    out: Path,
    size: int | None,
    batch: int,
    precision: str,
    dtype: str,
    device: str,
) -> int:
    strategy = build_strategy(pick_device(device))
    screen = Screen(strategy.is_leader)
    try:
        with strategy.detect_lost_ranks():
            items, problems = _readable(stores)
            network = _build(encoder, options)
            size = size or _built_for(network)
            autocast = autocast_dtype(precision, strategy.device)
            recipe = {
                "encoder": encoder,
                "options": {k: v for k, v in options.items() if k != "weights"},
                "weights": weights_digest(network),
                "size": size,
                "precision": str(autocast or torch.float32).removeprefix("torch."),
                "dtype": dtype,
            }
            places = {item.slide.id: _place(item, out, encoder) for item in items}
            _settle(set(places.values()), recipe, strategy)
            todo = _todo(items, places, strategy)
            screen.say(
                f"{len(todo)} slides to encode, {len(items) - len(todo)} are there already: {encoder} "
                f"({network.dim} features) on {strategy.world_size} x {strategy.device}"
            )
            extractor = Extractor(network, strategy.device, autocast=autocast, dtype=DTYPES[dtype])
            view = BagSpec(PixelRowReader(build_decoder("auto", strategy.device), size))
            problems += _run(extractor, todo, places, view, batch, strategy, screen)
            return _report(strategy.gather_objects(problems), places, screen)
    finally:
        screen.pause()
        strategy.close()


def extract_slides(
    slides: Path,
    encoder: str,
    options: Mapping[str, Any],
    out: Path,
    *,
    tiling: Tiling,
    mpp_override: Path | None,
    workers: int,
    **more: Any,
) -> int:
    """Cut slides into the store ``out/slides.lmdb`` first, then as :func:`extract`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--slides works in one process\n"
            "  pack the slides with tools/pack_lmdb.py, then give --stores to torchrun"
        )
    _build(encoder, options)  # hours of cutting are no time to find that it has no weights
    overrides = read_mpp(mpp_override) if mpp_override else {}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error
    source = SlideFiles(find_slides(slides), tiling, mpp=overrides)
    packed = pack(source, out / "slides.lmdb", workers=workers)
    if packed.problems:
        print(f"{len(packed.problems)} slides could not be cut, see {packed.quarantine}")
    code = extract([PatchStore(out / "slides.lmdb")], encoder, options, out, **more)
    return code or (PARTLY_DONE if packed.problems else 0)


def encoder_options(encoder: str, texts: Iterable[str]) -> dict[str, Any]:
    """``encoder.key=value`` -> the options of the encoder, checked by name and type."""
    known, found = ENCODERS.options(encoder), {}
    for text in texts:
        key, equals, value = text.partition("=")
        section, _, name = key.partition(".")
        if not equals or section != "encoder" or not name:
            raise UserError(f"'{text}' is no option; write encoder.key=value")
        if name not in known:
            raise UserError(f"unknown option 'encoder.{name}'{suggest(name, known)}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"'{text}' cannot be read: {str(error).splitlines()[0]}") from error
        if not _fits(found[name], known[name][0]):
            kind = getattr(known[name][0], "__name__", known[name][0])
            raise UserError(f"encoder.{name} must be {kind}, found {value!r}")
    return found


def weights_digest(encoder: Encoder) -> str:
    """The same for the same weights, wherever they were loaded from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def magnification(mpp: float | None) -> float | None:
    """Of patches with ``mpp`` um per pixel: 20 at 0.5; scanners that differ by 10 % count as one."""
    if not mpp:
        return None
    exact = 10 / mpp
    nominal = 10 * 2.0 ** round(math.log2(exact / 10))
    return nominal if abs(exact / nominal - 1) <= 0.1 else round(exact, 2)


def slide_file(features: Tensor, record: SlideRecord, place: FeatureFolder) -> bytes:
    """An HDF5 file as TRIDENT 0.3 writes it; its attributes say "None" for what is not known."""
    known, at = place.magnification, io.BytesIO()
    scale = record.level0_px / record.patch_px if record.patch_px else 0.0
    said: dict[str, Any] = {
        "patch_size": record.patch_px,
        "patch_size_level0": round(record.level0_px) or "None",
        "level0_magnification": round(known * scale, 2) if known and scale else "None",
        "target_magnification": known or "None",
        "overlap": place.overlap,
        "name": record.slide,
        "savetodir": str(place.grid),
        "level0_width": record.width or "None",
        "level0_height": record.height or "None",
        "mpp": record.mpp or "None",  # not TRIDENT's: of the patches, um per pixel
    }
    with h5py.File(at, "w") as h5:
        made = h5.create_dataset("features", data=features.numpy())
        made.attrs.update(name=record.slide, savetodir=str(place.folder), encoder=place.encoder)
        if record.coords is not None:
            coords = h5.create_dataset("coords", data=record.coords.astype(np.int64))
            coords.attrs.update(said)
    return at.getvalue()


def _run(
    extractor: Extractor,
    todo: Sequence[LabelledSlide],
    places: Mapping[str, FeatureFolder],
    view: BagSpec,
    batch: int,
    strategy: Strategy,
    screen: Screen,
) -> list[str]:
    """Encode and write this rank's share; what went wrong with which slides."""
    share, problems = todo[strategy.rank :: strategy.world_size], []
    bags = ((full_bag(item, view, batch), item) for item in share)
    for done, (bag, item) in enumerate(prefetch(bags, strategy.device)):
        slide = item.slide.id
        try:
            features = extractor(bag)
        except DamagedDataError as error:
            problems.append(str(error))
            continue
        place = places[slide]
        write_atomically(place.file(slide), slide_file(features, item.record, place))
        screen.step(done + 1, len(share), "slides encoded")
    return problems


def _report(
    problems: Sequence[list[str]], places: Mapping[str, FeatureFolder], screen: Screen
) -> int:
    # What all ranks found is said once.
    lines = list(dict.fromkeys(line for part in problems for line in part))
    screen.pause()
    for folder in sorted({str(place.folder) for place in places.values()}):
        screen.say(f"features: {folder}")
    for line in lines:
        screen.say(line)
    if lines:
        screen.say(f"{len(lines)} slides have no features; the others are done")
    return PARTLY_DONE if lines else 0


def _readable(stores: Sequence[PatchReader]) -> tuple[list[LabelledSlide], list[str]]:
    """The slides, by id, and what is wrong with those that have no patches or no record."""
    items: dict[str, LabelledSlide] = {}
    problems: list[str] = []
    unknown = torch.tensor(float("nan"))
    for store in stores:
        for slide in store.slides:
            if slide in items:
                raise UserError(
                    f"slide '{slide}' is in {items[slide].store.path} and in {store.path}"
                )
            item = LabelledSlide(Slide(slide, case=slide, split="", target={}), store, unknown)
            try:
                if not item.record.count:
                    problems.append(f"{store.path}: slide '{slide}' has no patches")
                    continue
            except DamagedDataError as error:
                problems.append(str(error))
                continue
            items[slide] = item
    return [items[slide] for slide in sorted(items)], problems


def _build(name: str, options: Mapping[str, Any]) -> Encoder:
    """The encoder; random weights are the same each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        encoder = ENCODERS.build(name, **options)
    if encoder.given:
        raise UserError(
            f"the encoder '{name}' encodes nothing\n  name a network, such as r50 or uni"
        )
    return encoder


def _built_for(encoder: Encoder) -> int | None:
    """Side in pixels of the patches that it takes; None: any."""
    net = getattr(encoder, "net", None)
    embed = getattr(getattr(net, "model", net), "patch_embed", None)  # model: of a ViT that is cut
    sides = getattr(embed, "img_size", None)
    return sides[0] if sides and getattr(embed, "strict_img_size", False) else None


def _place(item: LabelledSlide, out: Path, encoder: str) -> FeatureFolder:
    record, overlap = item.record, int(item.store.recipe.get("overlap", 0))
    return FeatureFolder(out, magnification(record.mpp), record.patch_px, overlap, encoder)


def _settle(places: Iterable[FeatureFolder], recipe: Mapping[str, Any], strategy: Strategy) -> None:
    """Write down what the features are made by; UserError where others lie there."""
    places = sorted(places, key=str)
    for place in places:
        if not place.recipe.is_file():
            if any(place.folder.glob("*.h5")):
                raise UserError(
                    f"{place.folder} holds features that another program made\n"
                    "  choose another --out"
                )
            continue
        try:
            found = json.loads(place.recipe.read_bytes())
        except ValueError as error:
            raise UserError(f"{place.recipe} is damaged: {error}") from error
        if found != recipe:
            differ = [key for key in recipe if found.get(key) != recipe[key]]
            lines = (f"{key}: {found.get(key)} there, {recipe[key]} now" for key in differ)
            raise UserError(
                f"{place.folder} holds features that were made in another way\n{format_list(lines)}\n"
                "  choose another --out, or remove these"
            )
    strategy.barrier()  # all have looked
    for place in places if strategy.is_leader else ():
        write_atomically(place.recipe, (json.dumps(recipe, indent=2) + "\n").encode())


def _todo(
    items: Sequence[LabelledSlide], places: Mapping[str, FeatureFolder], strategy: Strategy
) -> list[LabelledSlide]:
    """What is not there whole, by the list of rank 0: files may come while the others look."""
    there = {
        item.slide.id
        for item in items
        if strategy.is_leader
        and _is_whole(places[item.slide.id].file(item.slide.id), item.record.count)
    }
    there = strategy.gather_objects(there)[0]
    return [item for item in items if item.slide.id not in there]


def _is_whole(file: Path, patches: int) -> bool:
    """Whether it has features of so many patches. A copy of it may have been cut short."""
    try:
        with h5py.File(file, "r", locking=False) as h5:
            return len(h5["features"]) == patches  # pyright: ignore[reportArgumentType]
    except (OSError, KeyError):
        return False


def _fits(value: object, kind: Any) -> bool:
    """Whether a value read from YAML is of the type that a constructor asks for."""
    if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(kind)[0]) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
