"""Look after a champion: decide by rules, train, compare, promote. Every look is a run, also when it ends with "no"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.projects import BACKENDS
from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from pathlib import Path

    from data_loader.dataset import Dataset
    from models.onnx_model import OnnxClassifier
    from monitoring.prediction_log import Feedback, Window
    from monitoring.rules import Decision, Facts, Rules
    from utils.registry import Candidate
    from utils.tracking import Run
    from utils.turn import Turns

GIVEN_HERE = ("dataset", "data_version", "data_repo", "data_dir", "on_error", "resume", "register_as")
"""Parameters of the training that retrain gives it; the others are those of the rules' file or else the champion's."""


@dataclass(frozen=True)
class Settings:
    """Decide by rules whether to train again, do it, and make the new model champion if it is better."""

    name: str = setting(REQUIRED, "registered model whose champion is looked after")
    rules: str = setting("retraining.toml", "file with the rules")
    log: str = setting("", "prediction log: a folder or s3://bucket/prefix, as serve writes it; empty: none")
    hours: float = setting(24.0, "length of the log's window, which ends now", minimum=0.001)
    dataset: str = setting("", "data set to train on, such as a version with new labels; empty: the champion's own")
    data_version: str = setting("", "as for training; empty: if dataset is too, the commit that the champion had")
    data_repo: str = setting("", "as for training")
    data_dir: str = setting("data", "folder for downloads and decoded images")
    on_error: str = setting("fail", "what a bad image file does", choices=("fail", "skip"))
    backend: str = setting("local", "where the training runs", choices=BACKENDS)
    backend_config: str = setting("", "its configuration: a JSON file, or JSON")
    force: bool = setting(False, "train whatever the rules say")


@dataclass(frozen=True)
class Present:
    """The champion, and the images that it is judged by."""

    champion: Candidate
    model: OnnxClassifier
    turns: Turns
    data: Dataset
    window: Window | None
    feedback: Feedback | None
    folder: Path
    """For what has to be downloaded."""


def main(settings: Settings) -> None:
    """Rules, champion, facts, decision; training, comparison, promotion."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from monitoring.rules import decide, read_rules
    from utils import registry
    from utils.artifacts import model_run
    from utils.projects import entry_point_parameters, read_backend_config
    from utils.tracking import start_run
    from utils.turn import Taken, Turns

    allowed = [name for name in entry_point_parameters("main") if name not in (*GIVEN_HERE, "image_size")]
    rules = read_rules(Path(settings.rules), allowed)
    config = read_backend_config(settings.backend, settings.backend_config)
    champion = registry.candidate(f"models:/{settings.name}@{registry.CHAMPION}")
    turns = Turns(model_run(champion.uri))
    with start_run(settings, "retrain", about=("retrain", settings.name)) as run, TemporaryDirectory() as folder:
        present = look(settings, champion, turns, Path(folder))
        facts = gather(settings, rules, present)
        decision = decide(facts, rules)
        run.metrics(facts.metrics())
        run.dataset(**present.data.identity(), context="retraining", profile=present.data.profile())
        report(run, champion, decision, "under way" if decision.retrain else "not needed")
        if not decision.retrain:
            return
        outcome = "stopped"
        try:
            with turns.take(run.id):
                trained_by = train(settings, rules, config, present)
                new = registry.challenger(champion, trained_by, {"retrain_run": run.id})
                run.tags({"training_run": trained_by, "new_version": new.version})
                better, why, accuracies = judge(settings, rules, run, new, present)
                outcome = f"champion stays: {why}"
                if better:
                    run.flush()
                    turns.check(run.id)
                    registry.promote(new, run.id, accuracies)
                    outcome = f"version {new.version} is champion: {why}"
        except Taken as taken:
            outcome = f"left it to another retrain: {taken}"
        except Exception as error:
            outcome = f"failed, champion stays: {error}"
            raise
        finally:
            report(run, champion, decision, outcome)


def look(settings: Settings, champion: Candidate, turns: Turns, folder: Path) -> Present:
    """The champion, the data set to train on, which has the champion's classes, and the champion's rows of the log."""
    from pathlib import Path

    from data_loader.matching import load_matching
    from data_loader.store import open_store
    from models.onnx_model import OnnxClassifier
    from monitoring.prediction_log import read_feedback, read_window
    from monitoring.window import span
    from utils.artifacts import data_to_load, fetch_model

    model = OnnxClassifier(fetch_model(champion.uri, folder / "champion").path)
    data = load_matching(
        **data_to_load(settings, turns.trained_by),
        classes=model.classes,
        image_shape=model.image_shape,
        split="test",
        data_dir=Path(settings.data_dir),
        on_error=settings.on_error,
    )
    if not settings.log:
        return Present(champion, model, turns, data, None, None, folder)
    store, when = open_store(settings.log), span(settings.hours)
    window = read_window(store, when.since, when.until, model=champion.name, version=champion.version)
    return Present(champion, model, turns, data, window, read_feedback(store, window), folder)


