"""Data sets in one .npz file: `images` and `labels` (and `classes`), or Keras' `x_train, y_train, x_test,
y_test`.

Pixels are streamed out of the archive chunk by chunk, so the arrays may be larger than memory.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data_loader import DataError
from data_loader.arrays import Part, read_parts, rows_per_chunk
from data_loader.manifest import Contents, stamp_files

LAYOUT = "images [N,H,W] or [N,H,W,C] of uint8 with labels [N] (and classes), or x_train, y_train, x_test, y_test"

BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, tokenize.TokenError)
"""What reading a damaged archive may raise; the last one comes from NumPy's parser of an array's header."""


@dataclass(frozen=True)
class NpzSource:
    """path: the file. address: where it was mirrored from, if it was."""

    path: Path
    address: str = ""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def source(self) -> str:
        return self.address or str(self.path)

    def fetch(self) -> None:
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist")

    def stamp(self) -> str | None:
        return stamp_files([self.path])

    def read(self, images_path: Path, image_size: int) -> Contents:
        try:
            with zipfile.ZipFile(self.path) as archive:
                parts, classes = self._parts(archive)
                return read_parts(parts, classes, [self.path], images_path, image_size)
        except (*BROKEN, OSError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.source} cannot be read as an .npz file ({error}); expected: {LAYOUT}") from None

    def _parts(self, archive: zipfile.ZipFile) -> tuple[list[Part], tuple[str, ...]]:
        keys = {name.removesuffix(".npy") for name in archive.namelist()}
        if {"images", "labels"} <= keys:
            wanted: list[tuple[str | None, str, str]] = [(None, "images", "labels")]
        elif {"x_train", "y_train", "x_test", "y_test"} <= keys:
            wanted = [("train", "x_train", "y_train"), ("test", "x_test", "y_test")]
            if {"x_val", "y_val"} <= keys:
                wanted.insert(1, ("val", "x_val", "y_val"))
        else:
            raise DataError(f"{self.source} holds the arrays {sorted(keys)}; expected: {LAYOUT}")
        labels = {key: self._labels(archive, key) for _, _, key in wanted}
        every_N = np.concatenate(list(labels.values()))
        names: tuple[str, ...]
        if "classes" in keys:
            names = self._classes(archive)
            if every_N.dtype.kind not in "iu" or every_N.min() < 0 or every_N.max() >= len(names):
                raise DataError(f"{self.source}: with {len(names)} classes the labels must be 0 to {len(names) - 1}")
            codes = {key: values.astype(np.int64) for key, values in labels.items()}
        else:
            values = np.unique(every_N)
            names = tuple(str(value) for value in values)
            codes = {key: np.searchsorted(values, labels_N) for key, labels_N in labels.items()}
        parts = [self._part(archive, split, images, codes[key]) for split, images, key in wanted]
        if len({part.shape_HWC for part in parts}) > 1:
            raise DataError(f"{self.source}: images of several shapes {[part.shape_HWC for part in parts]}")
        return parts, names

    def _labels(self, archive: zipfile.ZipFile, key: str) -> np.ndarray:
        labels = self._small(archive, key)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1 or labels.dtype.kind not in "iuU" or len(labels) == 0:
            raise DataError(
                f"{self.source}: {key} is {labels.dtype} {list(labels.shape)}; expected whole"
                " numbers or text [N], N > 0"
            )
        return labels

    def _classes(self, archive: zipfile.ZipFile) -> tuple[str, ...]:
        classes = self._small(archive, "classes")
        if classes.ndim != 1 or classes.dtype.kind != "U" or len(set(classes.tolist())) != len(classes):
            raise DataError(
                f"{self.source}: classes is {classes.dtype} {list(classes.shape)}; expected different texts [K]"
            )
        return tuple(classes.tolist())

    def _small(self, archive: zipfile.ZipFile, key: str) -> np.ndarray:
        with archive.open(f"{key}.npy") as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            return array

    def _part(self, archive: zipfile.ZipFile, split: str | None, key: str, labels_N: np.ndarray) -> Part:
        with archive.open(f"{key}.npy") as file:
            shape, dtype, in_order = read_npy_header(file)
        channels = shape[3] if len(shape) == 4 else 1
        if dtype != np.uint8 or len(shape) not in (3, 4) or channels not in (1, 3) or 0 in shape:
            raise DataError(
                f"{self.source}: {key} is {dtype} {list(shape)}; expected uint8 [N,H,W] or [N,H,W,C], C 1 or 3, N > 0"
            )
        if not in_order:
            raise DataError(f"{self.source}: {key} is in Fortran order; save numpy.ascontiguousarray of it")
        if shape[0] != len(labels_N):
            raise DataError(f"{self.source}: {shape[0]} {key} but {len(labels_N)} labels; each image needs one")
        shape_HWC = (shape[1], shape[2], channels)

        def chunks() -> Iterator[np.ndarray]:
            step = rows_per_chunk(shape_HWC)
            with archive.open(f"{key}.npy") as file:
                read_npy_header(file)
                for start in range(0, shape[0], step):
                    count = min(step, shape[0] - start)
                    size = count * int(np.prod(shape_HWC))
                    data = file.read(size)
                    if len(data) != size:
                        raise DataError(f"{self.source}: {key} is cut short")
                    yield np.frombuffer(data, dtype=np.uint8).reshape(count, *shape_HWC)

        return Part(split, labels_N, shape_HWC, chunks)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """(shape, dtype, is C order) of an .npy stream, which then stands at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    return shape, dtype, not fortran_order
