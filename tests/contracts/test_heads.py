"""The contract of a head, tested on every registered head with its default options."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import zlib
from collections.abc import Iterator

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

import e2e.heads  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput

EACH = functools.partial(nn.functional.cross_entropy, reduction="none")
"""The loss of a classification task."""

D, C = 24, 3
SIZES = (40, 1, 9)
B, N = len(SIZES), max(SIZES)


@pytest.fixture(params=HEADS.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, outputs: int = C, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    head = HEADS.build(name, D, outputs).eval()
    with torch.no_grad():  # a bias of 0 would hide padding that is projected and then counted
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return head


@pytest.fixture
def head(name: str) -> Head:
    return build(name)


def bag(n: int = N, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Full bags: features, an all-True mask, and coords on a square grid."""
    g = torch.Generator().manual_seed(n)
    features = torch.randn(batch, n, D, generator=g)
    side = math.ceil(math.sqrt(n))
    place = torch.arange(n)
    coords = torch.stack([place % side, place // side], dim=-1) * 256
    return features, torch.ones(batch, n, dtype=torch.bool), coords.repeat(batch, 1, 1)


def ragged(fill: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bags of ``SIZES`` patches; padding holds ``fill``."""
    features, _, coords = bag()
    mask = torch.arange(N) < torch.tensor(SIZES).unsqueeze(1)
    padding = ~mask.unsqueeze(-1)
    return features.masked_fill(padding, fill), mask, coords.masked_fill(padding, -1)


def run(head: Head, features: Tensor, mask: Tensor, coords: Tensor) -> HeadOutput:
    """Forward with the same random draws every time."""
    torch.manual_seed(7)
    return head(features, mask, coords)


def parts(output: HeadOutput) -> Iterator[tuple[str, Tensor]]:
    yield "logits", output.logits
    attention = output.attention()
    if attention is not None:
        yield "attention", attention
    if output.instance_logits is not None:
        yield "instance_logits", output.instance_logits


def only_real(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """``value`` with whatever it says about padding blanked."""
    if name == "attention":
        return value.masked_fill(~mask.unsqueeze(1), 0)
    if name == "instance_logits":
        return value.masked_fill(~mask.unsqueeze(-1), 0)
    return value


def assert_same(
    got: HeadOutput, expected: HeadOutput, mask: Tensor, *, tolerance: float = 1e-5
) -> None:
    expected_parts = dict(parts(expected))
    for what, value in parts(got):
        a, b = only_real(what, value, mask), only_real(what, expected_parts[what], mask)
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, w=what: f"{w}: {m}",
        )


def objective(head: Head, output: HeadOutput) -> Tensor:
    """A loss that needs all a head is trained by: its logits and its own extra loss."""
    weight = torch.linspace(-1, 2, C).repeat(len(output.logits), 1)
    loss = (output.logits * weight).sum() / len(output.logits)
    extra = head.aux_loss(output, torch.arange(len(output.logits)) % C, EACH)
    return loss if extra is None else loss + extra


def gradients(
    head: Head, features: Tensor, mask: Tensor, coords: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of ``objective``, for the features and for each parameter (zeros where there is none)."""
    head.zero_grad(set_to_none=True)
    leaf = features.clone().requires_grad_()
    objective(head, run(head, leaf, mask, coords)).backward()
    assert leaf.grad is not None
    return leaf.grad, {
        key: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for key, p in head.named_parameters()
    }


@pytest.mark.parametrize("outputs", [1, 2, 7])
def test_shapes_and_types(name, outputs):
    features, mask, coords = ragged(0.0)
    output = run(build(name, outputs), features, mask, coords)
    assert isinstance(output, HeadOutput)
    assert output.logits.shape == (B, outputs)
    assert output.logits.dtype == torch.float32
    if output.attention_logits is not None:
        assert output.attention_logits.dtype == torch.float32
        assert output.attention_logits.dim() == 3
        assert output.attention_logits.shape[::2] == (B, N)
    if output.instance_logits is not None:
        assert output.instance_logits.shape == (B, N, outputs)


def test_attention_sums_to_one_and_is_zero_on_padding(head):
    features, mask, coords = ragged(1e4)
    output = run(head, features, mask, coords)
    attention = output.attention()
    if attention is None:
        pytest.skip("has no attention map")
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))
    padding = ~mask.unsqueeze(1).expand_as(attention)
    assert (attention[padding] == 0).all()
    assert (attention >= 0).all()
    assert (output.attention_logits[padding] == -math.inf).all()
    assert output.attention_logits[~padding].isfinite().all()


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e4])
def test_what_padding_holds_changes_nothing(head, fill):
    expected = run(head, *ragged(0.0))
    features, mask, coords = ragged(fill)
    assert_same(run(head, features, mask, coords), expected, mask, tolerance=0)


