"""Scores against scikit-learn, SciPy, torch and formulas written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics

from models import ModelError, pictures, scores


@st.composite
def predictions(draw):
    """logits_NK and labels_N for 1 to 60 images and 2 to 7 classes; some classes may have no image."""
    images, classes = draw(st.integers(1, 60)), draw(st.integers(2, 7))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.01, 1.0, 30.0]))
    return (random.normal(size=(images, classes)) * scale).astype(np.float32), random.integers(0, classes, images)


@given(predictions())
@settings(deadline=None)
def test_scores_equal_scikit_learn(case):
    logits_NK, labels_N = case
    guesses_N, classes = logits_NK.argmax(axis=1), range(logits_NK.shape[1])
    assert scores.accuracy(logits_NK, labels_N) == metrics.accuracy_score(labels_N, guesses_N)
    assert scores.macro_f1(logits_NK, labels_N) == pytest.approx(
        metrics.f1_score(labels_N, guesses_N, average="macro", zero_division=0)
    )
    # torch for the loss: scikit-learn's stops growing at a probability of 2e-16.
    expected_loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits_NK).double(), torch.from_numpy(labels_N))
    assert scores.log_loss(logits_NK, labels_N) == pytest.approx(float(expected_loss))
    matrix_KK = metrics.confusion_matrix(labels_N, guesses_N, labels=list(classes))
    np.testing.assert_array_equal(scores.confusion_matrix(logits_NK, labels_N), matrix_KK)
    precision_K, recall_K, f1_K, images_K = metrics.precision_recall_fscore_support(
        labels_N, guesses_N, labels=list(classes), zero_division=0
    )
    table = scores.per_class(logits_NK, labels_N, tuple(map(str, classes)))
    assert [row["class"] for row in table] == list(map(str, classes))
    for key, expected_K in (("precision", precision_K), ("recall", recall_K), ("f1", f1_K), ("images", images_K)):
        np.testing.assert_allclose([row[key] for row in table], expected_K)


@given(predictions())
@settings(deadline=None)
def test_calibration_error_equals_its_formula(case):
    logits_NK, labels_N = case
    confidences = [max(row) for row in scores.probabilities(logits_NK).tolist()]
    right = (logits_NK.argmax(axis=1) == labels_N).tolist()
    expected = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [(c, r) for c, r in zip(confidences, right, strict=True) if low < c <= high or (high == 1 and c > 1)]
        if inside:
            mean_confidence = sum(c for c, _ in inside) / len(inside)
            mean_right = sum(r for _, r in inside) / len(inside)
            expected += len(inside) / len(right) * abs(mean_confidence - mean_right)
    assert scores.calibration_error(logits_NK, labels_N) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_mcnemar_equals_the_binomial_test(only_first, only_second):
    tosses = only_first + only_second
    expected = binomtest(only_first, tosses).pvalue if tosses else 1.0
    assert scores.mcnemar_p_value(only_first, only_second) == pytest.approx(expected)


def test_mcnemar_holds_for_thousands_of_images():
    assert scores.mcnemar_p_value(4800, 5200) == pytest.approx(binomtest(4800, 10_000).pvalue, rel=1e-9)
    assert scores.mcnemar_p_value(0, 5000) == 0.0


def test_compare_counts_what_only_one_model_gets_right():
    labels_N = np.array([0, 0, 1, 1, 1])
    first_NK = np.eye(2)[[0, 0, 1, 1, 0]]
    second_NK = np.eye(2)[[0, 1, 0, 0, 1]]
    assert scores.compare(first_NK, second_NK, labels_N) == scores.Comparison(pytest.approx(0.4), 3, 1, 0.625)


def test_huge_logits_do_not_overflow():
    logits_NK = np.array([[1e4, -1e4], [-3e38, 3e38]], np.float32)
    assert scores.probabilities(logits_NK).tolist() == [[1, 0], [0, 1]]
    assert scores.log_loss(logits_NK[:1], np.array([1])) == 2e4


def test_worst_mistakes_are_wrong_and_the_largest_loss_comes_first():
    logits_NK = np.array([[5.0, 0], [0, 5], [3, 0], [0, 9], [0, 1]])
    labels_N = np.array([0, 0, 1, 0, 0])
    rows, captions = scores.worst_mistakes(logits_NK, labels_N, ("cat", "dog"), 3)
    assert (rows.tolist(), captions) == ([3, 1, 2], ["cat → dog", "cat → dog", "dog → cat"])
    assert scores.worst_mistakes(logits_NK[:1], labels_N[:1], ("cat", "dog"))[1] == []


@given(predictions(), st.integers(1, 7))
@settings(deadline=None)
def test_top_k_is_a_sorted_list_cut_off(case, k):
    logits_NK, _ = case
    k = min(k, logits_NK.shape[1])
    expected = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:k] for row in logits_NK.tolist()]
    assert scores.top_k(logits_NK, k).tolist() == expected


@pytest.mark.parametrize(
    ("logits_NK", "labels_N", "said"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "at least one image"),
        (np.zeros((2, 2)), np.zeros(3, int), "[2, 2] and [3]"),
        (np.zeros((2, 2)), np.array([0, 2]), "0..1"),
        (np.zeros((2, 2)), np.array([-1, 1]), "0..1"),
    ],
)
def test_impossible_scores_are_one_line(logits_NK, labels_N, said):
    with pytest.raises(ModelError) as error:
        scores.accuracy(logits_NK, labels_N)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [2, 10, 100, 150])
def test_pictures_show_every_class_they_can(count, tmp_path):
    classes = tuple(f"class $ {number} _" for number in range(count))
    random = np.random.default_rng(0)
    labels_N = random.integers(0, count, 500)
    logits_NK = random.normal(size=(500, count))
    matrix_KK = scores.confusion_matrix(logits_NK, labels_N)
    figure = pictures.confusion_matrix(matrix_KK, classes)
    axes = figure.axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == list(classes if count <= 100 else classes[::2])
    assert sum(int(text.get_text()) for text in axes.texts) == (500 if count <= 20 else 0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    figure.savefig(tmp_path / "matrix.png")
    pictures.reliability_diagram(logits_NK, labels_N).savefig(tmp_path / "reliability.png")


def test_learning_curves_draw_one_panel_a_quantity_and_one_line_a_split():
    history = [
        {"epoch": 1, "train/loss": 2.0, "val/loss": 2.5, "val/accuracy": 0.1, "learning_rate": 0.1, "other": 7.0},
        {"epoch": 2, "train/loss": 1.0, "val/accuracy": 0.6, "learning_rate": 0.2},
    ]
    panels = {axes.get_title(): axes for axes in pictures.learning_curves(history).axes}
    assert list(panels) == ["Loss", "Accuracy", "Learning rate"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels["Loss"].get_lines()}
    assert lines == {"train": [[1, 2], [2, 1]], "val": [[1, 2.5]]}
    assert math.isclose(panels["Accuracy"].get_lines()[0].get_ydata()[1], 0.6)
