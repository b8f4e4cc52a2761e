"""Which images to label next: those that the model is unsure of or that lie far from the reference, no two alike.

An image's score is the larger of its uncertainty and its farness. The best of them, without near-duplicates, are put
into clusters of the embedding, and the clusters give in turn, so that one kind of mistake does not fill the list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from monitoring import MonitoringError

CANDIDATES = 10
"""Images that go into the clusters for each one that is to be chosen."""

NEAR = 0.1
"""Two images closer than this are near-duplicates; unit: the root mean square distance of all from their mean."""

ROWS_AT_A_TIME = 512
"""Rows compared at a time with those kept so far."""

UNCERTAIN, FAR = "uncertain", "far"


@dataclass(frozen=True)
class Choice:
    """An image to label."""

    row: int
    """Its position among those given."""
    score: float
    """0..1: the larger of the two below."""
    why: str
    """UNCERTAIN or FAR: what the score comes from."""


def recommend(
    probabilities_NK: np.ndarray,
    embeddings_NE: np.ndarray,
    count: int,
    *,
    distances_N: np.ndarray | None = None,
    threshold: float = 0.0,
    identity: Callable[[int], Hashable] | None = None,
) -> list[Choice]:
    """At most `count` of N images, those of the first clusters first; fewer where no more are different enough.

    distances_N: of each image to the reference, far above `threshold` (monitoring/distance.py); None: not known.
    identity: what an image is, asked for rows that are about to be chosen; of equal ones the first is taken, and one
    for which it is None is passed over. The order of the rows given does not matter.
    """
    if not (np.isfinite(probabilities_NK).all() and np.isfinite(embeddings_NE).all()):
        raise MonitoringError("probabilities or embeddings hold numbers that are not finite; the model is broken")
    if count < 1 or not len(probabilities_NK):
        return []
    unsure_N = uncertainty(probabilities_NK)
    far_N = np.zeros_like(unsure_N) if distances_N is None else farness(distances_N, threshold)
    score_N = np.maximum(unsure_N, far_N)
    points_NE = embeddings_NE.astype(np.float64)
    order = _order(score_N, embeddings_NE)
    different = _without_near(points_NE, order, NEAR * _spread(points_NE[order]))
    chosen: list[Choice] = []
    seen: set[Hashable] = set()
    while len(chosen) < count and (candidates := list(islice(different, CANDIDATES * count))):
        for row in _in_turn(_clusters(points_NE[candidates], score_N[candidates], count), candidates):
            known = row if identity is None else identity(row)
            if known is None or known in seen:
                continue
            seen.add(known)
            chosen.append(Choice(row, float(score_N[row]), FAR if far_N[row] > unsure_N[row] else UNCERTAIN))
            if len(chosen) == count:
                break
    return chosen


def uncertainty(probabilities_NK: np.ndarray) -> np.ndarray:
    """float64 [N] in 0..1: one less the margin between the two most probable classes."""
    top_N2 = np.sort(probabilities_NK.astype(np.float64), axis=1)[:, -2:]
    return np.asarray(np.clip(1 - (top_N2[:, 1] - top_N2[:, 0]), 0, 1))


def farness(distances_N: np.ndarray, threshold: float) -> np.ndarray:
    """float64 [N] in 0..1: 0 up to the threshold, 1/2 at twice the threshold, 2/3 at three times."""
    beyond_N = np.maximum(distances_N.astype(np.float64) - threshold, 0)
    return np.asarray(beyond_N / np.maximum(beyond_N + threshold, np.finfo(np.float64).tiny))


def _order(score_N: np.ndarray, embeddings_NE: np.ndarray) -> np.ndarray:
    """Rows by falling score; equal ones by their embeddings, so that the order they came in does not matter."""
    content_N = np.array([hashlib.sha256(row_E.tobytes()).digest()[:8] for row_E in embeddings_NE])
    return np.lexsort((content_N, -score_N))


def _spread(points_NE: np.ndarray) -> float:
    """Root mean square distance from the mean."""
    return float(np.sqrt(((points_NE - points_NE.mean(axis=0)) ** 2).sum(axis=1).mean()))


def _without_near(points_NE: np.ndarray, order: np.ndarray, radius: float) -> Iterator[int]:
    """The rows of `order` that are farther than `radius` from every one before them that was given."""
    from scipy.spatial.distance import cdist

    kept: list[int] = []
    for start in range(0, len(order), ROWS_AT_A_TIME):
        rows = order[start : start + ROWS_AT_A_TIME]
        near_B = np.zeros(len(rows), bool)
        if kept:
            near_B = cdist(points_NE[rows], points_NE[kept]).min(axis=1) <= radius
        for place, row in enumerate(rows):
            if not near_B[place]:
                near_B |= cdist(points_NE[rows], points_NE[row : row + 1])[:, 0] <= radius
                kept.append(int(row))
                yield int(row)


def _clusters(points_ME: np.ndarray, score_M: np.ndarray, count: int) -> np.ndarray:
    """int [M]: a number for each point's cluster, as many clusters as are to be chosen; scores are weights."""
    if len(points_ME) <= count:
        return np.arange(len(points_ME))
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # several threads add up in any order
        found = KMeans(count, n_init=1, random_state=0).fit(points_ME, sample_weight=score_M + 1e-6)
    return np.asarray(found.labels_)


def _in_turn(cluster_M: np.ndarray, rows: Sequence[int]) -> Iterator[int]:
    """The first row of each cluster, then the second of each, and so on; clusters in the order of their first rows."""
    turn_M = np.empty(len(rows), np.int64)
    for cluster in np.unique(cluster_M):
        members = np.flatnonzero(cluster_M == cluster)
        turn_M[members] = np.arange(len(members))
    for place in np.argsort(turn_M, kind="stable"):
        yield rows[place]
