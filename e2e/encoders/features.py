"""No encoder at all: the two-stage mode, whose bags hold features that another program made."""

from __future__ import annotations

from torch import Tensor

from e2e.encoders.base import ENCODERS, Encoder
from e2e.errors import UserError


@ENCODERS.register("features")
class Features(Encoder):
    """What stands for the encoder when ``data.features`` are read: it has no weights.

    Parameters
    ----------
    dim : int
        Width of the features; 0: that of the cohort's, which the run fills in.

    Raises
    ------
    UserError
        No width.
    """

    input_kind = "features"
    pretrained = False

    def __init__(self, *, dim: int = 0) -> None:
        super().__init__([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
        if dim < 1:
            raise UserError("the width of the features is not known: give encoder.dim")
        self.dim = dim

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, dim) as they are."""
        return pixels

    def layers(self, *, coarse: bool = False) -> list[list[str]]:
        """None."""
        return []
