"""Look after a champion: decide by rules, train, compare, promote. Every look is a run, also when it ends with "no"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from utils.projects import BACKENDS
from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from data_loader.dataset import Dataset
    from models.onnx_model import OnnxClassifier
    from monitoring.prediction_log import Feedback, Window
    from monitoring.rules import Decision, Facts, Rules
    from utils.registry import Candidate
    from utils.tracking import Run
    from utils.turn import Turns


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
    """What is known of the champion, the champion itself, and the images that it is judged by."""

    facts: Facts
    model: OnnxClassifier
    data: Dataset
    known: Window
    """Rows of the champion in the log with a kept image or feedback."""
    feedback: Feedback
    folder: Path
    """For what has to be downloaded."""


def main(settings: Settings) -> None:
    """Rules, champion, decision; training, comparison, promotion."""
    from monitoring.rules import decide, read_rules
    from utils import registry
    from utils.artifacts import model_run
    from utils.projects import read_backend_config
    from utils.retraining import changeable_parameters, train_like
    from utils.tracking import start_run
    from utils.turn import Taken, Turns

    rules = read_rules(Path(settings.rules), changeable_parameters())
    config = read_backend_config(settings.backend, settings.backend_config)
    champion = registry.candidate(f"models:/{settings.name}@{registry.CHAMPION}")
    turns = Turns(model_run(champion.uri))
    with start_run(settings, "retrain", about=("retrain", settings.name)) as run, TemporaryDirectory() as folder:
        present = look(settings, rules, champion, turns, Path(folder))
        decision = decide(present.facts, rules)
        run.metrics(present.facts.metrics())
        run.dataset(**present.data.identity(), context="retraining", profile=present.data.profile())
        report(run, champion, decision, "under way" if decision.retrain else "not needed")
        if not decision.retrain:
            return
        outcome = "stopped"
        try:
            with turns.take(run.id):
                trained_by = train_like(turns.trained_by, settings, rules.training, config, present.data.digest)
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


def look(settings: Settings, rules: Rules, champion: Candidate, turns: Turns, folder: Path) -> Present:
    """The champion, the data set to train on, the champion's rows of the log, and from them what the rules ask for."""
    from data_loader.matching import load_matching
    from data_loader.store import open_store
    from models.onnx_model import OnnxClassifier
    from monitoring.drift import compare
    from monitoring.reference import REFERENCE, read_reference
    from monitoring.rules import Facts
    from monitoring.window import recent
    from utils.artifacts import data_to_load, fetch_model, find_run_file, run_params
    from utils.registry import age_days

    model = OnnxClassifier(fetch_model(champion.uri, folder / "champion").path)
    data = load_matching(model, data_to_load(settings, turns.trained_by), settings, "test")
    log = open_store(settings.log or str(folder))  # that folder holds no rows, like a log that is new
    window, known, feedback = recent(log, settings.hours, model=champion.name, version=champion.version)
    reference = None
    if window.counted() >= rules.window_images:
        reference = find_run_file(turns.trained_by, REFERENCE, folder, "nothing is known of drift")
    facts = Facts(
        drift=compare(read_reference(reference), window).scores() if reference else None,
        window_images=window.counted(),
        new_labels=data.images_more_than(run_params(turns.trained_by)),
        feedback=len(feedback.labels),
        accuracy=feedback.accuracy,
        age_days=age_days(champion),
        rested_hours=turns.hours_since_last(),
        forced=settings.force,
    )
    return Present(facts, model, data, known, feedback, folder)


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

    data, known, rows = present.data, present.known, present.data.rows["test"]
    models = OnnxClassifier(fetch_model(new.uri, present.folder / "new").path), present.model
    duels = {"test": duel(*models, data.images_NHWC, rows, data.labels_N[rows])}
    if settings.log:
        kept, told = (open_store(settings.log), known.images, known.kept), present.feedback.label_of_row()
        labelled = labelled_images(*kept, told, data, enough=rules.labelled_images)
        run.metrics({"window/labelled_images": len(labelled), "window/learnt_images": labelled.learnt})
        if len(labelled):
            duels["window"] = duel(*models, labelled.images_MHWC, np.arange(len(labelled)), labelled.labels_M)
    for name, result in duels.items():
        run.metrics(result.metrics(name))
        print(result.sentence(name))
    accuracies = {key: value for name, result in duels.items() for key, value in result.accuracies(name).items()}
    return *better(duels["test"], duels.get("window"), rules), accuracies


def report(run: Run, champion: Candidate, decision: Decision, outcome: str) -> None:
    """Decision and outcome: on the screen, as tags and as the run's description."""
    model = f"version {champion.version} of {champion.name}"
    about = {"model_name": champion.name, "model_version": champion.version}
    run.tags({**about, "decision": decision.answer, "rules": decision.rules, "outcome": outcome})
    run.describe(decision.markdown(model, outcome))
    print(f"retrain {model}: {decision.answer}, {decision.reason}\noutcome: {outcome}", flush=True)


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
