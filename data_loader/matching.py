"""The data set that goes with a trained model: same classes, same kind of image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from data_loader import DataError
from data_loader.dataset import Dataset, load


class Model(Protocol):
    """What a data set has to match."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""


def load_matching(model: Model, asked: Mapping[str, str], settings: Any, split: str) -> Dataset:
    """Load a data set in the size that a model takes.

    asked: dataset and, where they are given, data_version and data_repo, as for load(). settings: those of an entry
    point, of which data_dir and on_error are read. Raises DataError where the data set has other classes or images than
    the model, or no image in `split`.
    """
    height, width, _ = model.image_shape
    data = load(
        **asked,
        data_dir=Path(settings.data_dir),
        image_size=height if height == width else 0,
        on_error=settings.on_error,
    )
    check_matching(data, model)
    if not len(data.rows[split]):
        have = ", ".join(f"{name} {len(rows)}" for name, rows in data.rows.items())
        raise DataError(f"dataset {asked['dataset']!r} has no image in the split {split!r}; it has: {have}")
    return data


def check_matching(data: Dataset, model: Model) -> None:
    """Raise DataError unless the data set has a model's classes, in the model's order, and its image shape."""
    if data.classes != model.classes:
        raise DataError(
            f"dataset {data.name!r} has {_describe(data.classes)}, the model knows {_describe(model.classes)};"
            " they must be the same in the same order"
        )
    if data.images_NHWC.shape[1:] != model.image_shape:
        raise DataError(
            f"dataset {data.name!r} has images {data.images_NHWC.shape[1:]}, the model takes {model.image_shape}"
            " (height, width, channels); give a data set of that shape"
        )


def _describe(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
