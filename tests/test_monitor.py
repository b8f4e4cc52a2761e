"""`monitor` as its users see it: runs, the page in a browser, gauges in a real Pushgateway, one line for each refusal.

UPDATE_SCREENSHOTS=1 writes the README's picture (docs/images/drift-report.png) on the way.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from browser import chromium
from PIL import Image
from ports import free_port
from prediction_logs import log_rows, write_feedback, write_log
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from service import PredictionService, png
from sklearn.datasets import load_digits
from tracking_server import copy_database

import monitor
import train
from conftest import missing
from data_loader.statistics import image_statistics
from models.onnx_model import OnnxClassifier
from monitoring import MonitoringError
from monitoring.drift import PARTS
from utils import RunFailed, UsageError

# Class names beyond the font's are drawn as boxes.
pytestmark = pytest.mark.filterwarnings("ignore:Glyph")

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("<b onclick='x'>&amp;", "$one", "漢字", *"3456789")
"""The digits' classes under names that would like to be HTML, a formula or a template."""
FOUR_HOURS_AGO = datetime.now(UTC) - timedelta(hours=4)
ALLOWED = {"feature", "label", "confidence", "quality"}


@dataclass(frozen=True)
class Digits:
    """A network trained on some digits, registered as `digits`, and digits that it has never seen."""

    folder: Path
    run_id: str
    images_NHWC: np.ndarray
    classifier: OnnxClassifier

    def rows(self, images_NHWC: np.ndarray, **others: Any) -> list[dict[str, Any]]:
        """The log's rows of images."""
        logits_NK, embeddings_NE = self.classifier.outputs(images_NHWC)
        others = {"start": FOUR_HOURS_AGO, **others}
        return log_rows(image_statistics(images_NHWC), embeddings_NE, logits_NK, CLASSES, **others)

    def log(self, log: Path, images_NHWC: np.ndarray, *, keep: int = 0, **others: Any) -> list[dict[str, Any]]:
        """Write a log of images, every `keep`-th of them kept."""
        rows = self.rows(images_NHWC, **others)
        for row, image_HWC in list(zip(rows, images_NHWC, strict=True))[:: keep or len(rows) + 1][: len(rows) * keep]:
            row |= {"image": f"images/day={row['time'].date()}/{row['id']}.png", "kept": "sampled"}
            (log / row["image"]).parent.mkdir(parents=True, exist_ok=True)
            (log / row["image"]).write_bytes(png(image_HWC[:, :, 0]))
        write_log(log, rows, CLASSES)
        return rows


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Digits]:
    folder = tmp_path_factory.mktemp("monitor")
    copy_database(empty_database, folder, str(folder / "mlruns" / "0"))
    source = load_digits()
    # In the order of the data set they come writer by writer, which is drift.
    order = np.random.default_rng(0).permutation(len(source.target))
    images_NHW, labels_N = (source.images[order] * 255 / 16).round().astype(np.uint8), source.target[order]
    arrays = {}
    for split, rows in (("train", slice(0, 600)), ("test", slice(600, 1200))):
        arrays |= {f"x_{split}": images_NHW[rows], f"y_{split}": labels_N[rows]}
    np.savez(folder / "digits.npz", **arrays, classes=np.array(CLASSES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        train.main(train.Settings(dataset="digits.npz", epochs=10, device="cpu", register_as="digits"))
        mlflow.MlflowClient().set_registered_model_alias("digits", "champion", "1")
        run_id = mlflow.MlflowClient().get_model_version("digits", "1").run_id
        model = Path(mlflow.artifacts.download_artifacts("models:/digits/1")) / "model.onnx"
        yield Digits(folder, run_id, images_NHW[1200:, :, :, None], OnnxClassifier(model))


def watch(digits: Digits, log: Path, **settings: Any) -> mlflow.entities.Run:
    """Call the entry point in this process; its run."""
    defaults = {"model_uri": "models:/digits@champion"} if "reference" not in settings else {}
    monitor.main(monitor.Settings(log=str(log), **{**defaults, **settings}))
    return last_run()


def last_run() -> mlflow.entities.Run:
    return mlflow.MlflowClient().search_runs(["0"], "tags.entry_point = 'monitor'", max_results=1)[0]


def text(run: mlflow.entities.Run, path: str) -> str:
    return str(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{path}"))


def artifacts(run: mlflow.entities.Run, folder: str) -> set[str]:
    return {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id, folder)}


def darker(images_NHWC: np.ndarray) -> np.ndarray:
    return (images_NHWC * 0.6).astype(np.uint8)


PICTURES = {f"pictures/{name}.png" for name in ("statistics", "embedding_map", "classes", "confidence")}


def test_a_window_like_the_reference_is_no_drift(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = digits.log(tmp_path, digits.images_NHWC)
    right = [{"id": row["id"], "time": row["time"], "label": row["class"], "value": 1.0} for row in rows[:30]]
    right[0]["label"] = "something else"
    write_feedback(tmp_path, right)
    run = watch(digits, tmp_path)
    assert "No drift. 597 images of digits version 1 from " in capsys.readouterr().out
    metrics = run.data.metrics
    assert (metrics["drift_detected"], metrics["window_images"], metrics["reference_images"]) == (0, 597, 600)
    assert (metrics["feedback_images"], metrics["feedback_accuracy"]) == (30, pytest.approx(29 / 30))
    assert all(metrics[f"drift_{part}_p"] > 0.01 and metrics[f"drift_{part}_score"] < 1 for part in PARTS)
    assert run.data.params["reference_from"] == f"run {digits.run_id}"
    assert run.data.tags["model_name"], run.data.tags["model_version"] == ("digits", "1")
    assert (run.data.tags["drift"], run.info.run_name) == ("none", f"monitor-digits-v1-{run.data.tags['venue']}")
    assert artifacts(run, "monitoring") == {"monitoring/report.html", "monitoring/report.json"}
    assert artifacts(run, "pictures") == PICTURES, "no image was kept, so there is no picture of the strangest"
    report = json.loads(text(run, "monitoring/report.json"))
    assert (report["drifted"], report["window"]["images"]) == (False, 597)
    assert {part: report["parts"][part]["p"] for part in PARTS} == {
        part: pytest.approx(metrics[f"drift_{part}_p"]) for part in PARTS
    }
    assert report["feedback"] == {"images": 30, "accuracy": pytest.approx(29 / 30)}
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**No drift.** 597 images of digits version 1")
    assert "-e monitor" in note


def test_drift_is_told_everywhere_and_fails_the_run_if_asked_to(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits.log(tmp_path, darker(digits.images_NHWC[:500]), keep=4)
    with pytest.raises(RunFailed, match=r"^Drift: appearance.* \(fail_on_drift=true\); run \w{32} has"):
        watch(digits, tmp_path, fail_on_drift=True)
    run = last_run()
    assert run.info.status == "FAILED"
    assert run.data.metrics["drift_detected"] == 1
    assert {"feature", "confidence", "quality"} <= set(run.data.tags["drift"].split(", ")) <= ALLOWED
    report = json.loads(text(run, "monitoring/report.json"))
    brightness = next(each for each in report["parts"]["feature"]["tests"] if each["name"] == "brightness")
    assert brightness["window"] == pytest.approx(darker(digits.images_NHWC[:500]).mean(), rel=1e-4)
    assert brightness["drifted"]
    assert brightness["score"] >= 1
    assert artifacts(run, "pictures") == PICTURES | {"pictures/strangest.png"}
    assert "| Appearance | drift |" in run.data.tags["mlflow.note.content"]
    capsys.readouterr()
    assert watch(digits, tmp_path).info.status == "FINISHED"
    assert capsys.readouterr().out.startswith("Drift: appearance")


def test_only_the_version_asked_for_and_its_time_count(digits: Digits, tmp_path: Path) -> None:
    digits.log(tmp_path, digits.images_NHWC[:200])
    digits.log(tmp_path, darker(digits.images_NHWC[:200]), version="2")
    digits.log(tmp_path, darker(digits.images_NHWC[:150]), model="other")
    digits.log(tmp_path, darker(digits.images_NHWC[:150]), start=FOUR_HOURS_AGO - timedelta(hours=40))
    run = watch(digits, tmp_path)
    assert (run.data.metrics["window_images"], run.data.metrics["drift_detected"]) == (200, 0)
    run = watch(digits, tmp_path, hours=100.0)
    assert (run.data.metrics["window_images"], run.data.metrics["drift_detected"]) == (350, 1)
    since, until = (FOUR_HOURS_AGO + timedelta(seconds=second) for second in (20, 140))
    run = watch(digits, tmp_path, since=since.isoformat(), until=until.replace(tzinfo=None).isoformat())
    assert run.data.metrics["window_images"] == 120
    assert run.data.params["window_since"] == since.strftime("%Y-%m-%d %H:%M UTC")


def test_a_reference_may_be_a_file(digits: Digits, tmp_path: Path) -> None:
    file = mlflow.artifacts.download_artifacts(
        run_id=digits.run_id, artifact_path="monitoring/reference.parquet", dst_path=str(tmp_path / "reference")
    )
    digits.log(tmp_path, digits.images_NHWC[:200], model="classifier")
    run = watch(digits, tmp_path, reference=file)
    assert run.data.tags["model_name"] == "classifier"
    assert run.data.params["reference_from"] == file


def test_what_cannot_be_compared_is_said_in_one_line_and_makes_no_run(digits: Digits, tmp_path: Path) -> None:
    before = last_run_id()
    log, empty = tmp_path / "log", tmp_path / "empty"
    empty.mkdir()
    digits.log(log, digits.images_NHWC[:200], version="7")
    digits.log(log, digits.images_NHWC[:150], version="8")

    def refused(told: str, address: Path = log, **settings: Any) -> None:
        with pytest.raises((UsageError, MonitoringError), match=told) as error:
            watch(digits, address, **settings)
        assert (error.value.exit_code, "\n" in str(error.value)) == (2, False)

    refused(r"empty from .* UTC holds no predictions, allowed: at least min_images=100; give a longer", empty)
    refused(r"holds 200 of digits version 7, 150 of digits version 8; that is 0 of digits version 1")
    refused(
        r"holds 200 of .* that is 150 of version 8, allowed: at least min_images=199",
        model_uri=f"runs:/{digits.run_id}/model",
        version="8",
        min_images=199,
    )
    refused(r"give model_uri=, whose run holds the reference, or reference=", model_uri="")
    refused(r"give model_uri=, whose run holds the reference, or reference=", model_uri="runs:/x/model", reference="y")
    refused(r"reference 'y' cannot be read", model_uri="", reference="y")
    refused(r"until: received 'noon', allowed: a time such as 2026-03-14T12:00", until="noon")
    refused(r"the window ends at .*, before it begins", since="2026-03-14", until="2026-03-13")
    refused(r"hours: received 1e\+09, which is before the year 1|hours: received 1000000000.0", hours=1e9)
    refused(
        r"holds 200 of digits version 7, 150 of digits version 8; give version= or model_uri=",
        model_uri=f"runs:/{digits.run_id}/model",
    )
    refused(r"^push_gateway: received an address with a user or password, allowed", push_gateway="http://a:secret@b:1")
    other = tmp_path / "other"
    classes = ("a", *CLASSES[1:])
    write_log(other, [row | {"class": "a"} for row in digits.rows(digits.images_NHWC[:120])], classes)
    refused(r"the log's classes are not those of the reference \(they differ in <b onclick='x'>&amp;, a\)", other)
    with mlflow.start_run() as without:
        pass
    refused(r"^no reference: .*; train the model anew", model_uri=f"runs:/{without.info.run_id}/model")
    assert last_run_id() == before


def last_run_id() -> str:
    found = mlflow.MlflowClient().search_runs(["0"], "tags.entry_point = 'monitor'", max_results=1)
    return found[0].info.run_id if found else ""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[str]:
    """A real Pushgateway's address."""
    program = shutil.which("prometheus-pushgateway")
    if not program:
        missing("there is no Pushgateway here (Debian: apt-get install prometheus-pushgateway)")
    address = f"127.0.0.1:{free_port()}"
    with (tmp_path / "gateway.log").open("wb") as output:
        process = subprocess.Popen([program, f"--web.listen-address={address}"], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/-/ready", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "gateway.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield address
    finally:
        process.kill()
        process.wait()


def gauges(gateway: str) -> dict[tuple[str, str, str], float]:
    """What Prometheus would fetch: value by name, model and part."""
    page = urllib.request.urlopen(f"http://{gateway}/metrics", timeout=10).read().decode()
    return {
        (sample.name, sample.labels["model"], sample.labels.get("part", "")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("job") == "monitor" and sample.name.startswith("monitor_")
    }


def test_gauges_reach_a_pushgateway_and_replace_the_last_ones(digits: Digits, tmp_path: Path, gateway: str) -> None:
    digits.log(tmp_path / "dark", darker(digits.images_NHWC[:300]), model="digits")
    digits.log(tmp_path / "well", digits.images_NHWC[:200], model="digits")
    started = time.time()
    for log, images, drifted in (("dark", 300, 1), ("well", 200, 0)):
        run = watch(digits, tmp_path / log, push_gateway=gateway)
        found = gauges(gateway)
        assert found["monitor_window_images", "digits", ""] == images
        assert started <= found["monitor_last_run_timestamp_seconds", "digits", ""] <= time.time()
        for part in PARTS:
            assert found["monitor_drift_score", "digits", part] == pytest.approx(
                run.data.metrics[f"drift_{part}_score"]
            )
            is_in = part in run.data.tags["drift"]
            assert found["monitor_drift_detected", "digits", part] == is_in
        assert found["monitor_drift_detected", "digits", "feature"] == drifted
        assert len(found) == 10


def test_a_pushgateway_that_is_away_is_told_when_all_else_is_done(digits: Digits, tmp_path: Path) -> None:
    digits.log(tmp_path, digits.images_NHWC[:200])
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(MonitoringError, match=rf"the Pushgateway at '{address}' cannot be reached: .*refused") as error:
        watch(digits, tmp_path, push_gateway=address)
    assert error.value.exit_code == 1
    run = last_run()
    assert (run.info.status, run.data.metrics["drift_detected"]) == ("FAILED", 0)
    assert "monitoring/report.html" in artifacts(run, "monitoring")


class Page(HTMLParser):
    """Everything in a page that could load or run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "b") and tag != "b":
            self.wrong.append(tag)
        for name, value in attrs:
            inside = str(value).startswith(("#", "data:image/png;base64,"))
            if name.startswith("on") or (name in ("src", "href") and not inside):
                self.wrong.append(f"{tag} {name}={value}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium("--window-size=1040,1400", "--hide-scrollbars") as browser:
        yield browser


def test_the_page_is_whole_and_takes_names_as_text(digits: Digits, tmp_path: Path, browser: Chrome) -> None:
    name = "<img src=x onerror=alert(1)> & $verdict"
    rows = digits.log(tmp_path, darker(digits.images_NHWC[:500]), keep=3, model=name)
    write_feedback(tmp_path, [{"id": rows[0]["id"], "time": rows[0]["time"], "label": "x", "value": None}])
    run = watch(digits, tmp_path, model_uri=f"runs:/{digits.run_id}/model")
    html = text(run, "monitoring/report.html")
    assert Page(html).wrong == []
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("Drift: appearance")
    assert name in browser.find_element(By.TAG_NAME, "header").text
    assert len(browser.find_elements(By.CSS_SELECTOR, "section table tbody tr")) == 13
    drawn = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 300)")
    assert drawn == [True] * 5
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    if os.environ.get("UPDATE_SCREENSHOTS"):
        digits.log(tmp_path / "shown", darker(digits.images_NHWC[:500]), keep=3)
        shown = text(watch(digits, tmp_path / "shown"), "monitoring/report.html")
        (tmp_path / "report.html").write_text(shown, encoding="utf-8")
        browser.get((tmp_path / "report.html").as_uri())
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("P", palette=Image.Palette.ADAPTIVE)
        picture.save(ROOT / "docs/images/drift-report.png", optimize=True)


@pytest.mark.slow
def test_what_a_real_service_logged_is_read_through_mlflow_run(
    digits: Digits, tmp_path: Path, start_service: Callable[..., PredictionService]
) -> None:
    """Images as they are, then turned ones: the first is no drift, `mlflow run -e monitor` finds the second."""
    log = tmp_path / "served"
    service = start_service("models:/digits@champion", f"--log={log}", "--keep_share=0.2")
    images_NHWC = digits.images_NHWC[:300]

    def send(images_NHWC: np.ndarray) -> None:
        for start in range(0, len(images_NHWC), 50):
            part = images_NHWC[start : start + 50]
            tensor = {"name": "images", "shape": list(part.shape), "datatype": "UINT8", "data": part.ravel().tolist()}
            status, answer = service.post("/v2/models/digits/infer", {"inputs": [tensor]})
            assert status == 200, answer

    send(images_NHWC)
    middle = datetime.now(UTC)
    send(np.rot90(images_NHWC, axes=(1, 2)))
    assert service.stop() == 0

    run = watch(digits, log, until=middle.isoformat(), hours=1.0)
    assert (run.data.metrics["window_images"], run.data.tags["drift"]) == (300, "none")
    command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", str(ROOT), "-e", "monitor"]
    parameters = {"log": log, "model_uri": "models:/digits@champion", "since": middle.isoformat()}
    parameters["fail_on_drift"] = "true"
    done = subprocess.run(
        [*command, *(word for name, value in parameters.items() for word in ("-P", f"{name}={value}"))],
        cwd=digits.folder,
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        capture_output=True,
        text=True,
    )
    told = "Drift: appearance, .*300 images of digits version 1 from .*; run [0-9a-f]{32}$"
    assert re.search(told, done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert done.returncode == 1
    assert "error: Drift: appearance" in done.stderr
    run = last_run()
    assert (run.info.status, run.data.metrics["drift_detected"]) == ("FAILED", 1)
    assert run.info.run_name.startswith("monitor-digits-v1-")
    assert "pictures/strangest.png" in artifacts(run, "pictures")
