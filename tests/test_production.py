"""A model in production, end to end with real parts: served, watched, found to drift, relabelled, retrained, replaced.

The world changes under a model of black-on-white digits: they come inverted from one day to the next.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from service import PredictionService
from test_dashboards import PROMETHEUS, Program, shortened, until
from tracking_server import TrackingServer

import evaluate
import monitor
import recommend_labels
import retrain
import train
from data_loader.dataset import Dataset, load

ROOT = Path(__file__).resolve().parent.parent
CHAMPION = "models:/digits@champion"
SEEN, TO_LABEL, TOLD = 800, 250, 200
"""Inverted digits that the service meets, that a person labels, and of which users say what they were."""


def ask(service: PredictionService, images_NHWC: np.ndarray) -> tuple[np.ndarray, list[str], str]:
    """Predicted classes, ids and the version that answered."""
    guesses, ids, versions = [], [], set()
    for start in range(0, len(images_NHWC), 100):
        part_NHWC = images_NHWC[start : start + 100]
        tensor = {"name": "images", "shape": part_NHWC.shape, "datatype": "UINT8", "data": part_NHWC.ravel().tolist()}
        status, answer = service.post("/v2/models/digits/infer", {"inputs": [tensor]})
        assert status == 200, answer
        guesses.append(np.reshape(answer["outputs"][0]["data"], answer["outputs"][0]["shape"]).argmax(axis=1))
        ids += answer["parameters"]["ids"].split(",")
        versions.add(answer["model_version"])
    (version,) = versions
    return np.concatenate(guesses), ids, version


def fill_in(table: Path, truth: dict[bytes, str]) -> int:
    """Write each image's class into the table, as a person who looks at the image would."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        with Image.open(table.parent / row["file"]) as image:
            row["label"] = truth[np.asarray(image).tobytes()]
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def newest(entry_point: str) -> Run:
    return MlflowClient().search_runs(["0"], f"tags.entry_point = '{entry_point}'", max_results=1)[0]


