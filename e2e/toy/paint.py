"""Paint synthetic slides: tissue, and the anomaly on which the label depends.

See :mod:`e2e.toy.cohort` for what the anomalies are.
"""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage, special

Array = npt.NDArray[np.floating]
Settings = dict[str, float]

LABELS = ("normal", "anomaly")
SPLITS = ("train", "val", "test")
MPP = 0.5
DEFAULT_SIZE = {"micro": 1024, "macro": 3072}
SMALLEST_SIZE = {"micro": 256, "macro": 2048}
SIZE_STEP = 256
SMALLEST_LEVEL = 256
AXIS_RATIO = 0.68
BLACK, WHITE = 14.0, 243.0

# Name -> (range in train and val, range in test). Lengths in level-0 pixels, stain strengths in
# optical density, hues in radians about the usual stain vector, densities per 1000 pixels.
COMMON: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "ground": ((240, 246), (232, 238)),
    "eosin_hue": ((-0.10, 0.06), (0.12, 0.24)),
    "eosin_strength": ((0.26, 0.36), (0.26, 0.36)),
    "hematoxylin_hue": ((-0.06, 0.06), (0.10, 0.20)),
    "hematoxylin_strength": ((0.65, 0.85), (0.65, 0.85)),
    "fibre_period": ((20, 30), (12, 17)),
    "fibre_depth": ((0.5, 0.8), (0.5, 0.8)),
    "nuclei_density": ((1.3, 2.0), (2.4, 3.2)),
    "nuclei_radius": ((5.0, 6.2), (5.0, 6.2)),
}
KINDS = {
    "micro": {
        "disc_density": ((0.30, 0.40), (0.30, 0.40)),
        "anomalous_share": ((0.40, 0.60), (0.40, 0.60)),
    },
    "macro": {
        "rings": ((4, 7), (4, 7)),
        "anomalous_share": ((0.3, 0.7), (0.3, 0.7)),
    },
}


class Box(NamedTuple):
    """Bounding box in level-0 pixels."""

    x: int
    y: int
    width: int
    height: int


class SlideSpec(NamedTuple):
    """One slide of the cohort: a row of labels.csv."""

    case: str
    slide: str
    split: str
    label: str


class Painted(NamedTuple):
    """A painted slide that is not written yet."""

    image: npt.NDArray[np.uint8]
    """(size, size, 3) RGB at 0.5 um/px."""
    truth: list[Box]
    """Boxes of the anomalous objects; empty on a normal slide."""
    settings: Settings
    """The painter's settings."""


def plan(slides: tuple[int, int, int], seed: int) -> list[SlideSpec]:
    """Return the slides of the cohort.

    Every fifth slide is a second slide of the case before it. Cases get the two labels in pairs, in
    random order within a pair, so that a slide's label does not depend on the number of slides.

    Parameters
    ----------
    slides
        Number of slides in train, val and test.
    seed
        Random seed.

    Returns
    -------
    list of SlideSpec
        One for each slide.
    """
    rows = []
    for split, count in zip(SPLITS, slides, strict=True):
        for index in range(count):
            number = index - (index + 1) // 5
            case = f"{split}{number:03d}"
            first_is_anomaly = generator(seed, f"{split} pair {number // 2}").integers(2)
            label = LABELS[int(number % 2 != first_is_anomaly)]
            rows.append(SlideSpec(case, f"{case}-{1 + (index % 5 == 4)}", split, label))
    return rows


def twins(spec: SlideSpec) -> str:
    """Return the name of a slide's pair: the two slides, one of each label, share the painter's settings.

    So the labels cannot be told apart by colour, not even by chance in a small cohort.
    """
    number = spec.case.removeprefix(spec.split)
    return f"{spec.split} twins {int(number) // 2}" if number.isdigit() else spec.slide


