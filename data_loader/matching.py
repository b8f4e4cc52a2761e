"""The data set that goes with a trained model: same classes, same kind of image."""

from pathlib import Path

from data_loader import DataError
from data_loader.dataset import Dataset, load


def load_matching(
    dataset: str,
    *,
    classes: tuple[str, ...],
    image_shape: tuple[int, int, int],
    split: str,
    data_dir: Path,
    on_error: str = "fail",
    data_version: str = "",
    data_repo: str = "",
) -> Dataset:
    """Load `dataset` in the size that a model takes.

    classes and image_shape (height, width, channels) are the model's; data_version and data_repo are those of load().
    Raises DataError where the data set has
    others, or no image in `split`.
    """
    height, width, _ = image_shape
    size = height if height == width else 0
    data = load(
        dataset,
        data_dir=data_dir,
        image_size=size,
        on_error=on_error,
        data_version=data_version,
        data_repo=data_repo,
    )
    check_matching(data, classes, image_shape)
    if not len(data.rows[split]):
        have = ", ".join(f"{name} {len(rows)}" for name, rows in data.rows.items())
        raise DataError(f"dataset {dataset!r} has no image in the split {split!r}; it has: {have}")
    return data


def check_matching(data: Dataset, classes: tuple[str, ...], image_shape: tuple[int, int, int]) -> None:
    """Raise DataError unless the data set has a model's classes, in the model's order, and its image shape."""
    if data.classes != classes:
        raise DataError(
            f"dataset {data.name!r} has {_describe(data.classes)}, the model knows {_describe(classes)};"
            " they must be the same in the same order"
        )
    if data.images_NHWC.shape[1:] != image_shape:
        raise DataError(
            f"dataset {data.name!r} has images {data.images_NHWC.shape[1:]}, the model takes {image_shape}"
            " (height, width, channels); give a data set of that shape"
        )


def _describe(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
