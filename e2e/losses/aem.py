"""AEM: attention entropy maximisation."""

from __future__ import annotations

import torch
from torch import Tensor

from e2e.errors import UserError
from e2e.heads.base import HeadOutput
from e2e.losses.base import REGULARISERS, Regulariser, Weight, log_attention


@REGULARISERS.register("aem")
class AttentionEntropy(Regulariser):
    """The negative entropy of a bag's attention, which keeps it from concentrating on a few patches::

        loss = mean over maps of sum_n p_n log p_n = -H(p),   from -log N (uniform) to 0

    Source: Zhang et al. 2024, "AEM: Attention Entropy Maximization for Multiple Instance Learning
    based Whole Slide Image Classification", eq. 5 f., arXiv:2406.15303; its cosine annealing of
    the weight is ``schedule=cosine``. ``top_k`` is from a later version of the authors' code, which
    recommends k = 100.

    Maps are heads (mha, abmilx) or classes (clam_mb, dsmil). Padding has no part.

    Parameters
    ----------
    weight : float
        Weight of the loss; 0 disables it. In the paper 0.001 (CAMELYON16) to 0.2; start with 0.1.
    schedule : str
        ``constant``, or ``cosine``: to 0 at the end of training.
    warmup : float
        Fraction of the training over which the weight rises from 0.
    normalise : bool
        Divide by log N, so that a weight means the same for bags of any size; uniform attention is -1 then.
    top_k : int | None
        Use only the k largest weights of each map, rescaled to sum to 1; null: all.

    Raises
    ------
    UserError
        An option is out of range.
    """

    def __init__(
        self,
        *,
        weight: float = 0.0,
        schedule: str = "constant",
        warmup: float = 0.0,
        normalise: bool = False,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        if top_k is not None and top_k < 1:
            raise UserError(f"aem.top_k={top_k} must be 1 or more, or null for all patches")
        self.weight = Weight(weight, schedule, warmup)
        self.normalise = normalise
        self.top_k = top_k

    def check(self, output: HeadOutput) -> None:
        """See :class:`~e2e.losses.base.Regulariser`."""
        logits = output.attention_logits
        if logits is None or not logits.requires_grad:
            raise UserError(
                f"aem.weight={self.weight.peak:g}, but the head has no attention that is learned\n"
                "  choose another head (abmil, mha, ...), or set aem.weight=0"
            )

    def forward(
        self, output: HeadOutput, target: Tensor, coords: Tensor | None, sides: Tensor
    ) -> Tensor:
        """See :class:`~e2e.losses.base.Regulariser`."""
        return self.map_losses(output).mean(dim=1)

    def map_losses(self, output: HeadOutput) -> Tensor:
        """Return the loss of each attention map, (B, A)."""
        if self.top_k is not None:
            logits = output.attention_logits
            assert logits is not None
            # The softmax over the largest logits is the rescaled attention of those patches.
            largest = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values
            output = output._replace(attention_logits=largest)
        logs, is_real = log_attention(output)
        negative = torch.where(is_real, logs.exp() * logs, 0.0).sum(dim=-1)
        if not self.normalise:
            return negative
        # A bag of one patch has entropy 0, so the divisor does not matter.
        return negative / is_real.sum(dim=-1).clamp(min=2).to(negative.dtype).log()
