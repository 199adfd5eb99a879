"""BatchNorm in chunks: which statistics normalise, what the running ones become, folding."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from e2e.bags.bag import Bag
from e2e.bags.chunk_plan import balanced_cuts
from e2e.encoders.base import ENCODERS
from e2e.engine.batchnorm import (
    ChunkBatchNorm,
    FrozenBatchNorm,
    SyncBatchNorm,
    fold_into,
    foldable_pairs,
)
from tests.helpers.models import CPU, apart, gradients, make_bag, make_model

GOOD = torch.tensor(True)


def stay(tensor: Tensor) -> None:
    """The sum over one rank."""


def chunks_of(bag: Bag) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.stop) for chunk in bag.chunks]


@pytest.mark.parametrize("early_stop", [True, False])
def test_chunk_statistics_move_once_by_the_pooled_moments(early_stop):
    model = make_model(batch_norm="chunk")
    bag = make_bag()
    norm = model.encoder.net[1]
    start = norm.running_mean.clone(), norm.running_var.clone()
    with set_checkpoint_early_stop(early_stop):  # without it the second pass runs to its end
        gradients(model, bag)
    assert torch.equal(norm.running_mean, start[0])  # nothing moves before the step
    model.batch_norm.commit(stay, GOOD)
    assert len(bag.chunks) == 6
    cuts = chunks_of(bag)
    seen = [model.encoder.net[0]((bag.pixels(a, b, CPU) - 0.5) / 0.25) for a, b in cuts]
    rows = torch.tensor([len(x) for x in seen], dtype=torch.float64)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    variances = torch.stack([x.var((0, 2, 3), unbiased=True) for x in seen])
    mean = (rows[:, None] * means).sum(0) / rows.sum()
    square = (rows[:, None] * (variances + means**2)).sum(0) / rows.sum()
    torch.testing.assert_close(norm.running_mean, 0.9 * start[0] + 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 * start[1] + 0.1 * (square - mean**2))
    assert norm.num_batches_tracked == 1
    assert norm.momentum == 0.1


@pytest.mark.parametrize("policy", ["chunk", "sync"])
def test_a_bad_step_leaves_the_running_statistics_and_the_next_starts_anew(policy):
    model, other = (make_model(100, batch_norm=policy) for _ in range(2))
    bag = make_bag((7,), chunk=100)
    before = copy.deepcopy(model.encoder.state_dict())
    poisoned = make_bag((7,), chunk=100)
    poisoned.pixels.pixels = poisoned.pixels.pixels * float("nan")
    gradients(model, poisoned)
    model.batch_norm.commit(stay, torch.tensor(False))
    assert apart(model.encoder.state_dict(), before) == 0
    for m in (model, other):
        gradients(m, bag)
        m.batch_norm.commit(stay, GOOD)
    assert apart(model.encoder.state_dict(), other.encoder.state_dict()) == 0
    assert apart(model.encoder.state_dict(), before) > 0


def test_bags_of_one_chunk_share_statistics():
    model = make_model(10, batch_norm="chunk")
    bag = make_bag((3, 5, 12), chunk=10, grouped=True)
    features = model._encode_all(bag, CPU, None)
    assert bag.pixels.asked == [(0, 8), (8, 14), (14, 20)]
    torch.testing.assert_close(features[:8], model.encoder(bag.pixels(0, 8, CPU)))
    alone = model._encode_all(make_bag((3, 5, 12), chunk=10), CPU, None)
    assert not torch.allclose(features[:8], alone[:8])


def test_which_bags_share_a_chunk_changes_nothing_where_statistics_are_frozen():
    model = make_model(10, batch_norm="frozen")
    together = gradients(model, make_bag((3, 5, 12), chunk=10, grouped=True))
    assert apart(together, gradients(model, make_bag((3, 5, 12), chunk=10))) <= 1e-12


def test_chunk_normalisation_differentiates_through_the_statistics():
    """Against the same model with BatchNorm in train mode, chunk by chunk, without checkpointing."""
    model = make_model(batch_norm="chunk")
    bag = make_bag((12,))
    found = gradients(model, bag)
    plain = copy.deepcopy(model).train()
    plain.zero_grad()
    pieces = [plain.encoder(bag.pixels(a, b, CPU)) for a, b in balanced_cuts(12, 5)]
    features = torch.cat(pieces).unsqueeze(0)
    output = plain.head(features, torch.ones(1, 12, dtype=torch.bool), torch.zeros(1, 12, 2))
    nn.functional.cross_entropy(output.logits, bag.target, reduction="sum").backward()
    want = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert apart(found, want) <= 1e-12


def test_sync_in_one_process_is_pytorchs_own_batchnorm_over_all_bags():
    model, bag = make_model(20, batch_norm="sync"), make_bag((3, 5, 12), chunk=20, grouped=True)
    plain = make_model(20, batch_norm="chunk")
    # PyTorch moves the statistics itself.
    plain.batch_norm._collect_statistics = lambda rows, second: nullcontext()
    assert apart(gradients(model, bag), gradients(plain, bag)) <= 1e-12
    model.batch_norm.commit(stay, GOOD)
    assert apart(model.encoder.state_dict(), plain.encoder.state_dict()) <= 1e-12


def test_a_bag_without_weight_leaves_no_trace():
    model = make_model(batch_norm="chunk")
    with_idle = gradients(model, make_bag((7, 12), weight=[1.0, 0.0]))
    model.batch_norm.commit(stay, GOOD)
    alone_model = make_model(batch_norm="chunk")
    alone = gradients(alone_model, make_bag((7,)))
    alone_model.batch_norm.commit(stay, GOOD)
    assert apart(with_idle, alone) <= 1e-12
    assert apart(model.state_dict(), alone_model.state_dict()) <= 1e-12


def test_frozen_statistics_never_move_and_parameters_still_learn():
    model = make_model(batch_norm="frozen")
    before = copy.deepcopy(model.encoder.net[1].state_dict())
    found = gradients(model, make_bag())
    model.batch_norm.commit(stay, GOOD)
    assert apart(before, model.encoder.net[1].state_dict()) == 0
    assert found["encoder.net.1.weight"].abs().sum() > 0


def test_a_batchnorm_in_a_frozen_part_of_the_encoder_is_left_alone():
    model = make_model(batch_norm="chunk")
    norm = model.encoder.net[1].eval()
    before = copy.deepcopy(norm.state_dict())
    gradients(model, make_bag())
    model.batch_norm.commit(stay, GOOD)
    assert apart(before, norm.state_dict()) == 0
    assert ChunkBatchNorm(model.encoder)._training_modules == []


def test_folding_changes_no_gradient_also_of_the_batchnorm_it_takes_away():
    bag = make_bag()
    folded = make_model(batch_norm="frozen", dropout=0.4, fold=True)
    plain = make_model(batch_norm="frozen", dropout=0.4, fold=False)
    state = copy.deepcopy(folded.state_dict())
    found = gradients(folded, bag)
    assert len(folded.batch_norm._pairs) == 1
    assert apart(found, gradients(plain, bag)) <= 1e-12
    assert apart(folded.state_dict(), state) == 0
    assert "forward" not in vars(folded.encoder.net[1])


def test_a_folded_convolution_is_the_convolution_and_the_batchnorm():
    torch.manual_seed(0)
    for bias in (True, False):
        conv, norm = nn.Conv2d(3, 4, 3, groups=1, bias=bias).double(), nn.BatchNorm2d(4).double()
        for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            tensor.uniform_(0.5, 2)
        x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
        weight, shift = fold_into(conv, norm)
        want = norm.eval()(conv(x))
        torch.testing.assert_close(nn.functional.conv2d(x, weight, shift), want)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("r18", 15), ("resnet50", 53), ("tf_efficientnet_lite0", 49), ("mobilenetv3_small_050", 34)],
)
def test_batchnorms_of_real_networks_fold_and_give_the_same_features(name, pairs):
    encoder = ENCODERS.build(name, pretrained=False).eval()
    found = foldable_pairs(encoder)
    assert len(found) == pairs
    assert all(norm in list(encoder.modules()) for _, norm in found)


class Reused(nn.Module):
    """The convolution's output goes to the BatchNorm and past it: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Twice(nn.Module):
    """One BatchNorm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) + self.norm(self.b(x))


class Picky(Reused):
    """Takes no image but its own size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, 3, 7, 7))


