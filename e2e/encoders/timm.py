"""Encoders from timm: ``r18`` and ``r50`` truncated as in the ABMILX project, and any timm name."""

from __future__ import annotations

import fnmatch
import functools
import math
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants as hub
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from e2e.encoders.base import ENCODERS, Encoder
from e2e.encoders.lora import add_lora
from e2e.encoders.state_dicts import describe_network, read_state_dict, without_prefix
from e2e.errors import OneRankError, UserError, format_list


class TimmEncoder(Encoder):
    """A timm network without its classifier; its last feature map is averaged over space.

    Parameters
    ----------
    model : str
        timm's name.
    pretrained : bool
        Load the weights that timm lists for it, from the hub or its cache.
    weights : str | None
        Load this file instead (.pt, .pth or .safetensors: a state dict with timm's keys).
    stage : int | None
        End after this feature stage (timm's ``out_indices`` entry, counted from 0), so that later stages are
        never built; None keeps the whole network and its own pooling.
    drop_path : float | None
        Stochastic depth rate, for networks that have it; None: timm's default.
    img_size : int | None
        Side of the patches in pixels, for a network built for one size (of a ViT the position embeddings
        are resampled); None: timm's default.
    freeze : int
        Freeze the first stages, which keep their weights and stay in eval mode. Stages are timm's coarse
        groups: of a convolutional network or a Swin the stem is the first, each resolution another; of a ViT
        the patch embedding is the first, each block another.
    lora_rank : int
        Rank of low-rank adapters (LoRA), which are trained while the weights stay frozen; 0: none.
    lora_alpha : float | None
        The adapters are scaled with lora_alpha / lora_rank; None: with 1.
    lora_targets : list of str | None
        The linear layers that are adapted, by name or its last parts (``qkv``, ``mlp.fc1``); None: those of
        the attention.

    Raises
    ------
    UserError
        The weights are not available or do not fit, or the network does not support an option.
    """

    def __init__(
        self,
        model: str,
        *,
        pretrained: bool = True,
        weights: str | None = None,
        stage: int | None = None,
        drop_path: float | None = None,
        img_size: int | None = None,
        freeze: int = 0,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_targets: list[str] | None = None,
    ) -> None:
        options = {"stage": stage, "drop_path": drop_path, "img_size": img_size}
        net = _create(model, options, from_hub=pretrained and weights is None)
        config: dict[str, Any] = net.pretrained_cfg  # pyright: ignore[reportAssignmentType]
        super().__init__(config["mean"], config["std"])
        self.net = net
        self.model = model
        self.is_truncated = stage is not None
        self.pretrained = pretrained or weights is not None
        self.licence = config.get("license") or ""
        self.channels_last = self.is_truncated and getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.dim = net.feature_info.channels()[-1] if self.is_truncated else net.head_hidden_size  # pyright: ignore
        if weights is not None:
            load_weights(self, Path(weights))
        elif not pretrained:
            _enable_residual_branches(net)
        if freeze:
            self.freeze(freeze)
        if lora_rank:
            add_lora(self.net, rank=lora_rank, alpha=lora_alpha, targets=lora_targets)

    def checkpoint_blocks(self) -> None:
        """Enable timm's own checkpointing, which is non-reentrant; UserError where there is none."""
        try:
            self.net.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"engine.checkpoint_blocks=true: timm has no checkpointing for {self.model}\n"
                "  set engine.checkpoint_blocks=false"
            ) from error

    def features(self, images: Tensor) -> Tensor:
        """See :class:`~e2e.encoders.base.Encoder`."""
        self._check_image_size(images)
        if self.is_truncated:
            space = (1, 2) if self.channels_last else (2, 3)
            return self.net(images)[-1].mean(dim=space)
        return self.net(images)

    def layers(self, *, coarse: bool = False) -> list[list[str]]:
        """Return timm's groups of parameters, or one group for each module where timm has none."""
        network, original_name = self._untruncated()
        names = ((original_name(name), f"net.{name}") for name, _ in self.net.named_parameters())
        if not hasattr(network, "group_matcher"):
            modules: dict[str, list[str]] = {}
            for timm_name, name in names:
                modules.setdefault(_top_module(timm_name), []).append(name)
            return list(modules.values())
        matcher = network.group_matcher(coarse=coarse)  # pyright: ignore[reportCallIssue]
        groups = group_with_matcher(names, matcher, return_values=True)
        return [groups[number] for number in sorted(groups)]

    def no_weight_decay(self) -> set[str]:
        """Return what timm lists: position embeddings, class tokens and the like."""
        network, original_name = self._untruncated()
        patterns = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # pyright: ignore
        return {
            f"net.{name}"
            for name, _ in self.net.named_parameters()
            if any(fnmatch.fnmatchcase(original_name(name), pattern) for pattern in patterns)
        }

    def _untruncated(self) -> tuple[nn.Module, Callable[[str], str]]:
        """Return the network before truncation (without weights), and a map from names in ``net`` to its."""
        if not self.is_truncated or hasattr(self.net, "group_matcher"):
            return self.net, lambda name: name
        with torch.device("meta"):
            network = timm.create_model(self.model)
        inside = {
            f"{name}_{child}": f"{name}.{child}"
            for name, module in network.named_children()
            for child, _ in module.named_children()
        }  # timm joins the two when it truncates a network
        children = {name for name, _ in network.named_children()}

        def original(name: str) -> str:
            first, dot, rest = name.partition(".")
            if first not in children and first == "model":  # the truncated network wraps the other
                return rest
            return (first if first in children else inside.get(first, first)) + dot + rest

        return network, original

    @property
    def required_size(self) -> int | None:
        """Return the only side of patches in pixels that the network accepts; None: it accepts any."""
        sides = self._required_sides()
        return sides[0] if sides else None

    def _required_sides(self) -> tuple[int, int] | None:
        """Return the height and width that a network with strict sizes was built for, otherwise None."""
        network = getattr(self.net, "model", self.net)  # timm wraps a truncated ViT
        embed = getattr(network, "patch_embed", None)
        if not getattr(embed, "strict_img_size", False):
            return None
        sides = getattr(embed, "img_size", None)
        return tuple(sides) if sides else None

    def _check_image_size(self, images: Tensor) -> None:
        """Raise OneRankError unless the network accepts images of this size."""
        size, sides = tuple(images.shape[-2:]), self._required_sides()
        if sides is not None and size != sides:
            raise OneRankError(
                f"the encoder '{self.model}' is built for patches of {sides[0]} x {sides[1]} pixels, "
                f"found {size[0]} x {size[1]}\n"
                f"  set encoder.img_size={size[0]}, or bag.size={sides[0]}"
            )


