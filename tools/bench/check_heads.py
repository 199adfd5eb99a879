"""The figures that training on features must show, a row each: what, bar, measured, control. Run by
bench_heads.py.

An epoch of the training path (store, cache, loader, model, loss, step) is timed against the same head on
the same updates, padded and resident beforehand, in a loop with nothing else in it. Both begin with the
same weights, take turns on a few updates at a time (ABBA), and must come to the same losses. A control is
the same measurement of something broken on purpose, or of the plain way.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import bench_heads as bench
import h5py
import numpy as np
import torch
from bench_step import synchronise
from check_engine import Row, report
from torch import Tensor

from e2e.bags.bag import Bag
from e2e.bags.epoch_plan import plan_epoch
from e2e.bags.loader import TrainingLoader
from e2e.bags.prefetch import prefetch
from e2e.bags.readers import FeatureRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.encoders.base import ENCODERS
from e2e.engine.model import MILModel, pad, seeded
from e2e.features.reader import FeatureFiles, open_features
from e2e.heads.base import HEADS
from e2e.parallel import build_strategy
from e2e.sizes import show_bytes
from e2e.slides import Slide
from e2e.tasks.base import TASKS
from e2e.training.losses import bag_losses
from e2e.training.optim import build_optimizer
from e2e.training.trainer import to_host

WIDTH, LEAST, MOST = 512, 500, 4000
"""Of the features; patches of a bag."""
BATCH = 8
MOST_OVERHEAD = 1.10
MOST_PADDING = 0.15
CONTROLS_EVERY = 5
"""Turns; their own figures are compared with those of the same turns."""


class Padded(NamedTuple):
    """An update as nothing can hand it over faster."""

    features: Tensor
    mask: Tensor
    coords: Tensor
    target: Tensor
    seed: int


Turns = Sequence[tuple[int, int]]
"""First update and number of updates of each."""


@dataclass
class Times:
    """Of the turns of one way."""

    wall: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def write_features(folder: Path, sizes: Sequence[int]) -> FeatureFiles:
    """TRIDENT's files of noise, float16, a slide a bag."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2 * max(sizes), WIDTH), dtype=np.float32).astype(np.float16)
    for number, size in enumerate(sizes):
        start = int(rng.integers(len(noise) - size + 1))
        with h5py.File(folder / f"s{number:05}.h5", "w") as file:
            file["features"] = noise[start : start + size]
            file["features"].attrs["encoder"] = "noise"
            places = np.stack(np.divmod(np.arange(size), 64), axis=1) * 256
            file["coords"] = places.astype(np.int32)
            file["coords"].attrs["patch_size_level0"] = 256
    return open_features(folder)


def sizes_of(bags: int) -> list[int]:
    """Patches of each bag."""
    return np.random.default_rng(1).integers(LEAST, MOST + 1, bags).tolist()


def loader_over(store: FeatureFiles, *, cached: bool) -> TrainingLoader:
    """As training has it; everything is in the cache already, or nothing ever is."""
    cache = FeatureRowReader(sys.maxsize if cached else 0)
    items = [
        LabelledSlide(Slide(slide, slide, "train", {}), store, torch.tensor(k % 2))
        for k, slide in enumerate(store.slides)
    ]
    loader = TrainingLoader(
        items, BagSpec(cache), bags=BATCH, chunk=sys.maxsize, single_chunk_per_bag=True
    )
    if cached:
        for bag, _ in loader.epoch(0, rank=0, world_size=1):
            for chunk in bag.chunks:
                bag.pixels(chunk.start, chunk.stop, torch.device("cpu"))
    return loader


def updates_of(loader: TrainingLoader, first: int, count: int) -> Iterator[tuple[Bag, int]]:
    """Some of an epoch, and how many slides each has."""
    return islice(loader.epoch(0, rank=0, world_size=1, first=first), count)


def padded_updates(
    loader: TrainingLoader, first: int, count: int, device: torch.device
) -> list[Padded]:
    """The same ones, padded, on the device."""
    found = []
    for bag, _ in updates_of(loader, first, count):
        features, mask = pad([bag.pixels(c.start, c.stop, device) for c in bag.chunks])
        coords, _ = pad([places.to(device) for places in bag.coords if places is not None])
        found.append(Padded(features, mask, coords, bag.target.to(device), bag.seeds[0]))
    return found


