"""The reference of a model and distances from it: against scikit-learn's neighbours and ONNX Runtime's own answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from prediction_logs import SCHEMA
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors

from monitoring import MonitoringError
from monitoring.distance import Distances
from monitoring.observations import STATISTICS
from monitoring.reference import (
    chosen_rows,
    even_rows,
    make_reference,
    read_reference,
    reference_table,
    write_reference,
)

CLASSES = ("Äpfel", "<b>", "漢字")


def arrays(count: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """statistics_NS, embeddings_NE, logits_NK, labels_N"""
    random = np.random.default_rng(seed)
    return (
        random.random((count, 4), np.float32),
        random.standard_normal((count, 7), np.float32),
        random.standard_normal((count, 3), np.float32) * 40,
        random.integers(0, 3, count),
    )


def test_a_reference_comes_back_from_its_file(tmp_path: Path) -> None:
    statistics_NS, embeddings_NE, logits_NK, labels_N = arrays()
    table = reference_table(statistics_NS, embeddings_NE, logits_NK, labels_N, CLASSES)
    reference = read_reference(write_reference(table, tmp_path / "reference.parquet"))
    assert reference.classes == CLASSES
    np.testing.assert_array_equal(reference.statistics_NS, statistics_NS)
    np.testing.assert_array_equal(reference.embeddings_NE, embeddings_NE)
    np.testing.assert_array_equal(reference.labels_N, labels_N)
    shares_NK = softmax(logits_NK.astype(np.float64), axis=1)
    np.testing.assert_array_equal(reference.predicted_N, shares_NK.argmax(axis=1))
    np.testing.assert_allclose(reference.confidence_N, shares_NK.max(axis=1), rtol=1e-6)
    np.testing.assert_allclose(reference.probabilities_NK, shares_NK, rtol=1e-5, atol=1e-12)


def test_the_file_has_the_logs_columns_and_no_more_than_the_images_in_it(tmp_path: Path) -> None:
    table = reference_table(*arrays(), CLASSES)
    schema = pyarrow.parquet.read_schema(write_reference(table, tmp_path / "a.parquet"))
    shared = [*STATISTICS, "embedding", "class", "confidence", "probabilities"]
    assert schema.names == [*shared, "label"]
    assert [schema.field(name).type for name in shared] == [SCHEMA.field(name).type for name in shared]
    assert set(schema.metadata) == {b"classes"}
    again = write_reference(reference_table(*arrays(), CLASSES), tmp_path / "b.parquet")
    assert again.read_bytes() == (tmp_path / "a.parquet").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.parquet", "b.parquet"]


def test_the_reference_is_made_of_the_rows_asked_for_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.reference.BATCH", 6)
    images_NHWC = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    labels_N, asked = np.arange(100) % 3, []

    def statistics(images_NHWC: np.ndarray) -> np.ndarray:
        asked.append(len(images_NHWC))
        return np.repeat(images_NHWC.reshape(-1, 1), 4, axis=1).astype(np.float32)

    rows_M = np.arange(10, 50, 2)
    pixel_M1 = rows_M[:, None].astype(np.float32)
    outputs = np.concatenate([pixel_M1, -pixel_M1, 0 * pixel_M1], axis=1), pixel_M1
    table = make_reference(images_NHWC, labels_N, rows_M, CLASSES, outputs=outputs, statistics=statistics)
    assert asked == [6, 6, 6, 2]
    assert table["brightness"].to_pylist() == rows_M.tolist()
    assert table["embedding"].to_pylist() == [[row] for row in rows_M]
    assert table["label"].to_pylist() == [CLASSES[row % 3] for row in rows_M]
    assert set(table["class"].to_pylist()) == {CLASSES[0]}, "the largest of the three logits"


def test_of_many_images_some_are_chosen_and_of_few_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.reference.MOST_ROWS", 20)
    assert chosen_rows(15).tolist() == list(range(15))
    chosen = chosen_rows(40)
    assert (len(chosen), chosen[0], chosen[-1]) == (20, 0, 39)
    assert set(np.diff(chosen)) <= {2, 3}, "evenly spread"


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (7, 5), (1000, 3), (10_001, 10_000)])
def test_even_rows_are_distinct_and_reach_both_ends(count: int, most: int) -> None:
    rows = even_rows(count, most)
    assert len(set(rows.tolist())) == min(count, most)
    assert (rows[0], rows[-1]) == (0, count - 1)


def test_what_is_no_reference_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "reference.parquet"
    with pytest.raises(MonitoringError, match=r"reference '.*reference.parquet' cannot be read: "):
        read_reference(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(MonitoringError, match="cannot be read"):
        read_reference(path)
    table = reference_table(*arrays(), CLASSES)
    pyarrow.parquet.write_table(table.drop_columns(["label"]), path)
    with pytest.raises(MonitoringError, match="has no column 'label'"):
        read_reference(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata(), path)
    with pytest.raises(MonitoringError, match="does not name its classes"):
        read_reference(path)
    pyarrow.parquet.write_table(table[:0], path)
    with pytest.raises(MonitoringError, match="holds no image"):
        read_reference(path)


def test_distances_are_those_of_scaled_neighbours() -> None:
    random = np.random.default_rng(0)
    spread_E = np.array([1, 10, 100, 0.1])
    reference_NE = (random.standard_normal((300, 4)) * spread_E).astype(np.float32)
    embeddings_NE = (random.standard_normal((1500, 4)) * spread_E * 2).astype(np.float32)
    scale_E = reference_NE.std(axis=0, dtype=np.float64)
    scale_E = np.maximum(scale_E, scale_E.max() / 100)  # the narrow dimension counts as a hundredth of the widest
    neighbours = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(reference_NE / scale_E)
    distances = Distances(reference_NE)
    expected_N = neighbours.kneighbors(embeddings_NE / scale_E, 1)[0][:, 0]
    np.testing.assert_allclose(distances.to(embeddings_NE), expected_N, rtol=1e-4)
    assert distances.to(embeddings_NE).dtype == np.float32
    second_N = neighbours.kneighbors(reference_NE / scale_E)[0][:, 1]
    np.testing.assert_allclose(distances.threshold, np.percentile(second_N, 99), rtol=1e-5)
    assert distances.to(embeddings_NE[:0]).shape == (0,)


def test_about_one_in_a_hundred_of_the_same_kind_is_far_and_others_are() -> None:
    random = np.random.default_rng(0)
    distances = Distances(random.standard_normal((5000, 8)).astype(np.float32))
    fresh_NE = random.standard_normal((20_000, 8)).astype(np.float32)
    share = (distances.to(fresh_NE) > distances.threshold).mean()
    assert 0.005 < share < 0.02  # the threshold itself is known from 2,000 distances: 1 % within a fifth or so
    assert (distances.to(fresh_NE + 6) > distances.threshold).all()


def test_a_dimension_that_is_silent_in_the_reference_is_no_infinity() -> None:
    reference_NE = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    reference_NE[:, 2] = 0
    distances = Distances(reference_NE)
    awake = reference_NE[:1] + np.float32([0, 0, 0.5])
    assert np.isfinite(distances.threshold)
    assert distances.threshold < distances.to(awake)[0] < 100
    same = Distances(np.ones((5, 3), np.float32))
    assert (same.threshold, same.to(np.ones((1, 3), np.float32))[0]) == (0, 0)


def test_embeddings_that_do_not_fit_are_refused() -> None:
    distances = Distances(np.eye(4, dtype=np.float32))
    with pytest.raises(MonitoringError, match="the reference's have 4 numbers each"):
        distances.to(np.zeros((2, 5), np.float32))
    for wrong in (np.zeros((1, 4)), np.zeros(4), np.full((3, 2), np.nan)):
        with pytest.raises(MonitoringError, match="at least two finite embeddings"):
            Distances(wrong)
