"""JPEG decoding: every decoder gives the same pixels, and never a wrong image without a word.

What a decoder promises is tested for each that can run here, on the CPU and on a GPU if there is
one; of the others a skipped test tells why not.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import threading
import warnings
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from e2e.errors import UserError
from e2e.images.decode import (
    DECODERS,
    Decoder,
    SimpleJpeg,
    UndecodableError,
    build_decoder,
)
from e2e.images.jpeg_header import read_frame_header
from e2e.images.threads import decoder_threads
from tests.helpers.stores import jpeg, picture, pixels_of

DEPRECATED = "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning"
pytestmark = pytest.mark.filterwarnings(DEPRECATED)  # nvjpeg has no other way yet


@dataclass
class Case:
    """A decoder and where it puts its pixels."""

    decoder: Decoder
    device: str

    def pixels(self, jpegs: list[bytes]) -> NDArray[np.uint8]:
        """(n,H,W,3)"""
        return self.decoder.decode(jpegs, self.device).permute(0, 2, 3, 1).cpu().numpy()


def found_here() -> tuple[dict[str, Case], dict[str, str]]:
    ready, missing = {}, {}
    for device in ("cpu", "cuda"):
        for name in DECODERS.names():
            try:
                if device == "cuda" and not torch.cuda.is_available():
                    raise UserError("no GPU here")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    ready[f"{name}-{device}"] = Case(build_decoder(name, device), device)
            except UserError as error:
                missing[f"{name}-{device}"] = str(error).splitlines()[0]
    return ready, missing


READY, MISSING = found_here()


@pytest.fixture(params=sorted(READY))
def case(request: pytest.FixtureRequest) -> Case:
    return READY[request.param]


@pytest.fixture
def threads():
    """Use a number of decoder threads for the rest of the test."""
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(decoder_threads(count))


@pytest.mark.parametrize("name", sorted(MISSING))
def test_what_a_decoder_promises(name):
    pytest.skip(MISSING[name])


def assert_as_pillow(case: Case, jpegs: list[bytes]) -> None:
    difference = np.abs(case.pixels(jpegs).astype(int) - pixels_of(jpegs))
    assert difference.mean(axis=(1, 2, 3)).max() <= case.decoder.tolerance


def near(case: Case) -> int:
    """Levels by which a single flat pixel may differ."""
    return 3 + round(case.decoder.tolerance)


# Which decoder


def test_two_decoders_need_nothing_installed():
    assert {"pillow-cpu", "simplejpeg-cpu"} <= set(READY)


def test_auto_has_the_name_of_the_decoder_it_chose():
    assert build_decoder("auto").name == "simplejpeg"
    assert build_decoder("pillow").name == "pillow"


def test_auto_on_a_gpu_is_nvjpeg_or_notes_why_not():
    decoder = build_decoder("auto", "cuda")
    if "nvjpeg-cuda" in READY:
        assert (decoder.name, decoder.note) == ("nvjpeg", "")
    else:
        assert decoder.name == "simplejpeg"
        assert decoder.note.startswith("decoder 'nvjpeg' does not work on cuda (")


def test_nvjpeg_on_the_cpu_is_refused_with_advice():
    with pytest.raises(UserError, match=r"'nvjpeg' decodes on a CUDA device, not on cpu\n.*auto"):
        build_decoder("nvjpeg", "cpu")


@pytest.mark.parametrize("name", ["turbojpeg", "jpeg4py"])
def test_a_decoder_without_its_library_says_what_to_install(name, capfd):
    if f"{name}-cpu" in READY:
        pytest.skip(f"{name} finds its library here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as error:
            build_decoder(name)
    message = str(error.value)
    assert f"decoder '{name}' needs libturbojpeg, which is not installed" in message
    assert "Debian: libturbojpeg0" in message
    assert "data.decoder=auto" in message
    assert len(message.splitlines()) == 2
    assert capfd.readouterr().err == ""  # nor an exception from a half-made object


def test_an_unknown_decoder_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'simplejpeg'"):
        build_decoder("simplejpg")


# The right pixels


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [50, 80, 97])
def test_all_decoders_agree_with_pillow(case, subsampling, quality):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [picture(1, 64)]
    if case.decoder.tolerance == 0:  # noise is all edges, where ways of upsampling differ most
        images.append(Image.fromarray(noise))
    jpegs = [jpeg(image, quality=quality, subsampling=subsampling) for image in images]
    pixels = case.decoder.decode(jpegs, case.device)
    assert pixels.shape == (len(images), 3, 64, 64)
    assert (pixels.dtype, pixels.device.type) == (torch.uint8, case.device)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert_as_pillow(case, jpegs)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"restart_marker_blocks": 1},
        {"optimize": True},
        {"keep_rgb": True},
        {"comment": b"\xff\xd8\xff\xc0 no marker \xff\xd9" * 9},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_jpeg_are_read(case, options):
    assert_as_pillow(case, [jpeg(5, **options), jpeg(6, **options)])


def test_colours_are_in_the_order_red_green_blue(case):
    ground = Image.new("RGB", (16, 16), (250, 120, 10))
    pixels = case.pixels([jpeg(ground, quality=95)])[0].mean(axis=(0, 1))
    assert pixels.tolist() == pytest.approx([250, 120, 10], abs=near(case))


def test_images_stand_upright_and_odd_sizes_are_kept(case):
    canvas = np.zeros((33, 47, 3), np.uint8)
    canvas[:16, :, 0] = 255  # the upper half red
    pixels = case.pixels([jpeg(Image.fromarray(canvas), quality=95, subsampling=0)])[0]
    assert pixels.shape == (33, 47, 3)
    assert pixels[:14, :, 0].mean() > 240
    assert pixels[18:, :, 0].mean() < 15


def test_grey_becomes_three_equal_channels(case):
    value = jpeg(picture(3).convert("L"))
    pixels = case.pixels([value, value])
    assert pixels.shape == (2, 32, 32, 3)
    assert bool((pixels == pixels[..., :1]).all())
    assert_as_pillow(case, [value])


def cmyk() -> dict[str, bytes]:
    """As Pillow writes it, and turned to YCCK as Photoshop does; both inverted, as Adobe's are."""
    image = picture(3).convert("CMYK")
    inverted = 255 - np.asarray(image)
    return {"cmyk": jpeg(image), "ycck": simplejpeg.encode_jpeg(inverted, 90, "CMYK", "444")}


