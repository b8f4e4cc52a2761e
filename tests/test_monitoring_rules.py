"""Rules for retraining: each at its limit and just beside it; the file refused in one line; who becomes champion."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from monitoring import MonitoringError
from monitoring.rules import Facts, Rules, better, decide, read_rules

ROOT = Path(__file__).resolve().parent.parent
RULES = Rules()
QUIET = {"feature": 0.0, "label": 0.0, "confidence": 0.0, "quality": 0.0}
PARAMETERS = ("epochs", "learning_rate", "network")


@dataclass(frozen=True)
class Duel:
    images: int
    accuracy: float
    champion_accuracy: float


@pytest.mark.parametrize(
    ("rule", "below", "at"),
    [
        ("drift", {"drift": QUIET | {"label": 0.99}, "window_images": 500}, {"drift": QUIET | {"label": 1.0}}),
        ("drift", {"drift": QUIET | {"feature": 3.0}, "window_images": 499}, {"window_images": 500}),
        ("new labels", {"new_labels": 199}, {"new_labels": 200}),
        ("accuracy", {"accuracy": 0.9, "feedback": 100}, {"accuracy": 0.8999}),
        ("accuracy", {"accuracy": 0.5, "feedback": 99}, {"feedback": 100}),
        ("age", {"age_days": 89.99}, {"age_days": 90.0}),
        ("forced", {"forced": False}, {"forced": True}),
    ],
)
def test_a_rule_speaks_from_its_limit_on(rule: str, below: dict[str, object], at: dict[str, object]) -> None:
    quiet = decide(Facts(**below), RULES)  # type: ignore[arg-type]
    assert (quiet.retrain, quiet.rules, quiet.reason) == (False, "none", "no rule speaks for it")
    spoken = decide(Facts(**(below | at)), RULES)  # type: ignore[arg-type]
    assert (spoken.retrain, spoken.rules) == (True, rule)


def test_all_that_speak_are_named_with_their_numbers() -> None:
    facts = Facts(QUIET | {"quality": 2.5}, 700, 250, 0.75, 120, 91.5, None, True)
    decision = decide(facts, RULES)
    assert decision.rules == "drift, new labels, accuracy, age, forced"
    for number in ("quality 2.5", "700", "250 new", "0.7500 by 120", "gate is 0.9", "91.5 days", "forced"):
        assert number in decision.reason
    assert decision.table().count("| yes |") == 5


def test_what_is_not_known_says_nothing() -> None:
    decision = decide(Facts(window_images=10_000, feedback=0, drift=None, accuracy=None), RULES)
    assert not decision.retrain
    assert "not known without a reference" in decision.table()
    assert "there is no feedback" in decision.table()


def test_a_limit_of_zero_switches_a_rule_off() -> None:
    off = Rules(drift_score=0, new_labels=0, accuracy=0, age_days=0)
    facts = Facts(QUIET | {"label": 9.0}, 10_000, 10_000, 0.0, 10_000, 10_000.0)
    assert decide(facts, RULES).rules == "drift, new labels, accuracy, age"
    assert not decide(facts, off).retrain
    assert decide(facts, off).table().count("the rule is off") == 3
    assert decide(dataclasses.replace(facts, forced=True), off).rules == "forced"


def test_after_a_training_in_vain_it_rests_unless_forced() -> None:
    facts = Facts(new_labels=500, rested_hours=23.9)
    decision = decide(facts, RULES)
    assert (decision.retrain, decision.rules) == (False, "new labels")
    assert decision.reason.endswith("but it was retrained in vain 23.9 hours ago and rests for 24")
    assert decide(dataclasses.replace(facts, rested_hours=24.0), RULES).retrain
    assert decide(dataclasses.replace(facts, forced=True), RULES).retrain
    assert decide(dataclasses.replace(facts, rested_hours=0.0), Rules(rest_hours=0)).retrain


@pytest.mark.parametrize(
    ("held_out", "window", "wins"),
    [
        # Without enough labelled images of the window the held-out ones decide, by the margin of 0.01.
        ((200, 0.96, 0.95), None, True),
        ((200, 0.955, 0.95), None, False),
        ((200, 0.96, 0.95), (49, 0.1, 0.9), True),
        ((200, 0.95, 0.95), (49, 0.9, 0.1), False),
        # With enough of them the window decides, and up to 0.02 may be lost on the held-out images.
        ((200, 0.95, 0.95), (50, 0.91, 0.90), True),
        ((200, 0.95, 0.95), (50, 0.905, 0.90), False),
        ((200, 0.93, 0.95), (50, 0.9, 0.1), True),
        ((200, 0.925, 0.95), (50, 0.9, 0.1), False),
        ((200, 0.99, 0.95), (50, 0.90, 0.90), False),
    ],
)
def test_champion_is_who_gains_the_margin(
    held_out: tuple[int, float, float], window: tuple[int, float, float] | None, wins: bool
) -> None:
    rules = Rules(margin=0.01, allowed_loss=0.02, labelled_images=50)
    won, why = better(Duel(*held_out), Duel(*window) if window else None, rules)
    assert won is wins
    decides = window is not None and window[0] >= 50
    assert why.startswith("on the 50 labelled images of the window" if decides else f"{window[0] if window else 0} lab")
    assert f"{held_out[1]:.4f} against {held_out[2]:.4f} of the champion" in why


@given(st.integers(1, 10_000), st.data())
def test_the_margin_is_met_exactly_whatever_the_number_of_images(images: int, data: st.DataObject) -> None:
    """Shares of whole images, a margin of some of them: floating point takes none away and gives none."""
    gain = data.draw(st.integers(0, images))
    champion = data.draw(st.integers(0, images - gain))
    rules = Rules(margin=gain / images)
    assert better(Duel(images, (champion + gain) / images, champion / images), None, rules)[0]
    if gain:
        assert not better(Duel(images, (champion + gain - 1) / images, champion / images), None, rules)[0]


def write(folder: Path, text: str) -> Path:
    path = folder / "rules.toml"
    path.write_text(text)
    return path


def test_the_file_of_the_repository_holds_the_defaults_and_names_every_rule() -> None:
    path = ROOT / "retraining.toml"
    parameters = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]["main"]["parameters"]
    assert read_rules(path, list(parameters)) == Rules()
    assert list(tomllib.loads(path.read_text())) == [field.name for field in dataclasses.fields(Rules)]


def test_values_of_the_file_have_their_types(tmp_path: Path) -> None:
    text = "age_days = 30\naccuracy = 1\nnew_labels = 7\n[training]\nepochs = 3\nlearning_rate = 0.5\nnetwork = 'cnn'\n"
    rules = read_rules(write(tmp_path, text), PARAMETERS)
    assert rules == Rules(
        age_days=30.0,
        accuracy=1.0,
        new_labels=7,
        training={"epochs": "3", "learning_rate": "0.5", "network": "cnn"},
    )
    assert (type(rules.age_days), type(rules.accuracy), type(rules.new_labels)) == (float, float, int)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("new_label = 3", r"unknown rule 'new_label' \(did you mean 'new_labels'\?\); allowed: drift_score, window_im"),
        ("new_labels = 2.5", r"new_labels: expected a whole number, received 2\.5"),
        ("new_labels = true", "new_labels: expected a whole number, received True"),
        ("age_days = '9'", "age_days: expected a number, received '9'"),
        ("age_days = [1]", r"age_days: expected a number, received \[1\]"),
        ("age_days = nan", "age_days: received nan, allowed: a number, at least 0 and at most 1e"),
        ("age_days = inf", "age_days: received inf, allowed: a number, at least 0 and at most 1e"),
        (f"new_labels = {10**400}", "new_labels: received 1000"),
        ("accuracy = 90", "accuracy: received 90, allowed: a number, at least 0 and at most 1"),
        ("margin = -0.1", r"margin: received -0\.1, allowed: a number, at least 0 and at most 1"),
        ("window_images = 49", "window_images: received 49, allowed: a whole number, at least 50 and at most 1e"),
        (
            "[training]\nepoch = 3",
            r"training: unknown parameter 'epoch' \(did you mean 'epochs'\?\); allowed: epochs",
        ),
        ("[training]\nepochs = [3]", r"training: epochs: expected a text, a number, true or false, received \[3\]"),
        ("training = 3", r"training: expected a table \[training\] of parameters, received 3"),
        ("a = = b", "is no TOML: Invalid value"),
        ("age_days = 1\nage_days = 2", "is no TOML: Cannot overwrite a value"),
    ],
)
def test_what_the_file_may_not_hold_is_refused_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(MonitoringError, match=told) as raised:
        read_rules(write(tmp_path, text), PARAMETERS)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "No such file or directory; give a file such as retraining.toml"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is no TOML: 'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    path = tmp_path / "rules.toml"
    make(path)
    with pytest.raises(MonitoringError, match=told):
        read_rules(path, PARAMETERS)


def test_facts_that_are_known_are_numbers() -> None:
    assert Facts(QUIET, 600, 3, 0.5, 2, 1.5, None, True).metrics() == {
        "champion/window_images": 600.0,
        "champion/new_labels": 3.0,
        "champion/feedback": 2.0,
        "champion/accuracy": 0.5,
        "champion/age_days": 1.5,
        **{f"champion/drift_{part}_score": 0.0 for part in QUIET},
    }
