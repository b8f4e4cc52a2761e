"""Ids of predictions: random, and with the predicted class in them, so that feedback needs no memory of the past."""

from __future__ import annotations

import os
import re

import numpy as np

_FORM = re.compile(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}-(0|[1-9][0-9]{0,5})")
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))


def new_ids(labels_N: np.ndarray) -> list[str]:
    """For each predicted class: 32 hexadecimal digits of a random UUID (version 4, RFC 9562), a hyphen, the class.

    uuid.uuid4 takes three times as long.
    """
    digits = os.urandom(16 * len(labels_N)).hex()
    return [
        f"{d[:12]}4{d[13:16]}{_VARIANT[d[16]]}{d[17:]}-{label}"
        for d, label in zip(map(digits.__getitem__, _slices(len(labels_N))), labels_N.tolist(), strict=True)
    ]


def predicted_class(prediction_id: str) -> int | None:
    """The class in an id; None for what is no id."""
    found = _FORM.fullmatch(prediction_id)
    return int(found[1]) if found else None


def _slices(count: int) -> list[slice]:
    return [slice(start, start + 32) for start in range(0, 32 * count, 32)]
