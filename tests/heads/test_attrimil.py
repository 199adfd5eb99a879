"""AttriMIL against its formulas in loops, float64: scores, ranking, banks; in runs, on ranks."""

from __future__ import annotations

import copy
import functools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

import e2e.heads  # noqa: F401
from e2e.bags.bag import Bag
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput
from e2e.losses.base import REGULARISERS
from e2e.parallel import Strategy
from e2e.tasks.base import TASKS
from e2e.training.checkpoint import load_checkpoint
from e2e.training.losses import bag_losses
from tests.helpers import two_ranks
from tests.helpers.kernels import Watch
from tests.helpers.models import apart, make_bag, make_model
from tests.helpers.training import both, trainer
from tests.helpers.two_ranks import CHUNK, UPDATES, bag_of, dtype_of, sgd

EACH = functools.partial(nn.functional.cross_entropy, reduction="none")
"""The loss of a classification task."""

D, C = 6, 3
SIZES = (7, 1, 4)
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def bags(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    features = torch.randn(len(SIZES), max(SIZES), D, dtype=torch.float64)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES).unsqueeze(1)
    return features.masked_fill(~mask.unsqueeze(-1), math.nan), mask


def shake(head: Head, seed: int) -> None:
    """Other weights, none of which is a 0 or a 1 that could hide a mistake."""
    torch.manual_seed(seed)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.6)


def build(outputs: int = C, **options: object) -> Head:
    head = HEADS.build("attrimil", D, outputs, **options).double()
    shake(head, 1)
    return head


def branches(head: Head, x: NDArray) -> tuple[NDArray, NDArray]:
    """r and a of each class, (C, n)."""
    p = {key: value.detach().numpy() for key, value in head.named_parameters()}

    def linear(name: str, vector: NDArray) -> NDArray:
        return p[f"{name}.weight"] @ vector + p[f"{name}.bias"]

    r, a = np.zeros((2, len(p["bias"]), len(x)))
    for n, patch in enumerate(x):
        h = patch + linear("adapt.2", np.maximum(linear("adapt.0", patch), 0))
        r[:, n] = linear("value", h)
        for c in range(len(a)):
            gate = 1 / (1 + np.exp(-linear(f"attend.{c}.gate.0", h)))
            hidden = np.tanh(linear(f"attend.{c}.value.0", h)) * gate
            a[c, n] = p[f"attend.{c}.score.weight"][0] @ hidden
    return r, a


def by_hand(head: Head, x: NDArray) -> dict[str, NDArray]:
    """``score`` (C, n), ``attention`` (C, n), ``level`` (C,) and ``logits`` (C,) of one bag."""
    r, a = branches(head, x)
    level = np.log(np.exp(a).mean(axis=1))
    logits = (r * np.exp(a)).sum(axis=1) / np.exp(a).sum(axis=1)
    score = r * np.exp(a - level[:, None])
    bias = dict(head.named_parameters())["bias"].detach().numpy()
    return {"score": score, "attention": a, "level": level, "logits": logits + bias}


# --- the scores ---


@pytest.mark.parametrize("outputs", [1, 2, C])
def test_attrimil_is_its_formula_on_each_bag_alone(outputs):
    head = build(outputs)
    features, mask = bags()
    output = head(features, mask)
    for b, n in enumerate(SIZES):
        want = by_hand(head, features[b, :n].numpy())
        for result, expected in (
            (output.logits[b], want["logits"]),
            (output.attention_logits[b, :, :n], want["attention"]),
            (output.instance_logits[b, :n].T, want["score"]),
        ):
            np.testing.assert_allclose(result.detach(), expected, rtol=1e-10, atol=1e-12)


def test_a_logit_is_the_mean_of_its_patches_scores_and_the_bias():
    head = build()
    features, mask = bags()
    output = head(features, mask)
    means = output.instance_logits.sum(dim=1) / torch.tensor(SIZES).unsqueeze(1)
    torch.testing.assert_close(output.logits, means + head.bias)


