"""How far an image is from all that the reference holds: serving marks with it what to keep, monitoring ranks by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monitoring import MonitoringError
from monitoring.reference import read_reference

MOST_REFERENCE_ROWS = 2_000
FAR_PERCENTILE = 99.0

LEAST_SCALE = 0.01
"""Least standard deviation of a dimension, as a share of the largest one: a unit that is silent in the whole reference
would otherwise make an image infinitely far by waking at all."""

ROWS_AT_A_TIME = 1024
"""Rows of the table of distances in memory: 16 MB."""


class Distances:
    """Distance of embeddings to the nearest of the reference's, each dimension in its standard deviations there.

    Of a larger reference MOST_REFERENCE_ROWS rows are taken, evenly. `threshold` is the FAR_PERCENTILE-th percentile of
    the distances from each of those rows to the nearest other one; above it an image is far.
    """

    threshold: float

    def __init__(self, embeddings_NE: np.ndarray) -> None:
        if embeddings_NE.ndim != 2 or len(embeddings_NE) < 2 or not np.isfinite(embeddings_NE).all():
            raise MonitoringError(
                f"distances need a reference of at least two finite embeddings [N, E], received {embeddings_NE.shape}"
            )
        deviation_E = embeddings_NE.std(axis=0, dtype=np.float64)
        self._scale_E = np.maximum(deviation_E, LEAST_SCALE * deviation_E.max()) if deviation_E.max() > 0 else 1.0
        self._centre_E = embeddings_NE.mean(axis=0, dtype=np.float64)
        rows = np.linspace(0, len(embeddings_NE) - 1, min(len(embeddings_NE), MOST_REFERENCE_ROWS)).round()
        self._reference_RE = self._scaled(embeddings_NE[rows.astype(np.int64)])
        self._squares_R = (self._reference_RE**2).sum(axis=1)
        self.threshold = float(np.percentile(self._nearest(self._reference_RE, leave_out=True), FAR_PERCENTILE))

    def to(self, embeddings_NE: np.ndarray) -> np.ndarray:
        """float32 distances_N of embeddings float [N, E]; any N, also 0."""
        if embeddings_NE.ndim != 2 or embeddings_NE.shape[1] != self._reference_RE.shape[1]:
            raise MonitoringError(
                f"embeddings have shape {list(embeddings_NE.shape)}; "
                f"the reference's have {self._reference_RE.shape[1]} numbers each"
            )
        return self._nearest(self._scaled(embeddings_NE)).astype(np.float32)

    def _scaled(self, embeddings_NE: np.ndarray) -> np.ndarray:
        return np.asarray((embeddings_NE.astype(np.float64) - self._centre_E) / self._scale_E)

    def _nearest(self, scaled_NE: np.ndarray, leave_out: bool = False) -> np.ndarray:
        """float64 distances_N; with `leave_out` row n is not compared with row n of the reference."""
        nearest_N = np.empty(len(scaled_NE))
        for start in range(0, len(scaled_NE), ROWS_AT_A_TIME):
            part_BE = scaled_NE[start : start + ROWS_AT_A_TIME]
            squares_BR = (part_BE**2).sum(axis=1)[:, None] + self._squares_R - 2 * part_BE @ self._reference_RE.T
            if leave_out:
                places = np.arange(len(part_BE))
                squares_BR[places, start + places] = np.inf
            nearest_N[start : start + len(part_BE)] = squares_BR.min(axis=1)
        return np.asarray(np.sqrt(np.maximum(nearest_N, 0)))


def read_distances(path: Path) -> Distances:
    """How far images are from those of the reference in a file."""
    return Distances(read_reference(path).embeddings_NE)