def test_without_a_mask_all_patches_are_real(head):
    if head.needs_coords:
        pytest.skip("needs coordinates")
    features, mask, _ = bag()
    torch.manual_seed(7)
    expected = head(features, mask)
    torch.manual_seed(7)
    assert_same(head(features), expected, mask, tolerance=0)
    assert head(features.clone(), coords=None).logits.shape == (B, C)


def test_features_of_a_single_bag_without_the_batch_axis_are_an_error(head):
    with pytest.raises(ValueError, match=r"shape \(bags, patches, width\), got \(5, 24\)"):
        head(torch.zeros(5, D))


def test_every_option_has_a_type_a_default_and_a_text_in_the_docstring(name):
    described = HEADS.describe(name)
    assert described.summary
    for option in described.options:
        assert option.text, f"{name}: the option {option.name} is not in the Parameters section"
        assert not option.is_required


def test_the_auxiliary_loss_needs_what_the_head_declares(head):
    output = run(head.train(), *bag())

    def is_refused(target: Tensor) -> bool:
        try:
            head.aux_loss(output, target, lambda logits, _: logits.sum(dim=-1))
        except UserError:
            return True
        return False

    def refuse(logits: Tensor, target: Tensor) -> Tensor:
        raise UserError("no loss of single bags")

    assert is_refused(torch.rand(B)) == (head.aux_loss_needs == "class number")
    if head.aux_loss_needs == "task loss":
        with pytest.raises(UserError, match="no loss of single bags"):
            head.aux_loss(output, torch.arange(B) % C, refuse)
    else:
        head.aux_loss(output, torch.arange(B) % C, refuse)


@pytest.mark.parametrize("fill", [math.nan, 1e4])
def test_how_much_padding_there_is_changes_nothing(head, fill):
    features, mask, coords = bag()
    more = 9
    longer = torch.cat([features, torch.full((B, more, D), fill)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(B, more, dtype=torch.bool)], dim=1)
    longer_coords = torch.cat([coords, torch.full((B, more, 2), -1)], dim=1)
    output = run(head, longer, longer_mask, longer_coords)
    expected = run(head, features, mask, coords)
    expected_parts = dict(parts(expected))
    for what, value in parts(output):
        cut = {"attention": value[..., :N], "instance_logits": value[:, :N]}.get(what, value)
        torch.testing.assert_close(cut, expected_parts[what], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e4])
def test_padding_changes_no_gradient_and_gets_none(head, fill):
    features, mask, coords = ragged(fill)
    on_patches, on_parameters = gradients(head, features, mask, coords)
    expected_patches, expected_parameters = gradients(head, *ragged(0.0))
    assert (on_patches[~mask] == 0).all()
    torch.testing.assert_close(on_patches, expected_patches, rtol=1e-5, atol=1e-6)
    for key, gradient in on_parameters.items():
        torch.testing.assert_close(gradient, expected_parameters[key], rtol=1e-5, atol=1e-6)


