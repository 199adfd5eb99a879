"""What BatchNorm does when a bag is encoded in chunks: the three policies, and folding.

``frozen``: running statistics, never changed; folded into the convolutions where that is exact.
``chunk``: in training each chunk is normalised by its own statistics; the running ones are moved once a
step by the pooled moments of all chunks on all ranks. ``sync``: the statistics of all patches of a step on
all ranks; each rank must encode its patches in one piece, because statistics over a whole bag
cannot be had in the memory of a chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from e2e.errors import UserError

ChunkContext = Callable[[int, bool], AbstractContextManager[None]]
"""``around(rows, again)``: the context to encode a chunk in. ``rows`` is its weight in the
statistics, ``again`` says that it is the second pass over it."""
AllReduce = Callable[[Tensor], Tensor]
"""Sum over ranks, differentiable."""


class FrozenBatchNorm:
    """Running statistics as they are; also how every policy evaluates.

    Args:
        fold: put the scale and shift of a BatchNorm into the convolution before it, once a step
            and in its dtype. Gradients reach the convolution and the BatchNorm through that product,
            so they are those of the unfolded network up to rounding.
    """

    name = "frozen"
    one_piece = False
    """Whether a rank must encode all its patches of a step in one chunk."""

    def __init__(self, encoder: nn.Module, *, fold: bool = True) -> None:
        self.encoder = encoder
        self.fold = fold
        self.modules = [
            module
            for module in encoder.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        self._pairs: list[tuple[nn.Module, _BatchNorm]] | None = None

    def prepare(self) -> None:
        """After the model went into training mode: set the BatchNorms' own mode."""
        for module in self.modules:
            module.eval()

    def training(self, total: AllReduce | None) -> ChunkContext:
        """Once a training step. ``total`` is needed by ``sync`` alone."""
        return self.evaluating()

    def evaluating(self) -> ChunkContext:
        """Once a batch of evaluation."""
        if not self.fold or not self.modules:
            return _plain
        if self._pairs is None:
            self._pairs = foldable_pairs(self.encoder)
        folded = [(conv, norm, *fold_into(conv, norm)) for conv, norm in self._pairs]

        def around(rows: int, again: bool) -> AbstractContextManager[None]:
            return _folded(folded)

        return around

    def commit(self, total: Callable[[Tensor], None], good: Tensor) -> None:
        """After a step, which was ``good`` (0-d bool) or skipped; ``total`` sums over ranks in place."""


