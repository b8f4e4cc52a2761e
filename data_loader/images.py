"""Encoded images -> uint8 pixels. Pillow and numpy only, so that prediction can use it without torch."""

import io
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from data_loader import DataError, png

# Formats beyond these are refused: a decoder that nobody asked for is only a way in. Pillow's Image.open would come to
# the same classes, after twice the time for a small image.
DECODERS: tuple[tuple[bytes, int, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", 0, JpegImagePlugin.JpegImageFile),
    (b"BM", 0, BmpImagePlugin.BmpImageFile),
    (b"WEBP", 8, WebPImagePlugin.WebPImageFile),
)
"""What a file of each format holds, from which byte on, and the class that reads it."""
MAX_PIXELS = 89_478_485  # 2**28 // 3, Pillow's own limit: 256 MiB of RGB
# Damaged EXIF is dealt with below, file by file; Pillow's warning would not say which file it means.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
ORIENTATION = 0x0112  # the EXIF tag (CIPA DC-008, 4.6.4)


def decode_image(data: bytes, height: int, width: int, channels: int) -> np.ndarray:
    """Decode one PNG, JPEG, BMP or WebP image to uint8 [height, width, channels]; channels is 1 or 3.

    EXIF orientation is applied, transparency is laid over white, 16-bit values are divided by 257 (65535 ->
    255), and an image of another size is resized, without keeping its aspect, by Pillow's antialiased
    bilinear filter. Of an animation the first frame counts. Raises DataError, whose message is the reason
    alone, without a file name.
    """
    if not data:
        raise DataError("empty file")
    if (lines := png.filtered_lines(data, height, width, channels)) is not None:
        return png.unfiltered([lines], height, width, channels).reshape(height, width, channels)
    with _open(io.BytesIO(data)) as image:
        try:
            # A JPEG much larger than needed is decoded at a half, a quarter or an eighth: much faster.
            image.draft(None, (2 * max(height, width),) * 2)
            image.load()
            upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
            flat = _flatten(upright)
            mode = "L" if channels == 1 else "RGB"
            if flat.mode != mode:
                flat = flat.convert(mode)
            pixels = np.frombuffer(flat.tobytes(), np.uint8)
        except MemoryError:  # says nothing about the image
            raise
        except Exception as error:  # decoders raise anything on damaged bytes, from OSError to IndexError
            raise DataError(f"corrupt or truncated image: {error}") from None
    return resize(pixels.reshape(flat.height, flat.width, channels), height, width)


def decode_own_size(data: bytes) -> np.ndarray:
    """The same as decode_image, at the size and with the channels (1 or 3) that the image has."""
    if not data:
        raise DataError("empty file")
    height, width, is_grey = _header(io.BytesIO(data))
    return decode_image(data, height, width, 1 if is_grey else 3)


def encode_png(image_HWC: np.ndarray) -> bytes:
    """uint8 [H, W, C], C 1 or 3, as a PNG that decode_image reads back value by value."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def resize(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [height, width, C]; the same array where the size is right already."""
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    grey = image_HWC.shape[2] == 1
    image = Image.fromarray(image_HWC[:, :, 0] if grey else image_HWC)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized.reshape(height, width, image_HWC.shape[2])


def header(path: Path) -> tuple[int, int, bool]:
    """(height, width, is grey) of an image file as it will be decoded, from its first bytes. Raises
    DataError.
    """
    if path.stat().st_size == 0:
        raise DataError("empty file")
    with path.open("rb") as file:
        return _header(file)


def _header(file: IO[bytes]) -> tuple[int, int, bool]:
    with _open(file) as image:
        width, height = image.size
        if _orientation(image) in (5, 6, 7, 8):  # those with a quarter turn
            width, height = height, width
        return height, width, _is_grey(image)


def _open(file: IO[bytes]) -> ImageFile.ImageFile:
    start = file.read(16)
    file.seek(0)
    decoder = next((kind for mark, at, kind in DECODERS if start.startswith(mark, at)), None)
    if decoder is None:
        raise DataError("not a PNG, JPEG, BMP or WebP image")
    try:
        image = decoder(file)
    except Exception as error:  # as above
        raise DataError(f"corrupt image: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(f"more than {MAX_PIXELS} pixels (a decompression bomb?)")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.asarray(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def _flatten(image: Image.Image) -> Image.Image:
    """The image in eight bits a channel and without transparency."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        white.alpha_composite(layer)
        return white.convert("RGB")
    return image
