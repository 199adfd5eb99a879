"""Foundation encoders of pathology by name: timm networks with the arguments of each model.

Arguments, statistics and licences are those of the model cards. The weights belong to their owners: they
are downloaded from the hub after you accept its terms there, or loaded from a file
(``encoder.weights``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.mlp import SwiGLUPacked
from timm.layers.patch_embed import PatchEmbed
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from e2e.encoders.base import ENCODERS, Encoder
from e2e.encoders.foundation_keys import from_coca, from_swin, from_transformers
from e2e.encoders.lora import add_lora
from e2e.encoders.state_dicts import read_state_dict
from e2e.encoders.timm import TimmEncoder, detect_offline, resampled
from e2e.errors import UserError, format_list

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUNIT = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)
BIOPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

NON_COMMERCIAL = "CC-BY-NC-ND 4.0, on request"

ConvertKeys = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""A published state dict -> the same with timm's keys."""


@dataclass(frozen=True)
class Card:
    """What defines a foundation encoder."""

    width: int
    """Width D of its features."""
    network: str
    """timm's name of the network."""
    source: str
    """Where the weights are: a model of the Hugging Face hub, or a URL."""
    licence: str
    """Licence of the weights."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    """Mean and standard deviation of its training images, in 0..1."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the network, in addition to timm's defaults."""
    append_mean: bool = False
    """Whether a feature is the class token followed by the mean of the patch tokens."""
    pool: Callable[[], nn.Module] | None = None
    """Builds a pooling of all tokens, (n, tokens, E) -> (n, width), as ``query_pool`` of the network."""
    convert_keys: ConvertKeys = dict
    """Converts the published state dict to timm's keys."""
    input_px: int = 224
    """Side of its training patches in pixels; for others the position embeddings are resampled."""


