"""Drift: how often it is found where there is none, and whether real shifts are found, with a real network's numbers.

Two data sets, each with a network of its own trained here: MNIST (where MNIST_ROOT names a copy) and scikit-learn's
8x8 digits, split so that windows of 500 images can be drawn from its test split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlflow
import numpy as np
import pytest
from prediction_logs import log_rows
from scipy import ndimage, stats
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from tracking_server import copy_database

import train
from data_loader import statistics
from data_loader.dataset import load
from models.onnx_model import OnnxClassifier
from monitoring import MonitoringError, observations
from monitoring.drift import LEAST_IMAGES, PARTS, compare
from monitoring.observations import Observations

WINDOW, REFERENCE = 500, 2000
CLASSES = tuple("0123456789")


@dataclass
class Held:
    """Images that a network has not been trained on, and the network."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray
    classifier: OnnxClassifier

    @cached_property
    def everything(self) -> Observations:
        """What the network makes of all of them as they are."""
        return self.seen(self.images_NHWC)

    def draw(self, seed: int, without: int | None = None) -> tuple[Observations, np.ndarray]:
        """A reference and the rows of a window, by chance and without a common image; perhaps no image of a class."""
        rows = np.random.default_rng(seed).permutation(len(self.labels_N))
        window = rows[self.labels_N[rows] != without][:WINDOW]
        return self.everything.rows(rows[~np.isin(rows, window)][:REFERENCE]), window

    def seen(self, images_NHWC: np.ndarray) -> Observations:
        """What serving and training would write down of images."""
        logits_NK, embeddings_NE = self.classifier.outputs(images_NHWC)
        shares_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
        shares_NK /= shares_NK.sum(axis=1, keepdims=True)
        found = statistics.image_statistics(images_NHWC)
        return Observations(CLASSES, found, embeddings_NE, logits_NK.argmax(axis=1), shares_NK.max(axis=1), shares_NK)


def mnist_images(data_dir: Path) -> dict[str, np.ndarray]:
    """Enough of MNIST to train on, and its test images."""
    raw = data_dir / "torchvision" / "MNIST" / "raw"
    arrays = {}
    for split, name, most in (("train", "train", 10_000), ("test", "t10k", None)):
        pixels = np.frombuffer((raw / f"{name}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        labels_N = np.frombuffer((raw / f"{name}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
        arrays |= {f"x_{split}": pixels.reshape(-1, 28, 28)[:most], f"y_{split}": labels_N[:most].astype(np.int64)}
    return arrays


def digits_images() -> dict[str, np.ndarray]:
    digits, train_images = load_digits(), 600
    images_NHW = (digits.images * 255 / 16).round().astype(np.uint8)
    return {
        "x_train": images_NHW[:train_images],
        "y_train": digits.target[:train_images],
        "x_test": images_NHW[train_images:],
        "y_test": digits.target[train_images:],
    }


@pytest.fixture(scope="module", params=["mnist", "digits"])
def held(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> Iterator[Held]:
    folder = tmp_path_factory.mktemp(request.param)
    copy_database(empty_database, folder, str(folder / "mlruns" / "0"))
    mnist = request.param == "mnist"
    np.savez(
        folder / "images.npz", **mnist_images(request.getfixturevalue("mnist_data_dir")) if mnist else digits_images()
    )
    settings = {"dataset": str(folder / "images.npz"), "data_dir": str(folder / "data"), "epochs": 3 if mnist else 10}
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        train.main(train.Settings(**settings, device="cpu"))  # type: ignore[arg-type]
        (model,) = mlflow.search_logged_models(experiment_ids=["0"], output_format="list")
        data = load(str(settings["dataset"]), data_dir=Path(str(settings["data_dir"])))
        rows = data.rows["test"]
        file = Path(mlflow.artifacts.download_artifacts(model.model_uri)) / "model.onnx"
        yield Held(np.array(data.images_NHWC[rows]), np.array(data.labels_N[rows]), OnnxClassifier(file))


@pytest.mark.timeout(600)
def test_windows_without_drift_seldom_look_drifted(held: Held) -> None:
    """The false-alarm rate of all tests together is below 5 %, with 99 % confidence.

    Each window is drawn anew with a reference of its own from one collection of images. Given the collection, the
    outcomes are independent and equally probable, so the number of alarms is binomial and its bound (Clopper and
    Pearson, 1934) holds.
    """
    windows, alarms = 300, 0
    for seed in range(windows):
        reference, rows = held.draw(seed)
        alarms += compare(reference, held.everything.rows(rows)).drifted
    highest_rate = stats.beta.ppf(0.99, alarms + 1, windows - alarms)
    assert highest_rate < 0.05, f"{alarms} false alarms in {windows} windows"


def rotated(images_NHWC: np.ndarray, degrees: float) -> np.ndarray:
    turned = ndimage.rotate(images_NHWC.astype(np.float32), degrees, axes=(1, 2), reshape=False, order=1)
    return turned.clip(0, 255).astype(np.uint8)


def noisy(images_NHWC: np.ndarray) -> np.ndarray:
    noise_NHWC = np.random.default_rng(1).normal(0, 30, images_NHWC.shape)
    return (images_NHWC + noise_NHWC).clip(0, 255).astype(np.uint8)


def with_strangers(images_NHWC: np.ndarray) -> np.ndarray:
    """One in ten is inverted: too few for the distributions to move much."""
    images_NHWC = images_NHWC.copy()
    images_NHWC[::10] = 255 - images_NHWC[::10]
    return images_NHWC


def with_blanks(images_NHWC: np.ndarray) -> np.ndarray:
    images_NHWC = images_NHWC.copy()
    images_NHWC[::20] = 255
    return images_NHWC


SHIFTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], set[str]]] = {
    "rotated by 15 degrees": (lambda images: rotated(images, 15), {"feature", "confidence"}),
    "rotated by 90 degrees": (lambda images: rotated(images, 90), {"feature", "label", "confidence"}),
    "noisy": (noisy, {"feature", "quality"}),
    "inverted": (lambda images: 255 - images, {"feature", "label", "confidence"}),
    "darker": (lambda images: (images * 0.7).astype(np.uint8), {"feature", "confidence"}),
    "a little darker": (lambda images: (images * 0.9).astype(np.uint8), {"feature"}),
    "every tenth is inverted": (with_strangers, {"feature", "quality"}),
    "every twentieth is white": (with_blanks, {"quality"}),
    "every fifth repeats the one before": (
        lambda images: images[np.arange(len(images)) - (np.arange(len(images)) % 5 == 4)],
        {"quality"},
    ),
}
"""What is done to the images, and the parts in which it has to show."""


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifts_are_found_in_500_images(held: Held, shift: str) -> None:
    change, parts = SHIFTS[shift]
    for seed in range(3):
        reference, rows = held.draw(seed)
        found = compare(reference, held.seen(change(held.images_NHWC[rows])))
        assert parts <= set(found.drifted_parts), [(each.name, each.effect, each.p) for each in found.findings]


