"""Speed and memory of a training step, ways of taking it side by side.

  tools/bench/bench_step.py  # naive, checkpoint, exact, exact that keeps graphs
  tools/bench/bench_step.py --compare exact naive exact  # a ratio, refused where the gradients differ
  tools/bench/bench_step.py --compare recipe fp32:precision=fp32 bf16:precision=bf16
  tools/bench/bench_step.py --patches 4096 --size 224 --chunk 256 --encoder r50 --device cuda
  tools/bench/bench_step.py --check [--long]  # all that the engine must show; exit 1 if short

A way is NAME, or NAME:key=value,... with the fields of ``Way``. Patches are JPEGs in a real store, read,
decoded and augmented by the training loader. All ways run in one process in ABBA order; medians. Every
memory figure comes from a process of its own. JSON lines, then a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
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
from e2e.errors import UserError, exit_code
from e2e.heads.base import HEADS
from e2e.images.augment import Augment
from e2e.images.decode import build_decoder
from e2e.parallel import autocast_dtype
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.records import SlideRecord

RETURNED = "glibc.malloc.mmap_threshold=1048576"
"""Freed tensors go back to the system at once. Else the peak is also of what the allocator holds back,
tens of MiB more or less from run to run."""
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One way of taking the step."""

    name: str
    mode: str = "exact"
    """``exact``: the engine. ``checkpoint``: the engine, every chunk kept, the encoder's own blockwise
    checkpointing. ``naive``: no engine; chunks one after the other, all graphs kept."""
    keep_graphs: str = "none"
    keep: str = "jpeg"
    batch_norm: str = "frozen"
    fold: bool = True
    channels_last: bool = True
    precision: str = "fp32"
    compile: bool = False
    cuda_graphs: bool = False
    """With ``compile``: replay CUDA graphs for chunks encoded twice."""
    drop_path: float = 0.0
    dropout: float = 0.0
    dtype: str = "float32"


KNOWN = {
    "naive": Way("naive", mode="naive"),
    "checkpoint": Way("checkpoint", mode="checkpoint"),
    "exact": Way("exact"),
    "kept": Way("kept", keep_graphs="64GiB"),
}


def parse_way(text: str) -> Way:
    """``exact`` or ``mine:precision=bf16,keep_graphs=4GiB``; UserError names what is unknown."""
    name, _, options = text.partition(":")
    way = KNOWN.get(name, Way(name))
    fields = {field.name: field.type for field in dataclasses.fields(Way) if field.name != "name"}
    for pair in filter(None, options.split(",")):
        key, equals, value = pair.partition("=")
        if key not in fields or not equals:
            raise UserError(f"'{pair}' in '{text}' is no option; known: {', '.join(fields)}")
        old = getattr(way, key)
        made = value == "true" if isinstance(old, bool) else type(old)(value)
        way = dataclasses.replace(way, **{key: made})
    if way.mode not in ("exact", "checkpoint", "naive"):
        raise UserError(f"mode={way.mode} in '{text}' must be exact, checkpoint or naive")
    return way


@dataclass(frozen=True)
class Work:
    """What is stepped on: the encoder and head, and the bag."""

    encoder: str = "r18"
    head: str = "abmilx"
    embed_dim: int = 512
    """Width inside the head; 0: none, it works on the features."""
    patches: int = 256
    size: int = 64
    chunk: int = 32
    device: str = "cpu"


