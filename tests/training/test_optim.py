"""The optimiser's arithmetic, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import e2e.encoders
import e2e.heads  # noqa: F401  (registers them)
from e2e.encoders.base import ENCODERS, Encoder
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import HEADS
from e2e.parallel import Strategy
from e2e.settings.schema import Optim
from e2e.training.optim import (
    OPTIMIZERS,
    SCHEDULES,
    MovingAverage,
    build_optimizer,
    learning_rate,
    learning_rate_scales,
)


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


class Ladder(Encoder):
    """Three layers, of which the middle one has two tensors, and a table that is never decayed."""

    def __init__(self) -> None:
        super().__init__([0.0] * 3, [1.0] * 3)
        self.low = nn.Parameter(torch.ones(2, 2))
        self.mid = nn.Linear(2, 2)
        self.table = nn.Parameter(torch.ones(2, 2))

    def layers(self, *, coarse: bool = False) -> list[list[str]]:
        return [["low"], ["mid.bias", "mid.weight"], ["table"]]

    def no_weight_decay(self) -> set[str]:
        return {"table"}


class LadderModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Ladder()
        self.head = nn.Linear(2, 2)


def test_each_layer_learns_at_its_share_by_hand():
    # The first step of AdamW on a gradient of 1 is the rate itself: m/c1 = 1, v/c2 = 1; before it
    # the weight shrinks by rate * decay. The head learns at 0.1, the encoder's last layer at 0.04,
    # the one below at 0.02, the first at 0.01.
    model = LadderModel().double()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.ones_like(parameter)
    build_optimizer(model, lr=0.1, weight_decay=0.5, encoder_lr=0.04, layer_decay=0.5).step()
    decayed = {"encoder.low": 0.01, "encoder.mid.weight": 0.02, "head.weight": 0.1}
    free = {"encoder.mid.bias": 0.02, "encoder.table": 0.04, "head.bias": 0.1}
    expected = {name: 2 * (1 - rate * 0.5) - rate for name, rate in decayed.items()}
    expected |= {name: 2 - rate for name, rate in free.items()}
    least = {name: p.min().item() for name, p in model.named_parameters()}
    most = {name: p.max().item() for name, p in model.named_parameters()}
    assert least == pytest.approx(expected, abs=1e-8)
    assert most == pytest.approx(expected, abs=1e-8)


def test_a_group_holds_its_share_of_the_schedule():
    groups = build_optimizer(
        LadderModel(), lr=0.1, weight_decay=0.5, encoder_lr=0.04, layer_decay=0.5
    ).param_groups
    assert sorted((g["lr_scale"], g["weight_decay"], len(g["params"])) for g in groups) == [
        (pytest.approx(0.1), 0.5, 1),
        (pytest.approx(0.2), 0.0, 1),
        (pytest.approx(0.2), 0.5, 1),
        (pytest.approx(0.4), 0.0, 1),
        (1.0, 0.0, 1),
        (1.0, 0.5, 1),
    ]
    assert all(g["lr"] == pytest.approx(0.1 * g["lr_scale"]) for g in groups)


def model_of(name: str, **options) -> MILModel:
    """Encoder and head without memory behind them: names and shapes are all that counts here."""
    with torch.device("meta"):
        encoder = ENCODERS.build(name, pretrained=False, **options)
        return MILModel(encoder, HEADS.build("abmil", encoder.dim, 2))


def test_the_layers_of_a_vit_by_hand():
    # Twelve blocks and what is below them: 13 layers, of which the last block (with the norm
    # behind it) is the encoder's last.
    model = model_of("vit_tiny_patch16_224")
    scales = learning_rate_scales(model, encoder=0.3, layer_decay=0.75)
    below = ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed")
    expected = {f"encoder.net.{name}": 0.3 * 0.75**12 for name in below}
    for name, _ in model.encoder.net.named_parameters():
        if name.startswith("blocks."):
            expected[f"encoder.net.{name}"] = 0.3 * 0.75 ** (11 - int(name.split(".")[1]))
    expected |= {f"encoder.net.norm.{name}": 0.3 for name in ("weight", "bias")}
    expected |= {f"head.{name}": 1.0 for name, _ in model.head.named_parameters()}
    assert scales == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("r18", {}),
        ("r50", {"freeze": 2}),
        ("resnet50", {}),
        ("convnext_tiny", {"stage": 2}),
        ("swin_tiny_patch4_window7_224", {"freeze": 1}),
        ("vit_base_patch16_224", {}),
        ("vit_tiny_patch16_224", {"lora_rank": 4}),
        ("vit_tiny_patch16_224", {"stage": 5, "freeze": 3, "lora_rank": 4}),
        ("tf_efficientnet_lite0", {}),
        ("poolformer_s12", {"stage": 2}),
    ],
)
def test_every_trained_parameter_is_in_one_group(name, options):
    model = model_of(name, **options)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = build_optimizer(model, lr=0.1, weight_decay=0.3, layer_decay=0.5).param_groups
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    scales = {group["lr_scale"] for group in groups}
    assert 1.0 in scales
    assert len(scales) > 2
    for group in groups:
        for parameter in group["params"]:
            if parameter.ndim < 2:
                assert group["weight_decay"] == 0.0


def test_embeddings_and_tokens_are_not_decayed():
    for name, options, undecayed in (
        ("vit_tiny_patch16_224", {}, {"cls_token", "pos_embed"}),
        ("vit_tiny_patch16_224", {"stage": 3}, {"model.cls_token", "model.pos_embed"}),
        (
            "swin_tiny_patch4_window7_224",
            {"stage": 0},
            {f"layers_0.blocks.{k}.attn.relative_position_bias_table" for k in (0, 1)},
        ),
    ):
        model = model_of(name, **options)
        names = {id(p): n for n, p in model.named_parameters()}
        free = {
            names[id(p)]
            for group in build_optimizer(model, lr=0.1, weight_decay=0.3).param_groups
            for p in group["params"]
            if group["weight_decay"] == 0 and p.ndim > 1
        }
        assert free == {f"encoder.net.{n}" for n in undecayed}


def test_three_fused_steps_are_adamw_by_hand():
    # Loshchilov & Hutter 2019, algorithm 2, with PyTorch's betas and epsilon.
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 2, bias=False).double()
    weight = net.weight.detach().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    optimizer = build_optimizer(net, lr=0.1, weight_decay=0.5)
    assert optimizer.defaults["fused"]
    for step in (1, 2, 3):
        gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        net.weight.grad = gradient
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        torch.testing.assert_close(net.weight.detach(), weight, rtol=1e-12, atol=1e-14)


def test_three_steps_of_sgd_are_momentum_with_l2_by_hand():
    # Sutskever et al. 2013 as PyTorch has it: v <- 0.9 v + (g + decay w), w <- w - lr v; v starts as
    # the first gradient.
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 2).double()
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    velocity, drift = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer = build_optimizer(net, lr=0.1, weight_decay=0.5, name="sgd")
    for _ in range(3):
        gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        slope = torch.randn(bias.shape, generator=generator, dtype=torch.float64)
        net.weight.grad, net.bias.grad = gradient, slope
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.5 * weight
        drift = 0.9 * drift + slope  # a vector is not decayed
        weight, bias = weight - 0.1 * velocity, bias - 0.1 * drift
        torch.testing.assert_close(net.weight.detach(), weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(net.bias.detach(), bias, rtol=1e-12, atol=1e-14)


def test_adams_decay_is_in_the_gradient():
    # Kingma & Ba 2015: the first step is lr g / (|g| + eps), whatever |g|; with L2 g = decay w, so
    # that even without a gradient a weight moves by the whole rate.
    net = nn.Linear(2, 2).double()
    before = net.weight.detach().clone()
    net.weight.grad, net.bias.grad = torch.zeros_like(net.weight), torch.zeros_like(net.bias)
    build_optimizer(net, lr=0.1, weight_decay=0.5, name="adam").step()
    torch.testing.assert_close(net.weight.detach(), before - 0.1 * before.sign(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_leaves_weights_and_state_alone(name):
    net = nn.Linear(3, 2)
    strategy = Strategy(torch.device("cpu"))
    strategy.setup(net, lambda m: build_optimizer(m, lr=0.1, weight_decay=0.5, name=name), clip=1.0)
    net(torch.ones(1, 3)).sum().backward()
    assert strategy.step()[1]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    slots = {key: value.clone() for key, value in strategy.optimizer_tensors().items()}
    strategy.backward(net(torch.ones(1, 3)).sum() * math.nan)
    assert not strategy.step()[1]
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(strategy.optimizer_tensors(), slots, rtol=0, atol=0)


def test_the_settings_know_every_optimiser_and_schedule():
    for name in OPTIMIZERS:
        Optim(name=name)
    for schedule in SCHEDULES:
        Optim(schedule=schedule)
    with pytest.raises(UserError, match=" or ".join(OPTIMIZERS)):
        Optim(name="lion")
    with pytest.raises(UserError, match=" or ".join(SCHEDULES)):
        Optim(schedule="step")


def test_where_there_is_no_fused_kernel_lists_are_updated():
    optimizer = build_optimizer(model_of("r18"), lr=0.1, weight_decay=0.0)  # on the meta device
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (False, True)


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


def test_a_constant_rate_rises_and_stays():
    rates = [learning_rate(s, peak=0.8, warmup=2, steps=5, schedule="constant") for s in range(7)]
    assert rates == pytest.approx([0.4, *[0.8] * 6])


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


GOOD = torch.tensor(True)


def test_the_average_warms_up_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    average = MovingAverage(net.state_dict(), decay=0.2)
    nn.init.constant_(net.weight, 1.0)
    average.update(net.state_dict(), 0, GOOD)  # decay min(0.2, 1/10): 0 * 0.1 + 1 * 0.9
    assert float(average.state["weight"]) == pytest.approx(0.9)
    nn.init.constant_(net.weight, 2.0)
    average.update(net.state_dict(), 1, GOOD)  # min(0.2, 2/11): 0.9 * 2/11 + 2 * 9/11
    assert float(average.state["weight"]) == pytest.approx((1.8 + 18) / 11)
    average.state["weight"].fill_(1.0)
    average.update(net.state_dict(), 1000, GOOD)  # 0.2 by then
    assert float(average.state["weight"]) == pytest.approx(0.2 * 1 + 0.8 * 2)


def test_buffers_are_averaged_too_and_counters_copied():
    net = Net()
    average = MovingAverage(net.state_dict(), decay=0.5)
    net.norm.running_mean.fill_(4.0)
    net.norm.num_batches_tracked.fill_(7)
    average.update(net.state_dict(), 10**6, GOOD)
    assert average.state["norm.running_mean"].tolist() == [2.0] * 4
    assert int(average.state["norm.num_batches_tracked"]) == 7


def test_the_average_is_no_part_of_the_model():
    net = nn.Linear(2, 2)
    average = MovingAverage(net.state_dict(), decay=0.5)
    start = {name: value.clone() for name, value in average.state.items()}
    nn.init.constant_(net.weight, 9.0)
    assert all(torch.equal(average.state[name], start[name]) for name in start)
    average.update(net.state_dict(), 10**6, GOOD)
    assert bool((net.weight == 9.0).all())
    assert not average.state["weight"].requires_grad


def test_the_average_stays_where_it_is_after_a_skipped_step():
    net = Net()
    average = MovingAverage(net.state_dict(), decay=0.5)
    nn.init.constant_(net.norm.running_mean, 4.0)
    before = {name: value.clone() for name, value in average.state.items()}
    average.update(net.state_dict(), 10, torch.tensor(False))
    assert all(torch.equal(average.state[name], value) for name, value in before.items())