@pytest.mark.parametrize("kind", ["cmyk", "ycck"])
def test_cmyk_is_right_or_a_named_error(case, kind):
    value, plain = cmyk()[kind], jpeg(4)
    if case.decoder.name in {"turbojpeg", "jpeg4py"}:
        with pytest.raises(UndecodableError, match="is not a readable JPEG") as error:
            case.pixels([plain, value])
        assert error.value.index == 1
        return
    pixels = case.pixels([plain, value])
    assert np.abs(pixels[1].astype(int) - pixels_of([value])[0]).max() <= 1
    np.testing.assert_array_equal(pixels[0], case.pixels([plain, plain])[1])


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (jpeg(0), True),
        (jpeg(0, progressive=True), True),
        (jpeg(picture(0).convert("L")), True),
        (jpeg(0)[:-1], False),
        (jpeg(0, keep_rgb=True), False),
        (jpeg(picture(0).convert("CMYK")), False),
        (b"\xff\xd8\xff\xee\0\x0eAdobe\0d\0\0\0\0\0" + jpeg(0)[2:], False),
    ],
    ids=["baseline", "progressive", "grey", "cut", "rgb", "cmyk", "adobe"],
)
def test_only_jpegs_that_all_libraries_decode_alike_count_as_plain(value, plain):
    assert read_frame_header(value) == (32, 32, plain)


