"""Acceptance check of the patch stream: speed, memory and cold reads; run by tools/bench/loader.py --check.

Each row compares a measured value with its bar and with a control (see tools/bench/rows.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from e2e.bags.prefetch import AHEAD
from e2e.errors import UserError
from e2e.images.augment import Augment
from e2e.images.decode import DECODERS, Decoder, build_decoder
from e2e.sizes import show_bytes
from tools.bench import engine, pixels, stream, timing
from tools.bench.patches import COLD_ROUNDS, Bench, Pixels
from tools.bench.rows import Row, report
from tools.bench.stream import OtherPixelsError


def parts(bench: Bench) -> Iterator[Row]:
    """Speed of each stage by itself and of all together."""
    sizes = bench.sizes
    for name, augment in (
        ("flips", Augment()),
        ("flips, crop", Augment(crop=sizes.crop, size=sizes.out)),
    ):
        stages = timing.time_ways(stream.stages(bench, augment), max(1, sizes.rounds // 3))
        lines = {stage: times.line(sizes.patches) for stage, times in stages.items()}
        speeds = ", ".join(f"{k} {v['patches_per_s']:,.0f}/s" for k, v in lines.items())
        spent = ", ".join(f"{k} {v['cpu_us_a_patch']:,.0f}" for k, v in lines.items())
        yield Row(f"training path, {name}", "reported", speeds, f"CPU us a patch: {spent}", None)


def overhead(bench: Bench) -> Iterator[Row]:
    """CPU time of all but the JPEG decode, relative to a bare decode loop of the same library."""
    library = pixels.simplejpeg_library()
    good = partial(pixels.training_pixels, bench, bench.reader(decoder=library.name))
    plain = partial(pixels.bare_loop, bench)
    stream.require_same("the training path and the bare loop", good(), plain(library))
    refused = _refusal(plain(pixels.simplejpeg_library(fastdct=True)), good())
    ways = {
        "bare": partial(plain, library),
        "training": good,
        "published": partial(pixels.published_loader, bench, library),
    }
    times = timing.time_ways(ways, bench.sizes.rounds)
    over, slow = (
        timing.ratio(times[name].cpu, times["bare"].cpu) - 1 for name in ("training", "published")
    )
    low, high = timing.spread(times["training"].cpu, times["bare"].cpu)
    decode = times["bare"].line(bench.sizes.patches)["cpu_us_a_patch"]
    yield Row(
        f"all but the decode, above a bare {library.name} loop ({decode:.0f} us a patch), equal pixels",
        "<= 10 % of it",
        f"{over:.1%} (half of the rounds {low - 1:.0%} to {high - 1:.0%})",
        f"the published loader's way: {slow:.0%}; fast DCT: {refused}",
        over <= 0.10 < slow and bool(refused),
    )


def reference(bench: Bench) -> Iterator[Row]:
    """Patches per CPU-second against the published loader's way."""
    library = pixels.turbojpeg_library() or pixels.simplejpeg_library()
    good = partial(pixels.training_pixels, bench, bench.reader(decoder=library.name))
    published = partial(pixels.published_loader, bench, library)
    stream.require_same("the training path and the published loader", good(), published())
    reversed_colours = pixels.simplejpeg_library(colorspace="BGR")
    refused = _refusal(good(), pixels.published_loader(bench, reversed_colours))
    ways = {"training": good, "published": published, "published again": published}
    times = timing.time_ways(ways, bench.sizes.rounds)
    gain = timing.ratio(times["published"].cpu, times["training"].cpu)
    null = timing.ratio(times["published"].cpu, times["published again"].cpu)
    system = "" if library.name == "turbojpeg" else "; no libturbojpeg on this system"
    yield Row(
        f"patches per CPU-second over the published loader's way, {library.name} in both{system}",
        ">= 1.3x, equal pixels",
        f"{gain:.2f}x",
        f"its own ratio to itself: {null:.2f}x; BGR: {refused}",
        gain >= 1.3 > null and bool(refused),
    )


