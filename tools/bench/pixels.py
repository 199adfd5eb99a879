"""Ways of making the same pixels: the training path, and those it is compared with."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import lmdb
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bags.loader import TrainingLoader
from e2e.bags.prefetch import prefetch
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec
from e2e.encoders.base import Encoder
from e2e.errors import UserError
from e2e.images.augment import Augment
from tools.bench.patches import CPU, Bench, Pixels, item_of

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)


STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def training_pixels(bench: Bench, reader: PixelRowReader, epochs: int = 1) -> Pixels:
    """The training path: loader, prefetched pixels, chunk after chunk, epoch after epoch."""
    spec = BagSpec(reader)
    # Cuts of exactly ``chunk``, so that all ways make the same chunks.
    items = [item_of(bench.store, bench.slide)]
    loader = TrainingLoader(items, spec, bags=1, chunk=bench.sizes.chunk, fixed_size_chunks=True)
    bags = chain.from_iterable(loader.epoch(k, rank=0, world_size=1) for k in range(epochs))
    for bag, _ in prefetch(bags, CPU):
        for chunk in bag.chunks:
            yield bag.pixels(chunk.start, chunk.stop, CPU)


class Library(NamedTuple):
    """A JPEG library by itself, set to the exact transform."""

    name: str
    """Also the name of the decoder (``loader.decoder``) that uses it."""
    decode: Callable[[bytes], NDArray[np.uint8]]
    decode_into: Callable[[bytes, NDArray[np.uint8]], Any]


def simplejpeg_library(**options: Any) -> Library:
    """Return simplejpeg, with ``options`` in place of the exact ones."""
    from simplejpeg import decode_jpeg

    exact = {"colorspace": "RGB", "fastdct": False, "fastupsample": False} | options
    decode = partial(decode_jpeg, **exact)
    return Library("simplejpeg", decode, lambda jpeg, row: decode(jpeg, buffer=row))


def turbojpeg_library() -> Library | None:
    """Return libjpeg-turbo through PyTurboJPEG; None where the system has none."""
    try:
        import turbojpeg

        decode = partial(turbojpeg.TurboJPEG().decode, pixel_format=turbojpeg.TJPF_RGB)
    except (ImportError, RuntimeError, OSError):
        return None
    return Library("turbojpeg", decode, lambda jpeg, row: decode(jpeg, dst=row))


def bare_loop(bench: Bench, library: Library) -> Pixels:
    """Decoding alone: JPEG bytes in memory, one array for all chunks."""
    side = bench.side
    pixels = np.empty((bench.sizes.chunk, side, side, 3), np.uint8)
    for start in bench.starts():
        part = bench.jpegs[start : start + bench.sizes.chunk]
        for jpeg, row in zip(part, pixels, strict=False):
            library.decode_into(jpeg, row)
        yield torch.from_numpy(pixels[: len(part)]).permute(0, 3, 1, 2)


def published_loader(bench: Bench, library: Library) -> Pixels:
    """The published loader's way, from its description: per patch get, copy, unpickle, decode,
    transpose, and assign into float32, channels last.

    In its favour, this goes chunk by chunk instead of a bag at once, and leaves out the copies of its
    multi-scale dataset, collation and pinning.
    """
    side, path = bench.side, str(bench.published)
    flags = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
    with lmdb.open(path, subdir=False, **flags) as env, env.begin(buffers=True) as txn:
        for start in bench.starts():
            stop = min(start + bench.sizes.chunk, bench.sizes.patches)
            images = torch.empty(stop - start, 3, side, side)
            images = images.contiguous(memory_format=torch.channels_last)
            for index in range(start, stop):
                value: Any = txn.get(f"{bench.slide}-{index}".encode())
                jpeg = pickle.loads(value.tobytes())  # written by this program
                pixels = library.decode(jpeg).transpose(2, 0, 1)
                images[index - start] = torch.from_numpy(pixels)
            yield images


class Normalise(Encoder):
    """The normalisation that every encoder starts with, and nothing else."""

    def features(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`."""
        return images


def normalised(pixels: Pixels) -> Pixels:
    """Normalise the pixels as encoders do."""
    encoder = Normalise(MEAN.flatten().tolist(), STD.flatten().tolist())
    return map(encoder, pixels)


class PerPatch(torch.utils.data.Dataset[Tensor]):
    """PIL and torchvision v2, patch by patch, in the order that its documentation recommends.

    Parameters
    ----------
    jpegs
        n patches.
    windows
        (n,4) left, top, width, height of their crops in pixels.
    size
        Side after cropping.
    """

    def __init__(self, jpegs: Sequence[bytes], windows: NDArray[np.float64], size: int) -> None:
        self.jpegs, self.size = jpegs, size
        self.windows = whole_pixels(windows).tolist()

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image
        from torchvision.transforms.v2 import functional as v2

        left, top, width, height = self.windows[index]
        image = v2.to_image(Image.open(io.BytesIO(self.jpegs[index])).convert("RGB"))
        image = v2.resized_crop(image, top, left, height, width, [self.size, self.size])
        image = v2.to_dtype(image, torch.float32, scale=True)
        return v2.normalize(image, MEAN.flatten().tolist(), STD.flatten().tolist())


