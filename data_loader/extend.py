"""A new version of a data set: a folder with all that it holds, untouched, and newly labelled images."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_loader import DataError
from data_loader.dataset import Dataset, load
from data_loader.images import decode_image, encode_png
from data_loader.listing import HIDDEN, SPLIT_FOLDERS, list_folder
from data_loader.mirror import NAME_BYTES
from data_loader.splits import SPLITS, split_of


@dataclass(frozen=True)
class NewImage:
    """An image file and its class; the name is for messages."""

    name: str
    class_name: str
    content: bytes


@dataclass(frozen=True)
class Version:
    """A data set that was extended."""

    digest: str
    images: dict[str, int]
    """Images of each split."""
    added: dict[str, int]
    """New images of each split."""
    known: int
    """Images given that the data set held already, under the same class."""
    image_shape: tuple[int, ...]


def fingerprint(image_HWC: np.ndarray) -> bytes:
    """The same for images of equal pixels, in whatever file they came."""
    return hashlib.sha256(np.ascontiguousarray(image_HWC).data).digest()


def fingerprints(data: Dataset) -> dict[bytes, str]:
    """The class of each image of a data set, by its fingerprint."""
    labels = data.labels_N.tolist()
    return {fingerprint(image_HWC): data.classes[labels[row]] for row, image_HWC in enumerate(data.images_NHWC)}


def extend(data: Dataset, new: Sequence[NewImage], output: Path) -> Version:
    """Write the folder `output` with the images of `data`, loaded at their own size, and the new ones.

    A folder is copied file by file, and a new image joins the others of its class, below train/ where there are split
    folders. A data set of arrays becomes PNG files below train/, val/ and test/, in the splits that they are in; a new
    image then has the others' size, and its split follows from its pixels, never into an official test set.

    Raises DataError, and leaves nothing, where a class cannot be a folder, a new image cannot be read or is there
    under another class, or the written folder does not hold what it should.
    """
    is_folder, root = _is_folder(data), Path(data.source)
    if is_folder and not root.is_dir():
        raise DataError(f"{data.source} is not on this machine; extend a folder with its files")
    if is_folder and output.resolve().is_relative_to(root.resolve()):
        raise DataError(f"output '{output}' lies in the data set itself; give another place")
    images, known = _unknown(data, new)
    if not images:
        raise DataError(f"{data.source} holds all {known} labelled images already; there is nothing to add")
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        _refuse_existing(output)
        partial.mkdir(parents=True)
        if is_folder:
            above = next((f"{f.path.split('/')[0]}/" for f in list_folder(root) if f.split == "train"), "")
            shutil.copytree(root, partial, ignore=shutil.ignore_patterns(".*", *HIDDEN), dirs_exist_ok=True)
            names = [_add(partial, above, image, image.content, Path(image.name).suffix) for image, _ in images]
        else:
            _write_arrays(data, partial)
            official = _official(data)
            splits = [split_of(fingerprint(image_HWC), None, official) for _, image_HWC in images]
            names = [
                _add(partial, f"{split}/", image, encode_png(image_HWC), ".png")
                for split, (image, image_HWC) in zip(splits, images, strict=True)
            ]
        version = _verified(data, partial, names, known)
        _refuse_existing(output)
        partial.rename(output)
        return version
    except OSError as error:
        raise DataError(f"output '{output}' cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_folder(data: Dataset) -> bool:
    """Whether its images are files; else they are rows of arrays."""
    return data.manifest["files"][0]["class"] is not None


def _refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise DataError(f"output '{output}' exists; give a new folder")


def _unknown(data: Dataset, new: Sequence[NewImage]) -> tuple[list[tuple[NewImage, np.ndarray]], int]:
    """The images that the data set does not hold, with their pixels in its shape, and how many it does."""
    height, width, channels = data.images_NHWC.shape[1:]
    class_of, known, images = fingerprints(data), 0, []
    for image in new:
        if image.class_name not in data.classes:
            _check_class(image)
        try:
            pixels_HWC = decode_image(image.content, height, width, channels)
        except DataError as error:
            raise DataError(f"{image.name!r} cannot be read: {error}") from None
        mark = fingerprint(pixels_HWC)
        if mark not in class_of:
            class_of[mark] = image.class_name
            images.append((image, pixels_HWC))
        elif class_of[mark] == image.class_name:
            known += 1
        else:
            raise DataError(
                f"{image.name!r} got the label {image.class_name!r}, but the data set or another row has the same image"
                f" as {class_of[mark]!r}; correct one of them"
            )
    return images, known


def _check_class(image: NewImage) -> None:
    """Refuse a new class whose folder would not be taken for a class."""
    name = image.class_name
    if (
        not name
        or name.startswith(".")
        or name in HIDDEN
        or name.lower() in SPLIT_FOLDERS
        or any(char in "/\\" or not char.isprintable() for char in name)
        or len(os.fsencode(name)) > NAME_BYTES
    ):
        raise DataError(f"{image.name!r} got the label {name!r}, which cannot name a class folder; choose another")


def _add(partial: Path, above: str, image: NewImage, content: bytes, suffix: str) -> str:
    """Write a new image, named by its content; gives its path in the data set."""
    name = f"{above}{image.class_name}/{hashlib.sha256(content).hexdigest()[:32]}{suffix.lower()}"
    (partial / name).parent.mkdir(parents=True, exist_ok=True)
    with (partial / name).open("xb") as file:
        file.write(content)
    return name


def _array_names(data: Dataset) -> list[str]:
    """For each row the file that it becomes."""
    if unfit := [name for name in data.classes if "/" in name or name.startswith(".")]:
        raise DataError(f"{data.name} has the class {unfit[0]!r}, which cannot be a folder's name")
    names = [""] * len(data.labels_N)
    for split, rows in data.rows.items():
        for row in rows.tolist():
            names[row] = f"{split}/{data.classes[data.labels_N[row]]}/{row:07}.png"
    return names


def _write_arrays(data: Dataset, partial: Path) -> None:
    for row, name in enumerate(_array_names(data)):
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(data.images_NHWC[row]))


def _official(data: Dataset) -> tuple[str, ...]:
    """Whether the test images of a data set of arrays were chosen by its publisher: not if their pixels choose them."""
    test_rows = data.rows["test"].tolist()
    by_pixels = all(split_of(fingerprint(data.images_NHWC[row]), None, ()) == "test" for row in test_rows)
    return () if by_pixels else ("test",)


def _verified(data: Dataset, partial: Path, names: Sequence[str], known: int) -> Version:
    """Read the new version as training will, and find in it what was there before and the new images, nothing else."""
    with TemporaryDirectory() as scratch:
        version = load(str(partial), data_dir=Path(scratch))
        before, after = (_held(each, by_file=_is_folder(data)) for each in (data, version))
        if not before.items() <= after.items() or after.keys() - before.keys() != set(names):
            raise DataError(f"{data.source} changed while it was being copied; try again")
        splits = [after[name][2] for name in names]
        return Version(
            digest=version.digest,
            images={split: len(rows) for split, rows in version.rows.items()},
            added={split: splits.count(split) for split in SPLITS},
            known=known,
            image_shape=version.images_NHWC.shape[1:],
        )


def _held(data: Dataset, by_file: bool) -> dict[str, tuple[str | bytes, str, str]]:
    """What tells an image apart (its file's SHA-256, of arrays its pixels), class and split, by path."""
    files = data.manifest["files"]
    names = [f["path"] for f in files] if _is_folder(data) else _array_names(data)
    marks = [f["sha256"] for f in files] if by_file else map(fingerprint, data.images_NHWC)
    split_of_row = {row: split for split, rows in data.rows.items() for row in rows.tolist()}
    return {
        name: (mark, data.classes[data.labels_N[row]], split_of_row[row])
        for row, (name, mark) in enumerate(zip(names, marks, strict=True))
    }
