"""When to retrain, and when the new model becomes champion: rules over numbers, with their limits in one small file."""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from monitoring import MonitoringError
from monitoring.drift import LEAST_IMAGES

TRAINING = "training"
"""The table of the file that holds parameters for the training."""


MOST = 1e9
"""Largest limit, where a rule has no lower one of its own: enough for any, and what is not finite is above it."""


def limit(default: float, *, minimum: float = 0, maximum: float = MOST) -> Any:
    """A field of Rules: a number from `minimum` to `maximum`, both allowed."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class Rules:
    """The limits; retraining.toml in the repository says what each one does."""

    drift_score: float = limit(1.0)
    window_images: int = limit(500, minimum=LEAST_IMAGES)
    new_labels: int = limit(200)
    accuracy: float = limit(0.9, maximum=1)
    feedback: int = limit(100)
    age_days: float = limit(90.0)
    rest_hours: float = limit(24.0)
    margin: float = limit(0.005, maximum=1)
    allowed_loss: float = limit(0.01, maximum=1)
    labelled_images: int = limit(50)
    training: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the training that differ from those of the champion's."""


@dataclass(frozen=True)
class Facts:
    """What is known of the champion; None: not known."""

    drift: Mapping[str, float] | None = None
    """Score of each part of the comparison with the reference (monitoring.drift): from 1 on it drifted."""
    window_images: int = 0
    """Predictions of the champion in the window."""
    new_labels: int = 0
    """Images that the data set has more than when the champion was trained."""
    accuracy: float | None = None
    """Share of right predictions among those of the window with feedback."""
    feedback: int = 0
    """Predictions of the window with feedback."""
    age_days: float = 0.0
    """Since the champion was registered."""
    rested_hours: float | None = None
    """Since the champion was last retrained in vain."""
    forced: bool = False

    def metrics(self) -> dict[str, float]:
        """What is known, as numbers by name."""
        numbers = {
            "window_images": self.window_images,
            "new_labels": self.new_labels,
            "feedback": self.feedback,
            "accuracy": self.accuracy,
            "age_days": self.age_days,
            "rested_hours": self.rested_hours,
            **{f"drift_{part}_score": score for part, score in (self.drift or {}).items()},
        }
        return {f"champion/{name}": float(value) for name, value in numbers.items() if value is not None}


@dataclass(frozen=True)
class Opinion:
    """What one rule says."""

    rule: str
    speaks: bool
    """Whether it is for retraining."""
    why: str
    """The numbers, as a sentence."""


@dataclass(frozen=True)
class Decision:
    """Whether to retrain, and what each rule says to that."""

    retrain: bool
    opinions: tuple[Opinion, ...]
    held_back: str = ""
    """Why it is no although a rule spoke."""

    @property
    def answer(self) -> str:
        """The decision in a word."""
        return "yes" if self.retrain else "no"

    @property
    def rules(self) -> str:
        """The rules that spoke, "none" for none."""
        return ", ".join(opinion.rule for opinion in self.opinions if opinion.speaks) or "none"

    @property
    def reason(self) -> str:
        """A sentence."""
        spoken = "; ".join(opinion.why for opinion in self.opinions if opinion.speaks) or "no rule speaks for it"
        return f"{spoken}; but {self.held_back}" if self.held_back else spoken

    def markdown(self, model: str, outcome: str) -> str:
        """The decision about a model, what came of it, and a table of what each rule says."""
        said = f"**Retrain {model}: {self.answer}**, {self.reason}."
        return f"{said}\n\n**Outcome**: {outcome}.\n\n{self.table()}"

    def table(self) -> str:
        """What each rule says, in Markdown."""
        lines = [f"| {each.rule} | {'yes' if each.speaks else 'no'} | {each.why} |" for each in self.opinions]
        return "\n".join(["| rule | retrain | why |", "|---|---|---|", *lines])


class Compared(Protocol):
    """A new model and the champion on the same images."""

    @property
    def images(self) -> int: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def champion_accuracy(self) -> float: ...


