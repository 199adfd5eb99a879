"""The frame header of a JPEG: its size, and whether every library decodes it alike."""

from __future__ import annotations

import struct
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview
"""The bytes of one JPEG. ``array.data`` of an array works too: most libraries read it without a copy."""

_SEGMENT = struct.Struct(">BBH").unpack_from
_FRAME = struct.Struct(">BHHB").unpack_from
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those three are tables


class FrameHeader(NamedTuple):
    """What the frame header of a JPEG tells."""

    height: int
    width: int
    is_plain: bool
    """Whether the image is complete, 8-bit, Huffman coded and grey or YCbCr, which every library decodes
    alike."""


def read_frame_header(jpeg: Buffer) -> FrameHeader:
    """Read the frame header (ITU-T T.81, B.2.2) without decoding the image.

    Parameters
    ----------
    jpeg : bytes, bytearray or memoryview
        One JPEG.

    Returns
    -------
    FrameHeader

    Raises
    ------
    ValueError
        If there is no valid header.
    """
    data = memoryview(jpeg)
    if data[:2] != b"\xff\xd8":
        raise ValueError("it does not start like a JPEG")
    at, has_adobe_segment = 2, False
    try:
        while True:
            start, marker, length = _SEGMENT(data, at)
            if start != 0xFF:
                raise ValueError("its header is damaged")
            if marker in _FRAME_MARKERS:
                break
            has_adobe_segment |= marker == 0xEE  # may declare the channels to be RGB
            at += 1 if marker == 0xFF else 2 + length
        bits, height, width, channels = _FRAME(data, at + 4)
        is_rgb = channels == 3 and (has_adobe_segment or data[at + 10] == ord("R"))
    except (struct.error, IndexError) as error:
        raise ValueError("it ends within its header") from error
    # No encoder needs less than about one bit for 256 pixels; a damaged size must not claim all memory.
    if not 0 < height * width <= 1000 * len(data):
        raise ValueError(f"{len(data)} bytes cannot hold {width}x{height} px")
    is_huffman, is_complete = marker <= 0xC2, data[-2:] == b"\xff\xd9"
    is_grey_or_ycbcr = channels in (1, 3) and not is_rgb
    return FrameHeader(height, width, is_grey_or_ycbcr and bits == 8 and is_huffman and is_complete)