class Training:
    """A head in training; its weights and dropout are the same whichever way the bags come."""

    def __init__(self, head: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.task = TASKS.build("classification", classes=["plain", "marked"])
        encoder = ENCODERS.build("features", dim=WIDTH)
        self.model = MILModel(encoder, HEADS.build(head, WIDTH, 2), chunk=sys.maxsize)
        self.strategy = build_strategy(device)
        self.strategy.setup(
            self.model.train(),
            lambda model: build_optimizer(model, lr=2e-4, weight_decay=1e-2),
            clip=None,
        )

    def by_loader(self, loader: TrainingLoader, first: int, count: int) -> list[float]:
        """A few updates as the trainer takes them; their losses."""
        read = []
        for bag, slides in prefetch(updates_of(loader, first, count), self.device):
            loss = bag_losses(self.strategy, bag, self.task).sum() / slides
            self.strategy.backward(loss)
            norm, good = self.strategy.step()
            self.model.head.after_step(good)
            read.append(to_host(torch.stack([loss.detach(), norm, good.to(norm.dtype)])))
        return [figures()[0] for figures in read]

    def by_padded(self, updates: Sequence[Padded]) -> list[float]:
        """The same ones with the head and the optimiser alone."""
        head, optimizer, losses = self.model.head, self.strategy.optimizer, []
        for update in updates:
            with seeded(update.seed, self.device):
                output = head(update.features, update.mask, update.coords)
            loss = self.task.loss(output.logits, update.target).mean()
            own = head.aux_loss(output, update.target, self.task.loss)
            loss = loss if own is None else loss + own
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


def time_epoch(
    head: str, store: FeatureFiles, cached: TrainingLoader, *, turns: Turns, device: torch.device
) -> dict[str, Times]:
    """Every way over one epoch, a few updates at a time; controls over each fifth turn."""
    files = loader_over(store, cached=False)
    names = ("ours", "resident", "files", "resident again", "wide")
    training = {name: Training(head, device) for name in names}
    found = {name: Times() for name in names}
    for name in names:  # libraries load on first use, the optimiser's state is made
        take(training[name], name, cached, padded_updates(cached, 0, 1, device), 0, 1)
    for number, (first, count) in enumerate(turns):
        ready = padded_updates(cached, first, count, device)
        taking = names if number % CONTROLS_EVERY == 0 else names[:2]
        wide = [widened(update) for update in ready] if len(taking) > 2 else []
        for name in taking if number % 2 == 0 else tuple(reversed(taking)):
            loader, updates = (
                files if name == "files" else cached,
                wide if name == "wide" else ready,
            )
            synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            losses = take(training[name], name, loader, updates, first, count)
            synchronise(device)
            found[name].cpu[number] = time.process_time() - cpu
            found[name].wall[number] = time.perf_counter() - wall
            found[name].losses += losses
    return found


def take(
    training: Training,
    name: str,
    loader: TrainingLoader,
    ready: Sequence[Padded],
    first: int,
    count: int,
) -> list[float]:
    """A few updates in one of the ways; their losses."""
    if name in ("ours", "files"):
        return training.by_loader(loader, first, count)
    return training.by_padded(ready)


def widened(update: Padded) -> Padded:
    """Padded to the largest bag there may be, as by one who does not look at sizes."""
    more = MOST - update.mask.shape[1]
    return update._replace(
        features=torch.nn.functional.pad(update.features, (0, 0, 0, more)),
        mask=torch.nn.functional.pad(update.mask, (0, more)),
        coords=torch.nn.functional.pad(update.coords, (0, 0, 0, more)),
    )


def turns_of(epoch: int, most: int, each: int) -> Turns:
    """All updates of an epoch in turns of ``each``; or ``most`` of them, taken from all of its parts."""
    turns = [(first, min(each, epoch - first)) for first in range(0, epoch, each)]
    wanted = min(len(turns), -(-most // each))
    return [turns[k * len(turns) // wanted] for k in range(wanted)]


def ratios(times: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Of the turns that both took."""
    return [times[k] / others[k] for k in sorted(times.keys() & others.keys())]


def epoch(args: argparse.Namespace) -> Iterator[Row]:
    """Training on cached features over the same head on padded tensors."""
    sizes, device = sizes_of(args.bags), torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        store = write_features(Path(folder), sizes)
        cached = loader_over(store, cached=True)
        turns = turns_of(cached.updates(), args.updates or cached.updates(), args.turn)
        for head in ("mean", "abmil"):
            found = time_epoch(head, store, cached, turns=turns, device=device)
            yield epoch_row(head, found, sizes, device)


def epoch_row(
    head: str, found: Mapping[str, Times], sizes: Sequence[int], device: torch.device
) -> Row:
    """What the turns came to."""
    ours, resident = found["ours"], found["resident"]
    clock = "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    each = {
        name: ratios(getattr(times, clock), getattr(resident, clock))
        for name, times in found.items()
    }
    over = {name: statistics.median(values) for name, values in each.items()}
    low, _, high = statistics.quantiles(each["ours"], n=4) if len(each["ours"]) > 1 else [0, 0, 0]
    apart = max(abs(a - b) for a, b in zip(ours.losses, resident.losses, strict=True))
    spent = {name: sum(getattr(found[name], clock).values()) for name in ("ours", "resident")}
    wall = statistics.median(ratios(ours.wall, resident.wall))
    return Row(
        f"{head}: {len(ours.losses)} updates of {BATCH} of an epoch of {len(sizes):,} cached bags of"
        f" {LEAST}-{MOST:,} x {WIDTH} ({show_bytes(2 * sum(sizes) * WIDTH)} of float16), over the same ones"
        " padded and resident",
        f"<= {MOST_OVERHEAD:.2f} of the {'CPU ' if clock == 'cpu' else ''}time, equal losses",
        f"{over['ours']:.3f} (half of the turns {low:.3f} to {high:.3f}; sums {spent['ours']:.1f} and"
        f" {spent['resident']:.1f} s; wall {wall:.3f}); losses within {apart:.0e}",
        f"padded to {MOST:,} {over['wide']:.3f}; resident to itself {over['resident again']:.3f};"
        f" files read each time {over['files']:.3f}",
        over["ours"] <= MOST_OVERHEAD < over["wide"] and apart <= 1e-5,
    )


def padding(args: argparse.Namespace) -> Iterator[Row]:
    """Of the plans of ten epochs."""
    sizes = sizes_of(args.bags)
    alike, mixed = (
        [padded_share(plan_epoch(len(sizes), BATCH, seed=0, epoch=k, sizes=known), sizes)
         for k in range(10)]
        for known in (sizes, None)
    )  # fmt: skip
    yield Row(
        f"padding of {len(sizes):,} bags of {LEAST}-{MOST:,} at batch {BATCH}, the worst of 10 epochs",
        f"< {MOST_PADDING:.0%} of the rows",
        f"{max(alike):.1%}",
        f"bags in random order: {min(mixed):.1%} at least",
        max(alike) < MOST_PADDING < min(mixed),
    )


def padded_share(plan: Sequence[Sequence[int]], sizes: Sequence[int]) -> float:
    """Share of the rows of padded updates that is no patch."""
    rows = sum(len(update) * max(sizes[k] for k in update) for update in plan)
    return 1 - sum(sizes[k] for update in plan for k in update) / rows


def heads(args: argparse.Namespace) -> Iterator[Row]:
    """Time, memory and parameters of each; memory must grow as the patches do."""
    dense = [bench.in_own_process(args, "abmilx", n, "dense") for n in (1000, 3000)]
    less, more = (line.get("peak_mib", float("nan")) for line in dense)
    control = more / less
    for head in HEADS.names():
        found = {n: bench.in_own_process(args, head, n, "fused") for n in args.patches}
        held = {n: line["peak_mib"] for n, line in found.items() if "peak_mib" in line}
        counts = {line["parameters"] for line in found.values() if "parameters" in line}
        small, large = min(held, default=0), max(held, default=0)
        grew = held[large] / held[small] if small < large else float("nan")
        yield Row(
            f"{head}, {'/'.join(map(str, counts))} parameters, in_dim {args.in_dim}",
            f"memory at N = {large:,} <= {MOST_GROWTH:g} x {large / max(1, small):g} of that at {small:,}",
            "; ".join(f"N = {n:,}: {bench.shown(line)}" for n, line in found.items()),
            f"it grew {grew:.1f}x; abmilx with dense kernels {control:.1f}x from 1,000 to 3,000",
            grew <= MOST_GROWTH * large / max(1, small) and control > 3 * MOST_GROWTH,
        )


MOST_GROWTH = 1.25
"""Of memory over that of the patches. Two sizes are needed to tell: a head with fewer falls short."""


ROWS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    f.__name__: f for f in (epoch, padding, heads)
}


def check(names: Sequence[str] | None, args: argparse.Namespace) -> int:
    """Print every row; 1 where one falls short."""
    rows = {name: partial(make, args) for name, make in ROWS.items()}
    return report(rows, names, lambda: f", load {os.getloadavg()[0]:.1f}")