def resized(value: bytes, height: int, width: int) -> bytes:
    """Another size written into the frame header."""
    at = value.index(b"\xff\xc0") + 5
    return value[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + value[at + 4 :]


def test_many_are_decoded_in_their_order(case):
    assert_as_pillow(case, [jpeg(seed) for seed in range(50)])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, "u1")])
def test_the_bytes_may_lie_anywhere(case, kind):
    values = [jpeg(seed) for seed in range(3)]
    np.testing.assert_array_equal(case.pixels([kind(v) for v in values]), case.pixels(values))


def test_real_tissue_looks_the_same_to_all(case, shared_data):
    files = sorted((shared_data / "lung_tiles").rglob("*.jp*g"))
    if not files:
        pytest.skip("no real patches")
    for file in files[:64]:
        assert_as_pillow(case, [file.read_bytes()])


# The caller's memory


def test_the_result_lies_in_the_callers_memory(case):
    values = [jpeg(seed) for seed in range(20)]
    out = torch.full((20, 32, 32, 3), 77, dtype=torch.uint8)
    for jpegs in (values, values[::-1]):  # and again
        pixels = case.decoder.decode(jpegs, case.device, out=out)
        if case.device == "cpu":
            assert pixels.data_ptr() == out.data_ptr()
        np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1).cpu().numpy(), case.pixels(jpegs))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty((3, 32, 32, 3), dtype=torch.uint8),
        torch.empty((2, 32, 32, 3)),
        torch.empty((2, 3, 32, 32), dtype=torch.uint8),
        torch.empty((2, 3, 32, 32), dtype=torch.uint8).permute(0, 2, 3, 1),
        torch.empty((2, 32, 32), dtype=torch.uint8),
    ],
    ids=["rows", "type", "order", "strides", "axes"],
)
def test_memory_of_another_shape_is_refused(case, out):
    with pytest.raises(ValueError, match=r"out must be \(2,H,W,3\) uint8, contiguous, on the CPU"):
        case.decoder.decode([jpeg(0), jpeg(1)], case.device, out=out)


def test_no_image_at_all_is_refused(case):
    with pytest.raises(ValueError, match="no JPEG to decode"):
        case.decoder.decode([], case.device)


# Damage

