"""The report's words, numbers and pictures, from comparisons whose outcome is known."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from monitoring import MonitoringError, pictures
from monitoring.drift import PARTS, Drift, Finding
from monitoring.observations import Observations
from monitoring.prediction_log import Feedback
from monitoring.reference import Reference
from monitoring.report import Report
from monitoring.window import Span, span

WHEN = Span(datetime(2026, 3, 14, 11, tzinfo=UTC), datetime(2026, 3, 14, 12, tzinfo=UTC))
NOTHING = Feedback(np.empty(0, np.int64), (), np.empty(0), np.empty(0, np.bool_))


def seen(count: int, classes: int = 3, length: int = 4, seed: int = 0) -> Observations:
    random = np.random.default_rng(seed)
    shares_NK = random.dirichlet(np.ones(classes), count).astype(np.float32)
    names = tuple(f"a rather long name of class {label}" for label in range(classes))
    embeddings_NE = random.standard_normal((count, length)).astype(np.float32)
    statistics_NS = random.random((count, 4), np.float32)
    return Observations(names, statistics_NS, embeddings_NE, shares_NK.argmax(1), shares_NK.max(1), shares_NK)


def report(*drifted: str, feedback: Feedback = NOTHING, **changes: str) -> Report:
    """A report in which one test in each of the parts named has found drift."""
    findings = [
        Finding(part, f"test of {part}", "share", 0.01, 0.06, 0.05, 0.00001 if part in drifted else 0.5, score)
        for part in PARTS
        for score in [4.0 if part in drifted else 0.25]
    ]
    observed = seen(200)
    labels_N = observed.predicted_N.copy()
    labels_N[:20] = (labels_N[:20] + 1) % 3
    drift = Drift(tuple(findings), 500, 400, 0.01)
    return replace(
        Report(drift, "digits", "3", WHEN, "run abc", Reference(**vars(observed), labels_N=labels_N), feedback),
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("drifted", "verdict"),
    [
        ([], "No drift"),
        (["label"], "Drift: predicted classes"),
        (["quality", "feature"], "Drift: appearance and input quality"),
        (list(PARTS), "Drift: appearance, predicted classes, confidence and input quality"),
    ],
)
def test_the_verdict_names_the_parts(drifted: list[str], verdict: str) -> None:
    found = report(*drifted)
    assert found.sentence == (
        f"{verdict}. 500 images of digits version 3 from 2026-03-14 11:00 UTC to 2026-03-14 12:00 UTC, "
        "against 200 of the reference (run abc)"
    )
    assert found.markdown().startswith(f"**{verdict}.** 500 images")
    assert found.markdown().count("| drift |") == len(drifted)
    assert len(re.findall(r'<section id="\w+"><h2>[\w ]+ <span class="bad">drift</span>', found.html())) == len(drifted)
    assert f"<h1>{verdict}</h1>" in found.html()


def test_numbers_are_the_same_as_metrics_and_as_data() -> None:
    right = Feedback(np.arange(4), ("a",) * 4, np.full(4, np.nan), np.array([True, True, True, False]))
    found = report("feature", feedback=right)
    assert found.reference_accuracy == 0.9
    metrics, data = found.metrics(), json.loads(json.dumps(found.data()))
    assert metrics == {
        **{f"drift_{part}_p": 0.00001 if part == "feature" else 0.5 for part in PARTS},
        **{f"drift_{part}_score": 4.0 if part == "feature" else 0.25 for part in PARTS},
        "drift_detected": 1,
        "window_images": 500,
        "reference_images": 200,
        "feedback_images": 4,
        "feedback_accuracy": 0.75,
    }
    assert (data["drifted_parts"], data["window"]["compared"]) == (["feature"], 400)
    assert data["feedback"] == {"images": 4, "accuracy": 0.75}
    (test,) = data["parts"]["feature"]["tests"]
    assert (test["effect"], test["least_effect"], test["reference"], test["window"]) == (0.05, 0.01, 0.01, 0.06)
    assert "4 images, 75.00% of them right (90.00% in the reference)" in found.html()
    assert "feedback_accuracy" not in report().metrics()


def test_names_from_outside_are_text_in_the_page() -> None:
    html = report("label", model="<script>alert('$verdict')</script>", origin='"><img src=x>').html()
    assert "<script" not in html
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;alert(&#x27;$verdict&#x27;)&lt;/script&gt;") == 3, "title, header and table"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("classes", "length"), [(1, 1), (2, 2), (50, 300)])
def test_pictures_of_any_shape_of_network(classes: int, length: int) -> None:
    reference, window = seen(120, classes, length), seen(80, classes, length, seed=1)
    statistics_NS = window.statistics_NS.copy()
    statistics_NS[:5] = np.nan
    figures = pictures.figures(reference, replace(window, statistics_NS=statistics_NS))
    assert list(figures) == ["statistics", "embedding_map", "classes", "confidence"]
    for figure in figures.values():
        picture = np.asarray(Image.open(io.BytesIO(pictures.png(figure))).convert("RGB"))
        assert picture.shape[1] > 900
        assert (picture != 255).any(axis=2).mean() > 0.01, "something is drawn"


def test_bars_are_the_shares_of_the_classes() -> None:
    reference, window = seen(300), seen(100, seed=1)
    figure: Figure = pictures.classes(reference, window)
    heights = [bar.get_height() for bar in figure.axes[0].patches]  # type: ignore[attr-defined]
    expected = [(each.predicted_N == label).mean() for each in (reference, window) for label in range(3)]
    assert heights == pytest.approx(expected)


def test_a_span_ends_now_or_when_told() -> None:
    now = datetime.now(UTC)
    found = span(2.0)
    assert abs((found.until - now).total_seconds()) < 60
    assert (found.until - found.since).total_seconds() == 7200
    told = span(2.0, "2026-03-14", "2026-03-14T03:00+02:00")
    assert (told.since, told.until) == (datetime(2026, 3, 14, tzinfo=UTC), datetime(2026, 3, 14, 1, tzinfo=UTC))
    for hours, since, until in ((2.0, "x", ""), (2.0, "2026-03-15", "2026-03-14"), (1e9, "", "")):
        with pytest.raises(MonitoringError):
            span(hours, since, until)
