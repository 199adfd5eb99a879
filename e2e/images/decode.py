"""JPEG decoding to uint8 pixels. All decoders have one interface; ``auto`` picks one that works here."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import wait
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import UserError, optional_import
from e2e.images.jpeg_header import Buffer, read_frame_header
from e2e.images.threads import CONCURRENT_CALLS, decoder_pool, num_threads
from e2e.memory import Slabs
from e2e.registry import Registry

DECODERS: Registry[Decoder] = Registry("decoder")

Jpegs = Sequence[Buffer]
Size = tuple[int, int]
"""(height, width) in pixels."""

DECODE_ERRORS = (ValueError, OSError, SyntaxError, RuntimeError)
"""What the libraries raise for a damaged image."""


class UndecodableError(ValueError):
    """A patch that cannot be decoded.

    Parameters
    ----------
    index : int
        Its position in the request; the caller knows the slide it belongs to.
    reason : str
        The message: what is wrong with it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Decoder:
    """Base class of the decoders.

    Parameters
    ----------
    device : torch.device
        Where pixels will be requested. UserError if the decoder cannot work there.

    Attributes
    ----------
    name : str
        The registered name, also if ``auto`` was requested.
    note : str
        Why ``auto`` did not take the fastest decoder of the device; otherwise empty.
    tolerance : float
        Mean difference from libjpeg-turbo's exact transform in grey levels (0..255) over a grey or YCbCr
        image; 0 means identical.
    strict : bool
        Whether damage inside the image data that libjpeg can detect is an error. If not, such an image
        comes out as Pillow shows it, with what could be recovered.
    borrows : bool
        Whether the JPEGs are not read any more once :meth:`decode` returns.
    """

    name = ""
    note = ""
    tolerance = 0.0
    strict = True
    borrows = False

    def __init__(self, device: torch.device) -> None:
        pass

    def decode(
        self, jpegs: Jpegs, device: torch.device | str = "cpu", *, out: Tensor | None = None
    ) -> Tensor:
        """Decode images of one size. Thread-safe.

        Parameters
        ----------
        jpegs : sequence of n >= 1 buffers
        device : torch.device or str
            Where the result lies.
        out : (n, H, W, 3) uint8 tensor, optional
            Contiguous memory on the CPU (pinned or not) to decode into. The result on the CPU is a view of
            it; after an error its content is undefined. GPU decoders do not use it.

        Returns
        -------
        (n, 3, H, W) uint8 tensor
            RGB, channels last in memory.

        Raises
        ------
        UndecodableError
            If a value is not a JPEG, is truncated, or has another size than ``out`` or the first image.
            Names the first of several.
        """
        size = _requested_size(jpegs, out)
        return self._decode_into_slab(jpegs, size, torch.device(device), out).permute(0, 3, 1, 2)

    def _decode_into_slab(
        self, jpegs: Jpegs, size: Size, device: torch.device, out: Tensor | None
    ) -> Tensor:
        """(n, H, W, 3) uint8 on ``device``."""
        raise NotImplementedError


