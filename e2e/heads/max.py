"""Max pooling: the largest logit of any patch is the logit of the slide."""

from __future__ import annotations

from torch import Tensor, nn

from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding, resolve_mask
from e2e.heads.layers import projection, xavier_init


@HEADS.register("max")
class MaxMIL(Head):
    """Max pooling: logits_c = max_n (W_c h_n)_c, with h_n = Dropout(act(W [LN] x_n)).

    Source: the instance-space max of Wang et al. 2018, "Revisiting Multiple Instance Neural
    Networks" (mi-Net), arXiv:1610.02501; for slides Campanella et al. 2019, "Clinical-grade
    computational pathology", Nature Medicine 25, doi:10.1038/s41591-019-0508-1.

    The maximum is taken for each output independently, as in "MaxMIL" of MIL code for slides. Campanella
    et al. (and "mil" of CLAM) select one patch by its positive probability and use all its logits, which
    is the same for one output. Ties share the gradient evenly, so that duplicates and the order of
    patches change nothing.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int | None
        Width after the projection; None classifies the features as they are (``act`` has no effect then).
    dropout : float
        Dropout probability of the projected features.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features first.
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int | None = 512,
        dropout: float = 0.25,
        act: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.project = projection(in_dim, embed_dim, act=act, dropout=dropout, norm=norm)
        self.classify = nn.Linear(embed_dim or in_dim, num_outputs)
        xavier_init(self)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Classify each patch, and take the largest logit of each bag.

        Parameters
        ----------
        features : Tensor of shape (B, N, D)
            Floating point.
        mask : Tensor of shape (B, N), optional
            bool, True for real patches; None: all are real.
        coords : Tensor of shape (B, N, 2), optional
            Unused.

        Returns
        -------
        HeadOutput
            logits (B, C) and instance_logits (B, N, C), which are 0 on padding. There is no
            attention map: each output has a patch of its own.
        """
        mask = resolve_mask(features, mask)
        instance_BNC = self.classify(self.project(clear_padding(features, mask)))
        real_BN1 = mask.unsqueeze(-1)
        logits_BC = instance_BNC.masked_fill(~real_BN1, float("-inf")).amax(dim=1)
        return HeadOutput(logits_BC, instance_logits=instance_BNC.masked_fill(~real_BN1, 0.0))