def load_weights(encoder: TimmEncoder, path: Path) -> None:
    """Load a state dict of the full network, as far as the encoder has its layers.

    Keys of the stages and the classifier that the encoder lacks are ignored. The position embedding of a ViT
    is resampled.

    Parameters
    ----------
    encoder : TimmEncoder
        Modified in place.
    path : Path
        A state dict with timm's keys, saved with ``torch.save`` or as safetensors.

    Raises
    ------
    UserError
        The file cannot be read; or any other key is missing, unknown or of another shape.
    """
    net = encoder.net
    expected = net.state_dict()
    network, original_name = encoder._untruncated()
    if not encoder.is_truncated:
        with torch.device("meta"):
            network = timm.create_model(encoder.model)
    names = {original_name(key): key for key in expected}
    content = read_state_dict(path)
    all_names = {*names, *expected, *network.state_dict()}
    weights = {names.get(k, k): v for k, v in without_prefix(content, all_names).items()}
    for key in expected:
        if key.endswith("pos_embed") and key in weights:
            weights[key] = resampled(weights[key], expected[key], net)
    missing = [k for k in expected if k not in weights and not k.endswith("num_batches_tracked")]
    unknown = [k for k in weights if k not in expected and k not in network.state_dict()]
    shapes = [
        f"{k}: {tuple(weights[k].shape)} in the file, {tuple(expected[k].shape)} in the encoder"
        for k in expected
        if k in weights and weights[k].shape != expected[k].shape
    ]
    faults = [f"missing: {k}" for k in missing] + [f"unknown: {k}" for k in unknown] + shapes
    if faults:
        raise UserError(
            f"{path} does not fit the encoder '{encoder.model}': {describe_network(content)}\n"
            f"{format_list(faults, most=3)}\n"
            "  set encoder.name to the network of the file, or encoder.weights to another file"
        )
    net.load_state_dict({k: weights.get(k, expected[k]) for k in expected})