class ChunkBatchNorm(FrozenBatchNorm):
    """Statistics of each chunk, merged into the running ones once a step.

    While a chunk is encoded, the running statistics are swapped for scratch buffers which a
    momentum of 1 makes equal to the chunk's own. The second pass over the chunk swaps too, so it
    cannot touch the running ones either. A BatchNorm that a frozen part of the encoder holds in
    eval mode is left alone.
    """

    name = "chunk"

    def __init__(self, encoder: nn.Module, *, fold: bool = True) -> None:
        super().__init__(encoder, fold=fold)
        self._sums: list[Tensor] = []
        self._rows = 0.0

    def prepare(self) -> None:
        """See the base class: the encoder's own mode stands."""

    def training(self, total: AllReduce | None) -> ChunkContext:
        """See the base class."""
        return lambda rows, again: self._collect(0 if again else rows)

    @property
    def _live(self) -> list[_BatchNorm]:
        return [module for module in self.modules if module.training]

    @contextmanager
    def _collect(self, rows: int) -> Iterator[None]:
        modules = self._live
        momenta = [module.momentum for module in modules]
        running = [_running(module) for module in modules]
        for module, buffers in zip(modules, running, strict=True):
            module.momentum = 1.0
            _set_running(module, [torch.zeros_like(buffer) for buffer in buffers])
        try:
            yield
            if rows:
                seen = [_running(module) for module in modules]
                self._add(rows, [(mean.double(), var.double()) for mean, var, _ in seen])
        finally:
            for module, momentum, buffers in zip(modules, momenta, running, strict=True):
                module.momentum = momentum
                _set_running(module, buffers)

    def _add(self, rows: int, moments: list[tuple[Tensor, Tensor]]) -> None:
        flat = [part * rows for mean, var in moments for part in (mean, var + mean * mean)]
        if self._sums:
            torch._foreach_add_(self._sums, flat)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self._sums = flat
        self._rows += rows

    @torch.no_grad()
    def commit(self, total: Callable[[Tensor], None], good: Tensor) -> None:
        """Move the running statistics by the pooled moments of all chunks on all ranks."""
        modules = self._live
        if not modules:
            return
        shapes = [buffer for module in modules for buffer in _running(module)[:2]]
        sums = self._sums or [torch.zeros_like(shape, dtype=torch.float64) for shape in shapes]
        flat = torch.cat([*sums, sums[0].new_tensor([self._rows])])
        total(flat)
        self._sums, self._rows = [], 0.0
        good = good & (flat[-1] > 0)
        moments = iter((flat[:-1] / flat[-1]).split([len(shape) for shape in shapes]))
        for module in modules:
            mean, square = next(moments), next(moments)
            running_mean, running_var, count = _running(module)
            # Without a momentum PyTorch takes the mean over all steps.
            momentum = module.momentum
            if momentum is None:
                momentum = 1 / (count + 1).to(running_mean.dtype)
            for old, new in ((running_mean, mean), (running_var, square - mean**2)):
                moved = old.lerp(new.to(old.dtype), momentum)
                old.copy_(torch.where(good, moved, old))
            count += good


class SyncBatchNorm(ChunkBatchNorm):
    """Statistics of all patches of a step, over all ranks; each rank encodes one piece."""

    name = "sync"
    one_piece = True

    def training(self, total: AllReduce | None) -> ChunkContext:
        """See the base class."""

        def around(rows: int, again: bool) -> AbstractContextManager[None]:
            return self._over_ranks(rows, total or (lambda tensor: tensor))

        return around

    @contextmanager
    def _over_ranks(self, rows: int, total: AllReduce) -> Iterator[None]:
        modules = self._live
        seen: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
        for module in modules:
            vars(module)["forward"] = partial(
                _normalise_over_ranks, module, bool(rows), total, seen
            )
        try:
            yield
            if rows:
                self._add(rows, [seen[module] for module in modules])
        finally:
            for module in modules:
                del vars(module)["forward"]


POLICIES: Mapping[str, type[FrozenBatchNorm]] = {
    policy.name: policy for policy in (FrozenBatchNorm, ChunkBatchNorm, SyncBatchNorm)
}


def foldable_pairs(encoder: nn.Module) -> list[tuple[nn.Module, _BatchNorm]]:
    """The convolutions whose output goes to a BatchNorm and nowhere else, with that BatchNorm.

    Found by watching a copy at work, and believed only when the copy, folded, gives the same
    features in float64 with random statistics. Otherwise none.
    """
    probe = copy.deepcopy(encoder).to("cpu", torch.float64).eval()
    names = {module: name for name, module in probe.named_modules()}
    generator = torch.Generator().manual_seed(0)
    for module in names:
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
    images = torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    pairs = _watch(probe, images)
    if not pairs:
        return []
    with torch.no_grad():
        plain = probe(images)
        with _folded([(conv, norm, *fold_into(conv, norm)) for conv, norm in pairs]):
            folded = probe(images)
    if not torch.allclose(plain, folded, rtol=1e-9, atol=1e-12):
        return []
    real = dict(encoder.named_modules())
    found = [(real[names[conv]], real[names[norm]]) for conv, norm in pairs]
    return [(conv, norm) for conv, norm in found if isinstance(norm, _BatchNorm)]


