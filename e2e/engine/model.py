"""Encoder and head as one module, with the exact chunked forward of the engine.

A batch is cut into chunks. A chunk is encoded under non-reentrant activation checkpointing: the
forward keeps its features alone, the backward asks the bag for the same pixels and encodes them again
with gradients. So the memory is that of one chunk, however many patches a bag has, and the gradients
are those of the whole bag. Chunks whose graphs the memory budget holds are encoded once. The mechanism
stands inside one forward of one module, so that DDP, FSDP and DeepSpeed reduce once a step.

Where the bags hold features (:attr:`e2e.encoders.base.Encoder.input_kind`), only the head is left, which sees
all bags of a batch at once, padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e2e.bags.bag import Bag, Chunk
from e2e.encoders.base import Encoder
from e2e.engine.batchnorm import POLICIES, ChunkContext
from e2e.engine.graph_budget import GraphBudget
from e2e.heads.base import Head, HeadOutput
from e2e.losses.base import Regulariser
from e2e.memory import Slabs


class Ranks(Protocol):
    """What the forward needs of the other processes."""

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks in rank order, with a gradient for the own ones."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, differentiable."""
        ...


class ReplayError(RuntimeError):
    """The second pass over a chunk gave other features than the first."""


class MILModel(nn.Module):
    """Patches of a batch of bags -> one ``HeadOutput`` a bag; one for all of them if they hold features.

    Args:
        encoder: turns patches into features.
        head: turns a bag of features into outputs.
        chunk: most patches encoded at once.
        batch_norm: ``frozen``, ``chunk`` or ``sync``; see :mod:`e2e.engine.batchnorm`.
        fold: put frozen BatchNorms into their convolutions.
        train_encoder: False leaves the encoder as it is, in eval mode and without gradients.
        autocast: dtype of the encoder's and head's matrix products; None for float32.
        keep_graphs: memory for graphs that need no second pass; see :class:`GraphBudget`.
        verify: compare the features of both passes, ReplayError where they differ.
        regularisers: extra losses; they are here because their state is saved with the weights.
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
        self._replayed: Callable[[Tensor], Tensor] | None = None
        if not train_encoder:
            encoder.requires_grad_(False)

    def compile(self, *, cuda_graphs: bool = False) -> None:  # type: ignore[override]
        """Compile the encoder for one shape: every chunk is padded to ``chunk`` patches.

        Rows must not depend on each other, so BatchNorm has to be frozen. With ``cuda_graphs`` the
        chunks that are encoded twice are replayed from recorded CUDA graphs.
        """
        self._compiled = torch.compile(self.encoder.forward, dynamic=False)
        if cuda_graphs:
            self._replayed = torch.compile(
                self.encoder.forward, dynamic=False, mode="reduce-overhead"
            )

    def train(self, mode: bool = True) -> MILModel:
        """As usual, but frozen parts of the encoder stay in eval mode."""
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        elif mode:
            self.batch_norm.prepare()
        return self

    def forward(
        self, bag: Bag, device: torch.device, ranks: Ranks | None = None
    ) -> list[HeadOutput]:
        """One output a bag, each with a batch axis of 1; or one output with all bags of features.

        The head sees the bags one by one, each with draws seeded by its own bag: so dropout does
        not depend on which bags share a batch, a rank or a step. ``ranks`` is needed for bags that
        are sharded over them, whose head runs on every rank alike. Of features, the draws are seeded
        by the first bag of the batch.
        """
        if self.encoder.input_kind == "features":
            return [self._pool_padded(bag, device)]
        features = self._encode_all(bag, device, ranks)
        measured = self.training and torch.is_grad_enabled()
        rows = sum(bag.sizes)
        with self.budget.measure_heads(rows, self) if measured else nullcontext():
            return [self._pool(bag, k, features, device, ranks) for k in range(len(bag))]

    def _pool(
        self, bag: Bag, number: int, features: Tensor, device: torch.device, ranks: Ranks | None
    ) -> HeadOutput:
        own = features[bag.offsets[number] : bag.offsets[number + 1]]
        if bag.shards[number]:
            assert ranks is not None, "a sharded bag needs the other ranks"
            own = ranks.gather_rows(own, bag.shards[number])
        whole = own.unsqueeze(0)
        mask = torch.ones(whole.shape[:2], dtype=torch.bool, device=device)
        places = bag.coords[number]
        coords = None if places is None else places.to(device).unsqueeze(0)
        with self._draws(bag.seeds[number], device), self._autocast(device):
            return self.head(whole, mask, coords)

    def _pool_padded(self, bag: Bag, device: torch.device) -> HeadOutput:
        """The head over a batch of bags, each of which is one chunk of features."""
        rows = [bag.pixels(chunk.start, chunk.stop, device) for chunk in bag.chunks]
        features, mask = pad(rows)
        with self._draws(bag.seeds[0], device), self._autocast(device):
            return self.head(features, mask, pad_coords(bag.coords, device))

    def _encode_all(self, bag: Bag, device: torch.device, ranks: Ranks | None) -> Tensor:
        """(rows, dim) features of this rank's patches, at least float32."""
        if not self.training or not self.train_encoder:
            around = self.batch_norm.evaluating()
            with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
                return torch.cat([self._encode(bag, c, around, device)() for c in bag.chunks])
        around = self.batch_norm.training(None if ranks is None else ranks.total)
        kept = self.budget.first_kept([c.stop - c.start for c in bag.chunks], self, device)
        return torch.cat(
            [
                self._encode_in_training(bag, k, around, device, keep=k >= kept)
                for k in range(len(bag.chunks))
            ]
        )

    def _encode_in_training(
        self, bag: Bag, number: int, around: ChunkContext, device: torch.device, *, keep: bool
    ) -> Tensor:
        chunk = bag.chunks[number]
        encode = self._encode(bag, chunk, around, device, twice=not keep)
        if not keep:
            features = checkpoint(
                encode,
                use_reentrant=False,
                preserve_rng_state=False,  # all draws are seeded inside
                early_stop=not self.verify,  # the comparison stands at the end of the second pass
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
        around: ChunkContext,
        device: torch.device,
        *,
        twice: bool = False,
    ) -> Callable[[], Tensor]:
        """A function that encodes the chunk; from its second call on, as the second pass.

        ``twice`` says that there will be one.
        """
        rows = chunk.stop - chunk.start if chunk.counts else 0
        passes = 0
        first: Tensor | None = None

        def encode() -> Tensor:
            nonlocal passes, first
            passes += 1
            again = twice and passes == 1
            pixels = bag.pixels(chunk.start, chunk.stop, device, again=again)
            with (
                self._draws(chunk.seed, device),
                self._autocast(device),
                around(rows, passes > 1),
            ):
                features = self._features(pixels, twice=twice)
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if self.verify and passes > 1:
                _compare(first, features, bag, chunk)
            elif self.verify:
                first = features.detach()
            return features

        return encode

    def _features(self, pixels: Tensor, *, twice: bool) -> Tensor:
        if self._compiled is None:
            return self.encoder(pixels)
        missing = self.chunk - len(pixels)
        padded = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        if self._replayed is None or not twice:
            return self._compiled(padded)[: len(pixels)]
        # The next replay writes over the features (so they are copied) and over the gradients: these are
        # added at once to those of the last chunk, whose graph is always kept and never replayed.
        torch.compiler.cudagraph_mark_step_begin()
        return self._replayed(padded)[: len(pixels)].clone()

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        # Without the cache, because it keeps one low-precision copy of each weight in which the
        # gradients of all chunks would be summed.
        return torch.autocast(device.type, self.autocast, cache_enabled=False)

    def _draws(self, seed: int, device: torch.device) -> AbstractContextManager[None]:
        """Dropout and the like draw alike in both passes, on any rank and after a resume."""
        return seeded(seed, device) if self.training else nullcontext()


