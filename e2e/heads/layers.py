"""The pieces that several heads are made of: projection, attention MLP, attention pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.registry import suggest

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


def activation(name: str) -> nn.Module:
    """The activation called ``name``; UserError with the nearest name when unknown."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation '{name}'{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def projection(
    in_dim: int,
    embed_dim: int | None,
    *,
    act: str,
    dropout: float,
    norm: bool,
    bias: bool = True,
) -> nn.Sequential:
    """(..., in_dim) -> (..., embed_dim): [LayerNorm] -> Linear -> act -> Dropout, patch by patch.

    Args:
        in_dim: width of the encoder's features.
        embed_dim: width after the projection; None keeps the features (no Linear, no act).
        act: a key of ``ACTIVATIONS``.
        dropout: probability.
        norm: whether a LayerNorm comes first.
        bias: of the Linear and the LayerNorm.

    Raises:
        UserError: the activation is unknown.
    """
    layers: list[nn.Module] = [nn.LayerNorm(in_dim, bias=bias)] if norm else []
    if embed_dim is not None:
        if embed_dim < 1:
            raise UserError(f"a head's embed_dim must be at least 1, found {embed_dim}")
        layers += [nn.Linear(in_dim, embed_dim, bias=bias), activation(act)]
    return nn.Sequential(*layers, nn.Dropout(dropout))


class AttentionMLP(nn.Module):
    """One score, or ``maps`` scores, for each patch by itself: (..., dim) -> (..., maps).

    Plain: w . act(V x). Gated (Ilse et al. 2018, eq. 9): w . (act(V x) * sigmoid(U x)).

    Args:
        dim: width of x.
        hidden: width of V x.
        maps: attention maps.
        act: a key of ``ACTIVATIONS``.
        gated: whether the sigmoid gate is there.
        bias: of V and U.
        score_bias: of w. A softmax over patches cancels it: its gradient is zero.
        dropout: probability, on each branch.
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
            raise UserError(f"a head's attn_dim must be at least 1, found {hidden}")
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
        """(..., dim) -> (..., maps), raw: no softmax."""
        hidden = self.value(x)
        return self.score(hidden if self.gate is None else hidden * self.gate(x))


def attention_pool(score_BAN: Tensor, mask: Tensor, x_BANE: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of the real patches, map by map.

    Args:
        score_BAN: raw scores; what they are on padding does not matter unless it is NaN.
        mask: (B, N) bool, True where the patch is real.
        x_BANE: (B, A, N, E), what is averaged; finite on padding.

    Returns:
        (B, A, E) in the dtype of ``x_BANE``, and the (B, A, N) attention logits, -inf on padding,
        in float32 (float64 for float64 scores).
    """
    # float32: in fp16 a 20,000-patch softmax underflows to all-zero attention.
    exact = score_BAN.to(torch.promote_types(score_BAN.dtype, torch.float32))
    logits_BAN = exact.masked_fill(~mask.unsqueeze(1), float("-inf"))
    weight_BAN = logits_BAN.softmax(dim=-1).to(x_BANE.dtype)
    return torch.einsum("ban,bane->bae", weight_BAN, x_BANE), logits_BAN


def xavier_init(module: nn.Module) -> None:
    """Xavier-normal weights and zero biases for every Linear inside ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
