"""CLAM and its instance loss against loops over single bags and patches in float64."""

from __future__ import annotations

import functools
import inspect
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
from e2e.heads.clam import evidence

EACH = functools.partial(nn.functional.cross_entropy, reduction="none")
"""The loss of a classification task."""

D, K = 6, 4
SIZES = (19, 1, 5, 8, 2)
B, N = len(SIZES), max(SIZES)
NAMES = ["clam_sb", "clam_mb"]

Array = NDArray[np.float64]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, outputs: int = 3, **options: object) -> Head:
    torch.manual_seed(1)
    small = {"embed_dim": 7, "attn_dim": 5, "k_sample": K}
    head = HEADS.build(name, D, outputs, **(small | options)).double().eval()
    for parameter in head.parameters():  # nothing stays at a 0 or a 1 that could hide a mistake
        nn.init.normal_(parameter, std=0.6)
    return head


def bags() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(B, N, D, dtype=torch.float64)
    mask = torch.arange(N) < torch.tensor(SIZES).unsqueeze(1)
    return features.masked_fill(~mask.unsqueeze(-1), math.nan), mask


def weights(head: Head) -> dict[str, Array]:
    return {key: p.detach().numpy() for key, p in head.named_parameters()}


def hidden(x: Array, p: dict[str, Array], norm: bool) -> Array:
    if norm:
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5) * p["project.0.weight"] + p["project.0.bias"]
    layer = f"project.{int(norm)}"
    return np.maximum(p[f"{layer}.weight"] @ x + p[f"{layer}.bias"], 0)


def scores(h: Array, p: dict[str, Array]) -> Array:
    """One number for each attention map, before the softmax."""
    value = np.tanh(p["score.value.0.weight"] @ h + p["score.value.0.bias"])
    gate = 1 / (1 + np.exp(-(p["score.gate.0.weight"] @ h + p["score.gate.0.bias"])))
    return p["score.score.weight"] @ (value * gate)


def reference(
    bag: Array, p: dict[str, Array], outputs: int, norm: bool = False
) -> tuple[Array, Array, Array]:
    """Of one bag: logits (C,), attention of each class (C, N), pairs of scores (N, C, 2)."""
    patches = [hidden(x, p, norm) for x in bag]
    raw = np.array([scores(h, p) for h in patches])
    logits, attention = np.zeros(outputs), np.zeros((outputs, len(bag)))
    pairs = np.zeros((len(bag), outputs, 2))
    for m in range(outputs):
        column = raw[:, m if raw.shape[1] > 1 else 0]
        attention[m] = np.exp(column) / np.exp(column).sum()
        pooled = sum(a * h for a, h in zip(attention[m], patches, strict=True))
        logits[m] = p["classify.weight"][m] @ pooled + p["classify.bias"][m]
        for n, h in enumerate(patches):
            for cluster in (0, 1):
                row = 2 * m + cluster
                pairs[n, m, cluster] = p["cluster.weight"][row] @ h + p["cluster.bias"][row]
    return logits, attention, pairs


def patch_loss(pair: Array, cluster: int, kind: str) -> float:
    """Smooth top-1 SVM (Berrada et al. 2018, their loss at k = 1, tau = 1) or cross-entropy."""
    if kind == "ce":
        return -math.log(math.exp(pair[cluster]) / (math.exp(pair[0]) + math.exp(pair[1])))
    tau, alpha, total = 1.0, 1.0, 0.0
    for j in (0, 1):
        total += math.exp((pair[j] + alpha * (j != cluster)) / tau)
    return tau * math.log(total) - pair[cluster]


