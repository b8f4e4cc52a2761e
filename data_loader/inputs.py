"""Images to predict on, as a stream: whatever the size of the input, a few batches of it are in memory.

A folder is walked and decoded as it is read; only the names in one sub-folder at a time (or those that a glob
matches) are held, so that they come in order.
"""

import glob
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_loader import DataError, Unreachable, png
from data_loader.batches import read_ahead
from data_loader.images import decode_image, resize
from data_loader.listing import HIDDEN, IMAGE_SUFFIXES, is_folder

READ_AHEAD_BATCHES = 2
"""Batches being read and decoded while one is predicted: more would only use memory."""

FILES_PER_TASK = 16
"""Files that one thread decodes at a time: starting a task costs about as much as one small file."""

QUICK_FILE_S = 0.0005
"""Reading and decoding a file in less time than this is mostly work of the interpreter, which threads cannot share: two
took a fifth longer than one. A large file, or one from S3, is mostly waiting or work that they can share."""

Shape = tuple[int, int, int]
Reader = Callable[[], bytes]


@dataclass(frozen=True)
class Batch:
    """Images with their names, and what could not be read with the reason."""

    names: list[str]
    images_NHWC: np.ndarray
    """uint8, in the order of `names`."""
    bad: list[tuple[str, str]]


def read_batches(address: str, image_shape: Shape, batch_size: int, threads: int = 0) -> Iterator[Batch]:
    """Stream the images at `address`, fitted to `image_shape` (height, width, channels).

    address: a folder (with all sub-folders), an image file, a glob, an .npz with the array `images`, or an
    s3://bucket/prefix of images, s3://bucket/key of an image or an .npz. Names are relative to a folder or
    prefix; an image in an .npz is named by its row number. threads=0 uses every core. Raises
    DataError if the input as a whole cannot be read or holds no image.
    """
    threads = threads or os.cpu_count() or 1
    with _npz_of(address) as npz:
        batches = (
            _npz_batches(npz, address, image_shape, batch_size)
            if npz
            else _decoded(_files(address), image_shape, batch_size, threads)
        )
        empty = True
        for batch in batches:
            empty = False
            yield batch
    if empty:
        raise DataError(f"input {address!r} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}")


def _decoded(files: Iterable[tuple[str, Reader]], image_shape: Shape, batch_size: int, threads: int) -> Iterator[Batch]:
    """Read and decode beside the consumer, at most READ_AHEAD_BATCHES ahead of it: slow files in `threads` threads."""

    def decode(batch: list[tuple[str, Reader]]) -> Batch:
        first, rest = batch[:FILES_PER_TASK], batch[FILES_PER_TASK:]
        started = time.perf_counter()
        done = _decode(first, image_shape)
        if time.perf_counter() - started < QUICK_FILE_S * len(first):
            return _join([done, _decode(rest, image_shape)])
        tasks = [rest[start : start + FILES_PER_TASK] for start in range(0, len(rest), FILES_PER_TASK)]
        return _join([done, *pool.map(_decode, tasks, repeat(image_shape))])

    remaining = iter(files)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        batches = iter(lambda: list(islice(remaining, batch_size)), [])
        yield from read_ahead(map(decode, batches), READ_AHEAD_BATCHES)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(files: list[tuple[str, Reader]], image_shape: Shape) -> Batch:
    names: list[str] = []
    bad: list[tuple[str, str]] = []
    images_NHWC = np.empty((len(files), *image_shape), np.uint8)
    plain: dict[int, bytes] = {}
    """Rows of images that are small plain PNG files -> their lines, which are made pixels together."""
    for name, read in files:
        row = len(names)
        try:
            data = read()
            if (lines := png.filtered_lines(data, *image_shape)) is not None:
                plain[row] = lines
            else:
                images_NHWC[row] = decode_image(data, *image_shape)
            names.append(name)
        except Unreachable:
            raise
        except DataError as error:
            bad.append((name, str(error)))
        except OSError as error:
            bad.append((name, f"cannot be read: {error.strerror or error}"))
    if plain:
        images_NHWC[list(plain)] = png.unfiltered(list(plain.values()), *image_shape)
    return Batch(names, images_NHWC[: len(names)], bad)


def _join(parts: list[Batch]) -> Batch:
    return Batch(
        [name for part in parts for name in part.names],
        np.concatenate([part.images_NHWC for part in parts]),
        [each for part in parts for each in part.bad],
    )


