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


def make_reference(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    rows_N: np.ndarray,
    classes: tuple[str, ...],
    *,
    outputs: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    statistics: Callable[[np.ndarray], np.ndarray],
) -> Any:
    """The reference of the images at `rows_N` (at most MOST_ROWS of them), as a pyarrow Table.

    outputs: uint8 images_NHWC -> (logits_NK, embeddings_NE). statistics: uint8 images_NHWC -> statistics_NS.
    """
    rows_N = rows_N[even_rows(len(rows_N), MOST_ROWS)]
    parts = []
    for start in range(0, len(rows_N), BATCH):
        batch_NHWC = images_NHWC[rows_N[start : start + BATCH]]
        parts.append((statistics(batch_NHWC), *outputs(batch_NHWC)))
    statistics_NS, logits_NK, embeddings_NE = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return reference_table(statistics_NS, embeddings_NE, logits_NK, labels_N[rows_N], classes)


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
    columns["embedding"] = list(embeddings_NE)
    columns["class"] = [classes[place] for place in logits_NK.argmax(axis=1)]
    columns["confidence"] = probabilities_NK.max(axis=1).astype(np.float32)
    columns["probabilities"] = list(probabilities_NK.astype(np.float32))
    columns["label"] = [classes[place] for place in labels_N]
    metadata = {CLASSES_KEY: json.dumps(classes, ensure_ascii=False).encode()}
    return pyarrow.table(columns, schema=pyarrow.schema(_fields(), metadata=metadata))


def write_reference(table: Any, path: Path) -> Path:
    """Write the table to `path`, which gets its name when it is complete."""
    import pyarrow.parquet

    temporary = path.with_name(f".{path.name}.tmp")
    pyarrow.parquet.write_table(table, temporary, compression="zstd")
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
