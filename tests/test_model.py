"""The chunked forward: exact gradients, memory of one chunk, BatchNorm, draws."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

import e2e.heads  # noqa: F401  (registers the heads)
from e2e.bag import Bag
from e2e.encoders.base import Encoder
from e2e.heads.base import HEADS
from e2e.model import MILModel, balanced_chunks

CPU = torch.device("cpu")
SIZES = (7, 1, 12)


class SmallEncoder(Encoder):
    """Convolution, BatchNorm, dropout: all that can go wrong in a second pass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
        self.dim = 6
        self.pretrained = False
        self.net = nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(5, 6, 3),
        )

    def features(self, images: Tensor) -> Tensor:
        return self.net(images).mean((-2, -1))


class CountedPixels:
    """A pixel source over given pixels that remembers what was asked for."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int, device: torch.device) -> Tensor:
        self.asked.append((start, stop))
        return self.pixels[start:stop]


def make_bag(sizes=SIZES, weight=None, dtype=torch.float64, groups=None) -> Bag:
    total = sum(sizes)
    generator = torch.Generator().manual_seed(1)
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return Bag(
        offsets=tuple(offsets),
        coords=torch.zeros(total, 2, dtype=torch.int32),
        pixels=CountedPixels(torch.rand(total, 3, 8, 8, generator=generator, dtype=dtype)),
        target=torch.arange(len(sizes)) % 2,
        slides=tuple(f"s{k}" for k in range(len(sizes))),
        seeds=tuple(range(11, 11 + len(sizes))),
        weight=torch.ones(len(sizes)) if weight is None else torch.tensor(weight),
        groups=groups or tuple(range(len(sizes))),
    )


def make_model(chunk: int, *, head="abmilx", dropout=0.0, **options) -> MILModel:
    torch.manual_seed(0)
    head_options = {"embed_dim": 8, "dropout": dropout}
    if head == "abmilx":
        head_options["heads"] = 2
    return MILModel(
        SmallEncoder(dropout), HEADS.build(head, 6, 2, **head_options), chunk=chunk, **options
    ).double()


def gradients(model: MILModel, bag: Bag) -> dict[str, Tensor]:
    model.zero_grad()
    logits = torch.cat([output.logits for output in model(bag, CPU)])
    losses = nn.functional.cross_entropy(logits, bag.target, reduction="none")
    (losses * bag.weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("head", ["abmil", "abmilx", "mean", "max"])
@pytest.mark.parametrize("chunk", [1, 3, 5, 19])
def test_chunked_gradients_are_those_of_the_whole_bag(head, chunk):
    whole = make_model(10_000, head=head, batch_norm="frozen").train()
    pieces = make_model(chunk, head=head, batch_norm="frozen").train()
    bag = make_bag()
    close(gradients(whole, bag), gradients(pieces, bag))


def test_dropout_draws_the_same_in_both_passes_and_in_one():
    kept = make_model(12, dropout=0.5, batch_norm="frozen").train()
    bag = make_bag((12,))  # one chunk: its graph is kept
    again = make_model(12, dropout=0.5, batch_norm="frozen").train()
    again_bag = make_bag((12, 12))  # the first bag is encoded twice
    again_bag = Bag(**{**vars(again_bag), "weight": torch.tensor([1.0, 0.0])})
    assert torch.equal(bag.pixels(0, 12, CPU), again_bag.pixels(0, 12, CPU))
    one, two = gradients(kept, bag), gradients(again, again_bag)
    close(one, two)
    assert not torch.allclose(
        one["encoder.net.4.weight"],
        gradients(make_model(12, batch_norm="frozen").train(), bag)["encoder.net.4.weight"],
    )


def test_a_bag_alone_gives_what_it_gives_in_a_batch_with_dropout():
    model = make_model(5, dropout=0.5, batch_norm="chunk").train()
    batch = [output.logits for output in model(make_bag(), CPU)]
    alone = model(make_bag((7,)), CPU)[0].logits
    torch.testing.assert_close(batch[0], alone)


def test_draws_come_from_the_seed_of_the_bag_alone():
    model, bag = make_model(5, dropout=0.5, batch_norm="frozen").train(), make_bag()
    torch.manual_seed(1)
    first = gradients(model, bag)
    torch.manual_seed(2)
    close(first, gradients(model, bag))
    other = gradients(model, Bag(**{**vars(bag), "seeds": (1, 2, 3)}))
    assert not torch.allclose(first["encoder.net.4.weight"], other["encoder.net.4.weight"])


def test_training_leaves_the_global_generator_as_it_was():
    model = make_model(5, dropout=0.5, batch_norm="chunk").train()
    before = torch.get_rng_state()
    gradients(model, make_bag())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("early_stop", [True, False])
def test_chunk_statistics_move_once_by_the_pooled_moments(early_stop):
    model = make_model(5, batch_norm="chunk").train()
    bag = make_bag()
    norm = model.encoder.net[1]
    start = norm.running_mean.clone(), norm.running_var.clone()
    with set_checkpoint_early_stop(early_stop):  # without it the second pass runs to its end
        gradients(model, bag)
    assert torch.equal(norm.running_mean, start[0])  # nothing moves before the step
    model.statistics.commit(lambda tensor: None)
    chunks = [c for low, high in ((0, 7), (7, 8), (8, 20)) for c in balanced_chunks(low, high, 5)]
    assert len(chunks) == 6
    seen = [model.encoder.net[0]((bag.pixels(a, b, CPU) - 0.5) / 0.25) for a, b in chunks]
    rows = torch.tensor([len(x) for x in seen], dtype=torch.float64)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    variances = torch.stack([x.var((0, 2, 3), unbiased=True) for x in seen])
    mean = (rows[:, None] * means).sum(0) / rows.sum()
    square = (rows[:, None] * (variances + means**2)).sum(0) / rows.sum()
    torch.testing.assert_close(norm.running_mean, 0.9 * start[0] + 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 * start[1] + 0.1 * (square - mean**2))
    assert norm.num_batches_tracked == 1
    assert norm.momentum == 0.1


def test_bags_of_one_group_are_encoded_together_and_share_statistics():
    model = make_model(10, batch_norm="chunk").train()
    bag = make_bag((3, 5, 12), groups=(0, 0, 1))
    features = model._encode_all(bag, CPU)
    assert bag.pixels.asked == [(0, 8), (8, 14), (14, 20)]
    torch.testing.assert_close(features[:8], model.encoder(bag.pixels(0, 8, CPU)))
    alone = model._encode_all(make_bag((3, 5, 12)), CPU)
    assert not torch.allclose(features[:8], alone[:8])


def test_grouping_changes_nothing_where_statistics_are_frozen():
    model = make_model(10, batch_norm="frozen").train()
    close(
        gradients(model, make_bag((3, 5, 12), groups=(0, 0, 1))),
        gradients(model, make_bag((3, 5, 12))),
    )


def test_chunk_normalisation_differentiates_through_the_statistics():
    """Against the same model with BatchNorm in train mode, chunk by chunk, without checkpointing."""
    model = make_model(5, batch_norm="chunk").train()
    bag = make_bag((12,))
    found = gradients(model, bag)
    plain = copy.deepcopy(model).train()
    plain.zero_grad()
    pieces = [plain.encoder(bag.pixels(a, b, CPU)) for a, b in balanced_chunks(0, 12, 5)]
    features = torch.cat(pieces).unsqueeze(0)
    output = plain.head(features, torch.ones(1, 12, dtype=torch.bool), torch.zeros(1, 12, 2))
    nn.functional.cross_entropy(output.logits, bag.target, reduction="sum").backward()
    close(found, {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})


def test_a_bag_without_weight_leaves_no_trace():
    model = make_model(5, batch_norm="chunk").train()
    with_idle = gradients(model, make_bag((7, 12), weight=[1.0, 0.0]))
    model.statistics.commit(lambda tensor: None)
    idle_state = copy.deepcopy(model.state_dict())
    alone_model = make_model(5, batch_norm="chunk").train()
    alone = gradients(alone_model, make_bag((7,)))
    alone_model.statistics.commit(lambda tensor: None)
    close(with_idle, alone)
    close(idle_state, alone_model.state_dict())


def test_frozen_statistics_never_move_and_parameters_still_learn():
    model = make_model(5, batch_norm="frozen").train()
    before = copy.deepcopy(model.encoder.net[1].state_dict())
    found = gradients(model, make_bag())
    model.statistics.commit(lambda tensor: None)
    close(before | {}, model.encoder.net[1].state_dict())
    assert found["encoder.net.1.weight"].abs().sum() > 0


def test_an_encoder_that_is_not_trained_gets_no_gradient_and_one_pass():
    model = make_model(5, batch_norm="chunk", train_encoder=False).train()
    bag = make_bag()
    found = gradients(model, bag)
    assert not any(name.startswith("encoder") for name in found)
    assert len(bag.pixels.asked) == 6


def test_only_the_last_chunk_keeps_its_graph():
    model = make_model(5, batch_norm="frozen").train()
    bag = make_bag((20,))
    gradients(model, bag)
    first, second = bag.pixels.asked[:4], bag.pixels.asked[4:]
    assert first == [(0, 5), (5, 10), (10, 15), (15, 20)]
    assert second == [(10, 15), (5, 10), (0, 5)]


def test_the_forward_holds_the_activations_of_one_chunk_however_long_the_bag():
    def largest(bags: int) -> int:
        """Bytes saved for backward by graphs alive at the end of the forward."""
        model = make_model(4, batch_norm="frozen").train()
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.ndim == 4:  # images and feature maps, not features or weights of the head
                saved.append(tensor.shape[0])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(make_bag((4 * bags,)), CPU)
        gc.collect()
        return sum(saved)

    assert largest(2) == largest(40) > 0


def test_evaluation_streams_chunks_and_keeps_no_graph():
    model = make_model(5, batch_norm="chunk").eval()
    bag = make_bag()
    with torch.no_grad():
        outputs = model(bag, CPU)
    assert all(stop - start <= 5 for start, stop in bag.pixels.asked)
    whole = make_model(1000, batch_norm="chunk").eval()(make_bag(), CPU)
    for a, b in zip(outputs, whole, strict=True):
        torch.testing.assert_close(a.logits, b.logits)


def test_many_chunks_in_bf16_are_as_exact_as_one_piece():
    """Autocast's shared low-precision copy of the weights would sum 256 chunks' gradients in bf16."""

    def relative_error(chunk: int) -> float:
        exact = gradients(
            make_model(chunk, head="mean", batch_norm="frozen").train(), make_bag((256,))
        )
        model = make_model(chunk, head="mean", batch_norm="frozen", autocast=torch.bfloat16).float()
        with torch.autocast("cpu", torch.bfloat16):  # as a caller may have it around the step
            found = gradients(model.train(), make_bag((256,), dtype=torch.float32))
        name = "encoder.net.4.weight"
        return ((found[name].double() - exact[name]).norm() / exact[name].norm()).item()

    assert relative_error(1) < 2 * relative_error(256) + 1e-3


@pytest.mark.parametrize(("rows", "chunk"), [(1, 1), (10, 3), (256, 256), (257, 256), (7, 100)])
def test_chunks_cover_the_rows_and_differ_by_at_most_one(rows, chunk):
    chunks = balanced_chunks(100, 100 + rows, chunk)
    sizes = [stop - start for start, stop in chunks]
    assert [start for start, _ in chunks] == [100, *[stop for _, stop in chunks[:-1]]]
    assert chunks[-1][1] == 100 + rows
    assert max(sizes) <= chunk
    assert max(sizes) - min(sizes) <= 1
    assert len(chunks) == -(-rows // chunk)


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": (0, 7, 7, 20)},
        {"offsets": (1, 7, 8, 20)},
        {"coords": torch.zeros(19, 2)},
        {"slides": ("a", "b")},
        {"weight": torch.ones(2)},
        {"groups": (0, 0)},
    ],
)
def test_a_bag_whose_parts_do_not_fit_is_refused(change):
    with pytest.raises(ValueError, match=r"offsets|coords|bags"):
        Bag(**{**vars(make_bag()), **change})
