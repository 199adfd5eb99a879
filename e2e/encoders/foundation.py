"""Foundation encoders of pathology, by name: networks of timm's with arguments of their own.

Arguments, statistics and licences are those of the models' cards. The weights are their owners':
they come from the hub after its terms are accepted there, or from a file (``encoder.weights``).
"""

from __future__ import annotations

import functools
import re
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
from timm.models import load_state_dict, load_state_dict_from_hf
from torch import Tensor, nn

from e2e.encoders.base import ENCODERS, Encoder
from e2e.encoders.lora import add_lora
from e2e.encoders.timm import TimmEncoder, notice_offline, resampled
from e2e.errors import UserError, format_list

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUNIT = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)
BIOPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

NO_COMMERCE = "CC-BY-NC-ND 4.0, on request"
Keys = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Card:
    """What is known of an encoder."""

    width: int
    """D of its features."""
    network: str
    """timm's name."""
    source: str
    """Of the weights: a model of the Hugging Face hub, or an address."""
    licence: str
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    """Mean and standard deviation of its training images, in 0..1."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the network, besides timm's own."""
    mean_too: bool = False
    """A feature is the class token and the mean of the patches' tokens, not the first alone."""
    pool: Callable[[], nn.Module] | None = None
    """Makes of all tokens (n, tokens, E) the feature (n, width); it becomes the network's ``query_pool``."""
    keys: Keys = dict
    """The published state dict -> the same under timm's keys."""
    input_px: int = 224
    """Side of the patches it was trained on; another one resamples its position embeddings."""