def test_each_class_has_layers_of_its_own_with_the_published_widths():
    head = HEADS.build("attrimil", 512, 2)
    adaptor = 512 * 256 + 256 + 256 * 512 + 512
    branch = 2 * (512 * 256 + 256) + 256  # w has no bias
    assert sum(p.numel() for p in head.parameters()) == adaptor + 2 * (branch + 512 + 1) + 2
    assert head.bias.tolist() == [0, 0]


def test_attention_of_any_size_overflows_nothing():
    head = build()
    with torch.no_grad():
        for branch in head.attend:
            branch.score.weight.mul_(1e4)
    features, mask = bags()
    output = head.float()(features.float(), mask)
    assert output.attention_logits[mask.unsqueeze(1).expand_as(output.attention_logits)].max() > 100
    assert output.logits.isfinite().all()
    assert output.instance_logits[mask].isfinite().all()


def test_half_precision_makes_no_ties_among_patches():
    head = HEADS.build("attrimil", 4, 1, rank_weight=1.0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.value.weight[0, 0] = 1
    x = torch.tensor([[[1.0, 3, 0, 0], [1.001, -3, 0, 0]]])  # in bfloat16 1.001 is 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(x, torch.ones(1, 2, dtype=torch.bool))
    assert output.aux["row"][0, 0, 1] == -3


def test_memory_grows_with_the_patches_alone():
    n, width = 2000, 32
    head = HEADS.build("attrimil", width, 2)
    features = torch.randn(1, n, width, requires_grad=True)
    mask = torch.ones(1, n, dtype=torch.bool)
    with Watch() as watch:
        output = head(features, mask)
        extra = head.aux_loss(output, torch.tensor([1]), EACH)
        (output.logits.sum() + extra).backward()
    assert watch.largest <= 2 * n * width


# --- the ranking loss ---


def ranked(top: float, oldest: tuple[float, float], there: tuple[bool, bool]) -> HeadOutput:
    """One slide, two classes alike: its top score; the oldest of others' bank and of the own one."""
    aux = {
        "top": torch.full((1, 2), top, dtype=torch.float64),
        "oldest": torch.tensor([oldest, oldest], dtype=torch.float64).T,
        "has_oldest": torch.tensor([there, there]).T,
    }
    return HeadOutput(torch.zeros(1, 2), aux=aux)


@pytest.mark.parametrize(
    ("top", "opposite", "own", "other", "own_background", "other_background"),
    [
        # own: [s'-v]+ + [-v]+ + [s']+; other: [v-s']+ + [v]+;
        # background, own: [-v]+ + [s']+; background, other: [v]+ + [-s']+
        (-0.5, 0.3, 0.8 + 0.5 + 0.3, 0.0, 0.5 + 0.3, 0.0),
        (0.5, -0.3, 0.0, 0.8 + 0.5, 0.0, 0.5 + 0.3),
        (0.5, 0.3, 0.3, 0.2 + 0.5, 0.3, 0.5),
        (-0.5, -0.3, 0.2 + 0.5, 0.0, 0.5, 0.3),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_ranking_loss_by_hand(top, opposite, own, other, own_background, other_background):
    output, label = ranked(top, (opposite, opposite), (True, True)), torch.tensor([1])
    result = [
        HEADS.build("attrimil", D, 2, rank_weight=2.0, background=background).aux_loss(
            output, label, EACH
        )
        for background in (None, 0, 1)
    ]
    sums = (own + other, own + other_background, own_background + other)
    assert [one.item() for one in result] == pytest.approx(list(sums))  # 2 / 2 classes


@pytest.mark.parametrize("label", [0, 1])
def test_while_a_bank_is_empty_the_slides_own_terms_count_alone(label):
    head = HEADS.build("attrimil", D, 2, rank_weight=1.0)
    result = head.aux_loss(ranked(-0.5, (9.0, 9.0), (False, False)), torch.tensor([label]), EACH)
    assert result.item() == pytest.approx(0.5 / 2)  # [-v]+ of its own class; [v]+ = 0 of the other


def test_a_slide_is_compared_with_the_bank_of_the_other_side():
    head = HEADS.build("attrimil", D, 2, rank_weight=1.0)
    output = ranked(0.0, (0.7, -0.4), (True, True))  # of other slides; of its own
    # Its own class: [0.7 - 0]+ + [0.7]+; the other class: [0 + 0.4]+
    assert head.aux_loss(output, torch.tensor([1]), EACH).item() == pytest.approx((1.4 + 0.4) / 2)


class Reference:
    """The banks as the publication has them: a queue of four for each class and side."""

    def __init__(self, head: Head, outputs: int, size: int, background: int | None) -> None:
        self.head, self.background = head, background
        self.queues = [[deque(maxlen=size) for _ in range(2)] for _ in range(outputs)]

    def losses(self, x: NDArray, label: int) -> float:
        """Mean over classes of the terms of one slide, by what the banks hold now."""
        if label < 0:
            return 0.0
        total, score = 0.0, by_hand(self.head, x)["score"]
        for c, sides in enumerate(self.queues):
            own, v = label == c, score[c].max()
            total += max(0, -v) if own else max(0, v)
            if opposite := sides[0 if own else 1]:
                feature, level = opposite[0]
                r, a = branches(self.head, feature[None])
                b = r[c, 0] * math.exp(a[c, 0] - level)
                if c == self.background:
                    total += max(0, b) if own else max(0, -b)
                elif own:
                    total += max(0, b - v) + max(0, b)
                else:
                    total += max(0, v - b)
        return total / len(self.queues)

    def take(self, x: NDArray, label: int) -> None:
        """The slide's top patches go in, what it was compared with goes to the end."""
        if label < 0:
            return
        want = by_hand(self.head, x)
        for c, sides in enumerate(self.queues):
            own = label == c
            sides[0 if own else 1].rotate(-1)
            sides[1 if own else 0].append((x[want["score"][c].argmax()], want["level"][c]))


def step(head: Head, features: Tensor, mask: Tensor, labels: Tensor, good: Tensor = GOOD) -> float:
    """The ranking loss of an update on one rank, after which the banks move on."""
    output = head(features, mask)
    loss = head.aux_loss(output, labels, EACH)
    head.record_bags([output], labels, list)
    head.after_step(good)
    return loss.item()


@pytest.mark.parametrize("background", [None, 0, 2])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (3, 2), (2, 1)])
def test_loss_and_banks_are_those_of_queues_under_weights_that_move(count, size, background):
    head = build(rank_weight=1.0, bank_size=size, background=background)
    reference = Reference(head, C, size, background)
    draw = np.random.default_rng(0)
    for update in range(45 // count):
        shake(head, update)
        features, mask = (part[:count] for part in bags(update))
        labels = draw.integers(-1, C, count)
        slides = [features[b, : SIZES[b]].numpy() for b in range(count)]
        pairs = list(zip(slides, labels, strict=True))
        expected = sum(reference.losses(*pair) for pair in pairs) / count
        assert step(head, features, mask, torch.from_numpy(labels)) == pytest.approx(expected, 1e-9)
        for pair in pairs:
            reference.take(*pair)
        for c, side in np.ndindex(C, 2):
            queue = reference.queues[c][side]
            assert head.filled[c, side] == len(queue)
            for k, (feature, level) in enumerate(queue):
                want = np.append(feature, level)
                np.testing.assert_allclose(head.bank[c, side, k], want, rtol=1e-9)
    assert (head.filled == size).all()


def test_a_skipped_step_moves_no_bank_and_is_forgotten():
    head = build(rank_weight=1.0)
    labels = torch.tensor([0, 1, 2])
    step(head, *bags(1), labels)
    before = copy.deepcopy(head.state_dict())
    step(head, bags(2)[0] * math.nan, bags(2)[1], labels, BAD)
    head.after_step(GOOD)  # nothing was seen since
    after = head.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def filled(**options: object) -> Head:
    """A head whose banks hold something on both sides of each class."""
    head = build(rank_weight=1.0, **options)
    for seed in range(2):
        step(head, *bags(seed), torch.tensor([0, 1, 2]))
    assert (head.filled > 0).all()
    return head


def test_the_gradient_is_that_of_the_loss_through_scores_and_banks():
    head, (features, mask) = filled(), bags(5)
    names = [name for name, _ in head.named_parameters()]
    labels = torch.tensor([2, 0, 1])

    def loss(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(head, dict(zip(names, weights, strict=True)), (x, mask))
        return head.aux_loss(output, labels, EACH), output.logits.sum()

    inputs = features.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(loss, (inputs, *head.parameters()), fast_mode=True)


def test_what_the_banks_hold_is_trained_too():
    head = filled()
    output = head(*bags(5))
    output.aux["top"] = output.aux["top"].detach()
    head.aux_loss(output, torch.tensor([2, 0, 1]), EACH).backward()
    assert head.value.weight.grad.norm() > 1e-3
    assert head.adapt[0].weight.grad.norm() > 1e-3


def test_a_head_without_the_ranking_loss_has_no_banks_and_takes_any_target():
    head = build(rank_weight=0.0)
    assert not list(head.buffers())
    output = head(*bags())
    assert head.aux_loss(output, torch.rand(3, 2), EACH) is None
    head.record_bags([output], torch.rand(3, 2), list)
    head.after_step(GOOD)


@pytest.mark.parametrize("target", [torch.rand(3), torch.ones(3, 2, dtype=torch.long)])
def test_targets_that_are_no_class_numbers_are_refused(target):
    head = build()
    with pytest.raises(UserError, match=r"(?s)one class number a slide.*head\.rank_weight=0"):
        head.aux_loss(head(*bags()), target, EACH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_weight": -1.0}, "rank_weight=-1 must be 0 or more"),
        ({"rank_weight": math.nan}, "rank_weight=nan must be 0 or more"),
        ({"bank_size": 0}, "bank_size=0 1 or more"),
        ({"background": 3}, "background=3 is not a class number, 0 to 2\n.*head.background=null"),
        ({"background": -1}, "background=-1 is not a class number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        HEADS.build("attrimil", D, C, **options)


# --- in the engine, in runs, on ranks ---


def model_of(chunk: int = 5, **options: Any) -> MILModel:
    """With both constraints, whose weights are large enough to be seen."""
    model = make_model(chunk, head="attrimil", **options)
    model.regularisers = nn.ModuleList([REGULARISERS.build("spatial", weight=1.0)])
    return model


def placed(bag: Bag) -> Bag:
    """On a grid three patches wide."""
    coords = [torch.arange(n) for n in bag.sizes]
    grid = tuple(torch.stack([n % 3, n // 3], dim=1).int() * 256 for n in coords)
    return replace(bag, coords=grid)


@pytest.mark.parametrize("chunk", [1, 3, 19])
def test_both_constraints_are_the_same_for_any_chunks(chunk):
    result = []
    for size, keep in ((chunk, "none"), (64, "all")):
        model = model_of(size, batch_norm="frozen", fold=False, keep_graphs=keep, verify=True)
        strategy = Strategy(torch.device("cpu"))
        strategy.setup(model, sgd, clip=None)
        task = TASKS.build("classification", classes=["a", "b"])
        for _ in range(2):  # the second with banks that hold something
            bag_losses(strategy, placed(make_bag(chunk=size)), task).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            result.append({n: grad.clone() for n, grad in grads.items()})
            strategy.step()
            model.head.after_step(GOOD)
        result.append(dict(model.head.named_buffers()))
    for actual, complete in zip(result[:3], result[3:], strict=True):
        assert apart(actual, complete) <= 1e-12


def test_a_stopped_run_goes_on_with_the_banks_it_had(tmp_path):
    def a_run(folder: str):
        torch.manual_seed(3)
        head = HEADS.build("attrimil", 6, 2).double()
        return trainer(tmp_path / folder, both(*[(0.5, 1.0)] * 3), head=head)

    (tmp_path / "complete").mkdir()
    (tmp_path / "stopped").mkdir()
    a_run("complete").fit()
    stopped, calls = a_run("stopped"), []

    def validate(model: MILModel) -> dict[str, float | None]:
        calls.append(model)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return {"auc": 0.5, "log_loss": 1.0}

    stopped.validate = validate
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    again = a_run("stopped")
    again.resume()
    assert (again.model.head.filled == 2).all()
    again.fit()
    files = [tmp_path / name / "last.safetensors" for name in ("complete", "stopped")]
    complete, actual = (load_checkpoint(file)[0] for file in files)
    assert complete.keys() == actual.keys()
    assert all(torch.equal(complete[name], actual[name]) for name in complete)
    assert (complete["model.head.filled"] == 4).all()


class OtherRank(Strategy):
    """As if another rank had sent ``of_other_rank`` about its bags."""

    of_other_rank: tuple[Sequence[int], Tensor, list[Tensor]]

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.of_other_rank]


def test_a_bag_of_two_ranks_is_recorded_once_and_one_of_weight_0_not_at_all():
    model, bag = make_model(head="attrimil"), make_bag((5, 3, 4), weight=[1.0, 0.5, 0.0])
    strategy = OtherRank(torch.device("cpu"))
    strategy.setup(model, None, clip=None)
    row = torch.full((2, 7), 7.0, dtype=torch.float64)
    target, rows = torch.tensor([1, 0]), torch.stack([row * 0, row])
    strategy.of_other_rank = ((bag.seeds[1], 3), torch.tensor([0.5, 1.0]), [target, rows])
    bag_losses(strategy, bag, TASKS.build("classification", classes=["a", "b"]))
    labels, stored = model.head._recorded
    assert labels.tolist() == [0, 0, 1]  # seeds 3, 11 and 12
    torch.testing.assert_close(stored[0], row)
    model.head.after_step(GOOD)
    assert model.head.filled.tolist() == [[1, 2], [2, 1]]


KINDS = ("ddp", "fsdp", "zero2")
SHARDED = (None, 10)


def steps(kind: str, shard_over: int | None) -> dict[str, Tensor]:
    """Weights and banks after updates over ragged bags."""
    strategy = two_ranks.build(kind)
    dtype = dtype_of(kind) if kind != "single" else torch.float64
    model = model_of(CHUNK, batch_norm="frozen").to(dtype)
    strategy.setup(model.to(memory_format=torch.channels_last), sgd, clip=None)
    task = TASKS.build("classification", classes=["a", "b"])
    for update in UPDATES:
        model.train()
        where = {"rank": strategy.rank, "world_size": strategy.world_size}
        bag = bag_of(update, dtype, shard_over=shard_over, **where)
        strategy.backward(bag_losses(strategy, bag, task).sum() / len(update))
        _, good = strategy.step()
        assert good
        model.head.after_step(good)
    return strategy.full_tensors(strategy.shards())


def world(strategy: Strategy) -> dict[Any, Any]:
    return {(kind, over): steps(kind, over) for kind in KINDS for over in SHARDED}


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict[Any, Any]:
    return two_ranks.run(world, tmp_path_factory.mktemp("attrimil"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_over", SHARDED)
def test_two_ranks_have_the_weights_and_the_banks_of_one(result, kind, shard_over):
    one, two = steps("single", None), result[kind, shard_over]
    assert (one["head.filled"] == 4).all()
    assert torch.equal(two["head.filled"], one["head.filled"])
    bar = 1e-9 if dtype_of(kind) is torch.float64 else 1e-4
    for name, value in one.items():
        torch.testing.assert_close(two[name].double(), value.double(), rtol=bar, atol=bar)


def test_each_class_has_an_attention_map_and_heatmaps_show_the_scores():
    output = build()(*bags())
    assert output.class_maps
    assert output.show_scores
