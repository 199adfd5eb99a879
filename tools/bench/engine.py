"""Ways of taking a training step, side by side: speed, memory and gradients of each.

Patches are JPEGs in a real store, read, decoded and augmented by the training loader. All ways run in
one process in ABBA order, and times are medians. Each memory figure comes from a process of its own.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import e2e.encoders
import e2e.heads  # noqa: F401
from e2e.bags.bag import Bag, PixelSource
from e2e.bags.chunk_plan import assign_to_ranks, cut_update
from e2e.bags.loader import make_bag
from e2e.bags.prefetch import prefetch
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.encoders.base import ENCODERS
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import HEADS
from e2e.images.augment import Augment
from e2e.images.decode import build_decoder
from e2e.parallel import autocast_dtype
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore
from tools.bench.patches import write_repeated
from tools.bench.process import (
    call_in_fresh_process,
    peak_above,
    process_memory,
    reset_peak_memory,
    synchronise,
)

MALLOC_SETTINGS = "glibc.malloc.mmap_threshold=1048576"
"""Freed tensors return to the system at once. Otherwise the peak includes what the allocator holds back,
tens of MiB more or less from run to run."""
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One way of taking the step."""

    name: str
    mode: str = "exact"
    """``exact``: the engine. ``checkpoint``: the engine with all graphs kept and the encoder's own
    blockwise checkpointing. ``naive``: no engine; chunk after chunk, with all graphs kept."""
    keep_graphs: str = "none"
    keep: str = "jpeg"
    batch_norm: str = "frozen"
    fold: bool = True
    channels_last: bool = True
    precision: str = "fp32"
    compile: bool = False
    cuda_graphs: bool = False
    """With ``compile``: replay CUDA graphs for chunks that are encoded twice."""
    drop_path: float = 0.0
    dropout: float = 0.0
    dtype: str = "float32"


WAYS = {
    "naive": Way("naive", mode="naive"),
    "checkpoint": Way("checkpoint", mode="checkpoint"),
    "exact": Way("exact"),
    "kept": Way("kept", keep_graphs="64GiB"),
}
"""The ways that a name alone selects."""


def parse_way(text: str) -> Way:
    """Return the way of ``NAME`` or ``NAME:key=value,...``, such as ``mine:precision=bf16``.

    Raises
    ------
    UserError
        An option is unknown.
    """
    name, _, options = text.partition(":")
    way = WAYS.get(name, Way(name))
    fields = [field.name for field in dataclasses.fields(Way) if field.name != "name"]
    for pair in filter(None, options.split(",")):
        key, equals, value = pair.partition("=")
        if key not in fields or not equals:
            raise UserError(
                f"'{pair}' in '{text}' is no option\n  choose from: {', '.join(fields)}"
            )
        default = getattr(way, key)
        option = value == "true" if isinstance(default, bool) else type(default)(value)
        way = dataclasses.replace(way, **{key: option})
    if way.mode not in ("exact", "checkpoint", "naive"):
        raise UserError(f"mode={way.mode} in '{text}' must be exact, checkpoint or naive")
    return way


@dataclass(frozen=True)
class Work:
    """The model that takes the step, and the bag."""

    encoder: str = "r18"
    head: str = "abmilx"
    embed_dim: int = 512
    """Width inside the head; 0 for none: it works on the features."""
    patches: int = 256
    size: int = 64
    """Side of the patches in pixels."""
    chunk: int = 32
    device: str = "cpu"


def write_store(folder: Path, counts: Sequence[int], size: int) -> PatchStore:
    """Return a new store with a slide ``n<count>`` for each count, of smooth noisy patches."""
    from PIL import Image

    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(90, 250, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=80)
        jpegs.append(buffer.getvalue())
    path = folder / "bench.lmdb"
    write_repeated(path, jpegs, {f"n{count}": count for count in sorted(set(counts))}, size)
    return PatchStore(path)


