"""Mean pooling: every patch counts the same."""

from __future__ import annotations

from torch import Tensor, nn

from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding, mask_logits
from e2e.heads.layers import projection, xavier_init


@HEADS.register("mean")
class MeanMIL(Head):
    """logits = mean_n W_c h_n = W_c mean_n h_n, with h_n = Dropout(act(W [LN] x_n)).

    Source: the instance-space mean of Wang et al. 2018, "Revisiting Multiple Instance Neural
    Networks" (mi-Net with the mean), arXiv:1610.02501, in the form that MIL code
    for slides gives as "MeanMIL": one hidden layer, a linear patch classifier, the mean of its
    outputs.

    Choices: the mean is over logits, not over probabilities, so a task may mean by its outputs
    what it likes; the mean and the linear map commute, so features are averaged first (N times
    less work). The mean is over real patches alone.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width after the projection; None classifies the features as they are
            (a linear probe on the mean feature; ``act`` then has no effect).
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
        """Average each bag's patches and classify the average.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C) and a uniform attention_logits (B, 1, N): 0 on real patches, -inf on
            padding, so that a heatmap exists and says what this head does.
        """
        x_BNE = self.project(clear_padding(features, mask))
        count_B1 = mask.sum(dim=1, keepdim=True)
        slide_BE = clear_padding(x_BNE, mask).sum(dim=1) / count_B1
        flat_B1N = features.new_zeros(features.shape[0], 1, features.shape[1])
        return HeadOutput(self.classify(slide_BE), mask_logits(flat_B1N, mask))
