"""The chunked forward: exact gradients, memory of one chunk, BatchNorm, draws."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import e2e.heads  # noqa: F401  (registers the heads)
from e2e.bags.bag import Bag, Chunk
from e2e.encoders.base import ENCODERS
from e2e.engine.model import MILModel, ReplayError, seeded
from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput
from e2e.losses.base import Regulariser
from e2e.parallel import Strategy
from e2e.sizes import parse_bytes
from tests.helpers.models import CPU, SIZES, SmallEncoder, apart, gradients, make_bag, make_model

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("head", HEADS.names())
@pytest.mark.parametrize("policy", ["frozen", "chunk"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_recomputed_gradients_are_those_of_kept_graphs(head, policy, dtype):
    found = {}
    for keep in ("all", "none"):
        model = make_model(head=head, dropout=0.4, batch_norm=policy, keep_graphs=keep, verify=True)
        found[keep] = gradients(model.to(dtype), make_bag(dtype=dtype))
    assert apart(found["none"], found["all"]) <= BOUNDS[dtype]


@pytest.mark.parametrize("head", HEADS.names())
@pytest.mark.parametrize("chunk", [1, 3, 5, 19])
def test_chunked_gradients_are_those_of_the_network_without_the_engine(head, chunk):
    model, bag = (
        make_model(chunk, head=head, batch_norm="frozen", fold=False),
        make_bag(chunk=chunk),
    )
    found = gradients(model, bag)
    plain = copy.deepcopy(model).train()
    plain.zero_grad()
    losses = []
    for k, size in enumerate(SIZES):
        pixels = bag.pixels(bag.offsets[k], bag.offsets[k + 1], CPU)
        mask = torch.ones(1, size, dtype=torch.bool)
        whole = plain.encoder(pixels).unsqueeze(0)
        with seeded(bag.seeds[k], CPU):  # dtfd draws its pseudo-bags
            output = plain.head(whole, mask, bag.coords[k].unsqueeze(0))
        losses.append(nn.functional.cross_entropy(output.logits, bag.target[k : k + 1]))
    sum(losses).backward()
    want = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert apart(found, want) <= 1e-12


def test_a_budget_changes_what_is_encoded_twice_and_never_the_gradient():
    row = graph_bytes_of_a_row(dropout=0.5)
    found = []
    for keep, again in [
        ("none", 4),
        (f"{int(row * 5.5)}", 4),
        (f"{int(row * 12)}", 3),
        ("9GiB", 0),
    ]:
        model, bag = make_model(dropout=0.5, keep_graphs=keep, batch_norm="chunk"), make_bag((23,))
        gradients(model, bag)  # the first batch measures
        bag.pixels.asked.clear()
        found.append(gradients(model, bag))
        assert len(bag.pixels.asked) == len(bag.chunks) + again, keep
    assert all(apart(one, found[0]) == 0 for one in found)


def graph_bytes_of_a_row(**options) -> float:
    model = make_model(keep_graphs="9GiB", batch_norm="chunk", **options)
    gradients(model, make_bag((23,)))
    return model.budget._bytes_per_row


def test_the_measured_graph_is_what_autograd_saves_of_one_chunk():
    # The normalised pixels, and the outputs of convolution, BatchNorm and ReLU (whose mask is its
    # output); a row of float64. Per chunk BatchNorm adds its mean and inverse deviation (5 each).
    row = (3 * 8 * 8 + 5 * 6 * 6 + 5 * 6 * 6 + 5 * 6 * 6 * 0) * 8
    assert row <= graph_bytes_of_a_row() <= 1.35 * row


def test_auto_keeps_what_the_free_memory_holds(monkeypatch):
    row = graph_bytes_of_a_row()
    free = 0
    monkeypatch.setattr("e2e.engine.graph_budget.free_memory", lambda device: free)

    def encoded_twice() -> int:
        model, bag = (
            make_model(keep_graphs="auto", batch_norm="frozen", fold=False),
            make_bag((23,)),
        )
        gradients(model, bag)
        bag.pixels.asked.clear()
        gradients(model, bag)
        return len(bag.pixels.asked) - len(bag.chunks)

    found = []
    for step in range(80):
        free = int(step * 5 * row)
        found.append(encoded_twice())
    assert sorted(found, reverse=True) == found
    assert set(found) == {0, 1, 2, 3, 4}


def test_a_budget_that_holds_no_chunk_is_refused_with_the_size_of_one():
    model = make_model(keep_graphs="1KiB")
    with pytest.raises(
        UserError,
        match=r"keep_graphs=1KiB is too small for one chunk: .* 4 patches .engine.chunk=5.",
    ):
        gradients(model, make_bag())


@pytest.mark.parametrize("text", ["", "8 Gigs", "-1", "GiB", "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size such as 8GiB"):
        parse_bytes(text)


def test_sizes_are_read_with_their_units():
    assert [parse_bytes(t) for t in ("8GiB", "1.5 kb", "7", "2MiB")] == [2**33, 1500, 7, 2**21]


def test_dropout_draws_the_same_in_both_passes():
    model, bag = make_model(dropout=0.5, batch_norm="frozen", verify=True), make_bag((12,))
    dropped = gradients(model, bag)
    assert apart(gradients(make_model(batch_norm="frozen"), bag), dropped) > 0.01


@pytest.mark.parametrize("broken", ["draws", "pixels"])
def test_a_second_pass_that_does_not_replay_is_noticed(broken, monkeypatch):
    model, bag = make_model(dropout=0.5, batch_norm="frozen", verify=True), make_bag((12,))
    if broken == "draws":
        monkeypatch.setattr(MILModel, "_draws", lambda *given: nullcontext())
    else:
        bag.pixels.pixels = NewEachTime(bag.pixels.pixels)
    with pytest.raises(ReplayError, match="s0 gave different features"):
        gradients(model, bag)


class NewEachTime:
    """Pixels that change a little whenever they are looked at."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __getitem__(self, rows: slice) -> Tensor:
        self.pixels = self.pixels * 0.9
        return self.pixels[rows]


