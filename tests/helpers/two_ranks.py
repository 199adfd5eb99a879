"""What two processes do together in the tests of strategies; no tests here.

Processes are slow to start: a pair does much at once, and the tests look at what it found. What a
rank alone holds (``single``) is made in the test's own process.
"""

from __future__ import annotations

import copy
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from e2e.bags.bag import Bag
from e2e.bags.chunk_plan import assign_to_ranks, cut_update, single_chunk
from e2e.bags.loader import make_bag
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.engine.model import MILModel
from e2e.errors import UserError, exit_code
from e2e.heads.base import BagLoss, Head, HeadOutput
from e2e.parallel import Strategy, build_strategy
from e2e.slides import Slide
from e2e.tasks.base import TASKS
from e2e.training.losses import bag_losses
from e2e.training.optim import build_optimizer
from tests.helpers.models import make_model
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
KINDS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
SIZES = (7, 1, 12, 5, 21)
CHUNK = 8
UPDATES = ([0, 1, 2], [3, 4, 0], [2], [1, 2, 3, 4, 0], [0, 4])
CASES = [("frozen", None, None), ("chunk", 0.5, None), ("chunk", None, 10), ("sync", None, None)]
"""Policy of BatchNorm, clipping, size over which bags are sharded."""
CYCLE = ("ddp", "fsdp", "zero3", "zero0", "zero2", "zero1")
LOADS = [*zip(CYCLE, (*CYCLE[1:], CYCLE[0]), strict=True), *((kind, kind) for kind in CYCLE)]
"""Who saves and who loads: each saves for one other and loads what one other has saved, and its own.

What is saved is the same for all, whole tensors by name, so pairs cover what all 36 would: a strategy
that saves something else fails with the one that loads it.
"""
BROKEN = ("ddp", "fsdp", "zero2")
DECAY = 0.5


def build(kind: str, **options: Any) -> Strategy:
    """``single``, or a distributed strategy by its short name."""
    if kind == "single":
        return Strategy(CPU)
    if kind.startswith("zero"):
        file = ROOT / "configs" / "deepspeed" / f"{kind}.json"
        return build_strategy(CPU, "deepspeed", deepspeed=file, **options)
    return build_strategy(CPU, kind, **options)


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind.startswith("zero") else torch.float64


def new_model(policy: str = "chunk", dtype: torch.dtype = torch.float32) -> MILModel:
    # Draws are a chunk's, and one piece is another chunk on each rank.
    dropout = 0.0 if policy == "sync" else 0.3
    model = make_model(CHUNK, dropout=dropout, batch_norm=policy).to(dtype)
    return model.to(memory_format=torch.channels_last)


class DrawnSlides:
    """In the place of a store and its decoder: five slides of random pixels."""

    path = Path("drawn")
    borrows = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def num_patches(self, slide: str) -> int:
        return SIZES[int(slide)]

    def record(self, slide: str) -> SimpleNamespace:
        count = self.num_patches(slide)
        return SimpleNamespace(
            num_patches=count, coords=np.zeros((count, 2), np.int32), patch_px=8, level0_px=0.0
        )

    def read(self, slide: str, indices: NDArray[np.int64]) -> Tensor:
        generator = torch.Generator().manual_seed(int(slide))
        whole = torch.rand(
            self.num_patches(slide), 3, 8, 8, generator=generator, dtype=torch.float64
        )
        return whole[indices].to(self.dtype)

    def decode(self, pixels: list[Tensor], device: torch.device) -> Tensor:
        return torch.stack(pixels)


def bag_of(
    update: list[int],
    dtype: torch.dtype,
    *,
    rank: int = 0,
    world_size: int = 1,
    shard_over: int | None = None,
    one_piece: bool = False,
) -> Bag:
    """What a rank has of an update, made by the training loader's own function."""
    drawn: Any = DrawnSlides(dtype)
    items = [
        LabelledSlide(Slide(str(s), str(s), "train", {}), drawn, torch.tensor(s % 2))
        for s in update
    ]
    groups = cut_update([SIZES[slide] for slide in update], CHUNK)
    shares = assign_to_ranks(groups, world_size, shard_over=shard_over)
    if one_piece:
        shares = [single_chunk(share) for share in shares]
    return make_bag(items, BagSpec(PixelRowReader(drawn)), shares, rank=rank)


def loss_of(strategy: Strategy, update: list[int], shard_over: int | None = None) -> Tensor:
    """This rank's share of the update's loss."""
    model = strategy.model
    assert isinstance(model, MILModel)
    model.train()
    dtype = model.encoder.net[0].weight.dtype  # pyright: ignore
    bag = bag_of(
        update,
        dtype,
        rank=strategy.rank,
        world_size=strategy.world_size,
        shard_over=shard_over,
        one_piece=model.batch_norm.single_chunk,
    )
    task = TASKS.build("classification", classes=["a", "b"])
    return bag_losses(strategy, bag, task).sum() / len(update)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def sgd_momentum(model: nn.Module) -> Optimizer:
    return build_optimizer(model, lr=0.05, weight_decay=0.0, name="sgd")