def torchvision(bench: Bench) -> Iterator[Row]:
    """Against DataLoader, PIL and torchvision v2: the same crops patch by patch, normalised float32."""
    sizes = bench.sizes
    augment = Augment(flip="none", crop=sizes.crop, size=sizes.out)
    windows = pixels.windows_of(bench, augment)
    good = lambda: pixels.normalised(pixels.training_pixels(bench, bench.reader(augment)))  # noqa: E731
    loaders = {k: pixels.per_patch(bench, windows, workers=k) for k in (0, 1)}
    others = pixels.per_patch(bench, np.roll(windows, 1, axis=0), workers=0)
    level = 255 * float(pixels.STD.mean())  # from normalised values to grey levels
    _, exact = stream.difference(good(), pixels.resized_by_pillow(bench, windows))
    _, rounded = stream.difference(good(), iter(loaders[1]))
    _, wrong = stream.difference(good(), iter(others))
    ways = {"training": good, "worker": lambda: loaders[1], "in process": lambda: loaders[0]}
    times = timing.time_ways(ways, sizes.rounds)
    gain = timing.ratio(times["worker"].cpu, times["training"].cpu)
    us = {name: way.line(sizes.patches)["cpu_us_a_patch"] for name, way in times.items()}
    yield Row(
        f"patches per CPU-second over DataLoader + PIL + torchvision v2, crop to {sizes.out}",
        f">= 3x; <= {MOST_LEVELS // 4} and {MOST_LEVELS} levels apart in the mean",
        f"{gain:.2f}x ({us['training']:.0f} and {us['worker']:.0f} us a patch); {exact * level:.2f} levels"
        f" from Pillow's crops of the same windows, {rounded * level:.2f} from torchvision's of whole pixels",
        f"its worker in this process: {us['in process']:.0f} us; the next patch's window:"
        f" {wrong * level:.1f} levels",
        gain >= 3 and max(4 * exact, rounded) * level <= MOST_LEVELS < wrong * level,
    )


MOST_LEVELS = 4
"""Maximum mean difference in grey levels from torchvision's crops, whose windows are rounded to whole pixels.
A quarter of it holds for Pillow's crops of the same windows: its filter is antialiased."""


def handed_over(bench: Bench) -> Iterator[Row]:
    """Bytes that pass from the decoding threads to the trainer, and bytes kept for a second pass."""
    reader = bench.reader(keep="jpeg")
    recording = RecordingDecoder(reader.decoder)
    chunks = list(pixels.training_pixels(bench, replace(reader, decoder=recording)))
    pointers = {chunk.data_ptr() for chunk in recording.decoded}
    copied = sum(chunk.nbytes for chunk in chunks if chunk.data_ptr() not in pointers)
    each = sum(chunk.nbytes for chunk in chunks) / bench.sizes.patches
    jpeg = sum(map(len, bench.jpegs)) / bench.sizes.patches
    published = next(pixels.published_loader(bench, pixels.simplejpeg_library()))
    yield Row(
        "bytes a patch from the decoding threads to the trainer",
        "JPEG or uint8",
        f"{each:,.0f} of {str(chunks[0].dtype)[6:]}, {copied / bench.sizes.patches:,.0f} of them copied"
        f" after the decoder; kept for a second pass: {jpeg:,.0f} of JPEG",
        f"the published loader's way: {published.nbytes / len(published):,.0f} of {str(published.dtype)[6:]}",
        chunks[0].dtype is torch.uint8 and not copied and published.dtype is torch.float32,
    )


class RecordingDecoder(Decoder):
    """A decoder that keeps what ``inner`` decoded, so that copies of it can be recognised."""

    def __init__(self, inner: Decoder) -> None:
        self.inner = inner
        self.decoded: list[torch.Tensor] = []

    def decode(self, *args: Any, **options: Any) -> torch.Tensor:
        """See :class:`Decoder`."""
        self.decoded.append(self.inner.decode(*args, **options))
        return self.decoded[-1]


