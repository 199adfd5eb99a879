"""ABMIL: attention-based MIL pooling."""

from __future__ import annotations

from torch import Tensor, nn

from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding, resolve_mask
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

    Differences from the published code: a LayerNorm before the projection (``norm``); the projection and
    its dropout are those of CLAM (arXiv:2004.09666), where the paper trains a small CNN; w has no bias,
    because the softmax cancels it; Xavier-normal weights; any number of outputs instead of one Bernoulli
    probability.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int
        Width E after the projection.
    attn_dim : int
        Hidden width of the attention MLP.
    gated : bool
        Gated attention (eq. 9) instead of eq. 8.
    dropout : float
        Dropout probability of the projected features.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features first, as ABMILX does (arXiv:2506.02408).

    Raises
    ------
    UserError
        A width is below 1, or ``act`` is unknown.

    Examples
    --------
    >>> import torch
    >>> from e2e.heads.abmil import ABMIL
    >>> head = ABMIL(1024, 2)
    >>> output = head(torch.randn(1, 500, 1024))
    >>> output.logits.shape, output.attention().shape
    (torch.Size([1, 2]), torch.Size([1, 1, 500]))
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

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Pool each bag into one vector and classify it.

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
            logits (B, C), and attention_logits (B, 1, N) with one map.
        """
        mask = resolve_mask(features, mask)
        x_BNE = self.project(clear_padding(features, mask))
        score_B1N = self.score(x_BNE).transpose(1, 2)
        slide_B1E, logits_B1N = attention_pool(score_B1N, mask, x_BNE.unsqueeze(1))
        return HeadOutput(self.classify(slide_B1E.squeeze(1)), logits_B1N)
