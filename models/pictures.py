"""What a model does, as pictures: each function returns a `matplotlib.figure.Figure`, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from models.scores import reliability

INK, BLUE, ORANGE, GREY = "#1b1b1f", "#2463a8", "#d9722e", "#b9bcc4"

MOST_COUNTED_CLASSES = 20
"""Above this many classes a number in each cell of the confusion matrix would be too small to read."""

MOST_NAMED_CLASSES = 100
LONGEST_NAME = 18
CURVES = ("loss", "accuracy", "learning_rate")


def confusion_matrix(matrix_KK: np.ndarray, classes: Sequence[str]) -> Figure:
    """True class by row, predicted class by column; the shade is the share of the row.

    The shade grows with the square root of the share, so that rare mistakes show.
    """
    count = len(classes)
    side = float(np.clip(0.45 * count + 2.5, 4.5, 16))
    figure = Figure(figsize=(side + 0.8, side), layout="compressed")
    axes = figure.subplots()
    row_total_K1 = matrix_KK.sum(axis=1, keepdims=True)
    share_KK = matrix_KK / np.maximum(row_total_K1, 1)
    image = axes.imshow(share_KK, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    accuracy = np.trace(matrix_KK) / max(int(matrix_KK.sum()), 1)
    axes.set_title(f"Confusion matrix: {accuracy:.2%} of {int(matrix_KK.sum()):,} images right", color=INK)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    _name_ticks(axes, classes)
    if count <= MOST_COUNTED_CLASSES:
        for (row, column), images in np.ndenumerate(matrix_KK):
            if images:
                colour = "white" if share_KK[row, column] > 0.3 else INK
                size = 9 if images < 10_000 else 7
                axes.text(column, row, f"{int(images)}", ha="center", va="center", color=colour, fontsize=size)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true class")
    return figure


def reliability_diagram(logits_NK: np.ndarray, labels_N: np.ndarray) -> Figure:
    """Accuracy against confidence in 15 bins, above a histogram of the confidences.

    A well calibrated model lies on the diagonal: of the images it is 80 % sure of, 80 % are right.
    """
    bins = reliability(logits_NK, labels_N)
    edges = np.linspace(0, 1, len(bins.images_B) + 1)
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1]
    figure = Figure(figsize=(5.5, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    filled = bins.images_B > 0
    above.bar(centres[filled], bins.accuracy_B[filled], width * 0.92, color=BLUE, label="accuracy of the bin")
    above.plot(bins.confidence_B[filled], bins.accuracy_B[filled], "o", color=ORANGE, label="at its mean confidence")
    above.set_title(f"Reliability: calibration error {bins.calibration_error:.4f}", color=INK)
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1.02)
    above.legend(loc="upper left", frameon=False)
    below.bar(centres, bins.images_B, width * 0.92, color=GREY)
    below.set_xlabel("confidence (probability of the predicted class)")
    below.set_ylabel("images")
    below.set_xlim(0, 1)
    for axes in (above, below):
        _plain_frame(axes)
    return figure


def learning_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """One panel each for loss, accuracy and learning rate, one line a split, over the epochs.

    `history` holds one mapping an epoch with the key `epoch` and keys such as `train/loss`, `val/loss`,
    `val/accuracy` and `learning_rate`; a value may be missing in some epochs, other keys are left out.
    """
    keys = list(dict.fromkeys(key for row in history for key in row))
    panels = [name for name in CURVES if any(_quantity(key) == name for key in keys)] or ["loss"]
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names = [key for key in keys if _quantity(key) == panel]
        for key, colour in zip(names, (BLUE, ORANGE, INK, GREY), strict=False):
            points = [(row["epoch"], row[key]) for row in history if key in row]
            marker = "o" if len(points) < 40 else None
            label = key.split("/")[0]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, label=label)
        title = panel.replace("_", " ")
        axes.set_title(title.capitalize(), color=INK)
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(names) > 1:
            axes.legend(frameon=False)
        _plain_frame(axes)
    return figure


def roofline(table: Sequence[Mapping[str, Any]], flops_per_s: float, bytes_per_s: float) -> Figure:
    """Left: each layer under the roof of the machine. Right: the time of every layer, coloured by what binds it.

    `table` has the rows of `models.layer_times.table`. A layer without arithmetic has no place on the left; one above
    the slope of the memory found its data in the caches.
    """
    figure = Figure(figsize=(13, max(4.6, 1.2 + 0.24 * len(table))), layout="compressed")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = [ORANGE if row["bound_by"] == "memory" else BLUE for row in table]
    ridge = flops_per_s / bytes_per_s
    shown = [row["flops_per_byte"] for row in table if row["flops"] and row["microseconds"]]
    ends = np.array([min([0.05, *shown]) / 2, ridge, max([ridge, *shown]) * 2])
    left.plot(ends, np.minimum(ends * bytes_per_s, flops_per_s) / 1e9, color=INK, linewidth=1.5)
    left.axvline(ridge, color=GREY, linestyle="--")
    for number, (row, colour) in enumerate(zip(table, colours, strict=True), 1):
        if row["flops"] and row["microseconds"]:
            left.plot(row["flops_per_byte"], row["gflops_per_s"], "o", color=colour, markersize=6)
            place = (row["flops_per_byte"], row["gflops_per_s"])
            left.annotate(f" {number}", place, fontsize=8, color=INK)
    left.set(xscale="log", yscale="log", xlabel="FLOP for each byte moved", ylabel="GFLOP/s")
    left.set_title(
        f"roof: {flops_per_s / 1e9:.0f} GFLOP/s, {bytes_per_s / 1e9:.0f} GB/s; left of {ridge:.1f} FLOP/byte memory "
        "binds",
        color=INK,
        fontsize=10,
    )
    places = np.arange(len(table))
    right.barh(places, [row["microseconds"] for row in table], color=colours)
    names = [f"{number} {_plain_text(row['operations'])}" for number, row in enumerate(table, 1)]
    right.set_yticks(places, names, fontsize=8, parse_math=False)
    right.invert_yaxis()
    right.set_xlabel("microseconds for a batch")
    bound = [sum(row["microseconds"] for row in table if row["bound_by"] == by) for by in ("memory", "arithmetic")]
    share = bound[0] / max(sum(bound), 1e-9)
    right.set_title(f"orange: bound by memory, {share:.0%} of the time", color=INK, fontsize=10)
    for axes in (left, right):
        _plain_frame(axes)
    return figure


def _quantity(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def _name_ticks(axes: Axes, classes: Sequence[str]) -> None:
    """Class names on both axes, shortened, in a size that keeps 100 of them apart; every nth above that."""
    step = -(-len(classes) // MOST_NAMED_CLASSES)
    places = range(0, len(classes), step)
    names = [_plain_text(classes[place]) for place in places]
    size = 10 if len(classes) <= MOST_COUNTED_CLASSES else 8 if len(classes) <= 40 else 6
    upright = max(map(len, names)) > 2 or len(classes) > MOST_COUNTED_CLASSES
    axes.set_xticks(places, names, fontsize=size, rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(places, names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)


def _plain_text(name: str) -> str:
    """A class name on one line, not too long, without characters that no font has."""
    clean = "".join(char if char.isprintable() else "?" for char in name)
    return clean if len(clean) <= LONGEST_NAME else clean[: LONGEST_NAME - 1] + "…"


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.4)
    axes.set_axisbelow(True)
