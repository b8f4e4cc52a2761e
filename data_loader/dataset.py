"""A data set by name or address -> arrays: fetch -> manifest -> cache -> memory map."""

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_loader import DataError, cache, manifest
from data_loader.batches import channel_statistics
from data_loader.sources import Source, find
from data_loader.versions import VersionedSource


@dataclass(frozen=True)
class Dataset:
    """Labelled uint8 images.

    images_NHWC is a read-only memory map with C of 1 or 3; labels_N are positions in classes; rows gives
    for "train", "val" and "test" the int64 row numbers; digest names the raw files and their splits,
    whatever the image size.
    """

    name: str
    source: str
    digest: str
    classes: tuple[str, ...]
    images_NHWC: np.ndarray
    labels_N: np.ndarray
    rows: dict[str, np.ndarray]
    manifest: dict[str, Any]
    version: dict[str, str] = field(default_factory=dict)
    """What was asked for and what that was (data_version, data_commit), where DVC keeps the data; else empty."""

    def identity(self) -> dict[str, Any]:
        """What a run calls it."""
        return {"name": self.name, "digest": self.digest, "source": self.source, "version": self.version}

    def profile(self) -> dict[str, str | int]:
        """Its size in a few numbers."""
        shape = "x".join(map(str, self.images_NHWC.shape[1:]))
        counts = {f"{split}_images": len(rows) for split, rows in self.rows.items()}
        return {"image_shape": shape, "classes": len(self.classes), **counts}

    def images_more_than(self, run_params: Mapping[str, str]) -> int:
        """How many images it has more than the data of a run, whose parameters hold that data's profile and digest."""
        if run_params.get("data_digest") == self.digest:
            return 0
        had = sum(int(run_params.get(f"{split}_images", 0)) for split in self.rows)
        return max(0, len(self.labels_N) - had)

    def facts(self) -> dict[str, Any]:
        """What a network has to know of it; the mean and deviation are those of the training split's raw pixels."""
        mean_C, std_C = channel_statistics(self.images_NHWC, self.rows["train"])
        return {
            "image_shape": self.images_NHWC.shape[1:],
            "classes": self.classes,
            "mean_C": mean_C,
            "std_C": std_C,
            "data_digest": self.digest,
        }


def load(
    dataset: str,
    *,
    data_dir: Path,
    image_size: int = 0,
    on_error: str = "fail",
    data_version: str = "",
    data_repo: str = "",
) -> Dataset:
    """Make a data set ready and open it.

    dataset: digits, mnist, fashion_mnist, cifar10, a folder of class folders, an .npz file, or an
    s3://bucket/prefix of either. data_dir: where downloads, manifests and decoded images are kept; whatever
    is there already is not made again. image_size: pixels a side, 0 for the images' own size. on_error:
    what bad files do, "fail" or "skip". data_version: a tag, branch or commit of the git repository data_repo (a
    folder or an address; empty: the project's own), in which dataset is then a path of DVC's or git's. Raises DataError
    for anything that the user has to put right.
    """
    if on_error not in ("fail", "skip"):
        raise DataError(f"on_error={on_error!r}; allowed: fail, skip")
    if image_size < 0:
        raise DataError(f"image_size={image_size}; allowed: 0 (the images' own size) or a number of pixels")
    data_dir = Path(data_dir)
    if data_repo and not data_version:
        raise DataError(f"data_repo={data_repo!r} without data_version; give a tag, branch or commit of it")
    versioned = VersionedSource(dataset, data_version, data_repo, data_dir) if data_version else None
    source = versioned or find(dataset, data_dir)
    ready = _open(source, data_dir, image_size)
    if ready is None:
        try:
            ready = _prepare(source, data_dir, image_size)
        except OSError as error:
            raise DataError(f"cannot prepare {source.source} in data_dir={data_dir}: {error}") from None
    if on_error == "fail":
        manifest.refuse_bad(ready.manifest)
    if versioned:
        return replace(ready, version={"data_version": data_version, "data_commit": versioned.commit})
    return ready


def load_asked(settings: Any, image_size: int) -> Dataset:
    """`load` by the settings of an entry point, which have the names of the other parameters."""
    return load(
        settings.dataset,
        data_dir=Path(settings.data_dir),
        image_size=image_size,
        on_error=settings.on_error,
        data_version=settings.data_version,
        data_repo=settings.data_repo,
    )


def _prepare(source: Source, data_dir: Path, image_size: int) -> Dataset:
    """Fetch and decode, one process at a time; the others find the work done when their turn comes."""
    from filelock import FileLock, Timeout

    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that prepares data in {data_dir}", file=sys.stderr)
        lock.acquire()
    try:
        source.fetch()
        ready = _open(source, data_dir, image_size)
        if ready is None:
            _build(source, data_dir, image_size)
            ready = _open(source, data_dir, image_size)
        if ready is None:
            raise DataError(f"{source.source} changed while it was being read; try again")
        return ready
    finally:
        lock.release()


def _build(source: Source, data_dir: Path, image_size: int) -> None:
    """Read every raw file; write the decoded images and then the manifest that vouches for them."""
    stamp = source.stamp()
    partial = cache.start(data_dir / "cache")
    contents = source.read(partial / "images.npy", image_size)
    described = manifest.make(source.name, source.source, contents)
    shape = _shape(contents.natural_shape, image_size)
    cache.finish(data_dir / "cache", described["digest"], shape, contents.labels_N, contents.splits_N)
    record = {"stamp": stamp, "natural_shape": contents.natural_shape, "manifest": described}
    manifest.save(_record_path(source, data_dir), record)


def _open(source: Source, data_dir: Path, image_size: int) -> Dataset | None:
    """The data set as an earlier start left it, without reading a raw file; None if that is not possible."""
    record = manifest.load(_record_path(source, data_dir))
    stamp = source.stamp() if record else None
    if record is None or stamp is None or stamp != record["stamp"]:
        return None
    described, shape = record["manifest"], _shape(record["natural_shape"], image_size)
    arrays = cache.open_arrays(data_dir / "cache", described["digest"], shape)
    if arrays is None:
        return None
    images_NHWC, labels_N, rows = arrays
    return Dataset(
        name=described["name"],
        source=described["source"],
        digest=described["digest"],
        classes=tuple(described["classes"]),
        images_NHWC=images_NHWC,
        labels_N=labels_N,
        rows=rows,
        manifest={**described, "image_shape": list(shape)},
    )


def _shape(natural: tuple[int, int, int], image_size: int) -> tuple[int, int, int]:
    height, width, channels = natural
    return (image_size, image_size, channels) if image_size else (height, width, channels)


def _record_path(source: Source, data_dir: Path) -> Path:
    readable = re.sub(r"[^\w-]", "_", source.name, flags=re.ASCII)[:40]
    key = hashlib.sha256(source.source.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return data_dir / "manifests" / f"{readable}-{key}.json"
