"""Checkpoints: one safetensors file each, written whole or not at all; no pickle.

Tensors are named ``model.*``, ``ema.*`` and ``optimizer.<parameter>.<slot>``; counters and scores
are JSON in the file's metadata. Weights, average and counters are free of the strategy.
"""

from __future__ import annotations

import json
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


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``state`` (JSON values)."""
    packed = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(packed, {"state": json.dumps(state)}))


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What :func:`save_checkpoint` wrote; DamagedDataError when the file is not whole."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DamagedDataError(f"{path} is no checkpoint of this program: {error}") from error


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Names with ``prefix.`` before them."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def select_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under ``prefix.``, without it."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def check_weights(
    wanted: Mapping[str, torch.Size], weights: Mapping[str, Tensor], source: Path
) -> None:
    """UserError naming what of ``weights`` does not fit a model of the ``wanted`` shapes."""
    faults = [f"missing: {k}" for k in wanted.keys() - weights.keys()]
    faults += [f"unknown: {k}" for k in weights.keys() - wanted.keys()]
    faults += [
        f"{k}: {tuple(weights[k].shape)} in the file, {tuple(wanted[k])} in the model"
        for k in wanted.keys() & weights.keys()
        if weights[k].shape != wanted[k]
    ]
    if faults:
        raise UserError(f"{source} does not fit the model\n{format_list(sorted(faults))}")