def per_patch(
    bench: Bench, windows: NDArray[np.float64], *, workers: int
) -> torch.utils.data.DataLoader[Tensor]:
    """Return a ``DataLoader`` over :class:`PerPatch`.

    With a worker it decodes ahead, as the training path does; the worker starts with the first pass
    and stays.
    """
    return torch.utils.data.DataLoader(
        PerPatch(bench.jpegs, windows, bench.sizes.out),
        batch_size=bench.sizes.chunk,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )


def resized_by_pillow(bench: Bench, windows: NDArray[np.float64]) -> Pixels:
    """Exactly these crops by Pillow's antialiased bilinear filter, normalised."""
    from PIL import Image

    for start in bench.starts():
        images = []
        for jpeg, (left, top, width, height) in zip(
            bench.jpegs[start : start + bench.sizes.chunk], windows[start:], strict=False
        ):
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
            box = np.clip([left, top, left + width, top + height], 0, bench.side).tolist()
            size = (bench.sizes.out, bench.sizes.out)
            small = image.resize(size, Image.Resampling.BILINEAR, box=tuple(box))
            images.append(np.asarray(small))
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        yield (pixels.float() / 255 - MEAN) / STD


def whole_pixels(windows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the nearest windows that torchvision can cut."""
    first = np.rint(windows[:, :2])
    last = np.rint(windows[:, :2] + windows[:, 2:])
    return np.concatenate([first, last - first], axis=1).astype(np.int64)


def windows_of(bench: Bench, augment: Augment) -> NDArray[np.float64]:
    """Return (n,4) left, top, width, height that ``augment`` draws for the patches, in pixels.

    They are read off images whose red and green are their pixels' x and y, so that the random draws
    are not implemented twice.
    """
    side, out = bench.side, augment.size or bench.side
    if side > 256:
        raise UserError(
            f"--size {side}: windows are read off 8-bit images\n  give --size 256 or less"
        )
    ramp = torch.arange(side, dtype=torch.uint8)
    x, y = ramp.expand(side, side), ramp.view(-1, 1).expand(side, side)
    image = torch.stack([x, y, x]).unsqueeze(0)
    rows = BagSpec(bench.reader()).rows(item_of(bench.store, bench.slide), 0)[0][0]
    inside = np.arange(out // 4, out - out // 4)  # where no border is repeated
    windows = []
    for start in bench.starts():
        seeds = rows.part(start, start + bench.sizes.chunk).seeds()
        augmented = augment(image.expand(len(seeds), -1, -1, -1), seeds)
        scale = 255 if augmented.is_floating_point() else 1
        levels = augmented.double().numpy() * scale
        along = np.concatenate([levels[:, 0, out // 2, inside], levels[:, 1, inside, out // 2]])
        # Pixel k of the result shows the point corner + step * (k + 1/2) - 1/2.
        step, corner = np.polyfit(inside + 0.5, along.T + 0.5, 1).reshape(2, 2, -1)
        windows.append(np.stack([*corner, *step * out], 1))
    return np.concatenate(windows)


def dali(bench: Bench, *, crop: bool) -> Callable[[], Pixels]:
    """Return NVIDIA DALI's pipeline on the CPU: decoding, with ``crop`` its own random resized crop.

    Raises
    ------
    ImportError
        DALI is not installed.
    """
    import nvidia.dali.fn
    import nvidia.dali.types

    library: Any = nvidia.dali  # its type hints are wrong
    arrays = [np.frombuffer(jpeg, np.uint8) for jpeg in bench.jpegs]
    batches = [arrays[start : start + bench.sizes.chunk] for start in bench.starts()]

    @library.pipeline_def(batch_size=bench.sizes.chunk, num_threads=1, device_id=None, seed=0)
    def pipeline() -> Any:
        jpegs = library.fn.external_source(lambda k: batches[k % len(batches)], batch=True)
        images = library.fn.decoders.image(
            jpegs, device="cpu", output_type=library.types.RGB, use_fast_idct=False
        )
        size = [bench.sizes.out] * 2
        return library.fn.random_resized_crop(images, size=size) if crop else images

    built = pipeline()
    built.build()

    def run_pipeline() -> Pixels:
        for _ in batches:
            (images,) = built.run()
            yield torch.from_numpy(np.array(images.as_array())).permute(0, 3, 1, 2)

    return run_pipeline
