"""What lies in a folder of class folders: names, sizes and times, without opening a file."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_loader import DataError

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
HIDDEN = ("Thumbs.db", "desktop.ini", "__MACOSX")  # and all that begins with a dot


@dataclass(frozen=True)
class Found:
    """One file below the folder, or something there that cannot be a file of a class (then problem says
    why).
    """

    path: str  # relative, with /
    class_name: str | None
    split: str | None  # by the folder it lies in
    bytes: int | None
    mtime_ns: int
    problem: str | None = None


def list_folder(root: Path) -> list[Found]:
    """All files of a folder of classes, in order of path. Raises DataError if the folder cannot be read as
    one.
    """
    try:
        entries = _visible(root)
    except OSError as error:
        raise DataError(f"{root} cannot be listed: {error.strerror or error}") from None
    folders = [entry for entry in entries if is_folder(entry)]
    ancestors = frozenset([_identity(root.stat())])
    names = {entry.name.lower() for entry in folders}
    if "train" in names and names <= SPLIT_FOLDERS.keys():
        found = [*_strays(entries, "")]
        for entry in folders:
            found += _split(entry, ancestors)
    elif len(names & SPLIT_FOLDERS.keys()) > 1 and "train" in names:
        others = sorted(entry.name for entry in folders if entry.name.lower() not in SPLIT_FOLDERS)
        raise DataError(f"{root} holds split folders and others beside them: {others[:5]}; expected one or the other")
    else:
        found = [*_strays(entries, "")]
        for entry in folders:
            found += _class(entry, "", None, ancestors)
    return sorted(found, key=lambda f: f.path)


def _split(folder: os.DirEntry[str], ancestors: frozenset[tuple[int, int]]) -> Iterator[Found]:
    split, above = SPLIT_FOLDERS[folder.name.lower()], f"{folder.name}/"
    identity = _identity(folder.stat())
    if identity in ancestors:
        yield Found(folder.name, None, split, None, 0, "symlink loop")
        return
    entries = _visible(folder)
    yield from _strays(entries, above)
    for entry in entries:
        if is_folder(entry):
            yield from _class(entry, above, split, ancestors | {identity})


def _class(
    folder: os.DirEntry[str], above: str, split: str | None, ancestors: frozenset[tuple[int, int]]
) -> Iterator[Found]:
    found = list(_walk(folder, above, folder.name, split, ancestors))
    yield from found
    if not found:
        yield Found(above + folder.name, folder.name, split, None, 0, "class folder without images")


def _walk(
    entry: os.DirEntry[str],
    above: str,
    class_name: str,
    split: str | None,
    ancestors: frozenset[tuple[int, int]],
) -> Iterator[Found]:
    """The files at and below one entry of a class folder; ancestors are the folders that the way came
    through.
    """
    path = above + entry.name
    try:
        status = entry.stat()
        if stat.S_ISDIR(status.st_mode):
            if _identity(status) in ancestors:
                yield Found(path, class_name, split, None, 0, "symlink loop")
                return
            for below in _visible(entry):
                yield from _walk(below, f"{path}/", class_name, split, ancestors | {_identity(status)})
        elif stat.S_ISREG(status.st_mode):
            yield Found(path, class_name, split, status.st_size, status.st_mtime_ns)
        else:
            yield Found(path, class_name, split, None, 0, "not a regular file")
    except OSError as error:  # a link to nothing or to itself, or a folder without permission
        yield Found(path, class_name, split, None, 0, f"cannot be read: {error.strerror or error}")


def _strays(entries: list[os.DirEntry[str]], above: str) -> Iterator[Found]:
    """Images and broken links outside all class folders. Others there (a README, a licence) are nobody's
    data.
    """
    for entry in entries:
        if is_folder(entry):
            continue
        try:
            size = entry.stat().st_size
        except OSError as error:
            yield Found(above + entry.name, None, None, None, 0, f"cannot be read: {error.strerror or error}")
            continue
        if entry.name.lower().endswith(IMAGE_SUFFIXES):
            yield Found(above + entry.name, None, None, size, 0, "image outside the class folders")


def _visible(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        visible = [e for e in entries if not e.name.startswith(".") and e.name not in HIDDEN]
    return sorted(visible, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
