"""Small plain PNG files, which are decoded together, against the specification and against Pillow alone."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_images import png_chunk

from data_loader import DataError, png
from data_loader.images import decode_image

Shape = tuple[int, int, int]
Chunk = tuple[bytes, bytes]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from((1, 3)))
ASIDES = [
    (b"gAMA", struct.pack(">I", 45455)),
    (b"cHRM", bytes(range(32))),
    (b"sRGB", b"\0"),
    (b"pHYs", bytes(8) + b"\1"),
    (b"tIME", b"\x07\xea\x0b\x1b\x09\0\0"),
]
OTHERS = [
    (b"gAMA", b"\0\0"),
    (b"tRNS", bytes(2)),
    (b"tRNS", bytes(6)),
    (b"tEXt", b"Software\0by hand"),
    (b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\3\0\0\0\0\0\0"),  # upside down
    (b"PLTE", bytes(range(30))),
    (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)),
    (b"acTL", struct.pack(">II", 1, 0)),
]


def file(chunks: list[Chunk]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def header(height: int, width: int, channels: int) -> Chunk:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)


def filtered(line: bytes, above: bytes, bytes_per_pixel: int, number: int) -> bytes:
    """A line through a filter of the specification (PNG 3, 9.2), behind the filter's number."""
    made = bytearray([number])
    for at, value in enumerate(line):
        left, corner = (each[at - bytes_per_pixel] if at >= bytes_per_pixel else 0 for each in (line, above))
        guess = left + above[at] - corner
        nearest = min((left, above[at], corner), key=lambda candidate: abs(guess - candidate))
        made.append((value - (0, left, above[at], (left + above[at]) // 2, nearest)[number]) % 256)
    return bytes(made)


@st.composite
def images_and_lines(draw: st.DrawFn, shape: Shape) -> tuple[np.ndarray, bytes]:
    """An image, and its lines through filters drawn for each."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image_HWC = random.integers(0, 256, shape, dtype=np.uint8)
    lines = [bytes(shape[1] * shape[2]), *(line_WC.tobytes() for line_WC in image_HWC)]
    numbers = draw(st.lists(st.integers(0, 4), min_size=shape[0], max_size=shape[0]))
    together = zip(lines[1:], lines[:-1], numbers, strict=True)
    return image_HWC, b"".join(filtered(line, above, shape[2], number) for line, above, number in together)


@st.composite
def image_data(draw: st.DrawFn, lines: bytes) -> list[Chunk]:
    """The lines compressed, in one or several chunks, of which some may be empty."""
    packed = zlib.compress(lines, draw(st.integers(0, 9)))
    cuts = sorted(draw(st.lists(st.integers(0, len(packed)), max_size=3)))
    return [(b"IDAT", packed[start:end]) for start, end in zip([0, *cuts], [*cuts, len(packed)], strict=True)]


@given(draws=st.data(), shape=SHAPES, count=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_plain_images_come_back_one_by_one_and_together(draws: st.DataObject, shape: Shape, count: int) -> None:
    expected, found = [], []
    for _ in range(count):
        image_HWC, lines = draws.draw(images_and_lines(shape))
        asides = draws.draw(st.lists(st.sampled_from(ASIDES), max_size=3))
        data = file([header(*shape), *asides, *draws.draw(image_data(lines)), (b"IEND", b"")])
        assert png.filtered_lines(data, *shape) == lines
        np.testing.assert_array_equal(decode_image(data, *shape), image_HWC)
        expected.append(image_HWC)
        found.append(lines)
    np.testing.assert_array_equal(png.unfiltered(found, *shape), expected)


@given(draws=st.data(), shape=SHAPES)
@settings(max_examples=500, deadline=None)
def test_any_other_file_is_what_pillow_makes_of_it(draws: st.DataObject, shape: Shape) -> None:
    """Other chunks, lines that are not right, damaged bytes: the same pixels, or the same words on what is wrong."""
    _, lines = draws.draw(images_and_lines(shape))
    line = 1 + shape[1] * shape[2]
    wrong = st.sampled_from((lines[:-line], lines[:-1], lines + bytes(line), b"\5" + lines[1:]))
    chunks = draws.draw(image_data(draws.draw(st.just(lines) | wrong)))
    for chunk in draws.draw(st.lists(st.sampled_from(OTHERS + ASIDES), max_size=1)):
        chunks.insert(draws.draw(st.integers(0, len(chunks))), chunk)
    asides = draws.draw(st.lists(st.sampled_from(ASIDES), max_size=2))
    data = file([header(*shape), *asides, *chunks, (b"IEND", b"")])
    place, value = draws.draw(st.integers(0, len(data) - 1)), draws.draw(st.binary(min_size=1, max_size=4))
    damaged = data[:place] + value + data[place + len(value) :]
    for each in (data, damaged, data[:place], data + value, data[:place] + data[place + 1 :]):
        ours = outcome(each, shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(png, "LARGEST_BYTES", 0)  # Pillow gets every file
            assert ours == outcome(each, shape)


def outcome(data: bytes, shape: Shape) -> object:
    """The pixels, or what is wrong."""
    try:
        return decode_image(data, *shape).tolist()
    except DataError as error:
        return str(error)
