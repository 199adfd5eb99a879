"""Losses of times to an event: the discrete-time likelihood, and Cox's partial likelihood.

``event`` is 1 where the event was seen, 0 where the case was lost from sight (censored), NaN where
nothing is known: such a case costs nothing and is in no risk set. All in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def discrete_nll(logits: Tensor, interval: Tensor, event: Tensor, *, alpha: float = 0.0) -> Tensor:
    """(B,) negative log-likelihood of a time in one of T intervals, whose hazards are sigmoid(o_t)::

        S_t = prod_{j<=t} (1 - h_j), the chance to be without an event after interval t
        event in y       -log S_{y-1} - log h_y
        censored in y    -(1 - alpha) log S_y

    Source: Zadeh & Schmid 2020, "Bias in Cross-Entropy-Based Training of Deep Survival Networks"
    (IEEE TPAMI 43:3126), as MIL of slides has it since Chen et al. 2021 (MCAT, ICCV); ``alpha``
    weighs the cases with an event more. No hazard is clamped: the logarithms are taken of logits.

    Args:
        logits: (B, T).
        interval: (B,) int64, 0 to T - 1.
        event: (B,).
        alpha: in [0, 1].
    """
    logits = logits.float()
    at = interval.unsqueeze(1)
    log_alive = F.pad(F.logsigmoid(-logits).cumsum(dim=1), (1, 0))  # before each interval; after
    before, after = (log_alive.gather(1, k).squeeze(1) for k in (at, at + 1))
    log_hazard = F.logsigmoid(logits).gather(1, at).squeeze(1)
    censored = torch.where(event == 0, -(1 - alpha) * after, 0.0)
    return torch.where(event == 1, -before - log_hazard, censored)


def cox_loss(risk: Tensor, time: Tensor, event: Tensor, *, ties: str = "efron") -> Tensor:
    """(B,) terms of the negative log partial likelihood; the risk set are the B cases themselves::

        breslow   log sum_{t_j >= t_i} exp(r_j) - r_i                               for an event at t_i
        efron     log ( sum_{t_j >= t_i} exp(r_j) - l/d sum_{j in D_i} exp(r_j) ) - r_i

    with the d events D_i of one time taken in turn, l = 0 .. d - 1. Who is censored has 0, and is at
    risk up to its time, that included.

    Source: Cox 1972 (JRSS B 34:187); ties after Breslow 1974 (Biometrics 30:89) and Efron 1977 (JASA
    72:557).

    Args:
        risk: (B,) log of the relative hazard.
        time, event: (B,).
        ties: breslow or efron.
    """
    risk, here = risk.float(), torch.eye(len(risk), dtype=torch.bool, device=risk.device)
    died = (event == 1) & time.isfinite()
    seen = time.isfinite() & event.isfinite()
    # With itself nobody's set is empty: the logarithm of an empty sum has no gradient.
    at_risk = ((time >= time.unsqueeze(1)) & seen) | here
    log_sum = torch.where(at_risk, risk, -torch.inf).logsumexp(dim=1)
    if ties == "efron":
        tied = ((time == time.unsqueeze(1)) & died & died.unsqueeze(1)) | here
        earlier = torch.ones_like(here).tril(-1)
        share = (tied & earlier).sum(dim=1) / tied.sum(dim=1)
        log_tied = torch.where(tied, risk, -torch.inf).logsumexp(dim=1)
        log_sum = log_sum + torch.log1p(-share * (log_tied - log_sum).exp())
    return torch.where(died, log_sum - risk, 0.0)
