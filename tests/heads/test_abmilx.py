"""ABMILX against its formula written out densely in float64; its memory; its published sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.abmilx import ABMILX, DAttentionX, smooth_scores
from e2e.heads.base import HEADS, Head
from tests.helpers.kernels import Watch

D, C = 6, 3
SIZES = (7, 1, 4)
N = max(SIZES)

OPTIONS = {
    "default": {},
    "biases": {"bias": True, "attn_bias": True},
    "no norm": {"norm": False},
    "ffn": {"ffn": True},
    "ffn without norm": {"ffn": True, "norm": False},
    "joint": {"joint": True, "attn_bias": True},
    "gated": {"gated": True, "attn_dim": 3},
    "no attention plus": {"attention_plus": False},
    "fixed alpha": {"alpha": -0.5, "learn_alpha": False},
    "relu": {"act": "relu"},
    "one channel a head": {"heads": 12},
}


def build(**options: object) -> Head:
    torch.manual_seed(1)
    head = HEADS.build("abmilx", D, C, **{"embed_dim": 12, "heads": 4, **options})
    for parameter in head.parameters():  # nothing stays at a 0 or a 1 that could hide a mistake
        nn.init.normal_(parameter, std=0.6)
    return head.double().eval()


def bags(fill: float = math.nan) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(len(SIZES), N, D, dtype=torch.float64)
    mask = torch.arange(N) < torch.tensor(SIZES).unsqueeze(1)
    return features.masked_fill(~mask.unsqueeze(-1), fill), mask


def normalise(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)


def linear(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(h: Tensor, p: dict[str, Tensor], gated: bool) -> Tensor:
    hidden = gelu(linear(h, p, "score.value.0"))
    if gated:
        hidden = hidden / (1 + (-linear(h, p, "score.gate.0")).exp())
    return linear(hidden, p, "score.score")


def reference(
    x: Tensor,
    p: dict[str, Tensor],
    *,
    heads: int = 4,
    norm: bool = True,
    joint: bool = False,
    gated: bool = False,
    ffn: bool = False,
    act: str = "gelu",
    attention_plus: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Logits (C,) and attention (H, n) of one bag x (n, D) without padding, one head at a time."""
    e = linear(normalise(x, p, "project.0") if norm else x, p, f"project.{int(norm)}")
    e = gelu(e) if act == "gelu" else e.clamp(min=0)
    d = e.shape[1] // heads
    slide, attention = [], []
    for j in range(heads):
        h = e[:, j * d : (j + 1) * d]
        a = mlp(e, p, gated)[:, j] if joint else mlp(h, p, gated)[:, 0]
        if attention_plus:
            inside = normalise(e if joint else h, p, "attention_plus.norm")
            q, k = linear(inside, p, "attention_plus.query_key").chunk(2, dim=-1)
            if joint:
                q, k = q[:, j * d : (j + 1) * d], k[:, j * d : (j + 1) * d]
            similarity = (q @ k.T / math.sqrt(d)).exp()
            u = similarity / similarity.sum(1, keepdim=True)
            a = a + p["attention_plus.alpha"] * (u @ a)
        weight = a.exp() / a.exp().sum()
        attention.append(weight)
        slide.append(weight @ h)
    z = linear(torch.cat(slide), p, "merge")
    if ffn:
        inner, shift = z, int(not norm)
        if not norm:
            inner = normalise(z, p, "ffn.0")
        z = z + linear(gelu(linear(inner, p, f"ffn.{shift}")), p, f"ffn.{shift + 2}")
    return linear(normalise(z, p, "norm") if norm else z, p, "classify"), torch.stack(attention)


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_the_dense_formulas_on_each_bag_alone(name):
    head = build(**OPTIONS[name])
    features, mask = bags()
    features.requires_grad_()
    p = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    learned = [features, *head.parameters()]
    direction = torch.randn(len(SIZES), C, dtype=torch.float64)

    output = head(features, mask)
    dense = [reference(features[b, :n], p, **OPTIONS[name]) for b, n in enumerate(SIZES)]
    logits = torch.stack([logits for logits, _ in dense])
    torch.testing.assert_close(output.logits, logits, rtol=1e-9, atol=1e-11)
    for b, n in enumerate(SIZES):
        torch.testing.assert_close(output.attention()[b, :, :n], dense[b][1])

    actual = torch.autograd.grad((output.logits * direction).sum(), learned)
    expected_value = torch.autograd.grad((logits * direction).sum(), learned)
    for got, expected in zip(actual, expected_value, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    head = build()
    features, mask = bags(fill=0.0)

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        output = head(x, mask)
        return output.logits, output.attention()

    assert torch.autograd.gradcheck(outputs, features.requires_grad_())


def dense_smooth(query: Tensor, key: Tensor, score: Tensor, mask: Tensor) -> Tensor:
    q, k = query.double().transpose(1, 2), key.double().transpose(1, 2)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(~mask[:, None, None, :], -math.inf)
    return (logits.softmax(-1) @ score.double().unsqueeze(-1)).squeeze(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    padding=st.integers(0, 40),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 2, 5, 8, 12]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
)
def test_smoothing_is_the_masked_softmax(seed, sizes, padding, heads, dim, spread):
    g = torch.Generator().manual_seed(seed)
    batch, n = len(sizes), max(sizes) + padding
    query = spread * torch.randn(batch, n, heads, dim, generator=g)
    key = spread * torch.randn(batch, n, heads, dim, generator=g)
    score = torch.randn(batch, heads, n, generator=g)
    # Real patches anywhere, not only in front.
    rank = torch.rand(batch, n, generator=g).argsort(dim=1)
    mask = rank < torch.tensor(sizes).unsqueeze(1)
    expected = dense_smooth(query, key, score, mask)
    single = smooth_scores(query, key, score, mask)
    double = smooth_scores(query.double(), key.double(), score.double(), mask)
    torch.testing.assert_close(double, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(single.double(), expected, rtol=2e-4, atol=2e-4)


def test_smoothing_survives_padding_that_resembles_the_query_far_more():
    # Real keys have logit -200 for every query. Padding at logit 0 would leave them exp(-200) = 0
    # of the mass in float32, hence 0 / 0; here all real keys are equal, so U a is the mean of a.
    query = torch.full((1, 50, 1, 4), 10.0)
    key = torch.cat([torch.full((1, 3, 1, 4), -10.0), torch.full((1, 47, 1, 4), 10.0)], dim=1)
    score = torch.arange(50.0).view(1, 1, 50)
    mask = torch.arange(50).unsqueeze(0) < 3
    smooth = smooth_scores(query, key, score, mask)
    torch.testing.assert_close(smooth, torch.ones(1, 1, 50))


def test_alike_patches_make_smoothing_cancel():
    # W_qk = 0: every row of U is uniform, U a is one number per head, and the softmax drops it.
    head, plain = build(alpha=3.0), build(attention_plus=False)
    missing = plain.load_state_dict(head.state_dict(), strict=False)
    assert missing.missing_keys == []
    nn.init.zeros_(head.attention_plus.query_key.weight)
    features, mask = bags()
    torch.testing.assert_close(head(features, mask).logits, plain(features, mask).logits)


@pytest.mark.parametrize(
    ("in_dim", "outputs", "options", "count"),
    [
        (256, 2, {"embed_dim": 256, "heads": 8}, 135_265),  # R18, TCGA-BRCA subtyping
        (256, 4, {"embed_dim": 256, "heads": 8, "attn_bias": True}, 135_810),  # survival, 4 bins
        (256, 6, {"embed_dim": 512, "heads": 4, "ffn": True}, 2_546_305),  # R18, PANDA
        (1024, 2, {"embed_dim": 256, "heads": 8}, 332_641),  # R50, TCGA-BRCA subtyping
        (1024, 2, {"norm": False, "bias": True, "attn_bias": True}, 801_028),  # two-stage
        (1024, 2, {"norm": False, "bias": True, "attn_bias": True, "joint": True}, 1_580_555),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(in_dim, outputs, options, count):
    head = HEADS.build("abmilx", in_dim, outputs, **options)
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_a_fresh_head_has_xavier_weights_zero_biases_and_alpha_where_asked():
    torch.manual_seed(0)
    head = HEADS.build("abmilx", 256, 2, bias=True, attn_bias=True, ffn=True, alpha=0.25)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 2 and parameter.numel() > 1000:
            std = math.sqrt(2 / sum(parameter.shape))
            assert math.isclose(parameter.std().item(), std, rel_tol=0.1), name
    assert head.attention_plus.alpha.tolist() == [0.25]


def test_a_fixed_alpha_is_saved_but_not_learned():
    head = build(alpha=0.5, learn_alpha=False)
    assert "attention_plus.alpha" in head.state_dict()
    assert "attention_plus.alpha" not in dict(head.named_parameters())


@pytest.mark.parametrize("joint", [False, True])
def test_the_softmax_cancels_the_last_attention_bias_and_only_that(joint):
    head = build(attn_bias=True, joint=joint)
    features, mask = bags()
    head(features, mask).logits.sum().backward()
    size = {name: parameter.grad.abs().max() for name, parameter in head.named_parameters()}
    assert tuple(name for name in size if size[name] < 1e-10) == head.zero_gradient_parameters
    assert head.zero_gradient_parameters == ("score.score.bias",)
    assert build().zero_gradient_parameters == ()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(
        UserError, match=r"heads=5 does not divide head.embed_dim=12\n.*\[1, 2, 3, 4, 6, 12\]"
    ):
        HEADS.build("abmilx", D, C, embed_dim=12, heads=5)


def watched_step(*, n: int, dtype: torch.dtype, padded: bool, **options: object) -> Watch:
    """One forward and backward under autocast to ``dtype``, on two bags."""
    head = HEADS.build("abmilx", 16, 2, **{"embed_dim": 32, "heads": 4, **options})
    features = torch.randn(2, n, 16, requires_grad=True)
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, n // 2 :] = not padded
    with Watch() as watch:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = head(features, mask).logits
        logits.float().sum().backward()
    return watch


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_as_large_as_patches_squared(dtype, padded, joint):
    n = 3000
    watch = watched_step(n=n, dtype=dtype, padded=padded, joint=joint)
    assert watch.largest < n * n
    assert watch.largest <= 2 * n * 2 * 32  # W_qk of both bags
    assert "_scaled_dot_product_flash_attention_for_cpu.default" in watch.kernels
    assert "_scaled_dot_product_flash_attention_for_cpu_backward.default" in watch.kernels
    assert not any("softmax" in kernel and "safe" in kernel for kernel in watch.kernels)


def test_the_watch_sees_a_dense_kernel():
    with sdpa_kernel(SDPBackend.MATH):
        watch = watched_step(n=300, dtype=torch.float32, padded=False)
    assert watch.largest >= 2 * 4 * 300 * 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [4, 12, 16])
def test_cuda_needs_no_dense_kernel_and_agrees_with_the_formula(dtype, heads):
    n, width = 700, 48
    torch.manual_seed(0)
    query, key = (torch.randn(2, n, heads, width // heads) for _ in range(2))
    score = torch.randn(2, heads, n)
    mask = torch.arange(n) < torch.tensor([[n], [n // 3]])
    leaves = [x.to("cuda", dtype).requires_grad_() for x in (query, key, score)]
    expected = dense_smooth(query, key, score, mask)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):  # raises when neither kernel accepts the inputs
        smooth = smooth_scores(leaves[0], leaves[1], leaves[2], mask.cuda())
        smooth.float().sum().backward()
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(smooth.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


# --- the class of the ABMILX project ---

BRCA = {"input_dim": 256, "n_classes": 2, "inner_dim": 256, "mil_norm": "ln"}
TWO_STAGE = {"input_dim": 1024, "n_classes": 2, "mil_bias": True, "attn_bias": True}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (BRCA, 135_265),
        (BRCA | {"n_classes": 4, "attn_bias": True}, 135_810),
        (BRCA | {"input_dim": 1024}, 332_641),
        (
            {"input_dim": 256, "n_classes": 6, "n_heads": 4, "mil_norm": "ln", "ffn": True},
            2_546_305,
        ),
        (TWO_STAGE, 801_028),
        (TWO_STAGE | {"attn_plus_embed_new": True}, 1_580_555),
    ],
)
def test_the_published_models_have_the_published_numbers_of_parameters(options, count):
    assert sum(p.numel() for p in DAttentionX(**options).parameters()) == count


def test_dattentionx_is_abmilx_with_other_names_for_its_options():
    actual = {
        "embed_dim": 12, "heads": 4, "dropout": 0.1, "act": "relu", "norm": True, "bias": True,
        "attn_bias": True, "attn_dim": 2, "attention_plus": False, "gated": True, "joint": False,
        "ffn": True, "alpha": 0.5,
    }  # fmt: skip
    published = {
        "inner_dim": 12, "n_heads": 4, "dropout": 0.1, "act": "relu", "mil_norm": "ln",
        "mil_bias": True, "attn_bias": True, "D": 1.5, "attn_plus": False, "attn_type": "mlp_gated",
        "ffn": True, "alpha": 0.5, "sdpa_type": "flash", "pad_v": True,
    }  # fmt: skip
    model, head = DAttentionX(D, C, **published).eval(), ABMILX(D, C, **actual).eval()
    model.head.load_state_dict(head.state_dict())
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(model(x), head(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({}, 16),  # 64 channels over 4 heads
        ({"D": 2}, 8),
        ({"D": 0.5}, 32),
        ({"D": 64}, 16),
        ({"attn_plus_embed_new": True}, 64),
        ({"attn_plus_embed_new": True, "D": 48}, 48),
        ({"attn_plus_embed_new": True, "D": 4}, 16),
    ],
)
def test_the_option_d_is_a_total_over_heads_above_10_and_otherwise_a_ratio(options, hidden):
    model = DAttentionX(D, C, inner_dim=64, n_heads=4, **options)
    assert model.head.score.score.in_features == hidden


def test_dattentionx_returns_what_the_published_forward_returns():
    model = DAttentionX(D, C, inner_dim=12, n_heads=4).eval()
    x = torch.randn(2, 9, D)
    logits, output = model(x), model.head(x)
    assert logits.shape == (2, C)
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(model(x[0]), logits[:1])
    returned, attention = model(x, return_attn=True)
    torch.testing.assert_close(returned, logits)
    torch.testing.assert_close(attention, output.attention())
    _, _, activations = model(x, return_attn=True, return_act=True)
    assert activations.shape == (2, 9, 12)
    returned, vectors = model(x, return_img_feat=True)
    torch.testing.assert_close(model.head.classify(vectors), returned)
    [[_, again], _] = model(x, return_attn=True, return_img_feat=True)
    torch.testing.assert_close(again, vectors)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    torch.testing.assert_close(model(x, mask=mask)[1:], model(x[1:, :4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mil_norm": "bn"}, "mil_norm='bn' must be 'ln' or None"),
        ({"attn_type": "sa"}, "attn_type='sa' must be 'mlp' or 'mlp_gated'"),
        ({"proj_drop": 0.1}, "proj_drop=0.1 is not supported"),
        ({"n_heads": 7}, "heads=7 does not divide"),
    ],
)
def test_options_that_dattentionx_does_not_support_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        DAttentionX(D, C, **options)