def test_a_bag_alone_gives_what_it_gives_in_a_batch_with_dropout():
    model = make_model(dropout=0.5, batch_norm="chunk")
    batch = [output.logits for output in model(make_bag(), CPU)]
    alone = model(make_bag((7,)), CPU)[0].logits
    torch.testing.assert_close(batch[0], alone)


def test_draws_come_from_the_seeds_of_bag_and_chunk_alone():
    model, bag = make_model(dropout=0.5, batch_norm="frozen"), make_bag()
    torch.manual_seed(1)
    first = gradients(model, bag)
    torch.manual_seed(2)
    assert apart(first, gradients(model, bag)) == 0
    assert apart(gradients(model, Bag(**vars(bag) | {"seeds": (1, 2, 3)})), first) > 0.01
    chunks = tuple(chunk._replace(seed=chunk.seed + 1) for chunk in bag.chunks)
    assert apart(gradients(model, Bag(**vars(bag) | {"chunks": chunks})), first) > 0.01


def test_training_leaves_the_global_generator_as_it_was():
    model = make_model(dropout=0.5, batch_norm="chunk")
    before = torch.get_rng_state()
    gradients(model, make_bag())
    assert torch.equal(before, torch.get_rng_state())


def test_an_encoder_that_is_not_trained_gets_no_gradient_and_one_pass():
    model = make_model(batch_norm="chunk", train_encoder=False)
    bag = make_bag()
    found = gradients(model, bag)
    assert not any(name.startswith("encoder") for name in found)
    assert len(bag.pixels.asked) == len(bag.chunks)


def test_only_the_last_chunk_keeps_its_graph_without_a_budget():
    model = make_model(batch_norm="frozen")
    bag = make_bag((20,))
    gradients(model, bag)
    first, second = bag.pixels.asked[:4], bag.pixels.asked[4:]
    assert first == [(0, 5), (5, 10), (10, 15), (15, 20)]
    assert second == [(10, 15), (5, 10), (0, 5)]


