"""Reads the prediction log: a window of it by time, model and version, and the feedback that came for its rows.

LOG/predictions/day=YYYY-MM-DD/NAME.parquet, LOG/images/day=YYYY-MM-DD/ID.png, LOG/feedback/day=YYYY-MM-DD/NAME.parquet,
in a folder or on S3: who reads hands in a `Store`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from monitoring import MonitoringError
from monitoring.observations import Observations, check_columns, class_names, from_table, shared_fields

PREDICTIONS, IMAGES, FEEDBACK = "predictions", "images", "feedback"


class Store(Protocol):
    """Files below the log's address, by names with / in them."""

    def names(self, folder: str) -> Iterable[str]:
        """The files below a folder of the log, and none where it does not exist."""

    def read(self, name: str) -> bytes:
        """A file's content."""


@dataclass(frozen=True)
class Window(Observations):
    """Rows of the log in order of time."""

    ids: tuple[str, ...]
    times_N: np.ndarray
    """datetime64[us] in UTC."""
    models: tuple[str, ...]
    """Names of models, each once, in order of name."""
    versions: tuple[str, ...]
    images: tuple[str, ...]
    """For each row the name of its kept image in the log, or ""."""
    total: int
    """Rows that there were, of which these are an even choice; the same as the length where all were taken."""
    kept: tuple[str, ...]
    """Why it was kept: "", "sampled", "uncertain" or "far"."""

    def counted(self) -> int:
        return self.total


@dataclass(frozen=True)
class Feedback:
    """What users said of some rows of a window, the last word of each."""

    rows_F: np.ndarray
    """int64: positions in the window."""
    labels: tuple[str, ...]
    """True class as the user named it, which need not be one of the model's."""
    values_F: np.ndarray
    """float64: business value; NaN where none was given."""
    right_F: np.ndarray
    """Whether the prediction was right."""

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions; None where there is no feedback."""
        return float(self.right_F.mean()) if len(self.right_F) else None

    def label_of_row(self) -> dict[int, str]:
        """The true class by position in the window."""
        return dict(zip(self.rows_F.tolist(), self.labels, strict=True))


def read_window(
    store: Store,
    since: datetime,
    until: datetime,
    *,
    model: str = "",
    version: str = "",
    with_image: bool = False,
    or_ids: Collection[str] = (),
    most: int = 0,
) -> Window:
    """The rows with since <= time < until of one model and version, "" being any.

    With `with_image` those alone whose image was kept, or whose id is one of `or_ids`.

    Where there are more than `most` rows an even choice of them is taken, at most that many; 0: all.

    Refuses rows of several class lists or lengths of embeddings: they cannot be compared. A window without rows has
    length 0 and, where no file told them, no classes.
    """
    import pyarrow
    import pyarrow.compute

    tables: list[Any] = []
    classes_of: dict[tuple[str, ...], str] = {}
    total, step = 0, 1
    names_asked = pyarrow.array(or_ids, pyarrow.string())
    for name, table in _tables(store, PREDICTIONS, since, until, _prediction_fields()):
        wanted = _in_time(table, since, until)
        for column, value in (("model", model), ("version", version)):
            if value:
                wanted = pyarrow.compute.and_(wanted, pyarrow.compute.equal(table[column], value))
        if with_image:
            kept = pyarrow.compute.not_equal(table["image"], "")
            named = pyarrow.compute.is_in(table["id"], value_set=names_asked)
            wanted = pyarrow.compute.and_(wanted, pyarrow.compute.or_(kept, named))
        rows = table.filter(wanted)
        if len(rows):
            classes_of[class_names(table.schema, f"log file {name}")] = name
            tables.append(_thinned(rows.replace_schema_metadata(), step))
            total += len(rows)
        while most and sum(map(len, tables)) > most:
            step *= 2
            tables = [_thinned(each, step) for each in tables]
    if len(classes_of) > 1:
        first, second = list(classes_of.values())[:2]
        raise MonitoringError(f"log files {first} and {second} name different classes; give the version to look at")
    empty = pyarrow.schema(_prediction_fields()).empty_table()
    # promote_options: writers differ in what they call the items of a list.
    table = pyarrow.concat_tables(tables, promote_options="permissive").sort_by("time") if tables else empty
    classes = next(iter(classes_of), ())
    return Window(
        **vars(from_table(table, classes, "the log")),
        ids=tuple(table["id"].to_pylist()),
        times_N=table["time"].to_numpy().astype("datetime64[us]"),
        models=tuple(sorted(set(table["model"].to_pylist()))),
        versions=tuple(sorted(set(table["version"].to_pylist()))),
        images=tuple(table["image"].to_pylist()),
        total=total,
        kept=tuple(table["kept"].to_pylist()),
    )


def _thinned(table: Any, step: int) -> Any:
    """One row of `step` of them, the same ones whatever file they are in: by a hash of the id."""
    if step == 1:
        return table
    return table.filter([crc32(name.encode()) % step == 0 for name in table["id"].to_pylist()])


def contents(store: Store, since: datetime, until: datetime) -> dict[tuple[str, str], int]:
    """How many rows of each model and version there are with since <= time < until."""
    counts: Counter[tuple[str, str]] = Counter()
    for _, table in _tables(store, PREDICTIONS, since, until, _prediction_fields()):
        rows = table.filter(_in_time(table, since, until))
        counts.update(zip(rows["model"].to_pylist(), rows["version"].to_pylist(), strict=True))
    return dict(sorted(counts.items()))


def told_ids(store: Store, since: datetime) -> list[str]:
    """The ids of all feedback that came from `since` on, some more than once."""
    tables = _tables(store, FEEDBACK, since, datetime.max.replace(tzinfo=UTC), _feedback_fields())
    return [name for _, table in tables for name in table["id"].to_pylist()]


def read_feedback(store: Store, window: Window) -> Feedback:
    """The feedback for the window's rows, whenever it came after them; the latest where there are several."""
    latest: dict[str, tuple[datetime, str, float | None]] = {}
    position = {name: row for row, name in enumerate(window.ids)}
    if position:
        since, until = window.times_N[0].item().replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
        for _, table in _tables(store, FEEDBACK, since, until, _feedback_fields()):
            for said in table.to_pylist():
                known = latest.get(said["id"])
                if said["id"] in position and (known is None or said["time"] >= known[0]):
                    latest[said["id"]] = (said["time"], said["label"], said["value"])
    rows = sorted((position[name], *said) for name, said in latest.items())
    labels = tuple(label for _, _, label, _ in rows)
    return Feedback(
        rows_F=np.array([row for row, *_ in rows], np.int64),
        labels=labels,
        values_F=np.array([np.nan if value is None else value for *_, value in rows], np.float64),
        right_F=np.array([window.classes[window.predicted_N[row]] == label for row, _, label, _ in rows], np.bool_),
    )