@pytest.mark.parametrize("label", range(10))
def test_a_missing_class_is_found_in_500_images(held: Held, label: int) -> None:
    for seed in range(3):
        reference, rows = held.draw(seed, without=label)
        found = compare(reference, held.everything.rows(rows))
        assert "label" in found.drifted_parts, found.part("label")


def made_up(count: int, seed: int = 0, classes: int = 3) -> Observations:
    """Observations that no network made, all of one kind."""
    random = np.random.default_rng(seed)
    shares_NK = random.dirichlet(np.ones(classes), count).astype(np.float32)
    return Observations(
        tuple(f"c{label}" for label in range(classes)),
        (random.normal(100, 10, (count, 4)) / (1, 1, 1, 1000)).astype(np.float32),
        random.standard_normal((count, 5)).astype(np.float32),
        shares_NK.argmax(axis=1),
        shares_NK.max(axis=1),
        shares_NK,
    )


def test_a_difference_that_is_no_chance_but_small_is_no_drift() -> None:
    reference, window = made_up(10_000), made_up(10_000, seed=1)
    moved = replace(window, statistics_NS=window.statistics_NS + np.float32([1.2, 0, 0, 0]))
    found = compare(reference, moved)
    (brightness,) = (each for each in found.findings if each.name == "brightness")
    assert brightness.p < 1e-4
    assert brightness.effect < 0.07
    assert not found.drifted
    # Of two normal distributions the distance is largest in the middle: 2 Phi(shift / 2) - 1.
    moved = replace(window, statistics_NS=window.statistics_NS + np.float32([5, 0, 0, 0]))
    found = compare(reference, moved)
    (brightness,) = (each for each in found.findings if each.name == "brightness")
    assert brightness.effect == pytest.approx(2 * stats.norm.cdf(0.25) - 1, abs=0.02)
    assert found.drifted_parts == ("feature",)
    assert (brightness.reference, brightness.window) == pytest.approx((100, 105), abs=0.5)


def test_each_p_value_is_that_of_the_test_times_the_number_of_tests() -> None:
    reference, window = made_up(900), made_up(300, seed=1)
    found = {each.name: each for each in compare(reference, window).findings}
    tests = len(found)
    counts = np.stack([np.bincount(each.predicted_N, minlength=3) for each in (reference, window)])
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    square = ((counts - expected) ** 2 / expected).sum()
    assert found["predicted classes"].p == pytest.approx(min(1, tests * stats.chi2.sf(square, df=2)))
    distance = max(
        abs((reference.confidence_N <= at).mean() - (window.confidence_N <= at).mean())
        for at in np.concatenate([reference.confidence_N, window.confidence_N])
    )
    assert found["confidence"].effect == pytest.approx(distance)
    kolmogorov = stats.kstwobign.sf(distance * np.sqrt(900 * 300 / 1200))
    assert found["confidence"].p == pytest.approx(min(1, tests * kolmogorov), rel=0.2)
    assert {each.part for each in found.values()} == set(PARTS)


