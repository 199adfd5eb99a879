"""CLAM: attention pooling whose most and least attended patches train patch classifiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import (
    HEADS,
    BagLoss,
    Head,
    HeadOutput,
    class_membership,
    clear_padding,
    mask_logits,
)
from e2e.heads.layers import AttentionMLP, projection, xavier_init
from e2e.registry import suggest

MARGINS = {"svm": 1.0, "ce": 0.0}
"""Instance loss -> alpha, by how much the score of a patch's cluster has to lead."""


@HEADS.register("clam_sb")
class ClamSB(Head):
    """CLAM with a single attention branch, shared by all classes::

        h_n = Dropout(act(W x_n))
        a   = softmax_n( w . (tanh(V h_n) * sigmoid(U h_n)) )
        logits = W_c sum_n a_n h_n
        s_mn = W_m h_n                       two scores of patch n for class m: against, for it

    The patches that class m's attention ranks highest and lowest get a pseudo-label for its patch
    classifier W_m: with K patches taken at each end of a bag of N, K = min(k_sample, N // 2),

        the slide's own class   K highest -> 1 and K lowest -> 0, mean over the 2 K
        any other class         K highest -> 0, mean over the K; with ``subtyping`` alone

    ``subtyping`` then takes the mean over the C classes. The loss of a patch of cluster y is the
    smooth top-1 SVM at tau = 1, log sum_j exp(s_j + alpha [j != y]) - s_y with alpha = 1, or the
    cross-entropy, which is alpha = 0; for two scores both are -logsigmoid(s_y - s_other - alpha).
    No gradient flows from it into the attention, which only ranks.

    The paper minimises 0.7 bag loss + 0.3 instance loss. Here the bag loss is the task's, with
    weight 1, so ``instance_weight`` is the quotient of the two; its default, 3/7, is the paper's
    objective divided by 0.7.

    K never lets a patch be evidence both for and against, ties of attention included; a bag of
    one patch has no instance loss. With one output, that output is class 1, and slides of class 0
    are slides of another class. A slide without a label (a negative class number) has no instance
    loss and still counts in the mean over bags. Targets that are no class numbers (survival,
    regression, many labels at once) say of no patch which class it is evidence for: ``aux_loss``
    refuses them; ``instance_weight=0`` leaves the patch classifiers out and takes any target.

    Source: Lu et al. 2021, "Data-efficient and weakly supervised computational pathology on
    whole-slide images", Nature Biomedical Engineering 5, arXiv:2004.09666, Methods; the smooth SVM
    from Berrada, Zisserman and Kumar 2018, "Smooth Loss Functions for Deep Top-k Classification",
    arXiv:1802.07595.

    Differs from the published code: batches of bags; bags of fewer than 2 ``k_sample`` patches; w
    has no bias, because the softmax cancels it.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width E after the projection.
        attn_dim: hidden width of the attention MLP.
        dropout: probability, on the projected features and both branches of the attention MLP.
        act: activation of the projection (gelu, relu, silu, tanh, none).
        norm: LayerNorm on the features.
        k_sample: most patches taken at each end of the ranking (B in the paper).
        instance_loss: svm or ce.
        instance_weight: of the instance loss, where the bag loss has 1.
        subtyping: the classes exclude each other in every patch, so that what speaks for the
            slide's class speaks against the others. Not so for tumour against normal.

    Raises:
        UserError: an unknown ``instance_loss`` or ``act``, ``k_sample`` under 1, a negative
            ``instance_weight``.
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int = 512,
        attn_dim: int = 256,
        dropout: float = 0.25,
        act: str = "relu",
        norm: bool = False,
        k_sample: int = 8,
        instance_loss: str = "svm",
        instance_weight: float = 3 / 7,
        subtyping: bool = False,
    ) -> None:
        super().__init__()
        if instance_loss not in MARGINS:
            raise UserError(
                f"unknown instance_loss '{instance_loss}'{suggest(instance_loss, MARGINS)}"
            )
        if k_sample < 1 or not instance_weight >= 0:
            raise UserError(
                "CLAM needs k_sample >= 1 and instance_weight >= 0, "
                f"found {k_sample} and {instance_weight}"
            )
        self.k_sample = k_sample
        self.margin = MARGINS[instance_loss]
        self.instance_weight = instance_weight
        self.subtyping = subtyping
        self.project = projection(in_dim, embed_dim, act=act, dropout=dropout, norm=norm)
        maps = self._maps(num_outputs)
        self.score = AttentionMLP(embed_dim, attn_dim, maps, gated=True, dropout=dropout)
        self.classify = nn.Linear(embed_dim, num_outputs)
        # Rows 2 m and 2 m + 1 are W_m.
        self.cluster = nn.Linear(embed_dim, 2 * num_outputs) if instance_weight else None
        xavier_init(self)

    def _maps(self, num_outputs: int) -> int:
        return 1

    def _bag_logits(self, slide_BAE: Tensor) -> Tensor:
        return self.classify(slide_BAE).squeeze(1)

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Pool each bag, classify it, and score its patches for every class.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C); attention_logits (B, A, N), with one map (``clam_sb``) or C maps, map m
            that of class m (``clam_mb``); instance_logits (B, N, C), the log-odds s_m1 - s_m0 that
            a patch is evidence for class m, without ``instance_weight`` None.
        """
        x_BNE = self.project(clear_padding(features, mask))
        logits_BAN = mask_logits(self.score(x_BNE).transpose(1, 2), mask)
        slide_BAE = logits_BAN.softmax(dim=-1).to(x_BNE.dtype) @ x_BNE
        logits_BC = self._bag_logits(slide_BAE)
        class_maps = self._maps(logits_BC.shape[1]) > 1
        if self.cluster is None:
            return HeadOutput(logits_BC, logits_BAN, class_maps=class_maps)
        pair_BNC2 = self.cluster(x_BNE).to(logits_BAN.dtype).unflatten(-1, (-1, 2))
        odds_BNC = pair_BNC2[..., 1] - pair_BNC2[..., 0]
        aux = evidence(odds_BNC.transpose(1, 2), logits_BAN, mask, self.k_sample)
        return HeadOutput(logits_BC, logits_BAN, odds_BNC, aux, class_maps)

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor | None:
        """``instance_weight`` times the instance loss, mean over bags; None if that weight is 0.

        Args:
            output: of ``forward``.
            target: (B,) class numbers; negative where there is no label.
            loss: unused.

        Raises:
            UserError: the target is no class number.
        """
        if output.aux is None:
            return None
        highest_BCK, lowest_BCK, share_BK = (output.aux[k] for k in ("highest", "lowest", "share"))
        share_B1K = share_BK.unsqueeze(1)
        count = highest_BCK.shape[1]
        own_BC = class_membership(
            target, count, loss="CLAM's instance loss", without="head.instance_weight=0"
        )
        both_BCK = self._cost(highest_BCK) + self._cost(-lowest_BCK)
        loss_BC = own_BC * (both_BCK * share_B1K).sum(dim=-1) / 2
        if self.subtyping:
            other_BC = ~own_BC & (target >= 0).unsqueeze(1)
            against_BC = (self._cost(-highest_BCK) * share_B1K).sum(dim=-1)
            loss_BC = (loss_BC + other_BC * against_BC) / count
        return self.instance_weight * loss_BC.sum(dim=1).mean()

    def _cost(self, lead: Tensor) -> Tensor:
        """Loss of patches whose own cluster's score leads by ``lead``."""
        return -F.logsigmoid(lead - self.margin)


