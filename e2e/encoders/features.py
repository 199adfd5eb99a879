"""No encoder: the two-stage mode, whose bags hold features that were extracted before."""

from __future__ import annotations

from torch import Tensor

from e2e.encoders.base import ENCODERS, Encoder
from e2e.errors import UserError


@ENCODERS.register("features")
class Features(Encoder):
    """Takes the place of the encoder when ``data.features`` are read; it has no weights.

    Parameters
    ----------
    dim : int
        Width of the features; 0: that of the cohort's features, which the run fills in.

    Raises
    ------
    UserError
        ``dim`` is below 1.
    """

    input_kind = "features"
    pretrained = False

    def __init__(self, *, dim: int = 0) -> None:
        super().__init__([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
        if dim < 1:
            raise UserError(
                f"encoder.dim={dim} must be 1 or more\n  set encoder.dim to the width of the features"
            )
        self.dim = dim

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (n, dim) as they are."""
        return pixels

    def layers(self, *, coarse: bool = False) -> list[list[str]]:
        """Return no layers."""
        return []
