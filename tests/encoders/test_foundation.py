"""Foundation encoders: their widths and sizes, the keys of published files, and a clear word when offline."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from torch import nn

import e2e.encoders  # noqa: F401  (registers them)
from e2e.encoders import foundation
from e2e.encoders.base import ENCODERS, Encoder
from e2e.encoders.foundation import ALIASES, FOUNDATION, UNSUPPORTED
from e2e.errors import UserError

# Millions of parameters: of the cards where they say so, else of the published architecture.
MILLIONS = {
    "uni": 303.4,
    "uni2": 681.4,
    "conch": 87.6,
    "virchow": 631.2,
    "virchow2": 631.2,
    "gigapath": 1134.9,
    "hoptimus0": 1134.8,
    "hoptimus1": 1134.8,
    "phikon": 85.8,
    "phikon2": 303.4,
    "ctranspath": 27.5,
    "lunits8": 21.7,
    "lunits16": 21.7,
    "kaikos8": 21.7,
    "kaikos16": 21.7,
    "kaikob8": 85.8,
    "kaikob16": 85.8,
}


def build(name: str, **options) -> Encoder:
    return ENCODERS.build(name, **({"pretrained": False} | options))


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch):
    """All encoders with a single block (or one a stage): quick to run, else as they are."""
    for name, card in FOUNDATION.items():
        depth = {"depths": (2, 1, 1, 1)} if name == "ctranspath" else {"depth": 1}
        arguments = {**card.arguments, **depth}
        monkeypatch.setitem(FOUNDATION, name, replace(card, arguments=arguments))


def images(count: int = 1, side: int = 224) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


# --- the table ---


@pytest.mark.parametrize("name", FOUNDATION)
def test_an_encoder_has_the_size_and_width_of_its_card(name):
    card = FOUNDATION[name]
    with torch.device("meta"):  # nothing is computed
        encoder = build(name)
        features = encoder(torch.empty(2, 3, card.input_px, card.input_px))
    assert features.shape == (2, card.width)
    assert encoder.dim == card.width
    assert not encoder.pretrained
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=5e-3)


@pytest.mark.parametrize("name", ["uni", "hoptimus0", "lunits8", "kaikob16", "ctranspath"])
def test_an_encoder_normalises_by_the_statistics_of_its_card(shallow, name):
    encoder = build(name)
    mean, std = FOUNDATION[name].statistics
    assert encoder.mean.flatten().tolist() == pytest.approx(mean)
    assert encoder.std.flatten().tolist() == pytest.approx(std)


@torch.no_grad()
@pytest.mark.parametrize("name", ["uni2", "ctranspath", "lunits16"])
def test_in_eval_each_row_depends_on_its_patch_alone(shallow, name):
    encoder = build(name).eval()
    pixels = images(3)
    full = encoder(pixels)
    assert bool(full.isfinite().all())
    torch.testing.assert_close(encoder(pixels[[2, 0]]), full[[2, 0]], rtol=1e-4, atol=1e-5)
    assert (full[0] - full[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["virchow", "virchow2"])
def test_virchows_feature_is_the_class_token_and_the_mean_of_the_patches_alone(shallow, name):
    encoder = build(name).eval()
    normal = (images().float() / 255 - encoder.mean) / encoder.std
    tokens = encoder.net.forward_features(normal)
    registers = {"virchow": 0, "virchow2": 4}[name]
    assert tokens.shape == (1, 1 + registers + 256, 1280)
    expected = torch.cat([tokens[:, 0], tokens[:, 1 + registers :].mean(1)], dim=1)
    torch.testing.assert_close(encoder(images()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_conchs_feature_is_that_of_its_file_by_pytorchs_own_attention(shallow, tmp_path):
    """Its pooler is PyTorch's MultiheadAttention, under the names of the published file."""
    torch.manual_seed(0)
    encoder = build("conch")
    for parameter in encoder.net.query_pool.parameters():  # of both signs: no flat attention
        nn.init.normal_(parameter, std=0.5)
    reference, actual = {}, encoder.net.state_dict()
    for name, value in actual.items():
        if not name.startswith("query_pool."):
            reference[f"visual.trunk.{name}"] = value
    pool = "visual.attn_pool_contrast"
    reference[f"{pool}.query"] = actual["query_pool.token"]
    reference[f"{pool}.attn.in_proj_bias"] = torch.cat(
        [actual[f"query_pool.{p}.bias"] for p in QKV]
    )
    for part in QKV:
        reference[f"{pool}.attn.{part[0]}_proj_weight"] = actual[f"query_pool.{part}.weight"]
    names = {"merge": "attn.out_proj", "norm_query": "ln_q", "norm_key": "ln_k"}
    for kind in ("weight", "bias"):
        reference |= {
            f"{pool}.{b}.{kind}": actual[f"query_pool.{a}.{kind}"] for a, b in names.items()
        }
        reference[f"visual.ln_contrast.{kind}"] = actual[f"query_pool.norm.{kind}"]
    others = ("text.cls_emb", "text_decoder.x", "logit_scale", "visual.proj_contrast")
    others += (f"{pool.replace('contrast', 'caption')}.query", "visual.ln_caption.bias")
    file = saved(encoder, tmp_path / "w.bin", reference | {name: torch.zeros(2) for name in others})
    again = build("conch", weights=file).eval()

    pooler = nn.MultiheadAttention(512, 8, kdim=768, vdim=768, batch_first=True)
    start = f"{pool}.attn."
    pooler.load_state_dict(
        {k.removeprefix(start): v for k, v in reference.items() if k.startswith(start)}
    )
    normal = (images(2, 448).float() / 255 - again.mean) / again.std
    tokens = again.net.forward_features(normal)
    assert tokens.shape == (2, 1 + 28 * 28, 768)
    layer = nn.functional.layer_norm
    query, key = (reference[f"{pool}.ln_{k}.weight"] for k in "qk")
    projected = layer(reference[f"{pool}.query"], (512,), query, reference[f"{pool}.ln_q.bias"])
    seen = layer(tokens, (768,), key, reference[f"{pool}.ln_k.bias"])
    pooled = pooler(projected.expand(2, 1, 512), seen, seen, need_weights=False)[0][:, 0]
    last = (reference[f"visual.ln_contrast.{kind}"] for kind in ("weight", "bias"))
    expected = layer(pooled, (512,), *last)
    torch.testing.assert_close(again(images(2, 448)), expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-6
    file = saved(encoder, tmp_path / "w.bin", reference | {"strange": torch.zeros(2)})
    with pytest.raises(UserError, match=r"(?s)does not fit the encoder 'conch'.*strange"):
        build("conch", weights=file)


@torch.no_grad()
@pytest.mark.parametrize("name", ["uni", "gigapath"])
def test_the_others_feature_is_the_normalised_class_token(shallow, name):
    encoder = build(name).eval()
    normal = (images().float() / 255 - encoder.mean) / encoder.std
    expected = encoder.net.forward_features(normal)[:, 0]
    torch.testing.assert_close(encoder(images()), expected, rtol=1e-4, atol=1e-5)


def test_names_go_with_the_grammar_of_models():
    assert not [name for name in FOUNDATION if "_" in name]
    assert set(ALIASES.values()) <= set(FOUNDATION)
    assert build_class("uni_v2") is build_class("uni2") is foundation.FoundationEncoder
    assert not set(FOUNDATION) & set(ENCODERS.names())


def build_class(name: str):
    return ENCODERS.factory(name).func  # pyright: ignore[reportFunctionMemberAccess]


def test_what_timm_has_is_still_timms():
    assert build_class("vit_tiny_patch16_224") is not foundation.FoundationEncoder


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_encoder_that_cannot_be_built_says_why_and_what_to_do(name):
    with pytest.raises(UserError, match=rf"'{name}' is not supported.*\n.*data\.features"):
        build(name)


def test_a_tag_or_a_slip_is_named():
    with pytest.raises(
        UserError, match=r"foundation encoders have no tags\n  set encoder.name=uni$"
    ):
        build("uni.v1")
    with pytest.raises(UserError, match="did you mean 'hoptimus0'"):
        build("hoptimus_0")


# --- options ---


def test_patches_of_another_size_and_only_these(shallow):
    encoder = build("uni", img_size=96).eval()
    with torch.no_grad():
        assert encoder(images(side=96)).shape == (1, 1024)
    with pytest.raises(UserError, match="'uni' is built for patches of 96 x 96"):
        encoder(images())


def test_it_is_fine_tuned_like_any_other(shallow):
    with torch.device("meta"):
        encoder = build("lunits16", freeze=1, drop_path=0.1)
        adapted = build("lunits16", lora_rank=4)
    learn = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert learn
    assert not [n for n in learn if "patch_embed" in n]
    learn = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert learn
    assert all("lora" in n for n in learn)
    assert len(encoder.layers()) == len(encoder.layers(coarse=True)) == 2  # patches, one block


# --- weights ---


def saved(encoder: Encoder, path: Path, state: dict[str, torch.Tensor] | None = None) -> str:
    state = encoder.net.state_dict() if state is None else state
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


@torch.no_grad()
def scrambled(name: str) -> Encoder:
    """An encoder none of whose weights is where it starts."""
    torch.manual_seed(1)
    encoder = build(name).eval()
    for value in encoder.net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.2 + 0.01)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_a_local_file_is_loaded_whole(shallow, tmp_path, suffix):
    encoder = scrambled("lunits16")
    again = build("lunits16", weights=saved(encoder, tmp_path / f"w{suffix}")).eval()
    assert again.pretrained
    assert torch.equal(again(images()), encoder(images()))


