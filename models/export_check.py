"""Whether the exported forms of a network do what the network does, and what each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.onnx_model import OnnxClassifier
from models.scores import accuracy

LARGEST_DIFFERENCE = 1e-4
"""Between the logits of two forms: float32 sums in another order differ by about 1e-6."""

BATCH = 256
SPEED_IMAGES, SPEED_REPEATS = 2048, 5

Form = Callable[[np.ndarray], np.ndarray]
"""images_NHWC -> logits_NK."""


@dataclass(frozen=True)
class Agreement:
    """One form against the torch network on the same images."""

    images: int
    largest_difference: float
    other_class: int
    """Images for which the two name another class."""

    @property
    def holds(self) -> bool:
        return self.largest_difference <= LARGEST_DIFFERENCE and self.other_class == 0


def torch_form(network: Callable[..., torch.Tensor]) -> Form:
    """A torch module as a function of arrays."""

    def logits(images_NHWC: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(images_NHWC)).numpy())

    return logits


def program_form(path: Path) -> Form:
    """A saved torch.export program, loaded back."""
    return torch_form(torch.export.load(path).module())


def agreement(
    network: nn.Module, forms: Mapping[str, Form], images_NHWC: np.ndarray, rows: np.ndarray
) -> dict[str, Agreement]:
    """Compare each form with `network` on the given rows of `images_NHWC`, batch by batch."""
    reference = torch_form(network)
    largest, other = dict.fromkeys(forms, 0.0), dict.fromkeys(forms, 0)
    for start in range(0, len(rows), BATCH):
        batch_NHWC = np.array(images_NHWC[rows[start : start + BATCH]])
        expected_NK = reference(batch_NHWC)
        for name, form in forms.items():
            logits_NK = form(batch_NHWC)
            largest[name] = max(largest[name], float(np.abs(logits_NK - expected_NK).max()))
            other[name] += int((logits_NK.argmax(axis=1) != expected_NK.argmax(axis=1)).sum())
    return {name: Agreement(len(rows), largest[name], other[name]) for name in forms}


def costs(
    paths: Mapping[str, Path], images_NHWC: np.ndarray, labels_N: np.ndarray, rows: np.ndarray
) -> list[dict[str, str | int | float]]:
    """One row a file: its bytes, accuracy on the given rows and images/s, measured in turns (median of five)."""
    classifiers = {name: OnnxClassifier(path) for name, path in paths.items()}
    sample_NHWC = np.array(images_NHWC[rows[:SPEED_IMAGES]])
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(SPEED_REPEATS):
        for name, classifier in classifiers.items():
            started = time.perf_counter()
            classifier.logits(sample_NHWC)
            seconds[name].append(time.perf_counter() - started)
    table: list[dict[str, str | int | float]] = []
    for name, classifier in classifiers.items():
        parts = [classifier.logits(images_NHWC[rows[i : i + BATCH]]) for i in range(0, len(rows), BATCH)]
        table.append(
            {
                "model": name,
                "bytes": paths[name].stat().st_size,
                "accuracy": accuracy(np.concatenate(parts), labels_N[rows]),
                "images_per_s": len(sample_NHWC) / statistics.median(seconds[name]),
            }
        )
    return table
