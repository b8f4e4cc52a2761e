"""Whether a window of predictions is like the reference: thirteen tests in four parts, one known false-alarm rate.

A test gives a p-value: the chance of a difference at least this large between two random parts of one collection of
images. Each is multiplied by the number of tests (Bonferroni, whatever depends on what), so that all of them together
raise a false alarm in at most `false_alarm_rate` of the windows without drift. Besides, a difference has to be large
enough to matter (`LEAST`): with enough images the smallest one is no chance. docs/monitoring.md says how each works,
docs/decisions/0015-drift.md why these, and what was measured.

What the tests compare is fixed before they look at who is who, or by images that they do not use afterwards; that keeps
every p-value valid for small references too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monitoring import MonitoringError
from monitoring.distance import Distances
from monitoring.observations import STATISTICS, Observations
from monitoring.reference import even_rows

PARTS = ("feature", "label", "confidence", "quality")
FALSE_ALARM_RATE = 0.01
LEAST_IMAGES = 50
"""Fewer images in the window or the reference say nothing: half of them teach a classifier."""
MOST_ROWS = 10_000
"""Of a larger window so many images are compared, evenly spread: with them a share is known to within 1 %."""

LEAST = {"distribution": 0.1, "classifier": 0.1, "classes": 0.05, "share": 0.01, "repeated": 0.05}
"""Least differences that count. distribution: largest distance of two distribution functions. classifier: area under
the curve above 0.5. classes: share of images that would have to change their class. The others: additional share."""

BLANK_CONTRAST = 2.0
"""An image whose values deviate less than this from their mean (of 0..255) shows nothing."""
ODD_PERCENTILES = (0.1, 99.9)
"""An image with a statistic outside these percentiles of the reference is odd."""
CLIPPED_PERCENTILE = 99.5
"""An image with more clipped values than this percentile of the reference is badly exposed."""
STATISTICS_RANGE = (0.0, 255.0)
RIDGE = 100.0
"""Weight of the classifier's penalty, for features of unit variance."""
FEW = 5.0
"""Expected images of a class below which the chi-squared distribution is not trusted (Cochran 1954)."""


MEASURES = {
    "distribution": "largest distance between the distributions",
    "classifier": "how much better than by chance a classifier tells window from reference",
    "classes": "share of images that would have to change their class",
    "share": "additional share of images",
    "repeated": "additional share of images",
}
"""What the effect of each kind of test is; all lie between 0 and 1, that of the classifier between 0 and 0.5."""


@dataclass(frozen=True)
class Finding:
    """One test."""

    part: str
    name: str
    kind: str
    """A key of LEAST and MEASURES."""
    reference: float
    """What it is in the reference: a mean, a share, 0.5 for the classifier, 0 for the classes."""
    window: float
    effect: float
    p: float
    """Corrected for the number of tests: to be compared with the false-alarm rate of all together."""
    score: float
    """How far the effect and the evidence are on their way to drift, the lesser of the two; from 1 on it is drift."""

    @property
    def least_effect(self) -> float:
        """The least effect that counts."""
        return LEAST[self.kind]

    @property
    def drifted(self) -> bool:
        return self.score >= 1


@dataclass(frozen=True)
class Drift:
    """What became of a comparison."""

    findings: tuple[Finding, ...]
    images: int
    """Rows of the window."""
    compared: int
    """Those that the tests have looked at: at most MOST_ROWS, and without the faulty ones."""
    false_alarm_rate: float

    @property
    def drifted(self) -> bool:
        return any(finding.drifted for finding in self.findings)

    @property
    def drifted_parts(self) -> tuple[str, ...]:
        """Those of PARTS in which a test found drift."""
        return tuple(part for part in PARTS if any(finding.drifted for finding in self.part(part)))

    def part(self, part: str) -> tuple[Finding, ...]:
        """The findings of one of PARTS."""
        return tuple(finding for finding in self.findings if finding.part == part)

    def p(self, part: str) -> float:
        """The smallest corrected p-value of a part: its drift is no chance where this is below the false-alarm rate."""
        return min(finding.p for finding in self.part(part))

    def score(self, part: str) -> float:
        """The largest score of a part's tests: drift from 1 on."""
        return max(finding.score for finding in self.part(part))

    def scores(self) -> dict[str, float]:
        """The score of each of PARTS."""
        return {part: self.score(part) for part in PARTS}