class ConvStem(PatchEmbed):
    """The patch embedding of CTransPath, 4 x 4 pixels: two strided 3 x 3 convolutions and one of 1 x 1.

    Source: Wang et al. 2022, "Transformer-based unsupervised contrastive learning for
    histopathological image classification", Medical Image Analysis 81, section 3.2.

    Parameters
    ----------
    embed_dim : int
        Width of the tokens.
    **options
        See timm's ``PatchEmbed``.
    """

    def __init__(self, *, embed_dim: int, **options: Any) -> None:
        super().__init__(embed_dim=embed_dim, **options)
        widths = (3, embed_dim // 8, embed_dim // 4)
        halves = [
            layer
            for before, after in pairwise(widths)
            for layer in (
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            )
        ]
        self.proj = nn.Sequential(*halves, nn.Conv2d(widths[-1], embed_dim, 1))


class QueryPool(nn.Module):
    """CoCa's attention pooling by one learned query, over tokens t_n::

        z = LN( W_o concat_j sum_n softmax_n(q_j . k_nj / sqrt(E/H)) v_nj + b_o )
        q = W_q LN(query) + b_q,   k_n = W_k LN(t_n) + b_k,   v_n = W_v LN(t_n) + b_v

    Source: Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models", section 3.2,
    arXiv:2205.01917; followed by a LayerNorm as in CONCH (Lu et al. 2024, Nature Medicine 30).

    Parameters
    ----------
    context : int
        Width of the tokens.
    dim : int
        Width E of the query and the feature.
    heads : int
        Number of attention heads H, a divisor of E.
    """

    def __init__(self, context: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(torch.randn(1, dim))
        self.norm_query, self.norm_key = nn.LayerNorm(dim), nn.LayerNorm(context)
        self.query = nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(context, dim), nn.Linear(context, dim)
        self.merge = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the feature (n, dim) of tokens (n, tokens, context)."""
        normal = self.norm_key(tokens)
        query = self.query(self.norm_query(self.token)).expand(len(tokens), 1, -1)
        three = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (query, self.key(normal), self.value(normal))
        )
        pooled = F.scaled_dot_product_attention(*three)  # (n, H, 1, E/H)
        return self.norm(self.merge(pooled.flatten(1)))


class FoundationEncoder(TimmEncoder):
    """An encoder of :data:`FOUNDATION`: (n,3,H,W) -> (n, width).

    Features are the class token, unless the encoder's :class:`Card` defines them otherwise.

    Parameters
    ----------
    name : str
        A name in :data:`FOUNDATION` or :data:`ALIASES`.
    pretrained : bool
        Load the weights from the hub or its cache.
    weights : str | None
        Load this file instead (.bin, .pt, .pth or .safetensors), as published.
    drop_path : float | None
        Stochastic depth rate; None: timm's default.
    img_size : int | None
        Side of the patches in pixels, to which the position embeddings are resampled; None: that of the
        training patches.
    freeze : int
        Freeze the first stages, which keep their weights and stay in eval mode: the patch embedding is the
        first, each block another.
    lora_rank : int
        Rank of low-rank adapters (LoRA), which are trained while the weights stay frozen; 0: none.
    lora_alpha : float | None
        The adapters are scaled with lora_alpha / lora_rank; None: with 1.
    lora_targets : list of str | None
        The linear layers that are adapted, by name or its last parts (``qkv``, ``mlp.fc1``); None: those of
        the attention.

    Raises
    ------
    UserError
        The weights are not available or do not fit, or the encoder cannot be built.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = True,
        weights: str | None = None,
        drop_path: float | None = None,
        img_size: int | None = None,
        freeze: int = 0,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_targets: list[str] | None = None,
    ) -> None:
        name = ALIASES.get(name, name)
        card = _card(name)
        Encoder.__init__(self, *card.statistics)
        self.model, self.is_truncated, self.channels_last = name, False, False
        self.pretrained = pretrained or weights is not None
        self.licence = card.licence
        self.dim, self.append_mean = card.width, card.append_mean
        self.has_query_pool = card.pool is not None
        self.net = timm.create_model(
            card.network,
            num_classes=0,
            global_pool="" if card.append_mean or card.pool else None,
            img_size=img_size or card.input_px,
            drop_path_rate=drop_path,
            **card.arguments,
        )
        if card.pool:
            self.net.query_pool = card.pool()
        if self.pretrained:
            _load_weights(self, card, weights)
        if freeze:
            self.freeze(freeze)
        if lora_rank:
            add_lora(self.net, rank=lora_rank, alpha=lora_alpha, targets=lora_targets)

    def features(self, images: Tensor) -> Tensor:
        """See :class:`~e2e.encoders.base.Encoder`."""
        self._check_image_size(images)
        output = self.net(images)
        if self.has_query_pool:
            return self.net.query_pool(output)  # pyright: ignore[reportCallIssue]
        if not self.append_mean:
            return output
        patch_tokens = output[:, self.net.num_prefix_tokens :]  # pyright: ignore[reportArgumentType]
        return torch.cat([output[:, 0], patch_tokens.mean(1)], dim=1)


def _card(name: str) -> Card:
    """Return the card of an encoder; UserError where there is none."""
    if name in UNSUPPORTED:
        raise UserError(
            f"encoder '{name}' is not supported: {UNSUPPORTED[name]}\n"
            "  extract its features with TRIDENT, and set data.features to their folder"
        )
    if name not in FOUNDATION:
        raise UserError(
            f"encoder '{name}': foundation encoders have no tags\n  set encoder.name={name.split('.')[0]}"
        )
    return FOUNDATION[name]


def _load_weights(encoder: FoundationEncoder, card: Card, weights: str | None) -> None:
    """Load a file, or the weights of the hub; the keys must be exactly those of the network."""
    net = encoder.net
    if weights:
        content = read_state_dict(Path(weights))
        published = {name.removeprefix("module."): value for name, value in content.items()}
    else:
        published = _state_from_hub(encoder.model, card)
    state, expected = card.convert_keys(published), net.state_dict()
    if "pos_embed" in state and "pos_embed" in expected:
        state["pos_embed"] = resampled(state["pos_embed"], expected["pos_embed"], net)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(
            f"{weights or card.source} does not fit the encoder '{encoder.model}'\n"
            f"{format_list(text if len(text) < 300 else f'{text[:300]} ...' for text in faults)}"
        ) from error


def _state_from_hub(name: str, card: Card) -> dict[str, Tensor]:
    """Return the state dict of the hub; UserError where it is not available."""
    url = card.source if "://" in card.source else f"https://huggingface.co/{card.source}"
    reason = "they are not a model of the hub"
    if "://" not in card.source:
        detect_offline()
        try:
            return load_state_dict_from_hf(card.source, weights_only=True)
        except (OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(
        f"no pretrained weights for '{name}': {reason}\n"
        f"  get them from {url} (licence: {card.licence}), then either\n"
        "  log in with `hf auth login` where there is a network, or download the file and set\n"
        "  encoder.weights=FILE (pytorch_model.bin, model.safetensors or .pth)"
    )


_SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5}
_VIRCHOW = {"mlp_ratio": 5.3375, **_SWIGLU}
_KAIKO = "1aurent/{}.kaiko_ai_towards_large_pathology_fms"

FOUNDATION: dict[str, Card] = {
    "uni": Card(
        1024,
        "vit_large_patch16_224",
        "MahmoodLab/UNI",
        NON_COMMERCIAL,
        arguments={"init_values": 1e-5},
    ),
    "uni2": Card(
        1536,
        "vit_giant_patch14_224",
        "MahmoodLab/UNI2-h",
        NON_COMMERCIAL,
        arguments={
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            **_SWIGLU,
        },
    ),
    "conch": Card(
        512,
        "vit_base_patch16_224",
        "MahmoodLab/CONCH",
        NON_COMMERCIAL,
        CLIP,
        pool=functools.partial(QueryPool, 768, 512, 8),
        convert_keys=from_coca,
        input_px=448,
    ),
    "virchow": Card(
        2560,
        "vit_huge_patch14_224",
        "paige-ai/Virchow",
        "Apache 2.0, on request",
        arguments=_VIRCHOW,
        append_mean=True,
    ),
    "virchow2": Card(
        2560,
        "vit_huge_patch14_224",
        "paige-ai/Virchow2",
        NON_COMMERCIAL,
        arguments={"reg_tokens": 4, **_VIRCHOW},
        append_mean=True,
    ),
    "gigapath": Card(
        1536,
        "vit_giant_patch14_dinov2",
        "prov-gigapath/prov-gigapath",
        "its own, for research, on request",
        arguments={"patch_size": 16, "mlp_ratio": 5.33334},
    ),
    "hoptimus0": Card(
        1536,
        "vit_giant_patch14_reg4_dinov2",
        "bioptimus/H-optimus-0",
        "Apache 2.0, on request",
        BIOPTIMUS,
    ),
    "hoptimus1": Card(
        1536,
        "vit_giant_patch14_reg4_dinov2",
        "bioptimus/H-optimus-1",
        NON_COMMERCIAL,
        BIOPTIMUS,
    ),
    "phikon": Card(
        768,
        "vit_base_patch16_224",
        "owkin/phikon",
        "Owkin's, not commercial",
        convert_keys=from_transformers,
    ),
    "phikon2": Card(
        1024,
        "vit_large_patch16_224",
        "owkin/phikon-v2",
        "Owkin's, not commercial",
        arguments={"init_values": 1.0},
        convert_keys=from_transformers,
    ),
    "ctranspath": Card(
        768,
        "swin_tiny_patch4_window7_224",
        "https://github.com/Xiyue-Wang/TransPath",
        "GPL 3.0",
        arguments={"embed_layer": ConvStem},
        convert_keys=from_swin,
    ),
    **{
        f"lunits{px}": Card(
            384,
            f"vit_small_patch{px}_224",
            f"1aurent/vit_small_patch{px}_224.lunit_dino",
            "Lunit's, not commercial",
            LUNIT,
        )
        for px in (8, 16)
    },
    **{
        f"kaiko{size[0]}{px}": Card(
            width,
            f"vit_{size}_patch{px}_224",
            _KAIKO.format(f"vit_{size}_patch{px}_224"),
            "Kaiko's, not commercial",
            HALF,
        )
        for size, width in (("small", 384), ("base", 768))
        for px in (8, 16)
    },
}
"""Name -> card. Names have no underscore, so that they work in ``e2e_<encoder>_<head>``."""

ALIASES = {
    "uni_v1": "uni",
    "uni_v2": "uni2",
    "conch_v1": "conch",
    "phikon_v2": "phikon2",
    "lunit-vits8": "lunits8",
    **{f"kaiko-vit{size}{px}": f"kaiko{size}{px}" for size in "sb" for px in (8, 16)},
}
"""Name in TRIDENT -> name here."""

UNSUPPORTED = {
    "conch_v15": "its network is not in timm",
    "musk": "its network is not in timm",
    "hibou_l": "its network is not in timm",
}
"""Name -> why the encoder is not supported."""

# As a library, not one by one: tests over the registered names would build billions of weights.
ENCODERS.register_library(
    lambda: [*FOUNDATION, *ALIASES, *UNSUPPORTED],
    lambda name: functools.partial(FoundationEncoder, name),
)
