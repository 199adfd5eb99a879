"""The figures that the patch stream must show, a row each: what, bar, measured, control. Run by
bench_loader.py.

A control is the same measurement of something broken on purpose, or of the plain way: a check that
could not fail would say nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import bench_loader as bench
import numpy as np
import torch
from bench_loader import Bench, OtherPixelsError, Pixels
from check_engine import Row, report

from e2e.bags.prefetch import AHEAD
from e2e.errors import UserError
from e2e.images.augment import Augment
from e2e.images.decode import DECODERS, Decoder, build_decoder
from e2e.sizes import show_bytes


def parts(bench_: Bench) -> Iterator[Row]:
    """Each stage by itself and all together, for the record."""
    sizes = bench_.sizes
    for name, augment in (
        ("flips", Augment()),
        ("flips, crop", Augment(crop=sizes.crop, size=sizes.out)),
    ):
        found = bench.time_ways(bench.stages(bench_, augment), max(1, sizes.rounds // 3))
        lines = {stage: times.line(sizes.patches) for stage, times in found.items()}
        speeds = ", ".join(f"{k} {v['patches_per_s']:,.0f}/s" for k, v in lines.items())
        spent = ", ".join(f"{k} {v['cpu_us_a_patch']:,.0f}" for k, v in lines.items())
        yield Row(f"training path, {name}", "reported", speeds, f"CPU us a patch: {spent}", None)


def overhead(bench_: Bench) -> Iterator[Row]:
    """Everything but the JPEG decode, above the bare decode loop of the same library."""
    library = bench.simplejpeg_library()
    good = partial(bench.ours, bench_, bench_.reader(decoder=library.name))
    plain = partial(bench.bare, bench_)
    bench.require_same("ours and the bare loop", good(), plain(library))
    refused = _refusal(plain(bench.simplejpeg_library(fastdct=True)), good())
    ways = {
        "bare": partial(plain, library),
        "ours": good,
        "published": partial(bench.reference, bench_, library),
    }
    found = bench.time_ways(ways, bench_.sizes.rounds)
    over, slow = (
        bench.ratio(found[name].cpu, found["bare"].cpu) - 1 for name in ("ours", "published")
    )
    low, high = bench.spread(found["ours"].cpu, found["bare"].cpu)
    decode = found["bare"].line(bench_.sizes.patches)["cpu_us_a_patch"]
    yield Row(
        f"all but the decode, above a bare {library.name} loop ({decode:.0f} us a patch), equal pixels",
        "<= 10 % of it",
        f"{over:.1%} (half of the rounds {low - 1:.0%} to {high - 1:.0%})",
        f"the published loader's way: {slow:.0%}; fast DCT: {refused}",
        over <= 0.10 < slow and bool(refused),
    )


def reference(bench_: Bench) -> Iterator[Row]:
    """Patches per CPU-second against the published loader's way."""
    library = bench.turbojpeg_library() or bench.simplejpeg_library()
    good = partial(bench.ours, bench_, bench_.reader(decoder=library.name))
    theirs = partial(bench.reference, bench_, library)
    bench.require_same("ours and the published loader's way", good(), theirs())
    reversed_ = bench.simplejpeg_library(colorspace="BGR")
    refused = _refusal(good(), bench.reference(bench_, reversed_))
    ways = {"ours": good, "theirs": theirs, "theirs again": theirs}
    found = bench.time_ways(ways, bench_.sizes.rounds)
    gain = bench.ratio(found["theirs"].cpu, found["ours"].cpu)
    null = bench.ratio(found["theirs"].cpu, found["theirs again"].cpu)
    system = "" if library.name == "turbojpeg" else "; no libturbojpeg on this system"
    yield Row(
        f"patches per CPU-second over the published loader's way, {library.name} in both{system}",
        ">= 1.3x, equal pixels",
        f"{gain:.2f}x",
        f"its own ratio to itself: {null:.2f}x; BGR: {refused}",
        gain >= 1.3 > null and bool(refused),
    )


