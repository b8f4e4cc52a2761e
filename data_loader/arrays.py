"""Data sets that come as arrays (digits, MNIST, CIFAR-10, .npz): chunks of pixels -> the cache."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_loader.cache import ImageWriter
from data_loader.manifest import Contents
from data_loader.splits import SPLITS, split_of

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Part:
    """Some images of one array set. split: the publisher's, or None. chunks(): uint8 [n, H, W, C] one after
    another.
    """

    split: str | None
    labels_N: np.ndarray
    shape_HWC: tuple[int, int, int]
    chunks: Callable[[], Iterator[np.ndarray]]


def in_memory(split: str | None, images_NHWC: np.ndarray, labels_N: np.ndarray) -> Part:
    """A part whose pixels are at hand (an array or a memory map)."""
    height, width, channels = images_NHWC.shape[1:]
    step = rows_per_chunk((height, width, channels))

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(images_NHWC), step):
            yield np.ascontiguousarray(images_NHWC[start : start + step])

    return Part(split, labels_N, (height, width, channels), chunks)


def rows_per_chunk(shape_HWC: tuple[int, int, int]) -> int:
    return max(1, CHUNK_BYTES // int(np.prod(shape_HWC)))


def read_parts(
    parts: list[Part], classes: tuple[str, ...], files: Iterable[Path], images_path: Path, image_size: int
) -> Contents:
    """Write all images to images_path, in order, resized if image_size is not 0; split by each image's
    pixel bytes.
    """
    natural = parts[0].shape_HWC
    shape = (image_size, image_size, natural[2]) if image_size else natural
    official = {part.split for part in parts if part.split}
    splits: list[int] = []
    with ImageWriter(images_path, shape) as writer:
        for part in parts:
            for chunk_NHWC in part.chunks():
                for image_HWC in chunk_NHWC:
                    sha256 = hashlib.sha256(image_HWC.data).digest()
                    splits.append(SPLITS.index(split_of(sha256, part.split, official)))
                writer.add(_resized(chunk_NHWC, shape))
    labels_N = np.concatenate([part.labels_N for part in parts]).astype(np.int64)
    used = np.unique(labels_N)
    empty = [name for label, name in enumerate(classes) if label not in used]
    entries = [file_entry(path) for path in files]
    return Contents(
        classes=tuple(classes[label] for label in used),
        labels_N=np.searchsorted(used, labels_N),
        splits_N=np.array(splits, dtype=np.uint8),
        files=entries,
        bad=[{**entries[0], "class": name, "reason": f"class {name!r} has no images"} for name in empty],
        natural_shape=natural,
    )


def file_entry(path: Path) -> dict[str, object]:
    """The manifest's entry for a file that holds many images."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256, "class": None, "split": None}


def _resized(images_NHWC: np.ndarray, shape_HWC: tuple[int, int, int]) -> np.ndarray:
    if images_NHWC.shape[1:] == shape_HWC:
        return images_NHWC
    from data_loader.images import resize  # Pillow is not needed otherwise

    return np.stack([resize(image, shape_HWC[0], shape_HWC[1]) for image in images_NHWC])
