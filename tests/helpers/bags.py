"""Bags of five small slides."""

from __future__ import annotations

import pytest
import torch

from e2e.bags.chunk_plan import assign_to_ranks, cut_update
from e2e.bags.loader import label_slides, make_bag
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec
from e2e.images.decode import build_decoder
from e2e.slides import Slide

CPU = torch.device("cpu")


COUNTS = {"a": 9, "b": 30, "c": 4, "d": 5, "e": 17}


DECODER = build_decoder()


@pytest.fixture
def items(make_store):
    store = make_store(COUNTS)
    slides = [Slide(name, name, "train", {"label": str(n)}) for n, name in enumerate(COUNTS)]
    return label_slides(
        slides[::-1],
        {slide: [store] for slide in COUNTS},
        lambda words: torch.tensor(int(words["label"])),
    )


def spec_of(**options) -> BagSpec:
    reading = {key: options.pop(key) for key in ("size", "augment", "keep") if key in options}
    return BagSpec(PixelRowReader(DECODER, **reading), **options)


def bag_of(items, epoch=2, **changes):
    spec = spec_of(**({"seed": 3, "bag_size": 8} | changes))
    shares = assign_to_ranks(cut_update([spec.num_patches(item) for item in items], 5), 1)
    return make_bag(items, spec, shares, epoch=epoch)
