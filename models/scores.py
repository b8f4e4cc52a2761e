"""How good predictions are: numbers from `logits_NK` (float, N images, K classes) and `labels_N` (int).

NumPy alone, in float64, so that training, evaluation and serving give the same digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models import ModelError

CALIBRATION_BINS = 15
"""Equal-width bins of the confidence: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017)."""


def log_probabilities(logits_NK: np.ndarray) -> np.ndarray:
    """Log-softmax over the classes, without overflow for logits of any size."""
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    return np.asarray(shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True)))


def probabilities(logits_NK: np.ndarray) -> np.ndarray:
    """Softmax over the classes; every row sums to one."""
    return np.asarray(np.exp(log_probabilities(logits_NK)))


def accuracy(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of images whose largest logit is at their label; the first class wins a tie."""
    _check(logits_NK, labels_N)
    return float((logits_NK.argmax(axis=1) == labels_N).mean())


def losses(logits_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Cross-entropy of each image in nats, shape [N]."""
    _check(logits_NK, labels_N)
    return np.asarray(-log_probabilities(logits_NK)[np.arange(len(labels_N)), labels_N])


def log_loss(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean cross-entropy in nats."""
    return float(losses(logits_NK, labels_N).mean())


def confusion_matrix(logits_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Number of images by true class (row) and predicted class (column), int64 [K, K]."""
    _check(logits_NK, labels_N)
    classes = logits_NK.shape[1]
    cells_N = labels_N * classes + logits_NK.argmax(axis=1)
    return np.asarray(np.bincount(cells_N, minlength=classes * classes).reshape(classes, classes))


def precision_recall_f1(matrix_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class from a confusion matrix; 0 where nothing is below the line."""
    right_K, actual_K, predicted_K = np.diag(matrix_KK), matrix_KK.sum(axis=1), matrix_KK.sum(axis=0)

    def ratio(above_K: np.ndarray, below_K: np.ndarray) -> np.ndarray:
        return np.asarray(np.divide(above_K, below_K, out=np.zeros(len(below_K)), where=below_K > 0))

    return ratio(right_K, predicted_K), ratio(right_K, actual_K), ratio(2 * right_K, actual_K + predicted_K)


def macro_f1(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean F1 over the classes that occur among the labels or the predictions (scikit-learn's default)."""
    matrix_KK = confusion_matrix(logits_NK, labels_N)
    occurs_K = (matrix_KK.sum(axis=0) + matrix_KK.sum(axis=1)) > 0
    return float(precision_recall_f1(matrix_KK)[2][occurs_K].mean())


@dataclass(frozen=True)
class Reliability:
    """Images grouped by the confidence of their prediction: bin b holds confidences in (b/B, (b+1)/B]."""

    images_B: np.ndarray
    confidence_B: np.ndarray
    """Mean probability of the predicted class; 0 in an empty bin."""
    accuracy_B: np.ndarray

    @property
    def calibration_error(self) -> float:
        """Mean distance between confidence and accuracy, each bin weighted by its images."""
        return float((self.images_B * np.abs(self.confidence_B - self.accuracy_B)).sum() / self.images_B.sum())


def reliability(logits_NK: np.ndarray, labels_N: np.ndarray, bins: int = CALIBRATION_BINS) -> Reliability:
    """Confidence against accuracy in equal-width bins."""
    _check(logits_NK, labels_N)
    confidence_N = probabilities(logits_NK).max(axis=1)
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    images_B = np.bincount(bin_N, minlength=bins)
    at_least_one_B = np.maximum(images_B, 1)
    return Reliability(
        images_B=images_B,
        confidence_B=np.bincount(bin_N, confidence_N, bins) / at_least_one_B,
        accuracy_B=np.bincount(bin_N, logits_NK.argmax(axis=1) == labels_N, bins) / at_least_one_B,
    )


def calibration_error(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Expected calibration error of Guo et al. 2017 with 15 bins."""
    return reliability(logits_NK, labels_N).calibration_error


def loss_and_accuracy(split: str, logits_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """The two numbers that each epoch is judged by, under the names of a split's metrics."""
    return {f"{split}/loss": log_loss(logits_NK, labels_N), f"{split}/accuracy": accuracy(logits_NK, labels_N)}


def summary(logits_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """The four numbers that describe a model on a split."""
    return {
        "accuracy": accuracy(logits_NK, labels_N),
        "macro_f1": macro_f1(logits_NK, labels_N),
        "log_loss": log_loss(logits_NK, labels_N),
        "calibration_error": calibration_error(logits_NK, labels_N),
    }


def per_class(
    logits_NK: np.ndarray, labels_N: np.ndarray, classes: tuple[str, ...]
) -> list[dict[str, str | int | float]]:
    """One row a class, in the order of `classes`: its name, number of images, precision, recall and F1."""
    matrix_KK = confusion_matrix(logits_NK, labels_N)
    columns = zip(classes, matrix_KK.sum(axis=1), *precision_recall_f1(matrix_KK), strict=True)
    return [
        {
            "class": name,
            "images": int(images),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
        }
        for name, images, precision, recall, f1 in columns
    ]


def worst_mistakes(
    logits_NK: np.ndarray, labels_N: np.ndarray, classes: Sequence[str], most: int = 40
) -> tuple[np.ndarray, list[str]]:
    """Row numbers of at most `most` wrongly classified images, the largest loss first, and a caption for each."""
    predicted_N = logits_NK.argmax(axis=1)
    losses_N = losses(logits_NK, labels_N)
    wrong = np.flatnonzero(predicted_N != labels_N)
    rows = wrong[np.argsort(-losses_N[wrong], kind="stable")][:most]
    return rows, [f"{classes[labels_N[row]]} → {classes[predicted_N[row]]}" for row in rows]


def top_k(logits_NK: np.ndarray, k: int) -> np.ndarray:
    """The `k` classes with the largest logits of each image, the largest first, int64 [N, k]."""
    if k == 1:
        return np.asarray(logits_NK.argmax(axis=1)[:, None])
    return np.argsort(-logits_NK, axis=1, kind="stable")[:, :k]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images."""

    accuracy_difference: float
    """Accuracy of the first model less that of the second."""
    only_first: int
    """Images that only the first model gets right."""
    only_second: int
    p_value: float
    """Exact two-sided McNemar test: the chance of a split at least this uneven if both were equally good."""

    def metrics(self) -> dict[str, float]:
        """Its numbers by name, the second model being the baseline."""
        return {
            "accuracy_difference": self.accuracy_difference,
            "only_this_right": self.only_first,
            "only_baseline_right": self.only_second,
            "mcnemar_p": self.p_value,
        }

    def sentence(self, baseline: str) -> str:
        """Its numbers in a line."""
        return (
            f"against {baseline}: accuracy {self.accuracy_difference:+.4f}; only this model right on {self.only_first} "
            f"images, only the baseline on {self.only_second}; McNemar p = {self.p_value:.3g}"
        )


def compare(first_NK: np.ndarray, second_NK: np.ndarray, labels_N: np.ndarray) -> Comparison:
    """Which of two models gets more of the same images right, and whether that may be chance."""
    _check(first_NK, labels_N)
    _check(second_NK, labels_N)
    first_right_N = first_NK.argmax(axis=1) == labels_N
    second_right_N = second_NK.argmax(axis=1) == labels_N
    only_first = int((first_right_N & ~second_right_N).sum())
    only_second = int((~first_right_N & second_right_N).sum())
    difference = accuracy(first_NK, labels_N) - accuracy(second_NK, labels_N)
    return Comparison(difference, only_first, only_second, mcnemar_p_value(only_first, only_second))


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided binomial test of `only_first` heads in `only_first + only_second` tosses of a fair coin.

    Exact in whole numbers (McNemar 1947 with the exact distribution), so right for a handful of images too.
    """
    tosses = only_first + only_second
    ways = term = 1
    for heads in range(min(only_first, only_second)):
        term = term * (tosses - heads) // (heads + 1)
        ways += term
    return min(1.0, float(2 * ways / 2**tosses))


def _check(logits_NK: np.ndarray, labels_N: np.ndarray) -> None:
    if logits_NK.ndim != 2 or labels_N.shape != logits_NK.shape[:1] or len(labels_N) == 0:
        raise ModelError(
            f"scores need logits [N, K] and labels [N] of at least one image, received shapes "
            f"{list(logits_NK.shape)} and {list(labels_N.shape)}"
        )
    if labels_N.min() < 0 or labels_N.max() >= logits_NK.shape[1]:
        raise ModelError(
            f"labels must lie in 0..{logits_NK.shape[1] - 1} (one logit a class), received "
            f"{labels_N.min()}..{labels_N.max()}"
        )
