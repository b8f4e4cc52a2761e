"""The reference and a window side by side: each function returns a `matplotlib.figure.Figure`, no global state."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from monitoring.drift import faulty
from monitoring.observations import STATISTICS, Observations
from monitoring.reference import even_rows

INK, REFERENCE, WINDOW = "#1b1b1f", "#8a93a3", "#d9722e"
BINS = 40
MOST_POINTS = 2_000
MOST_CLASSES = 30
"""Of more classes those are drawn whose share changed most."""
LONGEST_NAME = 18
UNITS = {"brightness": "mean value", "contrast": "standard deviation", "sharpness": "mean step", "clipped": "share"}


def figures(reference: Observations, window: Observations) -> dict[str, Figure]:
    """All of them by name, of the window's rows that have all their numbers."""
    sound = window.rows(np.flatnonzero(~faulty(window)))
    return {make.__name__: make(reference, sound) for make in (statistics, embedding_map, classes, confidence)}


def statistics(reference: Observations, window: Observations) -> Figure:
    """A histogram of each image statistic."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    for place, (name, axes) in enumerate(zip(STATISTICS, figure.subplots(2, 2).flat, strict=True)):
        _histogram(axes, reference.statistics_NS[:, place], window.statistics_NS[:, place])
        axes.set_title(name.capitalize(), color=INK)
        axes.set_xlabel(UNITS[name])
    _legend(figure)
    return figure


def confidence(reference: Observations, window: Observations) -> Figure:
    """Histograms of the probability of the predicted class."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    _histogram(axes, reference.confidence_N, window.confidence_N, limits=(0.0, 1.0))
    axes.set_xlabel("confidence (probability of the predicted class)")
    _legend(figure)
    return figure


def classes(reference: Observations, window: Observations) -> Figure:
    """The share of each predicted class."""
    count = len(reference.classes)
    shares = [np.bincount(each.predicted_N, minlength=count) / len(each) for each in (reference, window)]
    changed = np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")[:MOST_CLASSES]
    shown = np.sort(changed)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))
    axes.bar(places - 0.2, shares[0][shown], 0.4, color=REFERENCE, label="reference")
    axes.bar(places + 0.2, shares[1][shown], 0.4, color=WINDOW, label="window")
    names = [_plain_text(reference.classes[label]) for label in shown]
    upright = max(map(len, names)) * len(names) > 90
    axes.set_xticks(places, names, rotation=90 if upright else 0, parse_math=False)
    axes.tick_params(axis="x", length=0)
    if count > MOST_CLASSES:
        axes.set_xlabel(f"the {MOST_CLASSES} of {count} classes that changed most")
    _frame(axes)
    _legend(figure)
    return figure


def embedding_map(reference: Observations, window: Observations) -> Figure:
    """Embeddings of both in their two directions of largest variance, at most MOST_POINTS of each."""
    parts = [each.embeddings_NE[even_rows(len(each), MOST_POINTS)] for each in (reference, window)]
    both_NE = np.concatenate(parts).astype(np.float64)
    centred_NE = both_NE - both_NE.mean(axis=0)
    _, directions_EE = np.linalg.eigh(centred_NE.T @ centred_NE)
    points_N2 = centred_NE @ directions_EE[:, ::-1][:, :2]
    if points_N2.shape[1] == 1:  # embeddings of one number
        points_N2 = np.concatenate([points_N2, np.zeros_like(points_N2)], axis=1)
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    for label, colour, rows in (
        ("reference", REFERENCE, slice(0, len(parts[0]))),
        ("window", WINDOW, slice(len(parts[0]), None)),
    ):
        axes.scatter(points_N2[rows, 0], points_N2[rows, 1], s=7, color=colour, alpha=0.55, linewidths=0, label=label)
    axes.set_xlabel("first direction of the embeddings")
    axes.set_ylabel("second direction")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _histogram(
    axes: Axes, reference_N: np.ndarray, window_N: np.ndarray, limits: tuple[float, float] | None = None
) -> None:
    """Share of the images in each bin, the reference filled, the window as a line."""
    lowest, highest = limits or (
        float(min(reference_N.min(), window_N.min())),
        float(max(reference_N.max(), window_N.max())),
    )
    edges = np.linspace(lowest, highest if highest > lowest else lowest + 1, BINS + 1)
    reference_B, window_B = (np.histogram(each, edges)[0] / len(each) for each in (reference_N, window_N))
    axes.stairs(reference_B, edges, label="reference", color=REFERENCE, alpha=0.6, fill=True)
    axes.stairs(window_B, edges, label="window", color=WINDOW, linewidth=1.8)
    _frame(axes)


def _frame(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=REFERENCE, alpha=0.3)
    axes.set_axisbelow(True)


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, markerscale=2.5)


def _plain_text(name: str) -> str:
    """A class name on one line, not too long, without characters that no font has."""
    clean = "".join(char if char.isprintable() else "?" for char in name)
    return clean if len(clean) <= LONGEST_NAME else clean[: LONGEST_NAME - 1] + "…"
