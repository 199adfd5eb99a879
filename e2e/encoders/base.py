"""The contract a patch encoder obeys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.memory import Slabs
from e2e.registry import Registry


class Encoder(nn.Module):
    """``forward(pixels (n,3,H,W)) -> (n, dim)``; in eval mode each row depends on its patch alone.

    Pixels are uint8, or float in 0..1; the encoder normalises them by the mean and standard
    deviation its weights were trained with.
    """

    dim: int
    given = False
    """Whether a bag's rows are features already, (n, dim), and nothing is left to encode."""

    pretrained: bool
    """Whether the weights were trained: decides the default BatchNorm policy."""

    memory_format = torch.channels_last
    """In which the network gets its images: faster for convolutions, no matter to a ViT."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        most = 1 if pixels.is_floating_point() else 255
        scale, shift = 1 / (most * self.std), -self.mean / self.std
        by_rows = pixels.device.type == "cpu" and not pixels.requires_grad
        if by_rows and pixels.is_contiguous(memory_format=torch.channels_last):
            normal = _scaled_rows(pixels, scale, shift)
        else:
            normal = torch.addcmul(shift, pixels.to(scale.dtype), scale)
        return self.features(normal.contiguous(memory_format=self.memory_format))

    def features(self, images: Tensor) -> Tensor:
        """(n,3,H,W) normalised -> (n, dim)."""
        raise NotImplementedError

    def layers(self, *, coarse: bool = False) -> list[list[str]]:
        """Names of all parameters, layer by layer from the pixels up, each exactly once.

        Layer-wise decay of the learning rate goes by these; freezing by the ``coarse`` ones,
        whole stages. By default the encoder is one layer.
        """
        return [[name for name, _ in self.named_parameters()]]

    def undecayed(self) -> set[str]:
        """Names of parameters without weight decay, besides the vectors and scalars."""
        return set()

    @property
    def required_size(self) -> int | None:
        """Side in pixels of the patches, where the network accepts only one; None: any."""
        return None

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of the network's blocks for the backward, where it knows how to.

        Raises:
            UserError: it does not.
        """
        raise UserError(
            f"engine.checkpoint_blocks=true: {type(self).__name__} has no checkpointing of its own"
        )

    def freeze(self, stages: int) -> None:
        """Take the first ``stages`` coarse layers out of the training for good.

        They get no gradient and, as nothing before them needs one either, keep no activations.

        Raises:
            UserError: there would be nothing left to train.
        """
        layers = self.layers(coarse=True)
        if not 0 <= stages < len(layers):
            raise UserError(
                f"encoder.freeze must be 0 to {len(layers) - 1}, found {stages}: the encoder has "
                f"{len(layers)} stages\n  to train none of them: optim.train_encoder=false"
            )
        frozen = {name for layer in layers[:stages] for name in layer}
        for name, parameter in self.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As usual, but a part that has parameters and learns none of them stays in eval mode.

        So a frozen stage has no dropout, and its BatchNorm uses running statistics and keeps them.
        """
        super().train(mode)
        for module in self.modules() if mode else ():
            learns = [parameter.requires_grad for parameter in module.parameters()]
            if learns and not any(learns):
                module.eval()
        return self


_NORMALISED = Slabs()


def _scaled_rows(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``pixels * scale + shift`` (n,3,H,W), channels last in memory, patch by patch.

    A row of a patch is one long vector then, and a patch stays in the cache: several times as
    fast as three channels at a time over all patches.
    """
    count, channels, height, width = pixels.shape
    scales, shifts = (v.flatten().repeat(width) for v in (scale, shift))
    found = _NORMALISED.take((count, height, width * channels), scale.dtype)
    for rows, out in zip(pixels.permute(0, 2, 3, 1).flatten(2), found, strict=True):
        out.copy_(rows).mul_(scales).add_(shifts)
    return found.view(count, height, width, channels).permute(0, 3, 1, 2)


ENCODERS: Registry[Encoder] = Registry("encoder")