def write_store(folder: Path, counts: Sequence[int], size: int) -> PatchStore:
    """A store with a slide ``n<count>`` for each count, of smooth noisy pictures as JPEGs."""
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(90, 250, (6, 6, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=80)
        jpegs.append(buffer.getvalue())
    path = folder / "bench.lmdb"
    with StoreWriter(path, {"mpp": 0.5, "patch_px": size}) as writer:
        for count in sorted(set(counts)):
            grid = np.stack(np.divmod(np.arange(count), 200), axis=1) * size
            record = SlideRecord(
                slide=f"n{count}",
                num_patches=count,
                coords=grid.astype(np.int32),
                level0_px=float(size),
                mpp=0.5,
                patch_px=size,
                width=200 * size,
                height=(count // 200 + 1) * size,
                source="drawn",
                source_bytes=0,
            )
            writer.add(record, (jpegs[k % 64] for k in range(count)))
    return PatchStore(path)


def bag_of(store: PatchStore, sizes: Sequence[int], work: Work, way: Way) -> Bag:
    """An update of slides of these sizes, as training has it: made in the background."""
    items = [
        LabelledSlide(Slide(f"n{n}", f"n{n}", "train", {}), store, torch.tensor(k % 2))
        for k, n in enumerate(sizes)
    ]
    view = BagSpec(PixelRowReader(build_decoder(), augment=Augment(), keep=way.keep))
    groups = cut_update(sizes, work.chunk, fixed_size=way.compile)
    bags = [(make_bag(items, view, assign_to_ranks(groups, 1)), None)]
    return next(prefetch(bags, torch.device(work.device)))[0]


def build_model(work: Work, way: Way) -> MILModel:
    """Encoder and head with random weights, and statistics that suit them."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"pretrained": False}
    if way.drop_path:
        options["drop_path"] = way.drop_path
    encoder = ENCODERS.build(work.encoder, **options)
    asked = {"dropout": way.dropout, "embed_dim": work.embed_dim or None}
    known = HEADS.options(work.head)
    model = MILModel(
        encoder,
        HEADS.build(work.head, encoder.dim, 2, **{k: v for k, v in asked.items() if k in known}),
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
    """Running statistics of noise, so that frozen BatchNorm normalises."""
    noise = torch.rand(16, 3, work.size, work.size, generator=torch.Generator().manual_seed(0))
    norms = model.batch_norm.modules
    for norm in norms:
        norm.momentum = None  # the mean over all batches, which is this one
        norm.reset_running_stats()
    model.encoder.train()
    model.encoder(noise.to(work.device))


def gradients(model: MILModel, bag: Bag, way: Way, device: torch.device) -> Gradients:
    """One step without the optimiser; the gradients stay in the model."""
    model.zero_grad(set_to_none=True)
    logits = (
        plain_logits(model, bag, device) if way.mode == "naive" else logits_of(model, bag, device)
    )
    losses = cross_entropy(logits, bag.target.to(device), reduction="none")
    (losses * bag.weight.to(device)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits_of(model: MILModel, bag: Bag, device: torch.device) -> Tensor:
    """Through the engine."""
    return torch.cat([output.logits for output in model(bag, device)])


def plain_logits(model: MILModel, bag: Bag, device: torch.device) -> Tensor:
    """What one would write without the engine: encode the chunks, pool."""
    cast = nullcontext()
    if model.autocast is not None:
        cast = torch.autocast(device.type, model.autocast)
    with cast:
        pieces = [model.encoder(bag.pixels(c.start, c.stop, device)) for c in bag.chunks]
        features, found = torch.cat(pieces), []
        for k, coords in enumerate(bag.coords):
            rows = features[bag.offsets[k] : bag.offsets[k + 1]].unsqueeze(0)
            mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=device)
            assert coords is not None
            found.append(model.head(rows, mask, coords.to(device).unsqueeze(0)).logits)
    return torch.cat(found).float() if model.autocast else torch.cat(found)


def apart(a: Gradients, b: Gradients) -> float:
    """Relative L2 distance of ``a`` from ``b`` over all gradients together."""
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
        began = time.perf_counter()
        pixels = self._source(start, stop, device, will_be_reread=will_be_reread)
        self._spent.append(time.perf_counter() - began)
        return pixels

    def forget(self, start: int, stop: int) -> None:
        self._source.forget(start, stop)


@contextmanager
def timed_pixels(bag: Bag, spent: list[float]) -> Iterator[Bag]:
    """A bag whose pixels count the seconds that the step waits for them."""
    yield dataclasses.replace(bag, pixels=TimedPixels(bag.pixels, spent))


def time_ways(
    ways: Sequence[Way], work: Work, store: PatchStore, *, rounds: int
) -> dict[str, dict[str, Any]]:
    """Median seconds, process CPU seconds and share of waiting of each way, in ABBA order."""
    device = torch.device(work.device)
    models = {way.name: build_model(work, way) for way in ways}
    found: dict[str, list[tuple[float, float, float]]] = {way.name: [] for way in ways}
    for number in range(-2, rounds):  # two to warm up: the first measures the graph of a chunk
        for way in ways if number % 2 == 0 else list(reversed(ways)):
            waits: list[float] = []
            with timed_pixels(bag_of(store, [work.patches], work, way), waits) as bag:
                synchronise(device)
                wall, cpu = time.perf_counter(), time.process_time()
                gradients(models[way.name], bag, way, device)
                synchronise(device)
                took = time.perf_counter() - wall, time.process_time() - cpu
            if number >= 0:
                found[way.name].append((*took, sum(waits) / took[0]))
            models[way.name].zero_grad(set_to_none=True)
    medians = {k: [statistics.median(c) for c in zip(*v, strict=True)] for k, v in found.items()}
    return {
        name: {
            "patches_per_s": round(work.patches / wall, 1),
            "seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "waiting": round(wait, 4),
        }
        for name, (wall, cpu, wait) in medians.items()
    }


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_memory(spec: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of one step above what the process held before; for a process of its own."""
    work, way = Work(**spec["work"]), Way(**spec["way"])
    store, device = PatchStore(Path(spec["store"])), torch.device(work.device)
    model = build_model(work, way)
    small = min(store.num_patches(slide) for slide in store.slides)
    gradients(model, bag_of(store, [small], work, way), way, device)  # libraries load, grads exist
    before = resident()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        start = 0
    began = time.perf_counter()
    bag = bag_of(store, [work.patches], work, way)
    found = gradients(model, bag, way, device)
    synchronise(device)
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - start
    else:
        # Pages of the store's file are the page cache's, not ours.
        after = resident()
        peak = (after["VmHWM"] - before["VmRSS"]) - (after["RssFile"] - before["RssFile"])
    norm = float(sum(g.double().square().sum() for g in found.values()) ** 0.5)
    jpegs = store.read(f"n{work.patches}", range(min(64, work.patches)))
    jpeg = sum(map(len, jpegs)) / len(jpegs)
    return {"peak": peak, "seconds": seconds, "jpeg_bytes": jpeg, "gradient_norm": norm}


def resident() -> dict[str, int]:
    """Bytes of this process: now, at most, and of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0].startswith(("Vm", "Rss"))
    }


def memory_of(work: Work, way: Way, store: PatchStore, threads: int) -> dict[str, Any]:
    """:func:`measure_memory` in a fresh interpreter."""
    spec = {
        "work": dataclasses.asdict(work),
        "way": dataclasses.asdict(way),
        "store": str(store.path),
    }
    command = [sys.executable, __file__, "--one", json.dumps(spec), "--threads", str(threads)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": RETURNED},
    )
    if done.returncode:
        raise UserError(f"{way.name}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line."""
    x, y = np.array(points, dtype=np.float64).T
    return float(np.polyfit(x, y, 1)[0])


def compare(ways: Sequence[Way], work: Work, args: argparse.Namespace, how: str) -> int:
    """Every way's speed over the first one's; ``exact`` gives none where the gradients differ."""
    device, first = torch.device(work.device), ways[0]
    bound = {"float64": 1e-12}.get(first.dtype, 1e-5)
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), [work.patches, 8], work.size)
        times = time_ways(ways, work, store, rounds=args.rounds)
        reference = gradients(
            build_model(work, first), bag_of(store, [work.patches], work, first), first, device
        )
        for way in ways[1:]:
            model = build_model(work, way)
            gap = apart(
                gradients(model, bag_of(store, [work.patches], work, way), way, device), reference
            )
            ratio = times[first.name]["cpu_seconds" if device.type == "cpu" else "seconds"]
            ratio = times[way.name]["cpu_seconds" if device.type == "cpu" else "seconds"] / ratio
            line: dict[str, Any] = {"way": way.name, "over": first.name, "gradient_difference": gap}
            if how == "exact" and not gap <= bound:
                refused += 1
                line["refused"] = f"not the same mathematics: over {bound:g}"
            else:
                line["time_ratio"] = round(ratio, 3)
            if how == "recipe":
                a, b = dataclasses.asdict(first), dataclasses.asdict(way)
                line["differs_in"] = {k: [a[k], b[k]] for k in a if a[k] != b[k] and k != "name"}
            print(json.dumps(line), flush=True)
    return 1 if refused else 0


