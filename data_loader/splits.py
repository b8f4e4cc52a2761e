"""Which split an image belongs to, decided by its content alone.

The first eight bytes of the SHA-256 of an image, read as a fraction of 2**64, are uniform on [0, 1). So the
split of an image depends on nothing but the image: adding others never moves it, and equal images never
stand in two splits.
"""

from collections.abc import Iterable

import numpy as np

SPLITS = ("train", "val", "test")
TEST_SHARE = 0.2  # of all images, where there is no official test set
VAL_SHARE = 0.1  # of all images, or of the official training images where there is an official test set


def fraction(sha256: bytes) -> float:
    """The first eight bytes of a SHA-256 as a number in [0, 1]."""
    return int.from_bytes(sha256[:8], "big") / 2**64


def split_of(sha256: bytes, given: str | None, official: Iterable[str]) -> str:
    """The split of one image.

    sha256: of the image's content. given: the split its publisher put it in, or None. official: the splits
    that the publisher made; val and test are kept, and whichever of them is absent is taken out of the
    training images.
    """
    if given in ("val", "test"):
        return given
    test_below = 0.0 if "test" in official else TEST_SHARE
    val_below = test_below + (0.0 if "val" in official else VAL_SHARE)
    position = fraction(sha256)
    return "test" if position < test_below else "val" if position < val_below else "train"


def rows_of(splits_N: np.ndarray) -> dict[str, np.ndarray]:
    """{"train" | "val" | "test": int64 row numbers}, from the splits as positions in SPLITS."""
    return {name: np.flatnonzero(splits_N == code).astype(np.int64) for code, name in enumerate(SPLITS)}
