"""Small plain PNG files, many at a time.

Nearly all of the time that Pillow takes for one of 28x28 pixels is Python's work on an object that could hold whatever
a PNG may say, and threads cannot share it. Here Python looks at a few bytes of each file, and Pillow undoes the filters
of all of them in one go (docs/decisions/0004-direct-dependencies.md has the numbers).
"""

import struct
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

LARGEST_BYTES = 2**16
"""Bytes of pixels. The time of a larger image is that of its pixels; and copies of a whole batch are made here."""

# The numbers and names are those of the PNG specification, https://www.w3.org/TR/png-3/.
END = b"\0\0\0\0IEND\xaeB`\x82"
ASIDES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
"""Chunks that change no pixel in Pillow, with their lengths."""
FILTERS = bytes(range(5))
CHUNK_START = struct.Struct(">I4s")


def filtered_lines(data: bytes, height: int, width: int, channels: int) -> bytes | None:
    """The lines of a PNG, each behind the number of its filter: height * (1 + width * channels) bytes.

    None for all but an intact file of this very shape, in 8 bits, not interlaced, that says nothing beyond its
    pixels. Another may be as good; Pillow is to read it, or to say what is wrong.
    """
    start, line = _start(height, width, channels), 1 + width * channels
    if height * line > LARGEST_BYTES or not (data.startswith(start) and data.endswith(END)):
        return None
    parts, at, end = [], len(start), len(data) - len(END)
    while at < end:
        length, name = CHUNK_START.unpack_from(data, at)
        after = at + 12 + length
        if name == b"IDAT":
            parts.append(data[at + 8 : after - 4])
        elif parts or ASIDES.get(name) != length or data[after - 4 : after] != _checksum(data[at + 4 : after - 4]):
            return None
        at = after
    unpacker = zlib.decompressobj()
    try:
        lines = unpacker.decompress(b"".join(parts), height * line + 1)
    except zlib.error:
        return None
    whole = at == end and unpacker.eof and len(lines) == height * line
    return lines if whole and not lines[::line].strip(FILTERS) else None


def unfiltered(lines_N: list[bytes], height: int, width: int, channels: int) -> np.ndarray:
    """What `filtered_lines` gave for N > 0 files -> uint8 [N, height, width, channels].

    A filter looks at the line above, and for the first that counts as black. So images with a black line above each
    are one tall image.
    """
    black, mode = bytes(1 + width * channels), "L" if channels == 1 else "RGB"
    tall = zlib.compress(b"".join([part for lines in lines_N for part in (black, lines)]), level=0)
    image = Image.frombytes(mode, (width, len(lines_N) * (1 + height)), tall, "zip", mode)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(-1, 1 + height, width, channels)[:, 1:]


@lru_cache
def _start(height: int, width: int, channels: int) -> bytes:
    """All bytes up to the end of the first chunk."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + _checksum(header)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")
