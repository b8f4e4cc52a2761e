"""Images of a log to judge models by: their class is known, no training has learnt them, and they are a fair sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from service import png

from data_loader.dataset import Dataset, load
from data_loader.labelled import LabelledImages, labelled_images
from data_loader.store import open_store

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Ninety random images, whose splits follow from their pixels."""
    random = np.random.default_rng(0)
    images_NHW, labels_N = random.integers(0, 256, (90, 6, 5), np.uint8), np.arange(90) % 3
    np.savez(tmp_path / "data.npz", images=images_NHW, labels=labels_N, classes=np.array(CLASSES))
    return load(str(tmp_path / "data.npz"), data_dir=tmp_path / "data")


class Log:
    """A log that keeps images; `told` is what users said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "log"
        (self.folder / "images").mkdir(parents=True)
        self.names: list[str] = []
        self.kept: list[str] = []
        self.told: dict[int, str] = {}

    def keep(self, content: np.ndarray | bytes | None, told: str = "", why: str = "uncertain") -> int:
        """A row, with an image (pixels or a file) or none; its number."""
        row = len(self.names)
        self.names.append("" if content is None else f"images/{row}.png")
        self.kept.append("" if content is None else why)
        if content is not None:
            (self.folder / self.names[row]).write_bytes(content if isinstance(content, bytes) else png(content))
        if told:
            self.told[row] = told
        return row

    def labelled(self, data: Dataset, enough: int = 1_000, **most: int) -> LabelledImages:
        return labelled_images(
            open_store(str(self.folder)), self.names, self.kept, self.told, data, enough=enough, **most
        )


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def fresh(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 6, 5), np.uint8)


def test_what_a_training_has_learnt_is_no_test(data: Dataset, log: Log) -> None:
    by_split = {split: [log.keep(data.images_NHWC[row, :, :, 0], told="cat") for row in rows[:4]]
                for split, rows in data.rows.items()}  # fmt: skip
    found = log.labelled(data)
    assert sorted(found.rows_M.tolist()) == by_split["test"]
    assert found.learnt == 8
    # The data set knows their classes better than the users who said cat.
    expected = data.labels_N[data.rows["test"][:4]]
    np.testing.assert_array_equal(found.labels_M[::-1], expected)
    np.testing.assert_array_equal(found.images_MHWC[::-1], data.images_NHWC[data.rows["test"][:4]])


def test_feedback_names_the_class_of_what_is_in_no_data_set(data: Dataset, log: Log) -> None:
    new_NHW = fresh(5)
    rows = [log.keep(new_NHW[0], "bee"), log.keep(new_NHW[1]), log.keep(new_NHW[2], "dragonfly"), log.keep(None, "ant")]
    rows += [log.keep(new_NHW[0], "cat"), log.keep(b"no image", "ant"), log.keep(new_NHW[3], "ant")]
    (log.folder / log.names[log.keep(new_NHW[4], "ant")]).unlink()
    found = log.labelled(data)
    # Of two rows with the same pixels the later one counts.
    assert found.rows_M.tolist() == [rows[6], rows[4]]
    assert [CLASSES[label] for label in found.labels_M] == ["ant", "cat"]
    np.testing.assert_array_equal(found.images_MHWC[:, :, :, 0], new_NHW[[3, 0]])
    assert (len(found), found.learnt) == (2, 0)


def test_a_fair_sample_is_preferred_if_it_is_large_enough(data: Dataset, log: Log) -> None:
    kinds = ["sampled", "uncertain", "far", "sampled", "uncertain", "sampled"]
    rows = [log.keep(image_HW, "ant", why) for image_HW, why in zip(fresh(6), kinds, strict=True)]
    sampled = [row for row, why in zip(rows, kinds, strict=True) if why == "sampled"]
    assert log.labelled(data, enough=3).rows_M.tolist() == sampled[::-1]
    assert log.labelled(data, enough=4).rows_M.tolist() == rows[::-1]
    assert log.labelled(data, most=2).rows_M.tolist() == rows[:3:-1]


def test_no_image_is_an_answer_too(data: Dataset, log: Log) -> None:
    log.keep(None)
    found = log.labelled(data, enough=0)
    assert (len(found), found.learnt, found.images_MHWC.shape) == (0, 0, (0, 6, 5, 1))