class ConvStem(PatchEmbed):
    """CTransPath's patches of 4 x 4 pixels: two strided convolutions of 3 x 3, one of 1 x 1.

    Source: Wang et al. 2022, "Transformer-based unsupervised contrastive learning for
    histopathological image classification", Medical Image Analysis 81, section 3.2.
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
    arXiv:2205.01917; as CONCH has it, with a LayerNorm behind it (Lu et al. 2024, Nature Medicine 30).

    Parameters
    ----------
    context : int
        Width of the tokens.
    dim : int
        E, of the query and the feature.
    heads : int
        H, which divides E.
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
        """(n, tokens, context) -> (n, dim)."""
        normal = self.norm_key(tokens)
        query = self.query(self.norm_query(self.token)).expand(len(tokens), 1, -1)
        three = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (query, self.key(normal), self.value(normal))
        )
        pooled = F.scaled_dot_product_attention(*three)  # (n, H, 1, E/H)
        return self.norm(self.merge(pooled.flatten(1)))


class FoundationEncoder(TimmEncoder):
    """An encoder of :data:`FOUNDATION`: (n,3,H,W) -> (n, width), the class token unless it says else.

    Parameters
    ----------
    name : str
        In :data:`FOUNDATION` or :data:`ALIASES`.
    pretrained : bool
        Fetch the weights from the hub, or take them from its cache.
    weights : str | None
        Load this file instead (.bin, .pt, .pth or .safetensors), as it is published.
    drop_path, img_size, freeze, lora_rank, lora_alpha, lora_targets : float | None
        See :class:`TimmEncoder`.

    Raises
    ------
    UserError
        The weights cannot be had, or do not fit; the encoder cannot be built here.
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
        self.model, self.cut, self.channels_last = name, False, False
        self.pretrained = pretrained or weights is not None
        self.dim, self.mean_too = card.width, card.mean_too
        self.net = timm.create_model(
            card.network,
            num_classes=0,
            global_pool="" if card.mean_too or card.pool else None,
            img_size=img_size or card.input_px,
            drop_path_rate=drop_path,
            **card.arguments,
        )
        if card.pool:
            self.net.query_pool = card.pool()
        if self.pretrained:
            _load(self, card, weights)
        if freeze:
            self.freeze(freeze)
        if lora_rank:
            add_lora(self.net, rank=lora_rank, alpha=lora_alpha, targets=lora_targets)

    def features(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`."""
        self._check_size(images)
        found = self.net(images)
        if hasattr(self.net, "query_pool"):
            return self.net.query_pool(found)  # pyright: ignore[reportCallIssue]
        if not self.mean_too:
            return found
        patches = found[:, self.net.num_prefix_tokens :]  # pyright: ignore[reportArgumentType]
        return torch.cat([found[:, 0], patches.mean(1)], dim=1)


def _card(name: str) -> Card:
    if name in ABSENT:
        raise UserError(
            f"the encoder '{name}' cannot be built here: {ABSENT[name]}\n"
            "  extract its features with TRIDENT, and set data.features to their folder"
        )
    if name not in FOUNDATION:
        raise UserError(f"the encoder '{name.split('.')[0]}' comes without a tag behind its name")
    return FOUNDATION[name]


def _load(encoder: FoundationEncoder, card: Card, weights: str | None) -> None:
    """Load a file or what the hub has; every key must be there, and no other."""
    net = encoder.net
    found = card.keys(_from_file(weights) if weights else _from_hub(encoder.model, card))
    wanted = net.state_dict()
    if "pos_embed" in found and "pos_embed" in wanted:
        found["pos_embed"] = resampled(found["pos_embed"], wanted["pos_embed"], net)
    try:
        net.load_state_dict(found)
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(
            f"{weights or card.source} does not fit the encoder '{encoder.model}'\n"
            f"{format_list(text if len(text) < 300 else f'{text[:300]} ...' for text in faults)}"
        ) from error


def _from_file(weights: str) -> dict[str, Tensor]:
    if not Path(weights).is_file():
        raise UserError(f"no weights at {weights}\n  set encoder.weights to a file")
    try:
        return load_state_dict(weights, use_ema=False, weights_only=True)
    except Exception as error:  # what is no pickle may raise anything when read as one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{weights} cannot be read as weights: {reason}\n"
            "  a state dict is needed, saved with torch.save or as safetensors"
        ) from error


def _from_hub(name: str, card: Card) -> dict[str, Tensor]:
    place = card.source if "://" in card.source else f"https://huggingface.co/{card.source}"
    reason = "they are not on the hub as a model"
    if "://" not in card.source:
        notice_offline()
        try:
            return load_state_dict_from_hf(card.source, weights_only=True)
        except (OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(
        f"no pretrained weights for '{name}': {reason}\n"
        f"  get them from {place} (licence: {card.licence}), then either\n"
        "  log in with `hf auth login` where there is a network, or put the file anywhere and set\n"
        "  encoder.weights=FILE (pytorch_model.bin, model.safetensors or .pth)"
    )


# --- keys of published files ---


def _from_swin(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTransPath's: a Swin of timm before 0.9, which halved a stage's map at its end."""

    def key(name: str) -> str:
        return re.sub(
            r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name
        )

    buffers = ("attn_mask", "relative_position_index")  # made anew
    return {key(name): value for name, value in found.items() if not name.endswith(buffers)}


_COCA = {
    "visual.trunk.": "",
    "visual.attn_pool_contrast.query": "query_pool.token",
    "visual.attn_pool_contrast.attn.q_proj_weight": "query_pool.query.weight",
    "visual.attn_pool_contrast.attn.k_proj_weight": "query_pool.key.weight",
    "visual.attn_pool_contrast.attn.v_proj_weight": "query_pool.value.weight",
    "visual.attn_pool_contrast.attn.out_proj.": "query_pool.merge.",
    "visual.attn_pool_contrast.ln_q.": "query_pool.norm_query.",
    "visual.attn_pool_contrast.ln_k.": "query_pool.norm_key.",
    "visual.ln_contrast.": "query_pool.norm.",
}
"""Beginning of a key in CONCH's file -> the same here."""


def _from_coca(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """CONCH's: of the image tower the trunk and the contrastive pooler, before its last projection."""
    made: dict[str, Tensor] = {}
    for name, value in found.items():
        if name == "visual.attn_pool_contrast.attn.in_proj_bias":
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            made |= {f"query_pool.{part}.bias": bias for part, bias in parts}
        elif start := next((key for key in _COCA if name.startswith(key)), None):
            made[_COCA[start] + name.removeprefix(start)] = value
        elif not name.startswith(_OTHER_COCA):
            made[name] = value  # nothing of CONCH's: it will not fit, and the message says so
    return made


_OTHER_COCA = ("text.", "text_decoder.", "logit_scale", "visual.proj_contrast",
               "visual.attn_pool_caption.", "visual.ln_caption.")  # fmt: skip
"""What CONCH's file has besides: its text side, and its captions'."""

_TRANSFORMERS = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]


def _from_transformers(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of transformers' ViTModel and Dinov2Model, which keep query, key and value apart."""
    plain: dict[str, Tensor] = {}
    for name, value in found.items():
        if name.startswith("pooler.") or name == "embeddings.mask_token":
            continue
        for pattern, ours in _TRANSFORMERS:
            name = re.sub(pattern, ours, name)
        plain[name] = value
    made = {name: value for name, value in plain.items() if ".attention.attention." not in name}
    for name in plain:
        if ".attention.attention.query." in name:
            parts = [
                plain[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")
            ]
            made[name.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(parts)
    return made


# --- the encoders ---

_SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5}
_VIRCHOW = {"mlp_ratio": 5.3375, **_SWIGLU}
_KAIKO = "1aurent/{}.kaiko_ai_towards_large_pathology_fms"

FOUNDATION: dict[str, Card] = {
    "uni": Card(
        1024,
        "vit_large_patch16_224",
        "MahmoodLab/UNI",
        NO_COMMERCE,
        arguments={"init_values": 1e-5},
    ),
    "uni2": Card(
        1536,
        "vit_giant_patch14_224",
        "MahmoodLab/UNI2-h",
        NO_COMMERCE,
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
        NO_COMMERCE,
        CLIP,
        pool=functools.partial(QueryPool, 768, 512, 8),
        keys=_from_coca,
        input_px=448,
    ),
    "virchow": Card(
        2560,
        "vit_huge_patch14_224",
        "paige-ai/Virchow",
        "Apache 2.0, on request",
        arguments=_VIRCHOW,
        mean_too=True,
    ),
    "virchow2": Card(
        2560,
        "vit_huge_patch14_224",
        "paige-ai/Virchow2",
        NO_COMMERCE,
        arguments={"reg_tokens": 4, **_VIRCHOW},
        mean_too=True,
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
        NO_COMMERCE,
        BIOPTIMUS,
    ),
    "phikon": Card(
        768,
        "vit_base_patch16_224",
        "owkin/phikon",
        "Owkin's, not commercial",
        keys=_from_transformers,
    ),
    "phikon2": Card(
        1024,
        "vit_large_patch16_224",
        "owkin/phikon-v2",
        "Owkin's, not commercial",
        arguments={"init_values": 1.0},
        keys=_from_transformers,
    ),
    "ctranspath": Card(
        768,
        "swin_tiny_patch4_window7_224",
        "https://github.com/Xiyue-Wang/TransPath",
        "GPL 3.0",
        arguments={"embed_layer": ConvStem},
        keys=_from_swin,
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
"""Name -> card. No underscore in a name, so that ``e2e_<encoder>_<head>`` can have it."""

ALIASES = {
    "uni_v1": "uni",
    "uni_v2": "uni2",
    "conch_v1": "conch",
    "phikon_v2": "phikon2",
    "lunit-vits8": "lunits8",
    **{f"kaiko-vit{size}{px}": f"kaiko{size}{px}" for size in "sb" for px in (8, 16)},
}
"""What TRIDENT calls them."""

ABSENT = {
    "conch_v15": "its network is published as code of its own",
    "musk": "its network is published as code of its own",
    "hibou_l": "its network is published as code of its own",
}
"""Name -> why there is no such encoder here."""

# A family and no names of the registry's own: tests over these would build billions of weights.
ENCODERS.register_library(
    lambda: [*FOUNDATION, *ALIASES, *ABSENT],
    lambda name: functools.partial(FoundationEncoder, name),
)
