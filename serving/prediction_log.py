"""The prediction log: a row for every image that was answered, feedback, and some of the images.

    LOG/predictions/day=YYYY-MM-DD/NAME.parquet
    LOG/feedback/day=YYYY-MM-DD/NAME.parquet
    LOG/images/day=YYYY-MM-DD/ID.png

A request only hands its arrays over. One thread makes rows of them, some seconds or a thousand rows at a time, and
writes them to this machine's disk; another brings the files to their place (serving.spool).
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from serving.feedback import Feedback
from serving.metrics import Metrics
from serving.model import ServedModel, probabilities
from serving.spool import Put, Spool

log = logging.getLogger("uvicorn.error")

PREDICTIONS, IMAGES, FEEDBACK = "predictions", "images", "feedback"
"""Folders of the log."""

SAMPLED, UNCERTAIN, FAR = "sampled", "uncertain", "far"
"""Why an image was kept. Of several rules the first is named, so that the sample is a fair one."""

FILE_ROWS, FILE_BYTES, FILE_AGE_S = 1_000, 32 * 2**20, 5.0
"""A file is written when so many rows or bytes of pixels wait for it, or when the first has waited so long."""

ASK_AGAIN_S = 10.0
"""After an image for which there was no room, none is encoded for so long."""

MOST_WAITING_BYTES = 256 * 2**20
"""Pixels and embeddings of answered requests in memory: reached only where the disk stands still."""

MOST_UNWRITTEN_BYTES = 64 * 2**20
"""Finished tables in memory for which the disk has no room."""


@dataclass(frozen=True)
class Rules:
    """Which images are kept."""

    keep_images: bool = True
    """False: none, whatever the others say."""
    share: float = 0.01
    """Of all images, chosen by chance."""
    below: float = 0.6
    """Those whose confidence is less."""


@dataclass(frozen=True)
class Place:
    """Where the log lies and how images become what lies there: all that this room does not know."""

    spool: Path
    """Folder for files that are not at their place yet; the same one after a restart."""
    put: Put
    statistics: Callable[[np.ndarray], np.ndarray]
    """uint8 images_NHWC -> float32 statistics_NS, columns as in `names`."""
    names: tuple[str, ...]
    encode: Callable[[np.ndarray], bytes]
    """uint8 image_HWC -> PNG."""
    room: Callable[[int], bool]
    """Whether an image of so many bytes may still be kept; then it counts."""


@dataclass(eq=False, slots=True)
class Answered:
    """What a request got."""

    ids: list[str]
    time_s: float
    """Since 1970."""
    latency_ms: float
    model: ServedModel
    images_NHWC: np.ndarray
    logits_NK: np.ndarray
    embeddings_NE: np.ndarray

    table = PREDICTIONS

    @property
    def rows(self) -> int:
        """Rows in the log."""
        return len(self.ids)

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self.images_NHWC.nbytes + self.embeddings_NE.nbytes


@dataclass(eq=False, slots=True)
class Told:
    """Feedback of one request."""

    entries: list[Feedback]
    time_s: float

    table, bytes = FEEDBACK, 0

    @property
    def rows(self) -> int:
        """Rows in the log."""
        return len(self.entries)


class PredictionLog:
    """The log of one worker. `add` and `add_feedback` never wait; they are for one thread, that of the event loop."""

    def __init__(self, place: Place, rules: Rules, metrics: Metrics) -> None:
        _write_parquet(feedback_table([]), io.BytesIO())  # imports for 0.3 s: now, and not while requests are answered
        self._place, self._rules, self._metrics = place, rules, metrics
        for folder in (PREDICTIONS, FEEDBACK):  # a rate sees the first row only if there was a 0 before it
            metrics.log_rows.labels(folder)
            metrics.log_dropped.labels(folder)
        for rule in (SAMPLED, UNCERTAIN, FAR):
            metrics.kept.labels(rule)
        self._spool = Spool(place.spool, place.put, metrics.log_unsent.set, metrics.log_failures.inc)
        self._worker = os.urandom(4).hex()
        self._files = 0
        self._queue: deque[Answered | Told] = deque()
        self._wake, self._closing = threading.Event(), False
        """Set when a file's worth waits: to wake the thread for each request would cost more than all it does."""
        self._added_bytes = self._taken_bytes = self._added_rows = self._taken_rows = 0
        self._unwritten: list[tuple[str, Any, str]] = []
        """Tables for which there was no room on the disk: folder, table, day."""
        self._lost_told = self._disk_failed = False
        self._room_again_s = 0.0
        """When to ask again whether there is room for an image (time.monotonic); 0: there was some."""
        self._thread = threading.Thread(target=self._work, name="prediction-log", daemon=True)
        self._thread.start()

    def add(self, answered: Answered) -> None:
        """Rows for the images of a request."""
        if self._added_bytes - self._taken_bytes > MOST_WAITING_BYTES:
            self._drop(PREDICTIONS, len(answered.ids), "this machine's disk does not keep up")
            return
        self._queue.append(answered)
        self._added(len(answered.ids), answered.bytes)

    def add_feedback(self, entries: list[Feedback], time_s: float) -> None:
        """Rows of feedback."""
        self._queue.append(Told(entries, time_s))
        self._added(len(entries), 0)

    def _added(self, rows: int, size: int) -> None:
        self._added_rows += rows
        self._added_bytes += size
        if self._added_rows - self._taken_rows >= FILE_ROWS or self._added_bytes - self._taken_bytes >= FILE_BYTES:
            self._wake.set()

    def close(self) -> None:
        """Write everything and bring it to its place."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        for folder, table, _ in self._unwritten:
            self._drop(folder, len(table), "this machine's disk takes nothing")
        self._spool.close()
        self.observe()

    def observe(self) -> None:
        """Set the gauge of what waits."""
        unwritten = sum(len(table) for _, table, _ in self._unwritten)
        self._metrics.log_waiting.set(self._added_rows - self._taken_rows + unwritten)

    # The thread that writes.

    def _work(self) -> None:
        while not self._closing:
            self._wake.wait(FILE_AGE_S)
            self._wake.clear()
            self._write_all()
        self._write_all()

    def _write_all(self) -> None:
        """Write what waits, in files of a limited size."""
        again, self._unwritten = self._unwritten, []
        for folder, table, day in again:
            self._write(folder, table, day)
        while self._queue:
            batch: list[Answered | Told] = []
            rows = size = 0
            while self._queue and rows < FILE_ROWS and size < FILE_BYTES:
                item = self._queue.popleft()
                batch.append(item)
                rows, size = rows + item.rows, size + item.bytes
            try:
                self._write_batch(batch)
            except Exception:  # a bug, which must not end the thread
                log.exception("prediction log: %d rows are lost", rows)
                for item in batch:
                    self._metrics.log_dropped.labels(item.table).inc(item.rows)
            self._taken_bytes += size
            self._taken_rows += rows
        self.observe()

    def _write_batch(self, batch: list[Answered | Told]) -> None:
        answered = [item for item in batch if isinstance(item, Answered)]
        for model in dict.fromkeys(each.model for each in answered):
            self._write_predictions(model, [each for each in answered if each.model is model])
        if told := [item for item in batch if isinstance(item, Told)]:
            self._write(FEEDBACK, feedback_table(told), _day(told[0].time_s))

    def _write_predictions(self, model: ServedModel, answered: list[Answered]) -> None:
        images_NHWC = np.concatenate([each.images_NHWC for each in answered])
        logits_NK = np.concatenate([each.logits_NK for each in answered])
        embeddings_NE = np.concatenate([each.embeddings_NE for each in answered])
        ids = [each_id for each in answered for each_id in each.ids]
        sizes = [len(each.ids) for each in answered]
        times_us = np.repeat([int(each.time_s * 1e6) for each in answered], sizes)
        latencies_ms = np.repeat([each.latency_ms for each in answered], sizes)
        statistics_NS = self._place.statistics(images_NHWC)
        shares_NK = probabilities(logits_NK)
        day = _day(answered[0].time_s)
        kept = self._keep(model, ids, images_NHWC, shares_NK.max(axis=1), embeddings_NE, day)
        table = predictions_table(
            ids=ids,
            times_us=times_us,
            model=model,
            names=self._place.names,
            statistics_NS=statistics_NS,
            embeddings_NE=embeddings_NE,
            labels_N=logits_NK.argmax(axis=1),
            shares_NK=shares_NK,
            latencies_ms=latencies_ms,
            kept=kept,
        )
        self._metrics.measured.inc(len(ids))
        for name, total in zip(self._place.names, statistics_NS.sum(axis=0, dtype=np.float64).tolist(), strict=True):
            self._metrics.statistics.labels(name).inc(total)
        self._write(PREDICTIONS, table, day)

    def _keep(
        self,
        model: ServedModel,
        ids: list[str],
        images_NHWC: np.ndarray,
        confidences_N: np.ndarray,
        embeddings_NE: np.ndarray,
        day: str,
    ) -> list[tuple[str, str]]:
        """(name under the log, rule) of each image that was kept, or two empty strings."""
        distances_N = np.zeros(len(ids))
        if model.distances is not None:
            threshold = max(model.distances.threshold, 1e-6)  # 0 for a reference of equal images
            distances_N = model.distances.to(embeddings_NE).astype(np.float64) / threshold
            self._metrics.compared.inc(len(ids))
            self._metrics.distances.inc(float(distances_N.sum()))
            self._metrics.far.inc(int((distances_N > 1).sum()))
        kept = [("", "")] * len(ids)
        if not self._rules.keep_images:
            return kept
        sampled_N = np.array([int(each[:8], 16) for each in ids]) < self._rules.share * 2**32
        wanted = {SAMPLED: sampled_N, UNCERTAIN: confidences_N < self._rules.below, FAR: distances_N > 1}
        for place in np.flatnonzero(np.logical_or.reduce(list(wanted.values()))).tolist():
            rule = next(rule for rule, wanted_N in wanted.items() if wanted_N[place])
            name = f"{IMAGES}/{day}/{ids[place]}.png"
            if self._keep_one(name, images_NHWC[place]):
                self._metrics.kept.labels(rule).inc()
                kept[place] = name, rule
        return kept

    def _keep_one(self, name: str, image_HWC: np.ndarray) -> bool:
        if self._spool.full or time.monotonic() < self._room_again_s:
            return False
        data = self._place.encode(image_HWC)
        if not self._place.room(len(data)):
            if not self._room_again_s:
                log.warning("prediction log: keep_mb is used up; no image is kept until there is room again")
            self._room_again_s = time.monotonic() + ASK_AGAIN_S
            return False
        try:
            self._spool.write(name, partial(_write_bytes, data))
        except OSError as error:
            self._failed(error)
            return False
        self._room_again_s = 0.0
        self._metrics.kept_bytes.inc(len(data))
        return True

    def _write(self, folder: str, table: Any, day: str) -> None:
        """Write a table, or remember it while there is no room for it."""
        if self._spool.full:
            self._drop(folder, len(table), "the log's place is away for too long, and too much waits on this disk")
            return
        self._files += 1
        moment = datetime.now(UTC)
        name = f"{folder}/{day}/{moment:%H%M%S}-{self._worker}-{self._files:06}.parquet"
        try:
            self._spool.write(name, partial(_write_parquet, table))
        except OSError as error:
            self._failed(error)
            self._unwritten.append((folder, table, day))
            while sum(table.nbytes for _, table, _ in self._unwritten) > MOST_UNWRITTEN_BYTES:
                lost, table, _ = self._unwritten.pop(0)
                self._drop(lost, len(table), "this machine's disk takes nothing")
            return
        self._metrics.log_rows.labels(folder).inc(len(table))
        if self._disk_failed:
            log.info("prediction log: this machine's disk takes files again")
        self._disk_failed = False

    def _failed(self, error: OSError) -> None:
        self._metrics.log_failures.inc()
        if not self._disk_failed:
            log.warning("prediction log: cannot write to %s: %s", self._spool.folder, error.strerror or error)
        self._disk_failed = True

    def _drop(self, folder: str, rows: int, reason: str) -> None:
        self._metrics.log_dropped.labels(folder).inc(rows)
        if not self._lost_told:
            log.error("prediction log: rows are lost (serving_log_dropped_rows_total counts them): %s", reason)
        self._lost_told = True


def predictions_table(
    *,
    ids: list[str],
    times_us: np.ndarray,
    model: ServedModel,
    names: tuple[str, ...],
    statistics_NS: np.ndarray,
    embeddings_NE: np.ndarray,
    labels_N: np.ndarray,
    shares_NK: np.ndarray,
    latencies_ms: np.ndarray,
    kept: list[tuple[str, str]],
) -> Any:
    """The rows as a pyarrow Table; its metadata name the classes, in the order of `probabilities`."""
    import pyarrow as pa

    columns = {
        "id": pa.array(ids, pa.string()),
        "time": pa.array(times_us.astype("datetime64[us]"), pa.timestamp("us", tz="UTC")),
        "model": pa.array([model.name] * len(ids), pa.string()),
        "version": pa.array([model.version] * len(ids), pa.string()),
        **{
            name: pa.array(np.ascontiguousarray(values_N))
            for name, values_N in zip(names, statistics_NS.T, strict=True)
        },
        "embedding": _lists(embeddings_NE),
        "class": pa.array([model.classes[label] for label in labels_N.tolist()], pa.string()),
        "confidence": pa.array(shares_NK.max(axis=1).astype(np.float32)),
        "probabilities": _lists(shares_NK),
        "latency_ms": pa.array(latencies_ms.astype(np.float32)),
        "image": pa.array([name for name, _ in kept], pa.string()),
        "kept": pa.array([rule for _, rule in kept], pa.string()),
    }
    return pa.table(columns).replace_schema_metadata({"classes": json.dumps(model.classes, ensure_ascii=False)})


def feedback_table(told: list[Told]) -> Any:
    """The rows as a pyarrow Table."""
    import pyarrow as pa

    entries = [(entry, each.time_s) for each in told for entry in each.entries]
    times_us = np.array([int(time_s * 1e6) for _, time_s in entries], np.int64)
    return pa.table(
        {
            "id": pa.array([entry.id for entry, _ in entries], pa.string()),
            "time": pa.array(times_us.astype("datetime64[us]"), pa.timestamp("us", tz="UTC")),
            "label": pa.array([entry.label for entry, _ in entries], pa.string()),
            "value": pa.array([entry.value for entry, _ in entries], pa.float64()),
        }
    )


def _lists(values_NX: np.ndarray) -> Any:
    """A column of lists over the same memory."""
    import pyarrow as pa

    rows, length = values_NX.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * length
    return pa.ListArray.from_arrays(
        offsets, np.ascontiguousarray(values_NX, np.float32).ravel(), type=pa.list_(pa.float32())
    )


def _write_parquet(table: Any, path: Path | BinaryIO) -> None:
    import pyarrow.parquet

    # A dictionary of all the numbers would take seven times as long, and more room.
    repeated = [name for name in ("model", "version", "class", "kept", "label") if name in table.column_names]
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=repeated)


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _day(time_s: float) -> str:
    return f"day={datetime.fromtimestamp(time_s, UTC):%Y-%m-%d}"
