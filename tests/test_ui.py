"""The team's server as a person sees it: MLflow's own pages in a real Chromium, signed in.

The server has basic auth, PostgreSQL, and its artifacts in Ceph. UPDATE_SCREENSHOTS=1 writes the README's pictures
(docs/images/) on the way; commit them when the pages have changed.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import chromium
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.server.auth.client import AuthServiceClient
from PIL import Image
from s3_server import S3Server
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from services_stack import ROOT, MlflowServer, PostgreSQL, new_folder, server_settings

pytestmark = pytest.mark.slow

PATIENCE_S = 120
USER, PASSWORD = "ada", "a-password-of-tests-1815"


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Variables of this process for as long as this file's tests last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield patch


@pytest.fixture(scope="module")
def server(
    database_template: Callable[[str], Path], s3_server: S3Server, environment: pytest.MonkeyPatch
) -> Iterator[MlflowServer]:
    """A server with one user besides its administrator, as whom this process signs in."""
    with ExitStack() as at_end:
        database = PostgreSQL(new_folder(at_end))
        subprocess.run(["cp", "-a", str(database_template("postgresql") / "data"), str(database.folder)], check=True)
        at_end.callback(database.kill)
        database.start()
        folder = new_folder(at_end)
        server = MlflowServer(folder, server_settings(database, folder, s3_server))
        at_end.callback(server.kill)
        server.start()
        for name, value in server.environment().items():
            environment.setenv(name, value)
        AuthServiceClient(server.uri).create_user(USER, PASSWORD)
        for name, value in server.environment(USER, PASSWORD).items():
            environment.setenv(name, value)
        yield server


@dataclass
class Runs:
    """Two trainings, whose models are registered, and the evaluation that made the first one's champion."""

    champion: Run
    other: Run
    evaluation: Run
    version: str
    """The champion's."""


