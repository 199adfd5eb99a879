"""Mean pooling: all patches have the same weight."""

from __future__ import annotations

from torch import Tensor, nn

from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding, mask_logits, resolve_mask
from e2e.heads.layers import projection, xavier_init


@HEADS.register("mean")
class MeanMIL(Head):
    """Mean pooling: logits = mean_n W_c h_n = W_c mean_n h_n, with h_n = Dropout(act(W [LN] x_n)).

    Source: the instance-space mean of Wang et al. 2018, "Revisiting Multiple Instance Neural
    Networks" (mi-Net with the mean), arXiv:1610.02501, in the form known as "MeanMIL" in MIL code for
    slides: one hidden layer, a linear patch classifier, the mean of its outputs.

    The mean is over logits, not over probabilities, so the outputs can mean anything to the task. Mean and
    linear map commute, so features are averaged first (N times less work). The mean is over real patches
    only.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int | None
        Width after the projection; None classifies the features as they are (a linear probe on the mean
        feature; ``act`` has no effect then).
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
        """Average each bag's patches and classify the average.

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
            logits (B, C) and a uniform attention_logits (B, 1, N): 0 on real patches, -inf on
            padding, so that its heatmap shows what this head does.
        """
        mask = resolve_mask(features, mask)
        x_BNE = self.project(clear_padding(features, mask))
        count_B1 = mask.sum(dim=1, keepdim=True)
        slide_BE = clear_padding(x_BNE, mask).sum(dim=1) / count_B1
        flat_B1N = features.new_zeros(features.shape[0], 1, features.shape[1])
        return HeadOutput(self.classify(slide_BE), mask_logits(flat_B1N, mask))
