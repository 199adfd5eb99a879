"""An estimate of the peak memory of training, from what autograd saves for a few patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from e2e.engine.graph_budget import saved_bytes
from e2e.engine.model import MILModel

HEAD_PATCHES, ENCODER_PATCHES = 512, 2
"""Numbers of patches that are tried, and then twice as many: the difference is what a patch takes."""
HEAD_BACKWARD, ENCODER_BACKWARD = 2.0, 1.2
"""What the backward needs over what the forward saved. A head's gradients are as large as what it saved; an
encoder's layers free theirs one by one (measured: 1.0 for resnet50, 1.2 for resnet18)."""
CHUNKS_OF_PIXELS = 3
"""Chunks whose pixels are in memory at once: one is encoded, two are prefetched."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of a training step in one process, in addition to the program itself."""

    weights: float
    """Weights, gradients, the optimiser's two moments and the moving average."""
    chunk: float
    """Pixels and graph of a chunk of patches."""
    bags: float
    """Features of the patches of an update, and the graph of the head."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.chunk + self.bags


def estimate_peak_memory(
    model: MILModel, *, side: int, patches: int, largest_bag: int, average: bool
) -> PeakMemory:
    """Estimate the peak memory of a training step in which only one chunk keeps its graph.

    More graphs, which ``engine.keep_graphs`` allows, come on top, as far as memory is free. Neither the model
    nor the state of the random generators is changed.

    Parameters
    ----------
    model : MILModel
        On the device of the run, not wrapped by a strategy.
    side : int
        Side of the patches that the encoder sees, in pixels; not used for features.
    patches : int
        Number of patches in an update of this process, padding included.
    largest_bag : int
        Number of patches in its largest bag.
    average : bool
        Whether there is a moving average of the weights.
    """
    parameters = list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    weights = sum(p.nbytes for p in parameters) * (1 + average) + 3 * trained
    width = model.encoder.dim
    per_patch, fixed = _linear_bytes(model, model.head, (width,), HEAD_PATCHES)
    bags = HEAD_BACKWARD * (fixed + patches * per_patch) + 4 * width * patches
    if model.encoder.input_kind == "features":
        return PeakMemory(weights, 0.0, bags)
    num_rows = min(model.chunk, largest_bag)
    per_patch, fixed = _linear_bytes(model, model.encoder, (3, side, side), ENCODER_PATCHES)
    graph = fixed + num_rows * per_patch
    pixels = CHUNKS_OF_PIXELS * num_rows * 3 * side**2
    return PeakMemory(weights, pixels + ENCODER_BACKWARD * graph, bags)


def _linear_bytes(
    model: MILModel, module: nn.Module, shape: tuple[int, ...], count: int
) -> tuple[float, float]:
    """Return what ``module`` saves for the backward for each row of input, and beside that."""
    few, many = (_saved(model, module, shape, rows) for rows in (count, 2 * count))
    slope = max(0.0, (many - few) / count)
    return slope, max(0.0, few - slope * count)


def _saved(model: MILModel, module: nn.Module, shape: tuple[int, ...], rows: int) -> float:
    """Return the bytes that ``module`` saves in a forward of ``rows`` rows."""
    device = next(model.parameters()).device
    inputs = torch.zeros(rows, *shape, device=device)
    if len(shape) == 1:
        inputs = inputs.unsqueeze(0)  # a bag
    # A forward may change buffers, such as running statistics: it gets copies.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    was_training = model.training
    model.train()
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            model.autocast_context(device),
            saved_bytes(module) as sizes,
        ):
            functional_call(module, buffers, (inputs,))
    finally:
        model.train(was_training)
    return float(sum(sizes.values()))
