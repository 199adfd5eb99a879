"""Max pooling: the most suspicious patch speaks for the slide."""

from __future__ import annotations

from torch import Tensor, nn

from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding
from e2e.heads.layers import projection, xavier_init


@HEADS.register("max")
class MaxMIL(Head):
    """logits_c = max_n (W_c h_n)_c, with h_n = Dropout(act(W [LN] x_n)).

    Source: the instance-space max of Wang et al. 2018, "Revisiting Multiple Instance Neural
    Networks" (mi-Net), arXiv:1610.02501; for slides Campanella et al. 2019, "Clinical-grade
    computational pathology", Nature Medicine 25, doi:10.1038/s41591-019-0508-1.

    Choices: the maximum is taken for each output by itself, as in the "MaxMIL" of MIL code for
    slides; Campanella et al. (and CLAM's "mil") choose one patch by its positive probability and
    use all its logits, which is the same for one output. Ties share the gradient evenly, so that
    duplicated patches and their order change nothing.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width after the projection; None classifies the features as they are
            (``act`` then has no effect).
        dropout: probability, applied to the projected features.
        act: activation of the projection (gelu, relu, silu, tanh, none).
        norm: LayerNorm on the features.
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

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Classify each patch; a bag's logit is the largest of its patches'.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C) and instance_logits (B, N, C), which are 0 on padding. There is no
            attention map: each output has its own patch.
        """
        instance_BNC = self.classify(self.project(clear_padding(features, mask)))
        real_BN1 = mask.unsqueeze(-1)
        logits_BC = instance_BNC.masked_fill(~real_BN1, float("-inf")).amax(dim=1)
        return HeadOutput(logits_BC, instance_logits=instance_BNC.masked_fill(~real_BN1, 0.0))
