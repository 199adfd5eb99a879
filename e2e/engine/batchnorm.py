"""How BatchNorm works when a bag is encoded in chunks: three policies, and folding.

``frozen``: running statistics, which never change; folded into the convolutions where that is exact.
``chunk``: in training each chunk is normalised by its own statistics, and the running statistics move once
per step by the pooled moments of all chunks on all ranks. ``sync``: the statistics of all patches of a step
on all ranks; each rank must then encode its patches in a single chunk, because statistics over a full bag
cannot be computed in the memory of one chunk.
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
"""``chunk_context(num_rows, is_second_pass)``: the context to encode a chunk in. ``num_rows`` is the chunk's
weight in the statistics, 0 for a chunk that does not count."""
DifferentiableSum = Callable[[Tensor], Tensor]
"""Returns the sum over ranks, with a gradient."""


class FrozenBatchNorm:
    """Running statistics that never change; also how every policy evaluates.

    Parameters
    ----------
    encoder
        The network whose BatchNorm modules the policy governs.
    fold
        Whether the scale and shift of a BatchNorm are folded into the convolution before it, once per
        step and in its dtype. Gradients reach the convolution and the BatchNorm through that product,
        so they are those of the unfolded network up to rounding.
    """

    name = "frozen"
    """Value of the setting ``engine.batch_norm``."""
    single_chunk = False
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
        """Set the mode of the BatchNorms, after the model went into training mode."""
        for module in self.modules:
            module.eval()

    def training(self, differentiable_sum: DifferentiableSum | None) -> ChunkContext:
        """Return the context for the chunks of one training step.

        Parameters
        ----------
        differentiable_sum
            Sums over ranks, for ``sync``; None for one process.
        """
        return self.evaluating()

    def evaluating(self) -> ChunkContext:
        """Return the context for the chunks of one batch of evaluation."""
        if not self.fold or not self.modules:
            return _no_context
        if self._pairs is None:
            self._pairs = foldable_pairs(self.encoder)
        folded = [(conv, norm, *fold_into(conv, norm)) for conv, norm in self._pairs]

        def chunk_context(num_rows: int, is_second_pass: bool) -> AbstractContextManager[None]:
            return _folded(folded)

        return chunk_context

    def commit(self, all_reduce_sum: Callable[[Tensor], None], good: Tensor) -> None:
        """Update the running statistics after a step.

        Parameters
        ----------
        all_reduce_sum
            Sums a tensor over ranks in place.
        good
            0-d bool: False where the step was skipped and nothing may change.
        """


class ChunkBatchNorm(FrozenBatchNorm):
    """Statistics of each chunk, merged into the running ones once per step.

    While a chunk is encoded, the running statistics are swapped for scratch buffers, which a
    momentum of 1 makes equal to the chunk's own. The second pass over the chunk swaps too, so it
    cannot change the running ones either. A BatchNorm that a frozen part of the encoder holds in
    eval mode is left alone.

    Parameters
    ----------
    encoder
        The network whose BatchNorm modules the policy governs.
    fold
        Whether BatchNorms are folded in evaluation; see :class:`FrozenBatchNorm`.
    """

    name = "chunk"

    def __init__(self, encoder: nn.Module, *, fold: bool = True) -> None:
        super().__init__(encoder, fold=fold)
        self._sums: list[Tensor] = []
        self._num_rows = 0.0

    def prepare(self) -> None:
        """Leave the modules in the encoder's mode."""

    def training(self, differentiable_sum: DifferentiableSum | None) -> ChunkContext:
        """See :meth:`FrozenBatchNorm.training`."""
        return self._collect_statistics

    @property
    def _training_modules(self) -> list[_BatchNorm]:
        return [module for module in self.modules if module.training]

    @contextmanager
    def _collect_statistics(self, num_rows: int, is_second_pass: bool) -> Iterator[None]:
        modules = self._training_modules
        momenta = [module.momentum for module in modules]
        running = [_running_buffers(module) for module in modules]
        for module, buffers in zip(modules, running, strict=True):
            module.momentum = 1.0
            _set_running_buffers(module, [torch.zeros_like(buffer) for buffer in buffers])
        try:
            yield
            if num_rows and not is_second_pass:
                statistics = [_running_buffers(module) for module in modules]
                moments = [(mean.double(), var.double()) for mean, var, _ in statistics]
                self._add_moments(num_rows, moments)
        finally:
            for module, momentum, buffers in zip(modules, momenta, running, strict=True):
                module.momentum = momentum
                _set_running_buffers(module, buffers)

    def _add_moments(self, num_rows: int, moments: list[tuple[Tensor, Tensor]]) -> None:
        flat = [part * num_rows for mean, var in moments for part in (mean, var + mean * mean)]
        if self._sums:
            torch._foreach_add_(self._sums, flat)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self._sums = flat
        self._num_rows += num_rows

    @torch.no_grad()
    def commit(self, all_reduce_sum: Callable[[Tensor], None], good: Tensor) -> None:
        """Move the running statistics by the pooled moments of all chunks on all ranks.

        See :meth:`FrozenBatchNorm.commit`.
        """
        modules = self._training_modules
        if not modules:
            return
        shapes = [buffer for module in modules for buffer in _running_buffers(module)[:2]]
        sums = self._sums or [torch.zeros_like(shape, dtype=torch.float64) for shape in shapes]
        flat = torch.cat([*sums, sums[0].new_tensor([self._num_rows])])
        all_reduce_sum(flat)
        self._sums, self._num_rows = [], 0.0
        good = good & (flat[-1] > 0)
        moments = iter((flat[:-1] / flat[-1]).split([len(shape) for shape in shapes]))
        for module in modules:
            mean, square = next(moments), next(moments)
            running_mean, running_var, count = _running_buffers(module)
            # Without a momentum PyTorch takes the mean over all steps.
            momentum = module.momentum
            if momentum is None:
                momentum = 1 / (count + 1).to(running_mean.dtype)
            for old, new in ((running_mean, mean), (running_var, square - mean**2)):
                moved = old.lerp(new.to(old.dtype), momentum)
                old.copy_(torch.where(good, moved, old))
            count += good