def gather(settings: Settings, rules: Rules, present: Present) -> Facts:
    """What the rules ask for."""
    from monitoring.rules import Facts
    from utils.artifacts import run_params
    from utils.registry import age_days

    params, data = run_params(present.turns.trained_by), present.data
    had = sum(int(params.get(f"{split}_images", 0)) for split in data.rows)
    right = present.feedback.right_F.tolist() if present.feedback else []
    return Facts(
        drift=drift(rules, present),
        window_images=len(present.window or ()),
        new_labels=0 if params.get("data_digest") == data.digest else max(0, len(data.labels_N) - had),
        feedback=len(right),
        accuracy=sum(right) / len(right) if right else None,
        age_days=age_days(present.champion),
        rested_hours=present.turns.hours_since_last(),
        forced=settings.force,
    )


def drift(rules: Rules, present: Present) -> dict[str, float] | None:
    """The score of each part, as `monitor` measures it; None where the window is too small or has no reference."""
    from monitoring.drift import PARTS, compare
    from monitoring.reference import REFERENCE_FILE, REFERENCE_FOLDER, read_reference
    from utils import UsageError
    from utils.artifacts import fetch_run_file

    if present.window is None or len(present.window) < rules.window_images:
        return None
    try:
        file = fetch_run_file(present.turns.trained_by, f"{REFERENCE_FOLDER}/{REFERENCE_FILE}", present.folder)
    except UsageError as error:
        print(f"nothing is known of drift: {error}")
        return None
    found = compare(read_reference(file), present.window)
    return {part: found.score(part) for part in PARTS}


def train(settings: Settings, rules: Rules, config: dict[str, Any], present: Present) -> str:
    """Train as the champion was, but for the data and what the rules' file says; gives the run."""
    from utils import RunFailed
    from utils.artifacts import data_to_load, run_params
    from utils.projects import parameters_like, run_entry_point

    parameters = parameters_like(present.turns.trained_by, "main", GIVEN_HERE) | dict(rules.training)
    parameters |= data_to_load(settings, present.turns.trained_by)
    parameters |= {"data_dir": settings.data_dir, "on_error": settings.on_error, "register_as": settings.name}
    run_id = run_entry_point("main", parameters, settings.backend, config)
    if run_params(run_id).get("data_digest") != present.data.digest:
        raise RunFailed(f"run {run_id} was trained on other data than there is here to compare on; did they change?")
    return run_id


def judge(
    settings: Settings, rules: Rules, run: Run, new: Candidate, present: Present
) -> tuple[bool, str, dict[str, float]]:
    """Both models on the held-out images and on labelled ones of the window: is it better, why, and the accuracies."""
    import numpy as np

    from data_loader.labelled import labelled_images
    from data_loader.store import open_store
    from models.onnx_model import OnnxClassifier
    from models.report import duel
    from monitoring.rules import better
    from utils.artifacts import fetch_model

    data, window, feedback = present.data, present.window, present.feedback
    models = OnnxClassifier(fetch_model(new.uri, present.folder / "new").path), present.model
    duels = {"test": duel(*models, data.images_NHWC, data.rows["test"], data.labels_N[data.rows["test"]])}
    if window is not None and feedback is not None:
        told = dict(zip(feedback.rows_F.tolist(), feedback.labels, strict=True))
        log = open_store(settings.log), window.images, window.kept
        labelled = labelled_images(*log, told, data, enough=rules.labelled_images)
        run.metrics({"window/labelled_images": len(labelled), "window/learnt_images": labelled.learnt})
        if len(labelled):
            duels["window"] = duel(*models, labelled.images_MHWC, np.arange(len(labelled)), labelled.labels_M)
    accuracies: dict[str, float] = {}
    for name, result in duels.items():
        run.metrics(result.metrics(name))
        accuracies |= result.accuracies(name)
        print(result.sentence(name))
    return *better(duels["test"], duels.get("window"), rules), accuracies


def report(run: Run, champion: Candidate, decision: Decision, outcome: str) -> None:
    """Decision and outcome: on the screen, as tags and as the run's description."""
    answer = "yes" if decision.retrain else "no"
    about = {"model_name": champion.name, "model_version": champion.version}
    run.tags({**about, "decision": answer, "rules": decision.rules, "outcome": outcome})
    said = f"**Retrain version {champion.version} of {champion.name}: {answer}**, {decision.reason}."
    run.describe(f"{said}\n\n**Outcome**: {outcome}.\n\n{decision.table()}")
    print(f"retrain version {champion.version} of {champion.name}: {answer}, {decision.reason}")
    print(f"outcome: {outcome}", flush=True)


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
