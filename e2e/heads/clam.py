"""CLAM: attention pooling, with patch classifiers trained on the most and least attended patches."""

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
    resolve_mask,
)
from e2e.heads.layers import AttentionMLP, projection, xavier_init
from e2e.registry import did_you_mean

MARGINS = {"svm": 1.0, "ce": 0.0}
"""Instance loss -> alpha, the margin by which the score of the patch's cluster has to lead."""


@HEADS.register("clam_sb")
class ClamSB(Head):
    """CLAM with a single attention branch, shared by all classes::

        h_n = Dropout(act(W x_n))
        a   = softmax_n( w . (tanh(V h_n) * sigmoid(U h_n)) )
        logits = W_c sum_n a_n h_n
        s_mn = W_m h_n                       two scores of patch n for class m: against it, for it

    The patches with the highest and lowest attention of class m get a pseudo-label for its patch classifier
    W_m. With K patches from each end of a bag of N, K = min(k_sample, N // 2):

        the slide's class   K highest -> 1 and K lowest -> 0, mean over the 2 K
        any other class     K highest -> 0, mean over the K; with ``subtyping`` only

    ``subtyping`` then takes the mean over the C classes. The loss of a patch of cluster y is the smooth
    top-1 SVM at tau = 1, log sum_j exp(s_j + alpha [j != y]) - s_y with alpha = 1, or the cross-entropy,
    which is alpha = 0; for two scores both are -logsigmoid(s_y - s_other - alpha). It sends no gradient into
    the attention, which only ranks.

    The paper minimises 0.7 bag loss + 0.3 instance loss. Here the bag loss is the task's with weight 1, so
    ``instance_weight`` is the ratio of the two; its default, 3/7, is the paper's objective divided by 0.7.

    K is such that no patch is evidence both for and against, even if attention ties; a bag of one patch has
    no instance loss. With one output, that output is class 1, and slides of class 0 are slides of another
    class. A slide without a label (a negative class number) has no instance loss and still counts in the
    mean over bags. Targets that are not class numbers (survival, regression, multi-label) do not say which
    class a patch is evidence for: ``aux_loss`` refuses them. ``instance_weight=0`` removes the patch
    classifiers and accepts any target.

    Source: Lu et al. 2021, "Data-efficient and weakly supervised computational pathology on
    whole-slide images", Nature Biomedical Engineering 5, arXiv:2004.09666, Methods; the smooth SVM
    from Berrada, Zisserman and Kumar 2018, "Smooth Loss Functions for Deep Top-k Classification",
    arXiv:1802.07595.

    Differences from the published code: batches of bags; bags of fewer than 2 ``k_sample`` patches; w
    has no bias, because the softmax cancels it.

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
    dropout : float
        Dropout probability of the projected features and of both branches of the attention MLP.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features first.
    k_sample : int
        Largest number of patches taken from each end of the ranking (B in the paper).
    instance_loss : str
        Loss of the patch classifiers: ``svm`` or ``ce``.
    instance_weight : float
        Weight of the instance loss, where the task's loss has 1; 0 disables it.
    subtyping : bool
        Whether the classes exclude each other in every patch, so that evidence for the slide's class is
        evidence against the others. True for subtypes of a tumour, False for tumour against normal.

    Raises
    ------
    UserError
        ``instance_loss`` or ``act`` is unknown, ``k_sample`` is below 1, or ``instance_weight`` negative.
    """

    aux_loss_needs = "class number"

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
                f"unknown head.instance_loss={instance_loss}{did_you_mean(instance_loss, MARGINS)}"
            )
        if k_sample < 1 or not instance_weight >= 0:
            raise UserError(
                f"CLAM: head.k_sample={k_sample} must be 1 or more, and "
                f"head.instance_weight={instance_weight:g} 0 or more"
            )
        self.k_sample = k_sample
        self.margin = MARGINS[instance_loss]
        self.instance_weight = instance_weight
        self.subtyping = subtyping
        self.project = projection(in_dim, embed_dim, act=act, dropout=dropout, norm=norm)
        maps = self._num_maps(num_outputs)
        self.score = AttentionMLP(embed_dim, attn_dim, maps, gated=True, dropout=dropout)
        self.classify = nn.Linear(embed_dim, num_outputs)
        # Rows 2 m and 2 m + 1 are W_m.
        self.cluster = nn.Linear(embed_dim, 2 * num_outputs) if instance_weight else None
        xavier_init(self)

    def _num_maps(self, num_outputs: int) -> int:
        return 1

    def _bag_logits(self, slide_BAE: Tensor) -> Tensor:
        return self.classify(slide_BAE).squeeze(1)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Pool each bag, classify it, and score its patches for every class.

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
            logits (B, C); attention_logits (B, A, N), with one map (``clam_sb``) or one for each class
            (``clam_mb``); instance_logits (B, N, C), the log-odds s_m1 - s_m0 that a patch is evidence
            for class m, or None if ``instance_weight`` is 0.
        """
        mask = resolve_mask(features, mask)
        x_BNE = self.project(clear_padding(features, mask))
        logits_BAN = mask_logits(self.score(x_BNE).transpose(1, 2), mask)
        slide_BAE = logits_BAN.softmax(dim=-1).to(x_BNE.dtype) @ x_BNE
        logits_BC = self._bag_logits(slide_BAE)
        class_maps = self._num_maps(logits_BC.shape[1]) > 1
        if self.cluster is None:
            return HeadOutput(logits_BC, logits_BAN, class_maps=class_maps)
        pair_BNC2 = self.cluster(x_BNE).to(logits_BAN.dtype).unflatten(-1, (-1, 2))
        odds_BNC = pair_BNC2[..., 1] - pair_BNC2[..., 0]
        aux = evidence(odds_BNC.transpose(1, 2), logits_BAN, mask, self.k_sample)
        return HeadOutput(logits_BC, logits_BAN, odds_BNC, aux, class_maps)

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor | None:
        """Return ``instance_weight`` times the instance loss, a mean over bags; None if the weight is 0.

        Parameters
        ----------
        output : HeadOutput
            Of ``forward``.
        target : Tensor
            (B,) class numbers; negative where there is no label.
        loss : BagLoss
            Unused.

        Raises
        ------
        UserError
            The target is no class number.
        """
        if output.aux is None:
            return None
        highest_BCK, lowest_BCK, share_BK = (output.aux[k] for k in ("highest", "lowest", "share"))
        share_B1K = share_BK.unsqueeze(1)
        count = highest_BCK.shape[1]
        is_member_BC = class_membership(
            target, count, loss_name="CLAM's instance loss", disable_with="head.instance_weight=0"
        )
        both_BCK = self._margin_loss(highest_BCK) + self._margin_loss(-lowest_BCK)
        loss_BC = is_member_BC * (both_BCK * share_B1K).sum(dim=-1) / 2
        if self.subtyping:
            other_BC = ~is_member_BC & (target >= 0).unsqueeze(1)
            against_BC = (self._margin_loss(-highest_BCK) * share_B1K).sum(dim=-1)
            loss_BC = (loss_BC + other_BC * against_BC) / count
        return self.instance_weight * loss_BC.sum(dim=1).mean()

    def _margin_loss(self, lead: Tensor) -> Tensor:
        """Return the loss of patches for which the score of their cluster leads by ``lead``."""
        return -F.logsigmoid(lead - self.margin)


def evidence(odds_BCN: Tensor, attention_BAN: Tensor, mask: Tensor, k: int) -> dict[str, Tensor]:
    """Return the log-odds of the patches at both ends of the attention ranking of each class.

    Parameters
    ----------
    odds_BCN : Tensor of shape (B, C, N)
        Log-odds that a patch is evidence for a class.
    attention_BAN : Tensor of shape (B, A, N)
        Attention logits, -inf on padding; one map, or one for each class.
    mask : Tensor of shape (B, N)
        bool, True for real patches.
    k : int
        Largest number of patches at each end.

    Returns
    -------
    dict of str to Tensor
        ``highest`` and ``lowest``, (B, C, k): log-odds of the patches, from the end inwards;
        ``share``, (B, k): 1 / K for the first K = min(k, N // 2), 0 for the others.
    """
    # One ranking for both ends, so that they are disjoint where scores tie, as they do in bf16.
    order_BAN = attention_BAN.argsort(dim=-1, descending=True, stable=True)
    count_B1 = mask.sum(dim=1, keepdim=True)
    first_BK = torch.minimum(torch.arange(k, device=mask.device), count_B1 - 1)
    maps, classes = attention_BAN.shape[1], odds_BCN.shape[1]

    def odds_at(rank_BK: Tensor) -> Tensor:
        patch_BAK = order_BAN.gather(2, rank_BK.unsqueeze(1).expand(-1, maps, -1))
        return odds_BCN.gather(2, patch_BAK.expand(-1, classes, -1))

    num_used_B1 = (count_B1 // 2).clamp(max=k)
    used_BK = torch.arange(k, device=mask.device) < num_used_B1
    return {
        "highest": odds_at(first_BK),
        "lowest": odds_at(count_B1 - 1 - first_BK),
        "share": used_BK.to(odds_BCN.dtype) / num_used_B1.clamp(min=1),
    }


@HEADS.register("clam_mb")
class ClamMB(ClamSB):
    """CLAM with an attention branch for each class m, all on one gated layer::

        a_m     = softmax_n( w_m . (tanh(V h_n) * sigmoid(U h_n)) )
        logit_m = W_cm . sum_n a_mn h_n

    The patches of class m's instance loss are ranked by a_m. Everything else, including the options, is as
    in :class:`ClamSB`.
    """

    def _num_maps(self, num_outputs: int) -> int:
        return num_outputs

    def _bag_logits(self, slide_BAE: Tensor) -> Tensor:
        # Applies every classifier to the vector of every class (C x C numbers) and takes the diagonal.
        return self.classify(slide_BAE).diagonal(dim1=1, dim2=2)
