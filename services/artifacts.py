"""The artifacts as one stream: what backups and restores run where the server runs.

    python services/artifacts.py save > FILE     all artifacts, as a tar archive
    python services/artifacts.py load < FILE     put them back; what is not in the archive is removed
    python services/artifacts.py count           how many there are

It reads ARTIFACTS_FOLDER, or S3_ENDPOINT_URL, S3_REGION, S3_BUCKET, S3_PREFIX and S3_ACCESS_KEY with S3_SECRET_KEY. How
far a save has come is told on standard error: bytes done, bytes in all.
"""

from __future__ import annotations

import mimetypes
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

import settings
from settings import Refused

IN_MEMORY = 16 * 2**20  # bytes of one artifact; larger ones pass through a temporary file
TELL_EVERY_S = 0.5


class Store(Protocol):
    """Where artifacts are; their names are relative to the server's part of it."""

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every artifact."""

    def read(self, name: str, into: IO[bytes]) -> None:
        """Write an artifact's content into a file. Raises FileNotFoundError."""

    def write(self, name: str, content: IO[bytes]) -> None:
        """Make or replace an artifact."""

    def remove(self, name: str) -> None:
        """Delete an artifact."""


class Folder:
    """Artifacts as files."""

    def __init__(self, folder: Path):
        self.folder = folder

    def sizes(self) -> Iterator[tuple[str, int]]:
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                yield path.relative_to(self.folder).as_posix(), path.stat().st_size

    def read(self, name: str, into: IO[bytes]) -> None:
        with (self.folder / name).open("rb") as file:
            shutil.copyfileobj(file, into)

    def write(self, name: str, content: IO[bytes]) -> None:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise Refused(f"the archive has a file outside of the artifacts: '{name}'; it was not made by `save`")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file)
        temporary.replace(path)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


class Bucket:
    """Artifacts as objects of S3."""

    def __init__(self, environment: dict[str, str]):
        import boto3
        from botocore.config import Config

        self.bucket, self.prefix = environment["S3_BUCKET"], f"{environment['S3_PREFIX']}/"
        self.client = boto3.client(
            "s3",
            endpoint_url=environment["S3_ENDPOINT_URL"],
            region_name=environment["S3_REGION"],
            aws_access_key_id=environment["S3_ACCESS_KEY"],
            aws_secret_access_key=environment["S3_SECRET_KEY"],
            config=Config(
                connect_timeout=5,
                retries={"total_max_attempts": 5},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def make(self) -> None:
        """Make the bucket, unless it is there, or the keys may not know: the server's least rights cover its prefix."""
        from botocore.exceptions import ClientError

        try:
            self.client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 403:
                return
            if status != 404:
                raise
            self.client.create_bucket(Bucket=self.bucket, **self._place())

    def _place(self) -> dict[str, Any]:
        """AWS wants to be told the region once more, but for its first one; other stores may refuse to be told."""
        host, region = urlsplit(self.client.meta.endpoint_url).hostname, self.client.meta.region_name
        if region == "us-east-1" or not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
            return {}
        return {"CreateBucketConfiguration": {"LocationConstraint": region}}

    def sizes(self) -> Iterator[tuple[str, int]]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        for page in pages:
            for found in page.get("Contents", []):
                yield found["Key"].removeprefix(self.prefix), found["Size"]

    def read(self, name: str, into: IO[bytes]) -> None:
        from botocore.exceptions import ClientError

        try:
            self.client.download_fileobj(self.bucket, self.prefix + name, into)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                raise FileNotFoundError(name) from None
            raise

    def write(self, name: str, content: IO[bytes]) -> None:
        kind = {"ContentType": mimetypes.guess_type(name)[0] or "application/octet-stream"}
        self.client.upload_fileobj(content, self.bucket, self.prefix + name, ExtraArgs=kind)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)


class Progress:
    """Tells on standard error how far it has come, from time to time and at the end."""

    def __init__(self, total_bytes: int):
        self.done, self.total, self.told_at = 0, total_bytes, 0.0

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() > self.told_at + TELL_EVERY_S or self.done >= self.total:
            self.told_at = time.monotonic()
            print(self.done, self.total, file=sys.stderr, flush=True)


def save(store: Store, output: IO[bytes]) -> None:
    """Write every artifact into a tar archive. One that is removed meanwhile is left out."""
    found = list(store.sizes())
    progress = Progress(sum(size for _, size in found))
    with tarfile.open(fileobj=output, mode="w|") as archive:
        for name, size in found:
            with tempfile.SpooledTemporaryFile(IN_MEMORY) as content:
                try:
                    store.read(name, content)
                except FileNotFoundError:
                    continue
                entry = tarfile.TarInfo(name)
                entry.size = content.tell()
                content.seek(0)
                archive.addfile(entry, content)
            progress.add(size)


def load(store: Store, source: IO[bytes]) -> None:
    """Put every artifact of a tar archive in its place, and then remove those that are not in it."""
    loaded = set()
    with tarfile.open(fileobj=source, mode="r|") as archive:
        for entry in archive:
            with tempfile.SpooledTemporaryFile(IN_MEMORY) as content:
                file = archive.extractfile(entry)
                if file is None:
                    raise Refused(f"the archive holds '{entry.name}', which is no file; it was not made by `save`")
                shutil.copyfileobj(file, content)
                content.seek(0)
                store.write(entry.name, content)
            loaded.add(entry.name)
    for name, _ in list(store.sizes()):
        if name not in loaded:
            store.remove(name)


def store_of(environment: dict[str, str]) -> Any:
    """The store that the environment names."""
    if folder := environment.get("ARTIFACTS_FOLDER"):
        return Folder(Path(folder))
    return Bucket(environment)


def main() -> None:
    """Do what the command line says; what the store refuses is one line."""
    from botocore.exceptions import BotoCoreError, ClientError

    store = store_of(dict(os.environ))
    try:
        if sys.argv[1:] == ["save"]:
            save(store, sys.stdout.buffer)
        elif sys.argv[1:] == ["load"]:
            load(store, sys.stdin.buffer)
        elif sys.argv[1:] == ["count"]:
            print(sum(1 for _ in store.sizes()))
        else:
            raise Refused("what to do? save, load or count")
    except (BotoCoreError, ClientError, OSError, tarfile.TarError) as error:
        hint = ""
        if isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] == 403:
            hint = f"; {' and '.join(settings.ADMIN_KEYS)} in services/.env have to be this store's, or empty"
        raise Refused(f"artifacts: {' '.join(str(error).split())}{hint}", 1) from None


if __name__ == "__main__":
    settings.run(main)