class CpuDecoder(Decoder):
    """Base class: decodes one JPEG after another into the rows of one tensor, on several threads."""

    borrows = True

    def decode_one(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """Decode a JPEG into memory of its size.

        Parameters
        ----------
        jpeg : bytes, bytearray or memoryview
        row : (H, W, 3) uint8 array
            Receives the pixels.

        Raises
        ------
        DECODE_ERRORS
            If the image is damaged.
        """
        raise NotImplementedError

    def _decode_into_slab(
        self, jpegs: Jpegs, size: Size, device: torch.device, out: Tensor | None
    ) -> Tensor:
        slab = _empty_slab((len(jpegs), *size, 3), device) if out is None else out
        rows = slab.numpy()
        # At least a few images for each thread: starting one costs more than decoding one image.
        share = num_threads() if device.type == "cuda" else num_threads() // CONCURRENT_CALLS
        blocks = max(1, min(share, len(jpegs) // 8))
        cuts = [len(jpegs) * block // blocks for block in range(blocks + 1)]
        first, *others = pairwise(cuts)
        running = [decoder_pool().submit(self._decode_block, jpegs, rows, *b) for b in others]
        try:
            self._decode_block(jpegs, rows, *first)
        finally:
            wait(running)  # after an error too: they write into the caller's memory
        for block in running:
            block.result()
        return slab.to(device, non_blocking=out is None)  # the caller may use its memory again

    def _decode_block(self, jpegs: Jpegs, rows: NDArray[np.uint8], start: int, stop: int) -> None:
        size = (rows.shape[1], rows.shape[2])
        for index in range(start, stop):
            _check_jpeg_size(index, jpegs[index], size)
            try:
                self.decode_one(jpegs[index], rows[index])
            except DECODE_ERRORS as error:
                raise _unreadable(index, error) from error


def _empty_slab(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """uint8 memory to decode into, for pixels that go to ``device``."""
    if device.type == "cuda":
        # Pinned, so that the copy overlaps; PyTorch reuses the memory when the copy is done.
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    return _SLABS.take(shape, torch.uint8)


_SLABS = Slabs()


@DECODERS.register("simplejpeg")
class SimpleJpeg(CpuDecoder):
    """libjpeg-turbo bundled in a wheel: needs no system library."""

    def __init__(self, device: torch.device) -> None:
        import simplejpeg

        self._decode_jpeg = simplejpeg.decode_jpeg

    def decode_one(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """Decode with the exact IDCT and upsampling, as the other decoders do; see :class:`CpuDecoder`."""
        self._decode_jpeg(
            jpeg, colorspace="RGB", fastdct=False, fastupsample=False, strict=True, buffer=row
        )


@DECODERS.register("turbojpeg")
class TurboJpeg(CpuDecoder):
    """PyTurboJPEG with the system's libturbojpeg. Does not decode CMYK."""

    def __init__(self, device: torch.device) -> None:
        with optional_import("turbojpeg", use="data.decoder=turbojpeg"):
            import turbojpeg
        try:

            class StrictTurboJPEG(turbojpeg.TurboJPEG):
                # The library only warns of a damaged file, and whether a warning is shown is up to filters
                # that every thread of the process can change.
                def _TurboJPEG__report_error(self, handle: int) -> None:
                    raise OSError(self._TurboJPEG__get_error_string(handle))  # pyright: ignore

            self._rgb = turbojpeg.TJPF_RGB
            self._turbo = StrictTurboJPEG()
        except (RuntimeError, OSError) as error:
            raise _missing_library("turbojpeg", error) from error

    def decode_one(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """See :class:`CpuDecoder`."""
        self._turbo.decode(jpeg, pixel_format=self._rgb, dst=row)


@DECODERS.register("jpeg4py")
class Jpeg4Py(CpuDecoder):
    """jpeg4py with the system's libturbojpeg. Does not decode CMYK."""

    def __init__(self, device: torch.device) -> None:
        with optional_import("turbojpeg", use="data.decoder=jpeg4py"):
            import jpeg4py
        try:
            self._jpeg = jpeg4py.JPEG
            # Here, because a JPEG object without a library cannot even be deleted cleanly.
            jpeg4py.initialize()
        except OSError as error:
            raise _missing_library("jpeg4py", error) from error

    def decode_one(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
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
    """Pillow, available everywhere. It ignores libjpeg's warnings, except that of a missing end."""

    strict = False

    def decode_one(self, jpeg: Buffer, row: NDArray[np.uint8]) -> None:
        """See :class:`CpuDecoder`."""
        from PIL import Image

        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            row[...] = np.asarray(image.convert("RGB"))


class BatchDecoder(Decoder):
    """Base class of libraries that decode an entire list at once.

    They receive complete, plain JPEGs only. Lists with others, and those that they fail to decode, are
    decoded one by one, and images that they cannot decode are left to simplejpeg, which has the right
    pixels or reports what is wrong. So the pixels of a patch do not depend on the other images of the
    list. For a device of another type than the one it was built for, simplejpeg decodes everything.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = SimpleJpeg(device)

    def decode_batch(self, jpegs: Jpegs, device: torch.device) -> Tensor:
        """Return (n, H, W, 3) pixels on ``device``; RuntimeError if one of them cannot be decoded."""
        raise NotImplementedError

    def _decode_into_slab(
        self, jpegs: Jpegs, size: Size, device: torch.device, out: Tensor | None
    ) -> Tensor:
        if device.type != self._device.type:
            return self._cpu._decode_into_slab(jpegs, size, device, out)
        are_plain = [_check_jpeg_size(index, jpeg, size) for index, jpeg in enumerate(jpegs)]
        slab = self._batch_or_none(jpegs, device) if all(are_plain) else None
        if slab is None:
            rows = zip(range(len(jpegs)), jpegs, are_plain, strict=True)
            slab = torch.cat([self._decode_alone(*row, device) for row in rows])
        return out.copy_(slab) if out is not None and device.type == "cpu" else slab

    def _batch_or_none(self, jpegs: Jpegs, device: torch.device) -> Tensor | None:
        try:
            return self.decode_batch(jpegs, device)
        except torch.OutOfMemoryError:  # not the fault of an image
            raise
        except RuntimeError:
            return None

    def _decode_alone(
        self, index: int, jpeg: Buffer, is_plain: bool, device: torch.device
    ) -> Tensor:
        pixels = self._batch_or_none([jpeg], device) if is_plain else None
        if pixels is not None:
            return pixels
        try:
            return self._cpu.decode([jpeg], device).permute(0, 2, 3, 1)
        except UndecodableError as error:
            raise UndecodableError(index, str(error)) from error

    def _check_that_it_works(self, name: str, advice: str) -> None:
        """UserError unless a grey image comes out grey: for a library that cannot work here."""
        import simplejpeg

        grey = simplejpeg.encode_jpeg(np.full((64, 64, 3), 128, np.uint8))
        try:
            pixels = self.decode_batch([grey, grey], self._device).float()
        except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
        else:
            if bool(((pixels - 128).abs() <= 2).all()):
                return
            reason = "a grey image did not come out grey"
        raise UserError(f"decoder '{name}' does not work on {self._device} ({reason})\n  {advice}")


@DECODERS.register("nvjpeg")
class NvJpeg(BatchDecoder):
    """nvJPEG through torchvision, on the GPU's own JPEG engine where it has one (A100, H100, H200).

    torchvision 0.29 deprecates its image decoding in favour of torchcodec. It has one decoder in a
    process, behind a lock: more threads do not make it faster.
    """

    # Another IDCT, and chroma repeated instead of interpolated. The value is that of torchvision's own test
    # of this function (mean difference below 2).
    tolerance = 2.0
    strict = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        advice = "set data.decoder=auto, which decodes on the CPU where it must"
        if device.type != "cuda":
            raise UserError(
                f"decoder 'nvjpeg' decodes on a CUDA device, not on {device}\n  {advice}"
            )
        self._check_that_it_works("nvjpeg", advice)

    def decode_batch(self, jpegs: Jpegs, device: torch.device) -> Tensor:
        """See :class:`BatchDecoder`."""
        from torchvision.io import ImageReadMode, decode_jpeg

        # A copy of the bytes, because torch warns of memory that it may not write.
        encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
        # The engine does not wait for the stream: it would write into memory that was freed while kernels
        # in the queue still read it (pytorch/vision#9606).
        torch.cuda.current_stream(device).synchronize()
        planes = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
        slab = torch.empty((len(planes), *planes[0].shape[1:], 3), dtype=torch.uint8, device=device)
        return torch.stack([image.permute(1, 2, 0) for image in planes], out=slab)


@DECODERS.register("dali")
class Dali(BatchDecoder):
    """NVIDIA DALI: its CPU decoder on the CPU, nvJPEG and the GPU's JPEG engine on CUDA.

    It keeps the number of threads that was set when a process built its first decoder, and its threads do
    not survive a fork.
    """

    strict = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        advice = 'pip install "e2e-mil[dali]", or set data.decoder=auto, which needs no DALI'
        try:
            self._ndd, self._process = _import_dali()
        except (ImportError, OSError) as error:
            raise UserError(
                f"decoder 'dali' needs DALI, which is not installed ({error})\n  {advice}"
            ) from error
        if device.type == "cuda":
            self.tolerance = NvJpeg.tolerance  # the same engine; on the CPU it is libjpeg-turbo
        self._check_that_it_works("dali", "set data.decoder=auto, which needs no DALI")

    def decode_batch(self, jpegs: Jpegs, device: torch.device) -> Tensor:
        """See :class:`BatchDecoder`."""
        if os.getpid() != self._process:
            raise UserError(
                "decoder 'dali' was built before this process was forked and would hang\n"
                "  start processes by spawn, or set data.decoder=auto"
            )
        encoded = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        if device.type == "cpu":
            return self._decode_by_dali(encoded, "cpu")
        with torch.cuda.device(device):
            pixels = self._decode_by_dali(encoded, "gpu").clone()
            # DALI reuses its memory after this, and does not know of the copy in torch's queue.
            torch.cuda.current_stream(device).synchronize()
            return pixels

    def _decode_by_dali(self, encoded: list[NDArray[np.uint8]], device: str) -> Tensor:
        ndd = self._ndd
        with ndd.EvalMode.sync_full:
            images = ndd.decoders.image(
                ndd.as_batch(encoded),
                device=device,
                adjust_orientation=False,  # as the other decoders: patches have no orientation
                hw_decoder_load=1.0,  # with a share, the position in the list would choose the engine
            )
            return images.torch()


@cache
def _import_dali() -> tuple[Any, int]:
    """DALI's dynamic mode, and the process that set its threads."""
    import nvidia.dali.experimental.dynamic as ndd

    # Once: with fewer threads after its first image it hangs (2.4.0).
    ndd.set_num_threads(num_threads())
    return ndd, os.getpid()


def build_decoder(name: str = "auto", device: torch.device | str = "cpu") -> Decoder:
    """Build a decoder.

    Parameters
    ----------
    name : str
        A registered name, or ``auto`` for the fastest that works: on CUDA ``nvjpeg``, otherwise
        ``simplejpeg``, which needs no system library.
    device : torch.device or str
        Where pixels will be requested.

    Returns
    -------
    Decoder
        Its ``name`` tells which decoder it is, its ``note`` why ``auto`` did not take ``nvjpeg`` on CUDA.

    Raises
    ------
    UserError
        If the decoder is unknown or cannot work on the device.
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


def _check_jpeg_size(index: int, jpeg: Buffer, size: Size) -> bool:
    """Whether the JPEG is plain, see :mod:`jpeg_header`; UndecodableError unless it has this size."""
    try:
        header = read_frame_header(jpeg)
    except ValueError as error:
        raise _unreadable(index, error) from error
    if (header.height, header.width) != size:
        raise UndecodableError(
            index, f"is {header.width}x{header.height} px, not {size[1]}x{size[0]} px"
        )
    return header.is_plain


def _requested_size(jpegs: Jpegs, out: Tensor | None) -> Size:
    """(H, W) of ``out``, if there is one, else of the first image."""
    if len(jpegs) == 0:
        raise ValueError("no JPEG to decode")
    if out is None:
        try:
            return read_frame_header(jpegs[0])[:2]
        except ValueError as error:
            raise _unreadable(0, error) from error
    usable = out.dtype == torch.uint8 and out.device.type == "cpu" and out.is_contiguous()
    if not usable or out.ndim != 4 or (out.shape[0], out.shape[3]) != (len(jpegs), 3):
        raise ValueError(
            f"out must be ({len(jpegs)},H,W,3) uint8, contiguous, on the CPU, "
            f"not {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    return out.shape[1], out.shape[2]


def _unreadable(index: int, error: Exception) -> UndecodableError:
    return UndecodableError(index, f"is not a readable JPEG ({error})")


def _missing_library(name: str, error: Exception) -> UserError:
    return UserError(
        f"decoder '{name}' needs libturbojpeg, which is not installed ({str(error).splitlines()[0]})\n"
        "  install it (Debian: libturbojpeg0), or set data.decoder=auto, which needs no system library"
    )