def compare(reference: Observations, window: Observations, *, false_alarm_rate: float = FALSE_ALARM_RATE) -> Drift:
    """Test a window of predictions against the reference of the model that made them.

    reference: `monitoring.reference.read_reference`. window: `monitoring.prediction_log.read_window`, of one model and
    version; or any other `Observations`. false_alarm_rate: largest share of windows without drift that may be found
    drifted, over all tests. Gives a `Drift`: `drifted`, `drifted_parts`, and for each test the numbers in the reference
    and in the window, the effect, the corrected p-value and the verdict.

    Raises MonitoringError where the two cannot be compared: other classes, embeddings of another length, fewer than
    LEAST_IMAGES images.
    """
    _check_comparable(reference, window)
    rows = np.flatnonzero(~faulty(window))
    if len(rows) < LEAST_IMAGES:
        raise MonitoringError(
            f"of the window's {len(window)} images {len(rows)} have all their numbers; allowed: at least {LEAST_IMAGES}"
        )
    sound = window.rows(rows)
    seen = sound.rows(even_rows(len(sound), MOST_ROWS))
    tests = [
        *_statistics(reference, seen),
        *_embedding(reference, seen),
        _classes(reference, seen, false_alarm_rate),
        _distribution("confidence", "confidence", reference.confidence_N, seen.confidence_N),
        *_quality(reference, seen),
        _more("quality", "repeated", *_repeated(reference, sound), kind="repeated"),
        _more("quality", "numbers missing or impossible", faulty(reference), faulty(window)),
    ]
    findings = tuple(_judged(test, min(1.0, test.p * len(tests)), false_alarm_rate) for test in tests)
    return Drift(findings, window.counted(), len(seen), false_alarm_rate)


@dataclass(frozen=True)
class _Test:
    part: str
    name: str
    kind: str
    reference: float
    window: float
    effect: float
    p: float
    """Of this test alone."""


def _judged(test: _Test, p: float, false_alarm_rate: float) -> Finding:
    evidence = np.log(p) / np.log(false_alarm_rate) if p > 0 else np.inf
    score = float(min(test.effect / LEAST[test.kind], evidence))
    return Finding(test.part, test.name, test.kind, test.reference, test.window, test.effect, p, score)


def _statistics(reference: Observations, window: Observations) -> list[_Test]:
    return [
        _distribution("feature", name, reference.statistics_NS[:, place], window.statistics_NS[:, place])
        for place, name in enumerate(STATISTICS)
    ]


def _distribution(part: str, name: str, reference_N: np.ndarray, window_N: np.ndarray) -> _Test:
    """Kolmogorov-Smirnov, two-sided: right without assumptions, and with ties on the safe side."""
    from scipy import stats

    found = stats.ks_2samp(reference_N, window_N, method="asymp")
    means = float(reference_N.mean(dtype=np.float64)), float(window_N.mean(dtype=np.float64))
    return _Test(part, name, "distribution", *means, float(found.statistic), float(found.pvalue))


def _embedding(reference: Observations, window: Observations) -> list[_Test]:
    """Two questions. Do the embeddings as a whole look different: can a linear classifier learn to tell them apart
    (Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", ICLR 2017)? And are more of them far from all of
    the reference, though the rest is as ever?

    Every second image teaches (the classifier, or the distances), the others are tested.
    """
    from scipy import stats
    from sklearn.linear_model import RidgeClassifier

    reference_NE, window_NE = reference.embeddings_NE, window.embeddings_NE
    both_NE = np.concatenate([reference_NE, window_NE])
    scale_E = both_NE.std(axis=0, dtype=np.float64)
    scale_E[scale_E == 0] = 1
    taught = [reference_NE[::2] / scale_E, window_NE[::2] / scale_E]
    who_N = np.repeat([0, 1], [len(each) for each in taught])
    classifier = RidgeClassifier(RIDGE, class_weight="balanced").fit(np.concatenate(taught), who_N)
    scores = [classifier.decision_function(each[1::2] / scale_E) for each in (window_NE, reference_NE)]
    found = stats.mannwhitneyu(*scores, alternative="greater")
    area = float(found.statistic) / (len(scores[0]) * len(scores[1]))
    distances = Distances(reference_NE[::2])
    far, far_now = (distances.to(each) > distances.threshold for each in (reference_NE[1::2], window_NE))
    return [
        _Test("feature", "embedding", "classifier", 0.5, area, max(0.0, area - 0.5), float(found.pvalue)),
        _more("feature", "far from the reference", far, far_now),
    ]


