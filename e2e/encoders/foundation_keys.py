"""Published state dicts of foundation encoders, converted to timm's keys."""

from __future__ import annotations

import re

import torch
from torch import Tensor


def from_swin(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert CTransPath's keys, those of a Swin of timm before 0.9: it downsampled at the end of a stage."""

    def key(name: str) -> str:
        return re.sub(
            r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name
        )

    buffers = ("attn_mask", "relative_position_index")  # computed by the network
    return {key(name): value for name, value in published.items() if not name.endswith(buffers)}


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
"""Prefix of a key in CONCH's file -> prefix here."""


def from_coca(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert CONCH's keys: the image tower's trunk and contrastive pooler, without the last projection."""
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if name == "visual.attn_pool_contrast.attn.in_proj_bias":
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            state |= {f"query_pool.{part}.bias": bias for part, bias in parts}
        elif start := next((key for key in _COCA if name.startswith(key)), None):
            state[_COCA[start] + name.removeprefix(start)] = value
        elif not name.startswith(_OTHER_COCA):
            state[name] = value  # not a key of CONCH: it will not fit, which is reported later
    return state


_OTHER_COCA = ("text.", "text_decoder.", "logit_scale", "visual.proj_contrast",
               "visual.attn_pool_caption.", "visual.ln_caption.")  # fmt: skip
"""Prefixes of other keys in CONCH's file: the text tower and the caption decoder."""

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


def from_transformers(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the keys of transformers' ViTModel and Dinov2Model, which separate query, key and value."""
    renamed: dict[str, Tensor] = {}
    for name, value in published.items():
        if name.startswith("pooler.") or name == "embeddings.mask_token":
            continue
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    state = {name: value for name, value in renamed.items() if ".attention.attention." not in name}
    for name in renamed:
        if ".attention.attention.query." in name:
            parts = [
                renamed[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")
            ]
            state[name.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(parts)
    return state
