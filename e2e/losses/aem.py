"""AEM: attention entropy maximisation."""

from __future__ import annotations

import torch
from torch import Tensor

from e2e.errors import UserError
from e2e.heads.base import HeadOutput
from e2e.losses.base import REGULARISERS, Regulariser, Weight, log_attention


@REGULARISERS.register("aem")
class AttentionEntropy(Regulariser):
    """The negative entropy of a bag's attention, so that it does not rest on too few patches::

        loss = mean over maps of sum_n p_n log p_n = -H(p),   from -log N (uniform) to 0

    Source: Zhang et al. 2024, "AEM: Attention Entropy Maximization for Multiple Instance Learning
    based Whole Slide Image Classification", eq. 5 f., arXiv:2406.15303; its cosine annealing of
    the weight is ``schedule=cosine``. ``top_k`` is from the authors' later program, which
    recommends k = 100.

    Maps are heads (mha, abmilx) or classes (clam_mb, dsmil). Padding counts as nothing.

    Parameters
    ----------
    weight : float
        Of the loss; 0 leaves it out. The paper: 0.001 (CAMELYON16) to 0.2; 0.1 is a start.
    schedule : str
        ``constant`` or ``cosine`` (to 0 at the end of the training).
    warmup : float
        Share of the training over which the weight rises from 0.
    normalise : bool
        Divide by log N, so that the weight means the same for bags of any size; -1 is
        uniform then.
    top_k : int | None
        Only the so many largest of each map, rescaled to sum to 1; null: all.

    Raises
    ------
    UserError
        An option out of range.
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
            raise UserError(f"aem.top_k must be at least 1, or null for all, found {top_k}")
        self.weight = Weight(weight, schedule, warmup)
        self.normalise = normalise
        self.top_k = top_k

    def check(self, output: HeadOutput) -> None:
        """See :class:`Regulariser`."""
        logits = output.attention_logits
        if logits is None or not logits.requires_grad:
            raise UserError(
                "aem.weight is over 0, but the head has no attention that learns, so none to spread\n"
                "  choose another head (abmil, mha, ...), or set aem.weight=0"
            )

    def forward(self, output: HeadOutput, target: Tensor, coords: Tensor | None) -> Tensor:
        """See :class:`Regulariser`."""
        return self.of(output).mean(dim=1)

    def of(self, output: HeadOutput) -> Tensor:
        """(B,A) of each map by itself."""
        if self.top_k is not None:
            logits = output.attention_logits
            assert logits is not None
            # The softmax over the largest logits is the rescaled attention of those patches.
            largest = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values
            output = output._replace(attention_logits=largest)
        logs, real = log_attention(output)
        negative = torch.where(real, logs.exp() * logs, 0.0).sum(dim=-1)
        if not self.normalise:
            return negative
        # A bag of one patch has entropy 0 whatever it is divided by.
        return negative / real.sum(dim=-1).clamp(min=2).to(negative.dtype).log()
