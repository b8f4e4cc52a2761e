"""Augmentation of a whole batch at once, on the device that trains."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data_loader.batches import read_ahead, training_batches
from data_loader.dataset import Dataset


def device_batches(
    data: Dataset,
    *,
    batch_size: int,
    augmentation: str,
    seed: int,
    steps: range,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """images_NHWC and labels_N of the training split on `device`, shuffled, augmented and read ahead of their use.

    `steps` counts optimiser steps from the start of training; `batch_size` is global (see `training_batches`).
    """
    batches = training_batches(
        data.images_NHWC,
        data.labels_N,
        data.rows["train"],
        batch_size=batch_size,
        seed=seed,
        steps=steps,
        rank=rank,
        world_size=world_size,
    )
    for step, batch in zip(steps, read_ahead(batches), strict=True):
        images_NHWC = torch.from_numpy(batch.images_NHWC).to(device)
        images_NHWC = augment(images_NHWC, augmentation, seed=seed, step=step, rank=rank, world_size=world_size)
        yield images_NHWC, torch.from_numpy(batch.labels_N).to(device)


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