def _tables(
    store: Store, folder: str, since: datetime, until: datetime, fields: list[tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """Name and table of each finished file of the days asked for, in order of name.

    A file lies under the day on which it was begun or written, and may hold rows of the day before or after.
    """
    import pyarrow
    import pyarrow.parquet

    first = (since - timedelta(days=1)).date().isoformat()
    last = (until + timedelta(days=1)).date().isoformat() if until.year < datetime.max.year else "9999-12-31"
    for name in sorted(store.names(folder)):
        *_, day, file = ("", "", *name.split("/"))
        if not file.endswith(".parquet") or file.startswith(".") or not first <= day.removeprefix("day=") <= last:
            continue
        try:
            source = pyarrow.parquet.ParquetFile(BytesIO(store.read(name)))
            check_columns(source.schema_arrow, fields, f"log file {name}")
            yield name, source.read([column for column, _ in fields])
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise MonitoringError(f"log file {name} cannot be read: {reason}; remove or repair it") from None


def _in_time(table: Any, since: datetime, until: datetime) -> Any:
    import pyarrow
    import pyarrow.compute

    kind = table["time"].type
    after = pyarrow.compute.greater_equal(table["time"], pyarrow.scalar(since, kind))
    return pyarrow.compute.and_(after, pyarrow.compute.less(table["time"], pyarrow.scalar(until, kind)))


def _prediction_fields() -> list[tuple[str, Any]]:
    import pyarrow

    text = pyarrow.string()
    return [
        ("id", text),
        ("time", pyarrow.timestamp("us", tz="UTC")),
        ("model", text),
        ("version", text),
        *shared_fields(),
        ("latency_ms", pyarrow.float32()),
        ("image", text),
        ("kept", text),
    ]


def _feedback_fields() -> list[tuple[str, Any]]:
    import pyarrow

    time = pyarrow.timestamp("us", tz="UTC")
    return [("id", pyarrow.string()), ("time", time), ("label", pyarrow.string()), ("value", pyarrow.float64())]
