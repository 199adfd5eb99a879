"""The spatial constraint against loops over neighbours, float64, and the grid that coords tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import e2e.heads
import e2e.losses  # noqa: F401
from e2e.errors import UserError
from e2e.heads.base import HEADS, HeadOutput
from e2e.losses.base import REGULARISERS, Regulariser
from e2e.losses.spatial import grid_step, strongest_near
from tests.helpers.kernels import Watch

C = 3
SIZES = (17, 1, 9)
PITCH = 256


def grid(count: int, side: int, seed: int = 0) -> NDArray[np.int64]:
    """(count, 2) different places of a ``side`` x ``side`` grid, in no order, off the slide's corner."""
    cells = np.random.default_rng(seed).choice(side * side, count, replace=False)
    return np.stack([cells % side, cells // side], axis=1) * PITCH + (1000, 37)


def output(fill: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[HeadOutput, Tensor]:
    """Scores of three bags, whose padding holds ``fill``, and their coords."""
    torch.manual_seed(0)
    longest = max(SIZES)
    real = torch.arange(longest) < torch.tensor(SIZES).unsqueeze(1)
    scores = torch.randn(len(SIZES), longest, C, dtype=dtype).masked_fill(~real.unsqueeze(-1), fill)
    attention = torch.zeros(len(SIZES), C, longest).masked_fill(~real.unsqueeze(1), -math.inf)
    coords = torch.full((len(SIZES), longest, 2), 5, dtype=torch.int32)
    for b, n in enumerate(SIZES):
        coords[b, :n] = torch.from_numpy(grid(n, 6, seed=b))
    return HeadOutput(torch.zeros(len(SIZES), C), attention, scores), coords


def neighbours(coords: NDArray, n: int) -> list[int]:
    """Of patch n, itself among them: those whose offset is at most one pitch in both directions."""
    offset = np.abs(coords - coords[n])
    assert (offset % PITCH == 0).all()
    return [j for j in range(len(coords)) if offset[j].max() <= PITCH]


def strongest_by_hand(scores: NDArray, coords: NDArray) -> NDArray:
    result = np.zeros_like(scores)
    for n, c in np.ndindex(scores.shape):
        around = [scores[j, c] for j in neighbours(coords, n)]
        result[n, c] = max(around, key=abs)
    return result


def by_hand(scores: NDArray, coords: NDArray, background: int | None = None) -> float:
    strongest, total = strongest_by_hand(scores, coords), 0.0
    for c in range(scores.shape[1]):
        if c != background:
            apart = [
                abs(math.tanh(s - p)) for s, p in zip(scores[:, c], strongest[:, c], strict=True)
            ]
            total += sum(apart) / len(apart)
    return total


def spatial(**options: object) -> Regulariser:
    return REGULARISERS.build("spatial", weight=1.0, **options)


def value(
    regulariser: Regulariser, inputs: HeadOutput, coords: Tensor | None, side: float = math.nan
) -> Tensor:
    count = len(inputs.logits)
    sides = torch.full((count,), side, dtype=torch.float64)
    return regulariser(inputs, torch.zeros(count), coords, sides)


def row(*scores: float, at: tuple[int, ...] | None = None) -> tuple[HeadOutput, Tensor]:
    """One bag of one class: patches in a row, side by side or ``at`` these columns."""
    columns = torch.tensor(at or tuple(range(len(scores))))
    coords = torch.stack([columns * PITCH, torch.zeros_like(columns)], dim=1).unsqueeze(0)
    described = torch.tensor(scores, dtype=torch.float64).view(1, -1, 1)
    return HeadOutput(torch.zeros(1, 1), torch.zeros(1, 1, len(scores)), described), coords


def test_three_patches_in_a_row_by_hand():
    result = value(spatial(), *row(1.0, -2.0, 0.5))
    # The strongest of all is the one in the middle, -2, with its sign.
    assert result.item() == pytest.approx((math.tanh(3) + 0 + math.tanh(2.5)) / 3)


def test_a_patch_two_steps_away_is_no_neighbour():
    result = value(spatial(), *row(1.0, -2.0, 0.5, 4.0, at=(0, 1, 2, 4)))
    assert result.item() == pytest.approx((math.tanh(3) + math.tanh(2.5)) / 4)


@pytest.mark.parametrize("background", [None, 0, 2])
@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan])
def test_spatial_is_its_formula_on_each_bag_alone(fill, background):
    inputs, coords = output(fill)
    result = value(spatial(background=background), inputs, coords)
    expected = [
        by_hand(inputs.instance_logits[b, :n].numpy(), coords[b, :n].numpy(), background)
        for b, n in enumerate(SIZES)
    ]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-14)
    assert expected[0] > 0.1
    assert expected[1] == 0  # one patch is its own strongest neighbour


