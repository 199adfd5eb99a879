"""Patch encoders: widths, row by row in eval, weights from files, and a clear word when offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from torch import nn

import e2e.encoders  # noqa: F401  (registers them)
from e2e.encoders.base import ENCODERS, Encoder
from e2e.errors import UserError


def build(name: str, seed: int = 0, **options) -> Encoder:
    torch.manual_seed(seed)
    return ENCODERS.build(name, **({"pretrained": False} | options))


def images(count: int = 4, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", params=ENCODERS.names())
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return build(request.param).eval()


# --- the contract, for every registered encoder ---


@torch.no_grad()
def test_patches_become_rows_of_the_promised_width(encoder):
    features = encoder(images())
    assert features.shape == (4, encoder.dim)
    assert features.dtype == torch.float32
    assert bool(features.isfinite().all())


@torch.no_grad()
def test_in_eval_each_row_depends_on_its_patch_alone(encoder):
    pixels = images(5)
    whole = encoder(pixels)
    for rows in ([0], [4], [1, 3], [3, 1]):
        torch.testing.assert_close(encoder(pixels[rows]), whole[rows], rtol=1e-4, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3  # and on its patch at all


@torch.no_grad()
def test_bytes_and_floats_are_the_same_pixels(encoder):
    pixels = images(2)
    torch.testing.assert_close(encoder(pixels.float() / 255), encoder(pixels))


@torch.no_grad()
def test_the_input_is_left_as_it_was(encoder):
    for pixels in (images(2), images(2).float() / 255):
        before = pixels.clone()
        encoder(pixels)
        assert torch.equal(pixels, before)


def test_every_parameter_is_trained():
    encoder = build("r18").train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts each residual branch at zero
    encoder(images()).square().mean().backward()
    lost = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert lost == []


def test_a_seed_gives_the_same_weights():
    one, two, other = (dict(build("r18", seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


# --- the encoders of the ABMILX project ---


@pytest.mark.parametrize(
    ("name", "dim", "parameters"),
    [("r18", 256, 2_782_784), ("r50", 1024, 8_543_296), ("r50v2", 1024, 8_543_296)],
)
def test_the_residual_networks_end_after_their_third_stage(name, dim, parameters):
    encoder = build(name)
    assert encoder.dim == dim
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert not any("layer4" in key or "fc" in key for key in encoder.state_dict())
    assert encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert encoder.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert not encoder.pretrained


@torch.no_grad()
def test_a_cut_network_is_the_whole_ones_third_stage():
    whole = timm.create_model("resnet18.tv_in1k").eval()
    encoder = build("r18").eval()
    encoder.net.load_state_dict(whole.state_dict(), strict=False)
    pixels = images()
    normal = (pixels.float() / 255 - encoder.mean) / encoder.std
    expected = whole.forward_intermediates(normal, indices=[3], intermediates_only=True)[0]
    torch.testing.assert_close(encoder(pixels), expected.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_any_timm_network_is_an_encoder():
    for name, options, dim in (
        ("resnet18", {}, 512),
        ("resnet18.a1_in1k", {"stage": 2}, 128),
        ("convnext_atto", {"drop_path": 0.1}, 320),
    ):
        encoder = build(name, **options).eval()
        assert encoder.dim == dim
        assert encoder(images(2)).shape == (2, dim)


@torch.no_grad()
def test_the_width_is_right_for_networks_with_a_head_of_their_own():
    encoder = build("mobilenetv3_small_050").eval()
    assert encoder(images(2)).shape == (2, encoder.dim)


@torch.no_grad()
def test_the_width_is_right_for_networks_with_channels_last_maps():
    encoder = build("swin_tiny_patch4_window7_224", stage=1).eval()
    assert encoder(images(1, 224)).shape == (1, encoder.dim)


@pytest.mark.parametrize(
    ("name", "options"), [("r18", {"stage": 9}), ("vgg11", {"drop_path": 0.1})]
)
def test_an_option_that_the_network_does_not_have_is_a_users_mistake(name, options):
    with pytest.raises(UserError):
        build(name, **options)


# --- weights ---


def save_weights(path: Path, **changes: torch.Tensor | None) -> Path:
    weights = {k: v.clone() for k, v in timm.create_model("resnet18").state_dict().items()}
    for key, value in changes.items():
        key = key.replace("__", ".")
        weights.pop(key, None)
        if value is not None:
            weights[key] = value
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_a_whole_networks_weights_fit_its_first_stages(tmp_path, name):
    value = torch.full((64, 3, 7, 7), 0.25)
    path = save_weights(tmp_path / name, conv1__weight=value)
    encoder = build("r18", weights=str(path))
    assert bool((encoder.net.state_dict()["conv1.weight"] == 0.25).all())
    assert encoder.pretrained


def test_weights_that_do_not_fit_name_the_keys(tmp_path):
    path = save_weights(
        tmp_path / "w.pt",
        bn1__bias=None,
        conv1__weight=torch.zeros(64, 3, 3, 3),
        projector__weight=torch.zeros(1),
    )
    with pytest.raises(UserError) as error:
        build("r18", weights=str(path))
    assert str(error.value).splitlines() == [
        f"{path} does not fit the encoder 'resnet18.tv_in1k'",
        "  missing: bn1.bias",
        "  unknown: projector.weight",
        "  conv1.weight: (64, 3, 3, 3) in the file, (64, 3, 7, 7) in the encoder",
    ]


def test_files_that_hold_no_weights_are_refused(tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as error:
            build("r18", weights=str(path))
        return str(error.value)

    assert "no weights at" in refused(tmp_path / "nothing.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    assert "cannot be read as weights" in refused(tmp_path / "text.safetensors")
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    assert "holds no state dict" in refused(tmp_path / "nested.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")  # code, which must not be run
    assert "cannot be read as weights" in refused(tmp_path / "module.pt")
    whole = save_weights(tmp_path / "whole.pt")
    whole.write_bytes(whole.read_bytes()[:100_000])
    assert "cannot be read as weights" in refused(whole)


@pytest.mark.parametrize("text", ["hello", ""])
def test_a_text_file_is_no_weights(tmp_path, text):
    (tmp_path / "text.pt").write_text(text)
    with pytest.raises(UserError, match="cannot be read as weights"):
        build("r18", weights=str(tmp_path / "text.pt"))


@torch.no_grad()
def test_real_weights_are_loaded(shared_data):
    path = shared_data / "weights/tf_efficientnet_lite0_timmkeys.pt"
    encoder = build("tf_efficientnet_lite0", weights=str(path)).eval()
    assert encoder.pretrained
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5] * 3
    trained = encoder(images(2))
    untrained = build("tf_efficientnet_lite0").eval()(images(2))
    assert trained.shape == (2, 1280)
    assert (trained - untrained).abs().max() > 0.1
    original = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    original.load_state_dict(torch.load(path, weights_only=True))
    features = original.forward_features(images(2).float() / 127.5 - 1)
    torch.testing.assert_close(
        trained, original.forward_head(features, pre_logits=True), rtol=1e-3, atol=1e-4
    )


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No way to the hub, and nothing in its cache."""
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", hub.HF_HUB_OFFLINE)  # put back afterwards
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def test_without_a_network_pretrained_weights_are_one_message(offline):
    with pytest.raises(UserError) as error:
        build("r18", pretrained=True)
    assert hub.HF_HUB_OFFLINE  # so that the hub is not asked again and again for a minute
    first, second = str(error.value).splitlines()
    assert first.startswith("no pretrained weights for 'resnet18.tv_in1k': ")
    assert "encoder.weights=FILE" in second
    assert "encoder.pretrained=false" in second


def test_without_a_network_a_file_of_weights_is_enough(offline, tmp_path):
    path = save_weights(tmp_path / "w.pt")
    assert build("r18", pretrained=True, weights=str(path)).pretrained
