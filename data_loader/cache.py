"""The decoded images on disk: .npy files in one folder for each digest and image shape, opened as memory
maps.

A folder is made under a temporary name, checked and renamed, so one that has its name is whole. Writing
needs the lock of the data directory (dataset.py); reading needs none. Folders may be deleted at any time:
they are made again.
"""

import shutil
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from data_loader.splits import SPLITS, rows_of

VERSION = 1  # raise it when the same files would give other pixels or another layout
PARTIAL = ".partial"


class ImageWriter:
    """Appends uint8 images to an .npy file; the count goes into its header at the end."""

    def __init__(self, path: Path, shape_HWC: tuple[int, int, int]) -> None:
        self.shape_HWC, self.count = shape_HWC, 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def add(self, images_NHWC: np.ndarray) -> None:
        """images_NHWC: uint8 [n, H, W, C]"""
        assert images_NHWC.dtype == np.uint8 and images_NHWC.shape[1:] == self.shape_HWC, images_NHWC.shape
        self._file.write(np.ascontiguousarray(images_NHWC).data)
        self.count += len(images_NHWC)

    def _write_header(self) -> None:
        # numpy pads the header for growth of the first axis, so a second one fits exactly over the first.
        description = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape_HWC)}
        np.lib.format.write_array_header_1_0(self._file, description)

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._file.seek(0)
            self._write_header()
        self._file.close()


def folder_name(digest: str, shape_HWC: tuple[int, int, int]) -> str:
    height, width, channels = shape_HWC
    return f"v{VERSION}-{digest[:32]}-{height}x{width}x{channels}"


def start(cache_dir: Path) -> Path:
    """An empty temporary folder; what a killed process left behind goes first."""
    partial = cache_dir / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish(
    cache_dir: Path,
    digest: str,
    shape_HWC: tuple[int, int, int],
    labels_N: np.ndarray,
    splits_N: np.ndarray,
) -> None:
    """Complete the temporary folder, which holds images.npy, check it and give it its name."""
    partial, final = cache_dir / PARTIAL, cache_dir / folder_name(digest, shape_HWC)
    np.save(partial / "labels.npy", labels_N.astype(np.int64))
    for name, rows in rows_of(splits_N).items():
        np.save(partial / f"{name}.npy", rows)
    images_NHWC, _, rows_by_split = _open_folder(partial)
    assert images_NHWC.shape == (len(labels_N), *shape_HWC), (images_NHWC.shape, len(labels_N), shape_HWC)
    assert sum(map(len, rows_by_split.values())) == len(labels_N)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def open_arrays(
    cache_dir: Path, digest: str, shape_HWC: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]] | None:
    """(images_NHWC memory-mapped read-only, labels_N, rows by split), or None if they are not there whole."""
    try:
        return _open_folder(cache_dir / folder_name(digest, shape_HWC))
    except (OSError, ValueError, EOFError):  # absent, or cut short by a full disk or a careless hand
        return None


def _open_folder(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    images_NHWC = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    labels_N = np.load(folder / "labels.npy", allow_pickle=False)
    rows = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in SPLITS}
    if len(images_NHWC) != len(labels_N):
        raise ValueError(f"{len(images_NHWC)} images, {len(labels_N)} labels")
    return images_NHWC, labels_N, rows
