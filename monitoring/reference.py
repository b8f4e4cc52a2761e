"""The reference: what the model made of the test split when it was trained, as one Parquet file on its run.

The same images and weights give the same bytes: no time, no path, nothing of the machine is in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monitoring import MonitoringError
from monitoring.observations import (
    CLASSES_KEY,
    STATISTICS,
    Observations,
    check_columns,
    class_names,
    from_table,
    shared_fields,
)

REFERENCE_FOLDER, REFERENCE_FILE = "monitoring", "reference.parquet"
REFERENCE = f"{REFERENCE_FOLDER}/{REFERENCE_FILE}"
"""Where a run keeps it among its artifacts."""

MOST_ROWS = 10_000
"""Of a larger test split so many images are taken, evenly: with them a share of the images is known to within 1 %."""

BATCH = 1024


@dataclass(frozen=True)
class Reference(Observations):
    """The test split as the model saw it."""

    labels_N: np.ndarray
    """int64: position of the true class in `classes`."""


def even_rows(count: int, most: int) -> np.ndarray:
    """At most `most` positions out of `count`, evenly spread, the first and the last among them."""
    return np.asarray(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def chosen_rows(count: int) -> np.ndarray:
    """Which of so many images the reference takes, by position in ascending order."""
    return even_rows(count, MOST_ROWS)


def make_reference(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    rows_M: np.ndarray,
    classes: tuple[str, ...],
    *,
    outputs: tuple[np.ndarray, np.ndarray],
    statistics: Callable[[np.ndarray], np.ndarray],
) -> Any:
    """The reference of the images at `rows_M`, as a pyarrow Table.

    outputs: what the model made of these images, logits_MK and embeddings_ME. statistics: uint8 images_NHWC ->
    statistics_NS, asked for batch by batch.
    """
    starts = range(0, len(rows_M), BATCH)
    statistics_MS = np.concatenate([statistics(images_NHWC[rows_M[start : start + BATCH]]) for start in starts])
    logits_MK, embeddings_ME = outputs
    return reference_table(statistics_MS, embeddings_ME, logits_MK, labels_N[rows_M], classes)


def reference_table(
    statistics_NS: np.ndarray,
    embeddings_NE: np.ndarray,
    logits_NK: np.ndarray,
    labels_N: np.ndarray,
    classes: tuple[str, ...],
) -> Any:
    """Arrays of the same N images as a pyarrow Table with the reference's schema."""
    import pyarrow

    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    probabilities_NK = np.exp(shifted_NK) / np.exp(shifted_NK).sum(axis=1, keepdims=True)
    columns: dict[str, Any] = {name: statistics_NS[:, place] for place, name in enumerate(STATISTICS)}
    columns["embedding"] = _lists(embeddings_NE)
    columns["class"] = [classes[place] for place in logits_NK.argmax(axis=1)]
    columns["confidence"] = probabilities_NK.max(axis=1).astype(np.float32)
    columns["probabilities"] = _lists(probabilities_NK.astype(np.float32))
    columns["label"] = [classes[place] for place in labels_N]
    metadata = {CLASSES_KEY: json.dumps(classes, ensure_ascii=False).encode()}
    return pyarrow.table(columns, schema=pyarrow.schema(_fields(), metadata=metadata))


def write_reference(table: Any, path: Path) -> Path:
    """Write the table to `path`, which gets its name when it is complete."""
    import pyarrow
    import pyarrow.parquet

    temporary = path.with_name(f".{path.name}.tmp")
    repeated = [name for name, kind in _fields() if kind == pyarrow.string()]
    pyarrow.parquet.write_table(table, temporary, compression="zstd", use_dictionary=repeated)
    return temporary.replace(path)


def read_reference(path: Path) -> Reference:
    """The reference in a file of `write_reference`."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise MonitoringError(f"reference '{path}' cannot be read: {reason}; give a {REFERENCE_FILE}") from None
    where = f"reference '{path}'"
    check_columns(table.schema, _fields(), where)
    classes = class_names(table.schema, where)
    if not len(table):
        raise MonitoringError(f"{where} holds no image; it is made by training with a test split that has some")
    seen = from_table(table, classes, where)
    labels = table["label"].to_pylist()
    if unknown := sorted({str(label) for label in labels} - set(classes)):
        raise MonitoringError(f"{where} holds the label '{unknown[0]}', which is none of {', '.join(classes)}")
    return Reference(**vars(seen), labels_N=np.array([classes.index(label) for label in labels], np.int64))


def _fields() -> list[tuple[str, Any]]:
    import pyarrow

    return [*shared_fields(), ("label", pyarrow.string())]


def _lists(values_NV: np.ndarray) -> Any:
    """A column of lists over the same memory."""
    import pyarrow

    rows, length = values_NV.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * length
    return pyarrow.ListArray.from_arrays(offsets, np.ascontiguousarray(values_NV).ravel())
