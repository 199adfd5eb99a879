"""Speed and memory of the patch stream, beside other ways of making the same pixels.

  tools/bench/bench_loader.py --store FILE.lmdb  # read, decode, augment, all together; other loaders
  tools/bench/bench_loader.py --slides A.svs B.svs  # the same on slides that are cut first
  tools/bench/bench_loader.py --store FILE.lmdb --check  # all that the stream must show; exit 1 if short
  tools/bench/bench_loader.py --check --rows overhead cold  # some of it

Patches of real tissue come from a store of tools/pack_lmdb.py, or from slides; without either they are
drawn, which the first line says. They are few, so a bench store repeats them. All ways run in one process
on one core, in ABBA order; times are medians, ratios medians of the rounds' ratios, of CPU seconds.
Memory, cold reads and two workers have processes of their own. JSON lines, then a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import ctypes
import io
import json
import mmap
import os
import pickle
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, zip_longest
from multiprocessing import active_children, get_context
from typing import Any, NamedTuple

import lmdb
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from e2e.bags.loader import TrainingLoader, full_bag
from e2e.bags.prefetch import AHEAD, prefetch
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.encoders.base import Encoder
from e2e.errors import UserError, exit_code
from e2e.images.augment import Augment
from e2e.images.decode import build_decoder
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.pack import pack
from e2e.store.records import SlideRecord
from e2e.store.sources import SlideFiles
from e2e.wsi.tiling import Tiling

Pixels = Iterator[Tensor]
"""Chunk after chunk, (n,3,H,W) each."""

CPU = torch.device("cpu")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class OtherPixelsError(UserError):
    """Two ways do not make the same pixels, so neither is faster than the other."""


# --- what is measured on --------------------------------------------------------------------------


def tissue(args: argparse.Namespace, folder: Path) -> tuple[list[bytes], str]:
    """JPEGs of ``args.size`` px, and where they are from."""
    if args.store is None and args.slides is None:
        return drawn(args.size), "drawn, not real tissue (give --store or --slides)"
    store = PatchStore(args.store) if args.store else cut_slides(args, folder)
    sides = {slide: store.record(slide).patch_px for slide in store.slides}
    fits = [slide for slide, side in sides.items() if side == args.size]
    if not fits:
        raise UserError(
            f"{store.path} holds no patches of {args.size} px, but of {sorted(set(sides.values()))}\n"
            "  give --size"
        )
    # Some thousands are enough for the bench store, which repeats them.
    jpegs = [jpeg for slide in fits for jpeg in store.read(slide, range(store.num_patches(slide)))][
        :4096
    ]
    return jpegs, f"{len(jpegs)} patches of {len(fits)} slides of {store.path.name}"


def cut_slides(args: argparse.Namespace, folder: Path) -> PatchStore:
    """A store of ``args.slides``; UserError where one cannot be cut."""
    stated = {path.name: args.slide_mpp for path in args.slides if args.slide_mpp}
    source = SlideFiles(args.slides, Tiling(patch_px=args.size), 80, stated)
    report = pack(source, folder / "slides.lmdb", workers=0)
    if report.problems:
        row = report.problems[0]
        raise UserError(
            f"slide '{row.slide}' cannot be cut: {row.reason}\n"
            "  --slide-mpp gives um per level-0 pixel where files do not"
        )
    return PatchStore(report.out)


def drawn(side: int) -> list[bytes]:
    """Patches of the toy cohort's tissue."""
    from PIL import Image

    from e2e.toy.paint import SlideSpec, paint

    found = []
    for number in range(2):
        spec = SlideSpec(f"bench_{number}", f"bench_{number}", "train", "normal")
        image = paint(spec, "micro", 1024, 0).image
        for y in range(0, 1025 - side, side):
            for x in range(0, 1025 - side, side):
                buffer = io.BytesIO()
                Image.fromarray(image[y : y + side, x : x + side]).save(buffer, "JPEG", quality=80)
                found.append(buffer.getvalue())
    return sorted(found, key=len)[len(found) // 2 :]  # the rest may be empty ground


def write_store(path: Path, jpegs: Sequence[bytes], counts: Mapping[str, int], side: int) -> None:
    """A store with slides of so many patches, ``jpegs`` over and over in each."""
    with StoreWriter(path, {"mpp": 0.5, "patch_px": side}) as writer:
        for slide, count in counts.items():
            grid = np.stack(np.divmod(np.arange(count), 200), axis=1) * side
            record = SlideRecord(
                slide=slide,
                num_patches=count,
                coords=grid.astype(np.int32),
                level0_px=float(side),
                mpp=0.5,
                patch_px=side,
                width=200 * side,
                height=(count // 200 + 1) * side,
                source="repeated",
                source_bytes=0,
            )
            writer.add(record, (jpegs[k % len(jpegs)] for k in range(count)))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    patches: int = 1024
    """Of a timed round."""
    chunk: int = 256
    """As ``engine.chunk`` is by default."""
    rounds: int = 9
    crop: float = 0.25
    """Least area of the random resized crop, where there is one."""
    out: int = 224
    """Side after it."""
    long: int = 50_000
    """Patches of the slide whose memory is measured."""
    cold_gib: float = 2.0
    """Least size of the store that is read cold."""
    cold_patches: int = 2000
    """Of each slide that is read cold."""
    decoder: str = "auto"


class Bench:
    """The patches, and stores of them in a folder that is thrown away."""

    def __init__(
        self, folder: Path, jpegs: Sequence[bytes], side: int, sizes: Sizes, cores: Sequence[int]
    ) -> None:
        self.folder, self.side, self.sizes, self.cores = folder, side, sizes, cores
        self.some = jpegs
        self.jpegs = [jpegs[k % len(jpegs)] for k in range(sizes.patches)]

    @cached_property
    def store(self) -> PatchStore:
        """With one slide ``n<patches>``: the name tools/bench/bench_step.py gives such a slide."""
        counts = {self.slide: self.sizes.patches}
        path = self.folder / "bench.lmdb"
        write_store(path, self.jpegs, counts, self.side)
        return PatchStore(path)

    @property
    def slide(self) -> str:
        """Of ``store``."""
        return f"n{self.sizes.patches}"

    @cached_property
    def large(self) -> Path:
        """A store of ``long``, and slides ``c0``, ``c1``, ... up to the size that is read cold.

        Never opened in this process, which would keep pages of it in memory.
        """
        # LMDB gives a value of some KB whole pages, with 16 bytes before it.
        pages = [-(-(len(jpeg) + 16) // mmap.PAGESIZE) for jpeg in self.some]
        each = statistics.mean(pages) * mmap.PAGESIZE
        rest = self.sizes.cold_gib * 2**30 - each * self.sizes.long
        count = max(2 * COLD_ROUNDS, int(rest / each / self.sizes.cold_patches) + 1)
        counts = {"long": self.sizes.long}
        counts |= {f"c{k}": self.sizes.cold_patches for k in range(count)}
        path = self.folder / "large.lmdb"
        write_store(path, self.some, counts, self.side)
        return path

    @cached_property
    def published(self) -> Path:
        """``store`` as the ABMILX project lays it out: keys slide-index, values pickled JPEG bytes."""
        path = self.folder / "published.lmdb"
        with (
            lmdb.open(str(path), subdir=False, map_size=1 << 40) as env,
            env.begin(write=True) as t,
        ):
            for index, jpeg in enumerate(self.jpegs):
                t.put(f"{self.slide}-{index}".encode(), pickle.dumps(jpeg))
        return path

    def starts(self) -> range:
        """Where chunks begin."""
        return range(0, self.sizes.patches, self.sizes.chunk)

    def reader(
        self, augment: Augment | None = None, *, decoder: str | None = None, keep: str | None = None
    ) -> PixelRowReader:
        """Of training; without ``augment`` the patches as they are."""
        made = build_decoder(decoder or self.sizes.decoder)
        return PixelRowReader(made, augment=augment or Augment(flip="none"), keep=keep)


# --- ways of making pixels ------------------------------------------------------------------------


def item_of(store: PatchStore, slide: str) -> LabelledSlide:
    """As the training loader has it."""
    return LabelledSlide(Slide(slide, slide, "train", {}), store, torch.tensor(0))


def ours(bench: Bench, reader: PixelRowReader, epochs: int = 1) -> Pixels:
    """The real training path: loader, pixels ahead, chunk after chunk, epoch after epoch."""
    view = BagSpec(reader)
    # Cuts of exactly ``chunk``, so that all ways make the same chunks.
    items = [item_of(bench.store, bench.slide)]
    loader = TrainingLoader(items, view, bags=1, chunk=bench.sizes.chunk, fixed_size_chunks=True)
    bags = chain.from_iterable(loader.epoch(k, rank=0, world_size=1) for k in range(epochs))
    for bag, _ in prefetch(bags, CPU):
        for chunk in bag.chunks:
            yield bag.pixels(chunk.start, chunk.stop, CPU)


class Library(NamedTuple):
    """A JPEG library by itself, set to the exact transform."""

    name: str
    """Also the decoder of ours that uses it."""
    fresh: Callable[[bytes], NDArray[np.uint8]]
    into: Callable[[bytes, NDArray[np.uint8]], Any]


def simplejpeg_library(**options: Any) -> Library:
    """``options`` in place of the exact ones."""
    from simplejpeg import decode_jpeg

    exact = {"colorspace": "RGB", "fastdct": False, "fastupsample": False} | options
    fresh = partial(decode_jpeg, **exact)
    return Library("simplejpeg", fresh, lambda jpeg, row: fresh(jpeg, buffer=row))


def turbojpeg_library() -> Library | None:
    """None where the system has none."""
    try:
        import turbojpeg

        decode = partial(turbojpeg.TurboJPEG().decode, pixel_format=turbojpeg.TJPF_RGB)
    except (ImportError, RuntimeError, OSError):
        return None
    return Library("turbojpeg", decode, lambda jpeg, row: decode(jpeg, dst=row))


def bare(bench: Bench, library: Library) -> Pixels:
    """Decoding alone: JPEG bytes at hand, one slab for all chunks."""
    side = bench.side
    slab = np.empty((bench.sizes.chunk, side, side, 3), np.uint8)
    for start in bench.starts():
        part = bench.jpegs[start : start + bench.sizes.chunk]
        for jpeg, row in zip(part, slab, strict=False):
            library.into(jpeg, row)
        yield torch.from_numpy(slab[: len(part)]).permute(0, 3, 1, 2)


def reference(bench: Bench, library: Library) -> Pixels:
    """The published loader's way, from its description: per patch get, copy, unpickle, decode,
    transpose, and assign into float32, channels last.

    In its favour: chunk by chunk and not a bag at once, and without the copies that its multi-scale
    dataset, its collation and its pinning add.
    """
    side, path = bench.side, str(bench.published)
    flags = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
    with lmdb.open(path, subdir=False, **flags) as env, env.begin(buffers=True) as txn:
        for start in bench.starts():
            stop = min(start + bench.sizes.chunk, bench.sizes.patches)
            images = torch.empty(stop - start, 3, side, side)
            images = images.contiguous(memory_format=torch.channels_last)
            for index in range(start, stop):
                value: Any = txn.get(f"{bench.slide}-{index}".encode())
                jpeg = pickle.loads(value.tobytes())  # written by this very program
                pixels = library.fresh(jpeg).transpose(2, 0, 1)
                images[index - start] = torch.from_numpy(pixels)
            yield images


class Normalise(Encoder):
    """The normalisation that every encoder begins with, and nothing else."""

    def features(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`."""
        return images


def normalised(pixels: Pixels) -> Pixels:
    """As encoders do it."""
    encoder = Normalise(MEAN.flatten().tolist(), STD.flatten().tolist())
    return map(encoder, pixels)


class PerPatch(torch.utils.data.Dataset[Tensor]):
    """PIL and torchvision v2, patch by patch, in the order its documentation recommends."""

    def __init__(self, jpegs: Sequence[bytes], windows: NDArray[np.float64], size: int) -> None:
        self.jpegs, self.size = jpegs, size
        self.windows = whole_pixels(windows).tolist()

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image
        from torchvision.transforms.v2 import functional as v2

        left, top, width, height = self.windows[index]
        image = v2.to_image(Image.open(io.BytesIO(self.jpegs[index])).convert("RGB"))
        image = v2.resized_crop(image, top, left, height, width, [self.size, self.size])
        image = v2.to_dtype(image, torch.float32, scale=True)
        return v2.normalize(image, MEAN.flatten().tolist(), STD.flatten().tolist())


def per_patch(
    bench: Bench, windows: NDArray[np.float64], *, workers: int
) -> torch.utils.data.DataLoader[Tensor]:
    """A ``DataLoader`` over :class:`PerPatch`; with a worker, that makes pixels ahead as ours does.

    The worker starts with the first pass and stays.
    """
    return torch.utils.data.DataLoader(
        PerPatch(bench.jpegs, windows, bench.sizes.out),
        batch_size=bench.sizes.chunk,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )


def resized_by_pillow(bench: Bench, windows: NDArray[np.float64]) -> Pixels:
    """The crops of the very windows, by Pillow's antialiased bilinear filter, normalised."""
    from PIL import Image

    for start in bench.starts():
        found = []
        for jpeg, (left, top, width, height) in zip(
            bench.jpegs[start : start + bench.sizes.chunk], windows[start:], strict=False
        ):
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
            box = np.clip([left, top, left + width, top + height], 0, bench.side).tolist()
            size = (bench.sizes.out, bench.sizes.out)
            small = image.resize(size, Image.Resampling.BILINEAR, box=tuple(box))
            found.append(np.asarray(small))
        pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)
        yield (pixels.float() / 255 - MEAN) / STD


def whole_pixels(windows: NDArray[np.float64]) -> NDArray[np.int64]:
    """The nearest windows that torchvision can cut."""
    first = np.rint(windows[:, :2])
    last = np.rint(windows[:, :2] + windows[:, 2:])
    return np.concatenate([first, last - first], axis=1).astype(np.int64)


def windows_of(bench: Bench, augment: Augment) -> NDArray[np.float64]:
    """(n,4) left, top, width, height that ``augment`` draws for the patches, in pixels.

    Read off pictures whose red and green are their pixels' x and y: so no draw is repeated here.
    """
    side, out = bench.side, augment.size or bench.side
    if side > 256:
        raise UserError(f"--size {side}: windows are read off 8-bit pictures; give 256 or less")
    ramp = torch.arange(side, dtype=torch.uint8)
    x, y = ramp.expand(side, side), ramp.view(-1, 1).expand(side, side)
    picture = torch.stack([x, y, x]).unsqueeze(0)
    rows = BagSpec(bench.reader()).rows(item_of(bench.store, bench.slide), 0)[0][0]
    inside = np.arange(out // 4, out - out // 4)  # where no border is repeated
    found = []
    for start in bench.starts():
        seeds = rows.part(start, start + bench.sizes.chunk).seeds()
        seen = augment(picture.expand(len(seeds), -1, -1, -1), seeds)
        levels = seen.double().numpy() * (255 if seen.is_floating_point() else 1)
        along = np.concatenate([levels[:, 0, out // 2, inside], levels[:, 1, inside, out // 2]])
        # Pixel k of the result shows the place corner + step * (k + 1/2) - 1/2.
        step, corner = np.polyfit(inside + 0.5, along.T + 0.5, 1).reshape(2, 2, -1)
        found.append(np.stack([*corner, *step * out], 1))
    return np.concatenate(found)


def dali(bench: Bench, *, crop: bool) -> Callable[[], Pixels]:
    """NVIDIA DALI on the CPU: decode, and on request its own random resized crop.

    Raises:
        ImportError: it is not here.
    """
    import nvidia.dali.fn
    import nvidia.dali.types

    library: Any = nvidia.dali  # its own type hints do not hold
    arrays = [np.frombuffer(jpeg, np.uint8) for jpeg in bench.jpegs]
    batches = [arrays[start : start + bench.sizes.chunk] for start in bench.starts()]

    @library.pipeline_def(batch_size=bench.sizes.chunk, num_threads=1, device_id=None, seed=0)
    def pipeline() -> Any:
        jpegs = library.fn.external_source(lambda k: batches[k % len(batches)], batch=True)
        images = library.fn.decoders.image(
            jpegs, device="cpu", output_type=library.types.RGB, use_fast_idct=False
        )
        size = [bench.sizes.out] * 2
        return library.fn.random_resized_crop(images, size=size) if crop else images

    built = pipeline()
    built.build()

    def made() -> Pixels:
        for _ in batches:
            (images,) = built.run()
            yield torch.from_numpy(np.array(images.as_array())).permute(0, 3, 1, 2)

    return made


# --- time -----------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Of one way, a number a round."""

    cpu: list[float]
    wall: list[float]

    def line(self, patches: int) -> dict[str, float]:
        """For the record."""
        return {
            "patches_per_s": round(patches / statistics.median(self.wall), 1),
            "cpu_us_a_patch": round(1e6 * statistics.median(self.cpu) / patches, 1),
        }


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Of ``a`` to ``b``: the median over the rounds, in which both had the same neighbours."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def spread(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Between which half of the rounds' ratios lie."""
    low, high = np.percentile([x / y for x, y in zip(a, b, strict=True)], [25, 75])
    return float(low), float(high)


def cpu_seconds() -> float:
    """Of this process and of its children that live."""
    # The clock of another process by its id: clock_getcpuclockid(3) makes the same number.
    clocks = [~child.pid << 3 | 2 for child in active_children() if child.pid]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def time_ways(ways: Mapping[str, Callable[[], Iterable[object]]], rounds: int) -> dict[str, Times]:
    """CPU seconds and seconds of each way in each round, in ABBA order, after one to warm up."""
    found = {name: Times([], []) for name in ways}
    for number in range(-1, rounds):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in ways[name]():
                pass
            if number >= 0:
                found[name].cpu.append(cpu_seconds() - cpu)
                found[name].wall.append(time.perf_counter() - wall)
    return found


def stages(bench: Bench, augment: Augment) -> dict[str, Callable[[], Iterable[object]]]:
    """Read, decode, augment, each by itself chunk by chunk; and all of them, as training has them."""
    reader, store, chunk = bench.reader(augment), bench.store, bench.sizes.chunk
    rows = BagSpec(reader).rows(item_of(store, bench.slide), 0)[0][0]
    parts = [rows.part(start, start + chunk) for start in bench.starts()]
    jpegs = [store.read(part.slide, part.indices) for part in parts]
    decoded = [reader.decoder.decode(part, CPU) for part in jpegs]
    return {
        "read": lambda: (store.read(part.slide, part.indices) for part in parts),
        "decode": lambda: (reader.decoder.decode(part, CPU) for part in jpegs),
        "augment": lambda: (
            augment(pixels, part.seeds()) for pixels, part in zip(decoded, parts, strict=True)
        ),
        "all together": lambda: ours(bench, reader),
    }


def difference(a: Pixels, b: Pixels) -> tuple[float, float]:
    """Greatest and mean absolute difference; OtherPixelsError where the shapes differ."""
    most, total, count = 0.0, 0.0, 0
    for x, y in zip_longest(a, b, fillvalue=torch.empty(0)):
        if x.shape != y.shape:
            raise OtherPixelsError(f"chunks of {tuple(x.shape)} and {tuple(y.shape)}")
        gap = (x.float() - y.float()).abs()
        most, total, count = (
            max(most, float(gap.max())),
            total + float(gap.sum()),
            count + x.numel(),
        )
    return most, total / count


def require_same(what: str, a: Pixels, b: Pixels) -> None:
    """OtherPixelsError unless all values are equal: no ratio is given for other pixels."""
    most, mean = difference(a, b)
    if most:
        raise OtherPixelsError(f"{what}: pixels differ by up to {most:g}, {mean:.3g} in the mean")


# --- processes of their own -----------------------------------------------------------------------


def alone(what: str, **spec: Any) -> dict[str, Any]:
    """The JSON that ``CHILDREN[what]`` gives in a fresh interpreter."""
    command = [sys.executable, __file__, "--one", json.dumps({"what": what, **spec})]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{what}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def stream_memory(store: str, chunk: int, decoder: str, view: str) -> dict[str, Any]:
    """Peak bytes above what the process held before, while the slide ``long`` streams by.

    Args:
        view: ``evaluation``; ``training``, every chunk to be asked for again, with its JPEG bytes
            kept; ``at once``, the whole slide's JPEG bytes before the first is decoded.
    """
    from bench_step import resident

    opened = PatchStore(store)
    keep = "jpeg" if view == "training" else None
    reader = PixelRowReader(build_decoder(decoder), augment=Augment(flip="none"), keep=keep)
    slide = item_of(opened, "long")
    side, count = opened.record("long").patch_px, opened.num_patches("long")
    warm = [(full_bag(item_of(opened, "c0"), BagSpec(reader), chunk), 0)]
    for bag, _ in prefetch(warm, CPU):
        bag.pixels(0, bag.chunks[0].stop, CPU)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    jpegs = opened.read("long", range(count)) if view == "at once" else []
    for bag, _ in prefetch(
        [(full_bag(slide, BagSpec(reader), chunk), 0)] if not jpegs else [], CPU
    ):
        for one in bag.chunks:
            bag.pixels(one.start, one.stop, CPU, will_be_reread=view == "training")
    after = resident()
    # Pages of the store's file are the page cache's, not ours.
    peak = (after["VmHWM"] - before["VmRSS"]) - (after["RssFile"] - before["RssFile"])
    each = statistics.mean(map(len, opened.read("long", range(min(count, 256)))))
    return {
        "peak": peak,
        "pixels": 3 * side * side * chunk,
        "jpeg_bytes": each,
        "patches": count,
        "ahead": AHEAD,
    }


def pages_in_memory(path: str) -> tuple[int, int]:
    """How many of a file's pages the page cache holds, by mincore, and how many it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        held = np.zeros(pages, np.uint8)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        if libc.mincore(address, len(mapped), held.ctypes.data):
            raise OSError(ctypes.get_errno(), "mincore", path)
    return int((held & 1).sum()), pages


def evict(path: str) -> None:
    """Have the page cache forget a file; UserError where it does not."""
    held, pages = 1, 1
    for _ in range(20):  # a page that something else looks at in that moment stays
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        held, pages = pages_in_memory(path)
        if not held:
            return
    raise UserError(
        f"{held} of {pages} pages of {path} stay in memory, so no read of it is cold\n"
        "  another process has it open, or its file system (tmpfs) is memory: set TMPDIR"
    )


def cold_read(store: str, slide: str, count: int, number: int, way: str) -> dict[str, Any]:
    """Seconds for a slide's patches, none of the file's pages in memory.

    Args:
        number: of the slide in the store.
        way: ``store``; or ``single``, random gets one by one with readahead off.
    """
    evict(store)
    held, pages = pages_in_memory(store)
    if way == "store":
        opened = PatchStore(store)
        began = time.perf_counter()
        jpegs = opened.read(slide, range(count))
    else:
        order = np.random.default_rng(0).permutation(count).tolist()
        flags = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
        with lmdb.open(store, subdir=False, **flags) as env, env.begin(buffers=True) as txn:
            began = time.perf_counter()
            get: Any = txn.get
            found = {k: bytes(get(b"p" + struct.pack(">II", number, k))) for k in order}
        jpegs = [found[k] for k in range(count)]
    seconds = time.perf_counter() - began
    after, _ = pages_in_memory(store)
    return {
        "seconds": seconds,
        "held_before": held,
        "held_after": after,
        "pages": pages,
        "digest": hash_of(jpegs),
    }


def hash_of(jpegs: Sequence[bytes]) -> str:
    """To tell that two ways read the same."""
    import hashlib

    return hashlib.blake2b(b"".join(jpegs), digest_size=8).hexdigest()


EPOCHS = 16
"""That two cores work on: at the end of all, one may wait for the other."""


def two_workers(
    store: str, slide: str, chunk: int, decoder: str, rounds: int, cores: list[int]
) -> dict[str, Any]:
    """Patches a second of the training path on two cores, and of two bare decode loops."""
    os.sched_setaffinity(0, cores)
    opened = PatchStore(store)
    sizes = Sizes(patches=opened.num_patches(slide), chunk=chunk, decoder=decoder)
    jpegs = opened.read(slide, range(sizes.patches))
    bench = Bench(Path(store).parent, jpegs, opened.record(slide).patch_px, sizes, cores)
    bench.__dict__["store"] = opened
    jpegs *= EPOCHS
    half = len(jpegs) // 2
    halves = [jpegs[:half], jpegs[half:]]
    context = get_context("spawn")  # forked, it would inherit locks of torch's threads
    with context.Pool(2) as pool, ThreadPoolExecutor(2) as threads:
        job = partial(decode_all, bench.side, chunk)
        ways: dict[str, Callable[[], Iterable[object]]] = {
            "ours": lambda: ours(bench, bench.reader(), EPOCHS),
            "one": lambda: [job(jpegs)],
            "processes": lambda: pool.map(job, halves, chunksize=1),
            "threads": lambda: threads.map(job, halves),
        }
        found = time_ways(ways, rounds)
    return {name: times.wall for name, times in found.items()}


def decode_all(side: int, chunk: int, jpegs: Sequence[bytes]) -> int:
    """A bare decode loop as :func:`bare` is one: JPEG bytes at hand, one slab for all chunks."""
    into = simplejpeg_library().into
    slab = np.empty((chunk, side, side, 3), np.uint8)
    for start in range(0, len(jpegs), chunk):
        for jpeg, row in zip(jpegs[start : start + chunk], slab, strict=False):
            into(jpeg, row)
    return len(jpegs)


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (stream_memory, cold_read, two_workers)
}
COLD_ROUNDS = 3
"""Each reads two slides that were not read before."""


# --- command line ---------------------------------------------------------------------------------


def report(bench: Bench) -> int:
    """The stages and the other loaders, a line each, then the table."""
    sizes = bench.sizes
    crop = Augment(crop=sizes.crop, size=sizes.out)
    library = turbojpeg_library() or simplejpeg_library()
    windows = windows_of(bench, Augment(flip="none", crop=sizes.crop, size=sizes.out))
    ways = {
        **{f"{name} (flip)": way for name, way in stages(bench, Augment()).items()},
        **{
            f"{name} (flip, crop to {sizes.out})": way
            for name, way in stages(bench, crop).items()
            if name in ("augment", "all together")
        },
        "bare decode loop, simplejpeg": partial(bare, bench, simplejpeg_library()),
        f"published loader's way, {library.name}": partial(reference, bench, library),
        f"DataLoader, PIL, torchvision v2 (crop to {sizes.out})": partial(
            iter, per_patch(bench, windows, workers=0)
        ),
    }
    try:
        ways["DALI on the CPU: decode"] = dali(bench, crop=False)
        ways["DALI on the CPU: decode, crop"] = dali(bench, crop=True)
    except ImportError as error:
        print(json.dumps({"way": "DALI", "skipped": str(error)}))
    table = Table("way", "patches/s", "CPU us a patch")
    for name, times in time_ways(ways, sizes.rounds).items():
        line = times.line(sizes.patches)
        print(json.dumps({"way": name, **line}), flush=True)
        table.add_row(name, f"{line['patches_per_s']:,.0f}", f"{line['cpu_us_a_patch']:,.0f}")
    Console().print(table)
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--store", type=Path, help="real patches, packed by tools/pack_lmdb.py")
    source.add_argument("--slides", type=Path, nargs="+", help="slides to cut patches from")
    parser.add_argument("--slide-mpp", type=float, help="um per level-0 pixel of --slides")
    parser.add_argument("--size", type=int, default=256, help="side of the patches (%(default)s)")
    for name, default in Sizes.__dataclass_fields__.items():
        kind = type(default.default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default.default)
    parser.add_argument("--check", action="store_true", help="every figure that must hold")
    parser.add_argument("--rows", nargs="+", help="--check: only these rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check or measure."""
    args = parse(argv)
    torch.set_num_threads(1)
    if args.one:
        spec = json.loads(args.one)
        print(json.dumps(CHILDREN[spec.pop("what")](**spec)))
        return 0
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    try:
        with tempfile.TemporaryDirectory() as folder:
            jpegs, origin = tissue(args, Path(folder))
            sizes = Sizes(**{name: getattr(args, name) for name in Sizes.__dataclass_fields__})
            bench = Bench(Path(folder), jpegs, args.size, sizes, cores)
            told = {"patches": origin, "bytes": round(statistics.mean(map(len, jpegs)))}
            print(json.dumps(told | {"load": os.getloadavg()[0]}), flush=True)
            if not args.check:
                return report(bench)
            from check_loader import check

            return check(args.rows, bench)
    finally:
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    sys.exit(exit_code(main))