class SyncBatchNorm(ChunkBatchNorm):
    """Statistics of all patches of a step, over all ranks; each rank encodes a single chunk.

    Parameters
    ----------
    encoder
        The network whose BatchNorm modules the policy governs.
    fold
        Whether BatchNorms are folded in evaluation; see :class:`FrozenBatchNorm`.
    """

    name = "sync"
    single_chunk = True

    def training(self, differentiable_sum: DifferentiableSum | None) -> ChunkContext:
        """See :meth:`FrozenBatchNorm.training`."""
        return partial(self._normalise_over_ranks, differentiable_sum or _same_tensor)

    @contextmanager
    def _normalise_over_ranks(
        self, differentiable_sum: DifferentiableSum, num_rows: int, is_second_pass: bool
    ) -> Iterator[None]:
        modules = self._training_modules
        moments: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
        for module in modules:
            vars(module)["forward"] = partial(
                _forward_over_ranks, module, bool(num_rows), differentiable_sum, moments
            )
        try:
            yield
            if num_rows:
                self._add_moments(num_rows, [moments[module] for module in modules])
        finally:
            for module in modules:
                del vars(module)["forward"]


POLICIES: Mapping[str, type[FrozenBatchNorm]] = {
    policy.name: policy for policy in (FrozenBatchNorm, ChunkBatchNorm, SyncBatchNorm)
}
"""Value of ``engine.batch_norm`` -> its class."""