def cold(bench: Bench) -> Iterator[Row]:
    """Reading a slide's patches from a file of which no page is in memory."""
    path, count = bench.large, bench.sizes.cold_patches
    seconds: dict[str, list[float]] = {"store": [], "single": []}
    after = []
    fresh = iter(range(2 * COLD_ROUNDS))
    for number in range(COLD_ROUNDS):
        digests = set()
        for way in ("store", "single") if number % 2 == 0 else ("single", "store"):
            k = next(fresh)
            measured = stream.measure(
                stream.cold_read,
                store=str(path),
                slide=f"c{k}",
                count=count,
                number=k + 1,  # in the order of writing: the long one was first
                way=way,
            )
            seconds[way].append(measured["seconds"])
            digests.add(measured["digest"])
            after.append(measured["held_after"])
        if len(digests) != 1:
            raise OtherPixelsError("cold: the two ways read different bytes")
    gain = timing.ratio(seconds["single"], seconds["store"])
    rates = {way: count / sorted(times)[len(times) // 2] for way, times in seconds.items()}
    yield Row(
        f"cold read of {count:,} patches of a slide, store of {show_bytes(path.stat().st_size)}",
        ">= 5x random single gets, readahead off",
        f"{gain:.1f}x ({rates['store']:,.0f} and {rates['single']:,.0f} patches/s)",
        f"pages in memory by mincore: 0 before each, {min(after):,} or more after",
        gain >= 5 and min(after) > 0 and path.stat().st_size >= bench.sizes.cold_gib * 2**30,
    )


def workers(bench: Bench) -> Iterator[Row]:
    """The training path on two cores against two bare decode loops."""
    if len(bench.cores) < 2:
        yield Row("two workers", ">= 0.9", "skipped: one core", "-", None)
        return
    sizes = bench.sizes
    walls = stream.measure(
        stream.two_workers,
        store=str(bench.store.path),
        slide=bench.slide,
        chunk=sizes.chunk,
        decoder=sizes.decoder,
        rounds=sizes.rounds,
        cores=list(bench.cores[:2]),
    )
    best = min(("threads", "processes"), key=lambda name: float(np.median(walls[name])))
    share = timing.ratio(walls[best], walls["training"])
    one = timing.ratio(walls[best], walls["one"])
    num_patches = sizes.patches * stream.EPOCHS
    speeds = {name: f"{num_patches / np.median(wall):,.0f}/s" for name, wall in walls.items()}
    busy = " - no slower than two, so the second core is busy" if one >= 0.9 else ""
    yield Row(
        f"2 cores against two bare decode loops ({best}: {speeds[best]})",
        ">= 0.9",
        f"{share:.2f} ({speeds['training']})",
        f"one bare loop: {one:.2f} ({speeds['one']}){busy}",
        share >= 0.9 > one,
    )


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of a process that streams a long slide, against what the stream documents."""
    store, sizes = str(bench.large), bench.sizes
    spec = {"store": store, "chunk": sizes.chunk, "decoder": sizes.decoder}
    control = stream.measure(stream.stream_memory, mode="at once", **spec)
    for mode in ("evaluation", "training"):
        measured = stream.measure(stream.stream_memory, mode=mode, **spec)
        held_patches = (AHEAD + 1) * sizes.chunk if mode == "evaluation" else sizes.long
        jpegs = measured["jpeg_bytes"] * held_patches
        bound = (AHEAD + 1) * measured["pixels"] + jpegs
        suffix = "" if mode == "evaluation" else ", the slide's JPEG bytes kept"
        yield Row(
            f"memory of a slide of {sizes.long:,} patches, {mode}{suffix}",
            f"<= {AHEAD + 1} chunks of pixels and those JPEG bytes, {show_bytes(bound)},"
            f" and {show_bytes(SLACK)}",
            show_bytes(measured["peak"]),
            f"JPEG bytes read at once: {show_bytes(control['peak'])}",
            measured["peak"] <= bound + SLACK
            and (mode == "training" or control["peak"] > bound + SLACK),
        )


SLACK = 32 << 20
"""Bytes that allocators and libraries may hold besides."""


def dali(bench: Bench) -> Iterator[Row]:
    """NVIDIA DALI's pipeline on the CPU, side by side."""
    try:
        decode, crop = (pixels.dali(bench, crop=crop) for crop in (False, True))
    except ImportError as error:
        yield Row("DALI on the CPU", "reported", f"skipped: {error}", "-", None)
        return
    cropping = bench.reader(Augment(flip="none", crop=bench.sizes.crop, size=bench.sizes.out))
    most, mean = stream.difference(decode(), pixels.training_pixels(bench, bench.reader()))
    ways = {
        "decode, training path": partial(pixels.training_pixels, bench, bench.reader()),
        "decode, DALI": decode,
        "and crop, training path": partial(pixels.training_pixels, bench, cropping),
        "and crop, DALI (its own crops)": crop,
    }
    all_times = timing.time_ways(ways, max(1, bench.sizes.rounds // 3))
    count = bench.sizes.patches
    speeds = {name: f"{count / np.median(times.cpu):,.0f}" for name, times in all_times.items()}
    yield Row(
        "DALI on the CPU, images per CPU-second",
        "reported",
        ", ".join(f"{name} {speed}" for name, speed in speeds.items()),
        f"decoded pixels differ by up to {most:g}, {mean:.3g} in the mean",
        None,
    )


def gpu(bench: Bench) -> Iterator[Row]:
    """Decoders to a GPU side by side, and the share of an r18 step that waits for pixels."""
    if not torch.cuda.is_available():
        yield Row("decoders for a GPU; r18 step", "waiting < 5 %", "skipped: no GPU", "-", None)
        return
    os.sched_setaffinity(0, bench.cores)
    device, sizes = torch.device("cuda"), bench.sizes
    for name in DECODERS.names():
        try:
            decoder = build_decoder(name)
            decoder.decode(bench.jpegs[:2], device)
        except UserError as error:
            yield Row(
                f"{name} to the GPU", "reported", f"skipped: {error}".split("\n")[0], "-", None
            )
            continue
        speed = _gpu_speed(bench, decoder, device)
        yield Row(f"{name} to the GPU", "reported", f"{speed:,.0f} img/s", "-", None)
    work = engine.Work(patches=sizes.patches, size=bench.side, chunk=sizes.chunk, device="cuda")
    way = engine.Way("exact", precision="bf16")
    step = engine.time_ways([way], work, bench.store, rounds=sizes.rounds)["exact"]
    yield Row(
        f"r18 step waits for pixels, {sizes.patches} patches, bf16, {len(bench.cores)} cores",
        "< 5 %",
        f"{step['waiting']:.1%} of {step['patches_per_s']:,} patches/s",
        "-",
        step["waiting"] < 0.05,
    )
    os.sched_setaffinity(0, bench.cores[-1:])


def _gpu_speed(bench: Bench, decoder: Decoder, device: torch.device) -> float:
    def all_chunks() -> Iterator[object]:
        for start in bench.starts():
            yield decoder.decode(bench.jpegs[start : start + bench.sizes.chunk], device)
        torch.cuda.synchronize()

    times = timing.time_ways({"decode": all_chunks}, bench.sizes.rounds)["decode"]
    return bench.sizes.patches / float(np.median(times.wall))


def _refusal(a: Pixels, b: Pixels) -> str:
    """The message with which ``require_same`` refuses these two; empty if it accepts them."""
    try:
        stream.require_same("refused", a, b)
    except OtherPixelsError as error:
        return str(error)
    return ""


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    f.__name__: f
    for f in (
        parts, overhead, reference, torchvision, handed_over, cold, workers, memory, dali, gpu,
    )
}  # fmt: skip


def check(names: Sequence[str] | None, bench: Bench) -> int:
    """Print every row and return the exit code: 1 where one is short of its bar."""
    rows = {name: partial(make, bench) for name, make in ROWS.items()}
    cores = len(bench.cores)
    return report(rows, names, lambda: f", load {os.getloadavg()[0]:.1f} on {cores} cores")