def _files(address: str) -> Iterator[tuple[str, Reader]]:
    """(name, function that reads the bytes) of every image file at an address."""
    if address.startswith("s3://"):
        return _s3_files(address)
    path = Path(address)
    if path.is_dir():
        return _folder_files(path, "", frozenset())
    if path.exists():
        return iter([(printable(path.name), partial(read_file, address))])
    if glob.has_magic(address):
        matches = sorted(glob.iglob(address, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
        return ((printable(match), partial(read_file, match)) for match in matches if not Path(match).is_dir())
    raise DataError(
        f"input {address!r} does not exist; give a folder, an image file, a glob, an .npz or s3://bucket/prefix"
    )


def _folder_files(folder: Path, above: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[tuple[str, Reader]]:
    """Image files at and below a folder in order of name; a link back to a folder above is not followed."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"folder {printable(str(folder))!r} cannot be listed: {error.strerror}") from None
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        if is_folder(entry):
            yield from _folder_files(Path(entry.path), f"{above}{entry.name}/", ancestors | {identity})
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            yield printable(above + entry.name), partial(read_file, entry.path)


def read_file(path: str) -> bytes:
    """The bytes of a file, for a small one in half the time that a file object takes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(descriptor, 2**20):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _is_image(path: str) -> bool:
    """Whether a file is an image by its name, and not hidden by it or by a folder it lies in."""
    return path.lower().endswith(IMAGE_SUFFIXES) and not any(map(_is_hidden, path.split("/")))


def _s3_files(address: str) -> Iterator[tuple[str, Reader]]:
    from botocore.exceptions import BotoCoreError, ClientError

    from data_loader import s3

    bucket, prefix = s3.split_uri(address)
    client = s3.make_client()

    def reader(key: str) -> Reader:
        def read() -> bytes:
            try:
                return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
            except ClientError as error:
                raise DataError(f"cannot be read: {error.response['Error'].get('Code', error)}") from None
            except BotoCoreError as error:  # a connection that fails is no fault of the image
                raise Unreachable(f"cannot read s3://{bucket}/{key}: {error}; try again later") from None

        return read

    with s3.one_line_errors(address):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for found in page.get("Contents", ()):
                key = found["Key"]
                name = key[len(prefix) :].lstrip("/")
                if key == prefix:
                    yield key.rpartition("/")[2], reader(key)
                elif (not prefix or key.startswith(f"{prefix}/")) and _is_image(name):
                    yield name, reader(key)


@contextmanager
def _npz_of(address: str) -> Iterator[Path | None]:
    """The .npz file that an address names, fetched where it is remote; None for any other input."""
    if not address.lower().endswith(".npz"):
        yield None
        return
    if not address.startswith("s3://"):
        if not Path(address).is_file():
            raise DataError(f"input {address!r} does not exist")
        yield Path(address)
        return
    from data_loader import s3

    bucket, key = s3.split_uri(address)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "images.npz"
        with s3.one_line_errors(address):
            s3.make_client().download_file(bucket, key, str(local))
        yield local


def _npz_batches(path: Path, address: str, image_shape: Shape, batch_size: int) -> Iterator[Batch]:
    """The rows of the array `images`, or of the only array of images, unpacked batch by batch."""
    from data_loader.npz import BROKEN, read_npy_header

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            chosen = "images.npy" if "images.npy" in names else names[0] if len(names) == 1 else ""
            if not chosen:
                found = ", ".join(name.removesuffix(".npy") for name in names)
                raise DataError(f"input {address!r} holds the arrays {found}; expected one named images")
            with archive.open(chosen) as file:
                shape, dtype, in_order = read_npy_header(file)
                channels = shape[3] if len(shape) == 4 else 1
                if dtype != np.uint8 or len(shape) not in (3, 4) or channels not in (1, 3) or not in_order:
                    raise DataError(
                        f"input {address!r} holds {dtype} {list(shape)}; expected uint8 [N,H,W] or"
                        " [N,H,W,C], C 1 or 3, in C order"
                    )
                stored = (shape[1], shape[2], channels)
                for start in range(0, shape[0], batch_size):
                    count = min(batch_size, shape[0] - start)
                    images_NHWC = _rows(file, count, stored)
                    yield Batch(
                        [str(row) for row in range(start, start + count)],
                        _fitted(images_NHWC, image_shape),
                        [],
                    )
    except BROKEN as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"input {address!r} cannot be read as an .npz file: {error}") from None


def _rows(file: Any, count: int, stored: Shape) -> np.ndarray:
    size = count * int(np.prod(stored))
    data = file.read(size)
    if len(data) != size:
        raise EOFError("it is cut short")
    return np.frombuffer(data, np.uint8).reshape(count, *stored)


def _fitted(images_NHWC: np.ndarray, image_shape: Shape) -> np.ndarray:
    """Images of another size or channel count as `decode_image` would give them."""
    height, width, channels = image_shape
    if images_NHWC.shape[1:] == image_shape:
        return images_NHWC
    if channels == 1 and images_NHWC.shape[3] == 3:
        grey = [np.asarray(Image.fromarray(image_HWC).convert("L"))[:, :, None] for image_HWC in images_NHWC]
        images_NHWC = np.stack(grey)
    elif channels == 3 and images_NHWC.shape[3] == 1:
        images_NHWC = np.repeat(images_NHWC, 3, axis=3)
    return np.stack([resize(np.ascontiguousarray(image_HWC), height, width) for image_HWC in images_NHWC])


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 show as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