def test_the_forward_holds_the_activations_of_one_chunk_however_long_the_bag():
    def largest(bags: int) -> int:
        """Rows of images saved for backward by graphs alive at the end of the forward."""
        model = make_model(4, batch_norm="frozen")
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.ndim == 4:  # images and feature maps, not features or weights of the head
                saved.append(tensor.shape[0])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(make_bag((4 * bags,), chunk=4), CPU)
        gc.collect()
        return sum(saved)

    assert largest(2) == largest(40) > 0


def test_evaluation_streams_chunks_and_keeps_no_graph():
    model = make_model(batch_norm="chunk").eval()
    bag = make_bag()
    with torch.no_grad():
        outputs = model(bag, CPU)
    assert all(stop - start <= 5 for start, stop in bag.pixels.asked)
    whole = make_model(1000, batch_norm="chunk").eval()(make_bag(chunk=1000), CPU)
    for a, b in zip(outputs, whole, strict=True):
        torch.testing.assert_close(a.logits, b.logits)


def test_the_gradient_of_256_bf16_chunks_is_as_good_as_that_of_one_piece():
    """Autocast's shared low-precision copy of the weights would sum 256 chunks' gradients in bf16."""

    def error(chunk: int) -> float:
        options = {"head": "mean", "batch_norm": "frozen"}
        bag = {"sizes": (256,), "chunk": chunk, "dtype": torch.float32}
        exact = gradients(make_model(chunk, **options).float(), make_bag(**bag))
        model = make_model(chunk, autocast=torch.bfloat16, **options).float()
        with torch.autocast("cpu", torch.bfloat16):  # as a caller may have it around the step
            return apart(gradients(model, make_bag(**bag)), exact)

    assert error(1) <= 1.25 * error(256)


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": (0, 7, 7, 20)},
        {"offsets": (1, 7, 8, 20)},
        {"coords": (torch.zeros(7, 2), torch.zeros(2, 2), torch.zeros(12, 2))},
        {"slides": ("a", "b")},
        {"slides": ()},
        {"weight": torch.ones(2)},
        {"chunks": (Chunk(0, 7, 0, True), Chunk(8, 20, 0, True))},
        {"chunks": (Chunk(0, 7, 0, True),)},
        {"shards": ((3, 3), (), ())},
    ],
)
def test_a_bag_whose_parts_do_not_fit_is_refused(change):
    with pytest.raises(ValueError, match=r"offsets|coords|bags|chunks"):
        Bag(**{**vars(make_bag()), **change})


def test_every_bag_of_a_batch_has_head_draws_of_its_own_seed():
    model, bag = make_model(dropout=0.5, batch_norm="frozen"), make_bag()
    first = [output.logits for output in model(bag, CPU)]
    moved = Bag(**vars(bag) | {"seeds": (bag.seeds[0], 1, 2)})
    again = [output.logits for output in model(moved, CPU)]
    assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True, False, False]


def test_a_compiled_encoder_sees_one_shape_and_gives_the_same_gradients(monkeypatch):
    shapes = []

    def compiled(function, **options):
        def run(pixels: Tensor) -> Tensor:
            shapes.append(len(pixels))
            return function(pixels)

        return run

    monkeypatch.setattr(torch, "compile", compiled)  # the real one takes minutes on a CPU
    model = make_model(batch_norm="frozen", fold=False, verify=True)
    want = gradients(model, make_bag())
    model.compile()
    assert apart(gradients(model, make_bag()), want) <= 1e-12
    assert set(shapes) == {5}


class OneMemory:
    """A function that, as a recorded CUDA graph, has one memory for features, activations, gradients."""

    def __init__(self, function, parameters):
        self.function, self.parameters, self.calls = function, list(parameters), 0
        self.features = self.graph = None
        self.gradients = [torch.empty_like(parameter) for parameter in self.parameters]

    def __call__(self, pixels: Tensor) -> Tensor:
        memory = self

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, pixels, *parameters):
                with torch.enable_grad():
                    memory.graph = memory.function(pixels)
                if memory.features is None:
                    memory.features = torch.empty_like(memory.graph)
                memory.features.copy_(memory.graph)
                ctx.save_for_backward(*parameters)
                return memory.features.detach()

            @staticmethod
            def backward(ctx, gradient):
                parameters = ctx.saved_tensors  # the second pass of a checkpoint runs here
                found = torch.autograd.grad(memory.graph, parameters, gradient)
                for own, new in zip(memory.gradients, found, strict=True):
                    own.copy_(new)
                return None, *(own.detach() for own in memory.gradients)

        self.calls += 1
        return Replay.apply(pixels, *self.parameters)