def generator(seed: int, name: str) -> np.random.Generator:
    """Return a random generator that depends only on ``seed`` and ``name``."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def paint(spec: SlideSpec, kind: str, size: int, seed: int) -> Painted:
    """Paint one slide; a pure function of its arguments.

    The label affects only the shapes of the anomalous objects: painted with the other label, the same
    slide has the same tissue, and every disc and ring in the same position.

    Parameters
    ----------
    spec
        The slide.
    kind
        ``micro`` or ``macro``.
    size
        Width and height in pixels.
    seed
        Random seed.

    Returns
    -------
    Painted
        The image, the anomalous objects and the settings.
    """
    rng = generator(seed, spec.slide)
    settings = draw_settings(generator(seed, twins(spec)), kind, test=spec.split == "test")
    anomalous = spec.label == "anomaly"
    if kind == "macro":
        rings = place_rings(rng, size, settings)
        tissue = tissue_mask(rng, size, rings[:, :2], 1.5 * rings[:, 2])
        canvas = paint_tissue(rng, tissue, settings)
        truth = paint_rings(rng, canvas, rings, settings, anomalous)
    else:
        tissue = tissue_mask(rng, size, *place_pieces(rng, size))
        canvas = paint_tissue(rng, tissue, settings)
        truth = paint_discs(rng, canvas, tissue, settings, anomalous)
    # Rounded separately, so that the ink of both labels adds up to the same whole numbers.
    canvas = np.rint(canvas) + np.rint(rng.normal(0, 2.0, (size, size, 1)))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Painted(image, truth, settings)


def draw_settings(rng: np.random.Generator, kind: str, *, test: bool) -> Settings:
    """Draw the painter's settings of a slide, each uniform in its range for the split."""
    ranges = COMMON | KINDS[kind]
    return {name: float(rng.uniform(*pair[test])) for name, pair in ranges.items()}


# --- tissue ---------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, size: int, cell: float) -> Array:
    """Return (size, size) smooth noise, about standard normal, with features ``cell`` pixels wide."""
    span = size / cell
    coarse = rng.normal(size=(math.ceil(span) + 4,) * 2).astype(np.float32)
    box = (1.5, 1.5, 1.5 + span, 1.5 + span)
    # Interpolation between independent values lowers their variance; 1.4 restores it.
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return 1.4 * np.asarray(image)


def place_pieces(rng: np.random.Generator, size: int) -> tuple[npt.NDArray, npt.NDArray]:
    """Return centres (n, 2) and radii (n,) of the discs that the pieces of tissue are made from."""
    count = int(rng.integers(4, 7))
    angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(count) / count
    reach = rng.uniform(0.18, 0.31, count) * size
    centres = size / 2 + reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return centres, rng.uniform(0.11, 0.19, count) * size


def tissue_mask(
    rng: np.random.Generator, size: int, centres: npt.NDArray, radii: npt.NDArray
) -> npt.NDArray[np.bool_]:
    """Return the (size, size) mask of tissue: discs merged into each other, with a ragged edge."""
    step = 4
    rows, columns = np.mgrid[0:size:step, 0:size:step].astype(np.float32)
    inside = np.full(rows.shape, -np.inf, np.float32)
    for (x, y), radius in zip(centres, radii, strict=True):
        inside = np.maximum(inside, radius - np.hypot(columns - x, rows - y))
    small = len(rows)
    scale = float(np.mean(radii))
    inside += 0.16 * scale * smooth_noise(rng, small, scale / step / 2)
    inside += 4.0 * smooth_noise(rng, small, 6)
    edge = np.minimum(np.minimum(rows, columns), size - 1 - np.maximum(rows, columns))
    inside = np.minimum(inside, edge - 12)
    return np.asarray(Image.fromarray(inside).resize((size, size), Image.Resampling.BILINEAR)) > 0