def instance_loss(
    attention: Array, pairs: Array, label: int, kind: str, subtyping: bool, k: int = K
) -> float:
    """Of one bag, without its weight."""
    count, outputs = pairs.shape[:2]
    k = min(k, count // 2)
    if k == 0 or label < 0:
        return 0.0
    total = 0.0
    for m in range(outputs):
        ranked = sorted(range(count), key=lambda n, m=m: -attention[m, n])
        if label == (m if outputs > 1 else 1):
            losses = [patch_loss(pairs[n, m], 1, kind) for n in ranked[:k]]
            losses += [patch_loss(pairs[n, m], 0, kind) for n in ranked[-k:]]
            total += sum(losses) / (2 * k)
        elif subtyping:
            total += sum(patch_loss(pairs[n, m], 0, kind) for n in ranked[:k]) / k
    return total / outputs if subtyping else total


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_the_forward_is_the_papers_on_each_bag_alone(name, outputs, norm):
    head = build(name, outputs, norm=norm)
    maps = outputs if name == "clam_mb" else 1
    features, mask = bags()
    output = head(features, mask)
    assert output.attention_logits.shape == (B, maps, N)
    for b, size in enumerate(SIZES):
        logits, attention, pairs = reference(
            features[b, :size].numpy(), weights(head), outputs, norm
        )
        np.testing.assert_allclose(output.logits[b].detach(), logits, rtol=1e-10)
        np.testing.assert_allclose(
            output.attention()[b, :, :size].detach(), attention[:maps], rtol=1e-10
        )
        np.testing.assert_allclose(
            output.instance_logits[b, :size].detach(), pairs[..., 1] - pairs[..., 0], atol=1e-10
        )


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("kind", ["svm", "ce"])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_the_instance_loss_is_the_papers_on_each_bag_alone(name, outputs, kind, subtyping):
    head = build(name, outputs, instance_loss=kind, instance_weight=0.8, subtyping=subtyping)
    features, mask = bags()
    output = head(features, mask)
    result = [
        reference(features[b, :size].numpy(), weights(head), outputs)[1:]
        for b, size in enumerate(SIZES)
    ]
    for shift in range(max(outputs, 2)):  # each bag once of each class
        target = (torch.arange(B) + shift) % max(outputs, 2)
        expected = [
            instance_loss(*one, int(label), kind, subtyping)
            for one, label in zip(result, target, strict=True)
        ]
        loss = head.aux_loss(output, target, EACH)
        assert loss.item() == pytest.approx(0.8 * sum(expected) / B, rel=1e-10)


def test_a_patch_without_a_lead_costs_what_the_paper_says_by_hand(name):
    # Both scores 0: the SVM's log(e^0 + e^1) - 0 for every patch, the cross-entropy's log 2.
    features, mask = bags()
    for kind, cost in (("svm", math.log(1 + math.e)), ("ce", math.log(2))):
        head = build(name, instance_loss=kind, instance_weight=1.0)
        nn.init.zeros_(head.cluster.weight)
        nn.init.zeros_(head.cluster.bias)
        one = head(features[:1], mask[:1])
        assert head.aux_loss(one, torch.tensor([2]), EACH).item() == pytest.approx(cost)


def test_the_default_weights_are_the_papers_seven_to_three(name):
    defaults = inspect.signature(HEADS.factory(name)).parameters
    assert defaults["instance_weight"].default == pytest.approx(0.3 / 0.7)
    assert defaults["instance_loss"].default == "svm"
    assert defaults["k_sample"].default == 8


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.integers(1, 9),
    st.integers(0, 4),
)
def test_no_patch_is_evidence_for_and_against(ranks, k, padding):
    """Whatever ties there are, and however short the bag is."""
    count = len(ranks)
    attention = torch.tensor([*ranks, *[-math.inf] * padding]).float().view(1, 1, -1)
    mask = attention.view(1, -1) > -math.inf
    number = torch.arange(count + padding).float().view(1, 1, -1)  # which patch it was
    result = evidence(number, attention, mask, k)
    taken = min(k, count // 2)
    highest = result["highest"][0, 0, :taken].int().tolist()
    lowest = result["lowest"][0, 0, :taken].int().tolist()
    assert len({*highest, *lowest}) == 2 * taken
    assert all(patch < count for patch in result["highest"].flatten().tolist())
    assert [ranks[i] for i in highest] == sorted(ranks, reverse=True)[:taken]
    assert [ranks[i] for i in lowest] == sorted(ranks)[:taken]
    assert result["share"][0, :taken].sum().item() == pytest.approx(min(taken, 1))
    assert (result["share"][0, taken:] == 0).all()


def gradients(head: Head, loss: Tensor) -> dict[str, Tensor | None]:
    """Of each parameter; None where the loss does not hang on it."""
    named = dict(head.named_parameters())
    result = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, result, strict=True))


@pytest.mark.parametrize("label", [-1, 0])
@pytest.mark.parametrize("size", [1, 2, 19])
@pytest.mark.parametrize("subtyping", [False, True])
def test_every_parameter_stays_in_the_graph_where_there_is_no_evidence(
    name, size, label, subtyping
):
    """Else processes that average gradients would wait for each other."""
    head = build(name, subtyping=subtyping)
    features, mask = bags()
    output = head(features[:1, :size], mask[:1, :size])
    extra = head.aux_loss(output, torch.tensor([label]), EACH)
    result = gradients(head, output.logits.sum() + extra)
    assert all(gradient is not None for gradient in result.values())
    nothing = size == 1 or label < 0
    assert (extra.item() == 0) == nothing
    assert bool((result["cluster.weight"] == 0).all()) == nothing


