"""Encoder and head as one module, with the exact chunked forward of the engine.

Bags are encoded in groups that fit a chunk together; a larger bag is cut into chunks. A chunk is
encoded under non-reentrant activation checkpointing: the forward keeps its features alone, the
backward asks the bag for the same pixels and encodes them again with gradients. So the memory is
that of one chunk, however many patches a bag has, and the gradients are those of the whole bag.
The mechanism stands inside one forward of one module, as DDP, FSDP and DeepSpeed need it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from e2e.bag import Bag
from e2e.encoders.base import Encoder
from e2e.heads.base import Head, HeadOutput


class MILModel(nn.Module):
    """Patches of a batch of bags -> one ``HeadOutput`` a bag.

    Args:
        encoder: turns patches into features.
        head: turns a bag of features into outputs.
        chunk: patches encoded at once. Under per-chunk BatchNorm it is part of the model's meaning.
        batch_norm: ``frozen``: the encoder's running statistics are used and never changed.
            ``chunk``: in training each chunk is normalised by its own statistics, and the running
            ones are moved once a step by :meth:`ChunkStatistics.commit`.
        train_encoder: False leaves the encoder as it is, in eval mode and without gradients.
        autocast: dtype of the encoder's and head's matrix products; None for float32.

    Statistics over a whole bag cannot be had in the memory of one chunk: there is no such option.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: Head,
        *,
        chunk: int = 256,
        batch_norm: str = "frozen",
        train_encoder: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.chunk = chunk
        self.batch_norm = batch_norm
        self.train_encoder = train_encoder
        self.autocast = autocast
        self.statistics = ChunkStatistics(encoder)
        if not train_encoder:
            self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> MILModel:
        """As usual, but frozen parts of the encoder stay in eval mode."""
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        elif self.batch_norm == "frozen":
            for module in self.statistics.modules:
                module.eval()
        return self

    def forward(self, bag: Bag, device: torch.device) -> list[HeadOutput]:
        """One output a bag, each with a batch axis of 1.

        The head sees the bags one by one, each with draws seeded by its own bag: so dropout does
        not depend on which bags share a batch, a rank or a step.
        """
        features = self._encode_all(bag, device)
        return [self._pool(bag, number, features, device) for number in range(len(bag))]

    def _pool(self, bag: Bag, number: int, features: Tensor, device: torch.device) -> HeadOutput:
        rows = slice(bag.offsets[number], bag.offsets[number + 1])
        bag_features = features[rows].unsqueeze(0)
        mask = torch.ones(bag_features.shape[:2], dtype=torch.bool, device=device)
        coords = bag.coords[rows].to(device).unsqueeze(0)
        with self._draws(bag.seeds[number], "head", device), self._autocast(device):
            return self.head(bag_features, mask, coords)

    def _encode_all(self, bag: Bag, device: torch.device) -> Tensor:
        """(patches, dim) features of all bags, group by group, chunk by chunk."""
        pieces = []
        for first, last in bag.runs:
            start, stop = bag.offsets[first], bag.offsets[last]
            counts = bool(bag.weight[first] > 0)
            for low, high in balanced_chunks(start, stop, self.chunk):
                draws = bag.seeds[first], f"chunk {low - start}"
                pieces.append(self._encode(bag, low, high, draws, counts, device))
        return torch.cat(pieces)

    def _encode(
        self,
        bag: Bag,
        start: int,
        stop: int,
        draws: tuple[int, str],
        counts: bool,
        device: torch.device,
    ) -> Tensor:
        """(stop - start, dim) features of some rows of one group, at least float32."""

        def encode() -> Tensor:
            pixels = bag.pixels(start, stop, device)
            with self._draws(*draws, device), self._autocast(device):
                features = self.encoder(pixels)
            return features.to(torch.promote_types(features.dtype, torch.float32))

        if not self.training or not self.train_encoder:
            with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
                return encode()
        rows = stop - start if counts else 0
        if start >= bag.num_patches - self.chunk:
            # The last chunk is the first that backward wants: its graph is kept and is freed
            # before any other is made again, so a batch of one chunk is never encoded twice.
            with self._statistics_of(rows):
                return encode()
        features = checkpoint(
            encode,
            use_reentrant=False,
            preserve_rng_state=False,  # all draws are seeded inside
            context_fn=lambda: (self._statistics_of(rows), self._statistics_of(0)),
        )
        assert isinstance(features, Tensor)
        return features

    def _statistics_of(self, rows: int) -> AbstractContextManager[None]:
        return self.statistics.collect(rows) if self.batch_norm == "chunk" else nullcontext()

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        # Without the cache, because it keeps one low-precision copy of each weight in which the
        # gradients of all chunks would be summed.
        return torch.autocast(device.type, self.autocast, cache_enabled=False)

    def _draws(
        self, bag_seed: int, part: str, device: torch.device
    ) -> AbstractContextManager[None]:
        """Dropout and the like draw alike in both passes, on any rank and after a resume."""
        if not self.training:
            return nullcontext()
        return seeded((bag_seed ^ (zlib.crc32(part.encode()) << 31)) & (2**63 - 1), device)


