"""ABMILX: multi-head attention pooling whose scores are smoothed over similar patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding
from e2e.heads.layers import AttentionMLP, attention_pool, projection, xavier_init


def smooth_scores(query: Tensor, key: Tensor, score: Tensor, mask: Tensor) -> Tensor:
    """U a, the scores averaged over similar patches, in memory linear in N::

        (U a)_i = sum_j exp(q_i.k_j / sqrt(d)) m_j a_j / sum_j exp(q_i.k_j / sqrt(d)) m_j

    This is scaled dot-product attention whose value is the one number a_j, but a value of width 1
    is refused by every kernel that does not write U (B x H x N x N numbers) out; so it is padded
    to the width of the keys. Nor is there an attention mask, which the flash kernel on CUDA
    refuses: m_j is a second value channel, and the quotient of the two channels is the masked
    softmax exactly, since their common denominator cancels. Padding then has weight exactly 0.
    Its keys repeat a real key of the bag, so the divisor is at least 1 / N whatever the scores.

    float64 has a fused kernel on the CPU only; on CUDA it is written out.

    Args:
        query: (B, N, H, d).
        key: (B, N, H, d); finite on padding.
        score: (B, H, N), the a above; finite on padding.
        mask: (B, N) bool, True where the patch is real.

    Returns:
        (B, H, N); on padding finite and without meaning.
    """
    dim = query.shape[-1]
    first_B = mask.int().argmax(dim=1)
    # Detached: a padded key has no influence, so the real one it repeats gets nothing through it.
    stand_in_BHd = key.detach()[torch.arange(len(key), device=key.device), first_B]
    key = torch.where(mask[:, :, None, None], key, stand_in_BHd.unsqueeze(1))

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
    """(..., d) -> (..., width), filled with zeros."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class AttentionPlus(nn.Module):
    """G(a) = a + alpha * U a, with U = softmax_keys(q k^T / sqrt(d)) and [q | k] = W_qk LN(x).

    Args:
        dim: width of x.
        heads: how many (q, k) pairs W_qk x holds; 1 when x is already one head's channels.
        alpha: start of alpha.
        learn_alpha: whether alpha is a parameter; otherwise a buffer, saved all the same.
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
        """Scores (B, H, N) -> (B, H, N).

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

    The maps of ``attention_logits`` are the H heads' g_j. Memory grows with N, not N^2: see
    ``smooth_scores``.

    Source: Tang et al. 2025, "Revisiting End-to-End Learning with Slide-level Supervision in
    Computational Pathology" (NeurIPS 2025), arXiv:2506.02408: the local attention, the attention
    propagation G and the pooling Z of its method section.

    Differs from the published code: padding is masked out (there it receives attention); alpha is
    a number that starts where you say (there a Xavier-drawn 1 x 1 Linear, N(0, 1), so negative in
    every second run, which pushes similar patches apart); ``attn_dim`` is the width itself (there
    a total over heads, or a ratio); no BatchNorm; no dropout after W_p (off there by default).
    As there, the FFN's own LayerNorm is dropped when ``norm`` is on.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: the task's outputs.
        embed_dim: C. The paper's choice: 256 for TCGA-BRCA, 512 for PANDA.
        heads: H, which divides C. The paper's choice: 8 for TCGA-BRCA, 4 for PANDA.
        dropout: probability on E, and in the two branches of a gated MLP.
        act: activation of the projection (gelu, relu, silu, tanh, none).
        norm: LayerNorm on the features and before the classifier.
        bias: of W_f, W_p, W_c and these two LayerNorms. The paper finds none better.
        attn_bias: of the attention MLP.
        attn_dim: hidden width of the attention MLP; None: its input's width (d, or C if joint).
        attention_plus: whether there is U; without it alpha has no effect.
        gated: gate the attention MLP, GELU(V h) * sigmoid(U h): an ablation.
        joint: scores, queries and keys of all heads come from all C channels.
        ffn: whether there is the FFN (C -> 4C -> C, GELU, with biases). Better on PANDA, worse on
            TCGA-BRCA in the paper.
        alpha: its start. 1, because in the paper a fixed 1 beats a fixed 0 (TCGA-BRCA subtyping
            92.84 against 91.58 AUC) and a learned alpha beats both (93.97), ending, by the sparsity
            of its attention, between the two; and at 0 no gradient would reach W_qk at first.
        learn_alpha: whether alpha is learned.

    Raises:
        UserError: ``heads`` does not divide ``embed_dim``, or ``act`` is unknown.
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
        if heads < 1 or embed_dim % heads:
            raise UserError(
                f"abmilx cannot split embed_dim={embed_dim} into heads={heads}\n"
                f"  choose heads among {[h for h in range(1, 65) if embed_dim % h == 0]}"
            )
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
            # The rows of U sum to 1, so this bias moves all scores of a head alike.
            self.zero_gradient = ("score.score.bias",)
        xavier_init(self)

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Pool each bag's patches, head by head, and classify the result.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, num_outputs) and attention_logits (B, H, N).
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
        return HeadOutput(self.classify(self.norm(slide_BC)), logits_BHN)


def _ffn(dim: int, *, norm: bool) -> nn.Sequential:
    """dim -> 4 dim -> dim with GELU and biases, behind a LayerNorm if ``norm``."""
    layers: list[nn.Module] = [nn.LayerNorm(dim)] if norm else []
    return nn.Sequential(*layers, nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
