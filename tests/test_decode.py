"""JPEG decoding: every decoder gives the same pixels, and never a wrong image without a word.

Decoders over a system library are tested where it is installed, else that they say how to get it.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from e2e.data.decode import DECODERS, Decoder, UndecodableError, build_decoder
from e2e.errors import UserError
from tests.conftest import jpeg, picture, pixels_of

TOLERANCE = 0  # all are libjpeg-turbo with the exact transform: equal to the bit (CMYK: 1)


def available(name: str) -> Decoder | None:
    try:
        return build_decoder(name)
    except UserError:
        return None


READY = {name: made for name in DECODERS.names() if (made := available(name)) is not None}


@pytest.fixture(params=sorted(READY))
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return build_decoder(request.param)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_two_decoders_need_nothing_installed():
    assert {"pillow", "simplejpeg"} <= set(READY)
    assert type(build_decoder("auto")) is type(build_decoder("simplejpeg"))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [50, 80, 97])
def test_all_decoders_agree_with_pillow(decoder, subsampling, quality):
    images = [
        picture(1, 64),
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)),
    ]
    jpegs = [jpeg(image, quality=quality, subsampling=subsampling) for image in images]
    found = decoder.decode(jpegs)
    assert found.shape == (2, 3, 64, 64)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    difference = found.permute(0, 2, 3, 1).numpy().astype(int) - pixels_of(jpegs)
    assert np.abs(difference).max() <= TOLERANCE


def test_colours_are_in_the_order_red_green_blue(decoder):
    ground = Image.new("RGB", (16, 16), (250, 120, 10))
    found = decoder.decode([jpeg(ground, quality=95)])[0].float().mean(dim=(1, 2))
    assert found.tolist() == pytest.approx([250, 120, 10], abs=3)


def test_images_stand_upright_and_odd_sizes_are_kept(decoder):
    canvas = np.zeros((33, 47, 3), np.uint8)
    canvas[:16, :, 0] = 255  # the upper half red
    found = decoder.decode([jpeg(Image.fromarray(canvas), quality=95, subsampling=0)])[0]
    assert found.shape == (3, 33, 47)
    assert found[0, :14].float().mean() > 240
    assert found[0, 18:].float().mean() < 15


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 1}])
def test_other_kinds_of_jpeg_are_read(decoder, options):
    value = jpeg(5, **options)
    found = decoder.decode([value]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, pixels_of([value]))


def test_grey_becomes_three_equal_channels(decoder):
    value = jpeg(picture(3).convert("L"))
    found = decoder.decode([value])[0]
    assert found.shape == (3, 32, 32)
    assert bool((found == found[:1]).all())
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), pixels_of([value])[0])


def test_cmyk_is_right_or_an_error(decoder):
    value = jpeg(picture(3).convert("CMYK"))
    try:
        found = decoder.decode([value])
    except UndecodableError:
        return
    difference = found[0].permute(1, 2, 0).numpy().astype(int) - pixels_of([value])[0]
    assert np.abs(difference).max() <= 1


WHOLE = jpeg(7, width=64)
BROKEN = {
    "empty": b"",
    "one byte": WHOLE[:1],
    "only a start": WHOLE[:2],
    "half a header": WHOLE[:100],
    "half": WHOLE[: len(WHOLE) // 2],
    "all but the end": WHOLE[:-20],
    "all but two bytes": WHOLE[:-2],
    "all but one byte": WHOLE[:-1],
    "zeros": bytes(500),
    "text": b"no image at all " * 30,
    "png": png(picture(1, 64)),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("index", [0, 3])
def test_a_broken_value_is_named_by_its_index(decoder, kind, index):
    jpegs = [WHOLE] * 5
    jpegs[index] = BROKEN[kind]
    with pytest.raises(UndecodableError, match="is no readable JPEG") as error:
        decoder.decode(jpegs)
    assert error.value.index == index
    assert decoder.decode([WHOLE]).shape == (1, 3, 64, 64)  # and the next one is fine


@settings(max_examples=60)
@given(st.data())
def test_any_cut_is_an_error_and_any_noise_an_error_or_an_image(data):
    for name, decoder in READY.items():
        cut = data.draw(st.integers(0, len(WHOLE) - 1), label=f"cut for {name}")
        with pytest.raises(UndecodableError):
            decoder.decode([WHOLE, WHOLE[:cut]])
        noise = data.draw(st.binary(min_size=1, max_size=8))
        place = data.draw(st.integers(2, len(WHOLE) - 10))
        with contextlib.suppress(UndecodableError):
            found = decoder.decode([WHOLE[:place] + noise + WHOLE[place + len(noise) :]])
            assert found.dtype == torch.uint8


def test_a_patch_of_another_size_is_named(decoder):
    with pytest.raises(UndecodableError, match=r"is 48x32 px, others 32 px") as error:
        decoder.decode([jpeg(0), jpeg(1), jpeg(picture(2, 48, 32))])
    assert error.value.index == 2


def test_many_are_decoded_in_their_order(decoder):
    jpegs = [jpeg(seed) for seed in range(50)]
    found = decoder.decode(jpegs).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, pixels_of(jpegs))


@pytest.mark.parametrize("name", sorted({"turbojpeg", "jpeg4py"} - READY.keys()))
def test_a_decoder_without_its_library_says_what_to_install(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as error:
            build_decoder(name)
    message = str(error.value)
    assert f"decoder '{name}' finds no system library" in message
    assert "Debian: libturbojpeg0" in message
    assert "data.decoder=auto" in message
    assert len(message.splitlines()) == 2
    assert capfd.readouterr().err == ""  # nor an exception from a half-made object


def test_an_unknown_decoder_is_told_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'simplejpeg'"):
        build_decoder("simplejpg")


def decode_in_child(value: bytes) -> list[int]:
    return list(build_decoder("auto").decode([value] * 4).shape)


def test_decoding_goes_on_in_a_forked_process():
    # A forked process has its parent's thread pool but not the threads.
    build_decoder("auto").decode([WHOLE] * 16)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(decode_in_child, [WHOLE]).get(timeout=60) == [4, 3, 64, 64]
