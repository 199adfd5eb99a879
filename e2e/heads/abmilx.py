"""ABMILX: multi-head attention pooling with scores that are smoothed over similar patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding, resolve_mask
from e2e.heads.layers import (
    AttentionMLP,
    attention_pool,
    check_heads,
    projection,
    xavier_init,
)


def smooth_scores(query: Tensor, key: Tensor, score: Tensor, mask: Tensor) -> Tensor:
    """Return U a, the scores averaged over similar patches, in memory linear in N::

        (U a)_i = sum_j exp(q_i.k_j / sqrt(d)) m_j a_j / sum_j exp(q_i.k_j / sqrt(d)) m_j

    This is scaled dot-product attention with the single number a_j as value. But all kernels that do not
    materialise U (B x H x N x N numbers) refuse a value of width 1, so it is padded to the width of the
    keys. There is no attention mask either, which the flash kernel on CUDA refuses: m_j is a second value
    channel, and the quotient of the two channels is exactly the masked softmax, since their common
    denominator cancels. Padding then has a weight of exactly 0. Its keys repeat a real key of the bag, so
    the divisor is at least 1 / N whatever the scores.

    float64 has a fused kernel on the CPU only; on CUDA it is materialised.

    Parameters
    ----------
    query : Tensor of shape (B, N, H, d)
        The q_i.
    key : Tensor of shape (B, N, H, d)
        The k_j; finite on padding.
    score : Tensor of shape (B, H, N)
        The a_j; finite on padding.
    mask : Tensor of shape (B, N)
        bool, True for real patches: the m_j.

    Returns
    -------
    Tensor of shape (B, H, N)
        On padding finite and meaningless.
    """
    dim = query.shape[-1]
    first_B = mask.int().argmax(dim=1)
    # Detached: a padded key has no influence, so it sends no gradient to the real one it repeats.
    real_key_BHd = key.detach()[torch.arange(len(key), device=key.device), first_B]
    key = torch.where(mask[:, :, None, None], key, real_key_BHd.unsqueeze(1))

    real_BHN = mask.unsqueeze(1).expand_as(score).to(query.dtype)
    value_BHN2 = torch.stack([score.to(query.dtype) * real_BHN, real_BHN], dim=-1)
    # Fused kernels on CUDA want widths in multiples of 8; zeros change no product.
    width = -(-dim // 8) * 8
    summed_BHNw = F.scaled_dot_product_attention(
        _widen(query.transpose(1, 2), width),
        _widen(key.transpose(1, 2), width),
        _widen(value_BHN2, width),
        scale=dim**-0.5,
    )
    total_BHN, divisor_BHN = summed_BHNw[..., :2].unbind(dim=-1)
    return total_BHN / divisor_BHN


def _widen(x: Tensor, width: int) -> Tensor:
    """Return x (..., d) padded with zeros to (..., width)."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class AttentionPlus(nn.Module):
    """G(a) = a + alpha * U a, with U = softmax_keys(q k^T / sqrt(d)) and [q | k] = W_qk LN(x).

    Parameters
    ----------
    dim : int
        Width of x.
    heads : int
        How many (q, k) pairs W_qk x holds; 1 if x has the channels of one head only.
    alpha : float
        Initial value of alpha.
    learn_alpha : bool
        Whether alpha is a parameter; otherwise it is a buffer, which is saved too.
    """

    def __init__(self, dim: int, heads: int, *, alpha: float, learn_alpha: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query_key = nn.Linear(dim, 2 * dim, bias=False)
        # One element rather than none: FSDP shards no zero-dimensional parameter.
        start = torch.full((1,), alpha)
        self.alpha: Tensor
        if learn_alpha:
            self.alpha = nn.Parameter(start)
        else:
            self.register_buffer("alpha", start)

    def forward(self, x_BNGd: Tensor, score_BHN: Tensor, mask: Tensor) -> Tensor:
        """Return the smoothed scores (B, H, N) of ``score_BHN``.

        x is (B, N, G, dim) with G groups of channels that share W_qk, and H = G * ``heads``.
        """
        pair = self.query_key(self.norm(x_BNGd)).unflatten(-1, (2, self.heads, -1))
        query_BNHd, key_BNHd = (part.flatten(2, 3) for part in pair.unbind(dim=3))
        smooth_BHN = smooth_scores(query_BNHd, key_BNHd, score_BHN, mask)
        return score_BHN + self.alpha * smooth_BHN


@HEADS.register("abmilx")
class ABMILX(Head):
    """Multi-head attention pooling with scores smoothed over similar patches::

        E   = Dropout(act(W_f LN(X)))                  (N, C), split in H heads H_j of width d = C/H
        a_j = w . GELU(W_1 H_j)                        one MLP for all heads
        U_j = softmax_keys( q_j k_j^T / sqrt(d) ),     [q_j | k_j] = W_qk LN(H_j), shared as well
        g_j = a_j + alpha U_j a_j
        z_j = softmax_N(g_j)^T H_j
        z   = W_p concat_j z_j;  z = z + FFN(z);  logits = W_c LN(z)

    The maps of ``attention_logits`` are the g_j of the H heads. Memory grows with N, not N^2: see
    :func:`smooth_scores`.

    Source: Tang et al. 2025, "Revisiting End-to-End Learning with Slide-level Supervision in
    Computational Pathology" (NeurIPS 2025), arXiv:2506.02408: the local attention, the attention
    propagation G and the pooling Z of its method section.

    Differences from the published code: padding is masked (there it receives attention); ``alpha`` sets the
    initial alpha (there it is a 1 x 1 Linear drawn from N(0, 1), so negative in every second run, which
    pushes similar patches apart); ``attn_dim`` is the width itself (there a total over heads, or a ratio);
    no BatchNorm; no dropout after W_p (disabled by default there). As there, the FFN has no LayerNorm of
    its own if ``norm`` is enabled. :class:`DAttentionX` has the options and outputs of the published code.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int
        Width C after the projection. In the paper 256 for TCGA-BRCA, 512 for PANDA.
    heads : int
        Number of attention heads H, a divisor of C. In the paper 8 for TCGA-BRCA, 4 for PANDA.
    dropout : float
        Dropout probability of E, and of the two branches of a gated MLP.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features and before the classifier.
    bias : bool
        Biases of W_f, W_p, W_c and of these two LayerNorms. The paper is better without.
    attn_bias : bool
        Biases of the attention MLP.
    attn_dim : int | None
        Hidden width of the attention MLP; None: the width of its input (d, or C if ``joint``).
    attention_plus : bool
        Smooth the scores with U; without it ``alpha`` has no effect.
    gated : bool
        Gate the attention MLP, GELU(V h) * sigmoid(U h): an ablation of the paper.
    joint : bool
        Compute the scores, queries and keys of all heads from all C channels.
    ffn : bool
        Use the FFN (C -> 4C -> C, GELU, with biases). In the paper better on PANDA, worse on TCGA-BRCA.
    alpha : float
        Initial alpha. The default is 1, because in the paper a fixed 1 beats a fixed 0 (TCGA-BRCA
        subtyping, AUC 92.84 against 91.58) and a learned alpha beats both (93.97), with an attention whose
        sparsity lies between the two; and at 0 W_qk would get no gradient at first.
    learn_alpha : bool
        Whether alpha is learned.

    Raises
    ------
    UserError
        ``heads`` does not divide ``embed_dim``, or ``act`` is unknown.
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int = 512,
        heads: int = 8,
        dropout: float = 0.25,
        act: str = "gelu",
        norm: bool = True,
        bias: bool = False,
        attn_bias: bool = False,
        attn_dim: int | None = None,
        attention_plus: bool = True,
        gated: bool = False,
        joint: bool = False,
        ffn: bool = False,
        alpha: float = 1.0,
        learn_alpha: bool = True,
    ) -> None:
        super().__init__()
        check_heads("abmilx", embed_dim, heads)
        self.heads = heads
        self.groups = 1 if joint else heads
        width = embed_dim // self.groups
        self.project = projection(in_dim, embed_dim, act=act, dropout=dropout, norm=norm, bias=bias)
        self.score = AttentionMLP(
            width,
            width if attn_dim is None else attn_dim,
            heads // self.groups,
            act="gelu",
            gated=gated,
            bias=attn_bias,
            score_bias=attn_bias,
            dropout=dropout if gated else 0.0,
        )
        self.attention_plus = (
            AttentionPlus(width, heads // self.groups, alpha=alpha, learn_alpha=learn_alpha)
            if attention_plus
            else None
        )
        self.merge = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.ffn = _ffn(embed_dim, norm=not norm) if ffn else None
        self.norm = nn.LayerNorm(embed_dim, bias=bias) if norm else nn.Identity()
        self.classify = nn.Linear(embed_dim, num_outputs, bias=bias)
        if attn_bias:
            # The rows of U sum to 1, so this bias shifts all scores of a head equally.
            self.zero_gradient_parameters = ("score.score.bias",)
        xavier_init(self)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Pool the patches of each bag with every attention head, and classify the result.

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
            logits (B, num_outputs) and attention_logits (B, H, N).
        """
        mask = resolve_mask(features, mask)
        _, slide_BC, logits_BHN = self.pool(features, mask)
        return HeadOutput(self.classify(slide_BC), logits_BHN)

    def pool(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projected patches (B, N, C), the bags' vectors (B, C) and the g_j (B, H, N).

        Parameters
        ----------
        features : Tensor of shape (B, N, D)
            Floating point.
        mask : Tensor of shape (B, N)
            bool, True for real patches.
        """
        x_BNC = self.project(clear_padding(features, mask))
        grouped_BNGd = x_BNC.unflatten(-1, (self.groups, -1))
        score_BHN = self.score(grouped_BNGd).flatten(2).transpose(1, 2)
        if self.attention_plus is not None:
            score_BHN = self.attention_plus(grouped_BNGd, score_BHN, mask)
        x_BHNd = x_BNC.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pooled_BHd, logits_BHN = attention_pool(score_BHN, mask, x_BHNd)
        slide_BC = self.merge(pooled_BHd.flatten(1))
        if self.ffn is not None:
            slide_BC = slide_BC + self.ffn(slide_BC)
        return x_BNC, self.norm(slide_BC), logits_BHN


class DAttentionX(nn.Module):
    """:class:`ABMILX` with the options and outputs of the ABMILX project's class of this name.

    For users of that project (arXiv:2506.02408): the constructor has its arguments and defaults, and
    ``forward`` returns plain tensors as it does. Differences: alpha starts at ``alpha`` instead of a
    draw from N(0, 1); padding can be masked; unknown arguments are errors; ``mil_norm="bn"``, which
    fails there, and ``proj_drop`` above 0 are not supported. ``sdpa_type`` and ``pad_v`` only choose
    a kernel there; they are accepted and have no effect, because memory is always linear in N.
    State dicts of that project do not fit.

    Parameters
    ----------
    input_dim : int
        Width of the features.
    n_classes : int
        Number of outputs.
    dropout : float
        Dropout probability of the projected features.
    act : str
        Activation after the projection.
    mil_norm : str | None
        ``ln``: LayerNorm on the features and before the classifier; None: neither.
    mil_bias : bool
        Biases of the projection, the merge of the heads, the classifier and the LayerNorms.
    inner_dim : int
        Width after the projection.
    n_heads : int
        Number of attention heads, a divisor of ``inner_dim``.
    proj_drop : float
        Must be 0.
    D : float | None
        Hidden width of the attention MLP. None: the width of its input. Above 10: the total over
        heads. Otherwise the ratio of input width to hidden width.
    attn_type : str
        ``mlp`` or ``mlp_gated``.
    attn_bias : bool
        Biases of the attention MLP.
    attn_plus : bool
        Smooth the scores over similar patches.
    ffn : bool
        Use the FFN.
    sdpa_type, pad_v
        Accepted without effect.
    attn_plus_embed_new : bool
        Compute the scores, queries and keys of all heads from all channels.
    alpha : float
        Initial alpha; not in that project.

    Raises
    ------
    UserError
        A value is not supported, or ``n_heads`` does not divide ``inner_dim``.

    Examples
    --------
    >>> import torch
    >>> from e2e.heads.abmilx import DAttentionX
    >>> model = DAttentionX(input_dim=1024, n_classes=2, n_heads=8, mil_bias=True, attn_bias=True)
    >>> model(torch.randn(1, 500, 1024)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        input_dim: int,
        n_classes: int,
        dropout: float = 0.25,
        act: str = "gelu",
        mil_norm: str | None = None,
        mil_bias: bool = False,
        inner_dim: int = 512,
        n_heads: int = 8,
        proj_drop: float = 0.0,
        D: float | None = None,
        attn_type: str = "mlp",
        attn_bias: bool = False,
        attn_plus: bool = True,
        ffn: bool = False,
        sdpa_type: str = "torch",
        pad_v: bool = False,
        attn_plus_embed_new: bool = False,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        if mil_norm not in (None, "ln"):
            raise UserError(f"DAttentionX: mil_norm={mil_norm!r} must be 'ln' or None")
        if attn_type not in ("mlp", "mlp_gated"):
            raise UserError(f"DAttentionX: attn_type={attn_type!r} must be 'mlp' or 'mlp_gated'")
        if proj_drop:
            raise UserError(f"DAttentionX: proj_drop={proj_drop} is not supported, set it to 0")
        check_heads("DAttentionX", inner_dim, n_heads)
        self.head = ABMILX(
            input_dim,
            n_classes,
            embed_dim=inner_dim,
            heads=n_heads,
            dropout=dropout,
            act=act,
            norm=mil_norm == "ln",
            bias=mil_bias,
            attn_bias=attn_bias,
            attn_dim=_attention_width(D, inner_dim, n_heads, joint=attn_plus_embed_new),
            attention_plus=attn_plus,
            gated=attn_type == "mlp_gated",
            joint=attn_plus_embed_new,
            ffn=ffn,
            alpha=alpha,
        )

    def forward(
        self,
        x: Tensor,
        return_attn: bool = False,
        return_act: bool = False,
        return_img_feat: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> Any:
        """Return the logits, and on request the attention, the projected patches and the bag's vector.

        Parameters
        ----------
        x : Tensor of shape (B, N, input_dim) or (N, input_dim)
            Features of bags, or of one bag.
        return_attn : bool
            Return the list [logits, attention], with the attention (B, n_heads, N) after the softmax.
        return_act : bool
            With ``return_attn``, append the projected patches (B, N, inner_dim) to this list.
        return_img_feat : bool
            Return [logits, vectors] in place of the logits, with the bags' vectors (B, inner_dim).
        mask : Tensor of shape (B, N), optional
            bool, True for real patches; None: all are real.

        Returns
        -------
        Tensor of shape (B, n_classes), or list
            The logits, unless one of the options asks for more.
        """
        features = x.unsqueeze(0) if x.dim() == 2 else x
        x_BNC, slide_BC, logits_BHN = self.head.pool(features, resolve_mask(features, mask))
        logits_BK = self.head.classify(slide_BC)
        result = [logits_BK, slide_BC] if return_img_feat else logits_BK
        if not return_attn:
            return result
        attention = [result, logits_BHN.softmax(dim=-1)]
        return [*attention, x_BNC] if return_act else attention


def _attention_width(
    width: float | None, inner_dim: int, n_heads: int, *, joint: bool
) -> int | None:
    """Return ``attn_dim`` for the option ``D`` of :class:`DAttentionX`."""
    if width is None:
        return None
    if width > 10:
        return int(width) if joint else int(width) // n_heads
    return int((inner_dim if joint else inner_dim // n_heads) // width)


def _ffn(dim: int, *, norm: bool) -> nn.Sequential:
    """Return dim -> 4 dim -> dim with GELU and biases, after a LayerNorm if ``norm``."""
    layers: list[nn.Module] = [nn.LayerNorm(dim)] if norm else []
    return nn.Sequential(*layers, nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
