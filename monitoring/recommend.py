"""Which images to label next: those that the model is unsure of and those far from the reference, no two alike.

The most uncertain ones and the farthest take turns. The first of them, without near-duplicates, are put into clusters
of the embedding, and the clusters give in turn, so that one kind of mistake does not fill the list.
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

LEAST_WEIGHT = 1e-6
"""Of an image in the clusters where the model is sure; the most uncertain and the far ones weigh 1."""

ROWS_AT_A_TIME = 512
"""Rows compared at a time with those kept so far."""

FAR_EVERY = 4
"""Of the images that go into the clusters every such one is far from the reference, as long as there are some."""

UNCERTAIN, FAR = "uncertain", "far"


@dataclass(frozen=True)
class Choice:
    """An image to label."""

    row: int
    """Its position among those given."""
    why: str
    """UNCERTAIN or FAR."""


def recommend(
    probabilities_NK: np.ndarray,
    embeddings_NE: np.ndarray,
    count: int,
    *,
    distances_N: np.ndarray | None = None,
    threshold: float = 0.0,
    identity: Callable[[int], Hashable] | None = None,
) -> list[Choice]:
    """At most `count` of N images, the most useful ones first; fewer where no more are different enough.

    distances_N: of each image to the reference, far above `threshold` (monitoring/distance.py); None: not known.
    identity: what an image is, asked for rows that are about to be chosen; of equal ones the first is taken, and one
    for which it is None is passed over. The order in which the rows are given does not matter.
    """
    if not (np.isfinite(probabilities_NK).all() and np.isfinite(embeddings_NE).all()):
        raise MonitoringError("probabilities or embeddings hold numbers that are not finite; the model is broken")
    if count < 1 or not len(probabilities_NK):
        return []
    distances_N = np.zeros(len(probabilities_NK)) if distances_N is None else distances_N
    unsure_N, points_NE = uncertainty(probabilities_NK), embeddings_NE.astype(np.float64)
    order, for_distance_N = _order(unsure_N, distances_N, threshold, embeddings_NE)
    weight_N = np.where(for_distance_N, 1.0, np.maximum(unsure_N, LEAST_WEIGHT))
    different = _without_near(points_NE, order, NEAR * _spread(points_NE[order]))
    chosen: list[Choice] = []
    seen: set[Hashable] = set()
    while len(chosen) < count and (candidates := list(islice(different, CANDIDATES * count))):
        for row in _in_turn(_clusters(points_NE[candidates], weight_N[candidates], count), candidates):
            known = row if identity is None else identity(row)
            if known is None or known in seen:
                continue
            seen.add(known)
            chosen.append(Choice(row, FAR if for_distance_N[row] else UNCERTAIN))
            if len(chosen) == count:
                break
    return chosen


def uncertainty(probabilities_NK: np.ndarray) -> np.ndarray:
    """float64 [N] in 0..1: one less the margin between the two most probable classes."""
    top_N2 = np.sort(probabilities_NK.astype(np.float64), axis=1)[:, -2:]
    return np.asarray(np.clip(1 - (top_N2[:, 1] - top_N2[:, 0]), 0, 1))


def _order(
    unsure_N: np.ndarray, distances_N: np.ndarray, threshold: float, embeddings_NE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All rows, the one to be labelled first at the start, and bool [N]: whether its distance brought a row there."""
    content_N = np.array([hashlib.sha256(row_E.tobytes()).digest()[:8] for row_E in embeddings_NE])
    by_unsure, by_distance = np.lexsort((content_N, -unsure_N)), np.lexsort((content_N, -distances_N))
    place_N, far_place_N = np.empty(len(unsure_N)), np.full(len(unsure_N), np.inf)
    place_N[by_unsure] = np.arange(len(by_unsure)) * FAR_EVERY / (FAR_EVERY - 1)
    far = by_distance[distances_N[by_distance] > threshold]
    far_place_N[far] = np.arange(len(far)) * FAR_EVERY
    return np.lexsort((content_N, np.minimum(place_N, far_place_N))), far_place_N < place_N


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


def _clusters(points_ME: np.ndarray, weight_M: np.ndarray, count: int) -> np.ndarray:
    """int [M]: a number for each point's cluster; there are as many clusters as images to be chosen."""
    if len(points_ME) <= count:
        return np.arange(len(points_ME))
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # several threads add up in any order
        found = KMeans(count, n_init=1, random_state=0).fit(points_ME, sample_weight=weight_M)
    return np.asarray(found.labels_)


def _in_turn(cluster_M: np.ndarray, rows: Sequence[int]) -> Iterator[int]:
    """The first row of each cluster, then the second of each, and so on; clusters in the order of their first rows."""
    turn_M = np.empty(len(rows), np.int64)
    for cluster in np.unique(cluster_M):
        members = np.flatnonzero(cluster_M == cluster)
        turn_M[members] = np.arange(len(members))
    for place in np.argsort(turn_M, kind="stable"):
        yield rows[place]
