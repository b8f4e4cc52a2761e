"""Which images to label: properties of the choice, against distances and counts that the test works out itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.datasets import make_blobs

from monitoring import MonitoringError
from monitoring.recommend import FAR, FAR_EVERY, NEAR, UNCERTAIN, Choice, recommend, uncertainty

ROOT = Path(__file__).resolve().parent.parent


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    shares_NK = np.exp(logits_NK.astype(np.float64))
    return (shares_NK / shares_NK.sum(axis=1, keepdims=True)).astype(np.float32)


def some(count: int, seed: int, length: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """probabilities_NK, embeddings_NE and distances_N, a third of the images nearly or exactly another one."""
    random = np.random.default_rng(seed)
    embeddings_NE = random.standard_normal((count, length)).astype(np.float32)
    twins = random.integers(0, count, count // 3)
    embeddings_NE[: len(twins)] = embeddings_NE[twins] + random.choice([0, 1e-3], (len(twins), 1)).astype(np.float32)
    logits_NK = embeddings_NE @ random.standard_normal((length, 4)).astype(np.float32)
    return softmax(logits_NK), embeddings_NE, np.abs(embeddings_NE).sum(axis=1)


def spread(points_NE: np.ndarray) -> float:
    """Root mean square distance from the mean, by way of the variances."""
    return float(np.sqrt(points_NE.astype(np.float64).var(axis=0).sum()))


cases = given(count=st.integers(1, 120), wanted=st.integers(1, 40), seed=st.integers(0, 10_000))


@cases
@settings(deadline=None, max_examples=40)
def test_no_more_than_asked_for_no_image_twice_no_two_alike(count: int, wanted: int, seed: int) -> None:
    probabilities_NK, embeddings_NE, distances_N = some(count, seed)
    choices = recommend(probabilities_NK, embeddings_NE, wanted, distances_N=distances_N, threshold=5.0)
    rows = [choice.row for choice in choices]
    assert 1 <= len(rows) <= wanted and len(set(rows)) == len(rows)
    chosen_ME, radius = embeddings_NE[rows].astype(np.float64), NEAR * spread(embeddings_NE)
    assert len(rows) == 1 or pdist(chosen_ME).min() > radius * 0.999
    if len(rows) < wanted:  # every image that was left out is like one that was chosen
        gaps_NM = np.linalg.norm(embeddings_NE[:, None].astype(np.float64) - chosen_ME[None], axis=2)
        assert gaps_NM.min(axis=1).max() <= radius * 1.001


@cases
@settings(deadline=None, max_examples=40)
def test_the_order_of_the_rows_does_not_matter(count: int, wanted: int, seed: int) -> None:
    probabilities_NK, embeddings_NE, distances_N = some(count, seed)
    order = np.random.default_rng(seed).permutation(count)

    def chosen(rows: np.ndarray) -> list[tuple[bytes, str]]:
        """What was chosen, in its order and whichever of two equal rows it was."""
        given = probabilities_NK[rows], embeddings_NE[rows]
        found = recommend(*given, wanted, distances_N=distances_N[rows], threshold=5.0)
        return [(embeddings_NE[rows[choice.row]].tobytes(), choice.why) for choice in found]

    assert chosen(np.arange(count)) == chosen(order)


def test_the_same_images_give_the_same_choice() -> None:
    probabilities_NK, embeddings_NE, distances_N = some(3000, 1, length=64)
    first, second = (
        recommend(probabilities_NK, embeddings_NE, 100, distances_N=distances_N, threshold=60.0) for _ in range(2)
    )
    assert first == second and len(first) == 100


def test_uncertainty_is_one_less_the_margin() -> None:
    probabilities_NK = np.array([[0.5, 0.5, 0], [0.2, 0.7, 0.1], [1, 0, 0], [1 / 3] * 3])
    np.testing.assert_allclose(uncertainty(probabilities_NK), [1, 0.5, 0, 1], atol=1e-12)


def test_the_uncertain_ones_come_before_the_sure_ones() -> None:
    random = np.random.default_rng(0)
    embeddings_NE = random.standard_normal((2000, 8)).astype(np.float32)
    sure_N = np.arange(2000) >= 300
    probabilities_NK = np.where(sure_N[:, None], [[0.98, 0.01, 0.01]], [[0.4, 0.35, 0.25]])
    choices = recommend(probabilities_NK, embeddings_NE, 30)
    assert {choice.why for choice in choices} == {UNCERTAIN}
    assert not sure_N[[choice.row for choice in choices]].any()


def test_every_kind_of_mistake_is_in_the_list() -> None:
    """The larger the group the model is unsure of, the more of it a plain ranking would take."""
    sizes = [150, 60, 40, 30]
    embeddings_NE, group_N = make_blobs(sizes, centers=np.eye(4, 10) * 30, random_state=0)
    random = np.random.default_rng(0)
    margin_N = np.where(group_N == 0, random.uniform(0, 0.1, len(group_N)), random.uniform(0.05, 0.15, len(group_N)))
    probabilities_NK = np.stack([(1 + margin_N) / 2, (1 - margin_N) / 2], axis=1)
    rows = [choice.row for choice in recommend(probabilities_NK, embeddings_NE, 20)]
    assert set(group_N[rows]) == {0, 1, 2, 3}
    plain = np.argsort(margin_N)[:20]
    assert set(group_N[plain]) == {0}


def test_far_images_have_their_share_however_sure_the_model_is() -> None:
    random = np.random.default_rng(0)
    embeddings_NE = random.standard_normal((1000, 8)).astype(np.float32)
    strange_N = np.arange(1000) < 200
    embeddings_NE[strange_N, 0] += 40
    probabilities_NK = np.where(strange_N[:, None], [[1.0, 0.0]], [[0.5, 0.5]])
    distances_N = np.where(strange_N, 40.0, 1.0)
    choices = recommend(probabilities_NK, embeddings_NE, 40, distances_N=distances_N, threshold=3.0)
    why_of = {choice.row: choice.why for choice in choices}
    assert all((why == FAR) == strange_N[row] for row, why in why_of.items())
    assert 40 / FAR_EVERY / 2 <= sum(why == FAR for why in why_of.values()) <= 40 / FAR_EVERY * 2
    without = recommend(probabilities_NK, embeddings_NE, 40)
    assert not strange_N[[choice.row for choice in without]].any()


def test_an_image_of_a_camera_that_stands_still_is_chosen_once() -> None:
    random = np.random.default_rng(0)
    embeddings_NE = random.standard_normal((600, 8)).astype(np.float32)
    embeddings_NE[:400] = embeddings_NE[0] + random.standard_normal((400, 8)).astype(np.float32) * 1e-3
    probabilities_NK = np.where(np.arange(600)[:, None] < 400, [[0.5, 0.5]], [[0.6, 0.4]])
    rows = [choice.row for choice in recommend(probabilities_NK, embeddings_NE, 50)]
    assert len(rows) == 50 and sum(row < 400 for row in rows) == 1


def test_of_equal_images_one_is_taken_and_those_without_identity_none() -> None:
    probabilities_NK, embeddings_NE, _ = some(200, 3)
    asked: list[int] = []

    def identity(row: int) -> Any:
        asked.append(row)
        return None if row % 3 == 0 else row % 50

    rows = [choice.row for choice in recommend(probabilities_NK, embeddings_NE, 20, identity=identity)]
    assert len(rows) == 20 and len({row % 50 for row in rows}) == 20
    assert all(row % 3 for row in rows)
    assert len(set(asked)) == len(asked) < 200, "each is asked once, and only while there are too few"


def test_nothing_to_choose_from() -> None:
    assert recommend(np.empty((0, 3)), np.empty((0, 5)), 10) == []
    assert recommend(np.full((1, 2), 0.5), np.zeros((1, 5)), 10) == [Choice(0, UNCERTAIN)]
    assert len(recommend(np.full((9, 2), 0.5), np.zeros((9, 5)), 10)) == 1, "nine times the same"
    with pytest.raises(MonitoringError, match="not finite"):
        recommend(np.full((2, 2), np.nan), np.zeros((2, 5)), 10)


@pytest.mark.slow
def test_on_mnist_two_rounds_leave_fewer_errors_than_random_choice(mnist_data_dir: Path) -> None:
    """The benchmark, cut short and with a seed of its own; after two rounds two fifths of the errors are saved."""
    command = [sys.executable, str(ROOT / "benchmarks/labelling.py"), "--seeds=7", "--rounds=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, other = (line.split()[3:] for line in done.stdout.splitlines() if line.startswith("seed 7"))
    assert ours[0] == other[0] and len(ours) == 3, "both begin with the same images"
    assert 1 - float(ours[2]) < 0.85 * (1 - float(other[2]))
