"""Layers shared by several heads: projection, attention MLP, attention pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import mask_logits
from e2e.registry import did_you_mean

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}
"""Value of the option ``act`` -> module."""


def activation(name: str) -> nn.Module:
    """Return the activation called ``name``.

    Raises
    ------
    UserError
        There is none; the message has the nearest name.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation '{name}'{did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def check_heads(head: str, embed_dim: int, heads: int) -> None:
    """Raise UserError unless ``heads`` divides ``embed_dim``.

    Parameters
    ----------
    head : str
        Registered name of the head, for the message.
    embed_dim : int
        Width that is split over the attention heads.
    heads : int
        Number of attention heads.
    """
    if heads < 1 or embed_dim % heads:
        raise UserError(
            f"{head}: head.heads={heads} does not divide head.embed_dim={embed_dim}\n"
            f"  set head.heads to one of {[h for h in range(1, 65) if embed_dim % h == 0]}"
        )


def projection(
    in_dim: int,
    embed_dim: int | None,
    *,
    act: str,
    dropout: float,
    norm: bool,
    bias: bool = True,
) -> nn.Sequential:
    """Return [LayerNorm] -> Linear -> activation -> Dropout, (..., in_dim) -> (..., embed_dim).

    Parameters
    ----------
    in_dim : int
        Width of the features.
    embed_dim : int | None
        Width after the projection; None keeps the features (no Linear, no activation).
    act : str
        A key of ``ACTIVATIONS``.
    dropout : float
        Dropout probability.
    norm : bool
        Whether to start with a LayerNorm.
    bias : bool
        Whether the Linear and the LayerNorm have a bias.

    Raises
    ------
    UserError
        The activation is unknown, or ``embed_dim`` is below 1.
    """
    layers: list[nn.Module] = [nn.LayerNorm(in_dim, bias=bias)] if norm else []
    if embed_dim is not None:
        if embed_dim < 1:
            raise UserError(f"head.embed_dim={embed_dim} must be 1 or more")
        layers += [nn.Linear(in_dim, embed_dim, bias=bias), activation(act)]
    return nn.Sequential(*layers, nn.Dropout(dropout))


class AttentionMLP(nn.Module):
    """One or more scores for each patch, independent of the others: (..., dim) -> (..., maps).

    Plain: w . act(V x). Gated (Ilse et al. 2018, eq. 9): w . (act(V x) * sigmoid(U x)).

    Parameters
    ----------
    dim : int
        Width of x.
    hidden : int
        Width of V x.
    maps : int
        Number of attention maps.
    act : str
        A key of ``ACTIVATIONS``.
    gated : bool
        Whether to use the sigmoid gate.
    bias : bool
        Whether V and U have a bias.
    score_bias : bool
        Whether w has a bias. A softmax over patches cancels it: its gradient is zero.
    dropout : float
        Dropout probability on each branch.

    Raises
    ------
    UserError
        ``hidden`` is below 1, or ``act`` is unknown.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        maps: int = 1,
        *,
        act: str = "tanh",
        gated: bool = False,
        bias: bool = True,
        score_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise UserError(f"head.attn_dim={hidden} must be 1 or more")
        self.value = nn.Sequential(
            nn.Linear(dim, hidden, bias=bias), activation(act), nn.Dropout(dropout)
        )
        self.gate = (
            nn.Sequential(nn.Linear(dim, hidden, bias=bias), nn.Sigmoid(), nn.Dropout(dropout))
            if gated
            else None
        )
        self.score = nn.Linear(hidden, maps, bias=score_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (..., maps) of x (..., dim), without a softmax."""
        hidden = self.value(x)
        return self.score(hidden if self.gate is None else hidden * self.gate(x))


def attention_pool(score_BAN: Tensor, mask: Tensor, x_BANE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention-weighted mean of the real patches for each map, and the attention logits.

    Parameters
    ----------
    score_BAN : Tensor of shape (B, A, N)
        Scores before the softmax; their values on padding do not matter unless they are NaN.
    mask : Tensor of shape (B, N)
        bool, True for real patches.
    x_BANE : Tensor of shape (B, A, N, E)
        What is averaged; finite on padding.

    Returns
    -------
    tuple of Tensor
        (B, A, E) in the dtype of ``x_BANE``, and the attention logits (B, A, N) of
        :func:`e2e.heads.base.mask_logits`.
    """
    logits_BAN = mask_logits(score_BAN, mask)
    weight_BAN = logits_BAN.softmax(dim=-1).to(x_BANE.dtype)
    return torch.einsum("ban,bane->bae", weight_BAN, x_BANE), logits_BAN


def xavier_init(module: nn.Module) -> None:
    """Draw the weights of every Linear inside ``module`` Xavier-normal, and set the biases to zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
