"""A version of data that DVC keeps: dataset= is a path inside a git repository, data_version= a tag, branch or commit.

Files are kept by their hash, so versions share what they have in common; the folder that is read is named by what DVC
says of its content, so an unchanged version downloads nothing and a tag that moved brings the new data.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from data_loader import DataError
from data_loader.dvc_tree import TrackedFile, Tree, hash_of, opened
from data_loader.folder import FolderSource
from data_loader.manifest import Contents
from data_loader.mirror import Wanted, refused, synchronise
from data_loader.npz import NpzSource


@dataclass
class VersionedSource:
    """path: a folder of class folders or an .npz inside the repository; version: a tag, branch or commit of it;
    repository: its folder or git address, empty for the project's own. fetch() finds out the commit.
    """

    path: str
    version: str
    repository: str
    data_dir: Path
    commit: str = field(default="", init=False)
    _local: FolderSource | NpzSource | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        address = urlsplit(self.repository)
        if address.password or (address.username and address.scheme.startswith("http")):
            raise DataError(
                "data_repo carries a user name or a password, and parameters are logged; give the address without them"
                " and the credentials to git (a credential helper, ssh)"
            )
        if self.path.startswith(("/", "s3:/")) or not self.path or ".." in self.path.split("/"):
            raise DataError(
                f"dataset={self.path!r} with data_version={self.version!r}; expected a path inside the DVC repository,"
                " such as data/images"
            )
        self.path = PurePosixPath(self.path).as_posix()

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name.removesuffix(".npz") or PurePosixPath(self.where).name

    @property
    def source(self) -> str:
        return f"{self.where}@{self.version}:{self.path}"

    @property
    def where(self) -> str:
        """The repository: its address, or the full path of its folder."""
        folder = Path(self.repository or ".")
        return str(folder.resolve()) if folder.is_dir() else self.repository

    def fetch(self) -> None:
        with opened(self.where, self.version, own=not self.repository) as tree:
            self.commit = tree.commit
            found = self._find(tree)
            if unsafe := refused(found):
                raise DataError(f"{self.source} holds an unsafe name: {next(iter(unsafe))!r}")
            content = sorted((name, file.identity) for name, file in found.items())
            key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
            wanted = {name: Wanted(file.identity, partial(self._bring, tree, file)) for name, file in found.items()}
            files = synchronise(self.data_dir / "dvc" / key, wanted)
        npz = files / PurePosixPath(self.path).name
        is_npz = npz.suffix == ".npz" and npz.is_file()
        self._local = NpzSource(npz, self.source) if is_npz else FolderSource(files, self.source)

    def stamp(self) -> str | None:
        return self._local.stamp() if self._local else None

    def read(self, images_path: Path, image_size: int) -> Contents:
        assert self._local is not None, "fetch() comes first"
        return self._local.read(images_path, image_size)

    def _find(self, tree: Tree) -> dict[str, TrackedFile]:
        """The files at and below the path, by their names there."""
        try:
            return tree.files(self.path)
        except FileNotFoundError:
            pass
        from data_loader.sources import BUILT_IN

        if self.path in BUILT_IN:
            hint = f"{self.path} is built in and has no versions: leave data_version empty for it"
        elif (Path(self.where) / self.path).exists():
            hint = "it lies in the folder, but neither DVC nor git tracks it there: dvc add, git commit, dvc push"
        else:
            hint = f"there are: {', '.join(tree.top()) or 'no files'}"
        raise DataError(
            f"dataset={self.path!r} is not in {self.where} at {self.version} (commit {self.commit[:8]}); {hint}"
        )

    def _bring(self, tree: Tree, file: TrackedFile, to: Path) -> None:
        """One file to the path `to`: from a version that had it, else from the repository."""
        if file.algorithm == "git":  # the clone has it
            tree.get(file, to)
            return
        kept = self.data_dir / "dvc" / "files" / file.algorithm / file.hash[:2] / file.hash[2:]
        if kept.is_file():
            os.link(kept, to)
            if hash_of(to, file.algorithm) == file.hash:
                return
            to.unlink()
            kept.unlink(missing_ok=True)
        tree.get(file, to)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # another file of the same content was first, or no hard links here
            os.link(to, kept)
