"""Pictures of a data set. Figures are made without pyplot: no window system, no global state."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from data_loader.dataset import Dataset
from data_loader.splits import SPLITS

MOST_BARS = 60  # more classes than this are drawn without names
GRID_CLASSES, GRID_COLUMNS = 10, 10


def class_histogram(dataset: Dataset) -> Figure:
    """Images of each class, one bar a class, stacked by split."""
    named = len(dataset.classes) <= MOST_BARS
    figure = Figure(figsize=(min(16.0, 3 + 0.4 * len(dataset.classes)), 4), layout="constrained")
    axes = figure.add_subplot()
    positions = np.arange(len(dataset.classes))
    bottom = np.zeros(len(dataset.classes))
    for split in SPLITS:
        counts_K = np.bincount(dataset.labels_N[dataset.rows[split]], minlength=len(dataset.classes))
        axes.bar(positions, counts_K, bottom=bottom, label=f"{split} ({counts_K.sum():,})")
        bottom = bottom + counts_K
    axes.set_xticks(positions if named else [])
    if named:
        slant = max(map(len, dataset.classes)) * len(dataset.classes) > 80
        labels = axes.set_xticklabels([_short(name) for name in dataset.classes])
        for label in labels:
            label.set(parse_math=False, rotation=60 if slant else 0, ha="right" if slant else "center")
    axes.set_ylabel("images")
    axes.set_title(f"{_short(dataset.name)}: {len(dataset.classes)} classes", parse_math=False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def sample_grid(dataset: Dataset, seed: int) -> Figure:
    """Ten random training images of each of the first ten classes, a row a class."""
    random = np.random.default_rng(seed)
    train_rows = dataset.rows["train"]
    rows: list[int] = []
    captions: list[str] = []
    for label, name in list(enumerate(dataset.classes))[:GRID_CLASSES]:
        candidates = train_rows[dataset.labels_N[train_rows] == label]
        chosen = random.choice(candidates, min(GRID_COLUMNS, len(candidates)), replace=False)
        rows += sorted(chosen.tolist())
        captions += [name] * len(chosen)
    return image_grid(dataset.images_NHWC[rows], captions)


def image_grid(images_NHWC: np.ndarray, captions: Sequence[str], columns: int = GRID_COLUMNS) -> Figure:
    """uint8 images [N, H, W, C], C 1 or 3, row by row, each under its caption."""
    count, height, width, _ = images_NHWC.shape
    columns = max(1, min(columns, count))
    lines = max(1, math.ceil(count / columns))
    # One picture with all images in it: an axes for each would take a hundred times as long.
    gap_x, gap_y = max(1, width // 8), max(2, height * 2 // 5)
    cell_y, cell_x = height + gap_y, width + gap_x
    mosaic = np.full((lines * cell_y + gap_x, columns * cell_x + gap_x, 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(columns, columns * mosaic.shape[0] / mosaic.shape[1]))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for position, (image_HWC, caption) in enumerate(zip(images_NHWC, captions, strict=True)):
        top, left = position // columns * cell_y + gap_y, position % columns * cell_x + gap_x
        mosaic[top : top + height, left : left + width] = image_HWC
        middle = left + width / 2 - 0.5
        axes.text(middle, top - 1, _short(caption, 14), fontsize=7, ha="center", va="bottom", parse_math=False)
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure


def _short(text: str, most: int = 24) -> str:
    """Readable in a picture: one line, not too long, nothing that cannot be encoded."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"
