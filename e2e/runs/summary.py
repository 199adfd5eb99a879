"""What is about to run, in a few lines: data, patches, model, training and its peak memory."""

from __future__ import annotations

import math

import torch
from torch import nn

from e2e.cohort.describe import describe_splits
from e2e.engine.peak_memory import estimate_peak_memory
from e2e.memory import free_memory
from e2e.parallel import Strategy
from e2e.runs.parts import PROTOCOLS, Parts
from e2e.runs.recipes import describe_patches
from e2e.settings.schema import Settings
from e2e.sizes import show_bytes

FEW_CASES = 20
"""Validation cases below which the selected epoch is largely chance."""


def describe_run(settings: Settings, parts: Parts, strategy: Strategy) -> list[str]:
    """Describe a run before its first update.

    Parameters
    ----------
    settings : Settings
        Of the run.
    parts : Parts
        Its cohort, task and model.
    strategy : Strategy
        Where it trains.

    Returns
    -------
    list of str
        The lines to print, warnings among them.
    """
    return [
        *_data_lines(settings, parts),
        *_patch_lines(settings, parts),
        _model_line(settings, parts),
        _training_line(settings, parts, strategy),
        *describe_memory(settings, parts, strategy.device, strategy.world_size),
    ]


def describe_memory(
    settings: Settings, parts: Parts, device: torch.device, world_size: int
) -> list[str]:
    """Describe the peak memory of a process in training, with a warning if less is free.

    Parameters
    ----------
    settings, parts
        Of the run.
    device : torch.device
        Where the model is.
    world_size : int
        Number of processes.
    """
    counts = [item.reader.num_patches(item.slide.id) for item in parts.of_split("train")]
    largest = min(settings.bag.patches or max(counts), max(counts))
    memory = estimate_peak_memory(
        parts.model,
        side=settings.bag.size or parts.items[0].record.patch_px,
        patches=math.ceil(settings.optim.bags / world_size) * largest,
        largest_bag=largest,
        average=settings.optim.ema > 0,
    )
    free = free_memory(device)
    needed, sizes = show_bytes(memory.total), (memory.weights, memory.chunk, memory.bags)
    of_parts = "weights and optimiser {}, a chunk {}, bags and head {}".format(
        *map(show_bytes, sizes)
    )
    lines = [f"memory    about {needed} at the peak of an update ({of_parts})"]
    if memory.total > free:
        lines.append(
            f"warning: an update needs about {needed}, and {show_bytes(free)} are free on {device}\n"
            f"  lower {_largest_cause(settings, largest, sizes)}"
        )
    return lines


def _largest_cause(settings: Settings, largest: int, sizes: tuple[float, float, float]) -> str:
    weights, chunk, bags = sizes
    if bags >= max(weights, chunk):
        return f"bag.patches (a bag has up to {largest:,} patches) or optim.bags ({settings.optim.bags})"
    if chunk >= weights:
        return f"engine.chunk ({settings.engine.chunk}), or set engine.checkpoint_blocks=true"
    return "the size of the encoder, or use engine.strategy=fsdp on several GPUs"


def _data_lines(settings: Settings, parts: Parts) -> list[str]:
    lines = describe_splits(parts.items, parts.task, count_patches=True)
    protocol = PROTOCOLS[settings.run.protocol]
    cases = {item.slide.case for item in parts.of_split(protocol.selection_split)}
    if parts.problems:
        lines.append(f"{len(parts.problems):,} rows and slides left out, listed in problems.csv")
    lines = [f"{'data' if k == 0 else '':10}{line}" for k, line in enumerate(lines)]
    if settings.run.protocol != "honest":
        lines.append(
            "warning: run.protocol=as_published: validation slides are part of the test, the epoch is "
            "selected on the test, and the task is fitted to all cases: the test metrics are no estimate for "
            "new slides"
        )
    elif len(cases) < FEW_CASES:
        lines.append(
            f"warning: validation has {len(cases)} cases: which epoch is selected is largely chance below "
            f"{FEW_CASES}\n  move cases to validation, or use cross-validation (e2e crossval)"
        )
    return lines


def _patch_lines(settings: Settings, parts: Parts) -> list[str]:
    reader = parts.view.reader
    if reader.input_kind == "features":
        return [f"features  of width {parts.model.encoder.dim}"]
    first, *warnings = describe_patches(parts.patch_kinds, settings.bag.size)
    lines = [f"patches   {first}; {reader.describe()}", *warnings]
    if settings.data.scales:
        lines.append(
            f"warning: the patches of the {len(settings.data.scales)} other magnifications (data.scales) are "
            "for training; validation, test and prediction use those of data.stores alone"
        )
    return lines


def _model_line(settings: Settings, parts: Parts) -> str:
    model, head = parts.model, f"{settings.head.name} ({_millions(parts.model.head)})"
    if model.encoder.input_kind == "features":
        return f"model     {head}"
    trainable = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    encoder = (
        f"{settings.encoder.name} ({_millions(model.encoder)}, {trainable / 1e6:.2f} M trainable"
    )
    return f"model     {encoder}; BatchNorm {model.batch_norm.name}) + {head}"


def _training_line(settings: Settings, parts: Parts, strategy: Strategy) -> str:
    optim, model = settings.optim, parts.model
    size = f"{settings.bag.patches:,}" if settings.bag.patches else "all"
    bags = "1 bag" if optim.bags == 1 else f"{optim.bags} bags"
    chunks = f", chunks of {model.chunk}" if model.encoder.input_kind == "pixels" else ""
    dtype = str(model.autocast or torch.float32).removeprefix("torch.")
    return (
        f"training  {optim.epochs} epochs, {bags} of {size} patches an update{chunks}; "
        f"{strategy.describe()}, {dtype}"
    )


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"