@pytest.fixture(scope="module")
def runs(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Made by `mlflow run`, in a folder whose name is the project's: the pages show it as the source."""
    project = tmp_path_factory.mktemp("run") / "image-classifier"
    project.symlink_to(ROOT)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    client = MlflowClient(server.uri)
    experiment = client.create_experiment("image-classifier")

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", "--experiment-id", experiment]
        return subprocess.Popen(
            [*command, *words, str(project)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def end(process: subprocess.Popen[str]) -> Run:
        _, told = process.communicate(timeout=400)
        assert process.returncode == 0, told
        (run_id,) = re.findall(r"=== Run \(ID '(\w+)'\) succeeded", told)
        return client.get_run(run_id)

    trainings = [
        start("-P", "register_as=digits"),
        start(
            "-P", "register_as=digits", "--run-name", "no-augmentation", "-P", "augmentation=none", "-P", "epochs=30"
        ),
    ]
    champion, other = map(end, trainings)
    versions = client.search_model_versions("name = 'digits'")
    (version,) = (str(each.version) for each in versions if each.run_id == champion.info.run_id)
    gate = ["-P", f"model_uri=models:/digits/{version}", "-P", "min_accuracy=0.98", "-P", "promote=true"]
    return Runs(champion, other, end(start("-e", "evaluate", *gate)), version)


@pytest.fixture(scope="module")
def visitor(server: MlflowServer) -> Iterator[Chrome]:
    """A browser that has never been here."""
    with chromium() as browser:
        view = {"width": 1600, "height": 1120, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
        yield browser


@pytest.fixture(scope="module")
def browser(server: MlflowServer, visitor: Chrome) -> Chrome:
    """Signed in, as the browser's own dialog does it: from now on it sends name and password by itself."""
    visitor.get(server.uri.replace("://", f"://{USER}:{PASSWORD}@"))
    text_with(visitor, "Experiments")
    # What a first visit puts in the way is clicked away once.
    visitor.get(server.uri + "/#/experiments/0/runs")
    click(visitor, "[data-component-id='mlflow.assistant.chat_panel.close']")
    visitor.find_element(By.XPATH, "//*[text()='Model training']").click()
    return visitor


@pytest.fixture
def page(browser: Chrome, server: MlflowServer) -> Callable[[str], Chrome]:
    """Open a page of the server, afresh."""

    def page(path: str) -> Chrome:
        browser.get("about:blank")
        browser.get(f"{server.uri}/#/{path}")
        return browser

    return page


def path_of(run: Run) -> str:
    return f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


@pytest.fixture
def screenshot(browser: Chrome, tmp_path: Path) -> Callable[[str], None]:
    """Keep a picture of the page: in docs/images with UPDATE_SCREENSHOTS=1, else in the test's own folder."""
    folder = ROOT / "docs" / "images" if os.environ.get("UPDATE_SCREENSHOTS") == "1" else tmp_path

    def screenshot(name: str) -> None:
        for button in browser.find_elements(By.CSS_SELECTOR, "button[data-assistant-ui]"):
            browser.execute_script("arguments[0].style.display = 'none'", button)
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        folder.mkdir(parents=True, exist_ok=True)
        picture.quantize(256, dither=Image.Dither.NONE).save(folder / name, optimize=True)

    return screenshot


def wait_for(browser: Chrome, selector: str) -> list[WebElement]:
    """The elements that match, once there are any."""
    found = WebDriverWait(browser, PATIENCE_S).until(lambda browser: browser.find_elements(By.CSS_SELECTOR, selector))
    assert found
    return found


def click(browser: Chrome, selector: str) -> None:
    wait_for(browser, selector)[0].click()


def text_with(browser: Chrome, *words: str) -> str:
    """The text of the page, once it holds all `words`."""

    def complete(browser: Chrome) -> str:
        text = browser.find_element(By.TAG_NAME, "body").text
        return text if all(word in text for word in words) else ""

    return WebDriverWait(browser, PATIENCE_S).until(complete)


def no_error_in(text: str) -> None:
    assert not re.search(r"went wrong|error occurred|not found|permission denied|failed to", text, re.IGNORECASE), text


def test_without_a_password_there_is_nothing_to_see(visitor: Chrome, server: MlflowServer) -> None:
    visitor.get(server.uri)
    assert "MLflow" not in visitor.title + visitor.page_source
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.uri}/ajax-api/2.0/mlflow/experiments/search?max_results=1", timeout=30)
    assert refused.value.code == 401
    refused.value.close()


def test_overview_shows_description_metrics_parameters_data_and_model(
    page: Callable[[str], Chrome], runs: Runs, screenshot: Callable[[str], None]
) -> None:
    run = runs.champion
    browser = page(path_of(run))
    text = text_with(browser, "Finished", "Model metrics (", "Parameters (", "Datasets", "digits\nv1", USER)
    no_error_in(text)
    lines = text.splitlines()
    assert f"digits-cnn-{run.data.tags['venue']}" in lines
    for name, value in run.data.params.items():
        assert lines[lines.index(name) + 1] == value
    for name, score in run.data.metrics.items():
        assert float(lines[lines.index(name) + 1]) == pytest.approx(score, abs=1e-6)
    assert f"digits ({run.data.tags['data_digest'][:32]})" in lines
    assert lines[lines.index("Source") + 1] == "image-classifier"
    assert {"weights_sha256", "venue"} <= set(lines)

    browser.find_element(By.XPATH, "//*[text()='Show more']").click()
    described = text_with(browser, "Reproduce", "Made by", "mlflow run --env-manager", "python train.py")
    assert f"Test accuracy {run.data.metrics['test/accuracy']:.4f} on 385 images" in described
    # Model metrics, which stand below the system's, come to the top of their box.
    heading = browser.find_element(By.XPATH, "//*[starts-with(., 'Model metrics (') and not(*)]")
    browser.execute_script("arguments[0].scrollIntoView()", heading)
    browser.execute_script("arguments[0].scrollIntoView()", browser.find_element(By.XPATH, "//*[text()='Description']"))
    screenshot("run-overview.png")


def test_two_runs_are_compared(
    page: Callable[[str], Chrome], server: MlflowServer, runs: Runs, screenshot: Callable[[str], None]
) -> None:
    both, experiment = (runs.champion, runs.other), runs.champion.info.experiment_id
    browser = page(f"experiments/{experiment}/runs")
    names = [str(run.info.run_name) for run in (*both, runs.evaluation)]
    place = runs.champion.data.tags["venue"]
    assert names == [f"digits-cnn-{place}", "no-augmentation", f"evaluate-digits-v{runs.version}-{place}"]
    no_error_in(text_with(browser, *names))
    for run in both:
        browser.execute_script(TICK, run.info.run_id)
    click(browser, "[data-testid='runs-compare-button']")
    text_with(browser, "Comparing 2 Runs from 1 Experiment", "Show diff only")
    rows = browser.execute_script("return [...document.querySelectorAll('tr')].map(row => row.innerText)")
    table = {row.split("\t")[0]: {cell.strip() for cell in row.split("\t")[1:]} for row in rows}
    assert table["Run ID:"] == {run.info.run_id for run in both}
    for name in ("augmentation", "epochs", "learning_rate"):
        assert table[name] == {run.data.params[name] for run in both}

    browser = page(f"experiments/{experiment}/runs?compareRunsMode=CHART")
    wait_for(browser, "input[placeholder='Search metric charts']")[0].send_keys("loss|accuracy")
    drawn = curves(browser, "train/loss", lines=2)
    for run in both:
        history = MlflowClient(server.uri).get_metric_history(run.info.run_id, "train/loss")
        assert [(point.step, pytest.approx(point.value)) for point in history] in drawn
    screenshot("compare-runs.png")


TICK = """
const row = document.querySelector(`a[href*="${arguments[0]}"]`).closest(".ag-row").getAttribute("row-id");
document.querySelector(`.ag-row[row-id="${row}"] input[aria-label^="Press Space"]`).click();
"""
SECTION = "[data-testid='experiment-view-compare-runs-section-header']"


def test_model_metrics_are_charts(
    page: Callable[[str], Chrome], server: MlflowServer, runs: Runs, screenshot: Callable[[str], None]
) -> None:
    browser = page(path_of(runs.champion) + "/model-metrics")
    next(found for found in wait_for(browser, SECTION) if found.text.startswith("test")).click()  # folded
    # What a person types to have these charts together; the others go.
    wait_for(browser, "input[placeholder='Search metric charts']")[0].send_keys("loss|accuracy|learning_rate")
    for name in ("train/loss", "train/accuracy", "train/learning_rate", "val/loss", "val/accuracy"):
        history = MlflowClient(server.uri).get_metric_history(runs.champion.info.run_id, name)
        assert len(history) >= 15
        assert [(point.step, pytest.approx(point.value)) for point in history] in curves(browser, name, lines=1)
    browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'end'})", SECTION)
    screenshot("run-charts.png")


CURVES = """
const title = document.querySelector(`h4[title="${arguments[0]}"]`);
if (!title) return null;
const card = title.closest("[data-testid='experiment-view-compare-runs-card']");
card.scrollIntoView({block: "end"});  // charts are drawn when they come into view
const plot = card.querySelector(".js-plotly-plot");
if (!plot || !plot.querySelector(".scatterlayer path.js-line")) return null;
return plot.data.map(line => Array.from(line.x, (step, i) => [step, line.y[i]]));
"""


def curves(browser: Chrome, name: str, lines: int) -> list[list[tuple[int, float]]]:
    """The points of the lines that a metric's chart shows, once there are so many of more than one point."""

    def drawn(browser: Chrome) -> list[list[tuple[int, float]]]:
        found = browser.execute_script(CURVES, name) or []
        long = [[(step, value) for step, value in line] for line in found if len(line) > 1]
        return long if len(long) >= lines else []

    return WebDriverWait(browser, PATIENCE_S).until(drawn, f"no {lines} curves of {name}")


def test_confusion_matrix_is_a_picture_among_the_artifacts(
    page: Callable[[str], Chrome], runs: Runs, screenshot: Callable[[str], None]
) -> None:
    browser = page(path_of(runs.champion) + "/artifacts")
    for name in ("pictures", "confusion_matrix.png"):
        click(browser, f"[data-testid='artifact-tree-node'][artifact-name='{name}']")
    text_with(browser, "learning_curves.png", "worst_mistakes.png", "pictures/confusion_matrix.png")
    width = WebDriverWait(browser, PATIENCE_S).until(
        lambda browser: browser.execute_script(
            "return Math.max(0, ...[...document.images].filter(i => i.src.startsWith('blob:') || "
            "i.src.includes('confusion_matrix')).map(image => image.naturalWidth))"
        )
    )
    assert width > 300
    screenshot("run-confusion-matrix.png")


def test_the_registered_model_says_which_version_to_use_and_why(
    page: Callable[[str], Chrome], server: MlflowServer, runs: Runs, screenshot: Callable[[str], None]
) -> None:
    model = MlflowClient(server.uri).get_registered_model("digits")
    assert {alias: str(version) for alias, version in model.aliases.items()}["champion"] == runs.version
    browser = page("models/digits")
    text = text_with(
        browser, "the version to use", "Version 1", "Version 2", "champion", "challenger", "promoted_by\n: ada"
    )
    no_error_in(text)
    assert f"Test accuracy {runs.champion.data.metrics['test/accuracy']:.4f}" in text
    screenshot("registered-model.png")
    browser = page(f"models/digits/versions/{runs.version}")
    score = f"Test accuracy {runs.champion.data.metrics['test/accuracy']:.4f} on 385 images"
    no_error_in(text_with(browser, score, "promoted_by_run", "champion", "Source Run"))
    browser.find_element(By.LINK_TEXT, str(runs.champion.info.run_name)).click()
    text_with(browser, runs.champion.info.run_id)