def near(scores: NDArray, coords: NDArray) -> NDArray:
    """``strongest_near`` of one bag."""
    real = torch.ones(1, len(scores), dtype=torch.bool)
    inputs = torch.from_numpy(scores).unsqueeze(0), torch.from_numpy(coords).unsqueeze(0)
    return strongest_near(*inputs, real)[0].numpy()


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(15, 60), st.integers(8, 20))
def test_neither_order_nor_place_on_the_slide_nor_the_grids_step_matters(seed, count, side):
    draw = np.random.default_rng(seed)
    scores, coords = draw.normal(size=(count, 2)), grid(count, side, seed)
    order = draw.permutation(count)
    expected = strongest_by_hand(scores, coords)
    assume(step_of(coords) == PITCH)  # of others nobody can tell the step
    np.testing.assert_array_equal(near(scores, coords), expected)
    np.testing.assert_array_equal(near(scores[order], coords[order]), expected[order])
    np.testing.assert_array_equal(near(scores, coords + draw.integers(0, 99_999, 2)), expected)
    np.testing.assert_array_equal(near(scores, coords // 256 * 31), expected)
    fine = np.floor((coords - (1000, 37)) / PITCH * 506.37).astype(np.int64)
    np.testing.assert_array_equal(near(scores, fine), expected)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_copies_of_patches_change_nothing(seed, count):
    draw = np.random.default_rng(seed)
    scores, coords = draw.normal(size=(count, 2)), grid(count, 8, seed)
    more = np.append(np.arange(count), draw.integers(0, count, 5))
    np.testing.assert_array_equal(near(scores[more], coords[more]), near(scores, coords)[more])


def test_padding_is_nobodys_neighbour():
    inputs, coords = output(1e4)
    real = inputs.attention_logits[:, 0] > -math.inf
    result = strongest_near(inputs.instance_logits, coords, real)
    for b, n in enumerate(SIZES):
        expected = strongest_by_hand(inputs.instance_logits[b, :n].numpy(), coords[b, :n].numpy())
        np.testing.assert_array_equal(result[b, :n], expected)
    coords[0, SIZES[0] :] = coords[0, 0]
    torch.testing.assert_close(strongest_near(inputs.instance_logits, coords, real), result)


def test_two_patches_in_one_cell_are_both_seen():
    more = np.stack([np.arange(40) * PITCH, np.full(40, 9 * PITCH)], axis=1)  # tell the step
    coords = np.append([[0, 0], [256, 0], [290, 0], [512, 0]], more, axis=0)
    scores = np.append([[0.1], [0.2], [-3.0], [0.3]], np.zeros((40, 1)), axis=0)
    assert near(scores, coords).ravel()[:4].tolist() == [-3.0] * 4


def step_of(coords: NDArray) -> float:
    real = torch.ones(1, len(coords), dtype=torch.bool)
    return grid_step(torch.from_numpy(coords)[None], real).item()


def test_the_step_is_seen_though_few_of_the_patches_are_there():
    assert [step_of(grid(250, 100, seed)) for seed in range(5)] == [PITCH] * 5


def test_the_step_is_seen_though_pieces_of_tissue_share_a_row_by_chance():
    one, shift = grid(200, 20), np.array([8060, 37])
    pieces = [one, grid(200, 20, seed=1) + shift, one[:1] + np.array([60, 0])]
    assert step_of(np.concatenate(pieces)) == PITCH


def test_the_step_is_seen_though_places_were_rounded():
    for step in (506.37, 506.5, 506.99, 31.04):
        places = np.floor(grid(900, 40) / PITCH * step)
        assert step_of(places.astype(np.int64)) == pytest.approx(step, abs=0.1)


def test_without_two_patches_in_a_row_or_column_there_are_no_neighbours():
    scores = np.arange(5.0)[:, None]
    coords = np.stack([np.arange(5) * 300, np.arange(5) * 300], axis=1)
    np.testing.assert_array_equal(near(scores, coords), scores)


@pytest.mark.parametrize(
    ("coords", "side", "is_near"),
    [
        ([[0, 0], [512, 0], [1024, 0]], 256.0, False),  # every second patch of a row
        ([[0, 0], [512, 0], [1024, 0]], math.nan, True),  # the step is all that is known
        ([[0, 0], [512, 0], [1024, 0]], 512.0, True),
        ([[0, 0], [1024, 0], [2048, 0]], 256.0, False),
        ([[0, 0], [256, 256], [512, 512]], 256.0, True),  # no two in a row or column
        ([[0, 0], [1024, 1024], [2048, 2048]], 256.0, False),
        ([[0, 0], [128, 0], [256, 0]], 256.0, True),  # they overlap by half
        ([[0, 0], [253, 0], [506, 0]], 252.6, True),  # rounded
    ],
)
def test_patches_further_apart_than_their_side_are_no_neighbours(coords, side, is_near):
    scores = torch.tensor([[[0.1], [0.7], [0.2]]], dtype=torch.float64)
    places, real = torch.tensor([coords]), torch.ones(1, 3, dtype=torch.bool)
    nearest = strongest_near(scores, places, real, torch.tensor([side], dtype=torch.float64))
    assert nearest.ravel().tolist() == ([0.7] * 3 if is_near else [0.1, 0.7, 0.2])


def test_of_two_scores_that_differ_in_their_sign_the_positive_one_is_taken():
    for scores in ((-2.0, 2.0), (2.0, -2.0)):
        described, coords = row(*scores)
        assert strongest_near(described.instance_logits, coords, torch.ones(1, 2) > 0).unique() == 2


@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan])
@pytest.mark.parametrize("detach", [False, True])
def test_no_gradient_reaches_padding_or_comes_from_it(detach, fill):
    result = []
    for held in (fill, 0.0):
        inputs, coords = output(held)
        leaf = inputs.instance_logits.requires_grad_()
        value(spatial(detach=detach), inputs, coords).sum().backward()
        result.append(leaf.grad)
    torch.testing.assert_close(*result, rtol=0, atol=0)
    assert (result[0][inputs.attention_logits[:, 0] == -math.inf] == 0).all()
    assert result[0].abs().sum() > 0.1