def fold_into(conv: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what ``conv`` and ``norm`` (eval) do together."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    shift = -norm.running_mean if not isinstance(bias, Tensor) else bias - norm.running_mean
    return weight * scale.view(-1, 1, 1, 1), torch.addcmul(norm.bias, shift, scale)


@torch.no_grad()
def _watch(encoder: nn.Module, images: Tensor) -> list[tuple[nn.Module, _BatchNorm]]:
    """Pairs in which the BatchNorm gets the very tensor that the convolution made."""
    made: dict[int, nn.Module] = {}
    alive: list[Tensor] = []
    pairs: list[tuple[nn.Module, _BatchNorm]] = []

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output)] = module
        alive.append(output)  # so that no other tensor gets its id

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        conv = made.get(id(inputs[0]))
        if conv is not None and isinstance(module, _BatchNorm):
            pairs.append((conv, module))

    hooks = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, _BatchNorm) and module.track_running_stats and module.affine:
            hooks.append(module.register_forward_pre_hook(before))
    try:
        encoder(images)
    except (RuntimeError, AssertionError, ValueError, UserError):
        # An encoder that wants images of another size stays as it is.
        return []
    finally:
        for hook in hooks:
            hook.remove()
    convs, norms = [c for c, _ in pairs], [n for _, n in pairs]
    return [(c, n) for c, n in pairs if convs.count(c) == 1 and norms.count(n) == 1]


@contextmanager
def _folded(folded: list[tuple[nn.Module, _BatchNorm, Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the convolutions have the given weights and biases and the BatchNorms pass on."""
    own = [dict(conv._parameters) for conv, *_ in folded]
    for conv, norm, weight, bias in folded:
        conv._parameters.update(weight=weight, bias=bias)  # pyright: ignore[reportArgumentType]
        vars(norm)["forward"] = partial(_rest, norm)
    try:
        yield
    finally:
        for (conv, norm, *_), parameters in zip(folded, own, strict=True):
            conv._parameters.update(parameters)
            del vars(norm)["forward"]


def _plain(rows: int, again: bool) -> AbstractContextManager[None]:
    return nullcontext()


def _rest(module: _BatchNorm, x: Tensor) -> Tensor:
    """What a BatchNorm does after normalising: nothing, or timm's dropout and activation."""
    for name in ("drop", "act"):
        step = getattr(module, name, None)
        x = x if step is None else step(x)
    return x


def _normalise_over_ranks(
    module: _BatchNorm,
    counts: bool,
    total: AllReduce,
    seen: dict[_BatchNorm, tuple[Tensor, Tensor]],
    x: Tensor,
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = float(x.numel() // x.shape[1]) if counts else 0.0
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    # About the running mean: squares of large means would leave nothing of the variance.
    near, _, _ = _running(module)
    away = wide - near.view(shape)
    sums = torch.cat([away.sum(dims), away.square().sum(dims)]) * float(counts)
    totals = total(torch.cat([sums, sums.new_tensor([size])]))
    shift, square = (totals[:-1] / totals[-1]).chunk(2)
    variance = (square - shift**2).clamp_min(0)
    mean = shift + near
    # As in PyTorch: the running variance is the unbiased one.
    unbiased = variance.detach() * totals[-1].detach() / (totals[-1].detach() - 1).clamp_min(1)
    seen[module] = mean.detach().double(), unbiased.double()
    scale = torch.rsqrt(variance + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    y = (wide - mean.view(shape)) * scale.view(shape)
    if module.bias is not None:
        y = y + module.bias.view(shape)
    return _rest(module, y.to(x.dtype))


def _running(module: _BatchNorm) -> list[Tensor]:
    """Running mean, running variance and count of batches."""
    buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
    return [buffer for buffer in buffers if buffer is not None]


def _set_running(module: _BatchNorm, buffers: list[Tensor]) -> None:
    module.running_mean, module.running_var, module.num_batches_tracked = buffers