def adamw(model: nn.Module) -> Optimizer:
    """Two groups and one that is empty, fused."""
    large = [p for p in model.parameters() if p.ndim > 1]
    small = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": large, "weight_decay": 0.01},
        {"params": small, "weight_decay": 0.0},
        {"params": []},
    ]
    return AdamW(groups, lr=1e-2, fused=True)


def take_steps(
    strategy: Strategy,
    policy: str,
    clip: float | None,
    shard_over: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Weights, their average and the norms after updates over ragged bags."""
    model = new_model(policy, dtype)
    strategy.setup(model, sgd, clip=clip)
    average = {name: shard.clone() for name, shard in strategy.shards().items()}
    norms = []
    for update in UPDATES:
        strategy.backward(loss_of(strategy, update, shard_over))
        norm, good = strategy.step()
        assert good
        norms.append(norm.double())
        model.after_step(strategy, good)
        for name, shard in strategy.shards().items():
            if shard.is_floating_point():
                average[name].lerp_(shard, 1 - DECAY)
    return {
        "weights": strategy.full_tensors(strategy.shards()),
        "average": strategy.full_tensors(average),
        "norms": torch.stack(norms),
    }


def with_broken_reduction(kind: str) -> dict[str, Any]:
    """The same steps where the gradients of the ranks are not summed, or averaged."""
    strategy = build(kind)
    wrap = strategy._wrap

    def wrap_and_break(make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        wrap(make_optimizer)
        module: Any = strategy.module
        if kind == "ddp":
            module.require_backward_grad_sync = False
        elif kind == "fsdp":
            strategy._backward = lambda loss: (loss / 2).backward()
        else:
            strategy._backward = module.backward

    strategy._wrap = wrap_and_break
    return take_steps(strategy, "frozen", None, None, dtype_of(kind))


def skip_a_bad_step(kind: str, make_optimizer: Callable[[nn.Module], Optimizer]) -> dict[str, Any]:
    """Three updates; in the second and third, rank 1's loss is NaN, then infinite by a constant."""
    strategy = build(kind)
    strategy.setup(new_model(), make_optimizer, clip=1.0)

    def step(extra: float) -> tuple[bool, float]:
        loss = loss_of(strategy, [0, 1, 2])
        strategy.backward(loss + (extra if strategy.rank == 1 else 0.0))
        norm, good = strategy.step()
        return bool(good), norm.item()

    def state() -> dict[str, Tensor]:
        whole = strategy.full_tensors(strategy.shards()) | strategy.optimizer_tensors()
        return whole | {f"rank 0's {n}": v.clone() for n, v in strategy.shards().items()}

    told = [step(0.0)]
    states = [state()]
    for extra in (float("nan"), float("inf")):
        told.append(step(extra))
        states.append(state())
    told.append(step(0.0))
    states.append(state())
    return {"told": strategy.gather_objects(told), "states": states}


def evaluate_unevenly(kind: str) -> dict[str, Any]:
    """Each rank evaluates other bags, and another number of them, with other weights; then trains on."""
    strategy = build(kind)
    model = new_model()
    strategy.setup(model, sgd, clip=None)
    strategy.backward(loss_of(strategy, [0, 1, 2]))
    strategy.step()
    before = strategy.full_tensors(strategy.shards())
    other = {name: shard * 0.9 for name, shard in strategy.shards().items()}
    slides = [0, 2, 4] if strategy.rank == 0 else [1]
    selected = {}
    model.eval()
    with torch.no_grad():
        for number, weights in enumerate((None, other)):
            with strategy.full_parameters(weights) as plain:
                for slide in slides:
                    bag = bag_of([slide], torch.float32)
                    selected[number, slide] = plain(bag, CPU)[0].logits.clone()
    after = strategy.full_tensors(strategy.shards())
    strategy.backward(loss_of(strategy, [3, 4, 0]))
    strategy.step()
    everyone = {
        key: value for part in strategy.gather_objects(selected) for key, value in part.items()
    }
    return {
        "before": before,
        "after": after,
        "other": strategy.full_tensors(other),
        "selected": everyone,
        "next": strategy.full_tensors(strategy.shards()),
    }


class TeacherHead(Head):
    """Classifies by a student whose frozen moving average, with a buffer of its own, is the teacher."""

    teachers = MappingProxyType({"teacher": "student"})
    teacher_decay = DECAY

    def __init__(self) -> None:
        super().__init__()
        # Five outputs: on two ranks, shards of different sizes, and padding in those of ZeRO.
        self.student = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
        self.teacher = copy.deepcopy(self.student)

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        self.teacher.eval()
        with torch.no_grad():
            target = self.teacher(features[0]).mean(0, keepdim=True)
        # Evaluated by running statistics, which are moved by hand; see teach().
        return HeadOutput(self.student.eval()(features[0]).mean(0, keepdim=True), aux={"t": target})

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor:
        """The teacher's outputs matter, so a teacher that lags behind changes the training."""
        assert output.aux is not None
        return (output.logits - output.aux["t"]).square().mean()


def new_teacher_model(dtype: torch.dtype) -> MILModel:
    torch.manual_seed(3)
    model = new_model("chunk", dtype)
    return MILModel(model.encoder, TeacherHead(), chunk=CHUNK, batch_norm="chunk").to(dtype)


def teach(kind: str) -> dict[str, Any]:
    """Weights after updates with a teacher, after a skipped one, and as another model loads them."""
    strategy, dtype = build(kind), dtype_of(kind) if kind != "single" else torch.float64
    model = new_teacher_model(dtype)
    strategy.setup(model, sgd, clip=None)
    logits = []

    def update(slides: list[int], extra: float = 0.0) -> bool:
        strategy.backward(loss_of(strategy, slides) + extra)
        _, good = strategy.step()
        if good:  # a buffer of the student that moves with each update
            model.head.get_submodule("student")[1].running_mean += 0.25
        model.after_step(strategy, good)
        return bool(good)

    for slides in UPDATES:
        assert update(slides)
        with torch.no_grad(), strategy.full_parameters() as plain:
            teacher = plain.get_submodule("head.teacher")
            logits.append(teacher(torch.ones(1, 6, dtype=dtype)).double().clone())
    trained = strategy.full_tensors(strategy.shards())
    assert not update(UPDATES[0], float("nan"))
    skipped = strategy.full_tensors(strategy.shards())
    saved = strategy.gather_objects(skipped)[0]
    other = build(kind)
    other.setup(new_teacher_model(dtype), sgd, clip=None)
    other.load(saved)
    loaded = other.full_tensors(other.shards())
    return {"trained": trained, "skipped": skipped, "loaded": loaded, "logits": torch.cat(logits)}


class ShardedBag(nn.Module):
    """One bag's rows over ranks, and a head with dropout-free attention on all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.score = nn.Linear(5, 1)
        self.classify = nn.Linear(5, 2)

    def forward(self, rows: Tensor, strategy: Strategy, counts: list[int]) -> list[Tensor]:
        features = strategy.gather_rows(self.encode(rows), counts)
        return [self.classify((self.score(features).softmax(0) * features).sum(0, keepdim=True))]


def shard_a_bag(strategy: Strategy, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights after steps on bags whose rows lie unevenly on the ranks."""
    strategy.setup(ShardedBag().to(dtype), sgd, clip=None)
    for step, split in enumerate(([5, 9], [14, 0], [3, 11])):
        rows = torch.randn(14, 4, generator=torch.Generator().manual_seed(step), dtype=dtype)
        counts = split if strategy.world_size == 2 else [14]
        own = rows.split(counts)[strategy.rank]
        logits = strategy.module(own, strategy, counts)[0]
        loss = nn.functional.cross_entropy(logits, torch.tensor([step % 2]))
        strategy.backward(loss / strategy.world_size)
        strategy.step()
    return strategy.full_tensors(strategy.shards())


def disagree(strategy: Strategy) -> list[str]:
    """The message on each rank when rank 1 has other settings."""
    facts = {"settings": "abc", "cohort": "12 slides"}
    strategy.check_agreement(facts)
    if strategy.rank == 1:
        facts |= {"settings": "abd", "torch": "9.9"}
    try:
        strategy.check_agreement(facts)
    except UserError as error:
        return strategy.gather_objects(str(error))
    return ["nothing"]


def all_steps(strategy: Strategy) -> dict[Any, Any]:
    """The steps of every strategy in every case, and with a broken reduction."""
    found: dict[Any, Any] = {
        (kind, *case): take_steps(build(kind), *case, dtype_of(kind))
        for kind in KINDS
        for case in CASES
    }
    return found | {(kind, "broken"): with_broken_reduction(kind) for kind in BROKEN}


def all_else(strategy: Strategy) -> dict[Any, Any]:
    """All else that the tests look at, by every strategy in the same two processes."""
    found: dict[Any, Any] = {"disagree": disagree(strategy), **exchange(strategy)}
    for kind in KINDS:
        found[kind, "uneven"] = evaluate_unevenly(kind)
        found[kind, "sharded"] = shard_a_bag(build(kind), dtype_of(kind))
        found[kind, "teacher"] = teach(kind)
        for optimizer in (sgd_momentum, adamw):
            found[kind, "bad", optimizer.__name__] = skip_a_bad_step(kind, optimizer)
    return found


def all_steps_and_else(strategy: Strategy) -> dict[Any, Any]:
    """Everything that tests/processes/test_strategies.py looks at, from one start of two processes."""
    return all_steps(strategy) | all_else(strategy)


def train_and_save(kind: str, make_optimizer: Callable[[nn.Module], Optimizer]) -> dict[str, Any]:
    """A checkpoint after two steps, and the weights after a third."""
    strategy = build(kind)
    strategy.setup(new_model(), make_optimizer, clip=1.0)
    for update in UPDATES[:2]:
        strategy.backward(loss_of(strategy, update))
        strategy.step()
    average = {name: shard * 2 for name, shard in strategy.shards().items()}
    saved = {
        "weights": strategy.full_tensors(strategy.shards()),
        "average": strategy.full_tensors(average),
        "optimizer": strategy.optimizer_tensors(),
        "shapes": strategy.shapes,
    }
    strategy.backward(loss_of(strategy, UPDATES[3]))
    strategy.step()
    return saved | {"next": strategy.full_tensors(strategy.shards())}


def load_and_train(strategy: Strategy, saved: dict[str, Any]) -> dict[str, Any]:
    """What comes back of a checkpoint that another strategy wrote, and its third step."""
    weights, average, optimizer = (
        {name: value.contiguous() for name, value in saved[what].items()}  # as a file gives them
        for what in ("weights", "average", "optimizer")
    )
    strategy.load(weights)
    strategy.load_optimizer(optimizer)
    found = {
        "weights": strategy.full_tensors(strategy.shards()),
        "average": strategy.full_tensors(strategy.shard(average)),
        "optimizer": strategy.optimizer_tensors(),
    }
    strategy.backward(loss_of(strategy, UPDATES[3]))
    strategy.step()
    return found | {"next": strategy.full_tensors(strategy.shards())}


def exchange(strategy: Strategy) -> dict[str, Any]:
    """Every strategy loads what another saved, and its own; see ``LOADS``."""
    found: dict[Any, Any] = {}
    for optimizer in (sgd_momentum, adamw):
        saved = {kind: train_and_save(kind, optimizer) for kind in KINDS}
        saved = strategy.gather_objects(saved)[0]
        for source, content in saved.items():
            found[optimizer.__name__, source] = content
        for kind in KINDS:
            strategy = build(kind)
            strategy.setup(new_model(), optimizer, clip=1.0)
            # The other's into a new model, then its own over what was trained on.
            for source in (source for source, target in LOADS if target == kind):
                found[optimizer.__name__, source, kind] = load_and_train(strategy, saved[source])
    return found


World = Callable[[Strategy], dict[Any, Any]]


def _rank(rank: int, port: int, out: Path, world: World) -> None:
    with as_rank(rank, port):
        warnings.simplefilter("error")
        strategy = build("ddp", timeout=60)
        found = world(strategy)
        if strategy.is_leader:
            torch.save(found, out)
        strategy.barrier()
        strategy.close()


@contextmanager
def as_rank(rank: int, port: int) -> Iterator[None]:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    yield


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(world: World, folder: Path) -> dict[Any, Any]:
    """What ``world`` returns on rank 0 of two."""
    out = folder / "found.pt"
    mp.spawn(_rank, args=(free_port(), out, world), nprocs=2)  # pyright: ignore
    return torch.load(out, weights_only=False)


# A rank that is lost


def _doomed(rank: int, port: int, kind: str, fault: str, err: Path) -> None:
    """Trains until rank 1 dies or hangs in its second step."""
    descriptor = os.open(err.with_suffix(f".{rank}"), os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)

    def main() -> None:
        strategy = build(kind, timeout=5.0)
        try:
            with strategy.detect_lost_ranks():
                strategy.setup(new_model(), sgd, clip=None)
                for step, update in enumerate(UPDATES):
                    if step == 1 and rank == 1:
                        if fault == "hangs":
                            time.sleep(600)
                        os._exit(1)
                    strategy.backward(loss_of(strategy, update))
                    strategy.step()
        finally:
            strategy.close()

    with as_rank(rank, port):
        sys.exit(exit_code(main))


def lose_a_rank(kind: str, fault: str, folder: Path) -> tuple[int | None, str]:
    """Exit code and stderr of rank 0, which ends by itself or is killed after much too long."""
    context, port, err = mp.get_context("spawn"), free_port(), folder / "stderr"
    ranks = [
        context.Process(target=_doomed, args=(rank, port, kind, fault, err)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    ranks[0].join(240)
    for process in ranks:
        process.kill()
        process.join()
    return ranks[0].exitcode, err.with_suffix(".0").read_text()