def make_update(store: PatchStore, sizes: Sequence[int], work: Work, way: Way) -> Bag:
    """Return the bags of an update of slides of these sizes, read in the background as in training."""
    items = [
        LabelledSlide(Slide(f"n{n}", f"n{n}", "train", {}), store, torch.tensor(k % 2))
        for k, n in enumerate(sizes)
    ]
    spec = BagSpec(PixelRowReader(build_decoder(), augment=Augment(), keep=way.keep))
    groups = cut_update(sizes, work.chunk, fixed_size=way.compile)
    bags = [(make_bag(items, spec, assign_to_ranks(groups, 1)), None)]
    return next(prefetch(bags, torch.device(work.device)))[0]


def build_model(work: Work, way: Way) -> MILModel:
    """Return encoder and head with random weights and calibrated BatchNorm statistics."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"pretrained": False}
    if way.drop_path:
        options["drop_path"] = way.drop_path
    encoder = ENCODERS.build(work.encoder, **options)
    head_options = {"dropout": way.dropout, "embed_dim": work.embed_dim or None}
    head_options = {k: v for k, v in head_options.items() if k in HEADS.options(work.head)}
    model = MILModel(
        encoder,
        HEADS.build(work.head, encoder.dim, 2, **head_options),
        chunk=work.chunk,
        batch_norm=way.batch_norm,
        fold=way.fold and way.mode == "exact" and not way.compile,
        autocast=autocast_dtype(way.precision, torch.device(work.device)),
        keep_graphs="all" if way.mode == "checkpoint" else way.keep_graphs,
    )
    model.to(work.device, getattr(torch, way.dtype))
    if way.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    else:
        encoder.memory_format = torch.contiguous_format
    _calibrate(model, work)
    if way.mode == "checkpoint":
        encoder.checkpoint_blocks()
    if way.compile:
        model.compile(cuda_graphs=way.cuda_graphs)
    return model.train()


@torch.no_grad()
def _calibrate(model: MILModel, work: Work) -> None:
    """Set the running statistics to those of noise, so that frozen BatchNorm normalises."""
    noise = torch.rand(16, 3, work.size, work.size, generator=torch.Generator().manual_seed(0))
    for norm in model.batch_norm.modules:
        norm.momentum = None  # the mean over all batches, which is this one
        norm.reset_running_stats()
    model.encoder.train()
    model.encoder(noise.to(work.device))


def gradients(model: MILModel, bag: Bag, way: Way, device: torch.device) -> Gradients:
    """Take one step without the optimiser and return the gradients, which stay in the model."""
    model.zero_grad(set_to_none=True)
    logits = (
        naive_logits(model, bag, device)
        if way.mode == "naive"
        else engine_logits(model, bag, device)
    )
    losses = cross_entropy(logits, bag.target.to(device), reduction="none")
    (losses * bag.weight.to(device)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def engine_logits(model: MILModel, bag: Bag, device: torch.device) -> Tensor:
    """Return logits (B,C) computed by the engine."""
    return torch.cat([output.logits for output in model(bag, device)])


def naive_logits(model: MILModel, bag: Bag, device: torch.device) -> Tensor:
    """Return logits (B,C) as one would compute them without the engine: encode the chunks, pool."""
    cast = nullcontext()
    if model.autocast is not None:
        cast = torch.autocast(device.type, model.autocast)
    with cast:
        features = torch.cat(
            [model.encoder(bag.pixels(c.start, c.stop, device)) for c in bag.chunks]
        )
        logits = []
        for k, coords in enumerate(bag.coords):
            rows = features[bag.offsets[k] : bag.offsets[k + 1]].unsqueeze(0)
            mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=device)
            assert coords is not None
            logits.append(model.head(rows, mask, coords.to(device).unsqueeze(0)).logits)
    return torch.cat(logits).float() if model.autocast else torch.cat(logits)


def relative_distance(a: Gradients, b: Gradients) -> float:
    """Return the relative L2 distance of ``a`` from ``b`` over all gradients together."""
    assert a.keys() == b.keys()
    gap = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (gap / sum(float(b[k].double().square().sum()) for k in b)) ** 0.5


class TimedPixels(PixelSource):
    """A pixel source that appends the seconds of each call to ``spent``."""

    def __init__(self, source: PixelSource, spent: list[float]) -> None:
        self._source, self._spent = source, spent

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        start_time = time.perf_counter()
        pixels = self._source(start, stop, device, will_be_reread=will_be_reread)
        self._spent.append(time.perf_counter() - start_time)
        return pixels

    def forget(self, start: int, stop: int) -> None:
        self._source.forget(start, stop)


@contextmanager
def timed_pixels(bag: Bag, spent: list[float]) -> Iterator[Bag]:
    """Give a bag whose pixels append to ``spent`` the seconds that the step waits for them."""
    yield dataclasses.replace(bag, pixels=TimedPixels(bag.pixels, spent))


def time_ways(
    ways: Sequence[Way], work: Work, store: PatchStore, *, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return median seconds, process CPU seconds and share of waiting of each way, in ABBA order."""
    device = torch.device(work.device)
    models = {way.name: build_model(work, way) for way in ways}
    times: dict[str, list[tuple[float, float, float]]] = {way.name: [] for way in ways}
    for number in range(-2, rounds):  # two to warm up: the first measures the graph of a chunk
        for way in ways if number % 2 == 0 else list(reversed(ways)):
            waits: list[float] = []
            with timed_pixels(make_update(store, [work.patches], work, way), waits) as bag:
                synchronise(device)
                wall, cpu = time.perf_counter(), time.process_time()
                gradients(models[way.name], bag, way, device)
                synchronise(device)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number >= 0:
                times[way.name].append((wall, cpu, sum(waits) / wall))
            models[way.name].zero_grad(set_to_none=True)
    medians = {k: [statistics.median(c) for c in zip(*v, strict=True)] for k, v in times.items()}
    return {
        name: {
            "patches_per_s": round(work.patches / wall, 1),
            "seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "waiting": round(wait, 4),
        }
        for name, (wall, cpu, wait) in medians.items()
    }


