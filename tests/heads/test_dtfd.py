"""DTFD-MIL against its formulas in float64, patch by patch; its splits, its loss, its two tiers."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head
from e2e.heads.dtfd import DISTILLATIONS, select_patches, split_patches

EACH = functools.partial(nn.functional.cross_entropy, reduction="none")
"""The loss of a classification task."""

Array = NDArray[np.float64]
Weights = dict[str, Array]

D, C, E = 5, 3, 16  # narrow patches would be all zero behind the ReLU, hence tied
SIZES = (11, 1, 3, 12)
N = 13


def build(outputs: int = C, **options: object) -> Head:
    torch.manual_seed(1)
    head = HEADS.build("dtfd", D, outputs, **{"embed_dim": E, "attn_dim": 4, **options})
    for parameter in head.parameters():  # nothing stays at a 0 or a 1 that could hide a mistake
        nn.init.normal_(parameter, std=0.5)
    return head.double().eval()


def bags() -> tuple[Tensor, Tensor]:
    """Real patches anywhere, not only in front; NaN elsewhere."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(len(SIZES), N, D, dtype=torch.float64, generator=g)
    rank = torch.rand(len(SIZES), N, generator=g).argsort(dim=1)
    mask = rank < torch.tensor(SIZES).unsqueeze(1)
    return features.masked_fill(~mask.unsqueeze(-1), math.nan), mask


def softmax(score: Array) -> Array:
    power = np.exp(score - score.max())
    return power / power.sum()


def attention(tokens: list[Array], p: Weights, name: str, gated: bool) -> Array:
    scores = []
    for h in tokens:
        hidden = np.tanh(p[f"{name}.value.0.weight"] @ h + p[f"{name}.value.0.bias"])
        if gated:
            gate = p[f"{name}.gate.0.weight"] @ h + p[f"{name}.gate.0.bias"]
            hidden = hidden / (1 + np.exp(-gate))
        scores.append((p[f"{name}.score.weight"] @ hidden)[0])
    return softmax(np.array(scores))


def reference(
    x: Array, split: list[list[int]], p: Weights, *, distill: str, instances: int, gated: bool
) -> tuple[Array, Array, Array, Array]:
    """Logits (C,), attention (n,), patch probabilities (n, C), pseudo-bag logits, of one bag."""
    h = [np.maximum(p["project.0.weight"] @ row, 0) for row in x]
    probability, first_tier = np.zeros((len(x), len(p["classify1.bias"]))), []
    distilled: list[tuple[Array, dict[int, float]]] = []  # a feature, what patches it is made of
    for group in split:
        weight = dict(zip(group, attention([h[n] for n in group], p, "score1", gated), strict=True))
        pooled = np.sum([weight[n] * h[n] for n in group], axis=0)
        first_tier.append(p["classify1.weight"] @ pooled + p["classify1.bias"])
        for n in group:
            probability[n] = softmax(p["classify1.weight"] @ (weight[n] * h[n]))
        ranked = sorted(group, key=lambda n: probability[n, -1], reverse=True)
        selected = set(ranked[:instances])
        if distill == "maxmins":
            selected |= set(ranked[-instances:])
        if distill == "afs":
            distilled.append((pooled, weight))
        else:
            distilled += [(h[n], {n: 1.0}) for n in sorted(selected)]
    share = attention([feature for feature, _ in distilled], p, "score2", gated)
    slide, map_ = np.zeros(E), np.zeros(len(x))
    for b, (feature, made_of) in zip(share, distilled, strict=True):
        slide += b * feature
        for n, part in made_of.items():
            map_[n] += b * part
    logits = p["classify2.weight"] @ slide + p["classify2.bias"]
    return logits, map_, probability, np.array(first_tier)


