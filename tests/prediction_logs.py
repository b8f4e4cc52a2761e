"""Prediction logs for tests, written as the contract says (docs/monitoring.md) and not by the service's code."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("time", pyarrow.timestamp("us", tz="UTC")),
        ("model", pyarrow.string()),
        ("version", pyarrow.string()),
        ("brightness", pyarrow.float32()),
        ("contrast", pyarrow.float32()),
        ("sharpness", pyarrow.float32()),
        ("clipped", pyarrow.float32()),
        ("embedding", pyarrow.list_(pyarrow.float32())),
        ("class", pyarrow.string()),
        ("confidence", pyarrow.float32()),
        ("probabilities", pyarrow.list_(pyarrow.float32())),
        ("latency_ms", pyarrow.float32()),
        ("image", pyarrow.string()),
        ("kept", pyarrow.string()),
    ]
)
FEEDBACK_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("time", pyarrow.timestamp("us", tz="UTC")),
        ("label", pyarrow.string()),
        ("value", pyarrow.float64()),
    ]
)


def log_rows(
    statistics_NS: np.ndarray,
    embeddings_NE: np.ndarray,
    logits_NK: np.ndarray,
    classes: Sequence[str],
    *,
    start: datetime = NOON,
    step_s: float = 1.0,
    model: str = "digits",
    version: str = "1",
) -> list[dict[str, Any]]:
    """One row an image, `step_s` apart from `start` on, none of them kept."""
    exponents_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True)).astype(np.float64)
    shares_NK = exponents_NK / exponents_NK.sum(axis=1, keepdims=True)
    return [
        {
            "id": f"{uuid.uuid4().hex}-{shares_K.argmax()}",
            "time": start + timedelta(seconds=step_s * row),
            "model": model,
            "version": version,
            **dict(zip(("brightness", "contrast", "sharpness", "clipped"), map(float, statistics_S), strict=True)),
            "embedding": embedding_E.tolist(),
            "class": classes[shares_K.argmax()],
            "confidence": float(shares_K.max()),
            "probabilities": shares_K.tolist(),
            "latency_ms": 1.5,
            "image": "",
            "kept": "",
        }
        for row, (statistics_S, embedding_E, shares_K) in enumerate(
            zip(statistics_NS, embeddings_NE, shares_NK, strict=True)
        )
    ]


def some_rows(count: int, classes: Sequence[str] = ("a", "b"), seed: int = 0, **others: Any) -> list[dict[str, Any]]:
    """Rows of random numbers, with embeddings of length 3."""
    random = np.random.default_rng(seed)
    statistics_NS, embeddings_NE = random.random((count, 4)), random.standard_normal((count, 3))
    return log_rows(statistics_NS, embeddings_NE, random.standard_normal((count, len(classes))), classes, **others)


def write_log(log: Path, rows: list[dict[str, Any]], classes: Sequence[str] = ("a", "b")) -> Path:
    """A file of predictions under the day of its first row."""
    schema = SCHEMA.with_metadata({"classes": json.dumps(classes)})
    return _write(log / "predictions", rows, schema)


def write_feedback(log: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of feedback under the day of its first row."""
    return _write(log / "feedback", rows, FEEDBACK_SCHEMA)


def _write(folder: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema) -> Path:
    path = folder / f"day={rows[0]['time'].date()}" / f"{uuid.uuid4().hex}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path