@torch.no_grad()
def test_position_embeddings_are_resampled_to_the_size_asked_for(shallow, tmp_path):
    file = saved(scrambled("lunits16"), tmp_path / "w.pt")
    assert build("lunits16", weights=file, img_size=96).net.pos_embed.shape == (1, 37, 384)


QKV = ("query", "key", "value")


def as_transformers(state: dict[str, torch.Tensor], *, dino: bool) -> dict[str, torch.Tensor]:
    """One block under the names of ViTModel, or of Dinov2Model, written out."""
    result = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, 1, 8),
        "embeddings.position_embeddings": state["pos_embed"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    names = {
        "attention.output.dense": "attn.proj",
        "norm1" if dino else "layernorm_before": "norm1",
        "norm2" if dino else "layernorm_after": "norm2",
        "mlp.fc1" if dino else "intermediate.dense": "mlp.fc1",
        "mlp.fc2" if dino else "output.dense": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        projection = state[f"patch_embed.proj.{kind}"]
        result[f"embeddings.patch_embeddings.projection.{kind}"] = projection
        for reference, actual in names.items():
            result[f"encoder.layer.0.{reference}.{kind}"] = state[f"blocks.0.{actual}.{kind}"]
        parts = state[f"blocks.0.attn.qkv.{kind}"].chunk(3)
        for name, part in zip(QKV, parts, strict=True):
            result[f"encoder.layer.0.attention.attention.{name}.{kind}"] = part
    if dino:
        for number in (1, 2):
            scale = state[f"blocks.0.ls{number}.gamma"]
            result[f"encoder.layer.0.layer_scale{number}.lambda1"] = scale
    else:
        result["pooler.dense.weight"] = torch.zeros(8, 8)
    return result


@torch.no_grad()
@pytest.mark.parametrize("name", ["phikon", "phikon2"])
def test_phikons_files_have_the_keys_of_transformers(shallow, tmp_path, name):
    encoder = scrambled(name)
    reference = as_transformers(encoder.net.state_dict(), dino=name == "phikon2")
    file = saved(encoder, tmp_path / "model.safetensors", reference)
    again = build(name, weights=file).eval()
    assert torch.equal(again(images()), encoder(images()))


@torch.no_grad()
def test_ctranspaths_file_is_of_an_older_timm(shallow, tmp_path):
    encoder = scrambled("ctranspath")
    reference = {}
    for name, value in encoder.net.state_dict().items():
        for stage in (1, 2, 3):  # halved at the end of the stage before
            if name.startswith(f"layers.{stage}.downsample"):
                name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
                break
        reference[name] = value
    assert "layers.0.downsample.reduction.weight" in reference
    reference["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    reference["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    torch.save({"model": reference}, tmp_path / "ctranspath.pth")
    again = build("ctranspath", weights=str(tmp_path / "ctranspath.pth")).eval()
    assert torch.equal(again(images()), encoder(images()))


def test_the_stem_of_ctranspath_halves_twice():
    stem = foundation.ConvStem(img_size=224, patch_size=4, embed_dim=96, norm_layer=nn.LayerNorm)
    kinds = [type(layer).__name__ for layer in stem.proj]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["Conv2d"]
    widths = [layer.out_channels for layer in stem.proj if isinstance(layer, nn.Conv2d)]
    assert widths == [12, 24, 96]
    assert stem(torch.zeros(1, 3, 224, 224)).shape == (1, 56 * 56, 96)


def test_weights_that_do_not_fit_name_the_keys(shallow, tmp_path):
    state = dict(build("lunits16").net.state_dict())
    file = saved(build("lunits16"), tmp_path / "w.pt", {**state, "more": torch.zeros(1)})
    with pytest.raises(UserError, match=r"does not fit the encoder 'lunits16'\n.*more"):
        build("lunits16", weights=file)
    with pytest.raises(UserError, match=r"(?s)does not fit the encoder 'lunits8'.*patch_embed"):
        build("lunits8", weights=saved(build("lunits16"), tmp_path / "w.pt"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("stolen",)


def test_what_are_no_weights_are_refused(shallow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "evil.pt")
    Path("rubbish.bin").write_bytes(b"rubbish")
    for name in ("evil.pt", "rubbish.bin"):
        with pytest.raises(UserError, match=f"{name} cannot be read as weights"):
            build("lunits16", weights=name)
    assert not Path("stolen").exists()
    with pytest.raises(UserError, match=r"no weights at nowhere\.pt"):
        build("lunits16", weights="nowhere.pt")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("uni2", "https://huggingface.co/MahmoodLab/UNI2-h"),
        ("ctranspath", "https://github.com/Xiyue-Wang/TransPath"),
    ],
)
def test_offline_it_says_what_to_download_and_where_to_put_it(
    shallow, tmp_path, monkeypatch, name, place
):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", hub.HF_HUB_OFFLINE)  # put back afterwards
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    with pytest.raises(UserError) as error:
        build(name, pretrained=True)
    message = str(error.value)
    for word in (f"'{name}'", place, FOUNDATION[name].licence, "encoder.weights=FILE"):
        assert word in message
