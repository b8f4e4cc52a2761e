"""Files from elsewhere, mirrored into the data directory, where they are a folder or an .npz like any other.

A file arrives under a temporary name, is checked by whoever brings it, and is renamed. What is there already, as it was
left, is not brought again; what is no longer wanted goes. Writing needs the lock of the data directory (dataset.py).
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_loader.manifest import load, save

CONNECTIONS = 16
NAME_BYTES = 255  # the longest file name that common file systems take


@dataclass(frozen=True)
class Wanted:
    """A file to have: its `identity` changes with its content; `bring` writes it to a path and checks it there."""

    identity: str
    bring: Callable[[Path], None]


def synchronise(mirror: Path, wanted: Mapping[str, Wanted]) -> Path:
    """Make the folder that is returned hold exactly the files `wanted`, by name; the names must be safe (`refused`)."""
    from tqdm import tqdm

    files, partial, state_path = mirror / "files", mirror / ".partial", mirror / "files.json"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _remove_others(files, wanted.keys())
    before = load(state_path) or {}
    state = {name: before[name] for name, it in wanted.items() if _is_as_left(files / name, it, before.get(name))}
    save(state_path, state)
    files.mkdir(parents=True, exist_ok=True)
    missing = [name for name in wanted if name not in state]
    with (
        ThreadPoolExecutor(CONNECTIONS) as pool,
        tqdm(total=len(missing), unit="file", desc="downloading", disable=None, delay=1) as bar,
    ):
        temporary = {name: partial / str(number) for number, name in enumerate(missing)}
        waiting = {pool.submit(wanted[name].bring, temporary[name]): name for name in missing}
        try:
            for future in as_completed(waiting):
                future.result()
                name = waiting[future]
                (files / name).parent.mkdir(parents=True, exist_ok=True)
                temporary[name].replace(files / name)
                state[name] = [wanted[name].identity, *_size_and_time(files / name)]
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
            save(state_path, state)
            shutil.rmtree(partial, ignore_errors=True)
    return files


def refused(names: Iterable[str]) -> dict[str, str]:
    """{name: why it cannot be a file below a mirror}, for those that cannot."""
    names = list(names)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    found = {}
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            found[name] = "unsafe object key: an empty part, . or .."
        elif any(len(part.encode()) > NAME_BYTES for part in parts):
            found[name] = f"object key with a part of more than {NAME_BYTES} bytes"
        elif name in folders:
            found[name] = "object key that is also the folder of others"
    return found


def _is_as_left(path: Path, wanted: Wanted, left: list[object] | None) -> bool:
    """Whether a file has the content wanted: it had when it was put there, and its size and time are still the same."""
    try:
        return left == [wanted.identity, *_size_and_time(path)]
    except OSError:
        return False


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _remove_others(root: Path, wanted: Collection[str]) -> None:
    """Delete every file below root that is not wanted, and the folders that this leaves empty."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder, name)
            if path.relative_to(root).as_posix() not in wanted:
                path.unlink()
        if not any(Path(folder).iterdir()):
            Path(folder).rmdir()
