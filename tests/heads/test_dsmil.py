"""DSMIL against its formula in NumPy loops, float64, with the authors' trained head among others."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head
from e2e.heads.dsmil import from_published
from tests.helpers.kernels import Watch

EACH = functools.partial(nn.functional.cross_entropy, reduction="none")
"""The loss of a classification task."""

D, C = 10, 4
SIZES = (7, 1, 4)


def bags() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(len(SIZES), max(SIZES), D, dtype=torch.float64)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES).unsqueeze(1)
    return features.masked_fill(~mask.unsqueeze(-1), math.nan), mask


def build(outputs: int = C, **options: object) -> Head:
    torch.manual_seed(1)
    head = HEADS.build("dsmil", D, outputs, **{"query_dim": 5, **options}).double().eval()
    for parameter in head.parameters():  # nothing stays at a 0 or a 1 that could hide a mistake
        nn.init.normal_(parameter, std=0.5)
    return head


def by_hand(head: Head, x: NDArray) -> dict[str, NDArray]:
    """``bag`` (C,), ``top`` (C,), ``instance`` (n, C), ``score`` (C, n) of one bag."""
    p = {key: value.detach().numpy() for key, value in head.named_parameters()}

    def linear(name: str, vector: NDArray) -> NDArray:
        return p[f"{name}.weight"] @ vector + p[f"{name}.bias"]

    hidden, queries, values, instance = [], [], [], []
    for h in x:
        if "project.1.weight" in p:
            centred = h - h.mean()
            normal = centred / math.sqrt((centred**2).mean() + 1e-5)
            normal = normal * p["project.0.weight"] + p["project.0.bias"]
            h = np.maximum(linear("project.1", normal), 0)
        q = linear("query.0", h)
        if "query.2.weight" in p:
            q = np.tanh(linear("query.2", np.maximum(q, 0)))
        hidden.append(h)
        queries.append(q)
        values.append(np.maximum(linear("value.1", h), 0) if "value.1.weight" in p else h)
        instance.append(linear("instance", h))
    outputs, width = len(p["classify.bias"]), len(values[0])
    score, pooled = np.zeros((outputs, len(x))), []
    for k in range(outputs):
        critical = max(range(len(x)), key=lambda n: instance[n][k])
        for n in range(len(x)):
            score[k, n] = queries[n] @ queries[critical] / math.sqrt(len(queries[n]))
        attention = np.exp(score[k]) / np.exp(score[k]).sum()
        pooled.append(sum(a * v for a, v in zip(attention, values, strict=True)))
    bag = p["classify.bias"].copy()
    for k in range(outputs):
        for j in range(outputs):
            bag[k] += p["classify.weight"][k, j * width : (j + 1) * width] @ pooled[j]
    top = np.array([max(row[k] for row in instance) for k in range(outputs)])
    return {"bag": bag, "top": top, "instance": np.array(instance), "score": score}


@pytest.mark.parametrize("embed_dim", [None, 6])
@pytest.mark.parametrize("pass_value", [False, True])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_dsmil_is_its_formula_on_each_bag_alone(nonlinear, pass_value, embed_dim):
    stem = {"embed_dim": embed_dim, "norm": embed_dim is not None}
    head = build(nonlinear=nonlinear, pass_value=pass_value, **stem)
    layers = {
        *("instance", "query.0", "classify"),
        *(["query.2"] if nonlinear else []),
        *(["value.1"] if pass_value else []),
        *(["project.0", "project.1"] if embed_dim else []),
    }
    assert {key.rpartition(".")[0] for key, _ in head.named_parameters()} == layers
    features, mask = bags()
    output = head(features, mask)
    for b, n in enumerate(SIZES):
        want = by_hand(head, features[b, :n].numpy())
        for result, expected in (
            (output.logits[b], (want["bag"] + want["top"]) / 2),
            (output.attention_logits[b, :, :n], want["score"]),
            (output.instance_logits[b, :n], want["instance"]),
        ):
            np.testing.assert_allclose(result.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("training", "average", "aux_weight", "both"),
    [
        (False, True, 1.0, True),
        (False, False, 1.0, False),
        (True, True, 1.0, False),
        (True, True, 0.0, True),
        (False, True, 0.0, True),
    ],
)
def test_the_instance_stream_is_in_the_logits_unless_it_has_a_loss_of_its_own(
    training, average, aux_weight, both
):
    head = build(average=average, aux_weight=aux_weight).train(training)
    features, mask = bags()
    logits = head(features, mask).logits.detach()
    for b, n in enumerate(SIZES):
        want = by_hand(head, features[b, :n].numpy())
        expected = (want["bag"] + want["top"]) / 2 if both else want["bag"]
        np.testing.assert_allclose(logits[b], expected, rtol=1e-10, atol=1e-12)


def tops(head: Head) -> list[NDArray]:
    features, _ = bags()
    return [by_hand(head, features[b, :n].numpy())["top"] for b, n in enumerate(SIZES)]


def binary(score: float, target_value: int) -> float:
    probability = 1 / (1 + math.exp(-score))
    return -math.log(probability if target_value else 1 - probability)


def test_the_extra_loss_is_cross_entropy_of_the_critical_patches():
    head, classes = build(aux_weight=0.6).train(), [2, 0, 3]
    want = 0.0
    for top, k in zip(tops(head), classes, strict=True):
        want -= 0.6 * math.log(math.exp(top[k]) / sum(math.exp(s) for s in top)) / len(SIZES)
    assert head.aux_loss(head(*bags()), torch.tensor(classes), EACH).item() == pytest.approx(
        want, 1e-10
    )


def test_the_extra_loss_is_the_tasks_own_whatever_its_targets_are():
    head, labels = build(aux_weight=0.6).train(), [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]]

    def several(logits: Tensor, target: Tensor) -> Tensor:
        each = nn.functional.binary_cross_entropy_with_logits(
            logits, target.double(), reduction="none"
        )
        return each.mean(dim=1)

    want = 0.0
    for top, row in zip(tops(head), labels, strict=True):
        want += 0.6 * sum(map(binary, top, row)) / (C * len(SIZES))
    result = head.aux_loss(head(*bags()), torch.tensor(labels), several)
    assert result.item() == pytest.approx(want, 1e-10)
    free = build(aux_weight=0.0).train()
    assert free.aux_loss(free(*bags()), torch.tensor(labels), several) is None


def test_without_a_loss_of_its_own_the_tasks_loss_trains_both_streams():
    head = build(aux_weight=0.0).train()
    head(*bags()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 1e-6 for p in head.parameters())


@pytest.mark.parametrize("options", [{"aux_weight": -1.0}, {"aux_weight": 0.0, "average": False}])
def test_an_instance_stream_that_nothing_trains_is_refused(options):
    with pytest.raises(
        UserError, match=r"nothing trains the instance stream .*\n  set head.aux_weight"
    ):
        HEADS.build("dsmil", D, C, **options)


@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_query_without_width_is_refused(nonlinear):
    with pytest.raises(UserError, match="query_dim=0 must be 1 or more"):
        HEADS.build("dsmil", D, C, query_dim=0, nonlinear=nonlinear)


def test_the_gradient_also_flows_through_the_critical_patches_query():
    head = build()
    features = bags()[0][:1].requires_grad_()
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: head(x, mask)[:2], (features,))


def test_half_precision_makes_no_ties_among_patches():
    head = HEADS.build("dsmil", 4, 1, query_dim=4, nonlinear=False)
    with torch.no_grad():
        for layer, weight in ((head.instance, [[1.0, 0, 0, 0]]), (head.query[0], np.eye(4))):
            layer.weight.copy_(torch.as_tensor(weight))
    x = torch.tensor([[[1.0, 3, 0, 0], [1.001, -3, 0, 0]]])  # in bfloat16 1.001 is 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = head(x, torch.ones(1, 2, dtype=torch.bool)).attention()
    assert attention[0, 0].argmax() == 1


def test_dsmil_copies_no_patches_for_its_outputs():
    n, width = 2000, 128
    head = HEADS.build("dsmil", width, 3)
    features = torch.randn(2, n, width, requires_grad=True)
    with Watch() as watch:
        head(features, torch.ones(2, n, dtype=torch.bool)).logits.sum().backward()
    assert watch.largest <= 2 * n * width


@pytest.fixture(scope="module")
def published(shared_data) -> dict[str, Tensor]:
    path = shared_data / "weights" / "dsmil_c16_aggregator.pth"
    if not path.is_file():
        pytest.skip(f"the authors' trained head is not at {path}")
    return torch.load(path, map_location="cpu", weights_only=True)


def authors_formula(state: dict[str, Tensor], x: NDArray) -> tuple[float, float, NDArray]:
    """Bag score, largest patch score and attention (n,) of one bag, from their own keys."""
    w = {key: value.double().numpy() for key, value in state.items()}
    patch = x @ w["i_classifier.fc.0.weight"].T + w["i_classifier.fc.0.bias"]
    hidden = np.maximum(x @ w["b_classifier.q.0.weight"].T + w["b_classifier.q.0.bias"], 0)
    q = np.tanh(hidden @ w["b_classifier.q.2.weight"].T + w["b_classifier.q.2.bias"])
    score = q @ q[patch[:, 0].argmax()] / math.sqrt(128)
    attention = np.exp(score - score.max())
    attention /= attention.sum()
    bag = 0.0
    for d in range(512):  # the convolution: one channel, a kernel as long as the vector
        bag += w["b_classifier.fcc.weight"][0, 0, d] * (attention @ x[:, d])
    return float(bag + w["b_classifier.fcc.bias"][0]), float(patch.max()), attention


@pytest.mark.parametrize("average", [False, True])
def test_the_published_camelyon16_head_gives_its_authors_outputs(published, average):
    head = HEADS.build("dsmil", 512, 1, average=average)
    head.load_state_dict(from_published(published))
    head.double().eval()
    sizes = (300, 1, 40)
    features = 20 * np.random.default_rng(0).random((3, 300, 512))  # large: no flat attention
    mask = torch.arange(300) < torch.tensor(sizes).unsqueeze(1)
    output = head(torch.as_tensor(features).masked_fill(~mask.unsqueeze(-1), math.nan), mask)
    for b, n in enumerate(sizes):
        bag, top, attention = authors_formula(published, features[b, :n])
        expected = (bag + top) / 2 if average else bag
        assert output.logits[b, 0].item() == pytest.approx(expected, 1e-9)
        assert output.instance_logits[b, :n].max().item() == pytest.approx(top, 1e-9)
        result = output.attention()[b, 0, :n].detach()
        np.testing.assert_allclose(result, attention, rtol=1e-9, atol=1e-15)


def test_the_authors_other_variant_fits_with_the_options_that_are_documented():
    actual = build(3, nonlinear=False, pass_value=True).state_dict()
    reference = {
        "i_classifier.fc.0": "instance",
        "b_classifier.q": "query.0",
        "b_classifier.v.1": "value.1",
        "b_classifier.fcc": "classify",
    }
    state = {
        f"{a}.{kind}": actual[f"{b}.{kind}"]
        for a, b in reference.items()
        for kind in ("weight", "bias")
    }
    state["b_classifier.fcc.weight"] = state["b_classifier.fcc.weight"].unflatten(1, (3, D))
    mapped = from_published(state)
    assert mapped.keys() == actual.keys()
    assert all(torch.equal(mapped[key], actual[key]) for key in actual)


def test_weights_of_another_head_are_named():
    state = HEADS.build("abmil", D, C).state_dict()
    with pytest.raises(
        UserError, match=r"(?s)not weights of the published DSMIL.*score\.score\.weight"
    ):
        from_published(state)


def test_each_class_has_an_attention_map():
    output = build()(*bags())
    assert output.class_maps
    assert not output.show_scores