def paint_tissue(
    rng: np.random.Generator, tissue: npt.NDArray[np.bool_], settings: Settings
) -> Array:
    """Return (size, size, 3) float RGB: stained tissue on bare glass, by the Beer-Lambert law."""
    size = len(tissue)
    soft = ndimage.gaussian_filter(tissue.astype(np.float32), 1.2)
    eosin = settings["eosin_strength"] * soft * stroma(rng, size, settings)
    hematoxylin = settings["hematoxylin_strength"] * soft * nuclei(rng, tissue, settings)
    hematoxylin += 0.05 * soft
    # Optical densities close to those of ImageJ's colour deconvolution for H&E, turned about grey.
    stains = np.stack(
        [
            turn_hue(np.array([0.65, 0.70, 0.29]), settings["hematoxylin_hue"]),
            turn_hue(np.array([0.09, 0.95, 0.28]), settings["eosin_hue"]),
        ]
    ).astype(np.float32)
    density = np.stack([hematoxylin, eosin], axis=-1) @ stains
    # An absorption of 1 in the vector dims by e^-1.6, about the depth of a routine stain.
    return settings["ground"] * np.exp(-1.6 * density)


def turn_hue(vector: npt.NDArray, angle: float) -> npt.NDArray:
    """Return ``vector`` (3,) rotated by ``angle`` about the grey axis, at least 0.02 everywhere."""
    axis = np.full(3, 1 / math.sqrt(3))
    turned = (
        vector * math.cos(angle)
        + np.cross(axis, vector) * math.sin(angle)
        + axis * (axis @ vector) * (1 - math.cos(angle))
    )
    return np.maximum(turned, 0.02)


def stroma(rng: np.random.Generator, size: int, settings: Settings) -> Array:
    """Return (size, size) eosin, about 1: wavy fibres with pale clefts, in bright and dark regions."""
    rows, columns = np.ogrid[0:size, 0:size]
    heading = rng.uniform(0, np.pi)
    along = (columns * math.cos(heading) + rows * math.sin(heading)).astype(np.float32)
    period = settings["fibre_period"]
    phase = 2 * np.pi * along / period
    # The fibres bend as much as they advance, so that no direction dominates the slide.
    phase += 9 * smooth_noise(rng, size, 9 * period) + 1.5 * smooth_noise(rng, size, 2 * period)
    fibres = np.sin(phase) * (0.7 + 0.3 * smooth_noise(rng, size, 3 * period))
    clefts = np.clip(fibres - 0.75, 0, 0.5)
    broad = 0.15 * smooth_noise(rng, size, 150) + 0.10 * smooth_noise(rng, size, 12)
    grain = 0.10 * smooth_noise(rng, size, 2.5)
    depth = settings["fibre_depth"]
    return np.clip(1 + broad + grain + 0.5 * depth * fibres - 2.0 * depth * clefts, 0.15, None)


def nuclei(rng: np.random.Generator, tissue: npt.NDArray[np.bool_], settings: Settings) -> Array:
    """Return (size, size) hematoxylin in 0..1: oval nuclei, dense in some regions and rare in others."""
    size = len(tissue)
    stamps = [nucleus(rng, settings["nuclei_radius"]) for _ in range(32)]
    half = len(stamps[0]) // 2
    out = np.zeros((size + 2 * half, size + 2 * half), np.float32)
    # Half of the candidates are dropped, because they are where cells are rare.
    count = rng.poisson(2 * settings["nuclei_density"] * size * size / 1000)
    x, y = rng.integers(0, size, (2, count))
    crowd = smooth_noise(rng, size, 90)[y, x]
    keep = tissue[y, x] & (rng.random(count) < special.expit(1.5 * crowd))
    which = rng.integers(0, len(stamps), count)
    for column, row, number in zip(x[keep], y[keep], which[keep], strict=True):
        window = out[row : row + 2 * half + 1, column : column + 2 * half + 1]
        np.maximum(window, stamps[number], out=window)
    return out[half:-half, half:-half]


def nucleus(rng: np.random.Generator, radius: float) -> Array:
    """Return one nucleus on a square of odd side: an oval with a dark rim and uneven chromatin."""
    half = math.ceil(1.9 * radius) + 1
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    stretch = rng.uniform(1.0, 1.8)
    mean = radius * rng.uniform(0.75, 1.1)
    u = (columns * math.cos(angle) + rows * math.sin(angle)) / stretch**0.5
    v = (rows * math.cos(angle) - columns * math.sin(angle)) * stretch**0.5
    inside = mean - np.hypot(u, v) + 0.5 * smooth_noise(rng, len(rows), 5)
    chromatin = 0.72 + 0.12 * smooth_noise(rng, len(rows), 3) + 0.25 * np.exp(-(inside**2) / 2)
    return (np.clip(inside + 0.5, 0, 1) * np.clip(chromatin, 0.4, 1.1)).astype(np.float32)