@pytest.mark.parametrize("network", [Reused, Twice, Picky])
def test_what_cannot_be_folded_exactly_is_left_as_it_is(network):
    assert foldable_pairs(network()) == []


def test_rows_that_do_not_count_are_not_in_the_statistics_of_sync():
    norm = nn.BatchNorm2d(3)
    sums = []
    with SyncBatchNorm(norm).training(lambda t: sums.append(t) or t + 1)(0, False):
        norm(torch.rand(4, 3, 2, 2))
    assert torch.equal(sums[0], torch.zeros(7))


def test_sync_keeps_the_variance_of_values_far_from_zero():
    torch.manual_seed(0)
    norm, own = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    norm.running_mean.fill_(999.0)
    x = 1000 + torch.randn(64, 3, 4, 4) / 2
    with SyncBatchNorm(norm).training(None)(64, False):
        torch.testing.assert_close(norm(x), own(x), atol=2e-3, rtol=1e-3)


def test_a_batchnorm_without_running_statistics_is_left_to_itself():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert FrozenBatchNorm(net).modules == []


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_running_statistics_move_by_the_modules_own_momentum(momentum):
    model, plain = make_model(20, batch_norm="chunk"), make_model(20, batch_norm="chunk")
    bag = make_bag((12,), chunk=20)
    for m in (model, plain):
        m.encoder.net[1].momentum = momentum
    for _ in range(2):
        gradients(model, bag)
        model.batch_norm.commit(stay, GOOD)
        plain.encoder(bag.pixels(0, 12, CPU))
    assert apart(model.encoder.state_dict(), plain.encoder.state_dict()) <= 1e-12


def test_a_network_of_one_image_size_is_not_folded_and_no_crash():
    assert foldable_pairs(ENCODERS.build("visformer_tiny", pretrained=False)) == []
