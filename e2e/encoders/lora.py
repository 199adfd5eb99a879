"""Low-rank adapters (LoRA): a frozen linear layer plus the trained product of two thin matrices.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from e2e.errors import UserError, format_list

ATTENTION = ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "proj")
"""Names of the linear layers of an attention."""


class LoraLinear(nn.Linear):
    """``x (..., in) -> x W^T + b + alpha / rank * x A^T B^T (..., out)``; only A and B are trained.

    A (rank, in) is random, B (out, rank) starts at zero, so that the output is at first exactly that of
    the original layer. Its weight and bias keep their names in the state dict, with ``lora_a`` and
    ``lora_b`` beside them.

    Parameters
    ----------
    linear : nn.Linear
        The original layer, whose weight and bias are used.
    rank : int
        Rank of the adapter.
    alpha : float
        Scale of the adapter, times 1 / rank.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as in the authors' code
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the adapted output (..., out) for ``input`` (..., in)."""
        change = functional.linear(functional.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.scale * change

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer with the same outputs, up to rounding."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(self.weight + self.scale * (self.lora_b @ self.lora_a))
        plain.bias = self.bias
        return plain.train(self.training)


def add_lora(
    net: nn.Module, *, rank: int, alpha: float | None, targets: Sequence[str] | None
) -> None:
    """Freeze ``net`` and add adapters to its linear layers, except those that are already frozen.

    Parameters
    ----------
    net : nn.Module
        Modified in place.
    rank : int
        Rank of the adapters.
    alpha : float | None
        The adapters are scaled with alpha / rank; None: with 1, whatever the rank.
    targets : Sequence of str | None
        Names of linear layers, or their last parts such as ``mlp.fc1``; None: those of the attention.

    Raises
    ------
    UserError
        ``net`` has no such layer, or uses one in a way that bypasses the adapter.
    """
    if rank < 1:
        raise UserError(f"encoder.lora_rank={rank} must be 1 or more, or 0 to disable adapters")
    linear = {name: m for name, m in net.named_modules() if type(m) is nn.Linear}
    names = _matching_layers(list(linear), targets)
    names = [name for name in names if linear[name].weight.requires_grad]
    if not names:
        raise UserError(
            "encoder.freeze leaves no layer for the adapters of encoder.lora_rank\n"
            "  lower encoder.freeze, or set encoder.lora_rank=0"
        )
    net.requires_grad_(False)
    for name in names:
        path, _, leaf = name.rpartition(".")
        parent = net.get_submodule(path)
        if leaf == "qkv" and getattr(parent, "q_bias", None) is not None:
            raise UserError(
                f"encoder.lora_rank: the attention of '{name}' adds its biases separately and bypasses "
                "the adapter\n  adapt other layers, for example encoder.lora_targets=[proj]"
            )
        setattr(parent, leaf, LoraLinear(linear[name], rank, rank if alpha is None else alpha))


def merge_lora(net: nn.Module) -> None:
    """Replace the adapted layers of ``net`` by plain ones with the same outputs."""
    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLinear):
            path, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(path), leaf, module.merged())


def _matching_layers(names: Sequence[str], targets: Sequence[str] | None) -> list[str]:
    """Return the sorted layer names that end with a target; UserError if a target matches none."""
    endings = ATTENTION if targets is None else targets
    matches = {end: [name for name in names if _has_ending(name, end)] for end in endings}
    unmatched = [end for end in endings if not matches[end]]
    if len(unmatched) == len(endings) or (targets is not None and unmatched):
        available = sorted({".".join(name.split(".")[-2:]) for name in names})
        listing = f"it has:\n{format_list(available)}" if available else "it has no linear layers"
        raise UserError(
            f"encoder.lora_targets: no linear layer of the encoder is called {' or '.join(unmatched)}; "
            f"{listing}"
        )
    return sorted({name for matching in matches.values() for name in matching})


def _has_ending(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
