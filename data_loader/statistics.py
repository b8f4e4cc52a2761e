"""What can be said of an image without a network: a few numbers that tell a bad camera from a good one.

They are taken of every image that is served and of the reference, so they have to be cheap: 3 us each where many of
28x28 pixels come together.
"""

import numpy as np

STATISTICS = ("brightness", "contrast", "sharpness", "clipped")
"""brightness: mean value. contrast: standard deviation. sharpness: mean absolute difference of two neighbours, across
and down. All three in 0..255. clipped: share of the values that are 0 or 255."""

CHUNK_BYTES = 2**20
"""Pixels looked at together: they and what is computed from them fit a cache."""


def image_statistics(images_NHWC: np.ndarray) -> np.ndarray:
    """uint8 images_NHWC -> float32 statistics_NS, a column for each of STATISTICS; any N, also 0.

    An image of one pixel has no neighbours, and sharpness 0.
    """
    statistics_NS = np.empty((len(images_NHWC), len(STATISTICS)), np.float32)
    step = max(1, CHUNK_BYTES // max(1, images_NHWC[:1].size))
    for start in range(0, len(images_NHWC), step):
        statistics_NS[start : start + step] = _of_chunk(images_NHWC[start : start + step])
    return statistics_NS


def _of_chunk(images_NHWC: np.ndarray) -> np.ndarray:
    count, height, width, channels = images_NHWC.shape
    values_NV = images_NHWC.reshape(count, -1)
    brightness_N = values_NV.mean(axis=1, dtype=np.float64)
    centred_NV = values_NV - brightness_N[:, None].astype(np.float32)
    contrast_N = np.sqrt(np.einsum("nv,nv->n", centred_NV, centred_NV) / values_NV.shape[1])
    steps_N = _steps(images_NHWC[:, 1:], images_NHWC[:, :-1]) + _steps(images_NHWC[:, :, 1:], images_NHWC[:, :, :-1])
    neighbours = ((height - 1) * width + height * (width - 1)) * channels
    clipped_N = ((values_NV == 0) | (values_NV == 255)).mean(axis=1)
    return np.stack([brightness_N, contrast_N, steps_N / max(1, neighbours), clipped_N], axis=1)


def _steps(one_NHWC: np.ndarray, other_NHWC: np.ndarray) -> np.ndarray:
    """Sum of the absolute differences of each image, without leaving uint8 before the sum."""
    difference_NHWC = np.maximum(one_NHWC, other_NHWC) - np.minimum(one_NHWC, other_NHWC)
    return np.asarray(difference_NHWC.sum(axis=(1, 2, 3), dtype=np.int64))
