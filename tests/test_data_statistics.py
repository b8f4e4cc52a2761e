"""Image statistics against plain loops over the pixels."""

import statistics as plain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loader import statistics
from data_loader.statistics import STATISTICS, image_statistics


def by_hand(image_HWC: np.ndarray) -> list[float]:
    """The four numbers of one image, pixel by pixel."""
    rows = image_HWC.tolist()
    values = [value for row in rows for pixel in row for value in pixel]
    steps = [
        abs(value - other)
        for y, row in enumerate(rows)
        for x, pixel in enumerate(row)
        for down, right in ((1, 0), (0, 1))
        if y + down < len(rows) and x + right < len(row)
        for value, other in zip(pixel, rows[y + down][x + right], strict=True)
    ]
    return [
        plain.fmean(values),
        plain.pstdev(values),
        plain.fmean(steps) if steps else 0,
        sum(value in (0, 255) for value in values) / len(values),
    ]


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.sampled_from((1, 3))),
    values=st.sampled_from(((0, 256), (0, 2), (250, 256), (7, 8))),
    seed=st.integers(0, 2**32 - 1),
)
def test_statistics_are_those_of_a_loop(shape: tuple[int, int, int, int], values: tuple[int, int], seed: int) -> None:
    images_NHWC = np.random.default_rng(seed).integers(*values, shape, dtype=np.uint8)
    statistics_NS = image_statistics(images_NHWC)
    assert (statistics_NS.dtype, statistics_NS.shape) == (np.float32, (shape[0], len(STATISTICS)))
    expected_NS = np.reshape([by_hand(image_HWC) for image_HWC in images_NHWC], (-1, len(STATISTICS)))
    np.testing.assert_allclose(statistics_NS, expected_NS, rtol=1e-4, atol=1e-4)


def test_many_images_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images_NHWC = np.random.default_rng(0).integers(0, 256, (50, 4, 5, 1), dtype=np.uint8)
    at_once_NS = image_statistics(images_NHWC)
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 7 * 20)
    np.testing.assert_array_equal(image_statistics(images_NHWC), at_once_NS)


def test_a_view_of_other_memory_is_read_as_it_looks() -> None:
    images_NHWC = np.random.default_rng(1).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    view_NHWC = images_NHWC[::2, ::-1, 1::2]
    np.testing.assert_array_equal(image_statistics(view_NHWC), image_statistics(view_NHWC.copy()))


def test_the_extremes() -> None:
    black, white = np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 255, np.uint8)
    board = np.array([0, 255, 255, 0], np.uint8).reshape(1, 2, 2, 1)
    expected = [[0, 0, 0, 1], [255, 0, 0, 1], [127.5, 127.5, 255, 1]]
    np.testing.assert_array_equal(image_statistics(np.concatenate([black, white, board])), expected)