def check(head: Head, groups: Tensor, output, **options) -> float:
    """Compare ``output`` bag by bag with the reference on the given split; its aux loss for class 1."""
    p = {name: value.detach().numpy() for name, value in head.named_parameters()}
    features, mask = bags()
    losses = []
    for b in range(len(SIZES)):
        numbers = groups[b, mask[b]].tolist()
        split = [[n for n, g in enumerate(numbers) if g == k] for k in sorted(set(numbers))]
        expected = reference(features[b, mask[b]].numpy(), split, p, **options)
        assert output.aux["exists"][b].sum() == len(split)
        result = (
            output.logits[b],
            output.attention()[b, 0, mask[b]],
            output.instance_logits[b, mask[b]].softmax(-1),
            output.aux["logits"][b, : len(split)],
        )
        for actual, expected_value in zip(result, expected, strict=True):
            np.testing.assert_allclose(
                actual.detach().numpy(), expected_value, rtol=1e-10, atol=1e-12
            )
        losses.append(np.mean([-math.log(softmax(row)[1]) for row in expected[3]]))
    return float(np.mean(losses))


OPTIONS = [
    {"distill": "afs", "instances": 1, "gated": True},
    {"distill": "afs", "instances": 1, "gated": False},
    {"distill": "maxs", "instances": 1, "gated": True},
    {"distill": "maxs", "instances": 2, "gated": True},
    {"distill": "maxmins", "instances": 1, "gated": True},
    {"distill": "maxmins", "instances": 3, "gated": True},  # more than a pseudo-bag may hold
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("outputs", [2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_output_and_loss_are_the_formulas_on_each_bag_alone(options, outputs, training):
    head = build(outputs, pseudo_bags=4, **options).train(training)
    features, mask = bags()
    torch.manual_seed(3)
    groups = split_patches(mask, 4, shuffle=training)
    torch.manual_seed(3)
    output = head(features, mask)
    loss = check(head, groups, output, **options)
    actual = head.aux_loss(output, torch.ones(len(SIZES), dtype=torch.long), EACH)
    assert math.isclose(actual.item(), loss, rel_tol=1e-10)


def test_one_output_ranks_by_its_own_activation():
    head = build(1, distill="maxs", pseudo_bags=1)
    features, mask = bags()
    output = head(features, mask)
    best = output.instance_logits[..., 0].masked_fill(~mask, -math.inf).argmax(dim=1)
    torch.testing.assert_close(output.attention()[:, 0].argmax(dim=1), best)


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 7),
    st.booleans(),
)
def test_pseudo_bags_are_of_nearly_equal_size_and_never_empty(seed, sizes, pseudo_bags, shuffle):
    torch.manual_seed(seed)
    rank = torch.rand(len(sizes), max(sizes) + 2).argsort(dim=1)
    mask = rank < torch.tensor(sizes).unsqueeze(1)
    groups = split_patches(mask, pseudo_bags, shuffle=shuffle)
    for b, size in enumerate(sizes):
        held = groups[b, mask[b]].bincount(minlength=pseudo_bags)
        assert sorted(held.tolist()) == sorted(
            len(part) for part in np.array_split(np.arange(size), pseudo_bags)
        )
        if not shuffle:
            assert groups[b, mask[b]].tolist() == [n % pseudo_bags for n in range(size)]


def test_training_splits_by_torchs_generator_and_evaluation_does_not_draw():
    head, given_bags = build(), bags()

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return head(*given_bags).logits

    before = torch.random.get_rng_state()
    head(*given_bags)
    assert torch.equal(torch.random.get_rng_state(), before)
    head.train()
    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2))


def test_every_patch_is_as_likely_to_share_a_pseudo_bag_with_any_other():
    torch.manual_seed(0)
    groups = split_patches(torch.ones(4000, 6, dtype=torch.bool), 2, shuffle=True)
    together = (groups.unsqueeze(1) == groups.unsqueeze(2)).double().mean(0)
    apart = ~torch.eye(6, dtype=torch.bool)
    # Two of the five others are in the own half; 5 standard deviations of 4,000 draws.
    assert (together[apart] - 0.4).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 4000)


