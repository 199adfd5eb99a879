"""Losses of times to an event: the discrete-time likelihood, and Cox's partial likelihood.

``event`` is 1 for an observed event, 0 for a censored case (no event until its last follow-up), and NaN
for a missing label: such a case has no loss and is in no risk set. Everything is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def discrete_nll(logits: Tensor, interval: Tensor, event: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Return the negative log-likelihood of times in one of T intervals with hazards h_t = sigmoid(o_t)::

        S_t = prod_{j<=t} (1 - h_j)     the probability of no event until the end of interval t
        event in y       -log S_{y-1} - log h_y
        censored in y    -(1 - alpha) log S_y

    Source: Zadeh & Schmid 2020, "Bias in Cross-Entropy-Based Training of Deep Survival Networks"
    (IEEE TPAMI 43:3126), in the form used for slides since Chen et al. 2021 (MCAT, ICCV), where
    ``alpha`` gives cases with an event more weight. No hazard is clamped: logarithms are computed from
    the logits.

    Parameters
    ----------
    logits : Tensor of shape (B, T)
        The o_t.
    interval : Tensor of shape (B,)
        int64, 0 to T - 1.
    event : Tensor of shape (B,)
        1, 0 or NaN.
    alpha : float
        In [0, 1].

    Returns
    -------
    Tensor of shape (B,)
    """
    logits = logits.float()
    column = interval.unsqueeze(1)
    # log S_{t-1} in column t, so the next column is log S_t.
    log_survival = F.pad(F.logsigmoid(-logits).cumsum(dim=1), (1, 0))
    before, after = (log_survival.gather(1, k).squeeze(1) for k in (column, column + 1))
    log_hazard = F.logsigmoid(logits).gather(1, column).squeeze(1)
    censored = torch.where(event == 0, -(1 - alpha) * after, 0.0)
    return torch.where(event == 1, -before - log_hazard, censored)


def cox_loss(risk: Tensor, time: Tensor, event: Tensor, *, ties: str = "efron") -> Tensor:
    """Return the terms of the negative log partial likelihood; the risk set is drawn from the B cases::

        breslow   log sum_{t_j >= t_i} exp(r_j) - r_i                               for an event at t_i
        efron     log ( sum_{t_j >= t_i} exp(r_j) - l/d sum_{j in D_i} exp(r_j) ) - r_i

    with the d events D_i at the same time numbered l = 0 .. d - 1. A censored case has the term 0, and
    is at risk up to and including its time.

    Source: Cox 1972 (JRSS B 34:187); ties after Breslow 1974 (Biometrics 30:89) and Efron 1977 (JASA
    72:557).

    Parameters
    ----------
    risk : Tensor of shape (B,)
        Log of the relative hazard.
    time, event : Tensor of shape (B,)
        As in the module's docstring.
    ties : str
        ``breslow`` or ``efron``.

    Returns
    -------
    Tensor of shape (B,)
    """
    risk, is_self = risk.float(), torch.eye(len(risk), dtype=torch.bool, device=risk.device)
    had_event = (event == 1) & time.isfinite()
    is_labelled = time.isfinite() & event.isfinite()
    # Everyone is in their own risk set: the logarithm of an empty sum has no gradient.
    at_risk = ((time >= time.unsqueeze(1)) & is_labelled) | is_self
    log_sum = torch.where(at_risk, risk, -torch.inf).logsumexp(dim=1)
    if ties == "efron":
        tied = ((time == time.unsqueeze(1)) & had_event & had_event.unsqueeze(1)) | is_self
        earlier = torch.ones_like(is_self).tril(-1)
        fraction = (tied & earlier).sum(dim=1) / tied.sum(dim=1)
        log_tied = torch.where(tied, risk, -torch.inf).logsumexp(dim=1)
        log_sum = log_sum + torch.log1p(-fraction * (log_tied - log_sum).exp())
    return torch.where(had_event, log_sum - risk, 0.0)
