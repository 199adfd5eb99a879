"""The optimiser's arithmetic, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from e2e.optim import WeightAverage, build_optimizer, clip_gradients, learning_rate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 2)
        self.alpha = nn.Parameter(torch.ones(1, 1))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_only_matrices_and_kernels_are_decayed():
    net = Net()
    optimizer = build_optimizer(net, lr=0.1, weight_decay=0.3)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups == {
        0.3: {"conv.weight", "linear.weight"},
        0.0: {"conv.bias", "norm.weight", "norm.bias", "linear.bias", "alpha"},
    }
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)


def test_decay_is_decoupled_from_the_gradient():
    net = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = build_optimizer(net, lr=0.1, weight_decay=0.5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(net.bias.detach(), before["bias"])


def test_the_schedule_by_hand():
    # 2 steps of warm-up, then steps 2 to 6: half a cosine over 4 intervals.
    rates = [learning_rate(step, peak=0.8, warmup=2, steps=7) for step in range(7)]
    half = 0.8 * 0.5
    expected = [0.4, 0.8, 0.8, half * (1 + math.sqrt(0.5)), half, half * (1 - math.sqrt(0.5)), 0.0]
    assert rates == pytest.approx(expected)


def test_the_schedule_ends_at_its_last_value_and_stays_there():
    rates = [learning_rate(s, peak=1.0, warmup=0, steps=5, final=0.1) for s in (0, 2, 4, 5, 99)]
    assert rates == pytest.approx([1.0, 0.55, 0.1, 0.1, 0.1])


@given(st.integers(0, 20), st.integers(1, 60))
def test_the_rate_rises_then_falls_and_never_passes_its_peak(warmup, steps):
    rates = [learning_rate(step, peak=0.3, warmup=warmup, steps=steps) for step in range(steps)]
    assert all(0 <= rate <= 0.3 + 1e-12 for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def with_gradients(*values: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(())) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    return parameters


def grads(parameters: list[nn.Parameter]) -> list[float]:
    return [float(p.grad) for p in parameters if p.grad is not None]


def test_clipping_scales_all_gradients_together():
    parameters = with_gradients(3.0, 4.0)
    assert float(clip_gradients(parameters, 1.0)) == pytest.approx(5.0)
    assert grads(parameters) == pytest.approx([0.6, 0.8], abs=1e-5)


@pytest.mark.parametrize("limit", [None, 6.0])
def test_gradients_under_the_limit_or_without_one_are_left_alone(limit):
    parameters = with_gradients(3.0, 4.0)
    parameters.append(nn.Parameter(torch.zeros(())))  # one that has no gradient
    assert float(clip_gradients(iter(parameters), limit)) == pytest.approx(5.0)
    assert grads(parameters) == [3.0, 4.0]


def test_the_average_warms_up_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    average = WeightAverage(net, decay=0.2)
    nn.init.constant_(net.weight, 1.0)
    average.update(net, 0)  # decay min(0.2, 1/10): 0 * 0.1 + 1 * 0.9
    assert float(average.state["weight"]) == pytest.approx(0.9)
    nn.init.constant_(net.weight, 2.0)
    average.update(net, 1)  # min(0.2, 2/11): 0.9 * 2/11 + 2 * 9/11
    assert float(average.state["weight"]) == pytest.approx((1.8 + 18) / 11)
    average.state["weight"].fill_(1.0)
    average.update(net, 1000)  # 0.2 by then
    assert float(average.state["weight"]) == pytest.approx(0.2 * 1 + 0.8 * 2)


def test_buffers_are_averaged_too_and_counters_copied():
    net = Net()
    average = WeightAverage(net, decay=0.5)
    net.norm.running_mean.fill_(4.0)
    net.norm.num_batches_tracked.fill_(7)
    average.update(net, 10**6)
    assert average.state["norm.running_mean"].tolist() == [2.0] * 4
    assert int(average.state["norm.num_batches_tracked"]) == 7


def test_the_average_is_no_part_of_the_model():
    net = nn.Linear(2, 2)
    average = WeightAverage(net, decay=0.5)
    start = {name: value.clone() for name, value in average.state.items()}
    nn.init.constant_(net.weight, 9.0)
    assert all(torch.equal(average.state[name], start[name]) for name in start)
    average.update(net, 10**6)
    assert bool((net.weight == 9.0).all())
    assert not average.state["weight"].requires_grad