def _enable_residual_branches(net: nn.Module) -> None:
    """Start every residual branch with its last norm at 1, as torchvision does; timm starts it at 0.

    At 0 the branches contribute nothing, and a short training from random weights only learns to use them.
    """
    for block in net.modules():
        if hasattr(block, "zero_init_last"):
            for norm in block.modules():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
                    nn.init.ones_(norm.weight)


def resampled(table: Tensor, expected: Tensor, net: nn.Module) -> Tensor:
    """Return the position embedding of a ViT, resampled by timm to the shape of ``expected``.

    Parameters
    ----------
    table : Tensor of shape (1, tokens, dim)
        Any other tensor is returned as it is.
    expected : Tensor of shape (1, other tokens, dim)
        The network's own embedding.
    net : nn.Module
        The network, truncated or not.
    """
    vit = getattr(net, "model", net)
    grid = getattr(getattr(vit, "patch_embed", None), "grid_size", None)
    if table.shape == expected.shape or grid is None or table.ndim != 3:
        return table
    prefix = expected.shape[1] - math.prod(grid)
    if math.isqrt(table.shape[1] - prefix) ** 2 != table.shape[1] - prefix:
        return table  # not a square: it will not fit, which is reported later
    return resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)


def _top_module(name: str) -> str:
    """Return ``stages.1`` for ``stages.1.conv.weight``, and ``head`` for ``head.norm.bias``."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[1:] and parts[1].isdigit() else 1])


def _create(model: str, options: dict[str, Any], *, from_hub: bool) -> nn.Module:
    """Build the network; UserError where it does not support an option."""
    arguments: dict[str, Any] = {"num_classes": 0}
    if options["stage"] is not None:
        arguments = {"features_only": True, "out_indices": (options["stage"],)}
    if options["drop_path"] is not None:
        arguments["drop_path_rate"] = options["drop_path"]
    if options["img_size"] is not None:
        arguments["img_size"] = options["img_size"]
    try:
        net = (
            _create_pretrained(model, arguments)
            if from_hub
            else timm.create_model(model, **arguments)
        )
    except (TypeError, IndexError, AssertionError) as error:
        shown = ", ".join(f"encoder.{k}={v}" for k, v in options.items() if v is not None)
        hint = ""
        if "img_size" in str(error):
            hint = "\n  this network accepts patches of any size: remove encoder.img_size"
        raise UserError(
            f"encoder '{model}' cannot be built with {shown or 'these options'}: {error}{hint}"
        ) from error
    ends = getattr(net, "_stage_out_idx", None)
    if options["stage"] is not None and ends:  # timm keeps all later stages of EfficientNets
        net.blocks = net.blocks[: max(ends)]  # pyright: ignore[reportIndexIssue]
    return net


def _create_pretrained(model: str, options: dict[str, Any]) -> nn.Module:
    detect_offline()
    try:
        return timm.create_model(model, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no pretrained weights for '{model}': {str(error).splitlines()[0][:200]}\n"
            "  without a network set encoder.weights=FILE to a timm state dict,"
            " or encoder.pretrained=false to start from random weights"
        ) from error


def detect_offline() -> None:
    """Use only the cache of the hub if the hub cannot be reached, instead of retrying for a minute."""
    host = urlsplit(hub.ENDPOINT).hostname
    if host is None or urllib.request.getproxies():
        return
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True


# Truncated after the third residual stage (stride 16), of width 256 and 1024, as in the ABMILX project
# (arXiv 2506.02408), whose r50 runs use the second torchvision weights.
for _name, _model in (
    ("r18", "resnet18.tv_in1k"),
    ("r50", "resnet50.tv_in1k"),
    ("r50v2", "resnet50.tv2_in1k"),
):
    ENCODERS.register(_name)(functools.partial(TimmEncoder, _model, stage=3))
ENCODERS.register_library(
    lambda: timm.list_models(), lambda model: functools.partial(TimmEncoder, model)
)