def test_rare_classes_are_judged_by_random_tables() -> None:
    """Forty classes and a hundred images: an independent simulation gives the same p-value."""
    reference, window = made_up(400, classes=40), made_up(100, seed=1, classes=40)
    skewed = replace(window, predicted_N=np.where(np.arange(100) % 9 == 0, 0, window.predicted_N))
    found = compare(reference, skewed)
    (finding,) = found.part("label")
    both_N, random = np.concatenate([reference.predicted_N, skewed.predicted_N]), np.random.default_rng(5)
    share_K = np.bincount(both_N, minlength=40) / 500

    def square(window_N: np.ndarray) -> float:
        counts_K = np.bincount(window_N, minlength=40)
        return float(((counts_K - 100 * share_K) ** 2 / np.maximum(share_K, 1e-9)).sum())

    simulated = np.array([square(random.permutation(both_N)[:100]) for _ in range(20_000)])
    share = (simulated >= square(skewed.predicted_N)).mean()
    assert finding.p / len(found.findings) == pytest.approx(share, rel=0.3)


def test_scores_say_how_far_it_is_to_drift() -> None:
    reference, window = made_up(5000), made_up(1000, seed=1)
    for moved in (0, 1, 2, 3, 5, 20):
        shifted = replace(window, statistics_NS=window.statistics_NS + np.float32([moved, 0, 0, 0]))
        found = compare(reference, shifted)
        (each,) = (each for each in found.findings if each.name == "brightness")
        assert each.drifted == (each.p <= 0.01 and each.effect >= each.least_effect) == (each.score >= 1)
        assert found.drifted == any(found.score(part) >= 1 for part in PARTS)
        assert found.p("feature") == min(each.p for each in found.part("feature"))
        assert each.score == pytest.approx(min(each.effect / 0.1, np.log(max(each.p, 1e-300)) / np.log(0.01)))


def test_rows_with_impossible_numbers_are_counted_and_left_out() -> None:
    reference, window = made_up(2000), made_up(600, seed=1)
    statistics_NS, confidence_N = window.statistics_NS.copy(), window.confidence_N.copy()
    embeddings_NE, shares_NK = window.embeddings_NE.copy(), window.probabilities_NK.copy()
    statistics_NS[0, 0], statistics_NS[1, 1], embeddings_NE[2, 0] = np.nan, 300, np.inf
    confidence_N[3], shares_NK[4] = np.nan, 0.5
    broken = replace(
        window,
        statistics_NS=statistics_NS,
        embeddings_NE=embeddings_NE,
        confidence_N=confidence_N,
        probabilities_NK=shares_NK,
    )
    found = compare(reference, broken)
    assert (found.images, found.compared) == (600, 595)
    (faulty,) = (each for each in found.findings if each.name == "numbers missing or impossible")
    assert (faulty.reference, faulty.window, faulty.drifted) == (0, pytest.approx(5 / 600), False)
    assert not found.drifted
    broken = replace(broken, confidence_N=np.where(np.arange(600) < 30, np.nan, confidence_N))
    assert compare(reference, broken).drifted_parts == ("quality",)
    with pytest.raises(MonitoringError, match=r"of the window's 600 images 0 have all their numbers"):
        compare(reference, replace(window, confidence_N=np.full(600, np.nan)))


def test_what_cannot_be_compared_is_said_in_a_line() -> None:
    reference, window = made_up(200), made_up(200, seed=1)
    with pytest.raises(MonitoringError, match=rf"the window has 10 images; allowed: at least {LEAST_IMAGES}"):
        compare(reference, window.rows(np.arange(10)))
    with pytest.raises(MonitoringError, match="the reference has 10 images"):
        compare(reference.rows(np.arange(10)), window)
    with pytest.raises(MonitoringError, match=r"not those of the reference \(they differ in c2, c3\)"):
        compare(reference, replace(window, classes=("c0", "c1", "c3")))
    with pytest.raises(MonitoringError, match="they are in another order"):
        compare(reference, replace(window, classes=("c1", "c0", "c2")))
    with pytest.raises(MonitoringError, match="embeddings in the log have 2 numbers, in the reference 5"):
        compare(reference, replace(window, embeddings_NE=window.embeddings_NE[:, :2]))


def test_degenerate_numbers_raise_no_warning_and_no_alarm() -> None:
    """Every image alike, one class, silent units."""
    flat = made_up(300)
    flat = replace(
        flat,
        statistics_NS=np.full_like(flat.statistics_NS, 0.5),
        embeddings_NE=np.zeros_like(flat.embeddings_NE),
        predicted_N=np.zeros_like(flat.predicted_N),
        confidence_N=np.ones_like(flat.confidence_N),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(flat, flat.rows(np.arange(100)))
    assert not found.drifted
    assert all(np.isfinite([each.p, each.effect]).all() for each in found.findings)


def test_the_rooms_agree_on_the_statistics() -> None:
    assert observations.STATISTICS == statistics.STATISTICS
    rows = log_rows(np.array([[1.0, 2, 3, 4]]), np.ones((1, 2)), np.zeros((1, 2)), "ab")
    assert [rows[0][name] for name in observations.STATISTICS] == [1, 2, 3, 4]
