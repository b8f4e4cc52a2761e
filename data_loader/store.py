"""Many small files at one address, a folder or an s3://bucket/prefix: listed, read and put there by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_loader import DataError

WRITABLE = ".writable"
"""A file without content that shows that something could be written."""


class Store(Protocol):
    """Files by names with / in them, relative to the address."""

    def names(self, folder: str) -> Iterator[str]:
        """All files below a folder, in no order; none where there is no such folder."""

    def read(self, name: str) -> bytes:
        """A file's content. DataError where it cannot be read."""

    def put(self, path: Path, name: str) -> None:
        """Bring a file there, which is seen under its name when it is whole; it may be moved. OSError or DataError."""

    def size(self, folder: str) -> int:
        """Bytes of all files below a folder."""

    @property
    def spool(self) -> Path:
        """A folder of this machine's for files on their way there, the same one each time; a move from it is cheap."""


def open_store(address: str) -> Store:
    """The files at a folder or s3://bucket/prefix. DataError where there is no such folder."""
    if address.startswith("s3://"):
        return S3Store(address.rstrip("/"))
    if not Path(address).is_dir():
        raise DataError(f"'{address}' is no folder; give an existing folder or s3://bucket/prefix")
    return FolderStore(Path(address))


def store_to_write(address: str) -> Store:
    """The same for one who writes, without a look at what is there, and with no patience: he tries again himself."""
    return S3Store(address.rstrip("/"), patient=False) if address.startswith("s3://") else FolderStore(Path(address))


def check_store(store: Store, address: str) -> None:
    """Write a file without content there; a folder is made where there is none. DataError where that does not go."""
    empty = store.spool / f"{WRITABLE}.{os.getpid()}"
    try:
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
        store.put(empty, WRITABLE)
        empty.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"nothing can be written to '{address}' ({error.filename}: {error.strerror}); "
            "give a folder where this user may write, or s3://bucket/prefix"
        ) from None


@dataclass(frozen=True)
class FolderStore:
    """Files below a folder of this machine."""

    root: Path

    def names(self, folder: str) -> Iterator[str]:
        for path in (self.root / folder).rglob("*"):
            if path.is_file():
                yield path.relative_to(self.root).as_posix()

    def read(self, name: str) -> bytes:
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise DataError(f"'{name}' lies outside {self.root}")
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None

    def put(self, path: Path, name: str) -> None:
        place = self.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)

    def size(self, folder: str) -> int:
        return sum(path.stat().st_size for path in (self.root / folder).rglob("*") if path.is_file())

    @property
    def spool(self) -> Path:
        return self.root / ".unsent"


@dataclass(frozen=True)
class S3Store:
    """Objects below a prefix; credentials and endpoint as for data sets (data_loader.s3)."""

    address: str
    patient: bool = True
    """Whether to wait long for an answer and ask again."""
    _client: Any = field(init=False)
    _bucket: str = field(init=False)
    _prefix: str = field(init=False)

    def __post_init__(self) -> None:
        from data_loader import s3

        bucket, prefix = s3.split_uri(self.address)
        object.__setattr__(self, "_client", s3.make_client() if self.patient else s3.make_client(10, 1))
        object.__setattr__(self, "_bucket", bucket)
        object.__setattr__(self, "_prefix", f"{prefix}/" if prefix else "")

    def names(self, folder: str) -> Iterator[str]:
        for name, _ in self._sizes(folder):
            yield name

    def read(self, name: str) -> bytes:
        from data_loader import s3

        with s3.one_line_errors(f"{self.address}/{name}"):
            return bytes(self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}{name}")["Body"].read())

    def put(self, path: Path, name: str) -> None:
        from data_loader import s3

        with s3.one_line_errors(f"{self.address}/{name}", "write"):
            self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}{name}", Body=path.read_bytes())

    def size(self, folder: str) -> int:
        return sum(size for _, size in self._sizes(folder))

    @property
    def spool(self) -> Path:
        from data_loader import s3

        place = hashlib.sha256(f"{s3.endpoint()} {self.address}".encode()).hexdigest()[:16]
        return Path("outputs", "unsent", place)

    def _sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        from data_loader import s3

        pages = self._client.get_paginator("list_objects_v2")
        with s3.one_line_errors(self.address):
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}{folder}/"):
                for found in page.get("Contents", ()):
                    if not found["Key"].endswith("/"):
                        yield found["Key"][len(self._prefix) :], found["Size"]
