"""What users tell of predictions afterwards: the true class, and what the prediction was worth. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson

from serving import RequestError
from serving.ids import predicted_class

MOST = 10_000
"""Entries of one request."""

KEYS = ("id", "label", "value")


@dataclass(frozen=True, slots=True)
class Feedback:
    """The truth of one prediction."""

    id: str
    label: str
    value: float | None
    correct: bool
    """Whether the predicted class, which the id holds, was this one."""


def parse(body: bytes, classes: tuple[str, ...]) -> list[Feedback]:
    """One {"id", "label", optional "value"}, or a list of them; RequestError at the first that is wrong."""
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if isinstance(message, dict):
        return [_entry(message, "", classes)]
    if not isinstance(message, list) or not 1 <= len(message) <= MOST:
        raise RequestError(f"expected an object with the keys {', '.join(KEYS)}, or a list of 1 to {MOST} of them")
    return [_entry(entry, f"feedback {place}: ", classes) for place, entry in enumerate(message)]


def _entry(entry: Any, where: str, classes: tuple[str, ...]) -> Feedback:
    if not isinstance(entry, dict) or not {"id", "label"} <= entry.keys() <= set(KEYS):
        raise RequestError(f"{where}expected an object with the keys id and label, and value if there is one")
    prediction_id, label, value = entry["id"], entry["label"], entry.get("value")
    predicted = predicted_class(prediction_id) if isinstance(prediction_id, str) else None
    if predicted is None or predicted >= len(classes):
        raise RequestError(f"{where}id: expected the id of a prediction, as the service's answer has it")
    if not isinstance(label, str) or label not in classes:
        received = f"received '{label[:100]}', " if isinstance(label, str) else ""
        raise RequestError(f"{where}label: {received}allowed: {_some(classes)}")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
        raise RequestError(f"{where}value: expected a finite number")
    return Feedback(prediction_id, label, None if value is None else float(value), classes[predicted] == label)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _some(classes: tuple[str, ...], most: int = 20) -> str:
    """The classes, or the first of many."""
    return ", ".join(classes[:most]) + (f" and {len(classes) - most} more" if len(classes) > most else "")