def test_a_batch_of_bags_is_its_bags_one_by_one(head):
    features, mask, coords = ragged(math.nan)
    together = run(head, features, mask, coords)
    for b, n in enumerate(SIZES):
        alone = run(head, features[b : b + 1, :n], mask[b : b + 1, :n], coords[b : b + 1, :n])
        expected_parts = dict(parts(together))
        for what, value in parts(alone):
            batched = expected_parts[what][b : b + 1]
            cut = {"attention": batched[..., :n], "instance_logits": batched[:, :n]}
            torch.testing.assert_close(value, cut.get(what, batched), rtol=1e-4, atol=1e-5)


def test_a_batchs_gradient_is_the_mean_of_its_bags(head):
    features, mask, coords = ragged(math.nan)
    leaf = features.clone().requires_grad_()
    direction = torch.linspace(-1, 2, C)
    (run(head, leaf, mask, coords).logits @ direction).sum().backward()
    for b, n in enumerate(SIZES):
        alone = features[b : b + 1, :n].clone().requires_grad_()
        output = run(head, alone, mask[b : b + 1, :n], coords[b : b + 1, :n])
        (output.logits @ direction).sum().backward()
        torch.testing.assert_close(leaf.grad[b : b + 1, :n], alone.grad, rtol=1e-3, atol=1e-5)


def test_the_order_of_patches_changes_nothing(head):
    if not head.permutation_invariant:
        pytest.skip("depends on the order")
    features, mask, coords = ragged(math.nan)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = run(head, features[:, order], mask[:, order], coords[:, order])
    expected_parts = dict(parts(run(head, features, mask, coords)))
    for what, value in parts(shuffled):
        expected = expected_parts[what]
        if what != "logits":
            expected = expected.index_select(2 if what == "attention" else 1, order)
        got = only_real(what, value, mask[:, order])
        torch.testing.assert_close(
            got, only_real(what, expected, mask[:, order]), rtol=1e-4, atol=1e-5
        )


def test_the_input_is_left_untouched(head):
    inputs = ragged(math.nan)
    before = [tensor.clone() for tensor in inputs]
    gradients(head.train(), *inputs)
    for tensor, original in zip(inputs, before, strict=True):
        torch.testing.assert_close(tensor, original, rtol=0, atol=0, equal_nan=True)


def test_the_encoder_is_trained_through_every_bag(head):
    features, mask, coords = ragged(0.0)
    on_patches, _ = gradients(head, features, mask, coords)
    assert (on_patches.abs().sum(dim=(1, 2)) > 0).all()


def test_every_parameter_gets_a_gradient_or_is_declared_not_to(head):
    _, by_name = gradients(head.train(), *bag())
    assert set(head.zero_gradient_parameters) <= set(by_name)
    size = {key: gradient.abs().max().item() for key, gradient in by_name.items()}
    largest = max(size.values())
    assert all(math.isfinite(value) for value in size.values())
    for key, value in size.items():
        if key in head.zero_gradient_parameters:
            assert value < 1e-5 * largest, f"{key} is declared, yet has gradient {value}"
        else:
            assert value > 1e-7 * largest, f"{key} has gradient {value}, largest {largest}"


@pytest.mark.parametrize("n", [1, 2, 5000])
def test_bags_of_any_size(head, n):
    with torch.inference_mode():
        output = run(head, *bag(n, batch=1))
    for what, value in parts(output):
        assert value.isfinite().all(), what


def test_single_precision_is_near_double(head):
    features, mask, coords = ragged(math.nan)
    single = run(head, features, mask, coords)
    double = run(head.double(), features.double(), mask, coords)
    assert double.logits.dtype == torch.float64
    assert_same(single, double, mask, tolerance=1e-4)


