"""The order of training: every image once an epoch, the same whatever the number of processes or a resume."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loader import DataError
from data_loader.augment import augment
from data_loader.batches import (
    Batch,
    channel_statistics,
    evaluation_batches,
    read_ahead,
    steps_per_epoch,
    training_batches,
)


def numbered(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose label is their own number."""
    return np.zeros((images, 2, 2, 1), np.uint8), np.arange(images)


def labels(images: int, rows: np.ndarray, batch_size: int, steps: range, **place: int) -> list[list[int]]:
    batches = training_batches(*numbered(images), rows, batch_size=batch_size, seed=3, steps=steps, **place)
    return [batch.labels_N.tolist() for batch in batches]


@given(images=st.integers(1, 200), batch_size=st.integers(1, 64))
def test_an_epoch_shows_no_image_twice_and_only_training_rows(images: int, batch_size: int) -> None:
    rows = np.arange(images) * 2
    steps = steps_per_epoch(images, batch_size)
    seen = [label for batch in labels(2 * images, rows, batch_size, range(steps)) for label in batch]
    assert len(seen) == len(set(seen)) == min(images, steps * batch_size)
    assert set(seen) <= set(rows.tolist())


def test_epochs_have_different_orders_and_a_seed_always_the_same() -> None:
    rows = np.arange(64)
    first, second = labels(64, rows, 64, range(1)), labels(64, rows, 64, range(1, 2))
    assert first != second
    assert labels(64, rows, 64, range(2)) == first + second


@given(st.integers(0, 11))
def test_resuming_shows_what_would_have_come(resume_at: int) -> None:
    rows = np.arange(50)
    assert labels(50, rows, 16, range(resume_at, 12)) == labels(50, rows, 16, range(12))[resume_at:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one(world_size: int) -> None:
    rows = np.arange(70)
    alone = labels(70, rows, 16, range(8))
    shares = [labels(70, rows, 16, range(8), rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [[label for share in shares for label in share[step]] for step in range(8)]
    assert together == alone


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size 10 cannot be shared equally by 3 processes; give a multiple of 3"):
        labels(50, np.arange(50), 10, range(1), rank=0, world_size=3)


def test_evaluation_takes_every_row_in_order() -> None:
    batches = evaluation_batches(*numbered(10), np.array([1, 5, 7]), 2)
    assert [batch.labels_N.tolist() for batch in batches] == [[1, 5], [7]]


def test_channel_statistics_are_numpys() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9000, 3, 4, 2), np.uint8)
    rows = np.arange(0, 9000, 2)
    mean_C, std_C = channel_statistics(images, rows)
    np.testing.assert_allclose(mean_C, images[rows].mean((0, 1, 2)))
    np.testing.assert_allclose(std_C, images[rows].std((0, 1, 2)))


def test_read_ahead_passes_items_errors_and_ends() -> None:
    assert list(read_ahead(iter(range(100)))) == list(range(100))

    def breaking() -> object:
        yield 1
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        list(read_ahead(iter(breaking())))  # type: ignore[call-overload]
    endless = read_ahead(iter(int, 1))
    next(endless)
    endless.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def shifted(image_HWC: np.ndarray, down: int, right: int) -> np.ndarray:
    """Another way to shift: cut a window out of the image with its edges repeated."""
    height, width, _ = image_HWC.shape
    padded = np.pad(image_HWC, ((4, 4), (4, 4), (0, 0)), mode="edge")
    return padded[4 + down : 4 + down + height, 4 + right : 4 + right + width]


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), kind=st.sampled_from(["shift", "shift_flip"]))
def test_each_image_is_shifted_by_at_most_a_tenth(seed: int, step: int, kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 30, 3), np.uint8)
    changed = augment(torch.from_numpy(images), kind, seed=seed, step=step).numpy()
    for before, after in zip(images, changed, strict=True):
        possible = [shifted(before, down, right) for down in range(-2, 3) for right in range(-3, 4)]
        if kind == "shift_flip":
            possible += [image[:, ::-1] for image in possible]
        assert any(np.array_equal(after, candidate) for candidate in possible)


def test_flips_happen_half_of_the_time() -> None:
    images = torch.zeros((400, 4, 4, 1), dtype=torch.uint8)
    images[:, :, 0] = 255
    changed = augment(images, "shift_flip", seed=0, step=0)
    assert 160 < int((changed[:, 0, 3, 0] == 255).sum()) < 240


def test_augmentation_does_not_depend_on_the_number_of_processes() -> None:
    images = torch.randint(0, 256, (12, 24, 24, 1), dtype=torch.uint8)
    alone = augment(images, "shift_flip", seed=5, step=9)
    shares = [augment(images[r * 4 : r * 4 + 4], "shift_flip", seed=5, step=9, rank=r, world_size=3) for r in range(3)]
    assert torch.equal(torch.cat(shares), alone)


def test_batches_are_plain_tuples_of_images_and_labels() -> None:
    images, numbers = numbered(4)
    batch = next(training_batches(images, numbers, np.arange(4), batch_size=2, seed=0, steps=range(1)))
    assert isinstance(batch, Batch)
    assert batch.images_NHWC.shape == (2, 2, 2, 1)
