"""ABMIL: attention-based MIL pooling."""

from __future__ import annotations

from torch import Tensor, nn

from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding
from e2e.heads.layers import AttentionMLP, attention_pool, projection, xavier_init


@HEADS.register("abmil")
class ABMIL(Head):
    """Attention pooling of the projected patches h_n::

        h_n = Dropout(act(W LN(x_n)))
        a   = softmax_n( w . tanh(V h_n) )                      eq. 8, gated=False
        a   = softmax_n( w . (tanh(V h_n) * sigmoid(U h_n)) )   eq. 9, gated=True
        logits = W_c sum_n a_n h_n                              eq. 7

    Source: Ilse, Tomczak and Welling 2018, "Attention-based Deep Multiple Instance Learning",
    eq. 7-9, arXiv:1802.04712.

    Differs from the published code: the LayerNorm before the projection (``norm``); the projection
    and its dropout as in CLAM (arXiv:2004.09666), where the paper trains a
    small CNN; w has no bias, because the softmax cancels it; Xavier-normal weights; any number of
    outputs instead of one Bernoulli probability.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width E after the projection.
        attn_dim: hidden width of the attention MLP.
        gated: eq. 9 instead of eq. 8.
        dropout: probability, applied to the projected features.
        act: activation of the projection (gelu, relu, silu, tanh, none).
        norm: LayerNorm on the features, as ABMILX does (arXiv:2506.02408).
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int = 512,
        attn_dim: int = 128,
        gated: bool = True,
        dropout: float = 0.25,
        act: str = "relu",
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.project = projection(in_dim, embed_dim, act=act, dropout=dropout, norm=norm)
        self.score = AttentionMLP(embed_dim, attn_dim, act="tanh", gated=gated)
        self.classify = nn.Linear(embed_dim, num_outputs)
        xavier_init(self)

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Pool each bag into one vector and classify it.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C) and one attention map: attention_logits (B, 1, N).
        """
        x_BNE = self.project(clear_padding(features, mask))
        score_B1N = self.score(x_BNE).transpose(1, 2)
        slide_B1E, logits_B1N = attention_pool(score_B1N, mask, x_BNE.unsqueeze(1))
        return HeadOutput(self.classify(slide_B1E.squeeze(1)), logits_B1N)