def read_rules(path: Path, training_parameters: Sequence[str]) -> Rules:
    """The rules in a TOML file; `training_parameters` are the names that its table [training] may hold.

    Refuses unknown names, wrong types and impossible values in one line that says what is allowed.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise MonitoringError(
            f"rules '{path}' cannot be read: {error.strerror}; give a file such as retraining.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MonitoringError(f"rules '{path}' is no TOML: {error}") from None
    names = [each.name for each in fields(Rules)]
    _refuse_unknown(found, names, f"rules '{path}'", "rule")
    types = typing.get_type_hints(Rules)
    values: dict[str, Any] = {
        each.name: _number(found[each.name], types[each.name], **each.metadata, where=f"rules '{path}': {each.name}")
        for each in fields(Rules)
        if each.default is not MISSING and each.name in found
    }
    return Rules(
        **values, training=_training(found.get(TRAINING, {}), training_parameters, f"rules '{path}': {TRAINING}")
    )


def decide(facts: Facts, rules: Rules) -> Decision:
    """Ask every rule. A limit that is reached is met: 200 of 200 new labels are enough, an accuracy at its gate."""
    opinions = (
        _drift(facts, rules),
        _labels(facts, rules),
        _accuracy(facts, rules),
        _age(facts, rules),
        _forced(facts),
    )
    speaks = any(opinion.speaks for opinion in opinions)
    tired = facts.rested_hours is not None and facts.rested_hours < rules.rest_hours
    if speaks and tired and not facts.forced:
        why = f"it was retrained in vain {facts.rested_hours:.1f} hours ago and rests for {rules.rest_hours:g}"
        return Decision(False, opinions, why)
    return Decision(speaks, opinions)


def better(held_out: Compared, window: Compared | None, rules: Rules) -> tuple[bool, str]:
    """Whether the new model is to be champion, and why in a sentence.

    With enough labelled images of the window these decide: there it has to be better by the margin, while on the
    held-out images it may lose a little. Without them it has to be better by the margin on the held-out images.
    """
    if window is None or window.images < rules.labelled_images:
        found = f"{window.images if window else 0} labelled images of the window are fewer than {rules.labelled_images}"
        won, words = _gains(held_out, rules.margin)
        return won, f"{found}, so the held-out images decide: {words}"
    gained, words = _gains(window, rules.margin)
    lost = held_out.champion_accuracy - held_out.accuracy
    kept = not _above(lost, rules.allowed_loss)
    told = f"{'a loss' if lost > 0 else 'a gain'} of {abs(lost):.4f}, {rules.allowed_loss:g} may be lost"
    return gained and kept, (
        f"on the {window.images} labelled images of the window {words}; "
        f"on the held-out images {_accuracies(held_out)}: {told}{'' if kept else ', too much'}"
    )


def _drift(facts: Facts, rules: Rules) -> Opinion:
    if facts.window_images < rules.window_images:
        few = f"the window has {facts.window_images} predictions; drift is judged from {rules.window_images} on"
        return Opinion("drift", False, few)
    if facts.drift is None:
        return Opinion("drift", False, f"drift of {facts.window_images} predictions is not known without a reference")
    scores = ", ".join(f"{part} {score:.3g}" for part, score in facts.drift.items())
    speaks = 0 < rules.drift_score <= max(facts.drift.values(), default=0.0)
    told = f"drift of {facts.window_images} predictions: {scores}; {_needed(rules.drift_score, 'is enough')}"
    return Opinion("drift", speaks, told)


def _labels(facts: Facts, rules: Rules) -> Opinion:
    enough = 0 < rules.new_labels <= facts.new_labels
    told = f"{facts.new_labels} new labelled images; {_needed(rules.new_labels, 'are enough')}"
    return Opinion("new labels", enough, told)


def _accuracy(facts: Facts, rules: Rules) -> Opinion:
    if facts.accuracy is None:
        return Opinion("accuracy", False, "there is no feedback")
    low = facts.feedback >= rules.feedback and facts.accuracy < rules.accuracy
    few = f", judged from {rules.feedback} on" if facts.feedback < rules.feedback else ""
    told = f"accuracy {facts.accuracy:.4f} by {facts.feedback} feedback{few}; the gate is {rules.accuracy:g}"
    return Opinion("accuracy", low, told)


def _age(facts: Facts, rules: Rules) -> Opinion:
    old = 0 < rules.age_days <= facts.age_days
    told = f"the champion is {facts.age_days:.1f} days old; {_needed(rules.age_days, 'are enough')}"
    return Opinion("age", old, told)


def _needed(limit: float, words: str) -> str:
    return f"{limit:g} {words}" if limit else "the rule is off"


def _forced(facts: Facts) -> Opinion:
    return Opinion("forced", facts.forced, "it is forced" if facts.forced else "it is not forced")


def _gains(compared: Compared, margin: float) -> tuple[bool, str]:
    gain = compared.accuracy - compared.champion_accuracy
    enough = not _above(margin, gain)
    more = "at least" if enough else "less than"
    return enough, f"{_accuracies(compared)}: {gain:+.4f} is {more} the margin {margin:g}"


def _accuracies(compared: Compared) -> str:
    return f"accuracy {compared.accuracy:.4f} against {compared.champion_accuracy:.4f} of the champion"


def _above(value: float, limit: float) -> bool:
    """Whether value > limit, beyond what the difference of two shares is off in floating point."""
    return value - limit > 1e-12


def _number(value: Any, kind: type, *, minimum: float, maximum: float, where: str) -> float:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise MonitoringError(f"{where}: expected {wanted}, received {value!r}")
    if not minimum <= value <= maximum:
        allowed = f"{wanted}, at least {minimum:g} and at most {maximum:g}"
        raise MonitoringError(f"{where}: received {value}, allowed: {allowed}")
    return int(value) if kind is int else float(value)


def _training(table: Any, allowed: Sequence[str], where: str) -> dict[str, str]:
    if not isinstance(table, dict):
        raise MonitoringError(f"{where}: expected a table [training] of parameters, received {table!r}")
    _refuse_unknown(table, allowed, where, "parameter")
    for name, value in table.items():
        if not isinstance(value, str | int | float):
            raise MonitoringError(f"{where}: {name}: expected a text, a number, true or false, received {value!r}")
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in table.items()}


def _refuse_unknown(found: Mapping[str, Any], allowed: Sequence[str], where: str, kind: str) -> None:
    for name in found:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise MonitoringError(f"{where}: unknown {kind} '{name}'{hint}; allowed: {', '.join(allowed)}")
