"""Acceptance check of the engine: gradients, memory, speed and ranks; run by tools/bench/step.py --check.

Each row compares a measured value with its bar and with a control (see tools/bench/rows.py).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy

from e2e.bags.chunk_plan import cut_update
from e2e.bags.loader import make_bag
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import HEADS
from e2e.images.augment import Augment
from e2e.images.decode import build_decoder
from e2e.parallel import build_strategy
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore
from tools.bench import engine
from tools.bench.engine import Way, Work
from tools.bench.process import process_memory, reset_peak_memory
from tools.bench.rows import Row, report

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def gradient(folder: Path) -> Iterator[Row]:
    """Gradients with recomputed against kept graphs: every head, with dropout and stochastic depth."""
    sizes = (23, 1, 17)
    store = engine.write_store(folder, sizes, 64)
    for dtype, bound in (("float64", 1e-12), ("float32", 1e-5)):
        for policy in ("frozen", "chunk"):
            worst, broken = ("", -1.0), float("inf")
            for head in HEADS.names():
                work = Work(head=head, chunk=6)
                way = Way("x", batch_norm=policy, dropout=0.25, drop_path=0.2, dtype=dtype)
                gap = _exact_against_naive(store, sizes, work, way)
                worst = max(worst, (head, gap), key=lambda pair: pair[1])
                if dtype == "float32" and policy == "frozen":
                    with mock.patch.object(MILModel, "_draws", return_value=nullcontext()):
                        broken = min(broken, _exact_against_naive(store, sizes, work, way))
            control = f"dropout replay off: {broken:.1e}" if broken < 1e9 else "see float32, frozen"
            good = worst[1] <= bound and broken > 100 * bound
            what = f"gradient against naive, {len(HEADS.names())} heads, {policy}, {dtype}"
            yield Row(what, f"<= {bound:g}", f"{worst[1]:.1e} ({worst[0]})", control, good)


def _exact_against_naive(store: PatchStore, sizes: Sequence[int], work: Work, way: Way) -> float:
    both = []
    for keep in ("none", "all"):
        way = dataclasses.replace(way, keep_graphs=keep)
        model = engine.build_model(work, way)
        both.append(engine.gradients(model, engine.make_update(store, sizes, work, way), way, CPU))
    return engine.relative_distance(*both)


def bf16(folder: Path) -> Iterator[Row]:
    """The gradient of 256 chunks under bf16 autocast, against fp32.

    It is the gradient of a difference of logits: cross entropy would scale all of it by one rounded
    number, whose error hides the rest.
    """
    store = engine.write_store(folder, [256], 64)

    def gradient_of(chunk: int, precision: str, *, fold: bool, cached: bool = False) -> Any:
        work, way = Work(chunk=chunk), Way("x", precision=precision, fold=fold)
        model, bag = engine.build_model(work, way), engine.make_update(store, [256], work, way)
        with _autocast_cache(cached), mock.patch.object(engine, "cross_entropy", _logit_difference):
            return engine.gradients(model, bag, way, CPU)

    exact = gradient_of(256, "fp32", fold=False)
    naive = engine.relative_distance(gradient_of(256, "bf16", fold=False), exact)
    cached = engine.relative_distance(gradient_of(1, "bf16", fold=False, cached=True), exact)
    for fold in (False, True):
        chunked = engine.relative_distance(gradient_of(1, "bf16", fold=fold), exact)
        yield Row(
            f"bf16 gradient against fp32, 256 chunks{', folded' if fold else ''}",
            f"<= 1.25 x one piece ({naive:.4f})",
            f"{chunked:.4f}",
            f"autocast's cache on: {cached:.4f}",
            chunked <= 1.25 * naive < cached,
        )


def _logit_difference(logits: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
    return logits[:, 0] - logits[:, 1]


@contextmanager
def _autocast_cache(on: bool) -> Iterator[None]:
    """One cached low-precision copy of each weight for all chunks, as autocast has by default."""
    if not on:
        yield
        return
    with (
        mock.patch.object(MILModel, "_autocast", return_value=nullcontext()),
        torch.autocast("cpu", torch.bfloat16),
    ):
        yield


def memory(folder: Path) -> Iterator[Row]:
    """Peak memory against the number of patches, without the JPEG bytes.

    The mean of the features is the head, which shows what the engine holds; the memory of other heads
    is reported.
    """
    sizes, small, few = (256, 1024, 4096, 8192), (64, 256), (1024, 2048)
    store = engine.write_store(folder, (*sizes, *small, *few), 64)

    def growth(way: Way, work: Work, counts: Sequence[int]) -> float:
        points = []
        for count in counts:
            sized = dataclasses.replace(work, patches=count)
            measured = engine.measure_memory(sized, way, store, threads=1)
            points.append((count, measured["peak"] - measured["jpeg_bytes"] * count))
        return engine.slope(points) / 1000

    mean = Work(head="mean", embed_dim=0)
    exact = growth(engine.WAYS["exact"], mean, sizes)
    naive = growth(engine.WAYS["naive"], mean, small)
    yield Row(
        "memory a patch, N = 256 to 8,192 at 64 px, r18, mean of the features",
        "<= 8 KB",
        f"{exact:.2f} KB",
        f"naive, N = 64 to 256: {naive:,.0f} KB",
        exact <= 8 < naive,
    )
    for head in ("abmil", "abmilx"):
        more = growth(engine.WAYS["exact"], Work(head=head), few)
        what = f"memory a patch with {head}, 512 wide, N = 1,024 to 2,048"
        yield Row(what, "reported", f"{more:.2f} KB", "the head's own graph", None)


def speed(folder: Path) -> Iterator[Row]:
    """Time relative to the naive way: same mathematics, one thread, median CPU seconds in ABBA order."""
    work = Work(patches=256, chunk=32)
    store = engine.write_store(folder, [256], 64)
    ways = [
        Way("naive", mode="naive"),
        Way("recomputed", fold=False),
        Way("kept", fold=False, keep_graphs="64GiB"),
    ]
    times = engine.time_ways(ways, work, store, rounds=8)
    naive = times["naive"]["cpu_seconds"]
    for name, bar in (("recomputed", 1.45), ("kept", 1.05)):
        ratio = times[name]["cpu_seconds"] / naive
        control = f"naive {work.patches / naive:.0f} patches/s; theory for recomputing: 4/3"
        yield Row(
            f"time, {name} over naive, fp32", f"<= {bar}x", f"{ratio:.3f}x", control, ratio <= bar
        )


def layout(folder: Path) -> Iterator[Row]:
    """Folding and channels_last, each alone and together; bf16 where the processor has it."""
    work = Work(patches=128, chunk=32)
    store = engine.write_store(folder, [128], 64)
    ways = [
        Way("plain", fold=False, channels_last=False),
        Way("folded", channels_last=False),
        Way("channels_last", fold=False),
        Way("both"),
    ]
    if has_amx():
        ways.append(Way("both, bf16", precision="bf16"))
    times = engine.time_ways(ways, work, store, rounds=6)

    def gradient(way: Way) -> engine.Gradients:
        return engine.gradients(
            engine.build_model(work, way), engine.make_update(store, [128], work, way), way, CPU
        )

    def in_double(way: Way) -> engine.Gradients:
        return gradient(dataclasses.replace(way, precision="fp32", dtype="float64"))

    single, double = gradient(ways[0]), in_double(ways[0])
    for way in ways[1:]:
        ratio = times[way.name]["cpu_seconds"] / times["plain"]["cpu_seconds"]
        gap = engine.relative_distance(in_double(way), double)
        rounding = engine.relative_distance(gradient(way), single)
        same = gap <= 1e-10  # float32 says less: other kernels round otherwise
        control = f"gradient differs by {gap:.1e} in fp64, {rounding:.1e} as timed"
        yield Row(
            f"time, {way.name} over plain",
            "reported",
            f"{ratio:.3f}x",
            control,
            None if same else False,
        )
    if not has_amx():
        yield Row(
            "time, bf16 over fp32", "reported", "skipped: this processor has no AMX", "-", None
        )


def has_amx() -> bool:
    """Return whether this processor has a matrix unit for bf16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def sharded(folder: Path) -> Iterator[Row]:
    """A bag of 1,000 patches on two ranks, 437 and 563, against one process; memory of each rank."""
    engine.write_store(folder, [1000, 8], 64)
    mp.spawn(_one_rank, args=(folder, _free_port()), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    two = torch.load(folder / "rank0.pt", weights_only=True)
    other = torch.load(folder / "rank1.pt", weights_only=True)
    way = Way("x")
    work = Work(patches=1000, chunk=63)
    store = PatchStore(folder / "bench.lmdb")
    one = engine.gradients(
        engine.build_model(work, way), engine.make_update(store, [1000], work, way), way, CPU
    )
    gap, broken = (
        engine.relative_distance(two["good"], one),
        engine.relative_distance(two["broken"], one),
    )
    what = "a bag of 1,000 over 2 ranks (437 + 563), fp32"
    control = f"own rows not times world_size: {broken:.1e}"
    yield Row(what, "<= 1e-6", f"{gap:.1e}", control, gap <= 1e-6 < broken)
    held = [float(rank["held"]) / 2**20 for rank in (two, other)]
    ratio, want = held[0] / held[1], 437 / 563
    yield Row(
        "memory of the two ranks, graphs kept",
        f"ratio {want:.2f} within 15 %",
        f"{held[0]:.0f} and {held[1]:.0f} MiB: {ratio:.2f}",
        "an even split: 1.00",
        abs(ratio / want - 1) <= 0.15,
    )


def _one_rank(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    strategy = build_strategy(CPU)
    store = PatchStore(folder / "bench.lmdb")
    work, way = Work(patches=1000, chunk=63), Way("x", keep_graphs="all")
    model = engine.build_model(work, way)
    engine.gradients(model, engine.make_update(store, [8], work, way), way, CPU)
    strategy.setup(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.0), clip=None)
    chunks = [chunk for group in cut_update([1000], 63) for chunk in group]
    item = LabelledSlide(Slide("n1000", "n1000", "train", {}), store, torch.tensor(0))
    spec = BagSpec(PixelRowReader(build_decoder(), augment=Augment(), keep="jpeg"))
    measured: dict[str, Any] = {}
    for name in ("good", "broken"):
        model.zero_grad(set_to_none=True)
        before = process_memory()
        reset_peak_memory()
        bag = make_bag([item], spec, [chunks[:7], chunks[7:]], rank=rank)
        assert bag.num_patches == (437, 563)[rank]
        if name == "broken":
            strategy.gather_rows = partial(_gather_without_factor, strategy.gather_rows)
        outputs = strategy.module(bag, CPU, strategy)
        loss = cross_entropy(outputs[0].logits, bag.target, reduction="none") * bag.weight
        strategy.backward(loss.sum())
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        measured[name] = {k: grad.clone() for k, grad in grads.items()}
        if name == "good":
            measured["held"] = torch.tensor(process_memory()["VmHWM"] - before["VmRSS"])
    torch.save(measured, folder / f"rank{rank}.pt")
    strategy.close()


def _gather_without_factor(
    gather: Callable[..., torch.Tensor], rows: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """Return the gathered rows with half of their gradient."""
    return gather(rows / 2 + rows.detach() / 2, counts)


def strategies(folder: Path) -> Iterator[Row]:
    """Five SGD steps of every strategy on two ranks, as measured by the tests."""
    name = "tests/processes/test_strategies.py"
    tests = ("test_two_ranks_take_the_steps_of_one_process", "test_a_broken_reduction_is_seen")
    cases = _pytest(ROOT, folder, [f"{name}::{test}" for test in tests])
    results: dict[str, tuple[float, float, bool]] = {}
    broken: dict[str, float] = {}
    for case in cases:
        properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if "broken" in properties:
            broken[properties["kind"]] = float(properties["broken"])
        elif "apart" in properties:
            worst, bar, good = results.get(properties["kind"], (0.0, 0.0, True))
            worst = max(worst, float(properties["apart"]))
            results[properties["kind"]] = worst, float(properties["bar"]), good and _passed(case)
    if not results:
        raise UserError(
            f"{name} reported no properties\n  run it by itself: python -m pytest {name}"
        )
    for kind, (worst, bar, good) in results.items():
        control = f"reduction broken: {broken[kind]:.1e}" if kind in broken else "as for the others"
        good = good and worst <= bar < broken.get(kind, float("inf"))
        yield Row(f"{kind}, 2 ranks, 5 SGD steps", f"<= {bar:g}", f"{worst:.1e}", control, good)


CONTROLS = (
    (
        "mask ignored",
        "e2e/heads/base.py",
        'return wide.masked_fill(~mask.unsqueeze(1), float("-inf"))',
        "return wide",
        "tests/contracts/test_heads.py::test_how_much_padding_there_is_changes_nothing",
    ),
    (
        "dropout replay off",
        "e2e/engine/model.py",
        "return seeded(seed, device) if self.training else nullcontext()",
        "return nullcontext()",
        "tests/engine/test_model.py::test_recomputed_gradients_are_those_of_kept_graphs",
    ),
    (
        "reduction off",
        "e2e/parallel/ddp.py",
        "(loss * self.world_size).backward()",
        "loss.backward()",
        "tests/processes/test_strategies.py::test_two_ranks_take_the_steps_of_one_process",
    ),
    (
        "BatchNorm merge off",
        "e2e/engine/batchnorm.py",
        "        all_reduce_sum(flat)\n",
        "",
        "tests/processes/test_strategies.py::test_two_ranks_take_the_steps_of_one_process",
    ),
)
"""Name, file, text that is replaced, its replacement, and the test that must fail then."""


def controls(folder: Path) -> Iterator[Row]:
    """Each control breaks a copy of the code; its test must fail there and pass without it."""
    for what, file, old, new, test in CONTROLS:
        copy = folder / what.replace(" ", "_")
        copy.mkdir()
        for name in ("e2e", "tests", "configs", "launch", "tools"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        text = (copy / file).read_text()
        if text.count(old) != 1:
            raise UserError(
                f"{file} contains the text of the control '{what}' {text.count(old)} times, not once\n"
                "  adapt CONTROLS in tools/bench/check_engine.py"
            )
        green = [_passed(case) for case in _pytest(copy, folder, [test])]
        (copy / file).write_text(text.replace(old, new))
        red = [not _passed(case) for case in _pytest(copy, folder, [test])]
        measured = f"{sum(red)} of {len(red)} cases red"
        control = f"unbroken: {len(green) - sum(green)} red"
        yield Row(
            f"{what}: {test.split('::')[1]}", "red", measured, control, any(red) and all(green)
        )


def _pytest(root: Path, folder: Path, tests: Sequence[str]) -> list[ElementTree.Element]:
    report = folder / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "-o",
        "junit_family=xunit1",
    ]
    subprocess.run(
        [*command, *tests],
        cwd=root,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    return list(ElementTree.parse(report).iter("testcase"))


def _passed(case: ElementTree.Element) -> bool:
    return all(case.find(kind) is None for kind in ("failure", "error", "skipped"))


def whole_slide(folder: Path, *, threads: int) -> Iterator[Row]:
    """A slide of 20,000 patches at 224 px: one step on all of them, without and with kept graphs."""
    count = 20_000
    store = engine.write_store(folder, [count, 64], 224)
    work, norms = Work(patches=count, size=224, chunk=64), []
    for name, keep in (("nothing kept", "none"), ("again, 4 GiB of graphs kept", "4GiB")):
        way = Way(name, keep_graphs=keep, precision="bf16" if has_bf16() else "fp32")
        measured = engine.measure_memory(work, way, store, threads=threads)
        norms.append(measured["gradient_norm"])
        gap = abs(norms[-1] / norms[0] - 1)
        yield Row(
            f"20,000 patches at 224 px, r18, {way.precision}, {threads} threads, {name}",
            "reported; gradient norm alike to 1e-4",
            f"{measured['peak'] / 2**20:,.0f} MiB peak, {measured['seconds'] / 60:.1f} min",
            f"gradient norm {norms[-1]:.6g}, differs by {gap:.1e}",
            gap <= 1e-4,
        )


def has_bf16() -> bool:
    """Return whether this processor multiplies bf16."""
    return any(word in Path("/proc/cpuinfo").read_text() for word in ("avx512_bf16", "amx_bf16"))


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {
    f.__name__: f for f in (gradient, bf16, memory, speed, layout, sharded, strategies, controls)
}


def check(names: Sequence[str] | None, *, long: bool, threads: int = 1) -> int:
    """Print every row and return the exit code: 1 where one is short of its bar."""
    rows = dict(ROWS) | ({"whole_slide": partial(whole_slide, threads=threads)} if long else {})

    def in_folder(make: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
        with tempfile.TemporaryDirectory() as folder:
            yield from make(Path(folder))

    return report({name: partial(in_folder, make) for name, make in rows.items()}, names)
