"""Acceptance check of training on features: time, padding, memory; run by tools/bench/heads.py --check.

An epoch of the training path (store, cache, loader, model, loss, step) is timed against the same head on
the same updates, padded and resident beforehand, in a loop with nothing else in it. Both start from the
same weights, take turns on a few updates at a time (ABBA), and must reach the same losses. Each row has a
control (see tools/bench/rows.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
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
from e2e.memory import to_host
from e2e.parallel import build_strategy
from e2e.sizes import show_bytes
from e2e.slides import Slide
from e2e.tasks.base import TASKS
from e2e.training.losses import bag_losses
from e2e.training.optim import build_optimizer
from tools.bench import head_step
from tools.bench.head_step import HeadStep, describe_costs
from tools.bench.process import synchronise
from tools.bench.rows import Row, report

WIDTH, LEAST, MOST = 512, 500, 4000
"""Width of the features; minimum and maximum patches of a bag."""
BATCH = 8
MOST_OVERHEAD = 1.10
MOST_PADDING = 0.15
CONTROLS_EVERY = 5
"""Controls run on every so many turns; their times are compared with those of the same turns."""


class Padded(NamedTuple):
    """An update that is padded and on the device already."""

    features: Tensor
    mask: Tensor
    coords: Tensor
    target: Tensor
    seed: int


Turns = Sequence[tuple[int, int]]
"""First update and number of updates of each."""


@dataclass
class Times:
    """Seconds of the turns of one way, by the number of the turn, and losses of its updates."""

    wall: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def write_features(folder: Path, sizes: Sequence[int]) -> FeatureFiles:
    """Write noise as TRIDENT's files, float16, with a slide for each of ``sizes``, and open them."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2 * max(sizes), WIDTH), dtype=np.float32).astype(np.float16)
    for number, size in enumerate(sizes):
        start = int(rng.integers(len(noise) - size + 1))
        with h5py.File(folder / f"s{number:05}.h5", "w") as file:
            file["features"] = noise[start : start + size]
            file["features"].attrs["encoder"] = "noise"
            coords = np.stack(np.divmod(np.arange(size), 64), axis=1) * 256
            file["coords"] = coords.astype(np.int32)
            file["coords"].attrs["patch_size_level0"] = 256
    return open_features(folder)


def draw_sizes(bags: int) -> list[int]:
    """Return the number of patches of each bag."""
    return np.random.default_rng(1).integers(LEAST, MOST + 1, bags).tolist()


def loader_over(store: FeatureFiles, *, cached: bool) -> TrainingLoader:
    """Return the loader of training, with everything in its cache already, or nothing ever."""
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
    """Return some updates of an epoch and the number of slides of each."""
    return islice(loader.epoch(0, rank=0, world_size=1, first=first), count)


def padded_updates(
    loader: TrainingLoader, first: int, count: int, device: torch.device
) -> list[Padded]:
    """Return the same updates, padded, on the device."""
    padded = []
    for bag, _ in updates_of(loader, first, count):
        features, mask = pad([bag.pixels(c.start, c.stop, device) for c in bag.chunks])
        coords, _ = pad([rows.to(device) for rows in bag.coords if rows is not None])
        padded.append(Padded(features, mask, coords, bag.target.to(device), bag.seeds[0]))
    return padded


class Training:
    """A head in training; its weights and dropout are the same whichever way the bags come.

    Parameters
    ----------
    head
        Name of the head.
    device
        Where it trains.
    """

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
        """Take updates as the trainer does and return their losses."""
        pending = []
        for bag, slides in prefetch(updates_of(loader, first, count), self.device):
            loss = bag_losses(self.strategy, bag, self.task).sum() / slides
            self.strategy.backward(loss)
            norm, good = self.strategy.step()
            self.model.head.after_step(good)
            pending.append(to_host(torch.stack([loss.detach(), norm, good.to(norm.dtype)])))
        return [numbers()[0] for numbers in pending]

    def by_padded(self, updates: Sequence[Padded]) -> list[float]:
        """Take the same updates with the head and the optimiser alone and return their losses."""
        head, optimizer, losses = self.model.head, self.strategy.optimizer, []
        for update in updates:
            with seeded(update.seed, self.device):
                output = head(update.features, update.mask, update.coords)
            loss = self.task.loss(output.logits, update.target).mean()
            aux_loss = head.aux_loss(output, update.target, self.task.loss)
            loss = loss if aux_loss is None else loss + aux_loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


