"""AdamW, its schedule, clipping and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; vectors and scalars (biases, norms, ABMILX's alpha) are not decayed."""
    decayed, free = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or parameter.numel() == 1 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, final: float = 0.0) -> float:
    """Linear warm-up over ``warmup`` steps, then a cosine to ``final`` at the last of ``steps``.

    A function of the 0-based step alone: there is no schedule state to save.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients to a joint L2 norm of at most ``max_norm``; returns the norm before."""
    limit = math.inf if max_norm is None else max_norm
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit)


class WeightAverage:
    """Exponential moving average of parameters and float buffers, moved once an optimiser step.

    The decay warms up as min(decay, (1 + t) / (10 + t)): a fixed 0.9999 over 100 steps would still
    be the start weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after its optimiser step number ``step`` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                ours.append(self.state[name])
                theirs.append(value.detach())
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(ours, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
