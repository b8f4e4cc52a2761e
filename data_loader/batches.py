"""From memory-mapped images to batches: the order of an epoch, the share of a process, the read ahead.

Everything random is a function of the seed and the epoch or step alone. So there is no generator state to save, and a
run that resumes in the middle of an epoch sees the very batches that an uninterrupted one would have seen.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_loader import DataError

T = TypeVar("T")


class Batch(NamedTuple):
    """One process's share of a global batch."""

    images_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in a pass over `images` images; the rest waits for another epoch's order. At least one."""
    return max(1, images // batch_size)


def training_batches(
    images_NHWC: NDArray[np.uint8],
    labels_N: NDArray[np.int64],
    rows_N: NDArray[np.int64],
    *,
    batch_size: int,
    seed: int,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The batches of optimiser steps `steps`, counted from the start of training over all epochs.

    Every epoch has an order of its own. `batch_size` is global, each process gets an equal share.
    """
    if batch_size % world_size:
        raise DataError(
            f"batch_size {batch_size} cannot be shared equally by {world_size} processes; "
            f"give a multiple of {world_size}"
        )
    share = min(batch_size, len(rows_N)) // world_size
    if share == 0:
        raise DataError(f"{len(rows_N)} training images are too few for {world_size} processes; use fewer processes")
    present_epoch, order_N = -1, rows_N
    for step in steps:
        epoch, position = divmod(step, steps_per_epoch(len(rows_N), batch_size))
        if epoch != present_epoch:
            present_epoch, order_N = epoch, np.random.default_rng([seed, epoch]).permutation(rows_N)
        start = position * batch_size + rank * share
        rows = order_N[start : start + share]
        yield Batch(images_NHWC[rows], labels_N[rows])


def evaluation_batches(
    images_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64], rows_N: NDArray[np.int64], batch_size: int
) -> Iterator[Batch]:
    """All rows once, in order; the last batch may be smaller."""
    for start in range(0, len(rows_N), batch_size):
        rows = rows_N[start : start + batch_size]
        yield Batch(images_NHWC[rows], labels_N[rows])


def channel_statistics(
    images_NHWC: NDArray[np.uint8], rows_N: NDArray[np.int64]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's raw pixels (0-255) over the rows, from exact integer counts."""
    channels = images_NHWC.shape[3]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(rows_N), 4096):
        block = images_NHWC[rows_N[start : start + 4096]]
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    values = np.arange(256)
    total_C = counts.sum(axis=1)
    mean_C = counts @ values / total_C
    std_C = np.sqrt(counts @ values**2 / total_C - mean_C**2)
    return tuple(mean_C.tolist()), tuple(std_C.tolist())


def read_ahead(items: Iterator[T], depth: int = 4) -> Iterator[T]:
    """Yield `items`, made by a thread up to `depth` ahead; its errors are raised here, and leaving early ends it."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
    left = threading.Event()

    def put(item: T | BaseException | None) -> bool:
        while not left.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=fill, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join()
