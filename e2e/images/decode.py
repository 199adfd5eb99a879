"""JPEG bytes -> uint8 pixels. Every decoder behind one face; ``auto`` picks one that works here."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import UserError
from e2e.memory import Slabs
from e2e.registry import Registry

DECODERS: Registry[Decoder] = Registry("decoder")

Buffer = bytes | bytearray | memoryview
"""The bytes of one JPEG, wherever they lie (``array.data`` of an array): most libraries read them
there, without a copy."""

Jpegs = Sequence[Buffer]
Size = tuple[int, int]
"""(height, width) in pixels."""

CALLS = 2
"""Decode calls for the CPU that are under way at once and share the threads: more threads than cores
are slower. For a GPU there is one at a time, see :mod:`e2e.bags.prefetch`."""

FAULTS = (ValueError, OSError, SyntaxError, RuntimeError)
"""What the libraries raise for a damaged image."""


class UndecodableError(ValueError):
    """The patch at ``index`` of the request cannot be decoded; the caller knows whose it is."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Decoder:
    """Base of the decoders.

    Attributes:
        name: the registered name, also when ``auto`` was asked for.
        note: why ``auto`` could not take the fastest decoder of the device, else empty.
        tolerance: mean difference from libjpeg-turbo's exact transform in grey levels (0..255)
            over a YCbCr or grey image; 0: equal to the bit.
        strict: damage inside the image's data that libjpeg can tell of is an error. If not, such
            an image comes out as Pillow shows it, with what could be saved of it.
        borrows: the JPEGs are not looked at any more once :meth:`decode` returns.
    """

    name = ""
    note = ""
    tolerance = 0.0
    strict = True
    borrows = False

    def __init__(self, device: torch.device) -> None:
        """``device`` is where the pixels will be wanted; UserError if it cannot decode for it."""

    def decode(
        self,
        jpegs: Jpegs,
        device: torch.device | str = "cpu",
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """(n,3,H,W) uint8 RGB on ``device``, channels last in memory. Thread-safe.

        Args:
            jpegs: n >= 1 images of one size.
            device: of the result.
            out: (n,H,W,3) uint8, contiguous, on the CPU (pinned or not): memory to decode into,
                so that it can be used again; the result on the CPU is a view of it. After an
                error its content is undefined. A GPU decoder needs none and leaves it alone.

        Raises:
            UndecodableError: a value is no JPEG, is cut short, or has another size than ``out``
                or the first. Of several the first is named.
        """
        size = _size(jpegs, out)
        return self._slab(jpegs, size, torch.device(device), out).permute(0, 3, 1, 2)

    def _slab(self, jpegs: Jpegs, size: Size, device: torch.device, out: Tensor | None) -> Tensor:
        """(n,H,W,3) uint8 on ``device``."""
        raise NotImplementedError


class CpuDecoder(Decoder):
    """One JPEG after another into the rows of one slab, on :func:`threads` threads."""

    borrows = True

    def into(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """Decode ``jpeg``, known to have its size, into ``row`` (H,W,3); an error of ``FAULTS``."""
        raise NotImplementedError

    def _slab(self, jpegs: Jpegs, size: Size, device: torch.device, out: Tensor | None) -> Tensor:
        slab = _memory((len(jpegs), *size, 3), device) if out is None else out
        rows = slab.numpy()
        # A few images to a thread at least: handing over costs more than one image.
        share = threads() if device.type == "cuda" else threads() // CALLS
        blocks = max(1, min(share, len(jpegs) // 8))
        cuts = [len(jpegs) * block // blocks for block in range(blocks + 1)]
        first, *others = pairwise(cuts)
        running = [_pool().submit(self._block, jpegs, rows, *block) for block in others]
        try:
            self._block(jpegs, rows, *first)
        finally:
            wait(running)  # after an error too: they write into the caller's memory
        for block in running:
            block.result()
        return slab.to(device, non_blocking=out is None)  # the caller may use its own again

    def _block(self, jpegs: Jpegs, rows: NDArray[np.uint8], start: int, stop: int) -> None:
        size = (rows.shape[1], rows.shape[2])
        for index in range(start, stop):
            _check(index, jpegs[index], size)
            try:
                self.into(jpegs[index], rows[index])
            except FAULTS as error:
                raise _unreadable(index, error) from error


def _memory(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """uint8 to decode into, for pixels that go to ``device``."""
    if device.type == "cuda":
        # Pinned, so that the copy overlaps; PyTorch hands it out again when the copy is over.
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    return _SLABS.take(shape, torch.uint8)


_SLABS = Slabs()


@DECODERS.register("simplejpeg")
class SimpleJpeg(CpuDecoder):
    """libjpeg-turbo bundled in a wheel: needs no system library."""

    def __init__(self, device: torch.device) -> None:
        import simplejpeg

        self._decode = simplejpeg.decode_jpeg

    def into(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """See :class:`CpuDecoder`. The exact IDCT and upsampling, as the other decoders use."""
        self._decode(
            jpeg, colorspace="RGB", fastdct=False, fastupsample=False, strict=True, buffer=row
        )


@DECODERS.register("turbojpeg")
class TurboJpeg(CpuDecoder):
    """PyTurboJPEG over the system's libturbojpeg. No CMYK."""

    def __init__(self, device: torch.device) -> None:
        try:
            import turbojpeg

            class Strict(turbojpeg.TurboJPEG):
                # The library only warns of a damaged file, and whether a warning is seen is up to
                # filters that every thread of the process can change.
                def _TurboJPEG__report_error(self, handle: int) -> None:
                    raise OSError(self._TurboJPEG__get_error_string(handle))  # pyright: ignore

            self._rgb = turbojpeg.TJPF_RGB
            self._turbo = Strict()
        except (ImportError, RuntimeError, OSError) as error:
            raise _no_library("turbojpeg", error) from error

    def into(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """See :class:`CpuDecoder`."""
        self._turbo.decode(jpeg, pixel_format=self._rgb, dst=row)


@DECODERS.register("jpeg4py")
class Jpeg4Py(CpuDecoder):
    """jpeg4py over the system's libturbojpeg. No CMYK."""

    def __init__(self, device: torch.device) -> None:
        try:
            import jpeg4py

            self._jpeg = jpeg4py.JPEG
            # Here, because a JPEG object that finds no library cannot even be deleted cleanly.
            jpeg4py.initialize()
        except (ImportError, OSError) as error:
            raise _no_library("jpeg4py", error) from error

    def into(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """See :class:`CpuDecoder`."""
        image = self._jpeg(np.frombuffer(jpeg, np.uint8))
        try:
            image.decode(row)
        except RuntimeError:
            # jpeg4py would hand the decompressor that failed to another thread, which crashes.
            if image.decompressor is not None:
                image.decompressor.release()
                image.decompressor = None
            raise


@DECODERS.register("pillow")
class Pillow(CpuDecoder):
    """Pillow, everywhere at hand. It asks nothing of libjpeg's warnings, only of a missing end."""

    strict = False

    def into(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """See :class:`CpuDecoder`."""
        from PIL import Image

        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            row[...] = np.asarray(image.convert("RGB"))


class BatchDecoder(Decoder):
    """A library that decodes a whole list at once.

    It is given whole, plain JPEGs only. Lists with others, and those it fails at, are decoded one
    by one, and what it cannot is left to simplejpeg, which has the right pixels or says what is
    wrong: so the pixels of a patch do not depend on what else is in the list. For a device of
    another type than the one it was built for, simplejpeg does it all.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = SimpleJpeg(device)

    def images(self, jpegs: Jpegs, device: torch.device) -> Tensor:
        """(n,H,W,3) on ``device``; RuntimeError when one of them cannot be decoded."""
        raise NotImplementedError

    def _slab(self, jpegs: Jpegs, size: Size, device: torch.device, out: Tensor | None) -> Tensor:
        if device.type != self._device.type:
            return self._cpu._slab(jpegs, size, device, out)
        plain = [_check(index, jpeg, size) for index, jpeg in enumerate(jpegs)]
        slab = self._try(jpegs, device) if all(plain) else None
        if slab is None:
            rows = zip(range(len(jpegs)), jpegs, plain, strict=True)
            slab = torch.cat([self._one(*row, device) for row in rows])
        return out.copy_(slab) if out is not None and device.type == "cpu" else slab

    def _try(self, jpegs: Jpegs, device: torch.device) -> Tensor | None:
        try:
            return self.images(jpegs, device)
        except torch.OutOfMemoryError:  # no fault of an image
            raise
        except RuntimeError:
            return None

    def _one(self, index: int, jpeg: Buffer, plain: bool, device: torch.device) -> Tensor:
        found = self._try([jpeg], device) if plain else None
        if found is not None:
            return found
        try:
            return self._cpu.decode([jpeg], device).permute(0, 2, 3, 1)
        except UndecodableError as error:
            raise UndecodableError(index, str(error)) from error

    def _probe(self, name: str, advice: str) -> None:
        """UserError unless a grey image comes out grey: for a library that cannot work here."""
        import simplejpeg

        grey = simplejpeg.encode_jpeg(np.full((64, 64, 3), 128, np.uint8))
        try:
            found = self.images([grey, grey], self._device).float()
        except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
        else:
            if bool(((found - 128).abs() <= 2).all()):
                return
            reason = "a grey image did not come out grey"
        raise UserError(f"decoder '{name}' does not work on {self._device} ({reason})\n  {advice}")


@DECODERS.register("nvjpeg")
class NvJpeg(BatchDecoder):
    """nvJPEG by torchvision, on the GPU's own JPEG engine where it has one (A100, H100, H200).

    torchvision deprecates its image decoding in favour of torchcodec since 0.29. It has one
    decoder a process, behind a lock: more threads do not make it faster.
    """

    # Another IDCT, and chroma repeated instead of interpolated. Set from torchvision's own test
    # of this function (mean difference below 2); not measured here.
    tolerance = 2.0
    strict = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        advice = "set data.decoder=auto, which decodes on the CPU where it must"
        if device.type != "cuda":
            raise UserError(
                f"decoder 'nvjpeg' decodes on a CUDA device, not on {device}\n  {advice}"
            )
        self._probe("nvjpeg", advice)

    def images(self, jpegs: Jpegs, device: torch.device) -> Tensor:
        """See :class:`BatchDecoder`."""
        from torchvision.io import ImageReadMode, decode_jpeg

        # A copy of the bytes, because torch warns of memory that it may not write.
        encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
        # The engine does not wait for the stream: it would write into memory that was given back
        # while kernels in the queue still read it (pytorch/vision#9606).
        torch.cuda.current_stream(device).synchronize()
        planes = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
        slab = torch.empty((len(planes), *planes[0].shape[1:], 3), dtype=torch.uint8, device=device)
        return torch.stack([image.permute(1, 2, 0) for image in planes], out=slab)


@DECODERS.register("dali")
class Dali(BatchDecoder):
    """NVIDIA DALI: its CPU decoder on the CPU, nvJPEG and the GPU's JPEG engine on CUDA.

    It keeps the number of threads that was set when a process built its first, and they do not
    outlive a fork.
    """

    strict = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        advice = "pip install nvidia-dali-cuda130, or set data.decoder=auto, which does without"
        try:
            self._ndd, self._process = _dali()
        except (ImportError, OSError) as error:
            raise UserError(f"decoder 'dali' finds no DALI ({error})\n  {advice}") from error
        if device.type == "cuda":
            self.tolerance = NvJpeg.tolerance  # the same engine; on the CPU it is libjpeg-turbo
        self._probe("dali", "set data.decoder=auto, which does without DALI")

    def images(self, jpegs: Jpegs, device: torch.device) -> Tensor:
        """See :class:`BatchDecoder`."""
        if os.getpid() != self._process:
            raise UserError(
                "decoder 'dali' was built before this process was forked and would hang\n"
                "  start processes by spawn, or set data.decoder=auto"
            )
        encoded = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        if device.type == "cpu":
            return self._images(encoded, "cpu")
        with torch.cuda.device(device):
            found = self._images(encoded, "gpu").clone()
            # DALI takes its memory back here, and knows nothing of the copy in torch's queue.
            torch.cuda.current_stream(device).synchronize()
            return found

    def _images(self, encoded: list[NDArray[np.uint8]], device: str) -> Tensor:
        ndd = self._ndd
        with ndd.EvalMode.sync_full:
            images = ndd.decoders.image(
                ndd.as_batch(encoded),
                device=device,
                adjust_orientation=False,  # as the others: patches have no right way up
                hw_decoder_load=1.0,  # a share would let the place in the list choose the engine
            )
            return images.torch()


@cache
def _dali() -> tuple[Any, int]:
    import nvidia.dali.experimental.dynamic as ndd

    ndd.set_num_threads(threads())  # once: with fewer after its first image it hangs (2.4.0)
    return ndd, os.getpid()


def build_decoder(name: str = "auto", device: torch.device | str = "cpu") -> Decoder:
    """The decoder ``name`` for pixels wanted on ``device``; UserError if it cannot work there.

    ``auto`` is the fastest that works: on CUDA ``nvjpeg``, else ``simplejpeg``, which needs no
    system library. Which it is, ``.name`` says; ``.note`` why it is not ``nvjpeg`` on CUDA.
    """
    device = torch.device(device)
    note = ""
    if name == "auto" and device.type == "cuda":
        try:
            return build_decoder("nvjpeg", device)
        except UserError as error:
            note = str(error).splitlines()[0]
    name = "simplejpeg" if name == "auto" else name
    decoder = DECODERS.build(name, device)
    decoder.name, decoder.note = name, note
    return decoder


@contextmanager
def decoder_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` CPU threads for two decode calls at once inside the block, in the whole process.

    The callers' own threads are among them; with 1 no other thread is ever used.

    Args:
        count: None: this rank's share of the cores, at most 16.
    """
    if count is not None and count < 1:
        raise ValueError(f"a decoder needs a thread, not {count}")
    global _threads
    before, _threads = _threads, count
    _pool.cache_clear()
    try:
        yield
    finally:
        _threads = before
        _pool.cache_clear()


def threads() -> int:
    """CPU threads of two decode calls at once, see :func:`decoder_threads`."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's: ranks on this machine
    return _threads or max(1, min(16, len(os.sched_getaffinity(0)) // ranks))


_threads: int | None = None


@cache
def _pool() -> ThreadPoolExecutor:
    """Decoders release the interpreter lock, so threads are enough."""
    return ThreadPoolExecutor(threads() - 1, thread_name_prefix="decode")


# A forked process has the pool but none of its threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _frame(jpeg: Buffer) -> tuple[int, int, bool]:
    """(height, width, plain) from the frame header (ITU-T T.81, B.2.2); ValueError without one.

    ``plain``: whole, 8-bit Huffman coded, grey or YCbCr: what every library takes for the same.
    """
    data = memoryview(jpeg)
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG begins so")
    at, adobe = 2, False
    try:
        while True:
            start, marker, length = _SEGMENT(data, at)
            if start != 0xFF:
                raise ValueError("its header is damaged")
            if marker in _FRAMES:
                break
            adobe |= marker == 0xEE  # which may say that the channels are RGB already
            at += 1 if marker == 0xFF else 2 + length
        bits, height, width, channels = _FRAME(data, at + 4)
        ycbcr = channels == 1 or (channels == 3 and not adobe and data[at + 10] != ord("R"))
    except (struct.error, IndexError) as error:
        raise ValueError("it ends within its header") from error
    # No encoder gets below a bit or so for 256 pixels; a damaged size must not claim all memory.
    if not 0 < height * width <= 1000 * len(data):
        raise ValueError(f"{len(data)} bytes claim to be {width}x{height} px")
    return height, width, ycbcr and bits == 8 and marker <= 0xC2 and data[-2:] == b"\xff\xd9"


_SEGMENT = struct.Struct(">BBH").unpack_from
_FRAME = struct.Struct(">BHHB").unpack_from
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # not the tables among them


def _check(index: int, jpeg: Buffer, size: Size) -> bool:
    """Whether the JPEG is plain, see :func:`_frame`; UndecodableError unless it has this size."""
    try:
        height, width, plain = _frame(jpeg)
    except ValueError as error:
        raise _unreadable(index, error) from error
    if (height, width) != size:
        raise UndecodableError(index, f"is {width}x{height} px, not {size[1]}x{size[0]} px")
    return plain


def _size(jpegs: Jpegs, out: Tensor | None) -> Size:
    """(H, W) of the request: of ``out``, if there is one, else of the first image."""
    if len(jpegs) == 0:
        raise ValueError("no JPEG to decode")
    if out is None:
        try:
            return _frame(jpegs[0])[:2]
        except ValueError as error:
            raise _unreadable(0, error) from error
    right = out.dtype == torch.uint8 and out.device.type == "cpu" and out.is_contiguous()
    if not right or out.ndim != 4 or (out.shape[0], out.shape[3]) != (len(jpegs), 3):
        raise ValueError(
            f"out must be ({len(jpegs)},H,W,3) uint8, contiguous, on the CPU, "
            f"not {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    return out.shape[1], out.shape[2]


def _unreadable(index: int, error: Exception) -> UndecodableError:
    return UndecodableError(index, f"is no readable JPEG ({error})")


def _no_library(name: str, error: Exception) -> UserError:
    return UserError(
        f"decoder '{name}' finds no system library ({str(error).splitlines()[0]})\n"
        "  install it (Debian: libturbojpeg0), or set data.decoder=auto, which brings its own"
    )