def foldable_pairs(encoder: nn.Module) -> list[tuple[nn.Module, _BatchNorm]]:
    """Return the convolutions whose output goes to a BatchNorm and nowhere else, with that BatchNorm.

    They are found by running a copy of the encoder on two images, and accepted only if the folded
    copy gives the same features in float64 with random statistics.

    Parameters
    ----------
    encoder
        Left unchanged.

    Returns
    -------
    list of (convolution, BatchNorm)
        Modules of ``encoder``; empty where folding would not be exact.
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
    pairs = _trace_pairs(probe, images)
    if not pairs:
        return []
    with torch.no_grad():
        plain = probe(images)
        with _folded([(conv, norm, *fold_into(conv, norm)) for conv, norm in pairs]):
            folded = probe(images)
    if not torch.allclose(plain, folded, rtol=1e-9, atol=1e-12):
        return []
    modules = dict(encoder.named_modules())
    originals = [(modules[names[conv]], modules[names[norm]]) for conv, norm in pairs]
    return [(conv, norm) for conv, norm in originals if isinstance(norm, _BatchNorm)]


def fold_into(conv: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that equals ``conv`` followed by ``norm`` in eval mode.

    Parameters
    ----------
    conv
        A 2-D convolution, with or without a bias.
    norm
        A BatchNorm with running statistics, weight and bias.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    shift = -norm.running_mean if not isinstance(bias, Tensor) else bias - norm.running_mean
    return weight * scale.view(-1, 1, 1, 1), torch.addcmul(norm.bias, shift, scale)


@torch.no_grad()
def _trace_pairs(encoder: nn.Module, images: Tensor) -> list[tuple[nn.Module, _BatchNorm]]:
    """Return pairs in which the BatchNorm gets the very tensor that the convolution returned."""
    conv_of_output: dict[int, nn.Module] = {}
    outputs: list[Tensor] = []
    pairs: list[tuple[nn.Module, _BatchNorm]] = []

    def after_conv(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        conv_of_output[id(output)] = module
        outputs.append(output)  # stays alive, so that no other tensor gets its id

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        conv = conv_of_output.get(id(inputs[0]))
        if conv is not None and isinstance(module, _BatchNorm):
            pairs.append((conv, module))

    hooks = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, _BatchNorm) and module.track_running_stats and module.affine:
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        encoder(images)
    except (RuntimeError, AssertionError, ValueError, UserError):
        # An encoder that needs images of another size is not folded.
        return []
    finally:
        for hook in hooks:
            hook.remove()
    convs, norms = [c for c, _ in pairs], [n for _, n in pairs]
    return [(c, n) for c, n in pairs if convs.count(c) == 1 and norms.count(n) == 1]


@contextmanager
def _folded(folded: list[tuple[nn.Module, _BatchNorm, Tensor, Tensor]]) -> Iterator[None]:
    """Use the folded weights and biases in the convolutions, and skip the BatchNorms, inside the block."""
    saved = [dict(conv._parameters) for conv, *_ in folded]
    for conv, norm, weight, bias in folded:
        conv._parameters.update(weight=weight, bias=bias)  # pyright: ignore[reportArgumentType]
        vars(norm)["forward"] = partial(_after_normalising, norm)
    try:
        yield
    finally:
        for (conv, norm, *_), parameters in zip(folded, saved, strict=True):
            conv._parameters.update(parameters)
            del vars(norm)["forward"]


def _no_context(num_rows: int, is_second_pass: bool) -> AbstractContextManager[None]:
    return nullcontext()


def _same_tensor(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor


def _after_normalising(module: _BatchNorm, x: Tensor) -> Tensor:
    """What a BatchNorm does after normalising: nothing, or timm's dropout and activation."""
    for name in ("drop", "act"):
        step = getattr(module, name, None)
        x = x if step is None else step(x)
    return x


def _forward_over_ranks(
    module: _BatchNorm,
    counts: bool,
    differentiable_sum: DifferentiableSum,
    moments: dict[_BatchNorm, tuple[Tensor, Tensor]],
    x: Tensor,
) -> Tensor:
    """Normalise ``x`` by the statistics of all ranks, and store them in ``moments``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = float(x.numel() // x.shape[1]) if counts else 0.0
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    # About the running mean: squares of large means would cancel out the variance.
    center, _, _ = _running_buffers(module)
    centered = wide - center.view(shape)
    sums = torch.cat([centered.sum(dims), centered.square().sum(dims)]) * float(counts)
    totals = differentiable_sum(torch.cat([sums, sums.new_tensor([size])]))
    shift, square = (totals[:-1] / totals[-1]).chunk(2)
    variance = (square - shift**2).clamp_min(0)
    mean = shift + center
    # As in PyTorch: the running variance is the unbiased one.
    unbiased = variance.detach() * totals[-1].detach() / (totals[-1].detach() - 1).clamp_min(1)
    moments[module] = mean.detach().double(), unbiased.double()
    scale = torch.rsqrt(variance + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    y = (wide - mean.view(shape)) * scale.view(shape)
    if module.bias is not None:
        y = y + module.bias.view(shape)
    return _after_normalising(module, y.to(x.dtype))


def _running_buffers(module: _BatchNorm) -> list[Tensor]:
    """Running mean, running variance and count of batches."""
    buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
    return [buffer for buffer in buffers if buffer is not None]


def _set_running_buffers(module: _BatchNorm, buffers: list[Tensor]) -> None:
    module.running_mean, module.running_var, module.num_batches_tracked = buffers