def test_half_precision_autocast_is_near_single(head):
    features, mask, coords = ragged(math.nan)
    single = run(head, features, mask, coords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(head, features, mask, coords)
    assert half.logits.is_floating_point()
    assert_same(half, single, mask, tolerance=0.1)
    if half.attention_logits is not None:
        assert half.attention_logits.dtype == torch.float32


def test_dropout_acts_in_training_only(name, head):
    def twice() -> tuple[Tensor, Tensor]:
        inputs = bag()
        torch.manual_seed(1)
        first = head(*inputs).logits
        torch.manual_seed(2)
        return first, head(*inputs).logits

    first, second = twice()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    if HEADS.options(name).get("dropout", (float, 0.0))[1] > 0:
        head.train()
        first, second = twice()
        assert not torch.equal(first, second)


def test_the_extra_loss_is_a_finite_number_or_none(head):
    output = run(head.train(), *ragged(math.nan))
    extra = head.aux_loss(output, torch.arange(B) % C, EACH)
    assert extra is None or (extra.shape == () and bool(extra.isfinite()))


def test_weights_make_the_head(name, head, tmp_path):
    inputs = ragged(math.nan)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = build(name, seed=1)
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert_same(run(other, *inputs), run(head, *inputs), inputs[1], tolerance=0)


def test_a_copy_is_the_same_head_and_free_of_it(head):
    inputs = ragged(math.nan)
    expected = run(head, *inputs)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert_same(run(twin, *inputs), expected, inputs[1], tolerance=0)
        for parameter in twin.parameters():
            nn.init.constant_(parameter, 0.5)
    assert_same(run(head, *inputs), expected, inputs[1], tolerance=0)


def test_options_are_keyword_only_with_type_and_default(name):
    signature = inspect.signature(HEADS.factory(name)).parameters.values()
    positional = [p.name for p in signature if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["in_dim", "num_outputs"]
    for option, (kind, default) in HEADS.options(name).items():
        assert default is not inspect.Parameter.empty, option
        assert isinstance(default, kind), option


def test_an_unknown_option_names_the_nearest(name):
    for option in HEADS.options(name):
        with pytest.raises(UserError, match=f"did you mean '{option}'"):
            HEADS.build(name, D, C, **{f"{option}_": 1})


def test_no_parameter_is_a_scalar(head):
    # FSDP shards along a parameter's first dimension.
    assert all(parameter.dim() > 0 for parameter in head.parameters())


def exported(head: Head, *, length: torch.export.Dim | None) -> nn.Module:
    """For inference on two bags of 12 patches, or of ``length``."""
    features, mask, _ = bag(12, batch=2)
    shapes = None if length is None else {"features": {1: length}, "mask": {1: length}}
    return torch.export.export(head, (features, mask), dynamic_shapes=shapes).module()


def two_heads_first() -> list[ParameterSet]:
    """Every head; all but two are left to the slow tests, because an export takes seconds.

    The two depend on a hash of the names, so that a new head needs no line here.
    """
    names = sorted(HEADS.names(), key=lambda name: zlib.crc32(name.encode()))
    others = [pytest.param(name, marks=pytest.mark.slow) for name in names[2:]]
    return [*map(pytest.param, names[:2]), *others]


@pytest.mark.parametrize("name", two_heads_first(), indirect=True)
def test_the_export_gives_the_heads_outputs_for_bags_of_any_size(name, head):
    length = torch.export.Dim("length", min=2, max=10_000)
    if not head.exports_any_size:
        with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
            exported(head, length=length)
    program = exported(head, length=length if head.exports_any_size else None)
    for n in (2, 12, 33) if head.exports_any_size else (12,):
        features, mask, _ = bag(n, batch=2)
        mask[1, n // 2 + 1 :] = False
        exported_logits, expected = program(features, mask).logits, head(features, mask).logits
        torch.testing.assert_close(exported_logits, expected, rtol=1e-4, atol=1e-5)


def test_maps_that_belong_to_classes_are_as_many(name):
    output = run(build(name), *bag())
    assert not output.class_maps or output.attention_logits.shape[1] == C
    assert not output.show_scores or output.instance_logits is not None
