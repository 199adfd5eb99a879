"""MHA: one learned query attends to the patches through several heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding
from e2e.heads.layers import attention_pool, projection


@HEADS.register("mha")
class MHA(Head):
    """Multi-head attention with one learned query q, over projected patches h_n::

        h_n    = act(W x_n)                                  no bias
        a_n    = (W_q q + b_q)_j . (W_k h_n + b_k)_j / sqrt(E/H)           for each head j
        z_j    = sum_n softmax_n(a_n) (W_v h_n + b_v)_j
        logits = W_c LN(Dropout(W_o concat_j z_j + b_o))     no residual

    One query costs H N numbers of attention, so the logits are written out, not fused away.

    Source: the "mha" model of AEM, Zhang et al. 2024, "AEM: Attention Entropy Maximization for
    Multiple Instance Learning based Whole Slide Image Classification", arXiv:2406.15303; the
    attention is that of Vaswani et al. 2017, eq. 1, arXiv:1706.03762.

    The start is the published one: q from N(0, 1e-6^2) and PyTorch's defaults for the rest. What
    looks at the patches at first is therefore b_q; with zero biases the attention would start flat
    and W_k would get next to no gradient. b_k moves all scores of a head alike, so its gradient is
    zero; it is kept because the published model has it.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width E after the projection. Published: 128 for 384 features, else half of
            them (256 for 512, 384 for 768, 512 for 1,024).
        heads: H, which divides E.
        dropout: probability, applied to the pooled vector.
        act: activation of the projection (gelu, relu, silu, tanh, none).

    Raises:
        UserError: ``heads`` does not divide ``embed_dim``, or ``act`` is unknown.
    """

    zero_gradient = ("key.bias",)

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int = 256,
        heads: int = 8,
        dropout: float = 0.1,
        act: str = "relu",
    ) -> None:
        super().__init__()
        if heads < 1 or embed_dim % heads:
            raise UserError(
                f"mha cannot split embed_dim={embed_dim} into heads={heads}\n"
                f"  choose heads among {[h for h in range(1, 65) if embed_dim % h == 0]}"
            )
        self.heads = heads
        self.project = projection(in_dim, embed_dim, act=act, dropout=0.0, norm=False, bias=False)
        self.token = nn.Parameter(torch.empty(embed_dim))
        nn.init.normal_(self.token, std=1e-6)
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.merge = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.classify = nn.Linear(embed_dim, num_outputs)

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Pool each bag head by head, merge the heads and classify the result.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C) and one attention map a head: attention_logits (B, H, N).
        """
        x_BNE = self.project(clear_padding(features, mask))
        query_Hd = self.query(self.token).unflatten(-1, (self.heads, -1))
        key_BNHd = self.key(x_BNE).unflatten(-1, (self.heads, -1))
        value_BNHd = self.value(x_BNE).unflatten(-1, (self.heads, -1))
        score_BHN = torch.einsum("hd,bnhd->bhn", query_Hd * query_Hd.shape[-1] ** -0.5, key_BNHd)
        pooled_BHd, logits_BHN = attention_pool(score_BHN, mask, value_BNHd.transpose(1, 2))
        slide_BE = self.dropout(self.merge(pooled_BHd.flatten(1)))
        return HeadOutput(self.classify(self.norm(slide_BE)), logits_BHN)
