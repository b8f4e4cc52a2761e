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
    from utils.tracking import Run


@dataclass(frozen=True)
class Settings:
    """Measure a trained model, gate on its accuracy, compare it with another."""

    model_uri: str = setting(REQUIRED, "runs:/RUN_ID/model, models:/NAME@ALIAS, models:/NAME/VERSION or a path")
    dataset: str = setting("", "data set, as for training; empty: the one that the model's run was trained on")
    data_dir: str = setting("data", "folder for downloads and decoded images")
    on_error: str = setting("fail", "what a bad image file does", choices=("fail", "skip"))
    split: str = setting("test", "images to measure on", choices=("train", "val", "test"))
    min_accuracy: float = setting(0.0, "fail the run below this accuracy", minimum=0, maximum=1)
    baseline_uri: str = setting("", "a second model to compare with on the same images")
    batch_size: int = setting(512, "images predicted at a time", minimum=1)


def main(settings: Settings) -> None:
    """Settings, models, data, scores, report, comparison, gate."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from data_loader.matching import check_matching
    from models.onnx_model import OnnxClassifier
    from utils import RunFailed
    from utils.artifacts import fetch_model
    from utils.tracking import start_run

    with TemporaryDirectory() as folder:
        model = fetch_model(settings.model_uri, Path(folder) / "model")
        classifier = OnnxClassifier(model.path)
        baseline = None
        if settings.baseline_uri:
            baseline = OnnxClassifier(fetch_model(settings.baseline_uri, Path(folder) / "baseline").path)
        with start_run(settings, "evaluate", about=("evaluate", settings.model_uri)) as run:
            data = load_data(settings, model.run_id, classifier)
            if baseline:
                check_matching(data, baseline.classes, baseline.image_shape)
            rows = data.rows[settings.split]
            labels_N = data.labels_N[rows]
            logits_NK = classifier.logits_of(data.images_NHWC, rows, settings.batch_size)
            accuracy = report(run, settings.split, data, rows, logits_NK)
            if baseline:
                baseline_NK = baseline.logits_of(data.images_NHWC, rows, settings.batch_size)
                compare(run, settings, logits_NK, baseline_NK, labels_N)
            if accuracy < settings.min_accuracy:
                raise RunFailed(
                    f"accuracy {accuracy:.4f} on {settings.split} is below "
                    f"min_accuracy={settings.min_accuracy}; run {run.id} has the details"
                )


def load_data(settings: Settings, model_run_id: str, classifier: OnnxClassifier) -> Dataset:
    """The data set asked for, or else the one that the model's run was trained on."""
    from pathlib import Path

    from data_loader.matching import load_matching
    from utils import UsageError
    from utils.artifacts import run_params

    name = settings.dataset or (run_params(model_run_id).get("dataset", "") if model_run_id else "")
    if not name:
        raise UsageError(f"'{settings.model_uri}' does not tell what it was trained on; give dataset=")
    return load_matching(
        name,
        classes=classifier.classes,
        image_shape=classifier.image_shape,
        split=settings.split,
        data_dir=Path(settings.data_dir),
        on_error=settings.on_error,
    )


def report(run: Run, split: str, data: Dataset, rows: np.ndarray, logits_NK: np.ndarray) -> float:
    """Everything about one model on one split: on the screen, as metrics, tables and pictures. Gives the accuracy."""
    from data_loader.pictures import image_grid
    from models.pictures import reliability_diagram
    from models.report import judge
    from models.scores import per_class

    labels_N = data.labels_N[rows]
    found = judge(logits_NK, labels_N, data.classes)
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.scores.items())
    run.describe(found.markdown(split, len(rows)))
    print(f"{split}: {numbers} ({len(rows)} images)")
    run.dataset(name=data.name, digest=data.digest, source=data.source, context=split, profile={"images": len(rows)})
    run.metrics(found.metrics(split))
    run.table(per_class(logits_NK, labels_N, data.classes), "tables/per_class.csv")
    run.picture(found.confusion_matrix, "pictures/confusion_matrix.png")
    run.picture(reliability_diagram(logits_NK, labels_N), "pictures/reliability.png")
    if found.captions:
        run.picture(image_grid(data.images_NHWC[rows[found.worst]], found.captions), "pictures/worst_mistakes.png")
    return found.scores["accuracy"]


def compare(run: Run, settings: Settings, logits_NK: np.ndarray, baseline_NK: np.ndarray, labels_N: np.ndarray) -> None:
    """This model against the baseline on the same images: the difference, and whether it may be chance."""
    from models import scores

    result = scores.compare(logits_NK, baseline_NK, labels_N)
    difference = scores.accuracy(logits_NK, labels_N) - scores.accuracy(baseline_NK, labels_N)
    print(
        f"against {settings.baseline_uri}: accuracy {difference:+.4f}; only this model right on {result.only_first} "
        f"images, only the baseline on {result.only_second}; McNemar p = {result.p_value:.3g}"
    )
    baseline = {f"baseline/{name}": value for name, value in scores.summary(baseline_NK, labels_N).items()}
    comparison = {
        "accuracy_difference": difference,
        "only_this_right": result.only_first,
        "only_baseline_right": result.only_second,
        "mcnemar_p": result.p_value,
    }
    run.metrics(baseline | {f"comparison/{name}": value for name, value in comparison.items()})
    run.json(comparison | {"baseline_uri": settings.baseline_uri}, "tables/comparison.json")


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
