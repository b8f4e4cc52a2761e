"""An s3://bucket/prefix, mirrored into the data directory; then it is a folder or an .npz like any other.

An object is checked against the size and the ETag that the listing gave; one that has not changed is not downloaded
again. Credentials come from boto3's own chain, the endpoint from the environment.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data_loader import DataError
from data_loader.folder import FolderSource
from data_loader.manifest import Contents
from data_loader.mirror import CONNECTIONS, Wanted, refused, synchronise
from data_loader.npz import NpzSource

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
CHUNK_BYTES = 2**20
CONNECT_TIMEOUT_S, READ_TIMEOUT_S, ATTEMPTS = 5, 30, 3


@dataclass
class S3Source:
    """uri: s3://bucket/prefix of class folders, or s3://bucket/key.npz."""

    uri: str
    data_dir: Path
    _local: FolderSource | NpzSource | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return PurePosixPath(self.source.removeprefix("s3://")).name.removesuffix(".npz")

    @property
    def source(self) -> str:
        return self.uri.rstrip("/")

    def fetch(self) -> None:
        with one_line_errors(self.source):
            self._local = self._mirror()

    def stamp(self) -> str | None:
        return self._local.stamp() if self._local else None

    def read(self, images_path: Path, image_size: int) -> Contents:
        assert self._local is not None, "fetch() comes first"
        return self._local.read(images_path, image_size)

    def _mirror(self) -> FolderSource | NpzSource:
        bucket, prefix = split_uri(self.uri)
        single = prefix.endswith(".npz")
        client = make_client()
        objects = _list_objects(client, bucket, prefix if single else f"{prefix}/" if prefix else "")
        if single:
            objects = {key: about for key, about in objects.items() if key == prefix}
        if not objects:
            raise DataError(f"{self.source} at {endpoint() or 'AWS'} holds no objects; check the bucket and the prefix")
        start = len(prefix) - len(PurePosixPath(prefix).name) if single else len(prefix) + bool(prefix)
        wanted = {
            key[start:]: Wanted(f"{size} {etag}", partial(_download, client, bucket, key, size, etag))
            for key, (size, etag) in objects.items()
        }
        unsafe = refused(wanted)
        mirror = self.data_dir / "s3" / hashlib.sha256(f"{endpoint()} {self.source}".encode()).hexdigest()[:16]
        files = synchronise(mirror, {name: it for name, it in wanted.items() if name not in unsafe})
        if single:
            return NpzSource(files / PurePosixPath(prefix).name, self.source)
        return FolderSource(files, self.source, tuple(sorted(unsafe.items())))


_USUAL = (
    f"look at the address, the network, the endpoint ({', '.join(ENDPOINT_VARIABLES)})"
    " and the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a profile)"
)
_ADVICE = {
    "NoSuchBucket": "no such bucket: check its name and the endpoint",
    "NoSuchKey": "the object went away: try again",
    "PreconditionFailed": "an object changed during the download: try again",
    "412": "an object changed during the download: try again",
    "AccessDenied": "these credentials may not list or read there",
    "InvalidAccessKeyId": "the endpoint does not know this access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
}


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key or prefix without outer slashes) of an s3:// address. Raises DataError."""
    parts = urlsplit(uri, allow_fragments=False)
    bucket, prefix = parts.netloc, (parts.path + (f"?{parts.query}" if parts.query else "")).strip("/")
    if parts.scheme != "s3" or not bucket or "@" in bucket or ":" in bucket:
        raise DataError(f"{uri!r} is no address of the form s3://bucket/prefix")
    return bucket, prefix


def endpoint() -> str | None:
    """The first endpoint that the environment names; None means AWS itself."""
    return next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)


def make_client(read_timeout_s: float = READ_TIMEOUT_S, attempts: int = ATTEMPTS) -> Any:
    """A boto3 client that gives up after seconds. It may be used from several threads."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout_s,
        retries={"max_attempts": attempts, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        # A server of one's own rarely has a DNS name for each bucket.
        s3={"addressing_style": "path" if endpoint() else "auto"},
    )
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint(), config=config)
    except ValueError as error:
        raise DataError(f"{endpoint()!r} is no endpoint ({error}); expected http://host:port") from None


@contextmanager
def one_line_errors(address: str, action: str = "read") -> Iterator[None]:
    """What boto3 raises in the block as a DataError that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    where = f"{address} at {endpoint() or 'AWS'}"
    try:
        yield
    except ClientError as error:
        details = error.response.get("Error", {})
        code, said = details.get("Code", "?"), details.get("Message") or ""
        advice = _ADVICE.get(code, _USUAL)
        raise DataError(f"cannot {action} {where}: {code} {said} ({advice})") from None
    except (BotoCoreError, Boto3Error) as error:
        raise DataError(f"cannot {action} {where}: {error} ({_USUAL})") from None


def _list_objects(client: Any, bucket: str, prefix: str) -> dict[str, tuple[int, str]]:
    """{key: (bytes, ETag)}, without the empty objects that stand for folders."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {
        found["Key"]: (found["Size"], found["ETag"].strip('"'))
        for page in pages
        for found in page.get("Contents", ())
        if not found["Key"].endswith("/")
    }


def _download(client: Any, bucket: str, key: str, size: int, etag: str, path: Path) -> None:
    """One object to a file; IfMatch refuses one that changed since it was listed."""
    answer = client.get_object(Bucket=bucket, Key=key, IfMatch=f'"{etag}"')
    md5 = hashlib.md5(usedforsecurity=False)
    count = 0
    with path.open("wb") as file:
        for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
            file.write(chunk)
            md5.update(chunk)
            count += len(chunk)
    # The ETag is the MD5 only of an object that came in one part and is not encrypted with a key of its own.
    keyed = answer.get("SSECustomerAlgorithm") or answer.get("ServerSideEncryption", "AES256") != "AES256"
    if count != size or not ("-" in etag or keyed or md5.hexdigest() == etag):
        raise DataError(f"s3://{bucket}/{key} arrived damaged ({count} of {size} bytes); try again")
