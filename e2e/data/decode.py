"""JPEG bytes -> uint8 pixels. Every decoder behind one face; ``auto`` picks one that works here."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import UserError
from e2e.registry import Registry

DECODERS: Registry[Decoder] = Registry("decoder")


class UndecodableError(ValueError):
    """The patch at ``index`` of the request cannot be decoded; the caller knows whose it is."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Decoder:
    """Base of the decoders: ``pixels`` decodes one JPEG to RGB, ``decode`` a list of one size."""

    def pixels(self, jpeg: bytes) -> NDArray[np.uint8]:
        """(H,W,3) uint8 RGB; ValueError when it is no complete JPEG."""
        raise NotImplementedError

    def decode(self, jpegs: Sequence[bytes], device: torch.device | str = "cpu") -> Tensor:
        """(n,3,H,W) uint8 RGB on ``device``, channels last in memory.

        Raises:
            UndecodableError: a value is no JPEG, is cut short, or has another size than the first.
        """
        images = list(_threads().map(self._guarded, range(len(jpegs)), jpegs))
        for index, image in enumerate(images):
            if image.shape != images[0].shape:
                raise UndecodableError(
                    index,
                    f"is {image.shape[1]}x{image.shape[0]} px, others {images[0].shape[1]} px",
                )
        return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)

    def _guarded(self, index: int, jpeg: bytes) -> NDArray[np.uint8]:
        try:
            return self.pixels(jpeg)
        except (ValueError, OSError, SyntaxError, RuntimeError, UserWarning) as error:
            raise UndecodableError(index, f"is no readable JPEG ({error})") from error


@DECODERS.register("simplejpeg")
class SimpleJpeg(Decoder):
    """libjpeg-turbo bundled in a wheel: needs no system library."""

    def __init__(self) -> None:
        import simplejpeg

        self._decode = simplejpeg.decode_jpeg

    def pixels(self, jpeg: bytes) -> NDArray[np.uint8]:
        """See :class:`Decoder`. The slow, exact IDCT and upsampling, as the other decoders use."""
        return self._decode(jpeg, colorspace="RGB", fastdct=False, fastupsample=False, strict=True)


@DECODERS.register("turbojpeg")
class TurboJpeg(Decoder):
    """PyTurboJPEG over the system's libturbojpeg."""

    def __init__(self) -> None:
        try:
            import turbojpeg

            self._rgb = turbojpeg.TJPF_RGB
            self._turbo = turbojpeg.TurboJPEG()
        except (ImportError, RuntimeError, OSError) as error:
            raise _no_library("turbojpeg", "libturbojpeg0", error) from error
        # It only warns of a truncated file. A filter set for good, because catch_warnings is not
        # safe in threads: it would leave other threads' warnings errors, or this one's silent.
        warnings.filterwarnings("error", category=UserWarning, module="turbojpeg")

    def pixels(self, jpeg: bytes) -> NDArray[np.uint8]:
        """See :class:`Decoder`."""
        return self._turbo.decode(jpeg, pixel_format=self._rgb)


@DECODERS.register("jpeg4py")
class Jpeg4Py(Decoder):
    """jpeg4py over the system's libturbojpeg."""

    def __init__(self) -> None:
        try:
            import jpeg4py

            self._jpeg = jpeg4py.JPEG
            # Here, because a JPEG object that finds no library cannot even be deleted cleanly.
            jpeg4py.initialize()
        except (ImportError, OSError) as error:
            raise _no_library("jpeg4py", "libturbojpeg0", error) from error

    def pixels(self, jpeg: bytes) -> NDArray[np.uint8]:
        """See :class:`Decoder`."""
        image = self._jpeg(np.frombuffer(jpeg, np.uint8))
        try:
            return image.decode()
        except RuntimeError:
            # jpeg4py would hand the decompressor that failed to another thread, which crashes.
            if image.decompressor is not None:
                image.decompressor.release()
                image.decompressor = None
            raise


@DECODERS.register("pillow")
class Pillow(Decoder):
    """Pillow, everywhere at hand."""

    def pixels(self, jpeg: bytes) -> NDArray[np.uint8]:
        """See :class:`Decoder`."""
        from PIL import Image

        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))


def build_decoder(name: str = "auto") -> Decoder:
    """The decoder ``name``; ``auto`` is the fastest that needs no system library."""
    return DECODERS.build("simplejpeg" if name == "auto" else name)


def _no_library(name: str, package: str, error: Exception) -> UserError:
    return UserError(
        f"decoder '{name}' finds no system library ({str(error).splitlines()[0]})\n"
        f"  install it (Debian: {package}), or set data.decoder=auto, which brings its own"
    )


@cache
def _threads() -> ThreadPoolExecutor:
    """Decoders release the interpreter lock, so threads are enough."""
    return ThreadPoolExecutor(max(1, min(8, len(os.sched_getaffinity(0)))))


# A forked process has the pool but none of its threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_threads.cache_clear)
