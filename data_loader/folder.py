"""A folder of class folders, with or without train, val and test above them -> the cache and the manifest's
entries.
"""

import hashlib
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_loader import DataError
from data_loader.cache import ImageWriter
from data_loader.listing import Found, list_folder
from data_loader.manifest import Contents, stamp
from data_loader.splits import SPLITS, split_of

MIXED_SIZE = 64  # pixels a side, for image_size=0 when the images differ
THREADS = max(2, os.cpu_count() or 1)
BATCH, BATCH_BYTES = 16, 2**20  # files a task: with fewer the hand-over costs more than a small image; and pixels

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class FolderSource:
    """root: the folder. address and refused are for a mirror of a bucket: its address and what could not be
    mirrored.
    """

    root: Path
    address: str = ""
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.source.rstrip("/").rsplit("/", 1)[-1]

    @property
    def source(self) -> str:
        return self.address or str(self.root)

    def fetch(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder")

    def stamp(self) -> str | None:
        rows = [(f.path, f.bytes, f.mtime_ns, f.problem) for f in list_folder(self.root)]
        return stamp([*rows, *self.refused])

    def read(self, images_path: Path, image_size: int) -> Contents:
        """Two passes: the headers, for the shape that all images will have; then hash and decode, each file
        once.
        """
        found = list_folder(self.root)
        if not any(f.problem is None for f in found):
            raise DataError(
                f"{self.source} holds no images in class folders; expected"
                " FOLDER/CLASS/IMAGE or FOLDER/train/CLASS/IMAGE"
            )
        heads = list(_in_threads(self._head, found, "reading headers", BATCH))
        natural = self._natural_shape(heads, image_size)
        shape = (image_size, image_size, natural[2]) if image_size else natural

        def read_one(task: tuple[Found, Head]) -> tuple[str | None, np.ndarray | str]:
            return self._read_file(task[0], task[1], shape)

        official = {f.split for f in found if f.split}
        files: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = [
            {"path": key, "bytes": None, "sha256": None, "class": None, "reason": reason}
            for key, reason in self.refused
        ]
        with ImageWriter(images_path, shape) as writer:
            batch = max(1, min(BATCH, BATCH_BYTES // math.prod(shape)))
            results = _in_threads(read_one, list(zip(found, heads, strict=True)), "decoding images", batch)
            for f, (sha256, result) in zip(found, results, strict=True):
                entry: dict[str, Any] = {
                    "path": f.path,
                    "bytes": f.bytes,
                    "sha256": sha256,
                    "class": f.class_name,
                }
                if isinstance(result, str):
                    bad.append({**entry, "reason": result})
                else:
                    assert sha256 is not None
                    writer.add(result[None])
                    files.append({**entry, "split": split_of(bytes.fromhex(sha256), f.split, official)})
        classes = sorted({f["class"] for f in files})
        label_of = {name: label for label, name in enumerate(classes)}
        return Contents(
            classes=tuple(classes),
            labels_N=np.array([label_of[f["class"]] for f in files], dtype=np.int64),
            splits_N=np.array([SPLITS.index(f["split"]) for f in files], dtype=np.uint8),
            files=files,
            bad=bad,
            natural_shape=natural,
        )

    def _head(self, f: Found) -> "Head":
        """(height, width, is grey), or the reason why the file cannot be used."""
        from data_loader.images import header

        if f.problem:
            return f.problem
        try:
            return header(self.root / f.path)
        except DataError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    def _natural_shape(self, heads: "list[Head]", image_size: int) -> tuple[int, int, int]:
        good = [head for head in heads if not isinstance(head, str)]
        sizes = {(height, width) for height, width, _ in good}
        channels = 1 if all(grey for _, _, grey in good) else 3
        if len(sizes) == 1:
            return (*sizes.pop(), channels)
        if sizes and not image_size:
            print(
                f"{self.name}: images have {len(sizes)} sizes, from {min(sizes)} to {max(sizes)} (H, W),"
                f" are resized to {MIXED_SIZE}x{MIXED_SIZE}; image_size=N chooses another size",
                file=sys.stderr,
            )
        return MIXED_SIZE, MIXED_SIZE, channels

    def _read_file(self, f: Found, head: "Head", shape: tuple[int, int, int]) -> tuple[str | None, np.ndarray | str]:
        """(SHA-256 in hex, or None if unreadable; pixels, or the reason why there are none)"""
        from data_loader.images import decode_image

        path = self.root / f.path
        try:
            if isinstance(head, str):
                return (_hash(path) if path.is_file() else None), head
            data = path.read_bytes()
        except OSError as error:
            return None, f"cannot be read: {error.strerror or error}"
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            return sha256, decode_image(data, *shape)
        except DataError as error:
            return sha256, str(error)


Head = tuple[int, int, bool] | str


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_threads(work: Callable[[T], R], items: list[T], title: str, batch_size: int) -> Iterator[R]:
    """work(item) for every item, in order, with few results waiting: memory does not grow with their
    number.
    """
    from tqdm import tqdm

    def work_on(batch: list[T]) -> list[R]:
        return [work(item) for item in batch]

    batches = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
    waiting: deque[Future[list[R]]] = deque()
    # disable=None: no bar unless stderr is a terminal; delay: nor for work of a second.
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(items), desc=title, disable=None, delay=1) as bar,
    ):
        for batch in batches:
            waiting.append(pool.submit(work_on, batch))
            if len(waiting) > 2 * THREADS:
                results = waiting.popleft().result()
                bar.update(len(results))
                yield from results
        for future in waiting:
            results = future.result()
            bar.update(len(results))
            yield from results