def bench(ways: Sequence[Way], work: Work, args: argparse.Namespace) -> int:
    """Speed at one size and memory at several, a line each, then the table."""
    counts = sorted({*args.memory, work.patches, 2 * work.chunk})
    table = Table("way", "patches/s", "waiting", *(f"MiB at N = {n:,}" for n in args.memory))
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), counts, work.size)
        times = time_ways(ways, work, store, rounds=args.rounds)
        for way in ways:
            cells = []
            for count in args.memory:
                sized = dataclasses.replace(work, patches=count)
                found = memory_of(sized, way, store, args.threads)
                print(json.dumps({"way": way.name, "patches": count, **found}), flush=True)
                cells.append(f"{found['peak'] / 2**20:,.0f}")
            line = {
                "way": dataclasses.asdict(way),
                "work": dataclasses.asdict(work),
                **times[way.name],
            }
            print(json.dumps(line), flush=True)
            speed = times[way.name]
            table.add_row(
                way.name, f"{speed['patches_per_s']:,}", f"{speed['waiting']:.1%}", *cells
            )
    Console().print(table)
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ways", nargs="*", default=list(KNOWN), metavar="WAY")
    for field in dataclasses.fields(Work):
        kind: Callable[[str], Any] = int if isinstance(field.default, int) else str
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 256], help="sizes of bags")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the encoder")
    parser.add_argument("--compare", choices=("exact", "recipe"), help="ratios to the first way")
    parser.add_argument("--check", action="store_true", help="every figure that must hold")
    parser.add_argument("--rows", nargs="*", help="--check: only these rows")
    parser.add_argument("--long", action="store_true", help="--check: 20,000 patches at 224 px too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    """Compare, check or measure."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure_memory(json.loads(args.one))))
        return 0
    if args.check:
        from check_engine import check

        return check(args.rows, long=args.long, threads=args.threads)
    work = Work(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Work)})
    ways = [parse_way(text) for text in args.ways]
    if work.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    return compare(ways, work, args, args.compare) if args.compare else bench(ways, work, args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