def evidence(odds_BCN: Tensor, attention_BAN: Tensor, mask: Tensor, k: int) -> dict[str, Tensor]:
    """What the patches at both ends of each class's attention ranking say.

    Args:
        odds_BCN: log-odds that a patch is evidence for a class.
        attention_BAN: attention logits, -inf on padding; one map, or one for each class.
        mask: (B, N) bool, True where the patch is real.
        k: most patches at each end.

    Returns:
        ``highest`` and ``lowest``, (B, C, k): log-odds of the patches, from the end inwards;
        ``share``, (B, k): 1 / K for the first K = min(k, N // 2), 0 for the others.
    """
    # One ranking for both ends, so that they are disjoint where scores tie, as they do in bf16.
    order_BAN = attention_BAN.argsort(dim=-1, descending=True, stable=True)
    count_B1 = mask.sum(dim=1, keepdim=True)
    first_BK = torch.minimum(torch.arange(k, device=mask.device), count_B1 - 1)
    maps, classes = attention_BAN.shape[1], odds_BCN.shape[1]

    def at(place_BK: Tensor) -> Tensor:
        patch_BAK = order_BAN.gather(2, place_BK.unsqueeze(1).expand(-1, maps, -1))
        return odds_BCN.gather(2, patch_BAK.expand(-1, classes, -1))

    taken_B1 = (count_B1 // 2).clamp(max=k)
    used_BK = torch.arange(k, device=mask.device) < taken_B1
    return {
        "highest": at(first_BK),
        "lowest": at(count_B1 - 1 - first_BK),
        "share": used_BK.to(odds_BCN.dtype) / taken_B1.clamp(min=1),
    }


@HEADS.register("clam_mb")
class ClamMB(ClamSB):
    """CLAM with an attention branch for each class m, all on one gated layer::

        a_m     = softmax_n( w_m . (tanh(V h_n) * sigmoid(U h_n)) )
        logit_m = W_cm . sum_n a_mn h_n

    The patches of class m's instance loss are ranked by a_m. All else, options included, is as in
    :class:`ClamSB`.
    """

    def _maps(self, num_outputs: int) -> int:
        return num_outputs

    def _bag_logits(self, slide_BAE: Tensor) -> Tensor:
        # Every classifier on every class's vector, of which its own is kept: C x C numbers.
        return self.classify(slide_BAE).diagonal(dim1=1, dim2=2)
