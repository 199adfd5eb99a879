"""DTFD-MIL: attention pooling of pseudo-bags, whose distilled features are pooled again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HEADS, BagLoss, Head, HeadOutput, clear_padding
from e2e.heads.layers import AttentionMLP, attention_pool, projection
from e2e.registry import suggest

DISTILLATIONS = ("afs", "maxs", "maxmins")

NOT_CHOSEN = -1e4
"""Log-attention of a patch that tier 2 does not see: exp(-1e4) is 0, yet it is a number."""


def split_patches(mask: Tensor, pseudo_bags: int, *, shuffle: bool) -> Tensor:
    """(B, N) the pseudo-bag of each patch, from 0; what padding gets means nothing.

    The real patches of a bag are dealt out in turn, in their order or, with ``shuffle``, in one
    drawn from torch's generator of the device. So sizes differ by one at most, and a bag of fewer
    patches than ``pseudo_bags`` has one pseudo-bag a patch.
    """
    draw = torch.rand if shuffle else torch.zeros
    key_BN = draw(mask.shape, device=mask.device).masked_fill(~mask, 2.0)  # padding comes last
    return key_BN.argsort(dim=1, stable=True).argsort(dim=1) % pseudo_bags


def choose_patches(instance_BNC: Tensor, member_BGN: Tensor, each: int, *, least: bool) -> Tensor:
    """(B, N) bool: ``each`` patches of every pseudo-bag most probable for the last class.

    With ``least`` the ``each`` least probable ones as well. Ranked by the log-odds
    of the class, whose order is that of its probability, but which rounding does not make equal:
    with thousands of patches all probabilities are near 1 / C.
    """
    odds_BN = instance_BNC[..., -1]
    if instance_BNC.shape[-1] > 1:
        odds_BN = odds_BN - instance_BNC[..., :-1].logsumexp(dim=-1)
    chosen_BGN = torch.zeros_like(member_BGN)
    for value_BN in (odds_BN, -odds_BN) if least else (odds_BN,):
        ranked_BGN = value_BN.unsqueeze(1).masked_fill(~member_BGN, float("-inf"))
        best_BGk = ranked_BGN.topk(min(each, value_BN.shape[1]), dim=-1).indices
        chosen_BGN = chosen_BGN.scatter(-1, best_BGk, True)
    return (chosen_BGN & member_BGN).any(dim=1)


@HEADS.register("dtfd")
class DTFD(Head):
    """Two tiers of attention pooling: of pseudo-bags, then of what is distilled from them::

        h_n  = act(W x_n)
        a_n  = softmax_{n in g}( w . (tanh(V h_n) * sigmoid(U h_n)) )      tier 1, pseudo-bag g
        z_g  = sum_{n in g} a_n h_n;   s_g = W_1 z_g + b_1                 logits of g
        p_n  = softmax_c( W_1 a_n h_n )                                    of patch n
        d    = {z_g}                     afs, the features that attention has aggregated
             | {h_n: p_n,C greatest}     maxs, the ``instances`` patches of each g
             | {h_n: p_n,C greatest or least}                              maxmins
        logits = W_2 sum_k b_k d_k + b_2,  b = softmax_k( the same form, own weights )   tier 2

    p_n is the paper's derivation: Grad-CAM of s_g with respect to the attended features
    K a_n h_n, whose mean over the K patches of g is z_g, is W_1 a_n h_n in closed form.
    Its C is the last output, the positive class of two; of several classes it favours the last,
    where ``afs`` favours none.

    Source: Zhang et al. 2022, "DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning
    for Histopathology Whole Slide Image Classification" (CVPR 2022), arXiv:2203.12081.

    The loss is the task's on the slide's logits plus ``aux_loss``, the task's on every pseudo-bag's
    logits with the slide's target, and one optimiser follows the gradient of the sum:
    tier 1 and the encoder learn from both. In the published code each tier has its own
    optimiser and that of tier 2 holds tier 2's weights alone, so its loss does not reach tier 1.

    In training the split is drawn anew each time, from torch's generator; in evaluation patch i goes
    to pseudo-bag i mod G, so that a slide's result is one number. So in evaluation the order of
    patches matters, in training the draw. Like dropout's, the draw depends on the shape of the batch.

    The attention map holds the weights by which patches enter the slide's vector: b_g a_n for afs, and
    for the others b_n, which is 0 for all patches that were not chosen.

    Differs from the published code, besides: a random split in evaluation there; patches that
    are among the greatest and the least (pseudo-bags under 2 ``instances``) count once, not twice;
    w has no bias, because the softmax cancels it. Weights start as PyTorch's layers do, as there.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width E after the projection.
        attn_dim: hidden width of both attention MLPs.
        pseudo_bags: G, how many a bag is split into; one a patch where there are fewer patches.
        distill: afs, maxs or maxmins.
        instances: patches of each pseudo-bag that maxs takes, and maxmins from each end.
        gated: whether the attention has the sigmoid gate.
        dropout: probability, applied to the projected features; none in the published code.
        act: activation of the projection (gelu, relu, silu, tanh, none).
        norm: LayerNorm on the features.

    Raises:
        UserError: ``distill`` or ``act`` is unknown, or a number is below 1.
    """

    order_free = False

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int = 512,
        attn_dim: int = 128,
        pseudo_bags: int = 4,
        distill: str = "afs",
        instances: int = 1,
        gated: bool = True,
        dropout: float = 0.0,
        act: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__()
        if distill not in DISTILLATIONS:
            raise UserError(f"dtfd has no distill '{distill}'{suggest(distill, DISTILLATIONS)}")
        if pseudo_bags < 1 or instances < 1:
            raise UserError(
                "dtfd needs pseudo_bags and instances of 1 or more, "
                f"found pseudo_bags={pseudo_bags} and instances={instances}"
            )
        self.pseudo_bags, self.distill, self.instances = pseudo_bags, distill, instances
        self.project = projection(
            in_dim, embed_dim, act=act, dropout=dropout, norm=norm, bias=False
        )
        self.score1, self.score2 = (
            AttentionMLP(embed_dim, attn_dim, act="tanh", gated=gated) for _ in range(2)
        )
        self.classify1, self.classify2 = (nn.Linear(embed_dim, num_outputs) for _ in range(2))

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Pool each bag's pseudo-bags, then what is distilled from them.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C) of tier 2; attention_logits (B, 1, N), the log of the attention; instance_logits
            (B, N, C), of which p_n is the softmax; aux: the logits (B, G, C) of the pseudo-bags and
            which of them exist (B, G).
        """
        x_BNE = self.project(clear_padding(features, mask))
        group_BN = split_patches(mask, self.pseudo_bags, shuffle=self.training)
        number_G1 = torch.arange(self.pseudo_bags, device=mask.device).unsqueeze(1)
        member_BGN = (group_BN.unsqueeze(1) == number_G1) & mask.unsqueeze(1)
        exists_BG = member_BGN.any(dim=-1)

        log_weight_BGN = self._attend(x_BNE, member_BGN, exists_BG)
        pseudo_BGE = torch.einsum("bgn,bne->bge", log_weight_BGN.exp().to(x_BNE.dtype), x_BNE)
        log_weight_BN = log_weight_BGN.gather(1, group_BN.unsqueeze(1)).squeeze(1)
        instance_BNC = self._class_activation(x_BNE, log_weight_BN.exp())

        if self.distill == "afs":
            slide_BE, log_share_BG = self._pool(pseudo_BGE, exists_BG)
            attention_BN = log_share_BG.gather(1, group_BN) + log_weight_BN
        else:
            chosen_BN = choose_patches(
                instance_BNC.detach(), member_BGN, self.instances, least=self.distill == "maxmins"
            )
            slide_BE, log_share_BN = self._pool(x_BNE, chosen_BN)
            attention_BN = log_share_BN.masked_fill(mask & ~chosen_BN, NOT_CHOSEN)
        return HeadOutput(
            self.classify2(slide_BE),
            attention_BN.unsqueeze(1),
            instance_BNC,
            {"logits": self.classify1(pseudo_BGE), "exists": exists_BG},
        )

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor:
        """Mean over bags of tier 1's loss, itself the mean of the task's over the bag's pseudo-bags."""
        assert output.aux is not None
        logits_BGC, exists_BG = output.aux["logits"], output.aux["exists"]
        exact_BGC = logits_BGC.to(torch.promote_types(logits_BGC.dtype, torch.float32))
        each = target.repeat_interleave(exists_BG.shape[1], dim=0)
        loss_BG = loss(exact_BGC.flatten(0, 1), each).view_as(exists_BG)
        return ((loss_BG * exists_BG).sum(dim=1) / exists_BG.sum(dim=1)).mean()

    def _attend(self, x_BNE: Tensor, member_BGN: Tensor, exists_BG: Tensor) -> Tensor:
        """Log of tier 1's attention within each pseudo-bag: (B, G, N), -inf outside it.

        One that does not exist has any finite numbers, and nobody counts it.
        """
        score_B1N = self.score1(x_BNE).transpose(1, 2)
        exact = score_B1N.to(torch.promote_types(score_B1N.dtype, torch.float32))
        inside_BGN = exact.masked_fill(~member_BGN, float("-inf"))
        return inside_BGN.masked_fill(~exists_BG.unsqueeze(-1), 0.0).log_softmax(dim=-1)

    def _class_activation(self, x_BNE: Tensor, weight_BN: Tensor) -> Tensor:
        """W_1 a_n h_n, (B, N, C), at least float32: a_n is small, and the patches are ranked by it."""
        with torch.autocast(x_BNE.device.type, enabled=False):
            score_BNC = F.linear(x_BNE.to(weight_BN.dtype), self.classify1.weight)
        return weight_BN.unsqueeze(-1) * score_BNC

    def _pool(self, x_BKE: Tensor, seen_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Tier 2: (B, E), and the log of its attention (B, K), -inf where not ``seen_BK``."""
        score_B1K = self.score2(x_BKE).transpose(1, 2)
        slide_B1E, logits_B1K = attention_pool(score_B1K, seen_BK, x_BKE.unsqueeze(1))
        return slide_B1E.squeeze(1), logits_B1K.log_softmax(dim=-1).squeeze(1)
