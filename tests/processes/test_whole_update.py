"""A loss that compares the bags of an update: alike on any number of ranks, in any sharing out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2e.bags.bag import Bag
from e2e.engine.model import MILModel
from e2e.parallel import Strategy
from e2e.tasks.base import TASKS, Task
from e2e.training.losses import bag_losses
from tests.helpers import two_ranks
from tests.helpers.models import make_bag, make_model
from tests.helpers.two_ranks import UPDATES, bag_of, build, dtype_of, new_model, sgd

PAIRS = {"0": (5.0, 1), "1": (3.0, 1), "2": (5.0, 1), "3": (1.0, 0), "4": (2.0, 1)}
"""Time and event of the drawn slides; two have an event at one time."""
KINDS = ("ddp", "fsdp", "zero2")
SHARDED = (None, 10)
"""Size over which bags are on both ranks."""


def cox(ties: str = "efron") -> Task:
    return TASKS.build("survival", event="1", loss="cox", ties=ties)


def timed(bag: Bag) -> Bag:
    """With times in place of classes."""
    pairs = [PAIRS[slide.removeprefix("s")] for slide in bag.slides]
    return replace(bag, target=torch.tensor(pairs, dtype=torch.float64))


def steps(
    kind: str, shard_over: int | None, *, alone: bool = False
) -> tuple[dict[str, Tensor], float]:
    """Weights after updates, and the sum of their losses; ``alone``: each rank's own risk sets."""
    strategy, task = build(kind), cox()
    dtype = dtype_of(kind) if kind != "single" else torch.float64
    strategy.setup(new_model("chunk", dtype), sgd, clip=None)
    task.loss_couples_bags = not alone
    total = torch.zeros((), dtype=torch.float64)
    for update in UPDATES:
        model = strategy.model
        assert isinstance(model, MILModel)
        model.train()
        where = {"rank": strategy.rank, "world_size": strategy.world_size}
        bag = timed(bag_of(update, dtype, shard_over=shard_over, **where))
        loss = bag_losses(strategy, bag, task).sum() / len(update)
        strategy.backward(loss)
        _, good = strategy.step()
        assert good
        model.after_step(strategy, good)
        total += loss.detach().double()
    strategy.all_reduce_sum(total)
    return strategy.full_tensors(strategy.shards()), float(total)


def world(strategy: Strategy) -> dict[Any, Any]:
    found = {(kind, over): steps(kind, over) for kind in KINDS for over in SHARDED}
    return found | {"alone": steps("ddp", None, alone=True)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Any, Any]:
    return two_ranks.run(world, tmp_path_factory.mktemp("whole_update"))


def apart(state: dict[str, Tensor], one: dict[str, Tensor]) -> float:
    """|w - w_one| / |w_one - w_0|."""
    start, names = new_model("chunk", torch.float64), dict(new_model().named_parameters())
    begun = start.state_dict()

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(((a[k].double() - b[k].double()).norm() ** 2).item() for k in names) ** 0.5

    moved = distance(one, begun)
    assert moved > 1e-2
    return distance(state, one) / moved


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_over", SHARDED)
def test_two_ranks_have_the_risk_set_and_the_gradients_of_one(found, kind, shard_over):
    weights, loss = found[kind, shard_over]
    one, expected = steps("single", None)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert apart(weights, one) < 1e-4


@pytest.mark.slow
def test_risk_sets_of_single_ranks_would_be_another_training(found):
    one, expected = steps("single", None)
    weights, loss = found["alone"]
    assert abs(loss - expected) > 0.1
    assert apart(weights, one) > 0.05


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_the_gradients_are_those_of_all_risks_in_one_graph(ties):
    model, bag, task = (
        make_model("abmil", keep_graphs="none"),
        timed(make_bag((5, 3, 4))),
        cox(ties),
    )
    strategy = Strategy(torch.device("cpu"))
    strategy.setup(model, None, clip=None)
    losses = bag_losses(strategy, bag, task)
    assert losses.shape == (3,)
    losses.sum().backward()
    ours = gradients(model)
    logits = torch.cat([output.logits for output in model(bag, torch.device("cpu"))])
    expected = task.loss(logits, bag.target).sum()
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-8)


class OtherRank(Strategy):
    """As if another rank had bags ``told`` with ``logits``."""

    world_size = 2
    told: Any
    logits: Tensor

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.told]

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        assert counts == [len(rows), len(self.logits)]
        return torch.cat([rows, self.logits])


def test_a_bag_that_two_ranks_have_counts_once_and_one_of_weight_0_not_at_all():
    model, task = make_model("abmil"), cox()
    bag = timed(make_bag((5, 3, 4), weight=[1.0, 0.5, 1.0]))
    strategy = OtherRank(torch.device("cpu"))
    strategy.setup(model.eval(), None, clip=None)
    logits = torch.cat([o.logits for o in model(bag, torch.device("cpu"))]).float().detach()[:, :1]
    own = logits[1:2]
    strategy.logits = torch.cat([own, torch.full((1, 1), 50.0), own * 0 + 0.7])
    # It has the second bag too, a copy of the first that keeps it in step, and one of its own.
    more = torch.tensor([PAIRS["1"], PAIRS["0"], (4.0, 1)], dtype=torch.float64)
    strategy.told = ((bag.seeds[1], bag.seeds[0], 99), torch.tensor([0.5, 0.0, 1.0]), more)
    model.head.forward = single_output(model.head.forward)
    share = bag_losses(strategy, bag, task).sum()
    everyone = torch.cat([logits, torch.full((1, 1), 0.7)])
    target = torch.cat([bag.target, more[2:]])
    expected = task.loss(everyone, target).sum() / 2  # this rank's half
    assert share.item() == pytest.approx(expected.item(), rel=1e-5)


def single_output(forward):
    def first(*args):
        output = forward(*args)
        return output._replace(logits=output.logits[:, :1])

    return first
