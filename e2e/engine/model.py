"""Encoder and head as one module, with the exact chunked forward of the engine.

A batch is cut into chunks. A chunk is encoded under non-reentrant activation checkpointing: the
forward keeps only its features, and the backward asks the bag for the same pixels and encodes them again
with gradients. Memory is therefore that of one chunk, however many patches a bag has, and the gradients
are those of the full bag. Chunks whose graphs fit the memory budget are encoded once. All of this happens
inside one forward of one module, so that DDP, FSDP and DeepSpeed reduce once per step.

Where the bags hold features (:attr:`e2e.encoders.base.Encoder.input_kind`), only the head is left, which sees
all bags of a batch at once, padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e2e.bags.bag import Bag, Chunk, PixelSource
from e2e.bags.chunk_plan import balanced_cuts
from e2e.encoders.base import Encoder
from e2e.engine.batchnorm import POLICIES, ChunkContext
from e2e.engine.graph_budget import GraphBudget
from e2e.heads.base import Head, HeadOutput
from e2e.losses.base import Regulariser
from e2e.memory import Slabs
from e2e.parallel import Strategy


class ReplayError(RuntimeError):
    """The second pass over a chunk gave other features than the first."""


class MILModel(nn.Module):
    """Encoder and head in one module, called on patches or on a :class:`~e2e.bags.bag.Bag`.

    ``model(patches)`` returns a :class:`~e2e.heads.base.HeadOutput`; see :meth:`forward`. ::

        model.eval()
        with torch.no_grad():
            logits = model(torch.rand(20, 3, 256, 256)).logits  # (1, num_outputs)

    Parameters
    ----------
    encoder
        Turns patches into features.
    head
        Turns a bag of features into outputs.
    chunk
        Largest number of patches encoded together.
    batch_norm
        ``frozen``, ``chunk`` or ``sync``; see :mod:`e2e.engine.batchnorm`.
    fold
        Whether frozen BatchNorms are folded into their convolutions.
    train_encoder
        False keeps the encoder in eval mode and without gradients.
    autocast
        dtype of the matrix products in encoder and head; None for float32.
    keep_graphs
        Memory for graphs that need no second pass; see :class:`~e2e.engine.graph_budget.GraphBudget`.
    verify
        Whether to compare the features of both passes and raise a ReplayError where they differ.
    regularisers
        Extra losses. They are part of the model because their state is saved with the weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: Head,
        *,
        chunk: int = 256,
        batch_norm: str = "frozen",
        fold: bool = True,
        train_encoder: bool = True,
        autocast: torch.dtype | None = None,
        keep_graphs: str = "none",
        verify: bool = False,
        regularisers: Iterable[Regulariser] = (),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.regularisers = nn.ModuleList(regularisers)
        self.chunk = chunk
        self.train_encoder = train_encoder
        self.autocast = autocast
        self.verify = verify
        self.batch_norm = POLICIES[batch_norm](encoder, fold=fold)
        self.budget = GraphBudget(keep_graphs, chunk)
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._cuda_graphed: Callable[[Tensor], Tensor] | None = None
        if not train_encoder:
            encoder.requires_grad_(False)
        for teacher in head.teachers:
            head.get_submodule(teacher).requires_grad_(False)

    def compile(self, *, cuda_graphs: bool = False) -> None:  # type: ignore[override]
        """Compile the encoder for one shape: every chunk is padded to ``chunk`` patches.

        Rows must not depend on each other, so BatchNorm has to be frozen.

        Parameters
        ----------
        cuda_graphs
            Whether chunks that are encoded twice are replayed from recorded CUDA graphs.
        """
        self._compiled = torch.compile(self.encoder.forward, dynamic=False)
        if cuda_graphs:
            self._cuda_graphed = torch.compile(
                self.encoder.forward, dynamic=False, mode="reduce-overhead"
            )

    def train(self, mode: bool = True) -> MILModel:
        """Set training or eval mode; an encoder that is not trained stays in eval mode."""
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        elif mode:
            self.batch_norm.prepare()
        return self

    def forward(
        self,
        bag: Bag | Tensor | Sequence[Tensor],
        device: torch.device | None = None,
        ranks: Strategy | None = None,
    ) -> HeadOutput | list[HeadOutput]:
        """Encode patches chunk by chunk and pool each bag.

        The head sees the bags one by one, each with random draws seeded by its own bag, so that dropout
        does not depend on which bags share a batch, a rank or a step. A batch of features goes through
        the head at once, with draws seeded by its first bag.

        Parameters
        ----------
        bag
            The patches of one bag, (N,3,H,W) uint8 or float in 0..1 (features (N,D) for a model
            of features); a list of such tensors, one for each bag; or a batch of bags from a loader.
            Of tensors, coordinates are unknown, and in training mode draws are seeded by PyTorch's
            global generator.
        device
            Where a ``Bag``'s pixels are decoded to; by default that of the parameters. Tensors are moved
            to the device of the parameters.
        ranks
            The other processes, for BatchNorm ``sync`` and for bags that are sharded over ranks, whose head
            runs on every rank alike.

        Returns
        -------
        HeadOutput or list of HeadOutput
            One output for a tensor; for a list or a ``Bag`` a list with one output for each bag, all
            with a batch axis of 1. A ``Bag`` of features gives one output for all of its bags.

        Raises
        ------
        ValueError
            A tensor is not (N,3,H,W) or has no patch.
        ReplayError
            With ``verify``, in the backward: the second pass gave other features.
        """
        if isinstance(bag, Bag):
            return self._forward_bag(bag, device or self._device(), ranks)
        if isinstance(bag, Tensor):
            return self._forward_patches(bag)
        return [self._forward_patches(patches) for patches in bag]

    def after_step(self, strategy: Strategy, good: Tensor) -> None:
        """Update what no gradient updates: running statistics, teachers, and state of head and regularisers.

        Parameters
        ----------
        strategy
            That of the training, set up with this model.
        good
            0-d bool on the device, as from :meth:`e2e.parallel.base.Strategy.step`: False where the step
            was skipped and nothing may change.
        """
        self.batch_norm.commit(strategy.all_reduce_sum, good)
        for teacher, student in self.head.teachers.items():
            strategy.average_into(
                self.head.get_submodule(teacher),
                self.head.get_submodule(student),
                self.head.teacher_decay,
                good=good,
            )
        self.head.after_step(good)
        for regulariser in self.regularisers:
            regulariser.after_step(good)  # pyright: ignore[reportCallIssue]

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _forward_patches(self, patches: Tensor) -> HeadOutput:
        """Pool one bag that is a tensor."""
        seed = int(torch.randint(2**62, ())) if self.training else 0
        bag = single_bag(
            patches,
            chunk=self.chunk,
            seed=seed,
            holds_features=self.encoder.input_kind == "features",
        )
        return self._forward_bag(bag, self._device(), None)[0]

    def _forward_bag(
        self, bag: Bag, device: torch.device, ranks: Strategy | None
    ) -> list[HeadOutput]:
        if self.encoder.input_kind == "features":
            return [self._pool_padded(bag, device)]
        features = self._encode_all(bag, device, ranks)
        is_training = self.training and torch.is_grad_enabled()
        num_patches = sum(bag.sizes)
        with self.budget.measure_heads(num_patches, self) if is_training else nullcontext():
            return [self._pool(bag, k, features, device, ranks) for k in range(len(bag))]

    def _pool(
        self, bag: Bag, number: int, features: Tensor, device: torch.device, ranks: Strategy | None
    ) -> HeadOutput:
        bag_features = features[bag.offsets[number] : bag.offsets[number + 1]]
        if bag.shards[number]:
            assert ranks is not None, "a sharded bag needs the other ranks"
            bag_features = ranks.gather_rows(bag_features, list(bag.shards[number]))
        bag_features = bag_features.unsqueeze(0)
        mask = torch.ones(bag_features.shape[:2], dtype=torch.bool, device=device)
        coords = bag.coords[number]
        if coords is not None:
            coords = coords.to(device).unsqueeze(0)
        with self._draws(bag.seeds[number], device), self.autocast_context(device):
            return self.head(bag_features, mask, coords)

    def _pool_padded(self, bag: Bag, device: torch.device) -> HeadOutput:
        """Pool a batch of bags, each of which is one chunk of features."""
        rows = [bag.pixels(chunk.start, chunk.stop, device) for chunk in bag.chunks]
        features, mask = pad(rows)
        with self._draws(bag.seeds[0], device), self.autocast_context(device):
            return self.head(features, mask, pad_coords(bag.coords, device))

    def _encode_all(self, bag: Bag, device: torch.device, ranks: Strategy | None) -> Tensor:
        """Return the (n,dim) features of this rank's patches, at least float32."""
        if not self.training or not self.train_encoder:
            context = self.batch_norm.evaluating()
            with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
                return torch.cat([self._encode(bag, c, context, device)() for c in bag.chunks])
        context = self.batch_norm.training(None if ranks is None else ranks.differentiable_sum)
        first_kept = self.budget.first_kept([c.stop - c.start for c in bag.chunks], self, device)
        return torch.cat(
            [
                self._encode_in_training(bag, k, context, device, recompute=k < first_kept)
                for k in range(len(bag.chunks))
            ]
        )

    def _encode_in_training(
        self,
        bag: Bag,
        number: int,
        chunk_context: ChunkContext,
        device: torch.device,
        *,
        recompute: bool,
    ) -> Tensor:
        chunk = bag.chunks[number]
        encode = self._encode(bag, chunk, chunk_context, device, recompute=recompute)
        if recompute:
            features = checkpoint(
                encode,
                use_reentrant=False,
                preserve_rng_state=False,  # all draws are seeded inside
                early_stop=not self.verify,  # the comparison is at the end of the second pass
            )
            assert isinstance(features, Tensor)
            return features
        if number == len(bag.chunks) - 1:
            with self.budget.measure_chunk(chunk.stop - chunk.start, self):
                return encode()
        return encode()

    def _encode(
        self,
        bag: Bag,
        chunk: Chunk,
        chunk_context: ChunkContext,
        device: torch.device,
        *,
        recompute: bool = False,
    ) -> Callable[[], Tensor]:
        """Return the function that encodes the chunk.

        With ``recompute``, checkpointing calls it a second time, in the backward.
        """
        num_rows = chunk.stop - chunk.start if chunk.counts else 0
        first_features: Tensor | None = None
        is_second_pass = False

        def encode() -> Tensor:
            nonlocal first_features, is_second_pass
            will_be_reread = recompute and not is_second_pass
            pixels = bag.pixels(chunk.start, chunk.stop, device, will_be_reread=will_be_reread)
            with (
                self._draws(chunk.seed, device),
                self.autocast_context(device),
                chunk_context(num_rows, is_second_pass),
            ):
                features = self._features(pixels, recompute=recompute)
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if self.verify and first_features is not None:
                _check_replay(first_features, features, bag, chunk)
            elif self.verify:
                first_features = features.detach()
            is_second_pass = True
            return features

        return encode

    def _features(self, pixels: Tensor, *, recompute: bool) -> Tensor:
        if self._compiled is None:
            return self.encoder(pixels)
        missing = self.chunk - len(pixels)
        padded = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        if self._cuda_graphed is None or not recompute:
            return self._compiled(padded)[: len(pixels)]
        # The next replay overwrites the features (so they are copied) and the gradients: these are
        # added at once to those of the last chunk, whose graph is always kept and never replayed.
        torch.compiler.cudagraph_mark_step_begin()
        return self._cuda_graphed(padded)[: len(pixels)].clone()

    def autocast_context(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of every forward on ``device``: that of the run's precision."""
        if self.autocast is None:
            return nullcontext()
        # Without the cache, because it keeps one low-precision copy of each weight in which the
        # gradients of all chunks would be summed.
        return torch.autocast(device.type, self.autocast, cache_enabled=False)

    def _draws(self, seed: int, device: torch.device) -> AbstractContextManager[None]:
        """Make dropout and the like draw the same in both passes, on any rank and after a resume."""
        return seeded(seed, device) if self.training else nullcontext()


class TensorPixels(PixelSource):
    """The pixel source of a bag whose patches are a tensor in memory.

    Parameters
    ----------
    patches
        (n,3,H,W) pixels, or (n,D) features.
    """

    def __init__(self, patches: Tensor) -> None:
        self.patches = patches

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        """Return the rows from ``start`` to ``stop`` on ``device``."""
        return self.patches[start:stop].to(device)


def single_bag(patches: Tensor, *, chunk: int, seed: int, holds_features: bool = False) -> Bag:
    """Make a batch of one bag out of a tensor, without coordinates, target or name.

    Parameters
    ----------
    patches
        (N,3,H,W) pixels, or (N,D) features.
    chunk
        Largest number of patches in a chunk.
    seed
        What the bag and its chunks draw comes from it.
    holds_features
        Whether ``patches`` are features.

    Raises
    ------
    ValueError
        The shape is another one, or there is no patch.
    """
    wrong_shape = patches.ndim != (2 if holds_features else 4)
    if wrong_shape or not len(patches) or not (holds_features or patches.shape[1] == 3):
        expected = "(N,D) features" if holds_features else "(N,3,H,W) patches"
        raise ValueError(
            f"expected {expected} with N of at least 1, got shape {tuple(patches.shape)}"
        )
    cuts = [(0, len(patches))] if holds_features else balanced_cuts(len(patches), chunk)
    return Bag(
        offsets=(0, len(patches)),
        chunks=tuple(Chunk(start, stop, seed + start, True) for start, stop in cuts),
        coords=(None,),
        pixels=TensorPixels(patches),
        target=torch.zeros(1),
        slides=("patches",),
        seeds=(seed,),
        weight=torch.ones(1),
        shards=((),),
    )


_PADDED = Slabs()


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack the rows of bags of different sizes.

    Parameters
    ----------
    rows
        B tensors (n,D).

    Returns
    -------
    padded
        (B,N,D) with zeros behind the n rows; half precision becomes float32.
    mask
        (B,N) bool, True for real rows.
    """
    longest = max(map(len, rows))
    dtype = rows[0].dtype
    if dtype.is_floating_point:
        dtype = torch.promote_types(dtype, torch.float32)
    shape = (len(rows), longest, rows[0].shape[1])
    if rows[0].device.type == "cpu":
        padded = _PADDED.take(shape, dtype)
    else:
        padded = rows[0].new_empty(shape, dtype=dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=padded.device)
    for bag_rows, bag_mask, bag_padded in zip(rows, mask, padded, strict=True):
        bag_padded[: len(bag_rows)] = bag_rows
        bag_padded[len(bag_rows) :] = 0
        bag_mask[: len(bag_rows)] = True
    return padded, mask


def pad_coords(coords: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Stack the coordinates of bags of different sizes.

    Parameters
    ----------
    coords
        B tensors (n,2), or None where a bag's coordinates are unknown.
    device
        Where the result lies.

    Returns
    -------
    Tensor or None
        (B,N,2) with zeros behind the n rows; None if those of any bag are unknown.
    """
    with_coords = [bag_coords.to(device) for bag_coords in coords if bag_coords is not None]
    return pad(with_coords)[0] if len(with_coords) == len(coords) else None


def _check_replay(first: Tensor, second: Tensor, bag: Bag, chunk: Chunk) -> None:
    if not first.isfinite().all():
        return  # the step is skipped for that
    scale = first.abs().amax().clamp_min(1e-12)
    tolerance = 1e-3 if first.dtype == torch.float32 else 1e-9
    difference = float((first - second.detach()).abs().amax() / scale)
    if not difference <= tolerance:
        raise ReplayError(
            f"the second pass over rows {chunk.start} to {chunk.stop} of {', '.join(bag.slides)} gave "
            f"different features (relative difference {difference:.2g}): pixels, dropout or BatchNorm do "
            "not repeat"
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random draws inside the block; the generators are restored after it.

    Parameters
    ----------
    seed
        For the CPU's generator and that of ``device``.
    device
        Where the draws are made.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
