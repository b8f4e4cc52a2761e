"""What is known of each predicted image, as arrays: the columns that the prediction log and the reference share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monitoring import MonitoringError

STATISTICS = ("brightness", "contrast", "sharpness", "clipped")
"""Names of an image's statistics, in this order: pixel values 0..255, the last a share of the pixels."""

CLASSES_KEY = b"classes"
"""Key of the Parquet schema's metadata: the class names as a JSON list, in the order of `probabilities`."""


@dataclass(frozen=True)
class Observations:
    """N predicted images."""

    classes: tuple[str, ...]
    statistics_NS: np.ndarray
    """float32, in the order of STATISTICS."""
    embeddings_NE: np.ndarray
    """float32: what the network's last linear layer gets."""
    predicted_N: np.ndarray
    """int64: position of the predicted class in `classes`."""
    confidence_N: np.ndarray
    """float32: probability of the predicted class."""
    probabilities_NK: np.ndarray
    """float32."""

    def __len__(self) -> int:
        return len(self.predicted_N)

    def counted(self) -> int:
        """How many images they stand for: more than there are where only some were read."""
        return len(self)

    def rows(self, rows: np.ndarray) -> Observations:
        """Some of them, by position."""
        return Observations(
            self.classes,
            self.statistics_NS[rows],
            self.embeddings_NE[rows],
            self.predicted_N[rows],
            self.confidence_N[rows],
            self.probabilities_NK[rows],
        )


def shared_fields() -> list[tuple[str, Any]]:
    """Name and Arrow type of the shared columns, in their order in both files."""
    import pyarrow

    floats = pyarrow.list_(pyarrow.float32())
    return [
        *((name, pyarrow.float32()) for name in STATISTICS),
        ("embedding", floats),
        ("class", pyarrow.string()),
        ("confidence", pyarrow.float32()),
        ("probabilities", floats),
    ]


def check_columns(schema: Any, wanted: Sequence[tuple[str, Any]], where: str) -> None:
    """Refuse a file without one of the columns, or with another type in it."""
    for name, kind in wanted:
        if name not in schema.names:
            raise MonitoringError(f"{where} has no column '{name}'; its columns: {', '.join(schema.names)}")
        received = schema.field(name).type
        if not (received == kind or _same_list(received, kind)):
            raise MonitoringError(f"{where}: column '{name}' is {received}; expected {kind}")


def class_names(schema: Any, where: str) -> tuple[str, ...]:
    """The class names in a file's metadata."""
    try:
        names = json.loads((schema.metadata or {})[CLASSES_KEY])
    except (KeyError, ValueError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise MonitoringError(f"{where} does not name its classes: the schema's metadata has no JSON list `classes`")
    return tuple(names)


def from_table(table: Any, classes: tuple[str, ...], where: str) -> Observations:
    """The arrays of a table with the shared columns; refuses rows that do not fit each other or the classes."""
    positions = {name: position for position, name in enumerate(classes)}
    names = table["class"].to_pylist()
    unknown = sorted({str(name) for name in names} - positions.keys())
    if unknown:
        raise MonitoringError(f"{where} holds the class '{unknown[0]}', which is none of {', '.join(classes)}")
    probabilities_NK = matrix(table["probabilities"], f"{where}: probabilities")
    if len(table) and probabilities_NK.shape[1] != len(classes):
        raise MonitoringError(f"{where}: {probabilities_NK.shape[1]} probabilities a row for {len(classes)} classes")
    columns = [table[name].to_numpy() for name in STATISTICS]
    return Observations(
        classes,
        np.stack(columns, axis=1).astype(np.float32),
        matrix(table["embedding"], f"{where}: embedding"),
        np.array([positions[name] for name in names], np.int64),
        table["confidence"].to_numpy().astype(np.float32),
        probabilities_NK.reshape(len(table), len(classes)),
    )


def matrix(column: Any, where: str) -> np.ndarray:
    """float32 [N, length of every list] of a column of lists; a row without a list is all NaN."""
    import pyarrow

    if isinstance(column, pyarrow.ChunkedArray):
        column = column.combine_chunks()
    there_N = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = sorted(set(column.value_lengths().drop_null().to_pylist()))
    if len(lengths) > 1:
        raise MonitoringError(
            f"{where} has rows of {', '.join(map(str, lengths[:5]))} numbers; rows of several models? give the version"
        )
    values_NE = np.full((len(column), lengths[0] if lengths else 0), np.nan, np.float32)
    values_NE[there_N] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, max(1, values_NE.shape[1]))
    return values_NE


def _same_list(received: Any, expected: Any) -> bool:
    """Lists of the same type, whatever their items are called in the file."""
    import pyarrow

    both = pyarrow.types.is_list(received) and pyarrow.types.is_list(expected)
    return bool(both and received.value_type == expected.value_type)