def torchvision(bench_: Bench) -> Iterator[Row]:
    """Against DataLoader, PIL and torchvision v2 patch by patch: the same crops, normalised float32."""
    sizes = bench_.sizes
    augment = Augment(flip="none", crop=sizes.crop, size=sizes.out)
    windows = bench.windows_of(bench_, augment)
    good = lambda: bench.normalised(bench.ours(bench_, bench_.reader(augment)))  # noqa: E731
    theirs = {k: bench.per_patch(bench_, windows, workers=k) for k in (0, 1)}
    others = bench.per_patch(bench_, np.roll(windows, 1, axis=0), workers=0)
    level = 255 * float(bench.STD.mean())  # from normalised values to grey levels
    _, exact = bench.difference(good(), bench.resized_by_pillow(bench_, windows))
    _, whole = bench.difference(good(), iter(theirs[1]))
    _, wrong = bench.difference(good(), iter(others))
    ways = {"ours": good, "worker": lambda: theirs[1], "in process": lambda: theirs[0]}
    found = bench.time_ways(ways, sizes.rounds)
    gain = bench.ratio(found["worker"].cpu, found["ours"].cpu)
    us = {name: times.line(sizes.patches)["cpu_us_a_patch"] for name, times in found.items()}
    yield Row(
        f"patches per CPU-second over DataLoader + PIL + torchvision v2, crop to {sizes.out}",
        f">= 3x; <= {MOST_LEVELS // 4} and {MOST_LEVELS} levels apart in the mean",
        f"{gain:.2f}x ({us['ours']:.0f} and {us['worker']:.0f} us a patch); {exact * level:.2f} levels"
        f" from Pillow's very windows, {whole * level:.2f} from torchvision's in whole pixels",
        f"its worker in this process: {us['in process']:.0f} us; the next patch's window:"
        f" {wrong * level:.1f} levels",
        gain >= 3 and max(4 * exact, whole) * level <= MOST_LEVELS < wrong * level,
    )


MOST_LEVELS = 4
"""Mean grey levels between our crops and torchvision's: its windows are rounded to whole pixels.
A quarter of it from Pillow's crops of the very windows: its filter is antialiased."""


def handed_over(bench_: Bench) -> Iterator[Row]:
    """What passes from the threads that make pixels to the trainer, and what is kept for later."""
    look = bench_.reader(keep="jpeg")
    noting = Noting(look.decoder)
    seen = list(bench.ours(bench_, replace(look, decoder=noting)))
    pointers = {pixels.data_ptr() for pixels in noting.made}
    copied = sum(pixels.nbytes for pixels in seen if pixels.data_ptr() not in pointers)
    each = sum(pixels.nbytes for pixels in seen) / bench_.sizes.patches
    jpeg = sum(map(len, bench_.jpegs)) / bench_.sizes.patches
    theirs = next(bench.reference(bench_, bench.simplejpeg_library()))
    yield Row(
        "bytes a patch from the makers' threads to the trainer",
        "JPEG or uint8",
        f"{each:,.0f} of {str(seen[0].dtype)[6:]}, {copied / bench_.sizes.patches:,.0f} of them copied"
        f" after the decoder; kept for a second pass: {jpeg:,.0f} of JPEG",
        f"the published loader's way: {theirs.nbytes / len(theirs):,.0f} of {str(theirs.dtype)[6:]}",
        seen[0].dtype is torch.uint8 and not copied and theirs.dtype is torch.float32,
    )


class Noting(Decoder):
    """Keeps what ``inner`` decoded, so that its memory can be told."""

    def __init__(self, inner: Decoder) -> None:
        self.inner = inner
        self.made: list[torch.Tensor] = []

    def decode(self, *args: Any, **options: Any) -> torch.Tensor:
        """See :class:`Decoder`."""
        self.made.append(self.inner.decode(*args, **options))
        return self.made[-1]


