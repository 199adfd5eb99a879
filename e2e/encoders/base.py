"""The interface of a patch encoder.

Shape letters: n patches, H and W their sides in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.memory import Slabs
from e2e.registry import Registry


class Encoder(nn.Module):
    """Base class of encoders: ``encoder(pixels (n,3,H,W)) -> features (n, dim)``.

    In eval mode each row depends on its patch only. Pixels are uint8, or float in 0..1; the encoder
    normalises them with the mean and standard deviation that its weights were trained with.

    Parameters
    ----------
    mean, std : Sequence of float
        Mean and standard deviation of the training images for red, green and blue, in 0..1.
    """

    dim: int
    """Width of the features."""
    input_kind: Literal["pixels", "features"] = "pixels"
    """What ``forward`` takes: patches (n,3,H,W), or features (n, dim) that it returns as they are."""

    pretrained: bool
    """Whether the weights are pretrained, which determines the default BatchNorm policy."""
    licence: str = ""
    """Licence of the published weights that it can start from; empty if unknown."""

    memory_format = torch.channels_last
    """Memory format of the images given to the network: faster for convolutions, irrelevant to a ViT."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (n, dim).

        Parameters
        ----------
        pixels : Tensor of shape (n, 3, H, W)
            uint8, or float in 0..1. Not modified.
        """
        white = 1 if pixels.is_floating_point() else 255
        scale, shift = 1 / (white * self.std), -self.mean / self.std
        can_be_row_wise = pixels.device.type == "cpu" and not pixels.requires_grad
        if can_be_row_wise and pixels.is_contiguous(memory_format=torch.channels_last):
            images = _normalised_rows(pixels, scale, shift)
        else:
            images = torch.addcmul(shift, pixels.to(scale.dtype), scale)
        return self.features(images.contiguous(memory_format=self.memory_format))

    def features(self, images: Tensor) -> Tensor:
        """Return the features (n, dim) of normalised images (n,3,H,W)."""
        raise NotImplementedError

    def layers(self, *, coarse: bool = False) -> list[list[str]]:
        """Return the names of all parameters by layer, from the pixels up, each name exactly once.

        The default is a single layer.

        Parameters
        ----------
        coarse : bool
            Whole stages, which are what ``freeze`` counts; otherwise the layers of layer-wise
            learning-rate decay.
        """
        return [[name for name, _ in self.named_parameters()]]

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to vectors and scalars."""
        return set()

    @property
    def required_size(self) -> int | None:
        """Side in pixels of the patches, where the network accepts only one; None: any."""
        return None

    def checkpoint_blocks(self) -> None:
        """Enable activation checkpointing of the network's blocks.

        Raises
        ------
        UserError
            The network does not support it.
        """
        raise UserError(
            f"engine.checkpoint_blocks=true: {type(self).__name__} has no activation checkpointing\n"
            "  set engine.checkpoint_blocks=false"
        )

    def freeze(self, stages: int) -> None:
        """Freeze the first ``stages`` coarse layers.

        They get no gradient and, as nothing before them needs one, store no activations.

        Raises
        ------
        UserError
            Nothing would be left to train.
        """
        layers = self.layers(coarse=True)
        if not 0 <= stages < len(layers):
            raise UserError(
                f"encoder.freeze={stages} must be 0 to {len(layers) - 1}: the encoder has "
                f"{len(layers)} stages\n  to freeze all of them set optim.train_encoder=false"
            )
        frozen = {name for layer in layers[:stages] for name in layer}
        for name, parameter in self.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but keep modules in eval mode if all of their parameters are frozen.

        So a frozen stage has no dropout, and its BatchNorm uses and keeps its running statistics.
        """
        super().train(mode)
        for module in self.modules() if mode else ():
            is_trained = [parameter.requires_grad for parameter in module.parameters()]
            if is_trained and not any(is_trained):
                module.eval()
        return self


_NORMALISED = Slabs()


def _normalised_rows(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``pixels * scale + shift`` (n,3,H,W), channels last in memory, computed patch by patch.

    A row of pixels is one long vector then, and a patch fits into the cache: several times as fast as
    three channels at a time over all patches.
    """
    count, channels, height, width = pixels.shape
    scales, shifts = (v.flatten().repeat(width) for v in (scale, shift))
    images = _NORMALISED.take((count, height, width * channels), scale.dtype)
    for rows, out in zip(pixels.permute(0, 2, 3, 1).flatten(2), images, strict=True):
        out.copy_(rows).mul_(scales).add_(shifts)
    return images.view(count, height, width, channels).permute(0, 3, 1, 2)


ENCODERS: Registry[Encoder] = Registry("encoder")
