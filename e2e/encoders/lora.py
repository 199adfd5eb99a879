"""Low-rank adapters: a frozen linear layer learns the product of two thin matrices beside it.

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
"""What the linear layers of an attention are called."""


class LoraLinear(nn.Linear):
    """``x (..., in) -> x W^T + b + alpha / rank * x A^T B^T (..., out)``; only A and B learn.

    A (rank, in) is random, B (out, rank) starts at zero: at first the layer is the one it stands
    for, bit for bit. That one's weight and bias keep their names in the state dict, with ``lora_a``
    and ``lora_b`` beside them.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as the authors' own code does
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        change = functional.linear(functional.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.scale * change

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the same outputs, up to rounding."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(self.weight + self.scale * (self.lora_b @ self.lora_a))
        plain.bias = self.bias
        return plain.train(self.training)


def add_lora(
    net: nn.Module, *, rank: int, alpha: float | None, targets: Sequence[str] | None
) -> None:
    """Freeze ``net`` and put adapters on its linear layers, but for those frozen already.

    Parameters
    ----------
    net : nn.Module
        Changed in place.
    rank : int
        Of the adapters.
    alpha : float | None
        The adapters' weight is alpha / rank; None: 1, whatever the rank.
    targets : Sequence[str] | None
        Names of linear layers, or ends of them such as ``mlp.fc1``; None: the attention's.

    Raises
    ------
    UserError
        ``net`` has no such layer, or uses one in a way that passes the adapter by.
    """
    if rank < 1:
        raise UserError(f"encoder.lora_rank must be at least 1, or 0 for none, found {rank}")
    linear = {name: m for name, m in net.named_modules() if type(m) is nn.Linear}
    wanted = ATTENTION if targets is None else targets
    hits = {end: [name for name in linear if _ends(name, end)] for end in wanted}
    absent = [end for end in wanted if not hits[end]]
    if len(absent) == len(wanted) or (targets is not None and absent):
        ends = sorted({".".join(name.split(".")[-2:]) for name in linear})
        has = f"it has:\n{format_list(ends)}" if ends else "it has no linear layers at all"
        raise UserError(f"no linear layer of the encoder is called {' or '.join(absent)}; {has}")
    chosen = sorted({name for names in hits.values() for name in names})
    chosen = [name for name in chosen if linear[name].weight.requires_grad]
    if not chosen:
        raise UserError("encoder.freeze leaves no layer for encoder.lora_rank to adapt")
    net.requires_grad_(False)
    for name in chosen:
        path, _, leaf = name.rpartition(".")
        parent = net.get_submodule(path)
        if leaf == "qkv" and getattr(parent, "q_bias", None) is not None:
            raise UserError(
                f"no adapter can stand on '{name}': this attention adds its biases on its own and "
                "passes the layer by\n  name others with encoder.lora_targets, such as [proj]"
            )
        setattr(parent, leaf, LoraLinear(linear[name], rank, rank if alpha is None else alpha))


def merge_lora(net: nn.Module) -> None:
    """Put plain layers with the same outputs in place of the adapted ones."""
    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLinear):
            path, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(path), leaf, module.merged())


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