WHOLE = jpeg(7, width=64)
SCAN = WHOLE.index(b"\xff\xda") + 14


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "one byte": WHOLE[:1],
    "only a start": WHOLE[:2],
    "half a header": WHOLE[:100],
    "half": WHOLE[: len(WHOLE) // 2],
    "all but the end": WHOLE[:-20],
    "all but two bytes": WHOLE[:-2],
    "all but one byte": WHOLE[:-1],
    "cut with an end": WHOLE[: len(WHOLE) // 4] + WHOLE[-2:],
    "zeros": bytes(500),
    "text": b"no image at all " * 30,
    "png": png(picture(1, 64)),
    "damaged header": WHOLE[:20] + b"\0" + WHOLE[21:],
    "no size": resized(WHOLE, 0, 64),
    "no width": resized(WHOLE, 64, 0),
    "all memory": resized(WHOLE, 65535, 65535),
}
LOST = {
    "overwritten": WHOLE[: SCAN + 40] + b"\xaa" * 200 + WHOLE[SCAN + 240 :],
    "a stray marker": WHOLE[:-200] + b"\xff\xd0" * 50 + WHOLE[-100:],
    "rows missing": WHOLE[: SCAN + 200] + WHOLE[-2:],
}
"""Damage that the header and the end do not show."""


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("index", [0, 3, 39])
def test_a_broken_value_is_named_by_its_index(case, threads, kind, index):
    if kind == "cut with an end" and not case.decoder.strict:
        pytest.skip("its library takes what it can get")
    threads(4)
    jpegs = [WHOLE] * 40
    jpegs[index] = BROKEN[kind]
    with pytest.raises(UndecodableError, match="is not a readable JPEG") as error:
        case.decoder.decode(jpegs, case.device)
    assert error.value.index == index
    assert_as_pillow(case, [WHOLE, WHOLE])  # and the next ones are fine


@pytest.mark.parametrize("kind", LOST)
def test_damage_inside_is_an_error_or_gives_what_pillow_recovers(case, kind):
    value = LOST[kind]
    if case.decoder.strict:
        with pytest.raises(UndecodableError, match="is not a readable JPEG") as error:
            case.decoder.decode([WHOLE, value], case.device)
        assert error.value.index == 1
    elif case.device == "cpu":
        np.testing.assert_array_equal(case.pixels([WHOLE, value])[1], pixels_of([value])[0])
    else:  # a GPU may save something else, if anything
        with contextlib.suppress(UndecodableError):
            case.pixels([WHOLE, value])
        assert_as_pillow(case, [WHOLE, WHOLE])  # the process lives on


def test_of_several_broken_values_the_first_is_named(case, threads):
    threads(3)
    jpegs = [WHOLE] * 60
    jpegs[25] = jpegs[50] = WHOLE[:-9]
    with pytest.raises(UndecodableError) as error:
        case.decoder.decode(jpegs, case.device)
    assert error.value.index == 25


@pytest.mark.parametrize("name", sorted(READY))
@settings(max_examples=25)
@given(cut=st.integers(0, len(WHOLE) - 1))
def test_any_cut_is_an_error(name, cut):
    with pytest.raises(UndecodableError) as error:
        READY[name].decoder.decode([WHOLE, WHOLE[:cut]], READY[name].device)
    assert error.value.index == 1


@pytest.mark.parametrize("name", sorted(READY))
@settings(max_examples=40)
@given(place=st.integers(2, len(WHOLE) - 10), noise=st.binary(min_size=1, max_size=8))
def test_noise_is_an_error_or_an_image_without_old_content_of_the_memory(name, place, noise):
    value = WHOLE[:place] + noise + WHOLE[place + len(noise) :]
    outcomes = []
    for marker in (0, 200):
        out = torch.full((2, 64, 64, 3), marker, dtype=torch.uint8)
        try:
            decoded = READY[name].decoder.decode([WHOLE, value], READY[name].device, out=out)
        except UndecodableError as error:
            outcomes.append(error.index)
        else:
            outcomes.append(decoded.cpu().numpy().tobytes())
    assert outcomes[0] == outcomes[1]


def test_a_patch_of_another_size_is_named(case):
    with pytest.raises(UndecodableError, match="is 48x32 px, not 32x32 px") as error:
        case.decoder.decode([jpeg(0), jpeg(1), jpeg(picture(2, 48, 32))], case.device)
    assert error.value.index == 2


def test_the_callers_memory_decides_the_size(case):
    out = torch.empty((2, 32, 32, 3), dtype=torch.uint8)
    with pytest.raises(UndecodableError, match="is 16x16 px, not 32x32 px") as error:
        case.decoder.decode([jpeg(0, width=16), jpeg(1, width=16)], case.device, out=out)
    assert error.value.index == 0


def test_a_few_odd_bytes_behind_the_end_do_no_harm(case):
    assert_as_pillow(case, [WHOLE + b"\0\0\0", WHOLE])


# Threads and processes


class Spy(SimpleJpeg):
    """Notes which thread has decoded which images."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls: list[tuple[int, bytes]] = []

    def decode_one(self, jpeg, row):
        super().decode_one(jpeg, row)
        self.calls.append((threading.get_ident(), bytes(jpeg)))

    def threads(self) -> set[int]:
        return {thread for thread, _ in self.calls}


VALUES = [jpeg(seed, width=64) for seed in range(40)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_the_number_of_threads_changes_no_pixel(case, threads, count):
    expected = case.pixels(VALUES)
    threads(count)
    np.testing.assert_array_equal(case.pixels(VALUES), expected)


def test_one_thread_is_the_callers_own(threads):
    threads(1)
    spy = Spy()
    spy.decode(VALUES)
    assert spy.threads() == {threading.get_ident()}


def test_the_caller_works_too_and_takes_no_more_than_half_of_the_threads(threads):
    threads(6)  # of two callers
    spy = Spy()
    spy.decode(VALUES)
    assert threading.get_ident() in spy.threads()
    assert 2 <= len(spy.threads()) <= 3
    for thread in spy.threads():  # each a stretch of neighbours
        mine = [VALUES.index(value) for owner, value in spy.calls if owner == thread]
        assert len(mine) >= 13
        assert mine == sorted(mine)


def test_a_few_patches_are_decoded_by_the_caller(threads):
    threads(8)
    spy = Spy()
    spy.decode(VALUES[:15])
    assert spy.threads() == {threading.get_ident()}


def test_after_an_error_no_thread_writes_into_the_callers_memory(threads):
    threads(4)
    spy, large = Spy(), jpeg(0, width=1024)
    with pytest.raises(UndecodableError):
        spy.decode([large[:2000], *[large] * 31])  # at once, while the others take long
    assert len(spy.calls) == 16  # the other thread's half


@pytest.mark.parametrize("count", [0, -1])
def test_no_thread_at_all_is_refused(count):
    with (
        pytest.raises(ValueError, match="a decoder needs at least 1 thread"),
        decoder_threads(count),
    ):
        pass


def test_several_threads_may_use_one_decoder_at_a_time(case, threads):
    threads(4)
    expected = [case.pixels(VALUES), case.pixels(VALUES[::-1])]
    results: list[NDArray[np.uint8]] = []

    def work(jpegs: list[bytes]) -> None:
        for _ in range(5):
            results.append(case.pixels(jpegs))

    workers = [threading.Thread(target=work, args=(v,)) for v in (VALUES, VALUES[::-1])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 10
    assert all(any(np.array_equal(f, e) for e in expected) for f in results)


def decode_in_child(name: str) -> list[int] | str:
    try:
        new = build_decoder(READY[name].decoder.name).decode([WHOLE] * 32)
        old = READY[name].decoder.decode([WHOLE] * 32)
        # NumPy, because torch's own comparison hangs in a child of a process that used OpenMP.
        assert np.array_equal(new.numpy(), old.numpy())
        return list(old.shape)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", sorted(name for name in READY if name.endswith("-cpu")))
def test_decoding_works_in_a_forked_process_or_reports_that_it_cannot(name, threads):
    # A forked process has its parent's thread pool but not the threads.
    threads(4)
    READY[name].decoder.decode([WHOLE] * 32)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply_async(decode_in_child, [name]).get(timeout=60)
    if name == "dali-cpu":
        assert "built before this process was forked" in result
    else:
        assert result == [32, 3, 64, 64]


# A GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", sorted(name for name in READY if name.endswith("-cuda")) or [""])
def test_no_image_is_decoded_into_memory_that_queued_kernels_read(name):
    """pytorch/vision#9606: memory given back while its readers wait in the queue, 100 times."""
    case = READY[name]
    jpegs = [jpeg(seed, width=256, quality=80) for seed in range(64)]
    expected = pixels_of(jpegs).astype(int)
    slow = torch.randn((8192, 8192), device="cuda")
    for _ in range(100):
        held = [torch.full((3, 256, 256), 7, dtype=torch.uint8, device="cuda") for _ in jpegs]
        torch.cuda.synchronize()
        for _ in range(10):
            slow = (slow @ slow).clamp(-1, 1)
        sums = torch.stack([tensor.sum() for tensor in held])
        del held
        pixels = case.pixels(jpegs)
        assert sums.tolist() == [7 * 3 * 256 * 256] * len(jpegs)
        difference = np.abs(pixels - expected).mean(axis=(1, 2, 3))
        assert difference.max() <= case.decoder.tolerance
