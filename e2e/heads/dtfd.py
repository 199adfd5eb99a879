"""DTFD-MIL: attention pooling of pseudo-bags, and of the features distilled from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HEADS, BagLoss, Head, HeadOutput, clear_padding, resolve_mask
from e2e.heads.layers import AttentionMLP, attention_pool, projection
from e2e.registry import did_you_mean

DISTILLATIONS = ("afs", "maxs", "maxmins")

NOT_SELECTED = -1e4
"""Log attention of patches without a part in tier 2: exp(-1e4) is 0, but the number is finite."""


def split_patches(mask: Tensor, pseudo_bags: int, *, shuffle: bool) -> Tensor:
    """Return (B, N) the pseudo-bag of each patch, counted from 0; meaningless on padding.

    The real patches of a bag are dealt out in turn, so that sizes differ by one at most, and a bag of fewer
    patches than ``pseudo_bags`` has one pseudo-bag for each patch.

    Parameters
    ----------
    mask : Tensor of shape (B, N)
        bool, True for real patches.
    pseudo_bags : int
        Number of pseudo-bags.
    shuffle : bool
        Deal in an order drawn from torch's generator of the device, instead of their own.
    """
    draw = torch.rand if shuffle else torch.zeros
    key_BN = draw(mask.shape, device=mask.device).masked_fill(~mask, 2.0)  # padding comes last
    return key_BN.argsort(dim=1, stable=True).argsort(dim=1) % pseudo_bags


def select_patches(instance_BNC: Tensor, member_BGN: Tensor, each: int, *, least: bool) -> Tensor:
    """Return (B, N) bool: the patches of every pseudo-bag that are most probable for the last class.

    They are ranked by the log-odds of the class. Their order is that of its probability, but rounding does
    not make them equal: with thousands of patches all probabilities are close to 1 / C.

    Parameters
    ----------
    instance_BNC : Tensor of shape (B, N, C)
        Instance logits.
    member_BGN : Tensor of shape (B, G, N)
        bool, whether a patch is in a pseudo-bag.
    each : int
        Number of patches from each pseudo-bag.
    least : bool
        Select the ``each`` least probable patches as well.
    """
    odds_BN = instance_BNC[..., -1]
    if instance_BNC.shape[-1] > 1:
        odds_BN = odds_BN - instance_BNC[..., :-1].logsumexp(dim=-1)
    selected_BGN = torch.zeros_like(member_BGN)
    for value_BN in (odds_BN, -odds_BN) if least else (odds_BN,):
        ranked_BGN = value_BN.unsqueeze(1).masked_fill(~member_BGN, float("-inf"))
        best_BGk = ranked_BGN.topk(min(each, value_BN.shape[1]), dim=-1).indices
        selected_BGN = selected_BGN.scatter(-1, best_BGk, True)
    return (selected_BGN & member_BGN).any(dim=1)


@HEADS.register("dtfd")
class DTFD(Head):
    """Two tiers of attention pooling: of pseudo-bags, then of the features distilled from them::

        h_n  = act(W x_n)
        a_n  = softmax_{n in g}( w . (tanh(V h_n) * sigmoid(U h_n)) )      tier 1, pseudo-bag g
        z_g  = sum_{n in g} a_n h_n;   s_g = W_1 z_g + b_1                 logits of g
        p_n  = softmax_c( W_1 a_n h_n )                                    of patch n
        d    = {z_g}                     afs, the features aggregated by attention
             | {h_n: p_n,C greatest}     maxs, the ``instances`` patches of each g
             | {h_n: p_n,C greatest or least}                              maxmins
        logits = W_2 sum_k b_k d_k + b_2,  b = softmax_k( the same form, own weights )   tier 2

    p_n is the paper's derivation: Grad-CAM of s_g with respect to the attended features K a_n h_n, whose
    mean over the K patches of g is z_g, is W_1 a_n h_n in closed form. Its C is the last output, the positive
    class of two; of several classes it favours the last, while ``afs`` favours none.

    Source: Zhang et al. 2022, "DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning
    for Histopathology Whole Slide Image Classification" (CVPR 2022), arXiv:2203.12081.

    The loss is the task's on the logits of the slide plus ``aux_loss``, the task's on the logits of every
    pseudo-bag with the target of the slide. One optimiser follows the gradient of the sum: tier 1 and the
    encoder learn from both. In the published code each tier has its own optimiser, and that of tier 2 holds
    the weights of tier 2 only, so its loss does not reach tier 1.

    In training the split is redrawn each time from torch's generator. In evaluation patch i goes to
    pseudo-bag i mod G, so that the result for a slide is deterministic. So in evaluation the order of
    patches matters, in training the draw. As for dropout, the draw depends on the shape of the batch.

    The attention map holds the weights with which patches enter the slide's vector: b_g a_n for afs, and
    otherwise b_n, which is 0 for patches that were not selected.

    Further differences from the published code: a random split in evaluation there; patches that are among
    both the greatest and the least (pseudo-bags of fewer than 2 ``instances``) count once, not twice; w has
    no bias, because the softmax cancels it. Weights start by PyTorch's defaults, as there.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int
        Width E after the projection.
    attn_dim : int
        Hidden width of both attention MLPs.
    pseudo_bags : int
        Number of pseudo-bags G; a bag of fewer patches has one for each patch.
    distill : str
        Features passed to tier 2: ``afs``, ``maxs`` or ``maxmins``.
    instances : int
        Number of patches selected from each pseudo-bag by ``maxs``, and from each end by ``maxmins``.
    gated : bool
        Use the sigmoid gate in both attention MLPs.
    dropout : float
        Dropout probability of the projected features; 0 in the published code.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features first.

    Raises
    ------
    UserError
        ``distill`` or ``act`` is unknown, or a number is below 1.
    """

    permutation_invariant = False
    aux_loss_needs = "task loss"

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
            raise UserError(f"unknown head.distill={distill}{did_you_mean(distill, DISTILLATIONS)}")
        if pseudo_bags < 1 or instances < 1:
            raise UserError(
                f"dtfd: head.pseudo_bags={pseudo_bags} and head.instances={instances} must be 1 or more"
            )
        self.pseudo_bags, self.distill, self.instances = pseudo_bags, distill, instances
        self.project = projection(
            in_dim, embed_dim, act=act, dropout=dropout, norm=norm, bias=False
        )
        self.score1, self.score2 = (
            AttentionMLP(embed_dim, attn_dim, act="tanh", gated=gated) for _ in range(2)
        )
        self.classify1, self.classify2 = (nn.Linear(embed_dim, num_outputs) for _ in range(2))

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Pool the pseudo-bags of each bag, then the features distilled from them.

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
            logits (B, C) of tier 2; attention_logits (B, 1, N), the log of the attention; instance_logits
            (B, N, C), whose softmax is p_n; aux: the logits (B, G, C) of the pseudo-bags, and (B, G) which
            of them exist.
        """
        mask = resolve_mask(features, mask)
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
            slide_BE, log_share_BG = self._pool_distilled(pseudo_BGE, exists_BG)
            attention_BN = log_share_BG.gather(1, group_BN) + log_weight_BN
        else:
            selected_BN = select_patches(
                instance_BNC.detach(), member_BGN, self.instances, least=self.distill == "maxmins"
            )
            slide_BE, log_share_BN = self._pool_distilled(x_BNE, selected_BN)
            attention_BN = log_share_BN.masked_fill(mask & ~selected_BN, NOT_SELECTED)
        return HeadOutput(
            self.classify2(slide_BE),
            attention_BN.unsqueeze(1),
            instance_BNC,
            {"logits": self.classify1(pseudo_BGE), "exists": exists_BG},
        )

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor:
        """Return the loss of tier 1: the task's, averaged over the pseudo-bags of each bag, then bags."""
        assert output.aux is not None
        logits_BGC, exists_BG = output.aux["logits"], output.aux["exists"]
        exact_BGC = logits_BGC.to(torch.promote_types(logits_BGC.dtype, torch.float32))
        each = target.repeat_interleave(exists_BG.shape[1], dim=0)
        loss_BG = loss(exact_BGC.flatten(0, 1), each).view_as(exists_BG)
        return ((loss_BG * exists_BG).sum(dim=1) / exists_BG.sum(dim=1)).mean()

    def _attend(self, x_BNE: Tensor, member_BGN: Tensor, exists_BG: Tensor) -> Tensor:
        """Return (B, G, N) the log attention of tier 1 in each pseudo-bag, -inf outside of it.

        A pseudo-bag that does not exist has arbitrary finite numbers, which are not used.
        """
        score_B1N = self.score1(x_BNE).transpose(1, 2)
        exact = score_B1N.to(torch.promote_types(score_B1N.dtype, torch.float32))
        inside_BGN = exact.masked_fill(~member_BGN, float("-inf"))
        return inside_BGN.masked_fill(~exists_BG.unsqueeze(-1), 0.0).log_softmax(dim=-1)

    def _class_activation(self, x_BNE: Tensor, weight_BN: Tensor) -> Tensor:
        """Return W_1 a_n h_n, (B, N, C), in at least float32: a_n is small, and patches are ranked by it."""
        with torch.autocast(x_BNE.device.type, enabled=False):
            score_BNC = F.linear(x_BNE.to(weight_BN.dtype), self.classify1.weight)
        return weight_BN.unsqueeze(-1) * score_BNC

    def _pool_distilled(self, x_BKE: Tensor, present_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled vector (B, E) of tier 2, and its log attention (B, K), -inf where absent."""
        score_B1K = self.score2(x_BKE).transpose(1, 2)
        slide_B1E, logits_B1K = attention_pool(score_B1K, present_BK, x_BKE.unsqueeze(1))
        return slide_B1E.squeeze(1), logits_B1K.log_softmax(dim=-1).squeeze(1)