# --- micro-anomaly --------------------------------------------------------------------------------


def paint_discs(
    rng: np.random.Generator,
    canvas: Array,
    tissue: npt.NDArray[np.bool_],
    settings: Settings,
    anomalous: bool,
) -> list[Box]:
    """Paint the discs into ``canvas``; return the boxes of those with a plus."""
    corners = place_discs(rng, tissue, settings["disc_density"])
    centres = corners + rng.uniform(-1, 1, corners.shape)
    radii = rng.uniform(13.0, 15.5, len(centres))
    is_plus = in_clusters(rng, centres, settings["anomalous_share"]) & anomalous
    half = 18
    rows, columns = np.mgrid[-half:half, -half:half].astype(np.float32) + 0.5
    for (x, y), offset, radius, plus in zip(
        corners, centres - corners, radii, is_plus, strict=True
    ):
        black = np.clip(radius - np.hypot(columns - offset[0], rows - offset[1]) + 0.5, 0, 1)
        window = canvas[y - half : y + half, x - half : x + half]
        window[:] = window * (1 - black[..., None]) + BLACK * black[..., None]
        canvas[y - 8 : y + 8, x - 8 : x + 8] += (WHITE - BLACK) * glyph(plus=bool(plus))[..., None]
    boxes = zip(centres[is_plus], radii[is_plus], strict=True)
    return [bounding_box(x, y, radius, radius) for (x, y), radius in boxes]


def place_discs(
    rng: np.random.Generator, tissue: npt.NDArray[np.bool_], density: float
) -> npt.NDArray[np.int64]:
    """Return (n, 2) random x, y on the tissue, ``density`` per 1000 pixels, never touching.

    All are multiples of 4, since a block of 4 x 4 pixels becomes one pixel at 5x.
    """
    margin, apart, grid = 18, 35.0, 4
    room = np.asarray(ndimage.distance_transform_edt(tissue))[::grid, ::grid] > margin
    rows, columns = grid * np.array(np.nonzero(room))
    num_discs = max(1, round(density * np.count_nonzero(tissue) / 1000))
    centres = np.empty((0, 2), np.int64)
    for pick in rng.permutation(len(rows))[: 12 * num_discs]:
        candidate = np.array([columns[pick], rows[pick]])
        if len(centres) < num_discs and np.all(np.hypot(*(centres - candidate).T) > apart):
            centres = np.vstack([centres, candidate])
    return centres


def in_clusters(rng: np.random.Generator, centres: npt.NDArray, share: float) -> npt.NDArray:
    """Return (n,) True for about ``share`` of the centres, at least one, in two or three clusters."""
    seeds = centres[rng.integers(0, len(centres), int(rng.integers(2, 4)))]
    to_seed = np.hypot(*(centres[:, None] - seeds[None]).transpose(2, 0, 1)).min(axis=1)
    return np.argsort(np.argsort(to_seed)) < max(1, round(share * len(centres)))


def glyph(*, plus: bool) -> Array:
    """Return (16, 16) white ink, 0 or 1: four strokes of 8 x 4 pixels that form a plus or a letter o.

    Turning each stroke of the plus about its centre makes the o. Stroke centres are corners of the
    4 x 4 blocks that are averaged at 5x, so the ink of no block changes; nor does the length of the
    outline (64 pixels), which a random filter would detect.
    """
    ink = np.zeros((16, 16), np.float32)
    for row, column in ((4, 8), (12, 8), (8, 4), (8, 12)):
        upright = plus == (column == 8)
        tall, wide = (4, 2) if upright else (2, 4)
        ink[row - tall : row + tall, column - wide : column + wide] = 1
    return ink


