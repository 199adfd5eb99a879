"""MHA: multi-head attention of one learned query to the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding, resolve_mask
from e2e.heads.layers import attention_pool, check_heads, projection


@HEADS.register("mha")
class MHA(Head):
    """Multi-head attention with one learned query q, over projected patches h_n::

        h_n    = act(W x_n)                                  no bias
        a_n    = (W_q q + b_q)_j . (W_k h_n + b_k)_j / sqrt(E/H)           for each head j
        z_j    = sum_n softmax_n(a_n) (W_v h_n + b_v)_j
        logits = W_c LN(Dropout(W_o concat_j z_j + b_o))     no residual

    With one query the attention has only H N numbers, so the logits are materialised and returned.

    Source: the "mha" model of AEM, Zhang et al. 2024, "AEM: Attention Entropy Maximization for
    Multiple Instance Learning based Whole Slide Image Classification", arXiv:2406.15303; the
    attention is that of Vaswani et al. 2017, eq. 1, arXiv:1706.03762.

    Weights start as published: q from N(0, 1e-6^2), the others by PyTorch's defaults. The initial attention
    therefore comes from b_q; with zero biases it would start uniform, and W_k would get almost no
    gradient. b_k shifts all scores of a head equally, so its gradient is zero; it is kept because the
    published model has it.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int
        Width E after the projection. Published: 128 for features of width 384, otherwise half the width of
        the features (256 for 512, 384 for 768, 512 for 1,024).
    heads : int
        Number of attention heads H, a divisor of E.
    dropout : float
        Dropout probability of the pooled vector.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.

    Raises
    ------
    UserError
        ``heads`` does not divide ``embed_dim``, or ``act`` is unknown.
    """

    zero_gradient_parameters = ("key.bias",)

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
        check_heads("mha", embed_dim, heads)
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

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Pool each bag head by head, merge the heads and classify the result.

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
            logits (B, C), and attention_logits (B, H, N) with one map for each head.
        """
        mask = resolve_mask(features, mask)
        x_BNE = self.project(clear_padding(features, mask))
        query_Hd = self.query(self.token).unflatten(-1, (self.heads, -1))
        key_BNHd = self.key(x_BNE).unflatten(-1, (self.heads, -1))
        value_BNHd = self.value(x_BNE).unflatten(-1, (self.heads, -1))
        score_BHN = torch.einsum("hd,bnhd->bhn", query_Hd * query_Hd.shape[-1] ** -0.5, key_BNHd)
        pooled_BHd, logits_BHN = attention_pool(score_BHN, mask, value_BNHd.transpose(1, 2))
        slide_BE = self.dropout(self.merge(pooled_BHd.flatten(1)))
        return HeadOutput(self.classify(self.norm(slide_BE)), logits_BHN)