@pytest.mark.parametrize("subtyping", [False, True])
def test_bags_without_a_label_add_nothing(name, subtyping):
    head = build(name, subtyping=subtyping)
    features, mask = bags()
    output = head(features, mask)
    alone = head.aux_loss(head(features[2:3], mask[2:3]), torch.tensor([1]), EACH)
    some = head.aux_loss(output, torch.tensor([-1, -1, 1, -100, -1]), EACH)
    torch.testing.assert_close(some, alone / B)


def test_the_instance_loss_trains_features_and_patch_classifiers_but_not_the_attention(name):
    head = build(name)
    result = gradients(head, head.aux_loss(head(*bags()), torch.arange(B) % 3, EACH))
    trained = {key for key, gradient in result.items() if gradient is not None}
    assert trained == {"project.0.weight", "project.0.bias", "cluster.weight", "cluster.bias"}
    assert all(result[key].abs().max() > 0 for key in trained)


def test_each_branch_of_clam_mb_attends_for_its_own_class():
    head = build("clam_mb")
    features, mask = bags()
    before = head(features, mask)
    with torch.no_grad():
        head.score.score.weight[1] += 1
    after = head(features, mask)
    moved = (after.logits - before.logits).abs()
    assert (moved[:, [0, 2]] == 0).all()
    assert moved[0, 1] > 1e-6
    torch.testing.assert_close(after.attention()[:, [0, 2]], before.attention()[:, [0, 2]])
    torch.testing.assert_close(after.aux["highest"][:, [0, 2]], before.aux["highest"][:, [0, 2]])
    assert not torch.equal(after.aux["highest"][:, 1], before.aux["highest"][:, 1])


def test_without_weight_there_are_no_patch_classifiers_and_any_target_goes(name):
    head = build(name, instance_weight=0.0)
    output = head(*bags())
    torch.testing.assert_close(output.logits.isfinite(), torch.ones(B, 3, dtype=torch.bool))
    assert not any("cluster" in key for key in head.state_dict())
    assert output.instance_logits is None
    assert head.aux_loss(output, torch.rand(B, 2), EACH) is None


@pytest.mark.parametrize("target", [torch.rand(B), torch.rand(B, 3), torch.zeros(B, 2).long()])
def test_targets_that_are_no_class_numbers_are_refused_with_a_way_out(name, target):
    head = build(name)
    with pytest.raises(UserError) as error:
        head.aux_loss(head(*bags()), target, EACH)
    assert str(error.value) == (
        "CLAM's instance loss needs one class number a slide, found targets of shape "
        f"{tuple(target.shape)} and type {target.dtype}\n"
        "  set head.instance_weight=0 to train the head without it"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_loss": "svn"}, "unknown head.instance_loss=svn; did you mean 'svm'"),
        ({"k_sample": 0}, "k_sample=0 must be 1 or more, and head.instance_weight=0.4"),
        (
            {"instance_weight": -1.0},
            "k_sample=4 must be 1 or more, and head.instance_weight=-1 0 or more",
        ),
        (
            {"instance_weight": math.nan},
            "k_sample=4 must be 1 or more, and head.instance_weight=nan 0 or more",
        ),
        ({"act": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, **options)


def test_the_instance_loss_is_single_precision_under_autocast(name):
    head = build(name, instance_weight=1.0).float()
    features, mask = bags()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(features.float(), mask)
    loss = head.aux_loss(output, torch.arange(B) % 3, EACH)
    assert loss.dtype == output.instance_logits.dtype == torch.float32
    assert loss.isfinite()


def test_the_export_takes_any_number_of_patches(name):
    head = build(name)
    features, mask = bags()
    length = torch.export.Dim("length", min=2, max=100_000)
    program = torch.export.export(
        head, (features, mask), dynamic_shapes=({1: length}, {1: length})
    ).module()
    for size in (2, 3, N):
        given = features[:, :size], mask[:, :size]
        got, expected = program(*given), head(*given)
        torch.testing.assert_close(got.logits, expected.logits)
        torch.testing.assert_close(got.aux, expected.aux)


def test_only_the_multi_branch_variant_has_an_attention_map_for_each_class(name):
    output = build(name)(*bags())
    assert output.class_maps == (name == "clam_mb")
    assert not output.show_scores