class ChunkStatistics:
    """BatchNorm statistics of every chunk of a step, merged into the running ones once.

    While a chunk is encoded, the running statistics are swapped for scratch buffers which a
    momentum of 1 makes equal to the chunk's own. The second pass over the chunk swaps too, so it
    cannot touch the running ones either.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.modules = [
            module
            for module in encoder.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        self._sums: list[Tensor] = []
        self._rows = 0.0

    @property
    def moving(self) -> list[_BatchNorm]:
        """Those that use statistics of the chunk: not the frozen ones, which stay in eval mode."""
        return [module for module in self.modules if module.training]

    @contextmanager
    def collect(self, rows: int) -> Iterator[None]:
        """Around the encoding of one chunk; ``rows`` is its weight, 0 leaves no trace."""
        modules = self.moving
        momenta = [module.momentum for module in modules]
        running = [_running(module) for module in modules]
        for module, buffers in zip(modules, running, strict=True):
            module.momentum = 1.0
            _set_running(module, [torch.zeros_like(buffer) for buffer in buffers])
        try:
            yield
            if rows:
                self._add(rows)
        finally:
            for module, momentum, buffers in zip(modules, momenta, running, strict=True):
                module.momentum = momentum
                _set_running(module, buffers)

    def _add(self, rows: int) -> None:
        moments = []
        for module in self.moving:
            mean, var, _ = (buffer.double() for buffer in _running(module))
            moments += [rows * mean, rows * (var + mean * mean)]
        if self._sums:
            torch._foreach_add_(self._sums, moments)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self._sums = moments
        self._rows += rows

    @torch.no_grad()
    def commit(self, total: Callable[[Tensor], None]) -> None:
        """Move the running statistics by the pooled moments of all chunks on all ranks.

        Args:
            total: sums a tensor over ranks in place.
        """
        if not self.moving:
            return
        shapes = [buffer for module in self.moving for buffer in _running(module)[:2]]
        sums = self._sums or [torch.zeros_like(shape, dtype=torch.float64) for shape in shapes]
        flat = torch.cat([*sums, sums[0].new_tensor([self._rows])])
        total(flat)
        self._sums, self._rows = [], 0.0
        if flat[-1] == 0:
            return
        moments = iter((flat[:-1] / flat[-1]).split([len(shape) for shape in shapes]))
        for module in self.moving:
            mean, square = next(moments), next(moments)
            running_mean, running_var, count = _running(module)
            momentum = 0.1 if module.momentum is None else module.momentum
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((square - mean**2).to(running_var.dtype), momentum)
            count += 1


def _running(module: _BatchNorm) -> list[Tensor]:
    """Running mean, running variance and count of batches."""
    buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
    return [buffer for buffer in buffers if buffer is not None]


def _set_running(module: _BatchNorm, buffers: list[Tensor]) -> None:
    module.running_mean, module.running_var, module.num_batches_tracked = buffers


def balanced_chunks(start: int, stop: int, chunk: int) -> list[tuple[int, int]]:
    """Cut rows start..stop into the fewest pieces of at most ``chunk``, sizes differing by at most 1.

    A short last piece would be a chunk with other BatchNorm statistics than the rest.
    """
    count = -(-(stop - start) // chunk)
    cuts = [start + (stop - start) * k // count for k in range(count + 1)]
    return list(pairwise(cuts))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws inside come from ``seed``; the generators outside are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