def measure_memory(work: Work, way: Way, store: PatchStore, threads: int) -> dict[str, Any]:
    """Return :func:`step_memory` as measured in a fresh interpreter."""
    return call_in_fresh_process(
        step_memory,
        {
            "work": dataclasses.asdict(work),
            "way": dataclasses.asdict(way),
            "store": str(store.path),
        },
        label=way.name,
        threads=threads,
        environment={"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": MALLOC_SETTINGS},
    )


def step_memory(work: dict[str, Any], way: dict[str, Any], store: str) -> dict[str, Any]:
    """Return the peak bytes of one step above those held before, its seconds and gradient norm.

    Parameters
    ----------
    work, way
        Fields of a :class:`Work` and a :class:`Way`.
    store
        Path of a store of :func:`write_store`. The step on its smallest slide comes first, so that
        libraries are loaded and gradients exist.
    """
    return _step_memory(Work(**work), Way(**way), PatchStore(Path(store)))


def _step_memory(work: Work, way: Way, store: PatchStore) -> dict[str, Any]:
    device = torch.device(work.device)
    model = build_model(work, way)
    small = min(store.num_patches(slide) for slide in store.slides)
    gradients(model, make_update(store, [small], work, way), way, device)
    before, gpu_before = process_memory(), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        gpu_before = torch.cuda.memory_allocated()
    else:
        reset_peak_memory()
    start = time.perf_counter()
    bag = make_update(store, [work.patches], work, way)
    grads = gradients(model, bag, way, device)
    synchronise(device)
    seconds = time.perf_counter() - start
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() - gpu_before if on_gpu else peak_above(before)
    norm = float(sum(g.double().square().sum() for g in grads.values()) ** 0.5)
    jpegs = store.read(f"n{work.patches}", range(min(64, work.patches)))
    jpeg = sum(map(len, jpegs)) / len(jpegs)
    return {"peak": peak, "seconds": seconds, "jpeg_bytes": jpeg, "gradient_norm": norm}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through ``points``."""
    x, y = np.array(points, dtype=np.float64).T
    return float(np.polyfit(x, y, 1)[0])
