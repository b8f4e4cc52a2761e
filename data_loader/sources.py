"""Where data sets come from: one class a kind of source, all with the same three methods.

fetch() makes the raw files be there, stamp() tells cheaply whether they changed (None: not there), and
read() turns them into the cache's images.npy and the Contents of the manifest.
"""

import hashlib
import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data_loader import DataError, download
from data_loader.arrays import Part, in_memory, read_parts
from data_loader.folder import FolderSource
from data_loader.manifest import Contents, stamp_files
from data_loader.npz import NpzSource

PUBLISHED_MD5 = {  # of MNIST's original files after unpacking
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
BUILT_IN = ("digits", "mnist", "fashion_mnist", "cifar10")


class Source(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    def fetch(self) -> None: ...
    def stamp(self) -> str | None: ...
    def read(self, images_path: Path, image_size: int) -> Contents: ...


def find(dataset: str, data_dir: Path) -> Source:
    """The source that a dataset= value means. Raises DataError if it means none."""
    if dataset == "digits":
        return Digits(data_dir)
    if dataset in IDX_SETS:
        return IDX_SETS[dataset](data_dir)
    if dataset == "cifar10":
        return Cifar10(data_dir)
    if dataset.startswith("s3://"):
        from data_loader.s3 import S3Source  # boto3 is needed nowhere else

        return S3Source(dataset, data_dir)
    path = Path(dataset).expanduser()
    if dataset and path.is_dir():
        if data_dir.resolve().is_relative_to(path.resolve()):
            raise DataError(f"data_dir={data_dir} lies in dataset={dataset!r} itself; give it another place")
        return FolderSource(path.resolve())
    if path.is_file() and path.suffix == ".npz":
        return NpzSource(path.resolve())
    state = "is a file, but no .npz" if path.is_file() else "does not exist"
    raise DataError(
        f"dataset={dataset!r} {state}; allowed: {', '.join(BUILT_IN)}, a folder of class folders, an .npz"
        " file or an s3://bucket/prefix of either"
    )


@dataclass(frozen=True)
class Digits:
    """The 1,797 8x8 digits that come with scikit-learn (UCI, Alpaydin and Kaynak 1998), values 0-16 spread
    to 0-255.
    """

    data_dir: Path
    name: str = "digits"
    source: str = "sklearn.datasets.load_digits"

    @property
    def path(self) -> Path:
        return self.data_dir / "digits" / "digits.npz"

    def fetch(self) -> None:
        from sklearn.datasets import load_digits  # a second's import, needed only the first time

        bunch = load_digits()
        images_NHW = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
        partial = self.path.with_suffix(".partial.npz")
        partial.parent.mkdir(parents=True, exist_ok=True)
        _write_npz(partial, images=images_NHW, labels=bunch.target.astype(np.int64))
        partial.replace(self.path)

    def stamp(self) -> str | None:
        return stamp_files([self.path])

    def read(self, images_path: Path, image_size: int) -> Contents:
        return NpzSource(self.path).read(images_path, image_size)


@dataclass(frozen=True)
class IdxSet:
    """MNIST or Fashion-MNIST: four IDX files in torchvision's layout, downloaded by torchvision's class.

    md5: sums of the unpacked files where they are known; the others are held against their own headers.
    """

    data_dir: Path
    name: str
    torchvision_class: str
    classes: tuple[str, ...]
    md5: tuple[tuple[str, str], ...] = ()

    FILES = (
        ("train", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("test", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    )

    @property
    def source(self) -> str:
        return f"torchvision.datasets.{self.torchvision_class}"

    @property
    def raw(self) -> Path:
        return self.data_dir / "torchvision" / self.torchvision_class / "raw"

    @property
    def paths(self) -> list[Path]:
        return [self.raw / name for _, *names in self.FILES for name in names]

    def fetch(self) -> None:
        if self.stamp() is not None and self._problem() is None:
            return
        download.with_torchvision(self.torchvision_class, self.raw.parent, self.name, self._problem())
        if problem := self._problem():
            raise DataError(f"{self.name} was downloaded, but {problem}; remove {self.raw} and try again")

    def stamp(self) -> str | None:
        return stamp_files(self.paths)

    def read(self, images_path: Path, image_size: int) -> Contents:
        parts = [self._part(split, images, labels) for split, images, labels in self.FILES]
        return read_parts(parts, self.classes, self.paths, images_path, image_size)

    def _part(self, split: str, images: str, labels: str) -> Part:
        images_NHW, labels_N = read_idx(self.raw / images), read_idx(self.raw / labels)
        return in_memory(split, images_NHW[..., None], labels_N)

    def _problem(self) -> str | None:
        """What is wrong with the raw files, in a few words, or None."""
        for path in self.paths:
            if not path.is_file():
                return f"{path.name} is missing"
            expected = dict(self.md5).get(path.name)
            if expected and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != expected:
                return f"{path.name} has another checksum than the published one"
            try:
                read_idx(path)
            except DataError as error:
                return str(error)
        for _, images, labels in self.FILES:
            labels_N = read_idx(self.raw / labels)
            if len(read_idx(self.raw / images)) != len(labels_N) or labels_N.max(initial=0) >= len(self.classes):
                return f"{labels} does not fit {images}"
        return None


def _write_npz(path: Path, **arrays_by_name: np.ndarray) -> None:
    """np.savez to the same bytes everywhere: the headers that it writes differ between releases of Python."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays_by_name.items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def read_idx(path: Path) -> np.ndarray:
    """A memory map of the uint8 array in an IDX file (LeCun's format: 0, 0, type 8, rank, big-endian sizes,
    values).
    """
    with path.open("rb") as file:
        head = file.read(4)
        rank = head[3] if len(head) == 4 and head[:3] == b"\0\0\x08" else 0
        shape = tuple(int.from_bytes(file.read(4), "big") for _ in range(rank))
    offset = 4 + 4 * rank
    if rank not in (1, 3) or math.prod(shape) == 0 or path.stat().st_size != offset + math.prod(shape):
        raise DataError(f"{path.name} is no whole IDX file")
    return np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=shape)


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10 (Krizhevsky 2009), read by torchvision, which checks every file before it unpickles it."""

    data_dir: Path
    name: str = "cifar10"
    source: str = "torchvision.datasets.CIFAR10"

    FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")

    @property
    def folder(self) -> Path:
        return self.data_dir / "torchvision" / "cifar-10-batches-py"

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.FILES]

    def fetch(self) -> None:
        problem = "not there yet"
        if self.stamp() is not None:
            from torchvision.datasets import CIFAR10

            try:
                CIFAR10(self.folder.parent, train=False)
                return
            except RuntimeError as error:
                problem = str(error)
        download.with_torchvision("CIFAR10", self.folder, self.name, problem)

    def stamp(self) -> str | None:
        return stamp_files(self.paths)

    def read(self, images_path: Path, image_size: int) -> Contents:
        return read_parts(list(self._parts()), self._classes(), self.paths, images_path, image_size)

    def _parts(self) -> Iterator[Part]:
        from torchvision.datasets import CIFAR10

        for split in ("train", "test"):
            part = CIFAR10(self.folder.parent, train=split == "train")
            yield in_memory(split, part.data, np.array(part.targets))

    def _classes(self) -> tuple[str, ...]:
        from torchvision.datasets import CIFAR10

        return tuple(CIFAR10(self.folder.parent, train=False).classes)


def mnist(data_dir: Path) -> IdxSet:
    """MNIST (LeCun et al. 1998)."""
    return IdxSet(data_dir, "mnist", "MNIST", tuple("0123456789"), tuple(PUBLISHED_MD5.items()))


def fashion_mnist(data_dir: Path) -> IdxSet:
    """Fashion-MNIST (Xiao et al. 2017)."""
    names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    return IdxSet(data_dir, "fashion_mnist", "FashionMNIST", names)


IDX_SETS = {"mnist": mnist, "fashion_mnist": fashion_mnist}