def time_epoch(
    head: str, store: FeatureFiles, cached: TrainingLoader, *, turns: Turns, device: torch.device
) -> dict[str, Times]:
    """Time every way over one epoch, a few updates at a time; controls on each fifth turn."""
    files = loader_over(store, cached=False)
    names = ("training", "resident", "files", "resident again", "wide")
    trainings = {name: Training(head, device) for name in names}
    times = {name: Times() for name in names}
    for name in names:  # libraries load on first use, and the optimiser's state is created
        take(trainings[name], name, cached, padded_updates(cached, 0, 1, device), 0, 1)
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
            losses = take(trainings[name], name, loader, updates, first, count)
            synchronise(device)
            times[name].cpu[number] = time.process_time() - cpu
            times[name].wall[number] = time.perf_counter() - wall
            times[name].losses += losses
    return times


def take(
    training: Training,
    name: str,
    loader: TrainingLoader,
    ready: Sequence[Padded],
    first: int,
    count: int,
) -> list[float]:
    """Take updates in one of the ways and return their losses."""
    if name in ("training", "files"):
        return training.by_loader(loader, first, count)
    return training.by_padded(ready)


def widened(update: Padded) -> Padded:
    """Return the update padded to the size of the largest possible bag."""
    more = MOST - update.mask.shape[1]
    return update._replace(
        features=torch.nn.functional.pad(update.features, (0, 0, 0, more)),
        mask=torch.nn.functional.pad(update.mask, (0, more)),
        coords=torch.nn.functional.pad(update.coords, (0, 0, 0, more)),
    )


