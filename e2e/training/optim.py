"""The optimiser, its schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from e2e.encoders.base import Encoder
from e2e.parallel.base import move_averages

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
"""Name -> constructor. AdamW decouples weight decay from the gradient; the others add it to it (L2)."""

SCHEDULES = ("cosine", "constant")
"""Names of learning-rate schedules; see :func:`learning_rate`."""


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    encoder_lr: float | None = None,
    layer_decay: float = 1.0,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """Build the optimiser of the model's trained parameters, in groups with a learning rate each.

    A group's ``lr_scale`` is its learning rate divided by the head's: the trainer sets ``lr`` to the
    schedule's rate times that. Vectors and scalars (biases, norms, ABMILX's alpha) have no weight decay, nor
    do the parameters that the encoder names. The groups depend on names and shapes of the parameters only, so
    they are the same on every rank and under FSDP2.

    Parameters
    ----------
    model
        If its ``encoder`` is an :class:`~e2e.encoders.base.Encoder`, that gives the layer of each parameter.
    lr
        Learning rate of the head, and of the encoder unless ``encoder_lr`` is given.
    weight_decay
        For matrices and kernels.
    encoder_lr
        Learning rate of the encoder's last layer; None for ``lr``.
    layer_decay
        Learning rate of each layer of the encoder divided by that of the layer above it.
    name
        A key of :data:`OPTIMIZERS`.
    """
    scales = learning_rate_scales(
        model, encoder=1.0 if encoder_lr is None else encoder_lr / lr, layer_decay=layer_decay
    )
    encoder = _encoder_of(model)
    undecayed = set() if encoder is None else {f"encoder.{n}" for n in encoder.no_weight_decay()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or parameter.numel() == 1 or key in undecayed
            groups.setdefault((scales[key], no_decay), []).append(parameter)
    # FSDP2 has no fused SGD: "aten._fused_sgd_ does not have a sharding strategy" (PyTorch 2.14).
    fused = name != "sgd" and _has_fused_kernel(model)
    return OPTIMIZERS[name](
        [
            {
                "params": parameters,
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": 0.0 if no_decay else weight_decay,
            }
            for (scale, no_decay), parameters in groups.items()
        ],
        lr=lr,
        fused=fused,
        foreach=not fused,
    )


def learning_rate_scales(
    model: nn.Module, *, encoder: float, layer_decay: float
) -> dict[str, float]:
    """Return the learning rate of each parameter divided by the head's.

    The encoder's last layer has ``encoder``, each layer below it ``layer_decay`` times the one
    above (Clark et al. 2020, arXiv 2003.10555; BEiT, arXiv 2106.08254).

    Parameters
    ----------
    model
        Parameters outside its encoder have 1.
    encoder
        For the encoder's last layer.
    layer_decay
        Factor from one layer to the one below.

    Returns
    -------
    dict
        Name of the parameter -> factor.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    network = _encoder_of(model)
    if network is not None:
        for depth, names in enumerate(reversed(network.layers())):
            scales |= {f"encoder.{name}": encoder * layer_decay**depth for name in names}
    return scales


def _encoder_of(model: nn.Module) -> Encoder | None:
    encoder = dict(model.named_children()).get("encoder")
    return encoder if isinstance(encoder, Encoder) else None


def _has_fused_kernel(model: nn.Module) -> bool:
    """Whether one kernel does a full step; otherwise it takes several over lists of tensors."""
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
    """Return the learning rate of a step: linear warm-up, then a cosine or a constant.

    It depends on the step only, so there is no schedule state to save.

    Parameters
    ----------
    step
        From 0.
    peak
        Highest rate.
    warmup
        Steps of linear warm-up.
    steps
        Number of steps in all.
    final
        Rate of a cosine's last step.
    schedule
        One of :data:`SCHEDULES`: half a cosine from ``peak`` to ``final``, or ``peak`` throughout.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


class MovingAverage:
    """Exponential moving average of parameters and float buffers, moved once per optimiser step.

    The decay warms up as min(decay, (1 + t) / (10 + t)): with a fixed 0.9999, the average after 100 steps
    would still be the initial weights.

    Parameters
    ----------
    state
        Name -> tensor to average; a rank may pass its shards.
    decay
        Weight of the old average, 0 to 1.
    """

    def __init__(self, state: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in state.items()}

    def update(self, state: Mapping[str, Tensor], step: int, good: Tensor) -> None:
        """Move the average towards ``state`` after an optimiser step.

        Parameters
        ----------
        state
            Name -> tensor, as in the constructor.
        step
            Number of the step, from 0.
        good
            0-d bool on the device, so that the host need not wait for it. False: the step was skipped, and
            nothing moves.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        move_averages(self.state, state, decay, good)
