"""Encoders from timm: ``r18`` and ``r50`` as the ABMILX project cuts them, and any timm name."""

from __future__ import annotations

import functools
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
from torch import Tensor, nn

from e2e.encoders.base import ENCODERS, Encoder
from e2e.errors import UserError, listing


class TimmEncoder(Encoder):
    """A timm network without its classifier, its last feature map averaged over space.

    Args:
        model: timm's name.
        pretrained: load the weights timm names for it (from the hub or its cache).
        weights: load this file instead (.pt, .pth or .safetensors; a state dict with timm's keys).
        stage: end after this feature stage (timm's ``out_indices`` entry, counted from 0), so that
            later stages are never built; None keeps the whole network and its own pooling.
        drop_path: stochastic depth rate, where the network has it; None leaves timm's default.

    Raises:
        UserError: the weights cannot be had, or do not fit.
    """

    def __init__(
        self,
        model: str,
        *,
        pretrained: bool = True,
        weights: str | None = None,
        stage: int | None = None,
        drop_path: float | None = None,
    ) -> None:
        from_hub = pretrained and weights is None
        options = _timm_options(stage, drop_path)
        try:
            net = _from_hub(model, options) if from_hub else timm.create_model(model, **options)
        except (TypeError, IndexError, AssertionError) as error:
            raise UserError(
                f"encoder '{model}' cannot be built with stage={stage}, drop_path={drop_path}: {error}"
            ) from error
        config: dict[str, Any] = net.pretrained_cfg  # pyright: ignore[reportAssignmentType]
        super().__init__(config["mean"], config["std"])
        self.net = net
        self.cut = stage is not None
        self.pretrained = pretrained or weights is not None
        self.channels_last = self.cut and getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.dim = net.feature_info.channels()[-1] if self.cut else net.head_hidden_size  # pyright: ignore
        if weights is not None:
            load_weights(self.net, Path(weights), model)

    def features(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`."""
        if self.cut:
            space = (1, 2) if self.channels_last else (2, 3)
            return self.net(images)[-1].mean(dim=space)
        return self.net(images)


def load_weights(net: nn.Module, path: Path, model: str) -> None:
    """Load a state dict into ``net``, a timm ``model`` or the first stages of it.

    Keys of the stages and the classifier that ``net`` does without are left out; any other key
    that is missing, unknown or of another shape is an error.
    """
    found = _read_weights(path)
    wanted = net.state_dict()
    with torch.device("meta"):
        whole = timm.create_model(model).state_dict().keys()
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    unknown = [k for k in found if k not in wanted and k not in whole]
    shapes = [
        f"{k}: {tuple(found[k].shape)} in the file, {tuple(wanted[k].shape)} in the encoder"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    faults = [f"missing: {k}" for k in missing] + [f"unknown: {k}" for k in unknown] + shapes
    if faults:
        raise UserError(f"{path} does not fit the encoder '{model}'\n{listing(faults)}")
    net.load_state_dict({k: found.get(k, wanted[k]) for k in wanted})


def _timm_options(stage: int | None, drop_path: float | None) -> dict[str, Any]:
    options: dict[str, Any] = {"num_classes": 0}
    if stage is not None:
        options = {"features_only": True, "out_indices": (stage,)}
    if drop_path is not None:
        options["drop_path_rate"] = drop_path
    return options


def _from_hub(model: str, options: dict[str, Any]) -> nn.Module:
    _notice_offline()
    try:
        return timm.create_model(model, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no pretrained weights for '{model}': {str(error).splitlines()[0][:200]}\n"
            "  without a network: encoder.weights=FILE with a timm state dict,"
            " or encoder.pretrained=false to start from random weights"
        ) from error


def _notice_offline() -> None:
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


def _alias(model: str, stage: int) -> Callable[..., Encoder]:
    def build(
        *,
        pretrained: bool = True,
        weights: str | None = None,
        stage: int | None = stage,
        drop_path: float | None = None,
    ) -> Encoder:
        return TimmEncoder(
            model, pretrained=pretrained, weights=weights, stage=stage, drop_path=drop_path
        )

    return build


# Cut after the third residual stage (stride 16): 256-d and 1024-d, spec of the ABMILX paper
# (arXiv 2506.02408), whose r50 runs use the second torchvision weights.
ENCODERS.register("r18")(_alias("resnet18.tv_in1k", 3))
ENCODERS.register("r50")(_alias("resnet50.tv_in1k", 3))
ENCODERS.register("r50v2")(_alias("resnet50.tv2_in1k", 3))
ENCODERS.add_family(lambda: timm.list_models(), lambda model: functools.partial(TimmEncoder, model))
