"""TransMIL against its formulas in float64, token by token; its Nystrom attention; its published size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head
from e2e.heads.transmil import nystrom_attention, pseudo_inverse

Array = NDArray[np.float64]
Weights = dict[str, Array]

D, C, E, H = 5, 3, 8, 2
SIZES = (1, 2, 5, 9, 10)  # squares of side 1, 2, 3, 3, 4; up to 6 patches repeated
N = 12


def build(**options: object) -> Head:
    torch.manual_seed(1)
    head = HEADS.build("transmil", D, C, **{"embed_dim": E, "heads": H, **options})
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


def layer_norm(x: Array, p: Weights, name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def softmax(score: Array) -> Array:
    power = np.exp(score - score.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def inverse(a: Array, steps: int) -> Array:
    z = a.T / (np.abs(a).sum(0).max() * np.abs(a).sum(1).max())
    for _ in range(steps):
        az = a @ z
        # The iteration's polynomial, multiplied out.
        z = z @ (13 * np.eye(len(a)) - 15 * az + 7 * az @ az - az @ az @ az) / 4
    return z


def runs(length: int, count: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(min(count, length))]
    for place in range(length):
        groups[math.floor(place * len(groups) / length)].append(place)
    return groups


def approximate(q: Array, k: Array, landmarks: int, steps: int) -> Array:
    """The (L, L) matrix that stands for the softmax attention of one head."""
    groups, scale = runs(len(q), landmarks), math.sqrt(q.shape[1])
    q_mean = np.stack([np.mean([q[t] for t in group], axis=0) for group in groups])
    k_mean = np.stack([np.mean([k[t] for t in group], axis=0) for group in groups])
    middle = inverse(softmax(q_mean @ k_mean.T / scale), steps)
    return softmax(q @ k_mean.T / scale) @ middle @ softmax(q_mean @ k.T / scale)


def attend(x: Array, p: Weights, name: str, landmarks: int, steps: int) -> Array:
    q, k, v = np.split(
        layer_norm(x, p, f"{name}.norm") @ p[f"{name}.query_key_value.weight"].T, 3, axis=1
    )
    mixed = np.zeros_like(x)
    for j in range(H):
        part = slice(j * E // H, (j + 1) * E // H)
        mixed[:, part] = approximate(q[:, part], k[:, part], landmarks, steps) @ v[:, part]
        for place in range(len(x)):
            for tap in range(33):
                other = place + tap - 16
                if 0 <= other < len(x):
                    mixed[place, part] += p[f"{name}.near.weight"][j, 0, tap, 0] * v[other, part]
    return x + mixed @ p[f"{name}.merge.weight"].T + p[f"{name}.merge.bias"]


def encode_places(x: Array, side: int, p: Weights) -> Array:
    out = x.copy()
    for row in range(side):
        for column in range(side):
            here = row * side + column
            for size in (3, 5, 7):
                out[here] += p[f"position.conv{size}.bias"]
                for down in range(size):
                    for right in range(size):
                        r, c = row + down - size // 2, column + right - size // 2
                        if 0 <= r < side and 0 <= c < side:
                            tap = p[f"position.conv{size}.weight"][:, 0, down, right]
                            out[here] += tap * x[r * side + c]
    return out


def reference(x: Array, p: Weights, *, landmarks: int = E // 2, steps: int = 6) -> Array:
    """Logits (C,) of one bag x (n, D) without padding."""
    h = np.maximum(x @ p["project.0.weight"].T + p["project.0.bias"], 0)
    side = 1
    while side * side < len(h):
        side += 1
    square = np.concatenate([h, h[: side * side - len(h)]])
    sequence = np.concatenate([p["class_token"][0], square])
    sequence = attend(sequence, p, "layer1", landmarks, steps)
    sequence[1:] = encode_places(sequence[1:], side, p)
    sequence = attend(sequence, p, "layer2", landmarks, steps)
    return layer_norm(sequence[0], p, "norm") @ p["classify.weight"].T + p["classify.bias"]


@pytest.mark.parametrize(("landmarks", "steps"), [(None, 6), (1, 6), (3, 2), (7, 6), (50, 9)])
def test_logits_are_the_formulas_on_each_bag_alone(landmarks, steps):
    head = build(landmarks=landmarks, pinv_iterations=steps)
    p = {name: value.detach().numpy() for name, value in head.named_parameters()}
    features, mask = bags()
    logits = head(features, mask).logits
    for b in range(len(SIZES)):
        bag = features[b, mask[b]].numpy()
        expected = reference(bag, p, landmarks=landmarks or E // 2, steps=steps)
        np.testing.assert_allclose(logits[b].detach().numpy(), expected, rtol=1e-8, atol=1e-9)


def test_gradients_are_those_of_finite_differences():
    head = build(embed_dim=4, landmarks=3, pinv_iterations=2)
    features, mask = bags()
    features = features.masked_fill(~mask.unsqueeze(-1), 0.0)[2:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head(x, mask[2:4]).logits, features)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 5))
def test_the_pseudo_inverse_converges_and_ignores_rows_and_columns_of_zeros(seed, size, more):
    g = torch.Generator().manual_seed(seed)
    small = (2 * torch.randn(2, size, size, generator=g, dtype=torch.float64)).softmax(-1)
    padded = nn.functional.pad(small, (0, more, 0, more))
    result = pseudo_inverse(padded, 30)
    product = padded @ result @ padded
    torch.testing.assert_close(product, padded, rtol=0, atol=1e-6)
    for steps in (1, 6):
        inner = pseudo_inverse(padded, steps)
        torch.testing.assert_close(inner[:, :size, :size], pseudo_inverse(small, steps))
        assert not inner[:, size:].any()
        assert not inner[..., size:].any()


def three(length: int, batch: int = 2, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, batch, 2, length, dim, generator=g, dtype=torch.float64)
    return q, k, v


def test_with_every_token_a_landmark_it_is_softmax_attention():
    q, k, v = three(7)
    lengths = torch.tensor([[7], [4]])
    result = nystrom_attention(q, k, v, lengths, landmarks=9, iterations=40)
    for b, length in enumerate(lengths.flatten().tolist()):
        dense = (q[b, :, :length] @ k[b, :, :length].mT / math.sqrt(3)).softmax(-1)
        torch.testing.assert_close(result[b, :, :length], dense @ v[b, :, :length])


def test_landmarks_are_means_of_equal_runs_where_they_divide_the_length():
    q, k, v = three(12, batch=1)
    result = nystrom_attention(q, k, v, torch.tensor([[12]]), landmarks=4, iterations=6)
    q_mean, k_mean = (x.unflatten(2, (4, 3)).mean(3) for x in (q, k))
    left, middle, right = (
        (a @ b.mT / math.sqrt(3)).softmax(-1)
        for a, b in ((q, k_mean), (q_mean, k_mean), (q_mean, k))
    )
    torch.testing.assert_close(result, left @ pseudo_inverse(middle, 6) @ right @ v)


def test_the_approximated_attention_is_no_distribution_hence_no_map():
    q, k, _ = three(40, batch=1, dim=8)
    eye = torch.eye(40, dtype=torch.float64).expand(1, 2, -1, -1)
    rows = nystrom_attention(q, k, eye, torch.tensor([[40]]), landmarks=10, iterations=6)
    assert rows.min() < -1e-3
    assert (rows.sum(-1) - 1).abs().max() > 1e-3
    output = build()(*bags())
    assert output.attention_logits is None
    assert output.instance_logits is None


def test_the_order_of_patches_counts():
    head = build()
    assert not head.permutation_invariant
    features, mask = bags()
    full, every = features[4, mask[4]].unsqueeze(0), torch.ones(1, 10, dtype=torch.bool)
    assert not torch.allclose(head(full, every).logits, head(full.flip(1), every).logits)


def test_the_inverse_is_taken_in_single_precision_under_autocast(monkeypatch):
    seen = []

    def spy(kernel: Tensor, iterations: int) -> Tensor:
        seen.append((kernel.dtype, torch.is_autocast_enabled("cpu")))
        return pseudo_inverse(kernel, iterations)

    monkeypatch.setattr("e2e.heads.transmil.pseudo_inverse", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        build().float()(torch.randn(1, 9, D), torch.ones(1, 9, dtype=torch.bool))
    assert seen == [(torch.float32, False)] * 2


class Largest(TorchDispatchMode):
    """The most numbers of any tensor an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        built = func(*args, **(kwargs or {}))
        for tensor in built if isinstance(built, (tuple, list)) else (built,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return built


def test_no_matrix_of_patches_by_patches_is_made():
    n = 3000
    head = HEADS.build("transmil", D, C, embed_dim=E, heads=H, landmarks=16).train()
    features = torch.randn(1, n, D).requires_grad_()
    with Largest() as seen:
        head(features, torch.ones(1, n, dtype=torch.bool)).logits.sum().backward()
    assert seen.numel < 40 * n  # qkv: 24 numbers a token; all landmarks: 16


def test_the_size_is_the_published_models():
    head = HEADS.build("transmil", 1024, 2)
    # fc1, class token, two layers (LayerNorm, qkv, out, 8 kernels of 33), PPEG, LayerNorm, fc2
    layer = 2 * 512 + 512 * 1536 + 512 * 513 + 8 * 33
    ppeg = 512 * (49 + 25 + 9) + 3 * 512
    count = 1025 * 512 + 512 + 2 * layer + ppeg + 2 * 512 + 513 * 2
    assert sum(p.numel() for p in head.parameters()) == count == 2_672_146
    assert head.layer1.landmarks == 256


def test_it_exports_for_a_fixed_number_of_patches():
    head = build()
    features, mask = bags()
    program = torch.export.export(head, (features, mask))
    torch.testing.assert_close(program.module()(features, mask).logits, head(features, mask).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"heads=3 does not divide head.embed_dim=8\n.*one of \[1, 2, 4, 8\]"),
        ({"heads": 0}, "heads=0"),
        ({"landmarks": 0}, "landmarks=0"),
        ({"pinv_iterations": 0}, "pinv_iterations=0"),
        ({"act": "rellu"}, "did you mean 'relu'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)
