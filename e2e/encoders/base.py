"""The contract a patch encoder obeys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from e2e.registry import Registry


class Encoder(nn.Module):
    """``forward(pixels (n,3,H,W)) -> (n, dim)``; in eval mode each row depends on its patch alone.

    Pixels are uint8, or float in 0..1; the encoder normalises them by the mean and standard
    deviation its weights were trained with.
    """

    dim: int
    pretrained: bool
    """Whether the weights were trained: decides the default BatchNorm policy."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        scaled = pixels.to(self.mean.dtype)
        if not pixels.is_floating_point():
            scaled = scaled / 255
        normalised = (scaled - self.mean) / self.std
        return self.features(normalised.contiguous(memory_format=torch.channels_last))

    def features(self, images: Tensor) -> Tensor:
        """(n,3,H,W) normalised -> (n, dim)."""
        raise NotImplementedError


ENCODERS: Registry[Encoder] = Registry("encoder")
