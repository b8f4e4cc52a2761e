"""The service's page in a real Chromium: draw, drop, choose, and names of classes that would like to be HTML.

UPDATE_SCREENSHOTS=1 writes the README's picture (docs/images/prediction-page.png) on the way.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from service import CLASSES, ROOT, PredictionService, expected_logits, png, some_images

from data_loader.images import decode_image

pytestmark = pytest.mark.slow

Bars = list[tuple[str, float]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium("--window-size=900,640") as browser:
        yield browser


@pytest.fixture
def page(browser: Chrome, service: PredictionService) -> Chrome:
    browser.get(service.url)
    return browser


def bars(browser: Chrome) -> Bars:
    """Class and share of each bar, from the top, once there are any."""
    rows = WebDriverWait(browser, 60).until(lambda browser: browser.find_elements(By.CSS_SELECTOR, "#classes .row"))
    return [
        (
            row.find_element(By.TAG_NAME, "span").get_attribute("textContent") or "",
            float(row.find_element(By.TAG_NAME, "progress").get_attribute("value") or "nan"),
        )
        for row in rows
    ]


def check(received: Bars, model: Path, picture: bytes) -> None:
    """The bars are what ONNX Runtime and torch give for these bytes, the largest first."""
    logits_NK = expected_logits(model, decode_image(picture, 10, 8, 3)[None])
    shares_K = torch.softmax(torch.from_numpy(logits_NK).double(), 1).numpy()[0]
    order = np.argsort(-shares_K)
    assert [name for name, _ in received] == [CLASSES[label] for label in order]
    np.testing.assert_allclose([share for _, share in received], shares_K[order], atol=1e-5)


def drawn(browser: Chrome) -> bytes:
    """What the field shows, as the page sends it."""
    encoded = browser.execute_script("return document.getElementById('field').toDataURL('image/png').split(',')[1]")
    return base64.b64decode(encoded)


def draw(browser: Chrome, *points: tuple[int, int]) -> None:
    """One stroke of the pen; points from the middle of the field, to the right and down."""
    (x, y), field = points[0], browser.find_element(By.ID, "field")
    pen = ActionChains(browser, duration=20).move_to_element_with_offset(field, x, y).click_and_hold()
    for (right, down), (x, y) in pairwise(points):
        pen = pen.move_by_offset(x - right, y - down)
    pen.release().perform()


def test_a_drawing_is_classified_when_the_pen_is_lifted(page: Chrome, served_model: Path) -> None:
    draw(page, (-40, -80), (20, -80), (40, -20), (-40, 80))
    received = bars(page)
    pixels_HWC = np.asarray(Image.open(io.BytesIO(drawn(page))).convert("L"))
    assert 0.02 < (pixels_HWC == 255).mean() < 0.5
    check(received, served_model, drawn(page))
    assert "Model classifier, version 1." in page.find_element(By.TAG_NAME, "body").text
    page.find_element(By.ID, "clear").click()
    assert not page.find_elements(By.CSS_SELECTOR, "#classes .row")
    assert not np.asarray(Image.open(io.BytesIO(drawn(page))).convert("L")).any()


def test_a_digit_drawn_by_hand_is_read(
    browser: Chrome, project: Path, start: Callable[..., Any], start_service: Callable[..., PredictionService]
) -> None:
    training = start("train.py", "--register_as=digits", cwd=project)
    assert training.wait(300) == 0, training.communicate()
    browser.get(start_service("models:/digits@challenger").url)
    draw(browser, (20, 90), (20, -90), (-70, 30), (70, 30))
    received = bars(browser)
    assert received[0][0] == "4"
    assert received[0][1] > 0.5
    assert "Model digits, version 1." in browser.find_element(By.TAG_NAME, "body").text
    if os.environ.get("UPDATE_SCREENSHOTS") == "1":
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs/images/prediction-page.png", optimize=True)


DROP = """
const [name, bytes, done] = arguments;
const data = new DataTransfer();
data.items.add(new File([new Uint8Array(bytes)], name));
document.getElementById("field").dispatchEvent(
    new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
setTimeout(done, 0);
"""


def test_a_dropped_and_a_chosen_picture_are_classified_as_they_are(
    page: Chrome, served_model: Path, tmp_path: Path
) -> None:
    first, second = (png(image_HWC, scale=7) for image_HWC in some_images(2, seed=8))
    page.execute_async_script(DROP, "a.png", list(first))
    check(bars(page), served_model, first)
    page.find_element(By.ID, "clear").click()
    (tmp_path / "b.png").write_bytes(second)
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "b.png"))
    check(bars(page), served_model, second)


def test_what_is_no_picture_is_told(page: Chrome) -> None:
    page.execute_async_script(DROP, "a.png", [1, 2, 3])
    told = WebDriverWait(page, 60).until(lambda page: page.find_element(By.ID, "message").text)
    assert told == "not a PNG, JPEG, BMP or WebP image"
    assert not page.find_elements(By.CSS_SELECTOR, "#classes .row")


def test_names_are_shown_and_not_obeyed_and_nothing_comes_from_elsewhere(page: Chrome) -> None:
    page.execute_async_script(DROP, "a.png", list(png(some_images(1)[0])))
    assert CLASSES[1] in dict(bars(page))
    assert not page.find_elements(By.CSS_SELECTOR, "#classes b")
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.endswith("/predict") for name in fetched), fetched
    # The policy holds: a script that someone puts into the page does not run.
    page.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.taken = 1';"
        "document.body.append(script)"
    )
    assert page.execute_script("return window.taken") is None
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("Content Security Policy" in message or "400" in message for message in severe), severe


def test_a_service_with_a_token_is_asked_with_it(
    browser: Chrome, start_service: Callable[..., PredictionService], served_model: Path
) -> None:
    service = start_service(served_model, SERVING_TOKEN="s3cret")
    browser.get(service.url)
    picture = png(some_images(1)[0])
    browser.execute_async_script(DROP, "a.png", list(picture))
    token = WebDriverWait(browser, 60).until(
        lambda browser: field if (field := browser.find_element(By.ID, "token")).is_displayed() else None
    )
    token.send_keys("s3cret")
    browser.execute_async_script(DROP, "a.png", list(picture))
    check(bars(browser), served_model, picture)
