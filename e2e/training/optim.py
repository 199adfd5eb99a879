"""The optimiser, its schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from e2e.encoders.base import Encoder

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
"""AdamW decays the weights beside the gradient's step; the others add the decay to the gradient (L2)."""

SCHEDULES = ("cosine", "constant")


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    encoder_lr: float | None = None,
    layer_decay: float = 1.0,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """An optimiser over what ``model`` trains, in groups that each know their share of the rate.

    A group's ``lr_scale`` is its rate over the head's: the trainer sets ``lr`` to the schedule's
    rate times that. Vectors and scalars (biases, norms, ABMILX's alpha) are not decayed, nor what
    the encoder names. The groups follow from the parameters' names and shapes alone, so they are
    the same on every rank and under FSDP2.

    Args:
        model: its ``encoder``, if it has one, says how deep each parameter lies.
        lr: of the head, and of the encoder unless said otherwise.
        encoder_lr: of the encoder's last layer; None: ``lr``.
        layer_decay: each layer of the encoder learns at this fraction of the one above it.
        name: of :data:`OPTIMIZERS`.
    """
    scales = learning_rate_scales(
        model, encoder=1.0 if encoder_lr is None else encoder_lr / lr, layer_decay=layer_decay
    )
    undecayed = _undecayed(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or parameter.numel() == 1 or key in undecayed
            groups.setdefault((scales[key], free), []).append(parameter)
    # FSDP2 has no fused SGD: "aten._fused_sgd_ does not have a sharding strategy" (PyTorch 2.14).
    fused = name != "sgd" and _has_fused_kernel(model)
    return OPTIMIZERS[name](
        [
            {
                "params": parameters,
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": 0.0 if free else weight_decay,
            }
            for (scale, free), parameters in groups.items()
        ],
        lr=lr,
        fused=fused,
        foreach=not fused,
    )


def learning_rate_scales(
    model: nn.Module, *, encoder: float, layer_decay: float
) -> dict[str, float]:
    """Parameter name -> its learning rate over the head's.

    The encoder's last layer has ``encoder``, each layer below it ``layer_decay`` times the one
    above (Clark et al. 2020, arXiv 2003.10555; BEiT, arXiv 2106.08254).
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    part = getattr(model, "encoder", None)
    if isinstance(part, Encoder):
        for depth, names in enumerate(reversed(part.layers())):
            scales |= {f"encoder.{name}": encoder * layer_decay**depth for name in names}
    return scales


def _undecayed(model: nn.Module) -> set[str]:
    part = getattr(model, "encoder", None)
    return {f"encoder.{n}" for n in part.no_weight_decay()} if isinstance(part, Encoder) else set()


def _has_fused_kernel(model: nn.Module) -> bool:
    """Whether one kernel does a whole step; else it takes a few over lists of tensors."""
    return all(
        parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
        for parameter in model.parameters()
    )


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    steps: int,
    final: float = 0.0,
    schedule: str = "cosine",
) -> float:
    """Linear warm-up over ``warmup`` steps; then a cosine to ``final`` at the last of ``steps``, or ``peak``.

    A function of the 0-based step alone: there is no schedule state to save.

    Args:
        schedule: of :data:`SCHEDULES`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


class MovingAverage:
    """Exponential moving average of parameters and float buffers, moved once an optimiser step.

    The decay warms up as min(decay, (1 + t) / (10 + t)): a fixed 0.9999 over 100 steps would still
    be the start weights.

    Args:
        state: names -> tensors to be averaged; a rank may give its pieces of them.
    """

    def __init__(self, state: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int, good: Tensor) -> None:
        """Move towards ``state`` after optimiser step number ``step`` (0-based), if it was ``good``.

        ``good`` is a 0-d bool on the device, so that the host need not wait for it.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        floats = [name for name, value in state.items() if value.is_floating_point()]
        for name in state.keys() - set(floats):
            self.state[name].copy_(state[name])
        ours = [self.state[name] for name in floats]
        moves = torch._foreach_sub([state[name] for name in floats], ours)  # pyright: ignore
        torch._foreach_mul_(moves, (1 - decay) * good.to(torch.float32))  # pyright: ignore
        torch._foreach_add_(ours, moves)  # pyright: ignore