_PADDED = Slabs()


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """B times (n,D) -> (B,N,D), 0 behind the n rows, and the mask (B,N); half precision becomes float32."""
    longest = max(map(len, rows))
    wide = rows[0].dtype
    if wide.is_floating_point:
        wide = torch.promote_types(wide, torch.float32)
    shape = (len(rows), longest, rows[0].shape[1])
    if rows[0].device.type == "cpu":
        padded = _PADDED.take(shape, wide)
    else:
        padded = rows[0].new_empty(shape, dtype=wide)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=padded.device)
    for own, real, whole in zip(rows, mask, padded, strict=True):
        whole[: len(own)] = own
        whole[len(own) :] = 0
        real[: len(own)] = True
    return padded, mask


def pad_coords(coords: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """B times (n,2) -> (B,N,2) on ``device``, 0 behind the n rows; None where a bag's are unknown."""
    known = [places.to(device) for places in coords if places is not None]
    return pad(known)[0] if len(known) == len(coords) else None


def _compare(first: Tensor | None, second: Tensor, bag: Bag, chunk: Chunk) -> None:
    assert first is not None
    if not first.isfinite().all():
        return  # the step is skipped for that
    scale = first.abs().amax().clamp_min(1e-12)
    tolerance = 1e-3 if first.dtype == torch.float32 else 1e-9
    apart = float((first - second.detach()).abs().amax() / scale)
    if not apart <= tolerance:
        raise ReplayError(
            f"the second pass over rows {chunk.start} to {chunk.stop} of {', '.join(bag.slides)} gave other "
            f"features (relative difference {apart:.2g}): pixels, dropout or BatchNorm do not replay"
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws inside come from ``seed``; the generators outside are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
