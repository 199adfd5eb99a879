"""Checkpoints: one safetensors file each, written completely or not at all, without pickle.

Tensors are named ``model.*``, ``ema.*`` and ``optimizer.<parameter>.<slot>``; counters and scores
are JSON in the file's metadata. Nothing in it depends on the strategy that trained the model.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from e2e.errors import DamagedDataError, UserError, format_list
from e2e.files import write_atomically

Tensors = dict[str, Tensor]
CHECKSUM = "checksum"
"""Name of the checksum beside the counters."""


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before it stays until the new one is complete.

    Parameters
    ----------
    path
        The safetensors file.
    tensors
        On any device.
    state
        JSON values.

    Raises
    ------
    UserError
        The disk is full, or the file cannot be written.
    """
    packed = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # One entry: safetensors writes several in any order, and equal checkpoints shall be equal files.
    text = json.dumps({**state, CHECKSUM: _content_checksum(packed, state)})
    write_atomically(path, save(packed, {"state": text}))


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote.

    Parameters
    ----------
    path
        The safetensors file.

    Returns
    -------
    tensors
        On the CPU.
    state
        JSON values.

    Raises
    ------
    UserError
        There is no such file.
    DamagedDataError
        The file is damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            checksum = state.pop(CHECKSUM, None)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise DamagedDataError(f"{path} is not a checkpoint of this program: {error}") from error
    # Files of earlier versions have no checksum.
    if checksum not in (None, _content_checksum(tensors, state)):
        raise DamagedDataError(
            f"{path} is damaged: its content does not match its checksum\n"
            "  restore the file from a copy, or train the run again"
        )
    return tensors, state


def _content_checksum(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Return the CRC-32 of names, types, shapes and bytes of CPU tensors, and of the counters."""
    crc = zlib.crc32(json.dumps(state).encode())
    for name in sorted(tensors):
        value = tensors[name]
        crc = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), crc)
        crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors with ``prefix.`` before their names."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def select_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors whose names start with ``prefix.``, under the rest of their names."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def check_weights(
    shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], source: Path
) -> None:
    """Check that weights fit a model.

    Parameters
    ----------
    shapes
        Name -> shape of each tensor in the model; see :attr:`e2e.parallel.base.Strategy.shapes`.
    weights
        Name -> full tensor.
    source
        The file they come from, for the message.

    Raises
    ------
    UserError
        Tensors are missing, unknown or of another shape; lists them.
    """
    faults = [f"missing: {k}" for k in shapes.keys() - weights.keys()]
    faults += [f"unknown: {k}" for k in weights.keys() - shapes.keys()]
    faults += [
        f"{k}: {tuple(weights[k].shape)} in the file, {tuple(shapes[k])} in the model"
        for k in shapes.keys() & weights.keys()
        if weights[k].shape != shapes[k]
    ]
    if faults:
        raise UserError(f"{source} does not fit the model\n{format_list(sorted(faults))}")
