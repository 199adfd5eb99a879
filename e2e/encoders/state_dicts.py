"""Files of weights from elsewhere: reading them, and saying what network they look like."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from e2e.errors import UserError

NESTED = ("state_dict", "model_state_dict", "model", "teacher", "student", "encoder", "net")
"""Names under which training programs keep the weights in a checkpoint; the first one counts."""
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
"""Blocks in each stage, and whether they are bottlenecks -> name."""
FAMILIES = {
    r"^blocks\.\d+\.\d+\.conv": "an EfficientNet or MobileNet",
    r"^stages\.\d+\.blocks\.\d+\.(conv_dw|gamma)": "a ConvNeXt",
    r"^layers\.\d+\.blocks\.\d+\.attn\.relative_position": "a Swin transformer",
    r"^features\.denseblock\d": "a DenseNet",
    r"^(embeddings|encoder\.layer)\.": "a transformer of Hugging Face",
}
"""Pattern of a key -> what the network is."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file of ``torch.save`` or safetensors.

    In a checkpoint they are looked for under the usual names, such as ``state_dict``.

    Raises
    ------
    UserError
        There is no such file, it cannot be read, or it holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"no weights at {path}\n  set encoder.weights to an existing file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not a pickle may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as weights: {reason}\n"
            "  the file must be a state dict, saved with torch.save or as safetensors"
        ) from error
    candidates = [content]
    if isinstance(content, dict):
        candidates += [content[name] for name in NESTED if name in content]
    for weights in candidates:
        if weights and isinstance(weights, dict) and _are_tensors(weights.values()):
            return weights
    raise UserError(
        f"{path} holds no state dict (name -> tensor)\n"
        "  save model.state_dict() alone, and set encoder.weights to that file"
    )


def _are_tensors(values: Collection[object]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def without_prefix(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return the weights under the prefix of their names below which most of ``expected`` are.

    Such a prefix is ``module.`` (of DistributedDataParallel), ``backbone.`` or ``encoder.model.``; it may be
    empty. What has another prefix, such as a projection head, is left out.
    """
    prefixes = {"": 0}
    names = set(expected)
    for key in weights:
        for end in (0, *(match.end() for match in re.finditer(r"\.", key))):
            if key[end:] in names:
                prefixes[key[:end]] = prefixes.get(key[:end], 0) + 1
    best = max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)))
    return {k.removeprefix(best): v for k, v in weights.items() if k.startswith(best)}


def describe_network(weights: Mapping[str, Tensor]) -> str:
    """Return what network a state dict looks like, and its first keys."""
    first = ", ".join(list(weights)[:3])
    return f"the file holds {len(weights):,} tensors of {_family(weights)}: {first}, ..."


def _family(weights: Mapping[str, Tensor]) -> str:
    # The prefix may be anything, since the names did not match.
    start = re.compile(r"^.*?(?=(layer\d|blocks|stages|layers|features)\.)")
    names = {start.sub("", key, count=1) for key in weights}
    stages = tuple(_count_values(names, rf"^layer{number}\.(\d+)\.") for number in (1, 2, 3, 4))
    if any(stages):
        is_bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", name) for name in names)
        shown = "-".join(map(str, stages))
        kind = "bottlenecks" if is_bottleneck else "basic blocks"
        return RESNETS.get((stages, is_bottleneck), f"a ResNet of {shown} {kind}")
    depth = _count_values(names, r"^blocks\.(\d+)\.attn\.")
    if depth:
        width = next(v.shape[0] for k, v in weights.items() if k.endswith("norm1.weight"))
        return f"a ViT of depth {depth} and width {width}"
    return next(
        (family for pattern, family in FAMILIES.items() if _count_values(names, f"({pattern})")),
        "a network that is not recognised",
    )


def _count_values(names: Collection[str], pattern: str) -> int:
    """Return how many different values the first group of the pattern has."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
