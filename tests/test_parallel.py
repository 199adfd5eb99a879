"""Two processes take the step that one takes. Compared with SGD in float64: after AdamW, weights
say little, because it turns the rounding noise of a zero gradient into a whole step."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.optim import SGD

from e2e.bag import Bag
from e2e.data.sampler import group_bags, rank_share
from e2e.optim import clip_gradients
from e2e.parallel import Strategy, autocast_dtype, build_strategy, pick_device
from e2e.tasks.base import TASKS
from e2e.trainer import batch_loss
from tests.test_model import make_model

SIZES = (7, 1, 12, 5, 9)
CHUNK = 8
CASES = [("frozen", None), ("chunk", 0.05)]


def part_of(share: list[list[int]], counts: bool) -> Bag:
    """The bags of some groups of slides, each with its own pixels and seed wherever it lies."""
    slides = [slide for group in share for slide in group]
    pieces = []
    for slide in slides:
        generator = torch.Generator().manual_seed(slide)
        pieces.append(torch.rand(SIZES[slide], 3, 8, 8, generator=generator, dtype=torch.float64))
    pixels = torch.cat(pieces)
    return Bag(
        offsets=tuple(np.cumsum([0, *(len(piece) for piece in pieces)]).tolist()),
        coords=torch.zeros(len(pixels), 2, dtype=torch.int32),
        pixels=lambda start, stop, device: pixels[start:stop],
        target=torch.tensor(slides) % 2,
        slides=tuple(map(str, slides)),
        seeds=tuple(100 + slide for slide in slides),
        weight=torch.full((len(slides),), float(counts)),
        groups=tuple(number for number, group in enumerate(share) for _ in group),
    )


def take_steps(strategy: Strategy, policy: str, clip: float | None) -> dict[str, Tensor]:
    """The state after three updates over five ragged bags; the last update has one bag."""
    model = make_model(CHUNK, dropout=0.3, batch_norm=policy)
    wrapped = strategy.wrap(model)
    task = TASKS.build("classification", classes=["a", "b"])
    optimizer = SGD(model.parameters(), lr=0.1)
    for update in ([0, 1, 2], [3, 4, 0], [2]):
        model.train()
        positions = group_bags([SIZES[slide] for slide in update], CHUNK)
        groups = [[update[position] for position in group] for group in positions]
        share, counts = rank_share(groups, strategy.rank, strategy.world_size)
        optimizer.zero_grad()
        loss = batch_loss(wrapped, model, part_of(share, counts), task, strategy.device)
        strategy.backward(loss / len(update))
        clip_gradients(model.parameters(), clip)
        optimizer.step()
        model.statistics.commit(strategy.sum)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for other in strategy.gather(state):
        for name in state:  # every rank holds the same model
            assert torch.equal(other[name], state[name]), name
    return state


def one_of_two(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    strategy = build_strategy(torch.device("cpu"))
    for policy, clip in CASES:
        state = take_steps(strategy, policy, clip)
        if strategy.leads:
            torch.save(state, out / f"{policy}.pt")
    strategy.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(one_of_two, args=(free_port(), out), nprocs=2)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "clip"), CASES)
def test_two_ranks_take_the_step_of_one(two_ranks, policy, clip):
    start = make_model(CHUNK, dropout=0.3, batch_norm=policy).state_dict()
    one = take_steps(Strategy(torch.device("cpu")), policy, clip)
    two = torch.load(two_ranks / f"{policy}.pt", weights_only=True)
    moved = sum((one[k] - start[k]).double().norm() ** 2 for k in one) ** 0.5
    apart = sum((one[k] - two[k]).double().norm() ** 2 for k in one) ** 0.5
    assert moved > 1e-3
    assert apart / moved < 1e-9


def test_one_process_needs_no_process_group():
    strategy = Strategy(torch.device("cpu"))
    value = torch.ones(2)
    strategy.sum(value)
    assert strategy.leads
    assert strategy.gather("x") == ["x"]
    assert value.tolist() == [1, 1]
    assert not torch.distributed.is_initialized()


def test_precision_is_what_was_asked_for():
    cpu = pick_device("cpu")
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("auto", cpu) is None
    assert autocast_dtype("bf16", cpu) is torch.bfloat16
