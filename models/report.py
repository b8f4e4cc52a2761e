"""What the predictions on a split say of a model, in the numbers and pictures that a run shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from models import pictures, scores


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


def judge(logits_NK: np.ndarray, labels_N: np.ndarray, classes: Sequence[str]) -> Judgement:
    """Scores, confusion matrix and worst mistakes of `logits_NK`."""
    worst, captions = scores.worst_mistakes(logits_NK, labels_N, classes)
    matrix_KK = scores.confusion_matrix(logits_NK, labels_N)
    return Judgement(
        scores.summary(logits_NK, labels_N), pictures.confusion_matrix(matrix_KK, classes), worst, captions
    )