def cold(bench_: Bench) -> Iterator[Row]:
    """A slide's patches from a file of which no page is in memory."""
    path, count = bench_.large, bench_.sizes.cold_patches
    seconds: dict[str, list[float]] = {"store": [], "single": []}
    after = []
    fresh = iter(range(2 * bench.COLD_ROUNDS))
    for number in range(bench.COLD_ROUNDS):
        digests = set()
        for way in ("store", "single") if number % 2 == 0 else ("single", "store"):
            k = next(fresh)
            found = bench.alone(
                "cold_read",
                store=str(path),
                slide=f"c{k}",
                count=count,
                number=k + 1,  # in the order of writing: the long one was first
                way=way,
            )
            seconds[way].append(found["seconds"])
            digests.add(found["digest"])
            after.append(found["held_after"])
        if len(digests) != 1:
            raise OtherPixelsError("cold: the two ways read other bytes")
    gain = bench.ratio(seconds["single"], seconds["store"])
    rates = {way: count / sorted(found)[len(found) // 2] for way, found in seconds.items()}
    yield Row(
        f"cold read of {count:,} patches of a slide, store of {show_bytes(path.stat().st_size)}",
        ">= 5x random single gets, readahead off",
        f"{gain:.1f}x ({rates['store']:,.0f} and {rates['single']:,.0f} patches/s)",
        f"pages in memory by mincore: 0 before each, {min(after):,} or more after",
        gain >= 5 and min(after) > 0 and path.stat().st_size >= bench_.sizes.cold_gib * 2**30,
    )


def workers(bench_: Bench) -> Iterator[Row]:
    """The training path on two cores against two bare decode loops."""
    if len(bench_.cores) < 2:
        yield Row("two workers", ">= 0.9", "skipped: one core", "-", None)
        return
    sizes = bench_.sizes
    found = bench.alone(
        "two_workers",
        store=str(bench_.store.path),
        slide=bench_.slide,
        chunk=sizes.chunk,
        decoder=sizes.decoder,
        rounds=sizes.rounds,
        cores=list(bench_.cores[:2]),
    )
    best = min(("threads", "processes"), key=lambda name: float(np.median(found[name])))
    share = bench.ratio(found[best], found["ours"])
    one = bench.ratio(found[best], found["one"])
    patches = sizes.patches * bench.EPOCHS
    speeds = {name: f"{patches / np.median(wall):,.0f}/s" for name, wall in found.items()}
    busy = " - no slower than two, so the second core is busy" if one >= 0.9 else ""
    yield Row(
        f"2 cores against two bare decode loops ({best}: {speeds[best]})",
        ">= 0.9",
        f"{share:.2f} ({speeds['ours']})",
        f"one bare loop: {one:.2f} ({speeds['one']}){busy}",
        share >= 0.9 > one,
    )


def memory(bench_: Bench) -> Iterator[Row]:
    """Peak memory of a process that streams a long slide, against what the stream says it holds."""
    store, sizes = str(bench_.large), bench_.sizes
    spec = {"store": store, "chunk": sizes.chunk, "decoder": sizes.decoder}
    control = bench.alone("stream_memory", view="at once", **spec)
    for view in ("evaluation", "training"):
        found = bench.alone("stream_memory", view=view, **spec)
        jpegs = found["jpeg_bytes"] * (
            (AHEAD + 1) * sizes.chunk if view == "evaluation" else sizes.long
        )
        bound = (AHEAD + 1) * found["pixels"] + jpegs
        kept = "" if view == "evaluation" else ", the slide's JPEG bytes kept"
        yield Row(
            f"memory of a slide of {sizes.long:,} patches, {view}{kept}",
            f"<= {AHEAD + 1} chunks of pixels and those JPEG bytes, {show_bytes(bound)},"
            f" and {show_bytes(SLACK)}",
            show_bytes(found["peak"]),
            f"JPEG bytes read at once: {show_bytes(control['peak'])}",
            found["peak"] <= bound + SLACK
            and (view == "training" or control["peak"] > bound + SLACK),
        )


SLACK = 32 << 20
"""Bytes for what allocators and libraries hold besides."""


def dali(bench_: Bench) -> Iterator[Row]:
    """NVIDIA DALI's pipeline on the CPU, side by side."""
    try:
        decode, crop = (bench.dali(bench_, crop=crop) for crop in (False, True))
    except ImportError as error:
        yield Row("DALI on the CPU", "reported", f"skipped: {error}", "-", None)
        return
    look = bench_.reader(Augment(flip="none", crop=bench_.sizes.crop, size=bench_.sizes.out))
    most, mean = bench.difference(decode(), bench.ours(bench_, bench_.reader()))
    ways = {
        "decode, ours": partial(bench.ours, bench_, bench_.reader()),
        "decode, DALI": decode,
        "and crop, ours": partial(bench.ours, bench_, look),
        "and crop, DALI (draws its own)": crop,
    }
    found = bench.time_ways(ways, max(1, bench_.sizes.rounds // 3))
    count = bench_.sizes.patches
    speeds = {name: f"{count / np.median(times.cpu):,.0f}" for name, times in found.items()}
    yield Row(
        "DALI on the CPU, images per CPU-second",
        "reported",
        ", ".join(f"{name} {speed}" for name, speed in speeds.items()),
        f"decoded pixels differ by up to {most:g}, {mean:.3g} in the mean",
        None,
    )


def gpu(bench_: Bench) -> Iterator[Row]:
    """Decoders for a GPU side by side, and what an r18 step waits for pixels."""
    if not torch.cuda.is_available():
        yield Row("decoders for a GPU; r18 step", "waiting < 5 %", "skipped: no GPU", "-", None)
        return
    import bench_step

    os.sched_setaffinity(0, bench_.cores)
    device, sizes = torch.device("cuda"), bench_.sizes
    for name in DECODERS.names():
        try:
            decoder = build_decoder(name)
            decoder.decode(bench_.jpegs[:2], device)
        except UserError as error:
            yield Row(
                f"{name} to the GPU", "reported", f"skipped: {error}".split("\n")[0], "-", None
            )
            continue
        speed = _gpu_speed(bench_, decoder, device)
        yield Row(f"{name} to the GPU", "reported", f"{speed:,.0f} img/s", "-", None)
    work = bench_step.Work(
        patches=sizes.patches, size=bench_.side, chunk=sizes.chunk, device="cuda"
    )
    way = bench_step.Way("exact", precision="bf16")
    found = bench_step.time_ways([way], work, bench_.store, rounds=sizes.rounds)["exact"]
    yield Row(
        f"r18 step waits for pixels, {sizes.patches} patches, bf16, {len(bench_.cores)} cores",
        "< 5 %",
        f"{found['waiting']:.1%} of {found['patches_per_s']:,} patches/s",
        "-",
        found["waiting"] < 0.05,
    )
    os.sched_setaffinity(0, bench_.cores[-1:])


def _gpu_speed(bench_: Bench, decoder: Decoder, device: torch.device) -> float:
    def all_chunks() -> Iterator[object]:
        for start in bench_.starts():
            yield decoder.decode(bench_.jpegs[start : start + bench_.sizes.chunk], device)
        torch.cuda.synchronize()

    times = bench.time_ways({"decode": all_chunks}, bench_.sizes.rounds)["decode"]
    return bench_.sizes.patches / float(np.median(times.wall))


def _refusal(a: Pixels, b: Pixels) -> str:
    """How ``require_same`` refuses these two; empty where it does not."""
    try:
        bench.require_same("refused", a, b)
    except OtherPixelsError as error:
        return str(error)
    return ""


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    f.__name__: f
    for f in (
        parts, overhead, reference, torchvision, handed_over, cold, workers, memory, dali, gpu,
    )
}  # fmt: skip


def check(names: Sequence[str] | None, bench_: Bench) -> int:
    """Print every row; 1 where one falls short."""
    rows = {name: partial(make, bench_) for name, make in ROWS.items()}
    cores = len(bench_.cores)
    return report(rows, names, lambda: f", load {os.getloadavg()[0]:.1f} on {cores} cores")
