"""Every strategy takes the steps of one process, on ragged bags. Compared with SGD, in float64 where
the strategy allows it: after AdamW weights say little, because it makes a whole step of the
rounding noise of a zero gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import two_ranks
from tests.helpers.two_ranks import BROKEN, CASES, CPU, KINDS, LOADS, bag_of, dtype_of, new_model


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Any, Any]:
    """What two ranks did together; see two_ranks.py."""
    return two_ranks.run(two_ranks.all_steps_and_else, tmp_path_factory.mktemp("two_ranks"))


def bar(kind: str) -> float:
    return 1e-6 if dtype_of(kind) is torch.float64 else 1e-4


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return sum(((a[k].double() - b[k].double()).norm() ** 2).item() for k in a) ** 0.5


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the buffers, which would make the way that weights went look long."""
    names = dict(new_model().named_parameters())
    return {name: value for name, value in state.items() if name in names}


def apart(state: dict[str, Tensor], reference: dict[str, Tensor], policy: str) -> float:
    """|w - w_ref| / |w_ref - w_0|."""
    start = trained(new_model(policy, torch.float64).state_dict())
    moved = distance(trained(reference), start)
    assert moved > 1e-2
    return distance(trained(state), trained(reference)) / moved


def one_process(kind: str, *case: Any) -> dict[str, Any]:
    return two_ranks.take_steps(two_ranks.build("single"), *case, dtype_of(kind))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("policy", "clip", "shard_over"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_steps_of_one_process(
    found, kind, policy, clip, shard_over, record_property
):
    one, two = one_process(kind, policy, clip, shard_over), found[kind, policy, clip, shard_over]
    gap = apart(two["weights"], one["weights"], policy)
    for name, value in (("kind", kind), ("apart", gap), ("bar", bar(kind))):
        record_property(name, value)
    assert gap < bar(kind)
    torch.testing.assert_close(two["norms"], one["norms"], rtol=bar(kind), atol=0)
    for what in ("weights", "average"):  # buffers too
        torch.testing.assert_close(two[what], one[what], rtol=0, atol=10 * bar(kind))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_reduction_is_seen(found, kind, record_property):
    one, two = one_process(kind, "frozen", None, None), found[kind, "broken"]
    gap = apart(two["weights"], one["weights"], "frozen")
    record_property("kind", kind)
    record_property("broken", gap)
    assert gap > 100 * bar(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_sharded_bag_train_the_encoder_as_the_whole_bag_does(found, kind):
    one = two_ranks.shard_a_bag(two_ranks.build("single"), dtype_of(kind))
    torch.testing.assert_close(found[kind, "sharded"], one, rtol=0, atol=bar(kind) / 10)
    start = two_ranks.ShardedBag().state_dict()
    assert all(distance({"": one[name]}, {"": start[name]}) > 1e-3 for name in ("encode.0.weight",))


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(found, kind, optimizer):
    story = found[kind, "bad", optimizer]
    for rank in story["told"]:
        assert [good for good, _ in rank] == [True, False, False, True]
        assert torch.tensor([norm for _, norm in rank]).isfinite().tolist() == [1, 0, 0, 1]
    first, after_nan, after_inf, last = story["states"]
    assert same(first, after_nan)
    assert same(first, after_inf)
    assert all(value.isfinite().all() for value in last.values())
    assert not torch.equal(first["encoder.net.0.weight"], last["encoder.net.0.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_may_evaluate_other_bags_with_other_weights_and_train_on(found, kind):
    story = found[kind, "uneven"]
    assert same(story["before"], story["after"])
    model = new_model().eval()
    for number, weights in enumerate((story["before"], story["other"])):
        model.load_state_dict(weights)
        for slide in range(5):
            if (number, slide) in story["selected"]:
                logits = model(bag_of([slide], torch.float32), CPU)[0].logits
                torch.testing.assert_close(story["selected"][number, slide], logits)
    assert len(story["selected"]) == 8
    assert not torch.equal(
        story["after"]["encoder.net.0.weight"], story["next"]["encoder.net.0.weight"]
    )


def teacher_by_hand(kind: str) -> dict[str, Tensor]:
    """The teacher's weights after the updates of :func:`two_ranks.teach`, without average_into."""
    strategy, dtype = two_ranks.build("single"), dtype_of(kind)
    model = two_ranks.new_teacher_model(dtype)
    strategy.setup(model, two_ranks.sgd, clip=None)
    student, teacher = (model.head.get_submodule(name) for name in ("student", "teacher"))
    for slides in two_ranks.UPDATES:
        strategy.backward(two_ranks.loss_of(strategy, slides))
        _, good = strategy.step()
        student[1].running_mean += 0.25
        model.batch_norm.commit(strategy.all_reduce_sum, good)
        for name, value in teacher.state_dict().items():  # by the formula
            if value.is_floating_point():
                moved = student.state_dict()[name]
                value.copy_(two_ranks.DECAY * value + (1 - two_ranks.DECAY) * moved)
    return {f"head.teacher.{name}": value for name, value in teacher.state_dict().items()}


@pytest.mark.parametrize("kind", ["single", *KINDS])
def test_a_teacher_follows_its_student_under_every_strategy(found, kind):
    story = two_ranks.teach("single") if kind == "single" else found[kind, "teacher"]
    expected = teacher_by_hand("ddp" if kind == "single" else kind)
    exact = kind == "single" or dtype_of(kind) is torch.float64
    tolerance = {"rtol": 0, "atol": 1e-12 if exact else 1e-6}
    for name, value in expected.items():
        torch.testing.assert_close(story["trained"][name], value, **tolerance)
    start = two_ranks.new_teacher_model(torch.float64).state_dict()
    for name in ("0.weight", "1.running_mean", "3.bias"):  # and it did move, yet is no copy
        key = f"head.teacher.{name}"
        assert (story["trained"][key] - start[key]).norm() > 1e-3
        assert (story["trained"][key] - story["trained"][f"head.student.{name}"]).norm() > 1e-3
    assert same(story["trained"], story["skipped"])  # a skipped step moves nothing
    assert same(story["loaded"], story["skipped"])  # a checkpoint holds it
    # And the forward sees it move: under ZeRO-3 a teacher that is gathered must not be an old one.
    one = two_ranks.teach("single")["logits"]
    torch.testing.assert_close(story["logits"], one, rtol=0, atol=10 * bar("zero0"))
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(one))


def test_ranks_that_disagree_get_a_message_with_what_and_which(found):
    told = found["disagree"]
    assert len(set(told)) == 1
    assert "settings: abc on rank 0; abd on rank 1" in told[0]
    assert "torch: (nothing) on rank 0; 9.9 on rank 1" in told[0]
    assert "cohort" not in told[0]


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize(("source", "kind"), LOADS)
def test_any_strategy_loads_what_any_other_saved(found, source, kind, optimizer):
    saved, back = found[optimizer, source], found[optimizer, source, kind]
    assert all(len(saved[what]) for what in ("weights", "average", "optimizer"))
    assert saved["shapes"] == {name: value.shape for name, value in saved["weights"].items()}
    for what in ("weights", "average", "optimizer"):
        assert same(saved[what], back[what]), what
    if optimizer == "sgd_momentum" or source == kind:  # and goes on as if never stopped
        way = distance(trained(saved["next"]), trained(saved["weights"]))
        assert distance(trained(back["next"]), trained(saved["next"])) < 1e-4 * way


def test_what_one_process_saves_all_load_and_the_other_way_round(found):
    for optimizer in (two_ranks.sgd_momentum, two_ranks.adamw):
        one = two_ranks.train_and_save("single", optimizer)
        saved = found[optimizer.__name__, "ddp"]
        assert {k: v.shape for k, v in one["optimizer"].items()} == {
            k: v.shape for k, v in saved["optimizer"].items()
        }
        strategy = two_ranks.build("single")
        strategy.setup(new_model(), optimizer, clip=1.0)
        back = two_ranks.load_and_train(strategy, saved)
        assert same(back["optimizer"], saved["optimizer"])
        assert same(back["weights"], saved["weights"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fault"), [("ddp", "dies"), ("zero2", "hangs")])
def test_a_lost_rank_ends_the_others_with_one_message(tmp_path, kind, fault):
    code, said = two_ranks.lose_a_rank(kind, fault, tmp_path)
    assert code == 4, said
    assert "error: rank 0 lost contact with another rank" in said
    assert "--resume" in said
    assert len(said.strip().splitlines()) == 3