@pytest.mark.parametrize("kept", [1, 6])  # the last always is
def test_what_a_cuda_graph_writes_over_is_not_used(monkeypatch, kept):
    made = []

    def compiled(function, *, mode="default", **options):
        if mode != "reduce-overhead":
            return function
        made.append(OneMemory(function, model.encoder.parameters()))
        return made[0]

    monkeypatch.setattr(torch, "compile", compiled)
    model, bag = make_model(batch_norm="frozen", fold=False), make_bag()
    want = gradients(model, bag)
    twice = len(bag.chunks) - kept
    monkeypatch.setattr(model.budget, "first_kept", lambda *_: twice)
    model.compile(cuda_graphs=True)
    assert apart(gradients(model, bag), want) <= 1e-12
    assert made[0].calls == 2 * twice


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_compiled_encoder_gives_the_same_gradients_on_cuda(graphs):
    device = torch.device("cuda")
    model = make_model(batch_norm="frozen", fold=False).float().to(device)

    def found() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        bag = make_bag(dtype=torch.float32)
        sum(output.logits.sum() for output in model(bag, device)).backward()
        return {k: p.grad.double().cpu() for k, p in model.named_parameters()}

    want = found()
    model.compile(cuda_graphs=graphs)
    for _ in range(3):  # warming up, recording, replaying
        assert apart(found(), want) <= 1e-4


def test_features_that_are_not_finite_are_no_replay_error():
    model, bag = make_model(batch_norm="frozen", verify=True), make_bag((12,))
    bag.pixels.pixels[0] = float("nan")
    found = gradients(model, bag)
    assert not all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("keep", ["none", "all"])
def test_block_checkpointing_gives_the_gradient_of_a_frozen_network(keep):
    def found(*, blocks: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        encoder = ENCODERS.build("test_resnet", pretrained=False)
        if blocks:
            encoder.checkpoint_blocks()
        head = HEADS.build("mean", encoder.dim, 2)
        model = MILModel(encoder, head, chunk=5, keep_graphs=keep, fold=not blocks)
        bag = make_bag((12,), dtype=torch.float32)
        bag.pixels.pixels = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return gradients(model.train(), bag)

    assert apart(found(blocks=True), found(blocks=False)) <= 1e-5


def test_a_small_last_chunk_says_nothing_of_a_larger_one_that_follows():
    model = make_model(keep_graphs="1GiB", batch_norm="frozen")
    gradients(model, make_bag((10, 1)))
    assert model.budget._measured_rows == 1
    gradients(model, make_bag((10,)))
    gradients(model, make_bag((10, 2)))
    assert model.budget._measured_rows == 5
    other = make_model(keep_graphs="1GiB", batch_norm="frozen")
    gradients(other, make_bag((10,)))
    assert model.budget._bytes_per_row == other.budget._bytes_per_row


def test_folded_weights_are_not_counted_as_part_of_a_chunks_graph():
    rows = {}
    for fold in (True, False):
        model = make_model(1, keep_graphs="1GiB", batch_norm="frozen", fold=fold)
        gradients(model, make_bag((1,), chunk=1))
        rows[fold] = model.budget._bytes_per_row
    assert rows[True] <= rows[False]


# Plain tensors


def test_a_model_takes_patches_without_bag_device_or_strategy():
    model, bag = make_model(batch_norm="chunk").eval(), make_bag()
    expected = model(bag, CPU)
    parts = bag.pixels.pixels.split(SIZES)
    outputs = model(list(parts))
    assert len(outputs) == len(SIZES)
    for output, want, patches in zip(outputs, expected, parts, strict=True):
        for name in ("logits", "attention_logits"):
            torch.testing.assert_close(getattr(output, name), getattr(want, name), rtol=0, atol=0)
        single = model(patches)
        assert isinstance(single, HeadOutput)
        assert torch.equal(single.logits, output.logits)
        assert single.logits.shape == (1, 2)
    assert [torch.equal(a.logits, b.logits) for a, b in zip(model(bag), expected, strict=True)]


def test_patches_are_encoded_in_chunks_and_uint8_is_as_good_as_floats(monkeypatch):
    model, sizes = make_model(4, batch_norm="frozen", fold=False).eval(), []
    encode = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda x: sizes.append(len(x)) or encode(x))
    patches = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(patches).logits
        assert max(sizes) <= 4
        assert sum(sizes) == 11
        torch.testing.assert_close(model(patches.double() / 255).logits, logits)