def turns_of(epoch: int, most: int, each: int) -> Turns:
    """Return turns of ``each`` updates over an epoch, or over ``most`` updates spread over it."""
    turns = [(first, min(each, epoch - first)) for first in range(0, epoch, each)]
    num_turns = min(len(turns), -(-most // each))
    return [turns[k * len(turns) // num_turns] for k in range(num_turns)]


def ratios(times: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Return the ratios of the turns that both have."""
    return [times[k] / others[k] for k in sorted(times.keys() & others.keys())]


def epoch(step: HeadStep, args: argparse.Namespace) -> Iterator[Row]:
    """Time of training on cached features relative to the same head on padded tensors."""
    sizes, device = draw_sizes(args.bags), torch.device(step.device)
    with tempfile.TemporaryDirectory() as folder:
        store = write_features(Path(folder), sizes)
        cached = loader_over(store, cached=True)
        turns = turns_of(cached.updates(), args.updates or cached.updates(), args.turn)
        for head in ("mean", "abmil"):
            times = time_epoch(head, store, cached, turns=turns, device=device)
            yield epoch_row(head, times, sizes, device)


def epoch_row(
    head: str, times: Mapping[str, Times], sizes: Sequence[int], device: torch.device
) -> Row:
    """Return the row of a head from the times of all ways."""
    training, resident = times["training"], times["resident"]
    clock = "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    each = {
        name: ratios(getattr(way, clock), getattr(resident, clock)) for name, way in times.items()
    }
    over = {name: statistics.median(values) for name, values in each.items()}
    low, _, high = (
        statistics.quantiles(each["training"], n=4) if len(each["training"]) > 1 else [0, 0, 0]
    )
    loss_gap = max(abs(a - b) for a, b in zip(training.losses, resident.losses, strict=True))
    spent = {name: sum(getattr(times[name], clock).values()) for name in ("training", "resident")}
    wall = statistics.median(ratios(training.wall, resident.wall))
    return Row(
        f"{head}: {len(training.losses)} updates of {BATCH} of an epoch of {len(sizes):,} cached bags of"
        f" {LEAST}-{MOST:,} x {WIDTH} ({show_bytes(2 * sum(sizes) * WIDTH)} of float16), over the same ones"
        " padded and resident",
        f"<= {MOST_OVERHEAD:.2f} of the {'CPU ' if clock == 'cpu' else ''}time, equal losses",
        f"{over['training']:.3f} (half of the turns {low:.3f} to {high:.3f}; sums {spent['training']:.1f} and"
        f" {spent['resident']:.1f} s; wall {wall:.3f}); losses within {loss_gap:.0e}",
        f"padded to {MOST:,} {over['wide']:.3f}; resident to itself {over['resident again']:.3f};"
        f" files read each time {over['files']:.3f}",
        over["training"] <= MOST_OVERHEAD < over["wide"] and loss_gap <= 1e-5,
    )


def padding(step: HeadStep, args: argparse.Namespace) -> Iterator[Row]:
    """Padding in the plans of ten epochs."""
    sizes = draw_sizes(args.bags)
    alike, mixed = (
        [padding_fraction(plan_epoch(len(sizes), BATCH, seed=0, epoch=k, sizes=plan_sizes), sizes)
         for k in range(10)]
        for plan_sizes in (sizes, None)
    )  # fmt: skip
    yield Row(
        f"padding of {len(sizes):,} bags of {LEAST}-{MOST:,} at batch {BATCH}, the worst of 10 epochs",
        f"< {MOST_PADDING:.0%} of the rows",
        f"{max(alike):.1%}",
        f"bags in random order: {min(mixed):.1%} at least",
        max(alike) < MOST_PADDING < min(mixed),
    )


def padding_fraction(plan: Sequence[Sequence[int]], sizes: Sequence[int]) -> float:
    """Return the fraction of the rows of padded updates that are no patches."""
    rows = sum(len(update) * max(sizes[k] for k in update) for update in plan)
    return 1 - sum(sizes[k] for update in plan for k in update) / rows


def heads(step: HeadStep, args: argparse.Namespace) -> Iterator[Row]:
    """Time, memory and parameters of every head; memory must grow no faster than the patches."""
    plain = replace(step, head="abmilx", kernel="dense")
    dense = [head_step.measure(replace(plain, patches=n)) for n in (1000, 3000)]
    less, more = (line.get("peak_mib", float("nan")) for line in dense)
    control = more / less
    for head in HEADS.names():
        costs = {n: head_step.measure(replace(step, head=head, patches=n)) for n in args.patches}
        peaks = {n: line["peak_mib"] for n, line in costs.items() if "peak_mib" in line}
        counts = {line["parameters"] for line in costs.values() if "parameters" in line}
        small, large = min(peaks, default=0), max(peaks, default=0)
        grew = peaks[large] / peaks[small] if small < large else float("nan")
        yield Row(
            f"{head}, {'/'.join(map(str, counts))} parameters, in_dim {step.in_dim}",
            f"memory at N = {large:,} <= {MOST_GROWTH:g} x {large / max(1, small):g} of that at {small:,}",
            "; ".join(f"N = {n:,}: {describe_costs(line)}" for n, line in costs.items()),
            f"it grew {grew:.1f}x; abmilx with dense kernels {control:.1f}x from 1,000 to 3,000",
            grew <= MOST_GROWTH * large / max(1, small) and control > 3 * MOST_GROWTH,
        )


MOST_GROWTH = 1.25
"""Maximum growth of memory relative to that of the patches. A head with fewer than two sizes is short."""


ROWS: dict[str, Callable[[HeadStep, argparse.Namespace], Iterator[Row]]] = {
    f.__name__: f for f in (epoch, padding, heads)
}


def check(names: Sequence[str] | None, step: HeadStep, args: argparse.Namespace) -> int:
    """Print every row and return the exit code: 1 where one is short of its bar.

    Parameters
    ----------
    names
        Names of the rows; None for all.
    step
        Head steps are measured as this one.
    args
        ``patches``, ``bags``, ``updates`` and ``turn`` of the command line.
    """
    rows = {name: partial(make, step, args) for name, make in ROWS.items()}
    return report(rows, names, lambda: f", load {os.getloadavg()[0]:.1f}")