# --- macro-anomaly --------------------------------------------------------------------------------


def place_rings(rng: np.random.Generator, size: int, settings: Settings) -> npt.NDArray:
    """Return (n, 4) rings that do not touch, at least one: x, y, outer radius, border."""
    rings = np.empty((0, 4))
    for _ in range(400):
        radius, border = rng.normal(390, 25), rng.uniform(68, 84)
        radius = float(np.clip(radius, 330, 450))
        # As wide as the ellipse of the same area, whichever shape it has.
        reach = radius / math.sqrt(AXIS_RATIO) + 60
        x, y = rng.uniform(reach, size - reach, 2)
        gaps = np.hypot(rings[:, 0] - x, rings[:, 1] - y) - 1.25 * rings[:, 2]
        if len(rings) < int(settings["rings"]) and np.all(gaps > reach):
            rings = np.vstack([rings, [x, y, radius, border]])
    return rings


def paint_rings(
    rng: np.random.Generator, canvas: Array, rings: npt.NDArray, settings: Settings, anomalous: bool
) -> list[Box]:
    """Paint the rings into ``canvas``; return the boxes of the ellipses."""
    share = settings["anomalous_share"]
    is_ellipse = rng.permutation(len(rings)) < max(1, round(share * len(rings)))
    angles = rng.uniform(0, np.pi, len(rings))
    truth = []
    for (x, y, radius, border), angle, ellipse in zip(
        rings, angles, is_ellipse & anomalous, strict=True
    ):
        outer, inner = ring_outlines(radius, border, angle, AXIS_RATIO if ellipse else 1.0)
        half = math.ceil(np.abs(outer).max()) + 2
        column, row = int(x), int(y)
        shift = np.array([half + x - column, half + y - row])
        black, white = (fill_polygon(outline + shift, 2 * half) for outline in (outer, inner))
        window = canvas[row - half : row + half, column - half : column + half]
        window *= 1 - black
        window += (black - white) * BLACK + white * WHITE
        if ellipse:
            width, height = np.abs(outer).max(axis=0)
            truth.append(bounding_box(x, y, width, height))
    return truth


def ring_outlines(
    radius: float, border: float, angle: float, ratio: float
) -> tuple[npt.NDArray, npt.NDArray]:
    """Return the outer and inner outline, (720, 2) points about the centre.

    An ellipse of axis ``ratio`` with the area of a circle of ``radius`` pixels, and a border of constant
    thickness with the area of that circle's border. The curve at depth t inside an outline of area A
    and perimeter P encloses A - P t + pi t^2.
    """
    major, minor = radius / math.sqrt(ratio), radius * math.sqrt(ratio)
    perimeter = 4 * major * float(special.ellipe(1 - ratio**2))
    ink = math.pi * (radius**2 - (radius - border) ** 2)
    depth = (perimeter - math.sqrt(perimeter**2 - 4 * math.pi * ink)) / (2 * math.pi)
    turn = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    outer = np.stack([major * np.cos(turn), minor * np.sin(turn)], 1)
    normal = np.stack([minor * np.cos(turn), major * np.sin(turn)], 1)
    inner = outer - depth * normal / np.linalg.norm(normal, axis=1, keepdims=True)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return outer @ rotation, inner @ rotation


def fill_polygon(points: npt.NDArray, side: int) -> Array:
    """Return the (side, side, 1) coverage in 0..1 of a polygon of (x, y) points."""
    finer = 3
    mask = Image.new("L", (finer * side, finer * side))
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in finer * points], fill=255)
    return np.asarray(mask.reduce(finer), np.float32)[..., None] / 255


def bounding_box(x: float, y: float, half_width: float, half_height: float) -> Box:
    """Return the whole-pixel box about the centre (x, y)."""
    left, top = math.floor(x - half_width), math.floor(y - half_height)
    right, bottom = math.ceil(x + half_width) + 1, math.ceil(y + half_height) + 1
    return Box(left, top, right - left, bottom - top)