@pytest.mark.parametrize("keep", ["none", "all"])
def test_patches_train_a_model_as_a_bag_does(keep):
    """The gradients of the network without the engine; a second backward repeats the draws."""
    model, bag = make_model(batch_norm="frozen", fold=False, keep_graphs=keep), make_bag((12,))
    expected = gradients(model, bag)
    model.zero_grad()
    output = model(bag.pixels.pixels)
    nn.functional.cross_entropy(output.logits, bag.target).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert apart(found, expected) <= 1e-12
    dropping = make_model(batch_norm="frozen", dropout=0.5, keep_graphs=keep, verify=True)
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(dropping(bag.pixels.pixels).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    logits[2].sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8), (2, 4, 8, 8), (5, 6)])
def test_what_is_no_patches_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"expected \(N,3,H,W\) patches .* got shape \("):
        make_model().eval()(torch.zeros(shape))


def test_a_model_of_features_takes_features():
    model = MILModel(ENCODERS.build("features", dim=6), HEADS.build("abmil", 6, 2)).eval()
    features = [torch.rand(4, 6), torch.rand(9, 6)]
    together = model(features)
    assert [output.logits.shape for output in together] == [(1, 2), (1, 2)]
    torch.testing.assert_close(model(features[1]).logits, together[1].logits)
    with pytest.raises(ValueError, match=r"expected \(N,D\) features"):
        model(torch.zeros(2, 3, 8, 8))


def test_one_call_after_the_step_moves_all_that_no_gradient_moves():
    """BatchNorm's statistics, teachers, then the head's and the regularisers' own state."""
    calls = []

    class Student(Head):
        teachers = MappingProxyType({"teacher": "net"})
        teacher_decay = 0.75

        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher = nn.Linear(6, 2), nn.Linear(6, 2)

        def after_step(self, good: Tensor) -> None:
            calls.append(("head", bool(good), self.teacher.weight.detach().clone()))

    class Noted(Regulariser):
        def after_step(self, good: Tensor) -> None:
            calls.append(("regulariser", bool(good), None))

    encoder = SmallEncoder()
    model = MILModel(encoder, Student(), batch_norm="chunk", regularisers=[Noted()]).train()
    assert not any(parameter.requires_grad for parameter in model.head.teacher.parameters())
    strategy = Strategy(CPU)
    strategy.setup(model, None, clip=None)
    teacher, student = (m.weight.detach().clone() for m in (model.head.teacher, model.head.net))
    for good in (False, True):
        model._encode_all(make_bag(dtype=torch.float32), CPU, None)
        model.after_step(strategy, torch.tensor(good))
        assert encoder.net[1].num_batches_tracked == good
    assert [call[:2] for call in calls] == [
        ("head", False), ("regulariser", False), ("head", True), ("regulariser", True),
    ]  # fmt: skip
    assert torch.equal(calls[0][2], teacher)
    torch.testing.assert_close(calls[2][2], 0.75 * teacher + 0.25 * student)


def test_a_teacher_that_does_not_fit_its_student_or_is_trained_is_refused():
    strategy = Strategy(CPU)
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(3, 2), "c": nn.Linear(2, 2)})
    strategy.setup(net, None, clip=None)
    with pytest.raises(ValueError, match="must be frozen"):
        strategy.average_into(net["a"], net["c"], 0.5)
    net["a"].requires_grad_(False)
    with pytest.raises(ValueError, match="same parameters and buffers"):
        strategy.average_into(net["a"], net["b"], 0.5)
