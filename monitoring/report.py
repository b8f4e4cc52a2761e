"""What a comparison found, for people and for programs: a sentence, Markdown, JSON, one self-contained HTML file.

The HTML holds no script and loads nothing; every name that came from outside is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from monitoring.drift import MEASURES, PARTS, Drift, Finding
from monitoring.prediction_log import Feedback
from monitoring.reference import Reference
from monitoring.window import Span

TEMPLATE = Path(__file__).with_name("report.html")

TITLES = {
    "feature": "Appearance",
    "label": "Predicted classes",
    "confidence": "Confidence",
    "quality": "Input quality",
}
MEANINGS = {
    "feature": "Image statistics, the network's view of the images (its embedding), and how many images are far from "
    "all of the reference. Drift here means other images than the model was tested on: another camera, another light, "
    "another kind of object. Look at the images; label some; train with them.",
    "label": "How often each class is predicted. Drift here means that the world changed its mix, or that the model "
    "takes new images for something that they are not.",
    "confidence": "How sure the model is of its answers. Less than before mostly means that it meets what it was not "
    "trained on; this part moves before the accuracy is known.",
    "quality": "Images that are no good (blank, badly exposed, odd in their statistics, sent again and again) and rows "
    "with numbers missing. Drift here is mostly a fault on the way to the model.",
}
HEAD = ("Test", "Reference", "Window", "Difference", "counts from", "p", "Verdict")
PICTURES = {
    "feature": ("statistics", "embedding_map", "strangest"),
    "label": ("classes",),
    "confidence": ("confidence",),
    "quality": (),
}
"""Names of the pictures that belong to each part."""
CAPTIONS = {
    "statistics": "Image statistics, reference and window",
    "embedding_map": "Embeddings in their two directions of largest variance: a point an image",
    "strangest": "The kept images that are farthest from the reference, under the class predicted and their distance "
    "(1: as far as 99 % of the reference's images are from each other)",
    "classes": "Share of each predicted class",
    "confidence": "Probability of the predicted class",
}


@dataclass(frozen=True)
class Report:
    """All that the report says."""

    drift: Drift
    model: str
    version: str
    span: Span
    origin: str
    """Where the reference comes from: a run or a file."""
    reference: Reference
    feedback: Feedback
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files by name."""

    @property
    def verdict(self) -> str:
        """A few words."""
        parts = [TITLES[part].lower() for part in self.drift.drifted_parts]
        if not parts:
            return "No drift"
        *first, last = parts
        return f"Drift: {', '.join(first)} and {last}" if first else f"Drift: {last}"

    @property
    def sentence(self) -> str:
        """The verdict and what it is about."""
        return f"{self.verdict}. {self.about}"

    @property
    def about(self) -> str:
        """What was compared with what."""
        return (
            f"{self.drift.images:,} images of {self.model} version {self.version} from {' to '.join(self.span.words)}, "
            f"against {len(self.reference):,} of the reference ({self.origin})"
        )

    @property
    def reference_accuracy(self) -> float:
        """Share of right predictions in the reference."""
        return float((self.reference.predicted_N == self.reference.labels_N).mean())

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions among those with feedback; None where there is none."""
        return self.feedback.accuracy

    def metrics(self) -> dict[str, float]:
        """The numbers by the names of a run's metrics."""
        drift = self.drift
        numbers = {f"drift_{part}_p": drift.p(part) for part in PARTS}
        numbers |= {f"drift_{part}_score": score for part, score in drift.scores().items()}
        numbers |= {"drift_detected": float(drift.drifted), "window_images": drift.images}
        numbers |= {"reference_images": len(self.reference), "feedback_images": len(self.feedback.right_F)}
        return numbers if self.accuracy is None else numbers | {"feedback_accuracy": self.accuracy}

    def markdown(self) -> str:
        """The sentence and a table of the parts."""
        rows = [
            f"| {TITLES[part]} | {_verdict(part in self.drift.drifted_parts)} | {self.drift.score(part):.2f} "
            f"| {_p(self.drift.p(part))} |"
            for part in PARTS
        ]
        said = [f"**{self.verdict}.** {self.about}", ""]
        said += ["| part | verdict | score (drift from 1 on) | p |", "|---|---|---|---|", *rows]
        if self.accuracy is not None:
            said += ["", self._feedback_words()]
        return "\n".join(said)

    def data(self) -> dict[str, Any]:
        """The same as plain values."""
        drift = self.drift
        return {
            "drifted": drift.drifted,
            "drifted_parts": list(drift.drifted_parts),
            "false_alarm_rate": drift.false_alarm_rate,
            "model": self.model,
            "version": self.version,
            "window": {
                "since": self.span.since.isoformat(),
                "until": self.span.until.isoformat(),
                "images": drift.images,
                "compared": drift.compared,
            },
            "reference": {
                "from": self.origin,
                "images": len(self.reference),
                "accuracy": self.reference_accuracy,
            },
            "feedback": {"images": len(self.feedback.right_F), "accuracy": self.accuracy},
            "parts": {
                part: {
                    "drifted": part in drift.drifted_parts,
                    "score": drift.score(part),
                    "p": drift.p(part),
                    "tests": [
                        {
                            "name": each.name,
                            "drifted": each.drifted,
                            "score": each.score,
                            "p": each.p,
                            "effect": each.effect,
                            "least_effect": each.least_effect,
                            "measure": MEASURES[each.kind],
                            "reference": each.reference,
                            "window": each.window,
                        }
                        for each in drift.part(part)
                    ],
                }
                for part in PARTS
            },
        }

    def html(self) -> str:
        """A page of its own."""
        drift = self.drift
        cards = "".join(
            f'<a class="card {_class(part in drift.drifted_parts)}" href="#{part}"><b>{TITLES[part]}</b>'
            f"<span>{_verdict(part in drift.drifted_parts)}</span>"
            f'<meter max="2" value="{min(2, drift.score(part)):.3f}"></meter>'
            f"<small>score {_number(drift.score(part))}, p {_p(drift.p(part))}</small></a>"
            for part in PARTS
        )
        facts = {
            "Model": f"{self.model}, version {self.version}",
            "Window": f"{' to '.join(self.span.words)}: {drift.images:,} images"
            + (f", {drift.compared:,} of them compared" if drift.compared != drift.images else ""),
            "Reference": f"{self.origin}: {len(self.reference):,} images, "
            f"of which the model had {self.reference_accuracy:.2%} right",
            "Feedback": self._feedback_words(),
            "False alarms": f"at most {drift.false_alarm_rate:.1%} of windows without drift, over all "
            f"{len(drift.findings)} tests together",
        }
        rows = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
        sections = "".join(self._section(part) for part in PARTS)
        return Template(TEMPLATE.read_text("utf-8")).substitute(
            title=escape(f"{self.verdict}: {self.model} version {self.version}"),
            state=_class(drift.drifted),
            verdict=escape(self.verdict),
            about=escape(self.about),
            cards=cards,
            facts=rows,
            sections=sections,
        )

    def _section(self, part: str) -> str:
        drifted = part in self.drift.drifted_parts
        head = "".join(f"<th>{name}</th>" for name in HEAD)
        rows = "".join(_row(each) for each in self.drift.part(part))
        pictures = "".join(
            f'<figure><img alt="{CAPTIONS[name]}" src="data:image/png;base64,'
            f'{base64.b64encode(self.pictures[name]).decode()}"><figcaption>{CAPTIONS[name]}</figcaption></figure>'
            for name in PICTURES[part]
            if name in self.pictures
        )
        return (
            f'<section id="{part}"><h2>{TITLES[part]} <span class="{_class(drifted)}">{_verdict(drifted)}</span></h2>'
            f"<p>{MEANINGS[part]}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{pictures}</section>"
        )

    def _feedback_words(self) -> str:
        if self.accuracy is None:
            return "none for these images"
        return (
            f"{len(self.feedback.right_F):,} images, {self.accuracy:.2%} of them right "
            f"({self.reference_accuracy:.2%} in the reference)"
        )


def _row(finding: Finding) -> str:
    values = [_value(finding, each) for each in (finding.reference, finding.window)]
    state = _class(finding.drifted)
    return (
        f'<tr class="{state}"><th>{escape(finding.name)}</th><td>{values[0]}</td><td>{values[1]}</td>'
        f'<td title="{MEASURES[finding.kind]}">{finding.effect:.3f}</td><td>{finding.least_effect:.2f}</td>'
        f"<td>{_p(finding.p)}</td><td>{_verdict(finding.drifted)}</td></tr>"
    )


def _value(finding: Finding, value: float) -> str:
    if finding.kind == "classes":
        return ""
    if finding.kind in ("share", "repeated") or finding.name in ("clipped", "confidence"):
        return f"{value:.1%}"
    return f"{value:.2f}" if finding.kind == "classifier" else f"{value:.1f}"


def _verdict(drifted: bool) -> str:
    return "drift" if drifted else "no drift"


def _class(drifted: bool) -> str:
    return "bad" if drifted else "good"


def _p(p: float) -> str:
    return "&lt; 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
