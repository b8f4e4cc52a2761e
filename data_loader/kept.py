"""Images that the prediction log kept: read when they are asked for, told apart by their pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_loader import DataError
from data_loader.dataset import Dataset
from data_loader.extend import fingerprint, fingerprints
from data_loader.images import decode_image, decode_own_size, resize
from data_loader.store import Store

FOLDER = "images"
"""Where in the log they lie."""


class KeptImages:
    """The images of some rows of a log; `rows` are those whose image is there. A place is a position in `rows`."""

    rows: np.ndarray

    def __init__(self, store: Store, names: Sequence[str], data: Dataset | None) -> None:
        """names: for each row its image's name in the log, or "". data: images that it has are not wanted."""
        present = set(store.names(FOLDER)) if any(names) else set()
        self.rows = np.array([row for row, name in enumerate(names) if name in present], np.int64)
        self._store, self._names = store, names
        self._shape = data.images_NHWC.shape[1:] if data else None
        self._known = fingerprints(data) if data else {}
        self._contents: dict[int, bytes] = {}
        self._unreadable = self._labelled = 0

    def identity(self, place: int) -> bytes | None:
        """The same for images of equal pixels; None for one that cannot be read or that the data set has."""
        content = self._store.read(self._names[self.rows[place]])
        try:
            image_HWC = decode_image(content, *self._shape) if self._shape else decode_own_size(content)
        except DataError:
            self._unreadable += 1
            return None
        mark = fingerprint(image_HWC)
        if mark in self._known:
            self._labelled += 1
            return None
        self._contents[place] = content
        return mark

    def content(self, place: int) -> bytes:
        """The file of an image whose identity was asked."""
        return self._contents[place]

    def pictures(self, places: Sequence[int]) -> np.ndarray:
        """uint8 images_NHWC of such images, all as large as the largest of them."""
        images = [decode_own_size(self._contents[place]) for place in places]
        height, width, channels = np.max([image_HWC.shape for image_HWC in images], axis=0).tolist()
        same_size = (resize(image_HWC, height, width) for image_HWC in images)
        return np.stack([np.broadcast_to(image_HWC, (height, width, channels)) for image_HWC in same_size])

    def left_out(self) -> str:
        """What was passed over, in words; empty for nothing."""
        found = {"in the data set already": self._labelled, "unreadable": self._unreadable}
        return ", ".join(f"{count} {what}" for what, count in found.items() if count)
