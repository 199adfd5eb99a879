"""Encoders from timm: ``r18`` and ``r50`` as the ABMILX project cuts them, and any timm name."""

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
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from e2e.encoders.base import ENCODERS, Encoder
from e2e.encoders.lora import add_lora
from e2e.errors import OneRankError, UserError, format_list


class TimmEncoder(Encoder):
    """A timm network without its classifier, its last feature map averaged over space.

    Args:
        model: timm's name.
        pretrained: load the weights timm names for it (from the hub or its cache).
        weights: load this file instead (.pt, .pth or .safetensors; a state dict with timm's keys).
        stage: end after this feature stage (timm's ``out_indices`` entry, counted from 0), so that
            later stages are never built; None keeps the whole network and its own pooling.
        drop_path: stochastic depth rate, where the network has it; None leaves timm's default.
        img_size: side in pixels of the patches, for a network that is built for one (a ViT: its
            position embeddings are resampled); None leaves timm's.
        freeze: the first so many stages keep their weights and stay in eval mode. Stages are
            timm's coarse ones: of a convolutional network or a Swin the stem is the first, each
            resolution another; of a ViT the patch embedding is the first, each block another.
        lora_rank: over 0: the weights stay as they are, and low-rank adapters of this rank learn.
        lora_alpha: the adapters' part is weighed with lora_alpha / lora_rank; None: with 1.
        lora_targets: the linear layers that are adapted, by name or its end (``qkv``, ``mlp.fc1``);
            None: those of the attention.

    Raises:
        UserError: the weights cannot be had, or do not fit; the network lacks what an option needs.
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
        self.cut = stage is not None
        self.pretrained = pretrained or weights is not None
        self.channels_last = self.cut and getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.dim = net.feature_info.channels()[-1] if self.cut else net.head_hidden_size  # pyright: ignore
        if weights is not None:
            load_weights(self, Path(weights))
        elif not pretrained:
            _open_residuals(net)
        if freeze:
            self.freeze(freeze)
        if lora_rank:
            add_lora(self.net, rank=lora_rank, alpha=lora_alpha, targets=lora_targets)

    def checkpoint_blocks(self) -> None:
        """See :class:`Encoder`; timm's own checkpointing, which is non-reentrant."""
        try:
            self.net.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"engine.checkpoint_blocks=true: timm has no checkpointing for {self.model}"
            ) from error

    def features(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`."""
        self._check_size(images)
        if self.cut:
            space = (1, 2) if self.channels_last else (2, 3)
            return self.net(images)[-1].mean(dim=space)
        return self.net(images)

    def layers(self, *, coarse: bool = False) -> list[list[str]]:
        """As timm groups them, or one a module in their order where timm does not."""
        whole, names = self._whole()
        ours = ((names(name), f"net.{name}") for name, _ in self.net.named_parameters())
        if not hasattr(whole, "group_matcher"):
            modules: dict[str, list[str]] = {}
            for name, own in ours:
                modules.setdefault(_top_module(name), []).append(own)
            return list(modules.values())
        matcher = whole.group_matcher(coarse=coarse)  # pyright: ignore[reportCallIssue]
        groups = group_with_matcher(ours, matcher, return_values=True)
        return [groups[number] for number in sorted(groups)]

    def undecayed(self) -> set[str]:
        """What timm names: position embeddings, class tokens and the like."""
        whole, names = self._whole()
        patterns = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()  # pyright: ignore
        return {
            f"net.{name}"
            for name, _ in self.net.named_parameters()
            if any(fnmatch.fnmatchcase(names(name), pattern) for pattern in patterns)
        }

    def _whole(self) -> tuple[nn.Module, Callable[[str], str]]:
        """The network before it was cut (without weights), and its names for those of ``net``."""
        if not self.cut or hasattr(self.net, "group_matcher"):
            return self.net, lambda name: name
        with torch.device("meta"):
            whole = timm.create_model(self.model)
        inside = {
            f"{name}_{child}": f"{name}.{child}"
            for name, module in whole.named_children()
            for child, _ in module.named_children()
        }  # timm joins the two when it cuts a network
        known = {name for name, _ in whole.named_children()}

        def original(name: str) -> str:
            first, dot, rest = name.partition(".")
            if first not in known and first == "model":  # the cut network holds the whole one
                return rest
            return (first if first in known else inside.get(first, first)) + dot + rest

        return whole, original

    @property
    def required_size(self) -> int | None:
        """See :class:`Encoder`."""
        network = getattr(self.net, "model", self.net)  # timm wraps a network that is cut short
        embed = getattr(network, "patch_embed", None)
        sides = getattr(embed, "img_size", None)
        return sides[0] if sides and getattr(embed, "strict_img_size", False) else None

    def _check_size(self, images: Tensor) -> None:
        inner = getattr(self.net, "model", self.net)  # of a ViT that was cut
        embed = getattr(inner, "patch_embed", None)
        if not getattr(embed, "strict_img_size", False):
            return
        found, side = tuple(images.shape[-2:]), getattr(embed, "img_size", None)
        if side is not None and found != tuple(side):
            raise OneRankError(
                f"the encoder '{self.model}' is built for patches of {side[0]} x {side[1]} pixels, "
                f"found {found[0]} x {found[1]}\n"
                f"  set encoder.img_size={found[0]}, or bag.size={side[0]}"
            )


def load_weights(encoder: TimmEncoder, path: Path) -> None:
    """Load a state dict of the encoder's whole network into what the encoder has of it.

    Keys of the stages and the classifier that it does without are left out; any other key that is
    missing, unknown or of another shape is an error, but a ViT's position embedding is resampled.
    """
    net = encoder.net
    found = _read_weights(path)
    wanted = net.state_dict()
    whole, original = encoder._whole()
    if not encoder.cut:
        with torch.device("meta"):
            whole = timm.create_model(encoder.model)
    names = {original(key): key for key in wanted}
    found = {names.get(key, key): value for key, value in found.items()}
    for key in wanted:
        if key.endswith("pos_embed") and key in found:
            found[key] = resampled(found[key], wanted[key], net)
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    unknown = [k for k in found if k not in wanted and k not in whole.state_dict()]
    shapes = [
        f"{k}: {tuple(found[k].shape)} in the file, {tuple(wanted[k].shape)} in the encoder"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    faults = [f"missing: {k}" for k in missing] + [f"unknown: {k}" for k in unknown] + shapes
    if faults:
        raise UserError(f"{path} does not fit the encoder '{encoder.model}'\n{format_list(faults)}")
    net.load_state_dict({k: found.get(k, wanted[k]) for k in wanted})


def _open_residuals(net: nn.Module) -> None:
    """Start every residual branch with its last norm at 1, as torchvision does; timm starts it at 0.

    At 0 the branches are closed, and a small run from random weights is spent on opening them.
    """
    for block in net.modules():
        if hasattr(block, "zero_init_last"):
            for norm in block.modules():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
                    nn.init.ones_(norm.weight)


def resampled(table: Tensor, wanted: Tensor, net: nn.Module) -> Tensor:
    """A ViT's position embedding (1, tokens, dim) for another number of patches, as timm does it."""
    vit = getattr(net, "model", net)
    grid = getattr(getattr(vit, "patch_embed", None), "grid_size", None)
    if table.shape == wanted.shape or grid is None or table.ndim != 3:
        return table
    prefix = wanted.shape[1] - math.prod(grid)
    if math.isqrt(table.shape[1] - prefix) ** 2 != table.shape[1] - prefix:
        return table  # of no square: it will not fit, and the message says so
    return resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)


def _top_module(name: str) -> str:
    """``stages.1.conv.weight`` -> ``stages.1``, ``head.norm.bias`` -> ``head``."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[1:] and parts[1].isdigit() else 1])


def _create(model: str, options: dict[str, Any], *, from_hub: bool) -> nn.Module:
    given: dict[str, Any] = {"num_classes": 0}
    if options["stage"] is not None:
        given = {"features_only": True, "out_indices": (options["stage"],)}
    if options["drop_path"] is not None:
        given["drop_path_rate"] = options["drop_path"]
    if options["img_size"] is not None:
        given["img_size"] = options["img_size"]
    try:
        net = _from_hub(model, given) if from_hub else timm.create_model(model, **given)
    except (TypeError, IndexError, AssertionError) as error:
        shown = ", ".join(f"encoder.{k}={v}" for k, v in options.items() if v is not None)
        hint = ""
        if "img_size" in str(error):
            hint = "\n  this network takes patches of any size: leave encoder.img_size out"
        raise UserError(
            f"encoder '{model}' cannot be built with {shown or 'these options'}: {error}{hint}"
        ) from error
    ends = getattr(net, "_stage_out_idx", None)
    if options["stage"] is not None and ends:  # EfficientNets are cut with all later stages on
        net.blocks = net.blocks[: max(ends)]  # pyright: ignore[reportIndexIssue]
    return net


def _from_hub(model: str, options: dict[str, Any]) -> nn.Module:
    notice_offline()
    try:
        return timm.create_model(model, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no pretrained weights for '{model}': {str(error).splitlines()[0][:200]}\n"
            "  without a network: encoder.weights=FILE with a timm state dict,"
            " or encoder.pretrained=false to start from random weights"
        ) from error


def notice_offline() -> None:
    """Without a way to the hub, look into its cache at once instead of after a minute of retries."""
    host = urlsplit(hub.ENDPOINT).hostname
    if host is None or urllib.request.getproxies():
        return
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"no weights at {path}\n  set encoder.weights to a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle may raise anything when read as one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as weights: {reason}\n"
            "  a state dict is needed, saved with torch.save or as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no state dict (name -> tensor)")
    return found


# Cut after the third residual stage (stride 16): 256-d and 1024-d, spec of the ABMILX paper
# (arXiv 2506.02408), whose r50 runs use the second torchvision weights.
for _name, _model in (
    ("r18", "resnet18.tv_in1k"),
    ("r50", "resnet50.tv_in1k"),
    ("r50v2", "resnet50.tv2_in1k"),
):
    ENCODERS.register(_name)(functools.partial(TimmEncoder, _model, stage=3))
ENCODERS.add_family(lambda: timm.list_models(), lambda model: functools.partial(TimmEncoder, model))