def _classes(reference: Observations, window: Observations, false_alarm_rate: float) -> _Test:
    """Chi-squared test of the predicted classes; where a class is rare, by random tables with the same sums."""
    from scipy import stats

    classes = len(reference.classes)
    counts = np.stack([np.bincount(each.predicted_N, minlength=classes) for each in (reference, window)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    effect = float(np.abs(shares[0] - shares[1]).sum() / 2)
    counts = counts[:, counts.sum(axis=0) > 0]
    p = 1.0
    if counts.shape[1] > 1:
        method = None
        if stats.contingency.expected_freq(counts).min() < FEW:
            tables = int(np.ceil(1000 / false_alarm_rate))  # the smallest p-value is well below what counts
            method = stats.MonteCarloMethod(n_resamples=tables, batch=1000, rng=np.random.default_rng(0))
        p = float(stats.chi2_contingency(counts, correction=False, method=method).pvalue)
    return _Test("label", "predicted classes", "classes", 0.0, effect, effect, p)


def _quality(reference: Observations, window: Observations) -> list[_Test]:
    """Images that are bad in themselves or unlike those of the reference, of which every second one sets the limits."""
    limits_NS, tested_NS = reference.statistics_NS[::2], reference.statistics_NS[1::2]
    lowest_S, highest_S = np.percentile(limits_NS, ODD_PERCENTILES, axis=0)
    contrast, clipped = STATISTICS.index("contrast"), STATISTICS.index("clipped")
    most_clipped = np.percentile(limits_NS[:, clipped], CLIPPED_PERCENTILE)

    def odd(statistics_NS: np.ndarray) -> np.ndarray:
        return np.asarray(((statistics_NS < lowest_S) | (statistics_NS > highest_S)).any(axis=1))

    def blank(statistics_NS: np.ndarray) -> np.ndarray:
        return np.asarray(statistics_NS[:, contrast] < BLANK_CONTRAST)

    def badly_exposed(statistics_NS: np.ndarray) -> np.ndarray:
        return np.asarray(statistics_NS[:, clipped] > most_clipped)

    return [
        _more("quality", name, question(tested_NS), question(window.statistics_NS))
        for name, question in (("blank", blank), ("badly exposed", badly_exposed), ("odd", odd))
    ]


def _more(part: str, name: str, reference_N: np.ndarray, window_N: np.ndarray, kind: str = "share") -> _Test:
    """Fisher's exact test: is the share of images that are so larger in the window?"""
    from scipy import stats

    table = [[int(each.sum()), int((~each).sum())] for each in (window_N, reference_N)]
    shares = float(reference_N.mean()), float(window_N.mean())
    p = float(stats.fisher_exact(table, alternative="greater").pvalue)
    return _Test(part, name, kind, *shares, max(0.0, shares[1] - shares[0]), p)


def _repeated(reference: Observations, window: Observations) -> tuple[np.ndarray, np.ndarray]:
    """Whether an image came before: the same statistics, to a thousandth of a grey level.

    The more images, the more of them repeat one by chance: of both the same number is looked at, from the beginning.
    """
    images = min(len(reference), len(window))
    found = []
    for each in (reference, window):
        _, first = np.unique(np.round(each.statistics_NS[:images], 3), axis=0, return_index=True)
        again_N = np.ones(images, np.bool_)
        again_N[first] = False
        found.append(again_N)
    return found[0], found[1]


def faulty(seen: Observations) -> np.ndarray:
    """Rows with a number that is missing, not finite or impossible."""
    lowest, highest = STATISTICS_RANGE
    statistics_NS, shares_NK, confidence_N = seen.statistics_NS, seen.probabilities_NK, seen.confidence_N
    sound_N = ((statistics_NS >= lowest) & (statistics_NS <= highest)).all(axis=1)  # a comparison with NaN is false
    sound_N &= np.isfinite(seen.embeddings_NE).all(axis=1) & (confidence_N >= 0) & (confidence_N <= 1.001)
    return np.asarray(~(sound_N & (np.abs(shares_NK.sum(axis=1) - 1) < 0.01)))


def _check_comparable(reference: Observations, window: Observations) -> None:
    for name, each in (("window", window), ("reference", reference)):
        if len(each) < LEAST_IMAGES:
            raise MonitoringError(f"the {name} has {len(each)} images; allowed: at least {LEAST_IMAGES}")
    if reference.classes != window.classes:
        differ = sorted(set(reference.classes) ^ set(window.classes))
        what = f"they differ in {', '.join(differ[:5])}" if differ else "they are in another order"
        raise MonitoringError(
            f"the log's classes are not those of the reference ({what}); "
            "give the model whose predictions are in the log, or the version that was trained like the reference"
        )
    lengths = [each.embeddings_NE.shape[1] for each in (window, reference)]
    if lengths[0] != lengths[1]:
        raise MonitoringError(
            f"embeddings in the log have {lengths[0]} numbers, in the reference {lengths[1]}: another network; "
            "give the model whose predictions are in the log"
        )
