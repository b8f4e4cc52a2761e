"""What the predictions on a split say of a model, in the numbers and pictures that a run shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from models import pictures, scores

if TYPE_CHECKING:
    from models.onnx_model import OnnxClassifier


@dataclass(frozen=True)
class Judgement:
    """One model on one split."""

    scores: dict[str, float]
    """`models.scores.summary`."""
    confusion_matrix: Figure
    worst: np.ndarray
    """Positions of the wrongly classified images with the largest losses."""
    captions: list[str]
    """What each of them is and was taken for; empty where every image is right."""

    def metrics(self, split: str) -> dict[str, float]:
        """The scores under the names of a split's metrics."""
        return {f"{split}/{name}": value for name, value in self.scores.items()}

    def sentence(self, split: str, images: int) -> str:
        """The scores in a line, the accuracy first."""
        first, *others = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.scores.items())
        return f"{split.capitalize()} {first} on {images:,} images; {', '.join(others)}"


@dataclass(frozen=True)
class Duel:
    """Two models on the same images."""

    images: int
    accuracy: float
    champion_accuracy: float
    comparison: scores.Comparison

    def metrics(self, name: str) -> dict[str, float]:
        """Its numbers, under the name that the images have."""
        others = {f"comparison/{name}_{key}": value for key, value in self.comparison.metrics().items()}
        return {**self.accuracies(name), **others}

    def accuracies(self, name: str) -> dict[str, float]:
        """Those of its metrics that decide."""
        return {f"{name}/accuracy": self.accuracy, f"champion/{name}_accuracy": self.champion_accuracy}

    def sentence(self, name: str) -> str:
        """Its numbers in a line."""
        return f"{name}, {self.images:,} images: {self.comparison.sentence('the champion')}"


def duel(
    model: OnnxClassifier, champion: OnnxClassifier, images_NHWC: np.ndarray, rows_N: np.ndarray, labels_N: np.ndarray
) -> Duel:
    """Try two models on the images at `rows_N`, whose labels are labels_N."""
    model_NK, champion_NK = (each.logits_of(images_NHWC, rows_N) for each in (model, champion))
    accuracy, champion_accuracy = (scores.accuracy(logits_NK, labels_N) for logits_NK in (model_NK, champion_NK))
    return Duel(len(rows_N), accuracy, champion_accuracy, scores.compare(model_NK, champion_NK, labels_N))


def judge(logits_NK: np.ndarray, labels_N: np.ndarray, classes: Sequence[str]) -> Judgement:
    """Scores, confusion matrix and worst mistakes of `logits_NK`."""
    worst, captions = scores.worst_mistakes(logits_NK, labels_N, classes)
    matrix_KK = scores.confusion_matrix(logits_NK, labels_N)
    return Judgement(
        scores.summary(logits_NK, labels_N), pictures.confusion_matrix(matrix_KK, classes), worst, captions
    )
