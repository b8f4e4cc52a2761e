"""Predict the classes of images with ONNX Runtime: model, stream of images, table. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data_loader.inputs import Batch
    from models.onnx_model import OnnxClassifier
    from utils.tracking import Run

MOST_BAD_SHOWN = 5
LARGEST_ARTIFACT_BYTES = 100 * 1024 * 1024
"""A larger table is only named on the run: copying it to the artifact store could outlast the prediction."""


@dataclass(frozen=True)
class Settings:
    """Predict the classes of images and write them to a table."""

    model_uri: str = setting(REQUIRED, "runs:/RUN_ID/model, models:/NAME@ALIAS, models:/NAME/VERSION or a path")
    input: str = setting(REQUIRED, "a folder, an image, a glob, an .npz or s3://bucket/prefix")
    output: str = setting("predictions.parquet", "table to write: .parquet or .csv, a path or s3://bucket/key")
    top_k: int = setting(1, "most probable classes to write for each image", minimum=1)
    batch_size: int = setting(256, "images in memory at a time (a few batches of them)", minimum=1)
    on_error: str = setting("skip", "what a bad image file does", choices=("skip", "fail"))
    threads: int = setting(0, "threads that decode and predict; 0: one for each core", minimum=0)


def main(settings: Settings) -> None:
    """Settings, model, images, table, summary."""
    import time
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from tqdm import tqdm

    from data_loader import DataError
    from data_loader.inputs import read_batches
    from data_loader.outputs import open_table
    from models.onnx_model import OnnxClassifier
    from utils import RunFailed
    from utils.artifacts import fetch_model
    from utils.tracking import start_run

    with TemporaryDirectory() as folder:
        model = fetch_model(settings.model_uri, Path(folder))
        classifier = OnnxClassifier(model.path, settings.threads)
        check_top_k(settings.top_k, classifier)
        about = ("predict", settings.model_uri)
        with start_run(settings, "predict", about=about, enabled=tracked(settings)) as run:
            started, predicted, bad = time.perf_counter(), 0, 0
            with (
                open_table(settings.output, columns(settings.top_k)) as table,
                tqdm(unit=" images", desc="predicting", disable=None) as bar,
            ):
                for batch in read_batches(
                    settings.input, classifier.image_shape, settings.batch_size, settings.threads
                ):
                    if batch.bad and settings.on_error == "fail":
                        name, reason = batch.bad[0]
                        raise DataError(f"{name}: {reason}; nothing was written (on_error=fail)")
                    for name, reason in batch.bad[: max(0, MOST_BAD_SHOWN - bad)]:
                        tqdm.write(f"bad image {name}: {reason}")
                    table.write(list(rows(batch, classifier, settings.top_k)))
                    predicted, bad = predicted + len(batch.names), bad + len(batch.bad)
                    bar.update(len(batch.names) + len(batch.bad))
            seconds = time.perf_counter() - started
            report(run, settings.output, predicted, bad, seconds)
            if not predicted:
                raise RunFailed(f"none of the {bad} images could be read; {settings.output} lists the reasons")


def tracked(settings: Settings) -> bool:
    """Whether this is a run in MLflow: under `mlflow run`, with a tracking server named or with its model."""
    import os

    from_mlflow = settings.model_uri.startswith(("runs:/", "models:/"))
    return from_mlflow or any(os.environ.get(name) for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"))


def check_top_k(top_k: int, classifier: OnnxClassifier) -> None:
    """No model knows more classes than it has."""
    from utils import UsageError

    if top_k > len(classifier.classes):
        raise UsageError(
            f"top_k received {top_k}, but the model has {len(classifier.classes)} classes; "
            f"allowed: 1 to {len(classifier.classes)}"
        )


def columns(top_k: int) -> dict[str, type]:
    """Name and type of the table's columns: the image, its most probable classes, the error of a bad one."""
    ranks = [""] + [f"_{rank}" for rank in range(2, top_k + 1)]
    pairs = {f"{name}{rank}": kind for rank in ranks for name, kind in (("class", str), ("probability", float))}
    return {"image": str, **pairs, "error": str}


def rows(batch: Batch, classifier: OnnxClassifier, top_k: int) -> Iterator[list[str | float | None]]:
    """The table's rows for a batch, the bad images after the good ones."""
    import numpy as np

    from models.scores import probabilities
    from models.scores import top_k as most_probable

    logits_NK = classifier.logits(batch.images_NHWC)
    labels_Nk = most_probable(logits_NK, top_k)
    shares_Nk = np.take_along_axis(probabilities(logits_NK), labels_Nk, axis=1)
    for name, labels, shares in zip(batch.names, labels_Nk.tolist(), shares_Nk.tolist(), strict=True):
        pairs = [
            value
            for label, share in zip(labels, shares, strict=True)
            for value in (classifier.classes[label], round(share, 6))
        ]
        yield [name, *pairs, None]
    for name, reason in batch.bad:
        yield [name, *[None] * (2 * top_k), reason]


def report(run: Run, output: str, predicted: int, bad: int, seconds: float) -> None:
    """The summary on the screen and on the run; the table as an artifact if it is here and not huge."""
    from pathlib import Path

    per_second = predicted / seconds
    print(f"{predicted} images predicted, {bad} bad, {per_second:.0f} images/s; table: {output}")
    run.metrics({"images": predicted, "bad_images": bad, "images_per_s": per_second})
    run.tags({"output": output})
    run.describe(f"**{predicted:,} images** predicted, {bad:,} bad, {per_second:,.0f} images/s; table: `{output}`")
    if not output.startswith("s3://") and Path(output).stat().st_size <= LARGEST_ARTIFACT_BYTES:
        run.artifact(Path(output), "predictions")


if __name__ == "__main__":
    launch(main, Settings)