def test_a_patchs_activation_is_grad_cam_of_its_pseudo_bag():
    head = build(pseudo_bags=1)
    features, mask = bags()
    x = features[:1, mask[0]]
    output = head(x, mask[:1, mask[0]])
    h, a = head.project(x)[0].detach(), output.attention()[0, 0].detach()
    attended = (len(h) * a.unsqueeze(1) * h).requires_grad_()
    scores = head.classify1(attended.mean(dim=0))
    for c in range(C):
        gradient = torch.autograd.grad(scores[c], attended, retain_graph=True)[0]
        beta = gradient.mean(dim=0)
        torch.testing.assert_close(output.instance_logits[0, :, c], attended @ beta)


def test_both_ends_are_chosen_though_all_probabilities_round_to_a_half():
    activation = torch.zeros(1, 5, 2)
    activation[0, :, 1] = torch.tensor([0.0, 3e-9, -2e-9, 1e-9, 2e-9])
    assert activation.softmax(-1).unique().numel() == 1
    member = torch.ones(1, 1, 5, dtype=torch.bool)
    selected = select_patches(activation, member, 1, least=True)
    assert selected[0].tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("distill", DISTILLATIONS)
def test_attention_is_the_weights_by_which_patches_make_the_slide(distill):
    head = build(distill=distill)
    features, mask = bags()
    output = head(features, mask)
    h = head.project(features.masked_fill(~mask.unsqueeze(-1), 0.0))
    slide = (output.attention() @ h).squeeze(1)
    torch.testing.assert_close(head.classify2(slide), output.logits)
    torch.testing.assert_close(output.attention().sum(-1), torch.ones(4, 1, dtype=torch.float64))
    assert output.attention_logits[:, 0][mask].isfinite().all()
    assert (output.attention_logits[:, 0][~mask] == -math.inf).all()


@pytest.mark.parametrize("distill", DISTILLATIONS)
def test_each_tier_trains_the_encoder_and_both_train_every_weight(distill):
    head = build(distill=distill).train()
    features, mask = bags()
    clean = features.masked_fill(~mask.unsqueeze(-1), 0.0).requires_grad_()
    output = head(clean, mask)
    losses = {
        "classify2": nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 1])),
        "classify1": head.aux_loss(output, torch.tensor([0, 1, 2, 1]), EACH),
    }
    for tier, loss in losses.items():
        learned = [clean, getattr(head, tier).weight, head.project[0].weight]
        for gradient in torch.autograd.grad(loss, learned, retain_graph=True):
            assert gradient.abs().max() > 1e-6, tier
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_gradients_are_those_of_finite_differences():
    head = build()
    features, mask = bags()
    clean = features.masked_fill(~mask.unsqueeze(-1), 0.0)[:3].requires_grad_()

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        output = head(x, mask[:3])
        loss = head.aux_loss(output, torch.tensor([0, 1, 2]), EACH)
        return output.logits, output.attention(), output.instance_logits, loss

    assert torch.autograd.gradcheck(outputs, clean)


def test_the_first_tiers_loss_is_the_tasks_own_whatever_its_targets_are():
    head, target = build().train(), torch.rand(4, 3, dtype=torch.float64)

    def squares(logits: Tensor, target: Tensor) -> Tensor:
        return (logits - target).square().sum(dim=1)

    output = head(*bags())
    logits, exists = output.aux["logits"], output.aux["exists"]
    want = 0.0
    for b in range(len(SIZES)):
        each = [
            squares(logits[b, g : g + 1], target[b : b + 1]) for g in range(int(exists[b].sum()))
        ]
        want += torch.cat(each).mean().item() / len(SIZES)
    assert head.aux_loss(output, target, squares).item() == pytest.approx(want, 1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": "maxmin"}, "unknown head.distill=maxmin; did you mean 'maxmins'"),
        ({"pseudo_bags": 0}, "pseudo_bags=0"),
        ({"instances": 0}, "instances=0"),
        ({"act": "rellu"}, "did you mean 'relu'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


@pytest.mark.parametrize("distill", ["afs", "maxmins"])
def test_it_exports(distill):
    head = build(distill=distill)
    features, mask = bags()
    program = torch.export.export(head, (features, mask))
    torch.testing.assert_close(program.module()(features, mask).logits, head(features, mask).logits)