def test_the_gradient_is_that_of_the_loss():
    inputs, coords = output()

    def loss(scores: Tensor) -> Tensor:
        return value(spatial(), inputs._replace(instance_logits=scores), coords)

    assert torch.autograd.gradcheck(loss, (inputs.instance_logits.requires_grad_(),))


def test_detached_the_strongest_patch_stays_and_draws_the_others_to_it():
    inputs, coords = row(1.0, -2.0, 0.5)
    leaf = inputs.instance_logits.requires_grad_()
    value(spatial(detach=True), inputs, coords).backward()
    slope = [1 / math.cosh(3) ** 2 / 3, 0.0, 1 / math.cosh(2.5) ** 2 / 3]
    assert leaf.grad.flatten().tolist() == pytest.approx(slope)


def test_memory_grows_with_the_patches_alone():
    n = 4000
    coords = torch.from_numpy(grid(n, 90)).unsqueeze(0)
    scores = torch.randn(1, n, 2, requires_grad=True)
    described = HeadOutput(torch.zeros(1, 2), torch.zeros(1, 2, n), scores)
    with Watch() as watch:
        value(spatial(), described, coords).sum().backward()
    assert watch.largest <= 9 * 2 * n


def test_half_precision_scores_give_a_single_precision_loss():
    inputs, coords = output(dtype=torch.bfloat16)
    result = value(spatial(), inputs, coords)
    assert result.dtype == torch.float32
    exact = inputs._replace(instance_logits=inputs.instance_logits.float())
    torch.testing.assert_close(result, value(spatial(), exact, coords), rtol=0, atol=0)


@pytest.mark.parametrize("name", HEADS.names())
def test_every_head_that_scores_and_attends_can_have_it_and_others_are_refused(name):
    torch.manual_seed(0)
    head = HEADS.build(name, 8, C)
    described = head(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    places = torch.from_numpy(grid(5, 3)).repeat(2, 1, 1)
    if described.instance_logits is None or described.attention_logits is None:
        with pytest.raises(UserError, match="does not have both patch scores and attention"):
            spatial().check(described)
        return
    if described.instance_logits.requires_grad:
        spatial().check(described)
    assert value(spatial(), described, places).isfinite().all()


@pytest.mark.parametrize("background", [-1, C])
def test_a_background_that_is_no_output_is_refused(background):
    inputs, _ = output()
    inputs.instance_logits.requires_grad_()
    with pytest.raises(
        UserError, match=rf"spatial\.background={background} must be one of the 3 outputs"
    ):
        spatial(background=background).check(inputs)


def test_without_coords_it_says_so():
    with pytest.raises(UserError, match=r"(?s)slide has no patch coordinates.*spatial\.weight=0"):
        value(spatial(), output()[0], None)
