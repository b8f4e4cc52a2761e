"""Images of the prediction log whose class is known and from which no training has learnt: fair to judge models by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_loader import DataError
from data_loader.dataset import Dataset
from data_loader.extend import fingerprint
from data_loader.images import decode_image
from data_loader.store import Store

MOST = 5_000
"""Images that show an accuracy to within 1 %."""

MOST_READ = 20_000
"""Images that are read to find them: on S3 some minutes."""

BY_CHANCE = "sampled"
"""Why the service kept an image that it would have kept whatever it shows."""


@dataclass(frozen=True)
class LabelledImages:
    """M images, no two of equal pixels."""

    rows_M: np.ndarray
    """int64: positions among the names given."""
    images_MHWC: np.ndarray
    labels_M: np.ndarray
    """int64: positions in the data set's classes."""
    learnt: int
    """Images left out, because they are in the training or validation split."""

    def __len__(self) -> int:
        return len(self.rows_M)


def labelled_images(
    store: Store,
    names: Sequence[str],
    kept: Sequence[str],
    told: Mapping[int, str],
    data: Dataset,
    *,
    enough: int,
    most: int = MOST,
) -> LabelledImages:
    """At most `most` of the images of a log, the last ones first, in the data set's image shape.

    names: for each row of the log its image's name, "" for none. kept: why it was kept. told: the class that users
    named, by row. The data set knows the class too of an image with the same pixels in its test split, and knows it
    better. What is in its other splits is left out, as are images that cannot be read.

    Images that were kept because the model is unsure of them flatter any other model. So with `enough` images that were
    kept by chance it is those alone.
    """
    marks = {fingerprint(data.images_NHWC[row]): (split, int(data.labels_N[row])) for split, row in _rows(data)}
    seen: set[bytes] = set()
    rows: list[int] = []
    images, labels, learnt = [], [], 0
    for row in [row for row, name in enumerate(names) if name][: -MOST_READ - 1 : -1]:
        if len(rows) == most:
            break
        try:
            image_HWC = decode_image(store.read(names[row]), *data.images_NHWC.shape[1:])
        except DataError:
            continue
        mark = fingerprint(image_HWC)
        split, label = marks.get(mark, ("", -1))
        if label < 0 and told.get(row) in data.classes:
            label = data.classes.index(told[row])
        if label < 0 or mark in seen:
            continue
        seen.add(mark)
        if split in ("train", "val"):
            learnt += 1
            continue
        rows.append(row)
        images.append(image_HWC)
        labels.append(label)
    by_chance = [place for place, row in enumerate(rows) if kept[row] == BY_CHANCE]
    places = by_chance if len(by_chance) >= enough else list(range(len(rows)))
    shape = (len(places), *data.images_NHWC.shape[1:])
    return LabelledImages(
        np.array([rows[place] for place in places], np.int64),
        np.array([images[place] for place in places], np.uint8).reshape(shape),
        np.array([labels[place] for place in places], np.int64),
        learnt,
    )


def _rows(data: Dataset) -> list[tuple[str, int]]:
    return [(split, row) for split, rows in data.rows.items() for row in rows.tolist()]
