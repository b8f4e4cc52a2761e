"""Augmentation of a whole batch at once, on the device that trains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AUGMENTATIONS = ("none", "shift", "shift_flip")


def augment(images_NHWC: Tensor, kind: str, *, seed: int, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Shift each image by up to a tenth of its size (edges repeated); "shift_flip" also mirrors half of them.

    The draw is a function of seed and step for the global batch, of which a process applies its own share: the result
    does not depend on how many processes there are.
    """
    if kind == "none":
        return images_NHWC
    count, height, width, _ = images_NHWC.shape
    draw = np.random.default_rng([seed, step])
    share = slice(rank * count, (rank + 1) * count)
    rows_NH = _shifted(draw, height, count * world_size)[share]
    columns_NW = _shifted(draw, width, count * world_size)[share]
    if kind == "shift_flip":
        mirrored = draw.integers(0, 2, count * world_size).astype(bool)[share]
        columns_NW[mirrored] = columns_NW[mirrored, ::-1]
    device = images_NHWC.device
    return images_NHWC[
        torch.arange(count, device=device)[:, None, None],
        torch.from_numpy(rows_NH).to(device)[:, :, None],
        torch.from_numpy(columns_NW).to(device)[:, None, :],
    ]


def _shifted(draw: np.random.Generator, size: int, count: int) -> np.ndarray:
    """For each of `count` images the source index of every one of `size` positions."""
    reach = size // 10  # none below ten pixels, where a single one would already cut strokes off
    offsets_N1 = draw.integers(-reach, reach + 1, count)[:, None]
    return np.asarray(np.clip(np.arange(size)[None] + offsets_N1, 0, size - 1))
