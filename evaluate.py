"""Measure a trained model on a split: scores, tables, pictures, a gate, a comparison with another model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    import numpy as np

    from data_loader.dataset import Dataset
    from models.onnx_model import OnnxClassifier
    from utils.registry import Candidate
    from utils.tracking import Run


@dataclass(frozen=True)
class Settings:
    """Measure a trained model, gate on its accuracy, compare it with another."""

    model_uri: str = setting(REQUIRED, "runs:/RUN_ID/model, models:/NAME@ALIAS, models:/NAME/VERSION or a path")
    dataset: str = setting("", "data set, as for training; empty: the one that the model's run was trained on")
    data_version: str = setting("", "as for training; empty: if dataset is too, the commit that the model's run had")
    data_repo: str = setting("", "as for training")
    data_dir: str = setting("data", "folder for downloads and decoded images")
    on_error: str = setting("fail", "what a bad image file does", choices=("fail", "skip"))
    split: str = setting("test", "images to measure on", choices=("train", "val", "test"))
    min_accuracy: float = setting(0.0, "fail the run below this accuracy", minimum=0, maximum=1)
    baseline_uri: str = setting("", "a second model to compare with on the same images; promoting: else the champion")
    promote: bool = setting(False, "make a registered version champion if the gate and the comparison pass")
    batch_size: int = setting(512, "images predicted at a time", minimum=1)


def main(settings: Settings) -> None:
    """Settings, models, data, scores, report, comparison, gate, promotion."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from data_loader.matching import check_matching
    from models.onnx_model import OnnxClassifier
    from utils import registry
    from utils.artifacts import fetch_model
    from utils.tracking import start_run

    candidate = registry.candidate(settings.model_uri) if settings.promote else None
    baseline_uri = settings.baseline_uri or (candidate.champion_uri if candidate else "")
    with TemporaryDirectory() as folder:
        model = fetch_model(candidate.uri if candidate else settings.model_uri, Path(folder) / "model")
        classifier = OnnxClassifier(model.path)
        baseline = OnnxClassifier(fetch_model(baseline_uri, Path(folder) / "baseline").path) if baseline_uri else None
        with start_run(settings, "evaluate", about=("evaluate", settings.model_uri)) as run:
            data = load_data(settings, model.run_id, classifier)
            if baseline:
                check_matching(data, baseline)
            rows = data.rows[settings.split]
            logits_NK = classifier.logits_of(data.images_NHWC, rows, settings.batch_size)
            result = report(run, settings.split, data, rows, logits_NK)
            if baseline:
                baseline_NK = baseline.logits_of(data.images_NHWC, rows, settings.batch_size)
                result |= compare(run, baseline_uri, logits_NK, baseline_NK, data.labels_N[rows])
            gate(settings, result, candidate, baseline_uri, run.id)
            if candidate:
                run.flush()
                registry.promote(candidate, run.id, result)
                run.tags({"promoted": candidate.uri})
                print(f"champion of {candidate.name} is version {candidate.version}")


def gate(
    settings: Settings, result: dict[str, float], candidate: Candidate | None, baseline_uri: str, run_id: str
) -> None:
    """Fail a run whose accuracy is too low; for a candidate also one below the baseline's on the same images.

    As good as the baseline is good enough: of two equal models the one that was trained later takes over.
    """
    from utils import RunFailed

    accuracy, faults = result[f"{settings.split}/accuracy"], []
    if accuracy < settings.min_accuracy:
        faults.append(f"below min_accuracy={settings.min_accuracy}")
    if candidate and accuracy < result.get("baseline/accuracy", 0):
        faults.append(f"below the {result['baseline/accuracy']:.4f} of {baseline_uri}")
    if faults:
        kept = f"; champion stays {candidate.champion_uri or 'unset'}" if candidate else ""
        raise RunFailed(
            f"accuracy {accuracy:.4f} on {settings.split} is {' and '.join(faults)}{kept}; run {run_id} has the details"
        )


def load_data(settings: Settings, model_run_id: str, classifier: OnnxClassifier) -> Dataset:
    """The data set asked for, or else the one that the model's run was trained on."""
    from data_loader.matching import load_matching
    from utils import UsageError
    from utils.artifacts import data_to_load

    asked = data_to_load(settings, model_run_id)
    if "dataset" not in asked:
        raise UsageError(f"'{settings.model_uri}' does not tell what it was trained on; give dataset=")
    return load_matching(classifier, asked, settings, settings.split)


def report(run: Run, split: str, data: Dataset, rows: np.ndarray, logits_NK: np.ndarray) -> dict[str, float]:
    """Everything about one model on one split: on the screen, as metrics (which it gives), tables and pictures."""
    from data_loader.pictures import image_grid
    from models.pictures import reliability_diagram
    from models.report import judge
    from models.scores import per_class

    labels_N = data.labels_N[rows]
    found = judge(logits_NK, labels_N, data.classes)
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.scores.items())
    run.describe(found.sentence(split, len(rows)))
    print(f"{split}: {numbers} ({len(rows)} images)")
    run.dataset(**data.identity(), context=split, profile={"images": len(rows)})
    run.metrics(found.metrics(split))
    run.table(per_class(logits_NK, labels_N, data.classes), "tables/per_class.csv")
    run.picture(found.confusion_matrix, "pictures/confusion_matrix.png")
    run.picture(reliability_diagram(logits_NK, labels_N), "pictures/reliability.png")
    if found.captions:
        run.picture(image_grid(data.images_NHWC[rows[found.worst]], found.captions), "pictures/worst_mistakes.png")
    return found.metrics(split)


def compare(
    run: Run, baseline_uri: str, logits_NK: np.ndarray, baseline_NK: np.ndarray, labels_N: np.ndarray
) -> dict[str, float]:
    """This model against the baseline on the same images: the difference, and whether it may be chance."""
    from models import scores

    result = scores.compare(logits_NK, baseline_NK, labels_N)
    print(result.sentence(baseline_uri))
    baseline = {f"baseline/{name}": value for name, value in scores.summary(baseline_NK, labels_N).items()}
    run.metrics(baseline | {f"comparison/{name}": value for name, value in result.metrics().items()})
    run.json(result.metrics() | {"baseline_uri": baseline_uri}, "tables/comparison.json")
    return baseline


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