@pytest.fixture
def team(tmp_path: Path, tracking_server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project in a folder of its own, at work with a tracking server and its registry."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("MLproject", "conda.yaml", "train.py", "retraining.toml"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    yield folder
    mlflow.end_run()


@pytest.fixture
def prometheus(team: Path) -> Iterator[Callable[[PredictionService], tuple[Program, str]]]:
    """Start Prometheus, with the repository's files, and a Pushgateway, to watch a service."""
    started: list[Program] = []

    def start(service: PredictionService) -> tuple[Program, str]:
        from watching import prometheus_config

        listen = "--web.listen-address=127.0.0.1:{port}"
        gateway = Program(team / "gateway", "prometheus-pushgateway", listen)
        files = ("--config.file=prometheus.yml", "--storage.tsdb.path=data")
        watcher = Program(team / "prometheus", "prometheus", *files, listen)
        nobody = {"ALERTMANAGER_PORT": "1", "NODE_EXPORTER_PORT": "1"}
        ports = {"PROMETHEUS_PORT": str(watcher.port), "PUSHGATEWAY_PORT": str(gateway.port)}
        values = {"SERVING_TARGETS": f"127.0.0.1:{service.port}", **nobody, **ports}
        (watcher.folder / "prometheus.yml").write_text(shortened(prometheus_config(values)))
        (watcher.folder / "rules.yml").write_text(shortened((PROMETHEUS / "rules.yml").read_text()))
        (watcher.folder / "serving-token").touch()
        started.extend((gateway, watcher))
        for part in started:
            part.start()
        return watcher, gateway.url

    yield start
    for part in started:
        part.kill()


@pytest.mark.slow
def test_from_a_changed_world_to_a_better_model_that_serves(
    team: Path,
    start_service: Callable[..., PredictionService],
    prometheus: Callable[[PredictionService], tuple[Program, str]],
) -> None:
    # A model is trained, promoted and served.
    train.main(train.Settings(epochs=6, device="cpu", precision="fp32", register_as="digits"))
    evaluate.main(evaluate.Settings(model_uri="models:/digits@challenger", promote=True, min_accuracy=0.9))
    service = start_service(CHAMPION, f"--log={team / 'served'}", "--keep_share=1", "--poll_s=0.5")
    watcher, gateway = prometheus(service)

    def value(query: str) -> float:
        return sum(float(one["value"][1]) for one in watcher.ask("query", query=query)["result"])

    data = load("digits", data_dir=Path("data"))
    # The world changes, and users say of some predictions what was right.
    seen_NHWC, seen_N = (each[:SEEN] for each in images_of(data, "train"))
    seen_NHWC = 255 - seen_NHWC
    since = time.time()
    guesses_N, ids, version = ask(service, seen_NHWC)
    before = float((guesses_N == seen_N).mean())
    assert version == "1" and before < 0.5
    labels = [data.classes[label] for label in seen_N]
    told = [{"id": ids[row], "label": labels[row]} for row in range(SEEN - TOLD, SEEN)]
    assert service.post("/feedback", told)[0] == 200
    right = float((guesses_N == seen_N)[-TOLD:].mean())
    until(lambda: service.metric("serving_log_rows_total") == SEEN + TOLD, lambda: service.log.read_text())
    until(lambda: service.metric("serving_log_unsent_files") == 0, lambda: service.log.read_text())

    # It is seen in MLflow and in Prometheus.
    monitor.main(monitor.Settings(log="served", model_uri=CHAMPION, since=iso(since), push_gateway=gateway))
    seen = newest("monitor")
    assert (seen.data.metrics["drift_detected"], seen.data.metrics["window_images"]) == (1, SEEN)
    assert "feature" in seen.data.tags["drift"]
    until(lambda: value('monitor_drift_detected{part="feature"}') == 1, lambda: watcher.ask("query", query="up"))
    until(lambda: value('serving_feedback_total{correct="true"}') == round(right * TOLD), lambda: right)
    firing = 'ALERTS{alertname="DriftDetected",alertstate="firing"}'
    until(lambda: value(firing) > 0, lambda: watcher.ask("alerts"))

    # What is worth it is labelled, and the labels become a new version of the data set.
    recommend_labels.main(
        recommend_labels.Settings(log="served", model_uri=CHAMPION, dataset="digits", count=TO_LABEL, output="to-label")
    )
    truth = {image_HWC.tobytes(): label for image_HWC, label in zip(seen_NHWC, labels, strict=True)}
    labelled = fill_in(Path("to-label/labels.csv"), truth)
    assert labelled == TO_LABEL
    add = {"labels": "to-label/labels.csv", "dataset": "digits", "output": "digits-v2"}
    recommend_labels.main(recommend_labels.Settings(**add))

    # The repository's own rules speak; the new model is better and becomes champion.
    retrain.main(retrain.Settings(name="digits", log="served", dataset="digits-v2"))
    look = newest("retrain")
    assert (look.info.status, look.data.tags["rules"]) == ("FINISHED", "drift, new labels, accuracy")
    metrics = look.data.metrics
    assert (metrics["champion/new_labels"], metrics["champion/feedback"]) == (TO_LABEL, TOLD)
    assert metrics["champion/accuracy"] == pytest.approx(right)
    assert metrics["window/labelled_images"] >= 50
    assert metrics["window/accuracy"] > metrics["champion/window_accuracy"] + 0.3
    assert "labelled images of the window" in look.data.tags["outcome"]
    assert MlflowClient().get_registered_model("digits").aliases["champion"] in (2, "2")

    # The running service changes over; on inverted digits that nobody labelled that it has never met.
    until(lambda: service.metric("serving_model_workers", version="2") == 1, lambda: service.log.read_text())
    plain_NHWC, plain_N = images_of(data, "test")
    assert share_right(service, 255 - plain_NHWC, plain_N, "2") > max(before + 0.3, 0.7)
    assert share_right(service, plain_NHWC, plain_N, "2") > 0.9


def images_of(data: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    rows = data.rows[split]
    return np.asarray(data.images_NHWC[rows]), np.asarray(data.labels_N[rows])


def share_right(service: PredictionService, images_NHWC: np.ndarray, labels_N: np.ndarray, version: str) -> float:
    guesses_N, _, answered = ask(service, images_NHWC)
    assert answered == version
    return float((guesses_N == labels_N).mean())


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
