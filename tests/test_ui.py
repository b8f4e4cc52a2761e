"""A finished run as a person sees it: MLflow's own pages in a real Chromium.

UPDATE_SCREENSHOTS=1 writes the README's pictures (docs/images/) on the way; commit them when the pages have changed.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from tracking_server import ROOT, TrackingServer

from conftest import missing

pytestmark = pytest.mark.slow

PATIENCE_S = 60
CHROMIUM_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Nothing but this machine exists: a page that needs the internet fails here.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    # A mouse is there: without one Plotly shows the tool bar of each chart all the time.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[TrackingServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    server = TrackingServer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def run(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the defaults, in a folder whose name is the project's: the page shows it as the source."""
    project = tmp_path_factory.mktemp("run") / "image-classifier"
    project.symlink_to(ROOT)
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LOGNAME": "ada",
    }
    command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", "--experiment-name", "image-classifier"]
    command += ["-P", "register_as=digits", str(project)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("image-classifier")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.fixture(scope="module")
def browser(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing("there is no browser here (Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in [*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    browser = Chrome(options, Service(executable_path=driver))
    view = {"width": 1600, "height": 1120, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    # What a first visit puts in the way is clicked away once.
    browser.get(server.uri + "/#/experiments/0/runs")
    click(browser, "[data-component-id='mlflow.assistant.chat_panel.close']")
    browser.find_element(By.XPATH, "//*[text()='Model training']").click()
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Chrome, server: TrackingServer, run: Run) -> Callable[[str], Chrome]:
    """Open a tab of the run's page, afresh."""

    def page(tab: str) -> Chrome:
        browser.get("about:blank")
        browser.get(f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}")
        return browser

    return page


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


def test_overview_shows_metrics_parameters_data_and_model(
    page: Callable[[str], Chrome], run: Run, screenshot: Callable[[str], None]
) -> None:
    browser = page("")
    lines = text_with(browser, "Finished", "Model metrics (", "Parameters (", "Datasets", "digits\nv1").splitlines()
    for name, value in run.data.params.items():
        assert lines[lines.index(name) + 1] == value
    for name, score in run.data.metrics.items():
        assert float(lines[lines.index(name) + 1]) == pytest.approx(score, abs=1e-6)
    assert f"digits ({run.data.tags['data_digest'][:32]})" in lines
    assert lines[lines.index("Source") + 1] == "image-classifier"
    assert "weights_sha256" in lines

    # Model metrics, which stand below the system's, come to the top of their box.
    heading = browser.find_element(By.XPATH, "//*[starts-with(., 'Model metrics (') and not(*)]")
    browser.execute_script("arguments[0].scrollIntoView()", heading)
    browser.execute_script("arguments[0].scrollIntoView()", browser.find_element(By.XPATH, "//*[text()='Description']"))
    screenshot("run-overview.png")


def test_model_metrics_are_charts(
    page: Callable[[str], Chrome], server: TrackingServer, run: Run, screenshot: Callable[[str], None]
) -> None:
    browser = page("/model-metrics")
    header = "[data-testid='experiment-view-compare-runs-section-header']"
    next(found for found in wait_for(browser, header) if found.text.startswith("test")).click()  # folded
    # What a person types to have these charts together; the others go.
    wait_for(browser, "input[placeholder='Search metric charts']")[0].send_keys("loss|accuracy|learning_rate")
    for name in ("train/loss", "train/accuracy", "train/learning_rate", "val/loss", "val/accuracy"):
        history = MlflowClient(server.uri).get_metric_history(run.info.run_id, name)
        assert len(history) >= 15
        steps, values = zip(*curve(browser, name), strict=True)
        assert list(steps) == [point.step for point in history]
        assert list(values) == pytest.approx([point.value for point in history])
    browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'end'})", header)
    screenshot("run-charts.png")


CURVE = """
const title = document.querySelector(`h4[title="${arguments[0]}"]`);
if (!title) return null;
const card = title.closest("[data-testid='experiment-view-compare-runs-card']");
card.scrollIntoView({block: "end"});  // charts are drawn when they come into view
const plot = card.querySelector(".js-plotly-plot");
if (!plot || !plot.querySelector(".scatterlayer path.js-line")) return null;
return plot.data.map(line => Array.from(line.x, (step, i) => [step, line.y[i]]));
"""


def curve(browser: Chrome, name: str) -> list[tuple[int, float]]:
    """The points of the line that a metric's chart shows."""
    lines = WebDriverWait(browser, PATIENCE_S).until(
        lambda browser: browser.execute_script(CURVE, name), f"no curve of {name}"
    )
    return [(step, value) for step, value in max(lines, key=len)]


def test_confusion_matrix_is_a_picture_among_the_artifacts(
    page: Callable[[str], Chrome], screenshot: Callable[[str], None]
) -> None:
    browser = page("/artifacts")
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
