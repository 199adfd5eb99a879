"""Patch encoders: widths, row by row in eval, weights from files, and a clear word when offline."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from torch import nn

import e2e.encoders
import e2e.heads  # noqa: F401  (registers them)
from e2e.encoders.base import ENCODERS, Encoder
from e2e.encoders.state_dicts import describe_network
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.heads.base import HEADS
from tests.helpers.encoders import build, fine_tune, images, saved_bytes

NETWORKS = [name for name in ENCODERS.names() if ENCODERS.plugin_class(name).input_kind == "pixels"]


@pytest.fixture(scope="module", params=NETWORKS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return build(request.param).eval()


# --- the contract, for every registered encoder ---


@pytest.mark.parametrize("name", [*ENCODERS.names(), "uni", "resnet18"])
def test_every_option_has_a_text_in_the_docstring(name):
    described = ENCODERS.describe(name)
    assert described.summary
    for option in described.options:
        assert option.text, f"{name}: the option {option.name} is not in the Parameters section"


@torch.no_grad()
def test_patches_become_rows_of_the_promised_width(encoder):
    features = encoder(images())
    assert features.shape == (4, encoder.dim)
    assert features.dtype == torch.float32
    assert bool(features.isfinite().all())


@torch.no_grad()
def test_in_eval_each_row_depends_on_its_patch_alone(encoder):
    pixels = images(5)
    complete = encoder(pixels)
    for rows in ([0], [4], [1, 3], [3, 1]):
        torch.testing.assert_close(encoder(pixels[rows]), complete[rows], rtol=1e-4, atol=1e-5)
    assert (complete[0] - complete[1]).abs().max() > 1e-3  # and on its patch at all


@torch.no_grad()
def test_bytes_and_floats_are_the_same_pixels(encoder):
    pixels = images(2)
    torch.testing.assert_close(encoder(pixels.float() / 255), encoder(pixels), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_input_is_left_as_it_was(encoder):
    for pixels in (images(2), images(2).float() / 255):
        before = pixels.clone()
        encoder(pixels)
        assert torch.equal(pixels, before)


@pytest.mark.parametrize("name", ["r18", "regnety_002"])
def test_every_parameter_is_trained_from_the_first_step(name):
    encoder = build(name).train()
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
    complete = timm.create_model("resnet18.tv_in1k").eval()
    encoder = build("r18").eval()
    encoder.net.load_state_dict(complete.state_dict(), strict=False)
    pixels = images()
    normal = (pixels.float() / 255 - encoder.mean) / encoder.std
    expected = complete.forward_intermediates(normal, indices=[3], intermediates_only=True)[0]
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


@pytest.mark.parametrize("name", ["r18", "r50", "r50v2"])
def test_the_short_names_take_every_option(name):
    actual, any_timm = ENCODERS.options(name), ENCODERS.options("resnet18")
    assert actual == {**any_timm, "stage": (int | None, 3)}


def test_patches_of_another_size_than_the_network_was_made_for():
    encoder = build("vit_tiny_patch16_224", img_size=32).eval()
    assert encoder.net.pos_embed.shape == (1, 1 + 4, 192)
    with torch.no_grad():
        assert encoder(images(2, 32)).shape == (2, 192)
    with pytest.raises(UserError, match=r"32 x 32 pixels, found 48 x 48\n.*img_size=48"):
        encoder(images(1, 48))
    with pytest.raises(UserError, match="224 x 224 pixels, found 64 x 64"):
        build("vit_tiny_patch16_224", stage=1)(images(1, 64))
    with pytest.raises(UserError, match=r"img_size=64: .*\n.*remove encoder.img_size"):
        build("r18", img_size=64)


# --- layers ---

FAMILIES = [
    ("r18", {}),
    ("r50", {}),
    ("resnet50", {}),
    ("convnext_tiny", {}),
    ("convnext_tiny", {"stage": 2}),
    ("swin_tiny_patch4_window7_224", {}),
    ("swin_tiny_patch4_window7_224", {"stage": 1}),
    ("vit_tiny_patch16_224", {}),
    ("vit_base_patch16_224", {}),
    ("vit_small_patch14_dinov2", {"stage": 7}),
    ("tf_efficientnet_lite0", {}),
    ("tf_efficientnet_lite0", {"stage": 2}),
    ("mobilenetv3_small_050", {"stage": 2}),
    ("densenet121", {"stage": 2}),
    ("regnety_002", {}),
    ("poolformer_s12", {}),  # which timm does not group
    ("poolformer_s12", {"stage": 2}),
]


@pytest.mark.parametrize(("name", "options"), FAMILIES)
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_follow_one_another_as_the_patches_go_through_them(name, options, coarse):
    with torch.device("meta"):  # nothing is computed
        encoder = build(name, **options)
    layers = encoder.layers(coarse=coarse)
    names = sorted(n for n, _ in encoder.named_parameters())
    assert sorted(n for layer in layers for n in layer) == names
    assert len(layers) > 2
    called: dict[str, int] = {}
    for path, module in encoder.named_modules():
        module.register_forward_pre_hook(
            lambda *_, path=path: (called.setdefault(path, len(called)), None)[1]
        )
    side = encoder.net.pretrained_cfg["input_size"][-1]
    features = encoder(torch.empty(2, 3, side, side, device="meta"))
    paths = [{n.rpartition(".")[0] for n in layer} & called.keys() for layer in layers]
    first = [min(called[path] for path in layer) for layer in paths]
    assert first == sorted(set(first))
    features.sum().backward()  # a cut network has nothing that its features do not need
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


def test_the_layers_of_a_cut_residual_network_by_hand():
    fine = [{".".join(n.split(".")[1:3]) for n in layer} for layer in build("r18").layers()]
    blocks = [{f"layer{k}.{b}"} for k in (1, 2, 3) for b in (0, 1)]
    assert fine == [{"conv1.weight", "bn1.weight", "bn1.bias"}, *blocks]
    coarse = [{n.split(".")[1] for n in layer} for layer in build("r18").layers(coarse=True)]
    assert coarse == [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}]


def test_without_a_word_an_encoder_is_one_layer_of_which_all_is_decayed():
    class Plain(Encoder):
        def __init__(self) -> None:
            super().__init__([0.0] * 3, [1.0] * 3)
            self.net = nn.Linear(2, 2)

    assert Plain().layers() == Plain().layers(coarse=True) == [["net.weight", "net.bias"]]
    assert Plain().no_weight_decay() == set()


# --- frozen stages ---


@pytest.mark.parametrize("policy", ["chunk", "frozen"])
def test_frozen_stages_stay_bit_by_bit_as_they_were(policy):
    encoder = build("r18", freeze=3)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts each residual branch at zero
    _, model, moved = fine_tune(encoder, side=32, lr=1e-3, batch_norm=policy)
    state = model.encoder.net.state_dict()
    learns = {f"encoder.net.{n}" for n in state if n.startswith("layer3.")}
    statistics = {n for n in learns if "running" in n or "tracked" in n}
    expected = learns if policy == "chunk" else learns - statistics
    assert {name for name in moved if name.startswith("encoder.")} == expected
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(n.split(".")[2] in ("conv1", "bn1", "layer1", "layer2") for n in frozen)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_frozen_stages_are_in_eval_mode_whoever_says_train():
    encoder = build("vit_tiny_patch16_224", img_size=32, freeze=3, drop_path=0.5)
    model = MILModel(encoder, HEADS.build("mean", encoder.dim, 2))
    for _ in range(2):
        model.train()
        frozen = [encoder.net.patch_embed, encoder.net.blocks[0], encoder.net.blocks[1]]
        assert not any(m.training for part in frozen for m in part.modules())
        assert all(m.training for m in encoder.net.blocks[2].modules())
        assert encoder.training
        model.eval()
        assert not any(m.training for m in model.modules())


def test_frozen_stages_keep_no_activations():
    pixels = images(2)
    sizes = [saved_bytes(build("r18", freeze=n).train(), pixels) for n in (0, 1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)
    # Only the third stage is left: a sixteenth of the stem's pixels, four times its channels.
    assert sizes[3] < 0.15 * sizes[0]


def test_what_cannot_be_frozen_is_a_users_mistake():
    assert not any(p.requires_grad for p in build("r18", freeze=3).net.layer2.parameters())
    for stages in (4, -1):
        with pytest.raises(UserError) as error:
            build("r18", freeze=stages)
        assert f"encoder.freeze={stages} must be 0 to 3" in str(error.value)
        assert "optim.train_encoder=false" in str(error.value)


# --- a large ViT, end to end ---


def test_a_large_vit_is_fine_tuned_end_to_end():
    encoder = build("vit_base_patch16_224", img_size=32, freeze=2)
    losses, model, moved = fine_tune(encoder, side=32, lr=1e-3, layer_decay=0.5)
    assert losses[0] > losses[1] > losses[2]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.split(".")[2] for n in frozen} == {"patch_embed", "pos_embed", "cls_token", "blocks"}
    assert {n.split(".")[3] for n in frozen if ".blocks." in n} == {"0"}
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == learns
    start = build("vit_base_patch16_224", img_size=32).net
    pairs = [(start.blocks[k], model.encoder.net.blocks[k]) for k in (2, 5, 8, 11)]
    steps = [(b.mlp.fc1.weight - a.mlp.fc1.weight).abs().max().item() for a, b in pairs]
    ratios = [low / high for low, high in pairwise(steps)]
    assert ratios == pytest.approx([0.5**3] * 3, rel=0.2)  # three layers apart


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


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stage"), [("convnext_atto", 1), ("tf_efficientnet_lite0", 2), ("convnext_atto", None)]
)
def test_a_whole_networks_weights_fit_what_timm_names_anew(tmp_path, name, stage):
    torch.manual_seed(3)
    complete = timm.create_model(name).eval()
    torch.save(complete.state_dict(), tmp_path / "w.pt")
    encoder = build(name, weights=str(tmp_path / "w.pt"), stage=stage).eval()
    normal = (images().float() / 255 - encoder.mean) / encoder.std
    if stage is None:
        expected = complete.forward_head(complete.forward_features(normal), pre_logits=True)
    else:
        maps = complete.forward_intermediates(normal, indices=[stage], intermediates_only=True)
        expected = maps[0].mean(dim=(2, 3))
    torch.testing.assert_close(encoder(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [None, 3])
def test_a_vits_position_embeddings_are_resampled(tmp_path, stage):
    complete = timm.create_model("vit_tiny_patch16_224")
    ramp = torch.linspace(0, 1, 14).view(1, 1, 14, 1).expand(1, 14, 14, 192)
    weights = complete.state_dict()
    weights["pos_embed"] = torch.cat([torch.full((1, 1, 192), 7.0), ramp.reshape(1, 196, 192)], 1)
    torch.save(weights, tmp_path / "w.pt")
    encoder = build(
        "vit_tiny_patch16_224", weights=str(tmp_path / "w.pt"), img_size=64, stage=stage
    )
    result = getattr(encoder.net, "model", encoder.net).pos_embed.detach()
    assert result.shape == (1, 1 + 16, 192)
    assert bool((result[0, 0] == 7).all())  # the class token's stays
    table = result[0, 1:, 0].view(4, 4)
    torch.testing.assert_close(table, table[:1].expand(4, 4))
    # Each of the four stands for a quarter of the ramp: its middle.
    torch.testing.assert_close(table[0], torch.linspace(1, 7, 4) / 8, atol=0.03, rtol=0)


def test_weights_that_do_not_fit_name_the_keys(tmp_path):
    path = save_weights(
        tmp_path / "w.pt",
        bn1__bias=None,
        conv1__weight=torch.zeros(64, 3, 3, 3),
        projector__weight=torch.zeros(1),
    )
    with pytest.raises(UserError) as error:
        build("r18", weights=str(path))
    lines = str(error.value).splitlines()
    assert lines[0].startswith(
        f"{path} does not fit the encoder 'resnet18.tv_in1k': the file holds "
    )
    assert " tensors of resnet18: bn1.weight, " in lines[0]
    assert lines[1:4] == [
        "  missing: bn1.bias",
        "  unknown: projector.weight",
        "  conv1.weight: (64, 3, 3, 3) in the file, (64, 3, 7, 7) in the encoder",
    ]
    assert lines[-1].startswith("  set encoder.name to the network of the file")


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("resnet34", "resnet34"),
        ("resnet50", "resnet50"),
        ("resnet26", "a ResNet of 2-2-2-2 bottlenecks"),
        ("vit_tiny_patch16_224", "a ViT of depth 12 and width 192"),
        ("convnext_atto", "a ConvNeXt"),
        ("swin_tiny_patch4_window7_224", "a Swin transformer"),
        ("densenet121", "a DenseNet"),
        ("efficientnet_b0", "an EfficientNet or MobileNet"),
    ],
)
def test_weights_of_another_network_say_what_it_looks_like(model, family):
    with torch.device("meta"):
        weights = timm.create_model(model).state_dict()
    assert f" tensors of {family}: " in describe_network(weights)
    assert f" tensors of {family}: " in describe_network(
        {f"a.b.{k}": v for k, v in weights.items()}
    )


@pytest.mark.parametrize("prefix", ["module.", "encoder.model.", "backbone.", "model.encoder.net."])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_weights_of_a_training_program_are_found_below_their_prefix(tmp_path, prefix, nested):
    plain = build("resnet18", pretrained=False)
    weights = {f"{prefix}{k}": v for k, v in plain.net.state_dict().items()}
    weights |= {"projector.weight": torch.ones(3), "queue": torch.ones(2)}
    torch.save(weights if nested is None else {"epoch": 3, nested: weights}, tmp_path / "w.pt")
    loaded = build("resnet18", weights=str(tmp_path / "w.pt"))
    for name, value in plain.net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value), name


def test_files_that_hold_no_weights_are_refused(tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as error:
            build("r18", weights=str(path))
        return str(error.value)

    assert "no weights at" in refused(tmp_path / "nothing.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    assert "cannot be read as weights" in refused(tmp_path / "text.safetensors")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "nested.pt")
    assert "holds no state dict" in refused(tmp_path / "nested.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")  # code, which must not be run
    assert "cannot be read as weights" in refused(tmp_path / "module.pt")
    complete = save_weights(tmp_path / "whole.pt")
    complete.write_bytes(complete.read_bytes()[:100_000])
    assert "cannot be read as weights" in refused(complete)


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
