"""Reading slides, finding tissue, laying grids."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from e2e.errors import DamagedDataError, UserError
from e2e.wsi import slide as slide_module
from e2e.wsi.slide import WholeSlide, describe_unread, find_slides
from e2e.wsi.tiling import Tiling, coords_from_names, grid
from e2e.wsi.tissue import tissue_mask
from tests.helpers.paths import SHARED_DATA as SHARED

real_slides = pytest.mark.skipif(
    not (SHARED / "slides").is_dir(), reason=f"no real slides in {SHARED / 'slides'}"
)


def write_slide(path, *levels, mpp=(0.5, 0.5), unit="CENTIMETER", compression="deflate"):
    """A tiled pyramid that OpenSlide reads as generic-tiff; ``levels`` are (H, W, 3) uint8."""
    with tifffile.TiffWriter(path) as out:
        for k, level in enumerate(levels):
            known = mpp and {"resolution": (1e4 / mpp[0], 1e4 / mpp[1]), "resolutionunit": unit}
            out.write(
                level,
                tile=(64, 64),
                photometric="rgb",
                compression=compression,
                subfiletype=1 if k else 0,
                metadata=None,
                **(known or {}),
            )
    return path


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def flat(height, width, colour):
    return np.full((height, width, 3), colour, np.uint8)


# --- slides ---


def test_id_is_the_file_name_without_its_last_suffix():
    assert WholeSlide(Path("a/TCGA-01.dx1.svs")).id == "TCGA-01.dx1"


def test_mpp_comes_from_the_resolution_tags_and_an_override_wins(tmp_path):
    path = write_slide(tmp_path / "s.tif", noise(80, 80), mpp=(0.25, 0.26))
    assert WholeSlide(path).mpp == pytest.approx(math.sqrt(0.25 * 0.26), rel=1e-4)
    assert WholeSlide(path, mpp=0.7).mpp == 0.7


@pytest.mark.parametrize(
    ("mpp", "unit", "words"),
    [
        (None, None, "does not say"),
        ((352.8, 352.8), "CENTIMETER", "implausible for a slide scanner"),
        ((0.25, 0.5), "CENTIMETER", "square"),
        ((0.5, 0.5), "NONE", "does not say"),
    ],
)
def test_mpp_that_is_missing_or_absurd_names_slide_and_option(tmp_path, mpp, unit, words):
    path = write_slide(tmp_path / "odd.tif", noise(80, 80), mpp=mpp, unit=unit)
    with pytest.raises(UserError, match=rf"(?s)'odd'.*{words}.*--mpp-override"):
        _ = WholeSlide(path).mpp


OME = (
    '<?xml version="1.0"?><OME><Image><Pixels PhysicalSizeX="{x}" PhysicalSizeXUnit="{unit}" '
    'PhysicalSizeY="{x}" PhysicalSizeYUnit="{unit}"/></Image></OME>'
)
MOTIC = "Motic V1.0.0 400x300 [0,0 400x300] [512x512] JPEG/RGB Q = 75|AppMag = 40|MPP = 0.25"


@pytest.mark.parametrize(
    ("description", "mpp"),
    [
        (OME.format(x="0.25", unit="\u00b5m"), 0.25),
        (OME.format(x="0.00025", unit="mm"), 0.25),
        (OME.format(x="250", unit="nm"), 0.25),
        (OME.replace(' PhysicalSizeXUnit="{unit}"', "").format(x="0.5", unit="um"), 0.5),
        (MOTIC, 0.25),
    ],
)
@pytest.mark.parametrize("dpi", [None, 72])
def test_mpp_comes_from_the_description_where_the_tags_say_nothing_plausible(
    tmp_path, description, mpp, dpi
):
    tags = {"resolution": (dpi, dpi), "resolutionunit": "INCH"} if dpi else {}
    pixels = noise(64, 64)
    tifffile.imwrite(
        tmp_path / "s.tif", pixels, tile=(32, 32), photometric="rgb", metadata=None,
        description=description.encode(), **tags,
    )  # fmt: skip
    assert WholeSlide(tmp_path / "s.tif").mpp == pytest.approx(mpp)


@pytest.mark.parametrize(
    "description",
    [OME.format(x="1", unit="pixel"), OME.format(x="-1", unit="um"), "MPP = x|MPP = "],
)
def test_a_description_without_a_length_gives_no_mpp(tmp_path, description):
    tifffile.imwrite(
        tmp_path / "s.tif", noise(64, 64), tile=(32, 32), photometric="rgb", metadata=None,
        description=description.encode(),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"does not say its um per pixel|implausible"):
        _ = WholeSlide(tmp_path / "s.tif").mpp


def test_patch_at_full_size_is_the_slides_own_pixels(tmp_path):
    canvas = noise(200, 300)
    slide = WholeSlide(write_slide(tmp_path / "s.tif", canvas))
    assert (slide.width, slide.height) == (300, 200)
    np.testing.assert_array_equal(slide.read_patch(70, 30, 96, 96), canvas[30:126, 70:166])


def test_pixels_outside_the_slide_are_white(tmp_path):
    slide = WholeSlide(write_slide(tmp_path / "s.tif", flat(100, 100, 7)))
    patch = slide.read_patch(60, 80, 64, 64)
    assert (patch[:20, :40] == 7).all()
    assert (patch[20:] == 255).all()
    assert (patch[:, 40:] == 255).all()


@pytest.mark.parametrize(("side", "red"), [(64, 10), (100, 10), (129, 20), (250, 20), (256, 40)])
def test_patch_is_read_from_the_coarsest_level_that_is_fine_enough(tmp_path, side, red):
    levels = [flat(514 // k, 514 // k, (10 * k, 0, 0)) for k in (1, 2, 4)]
    slide = WholeSlide(write_slide(tmp_path / "s.tif", *levels))
    assert (slide.read_patch(0, 0, side, 64)[..., 0] == red).all()


def test_reduction_averages_what_it_leaves_out(tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::4] = 255
    patch = WholeSlide(write_slide(tmp_path / "s.tif", stripes)).read_patch(0, 0, 256, 64)
    assert abs(patch[:, 4:-4].astype(int) - 64).max() < 40


def test_a_side_of_a_fraction_of_a_pixel_is_kept(tmp_path):
    ramp = np.broadcast_to((np.arange(42) * 6)[None, :, None], (42, 42, 3)).astype(np.uint8)
    slide = WholeSlide(write_slide(tmp_path / "s.tif", ramp))
    row = slide.read_patch(0, 0, 40.4, 32)[16, :, 0].astype(float)
    middles = (np.arange(32) + 0.5) * 40.4 / 32 - 0.5
    np.testing.assert_allclose(row[2:-2], middles[2:-2] * 6, atol=1.0)


def damage_tile(path, index):
    """Overwrite one tile of level 0, so that the file opens and this place cannot be read."""
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[index], tiff.pages[0].databytecounts[index]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xaa" * count)


def test_damage_names_slide_and_place_and_leaves_the_rest_readable(tmp_path):
    canvas = noise(192, 192)
    path = write_slide(tmp_path / "hurt.tif", canvas)
    damage_tile(path, 4)
    slide = WholeSlide(path)
    slide.read_patch(0, 0, 64, 64)
    with pytest.raises(DamagedDataError, match=r"'hurt' cannot be read at x=64, y=64"):
        slide.read_patch(64, 64, 64, 64)
    np.testing.assert_array_equal(slide.read_patch(128, 0, 64, 64), canvas[:64, 128:])


def test_missing_truncated_and_plain_images_are_explained(tmp_path):
    with pytest.raises(DamagedDataError, match="no file"):
        _ = WholeSlide(tmp_path / "gone.svs").width
    Image.fromarray(noise(50, 50)).save(tmp_path / "plain.png")
    Image.fromarray(noise(50, 50)).save(tmp_path / "plain.jpg")
    (tmp_path / "empty.svs").write_bytes(b"")
    for name in ("plain.png", "plain.jpg", "empty.svs"):
        with pytest.raises(
            DamagedDataError, match=r"(?s)has a format that OpenSlide does not know.*\.ndpi"
        ):
            _ = WholeSlide(tmp_path / name).width


def test_a_slide_that_is_open_travels_to_another_process(tmp_path):
    canvas = noise(80, 80)
    slide = WholeSlide(write_slide(tmp_path / "s.tif", canvas), mpp=0.3)
    slide.read_patch(0, 0, 64, 64)
    copy = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(copy.read_patch(0, 0, 64, 64), canvas[:64, :64])
    assert copy.mpp == 0.3


def test_a_slide_opened_before_a_fork_is_opened_anew_in_the_child(tmp_path):
    slide = WholeSlide(write_slide(tmp_path / "s.tif", noise(80, 80)))
    handle = slide._open()
    slide._pid -= 1
    assert slide._open() is not handle


def test_overview_keeps_proportions_and_places(tmp_path):
    canvas = flat(500, 1000, 255)
    canvas[100:200, 600:800] = 0
    image, scale = WholeSlide(write_slide(tmp_path / "s.tif", canvas)).overview(300)
    assert image.shape == (150, 300, 3)
    assert scale == pytest.approx(10 / 3)
    rows, columns = np.nonzero(image[..., 0] < 128)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 59, 180, 239)


def test_overview_never_magnifies(tmp_path):
    canvas = noise(70, 90)
    image, scale = WholeSlide(write_slide(tmp_path / "s.tif", canvas)).overview(1000)
    assert scale == 1
    np.testing.assert_array_equal(image, canvas)


def test_overview_read_in_blocks_equals_one_read(tmp_path, monkeypatch):
    smooth = np.add.outer(np.arange(600), np.arange(700)) * 255 / 1300
    canvas = np.repeat(smooth[..., None], 3, axis=2).astype(np.uint8)
    slide = WholeSlide(write_slide(tmp_path / "s.tif", canvas))
    whole, _ = slide.overview(230)
    monkeypatch.setattr(slide_module, "BLOCK_PX", 100)
    blocks, _ = slide.overview(230)
    # The last pixels hang over the slide's edge, and white is mixed in.
    assert np.abs(whole.astype(int) - blocks)[:-3, :-3].max() <= 2


def test_slides_are_found_in_any_depth_by_suffix(tmp_path):
    for name in ("b.svs", "x/a.NDPI", "x/y/c.tif", "x/._c.tif", "notes.txt", ".hidden/d.svs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    found = [str(p.relative_to(tmp_path)) for p in find_slides(tmp_path)]
    assert found == ["b.svs", "x/a.NDPI", "x/y/c.tif"]


def test_two_files_with_one_slide_id_are_refused_by_name(tmp_path):
    for name in ("one/s.svs", "two/s.tiff", "two/t.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"(?s)^1 slide ids.*s: .*one/s\.svs, .*two/s\.tiff"):
        find_slides(tmp_path)


def test_suffixes_choose_between_two_files_of_a_slide(tmp_path):
    for name in ("a.svs", "a.tif", "b.TIF"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"choose by suffix, such as --suffix \.svs"):
        find_slides(tmp_path)
    found = find_slides(tmp_path, suffixes=[".tif"])
    assert [path.name for path in found] == ["a.tif", "b.TIF"]


def test_slides_of_other_formats_are_counted_by_suffix(tmp_path):
    for name in ("a.svs", "b.qptiff", "c.QPTIFF", "d.vsi", "notes.txt"):
        (tmp_path / name).touch()
    (line,) = describe_unread(tmp_path)
    assert "3 file(s) are passed over" in line
    assert "2 .qptiff, 1 .vsi" in line
    assert describe_unread(tmp_path / "a.svs") == []
    (tmp_path / "a.svs").unlink()
    with pytest.raises(UserError, match=r"no slide in(?s:.*)2 \.qptiff"):
        find_slides(tmp_path)


def test_a_folder_without_slides_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no slide in"):
        find_slides(tmp_path)
    with pytest.raises(UserError, match="no slide, folder or matching file"):
        find_slides(tmp_path / "typo")


# --- tissue ---

GLASS = (243, 243, 243)
PINK = (205, 130, 175)
PALE = (235, 211, 228)


def scene(base, *blobs, size=200, spread=3):
    """An overview with rectangles (top, left, bottom, right, colour) and sensor noise."""
    image = np.full((size, size, 3), base, np.int16)
    for top, left, bottom, right, colour in blobs:
        image[top:bottom, left:right] = colour
    image += np.random.default_rng(0).integers(-spread, spread + 1, image.shape, np.int16)
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("glass", [GLASS, (255, 255, 255), (240, 244, 232), (225, 228, 222)])
def test_an_empty_slide_has_no_tissue(glass):
    assert not tissue_mask(scene(glass), 8).any()


@pytest.mark.parametrize("colour", [PINK, PALE, (120, 70, 140)])
def test_a_slide_full_of_tissue_is_all_tissue(colour):
    assert tissue_mask(scene(colour, spread=10), 8).mean() > 0.98


def test_tissue_dark_and_pale_is_not_split():
    image = scene(PALE, (0, 0, 200, 100, (120, 60, 130)))
    assert tissue_mask(image, 8).mean() > 0.98


@pytest.mark.parametrize("colour", [PINK, PALE, (150, 100, 60), (160, 175, 210)])
def test_tissue_on_glass_is_outlined(colour):
    truth = np.zeros((200, 200), bool)
    truth[50:150, 40:120] = True
    mask = tissue_mask(scene(GLASS, (50, 40, 150, 120, colour)), 8)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93


TINTS = [(238, 234, 222), (236, 232, 218), (235, 230, 212), (240, 228, 190), (205, 226, 236)]


@pytest.mark.parametrize("glass", TINTS)
@pytest.mark.parametrize("colour", [PINK, PALE, (150, 100, 60), (120, 70, 140)])
def test_tissue_on_tinted_glass_is_outlined(glass, colour):
    truth = np.zeros((200, 200), bool)
    truth[50:150, 40:120] = True
    seen = tuple(int(c * g / 243) for c, g in zip(colour, glass, strict=True))
    dust = (5, 5, 12, 60, (226, 226, 226))
    image = scene(glass, (50, 40, 150, 120, seen), dust)
    unscanned = image.copy()
    unscanned[:, 150:] = 255
    for shown in (image, unscanned):
        mask = tissue_mask(shown, 8)
        assert (mask & truth).sum() / (mask | truth).sum() > 0.9


@given(
    strong=st.integers(215, 245),
    weak=st.integers(0, 50),
    middle=st.floats(0.5, 1),
    is_yellow=st.booleans(),
)
def test_an_empty_slide_of_tinted_glass_has_no_tissue(strong, weak, middle, is_yellow):
    weakest = strong - weak
    green = round(weakest + middle * weak)
    glass = (strong, green, weakest) if is_yellow else (weakest, green, strong)
    assert not tissue_mask(scene(glass, size=60), 8).any()


def test_black_borders_pen_and_unscanned_white_are_no_tissue():
    borders = [(0, 0, 200, 20, (2, 2, 2)), (185, 0, 200, 200, (255, 255, 255))]
    pen = (20, 150, 150, 160, (25, 25, 30))
    mask = tissue_mask(scene(GLASS, *borders, pen, (60, 60, 120, 120, PINK)), 8)
    assert mask[65:115, 65:115].all()
    mask[55:125, 55:125] = False
    assert not mask.any()


def test_dust_goes_and_small_holes_close_by_area_in_um():
    image = scene(
        GLASS, (50, 50, 150, 150, PINK), (90, 90, 110, 110, GLASS), (10, 10, 20, 20, PINK)
    )
    # At 8 um a pixel the hole is 160 um wide, the speck 80 um: one closes, the other goes.
    fine = tissue_mask(image, 8)
    assert fine[100, 100]
    assert not fine[15, 15]
    # At 20 um they are 400 um and 200 um: a vessel stays open, a fragment stays.
    coarse = tissue_mask(image, 20)
    assert not coarse[100, 100]
    assert coarse[15, 15]


@real_slides
@pytest.mark.parametrize(
    ("name", "mpp", "least", "most", "tissue_at", "glass_at"),
    [
        ("cmu-1-small-region.svs", None, 0.34, 0.43, (1100, 2000), (300, 300)),
        ("tcga-cr-7395-01a-01-ts1.svs", 0.25, 0.60, 0.70, (2000, 1500), (150, 3400)),
    ],
)
def test_tissue_of_real_slides(name, mpp, least, most, tissue_at, glass_at):
    slide = WholeSlide(SHARED / "slides" / name, mpp=mpp)
    longest = max(slide.width, slide.height)
    image, scale = slide.overview(math.ceil(longest * slide.mpp / 8))
    mask = tissue_mask(image, slide.mpp * scale)
    assert least < mask.mean() < most
    assert mask[int(tissue_at[1] / scale), int(tissue_at[0] / scale)]
    assert not mask[int(glass_at[1] / scale), int(glass_at[0] / scale)]


@pytest.mark.skipif(not (SHARED / "lung_tiles").is_dir(), reason=f"no lung images in {SHARED}")
def test_real_lung_on_noisy_grey_ground_is_tissue():
    image = scene(GLASS)
    files = sorted((SHARED / "lung_tiles").glob("*/*"))[::250][:9]
    assert len(files) == 9
    for k, file in enumerate(files):
        top, left = 50 + 28 * (k // 3), 50 + 28 * (k % 3)
        tile = Image.open(file).convert("RGB").resize((28, 28), Image.Resampling.BOX)
        image[top : top + 28, left : left + 28] = np.asarray(tile)
    mask = tissue_mask(image, 8)
    assert mask[50:134, 50:134].mean() > 0.9
    mask[47:137, 47:137] = False
    assert not mask.any()


# --- grids ---

tilings = st.builds(
    lambda px, overlap, mpp, tissue: Tiling(mpp, px, int(px * overlap), tissue),
    st.integers(16, 300),
    st.floats(0, 0.85),
    st.floats(0.1, 4),
    st.floats(0, 1),
)


@given(tilings, st.integers(1, 3000), st.integers(1, 3000), st.floats(0.35, 8))
@settings(deadline=None)
def test_a_full_slide_is_covered_by_an_even_grid_inside_it(tiling, width, height, ratio):
    slide_mpp = tiling.mpp / max(ratio, 0.92)
    mask = np.ones((height // 8 + 1, width // 8 + 1), bool)
    coords = grid(mask, 8, width, height, slide_mpp, tiling)
    side = tiling.patch_px * tiling.mpp / slide_mpp
    stride = (tiling.patch_px - tiling.overlap) * tiling.mpp / slide_mpp
    assert coords.dtype == np.int32
    assert (coords >= 0).all()
    assert len(np.unique(coords, axis=0)) == len(coords)
    assert sorted(coords.tolist(), key=lambda c: (c[1], c[0])) == coords.tolist()
    for axis, length in ((0, width), (1, height)):
        places = np.unique(coords[:, axis])
        if length < side:
            assert places.tolist() == [0]
            continue
        assert places[-1] + side <= length + 1e-6
        assert places[-1] + 1 + side + stride > length
        np.testing.assert_allclose(places, np.arange(len(places)) * stride, atol=1 + 1e-6)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.integers(2, 7),
    st.sampled_from([16, 24, 33]),
    st.integers(0, 12),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_patches_are_those_with_enough_tissue_counted_pixel_by_pixel(
    seed, scale, factor, px, overlap, tissue
):
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 40, 2)) < rng.random()
    full = np.repeat(np.repeat(mask, scale, axis=0), scale, axis=1)
    height, width = full.shape[0] - rng.integers(scale), full.shape[1] - rng.integers(scale)
    full = full[:height, :width]
    tiling = Tiling(mpp=factor * 0.25, patch_px=px, overlap=overlap, tissue=tissue)
    side, stride = px * factor, (px - overlap) * factor
    expected = [
        (x, y)
        for y in range(0, max(height - side, 0) + 1, stride)
        for x in range(0, max(width - side, 0) + 1, stride)
        if full[y : y + side, x : x + side].mean() >= tissue - 1e-9
    ]
    coords = grid(mask, scale, width, height, 0.25, tiling)
    assert [tuple(c) for c in coords.tolist()] == expected


def test_a_slide_smaller_than_a_patch_has_one():
    coords = grid(np.ones((10, 10), bool), 10, 100, 90, 0.5, Tiling(0.5, 256))
    assert coords.tolist() == [[0, 0]]


def test_places_do_not_drift_over_a_large_slide():
    mask = np.ones((1, 1000), bool)
    coords = grid(mask, 100, 100_000, 100, 0.499, Tiling(0.5, 100, tissue=0))
    exact = np.arange(len(coords)) * 100 * 0.5 / 0.499
    assert np.abs(coords[:, 0] - exact).max() <= 1
    assert len(coords) == 998


def test_magnifying_a_slide_is_refused_but_a_scanners_tolerance_is_not():
    with pytest.raises(UserError, match="magnified"):
        Tiling(mpp=0.25).level0_px(0.5)
    assert Tiling(mpp=0.5).level0_px(0.504) == pytest.approx(253.97, abs=0.01)


@pytest.mark.parametrize(
    "wrong", [{"mpp": 0}, {"patch_px": 8}, {"overlap": 250}, {"overlap": -1}, {"tissue": 50}]
)
def test_a_tiling_without_sense_is_refused(wrong):
    with pytest.raises(UserError, match=r"not -?\d"):
        Tiling(**wrong)


def test_a_tiling_comes_back_from_its_recipe():
    tiling = Tiling(mpp=0.88, patch_px=224, overlap=16, tissue=0.4)
    assert Tiling.from_recipe({"source": "slides", "quality": 80, **tiling.recipe()}) == tiling
    with pytest.raises(UserError, match="'coords'"):
        Tiling.from_recipe({"source": "coords", "patch_px": 256})


@pytest.mark.parametrize(
    ("stems", "coords", "side", "are_true"),
    [
        (["512_0", "0_1024", "1024_1024"], [[512, 0], [0, 1024], [1024, 1024]], 512, True),
        (["s-01_0_0_x", "s-01_300_0_x"], [[0, 0], [300, 0]], 300, True),
        (["x=100,y=7", "x=160,y=99"], [[100, 7], [160, 99]], 256, True),
        (["0_0", "1_0", "1_1"], [[0, 0], [256, 0], [256, 256]], 256, True),
        (["4000_8000"], [[4000, 8000]], 256, True),
        (
            ["a1", "a2", "a3", "a4", "a5"],
            [[0, 0], [256, 0], [0, 256], [256, 256], [0, 512]],
            256,
            False,
        ),
        (["1_2_20", "1_3_20"], [[0, 0], [0, 256]], 256, False),
        (["5_5", "5_5b"], [[0, 0], [0, 256]], 256, False),
        (["0_0", "thumb"], [[0, 0], [0, 256]], 256, False),
        (["1_20240101123456", "2_20240101123456"], [[0, 0], [0, 256]], 256, False),
    ],
)
def test_places_are_read_from_names_only_where_they_are_clear(stems, coords, side, are_true):
    found, level0_px, is_true = coords_from_names(stems, "s-01", 256)
    assert found.dtype == np.int32
    assert found.tolist() == coords
    assert level0_px == side
    assert is_true == are_true
