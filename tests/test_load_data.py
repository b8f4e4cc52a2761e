"""The entry point load_data, as a user starts it: what it prints, and what it leaves in the tracking store."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


def load_data(tmp_path: Path, **parameters: object) -> "subprocess.CompletedProcess[str]":
    flags = [f"--{name}={value}" for name, value in {"data_dir": tmp_path / "data", **parameters}.items()]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, ROOT / "load_data.py", *flags]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def last_run(tmp_path: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    return client.search_runs(["0"], order_by=["start_time DESC"])[0]


def artifacts(run: Any) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://"))


def test_digits_are_recorded(tmp_path: Path) -> None:
    done = load_data(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1,797 images" in done.stdout
    run = last_run(tmp_path)
    manifest = json.loads((artifacts(run) / "manifest.json").read_text())
    assert run.data.params["data_digest"] == run.data.tags["data_digest"] == manifest["digest"]
    assert run.data.metrics["data/classes"] == 10
    for split, by_class in manifest["counts"].items():
        assert run.data.metrics[f"data/{split}_images"] == manifest["images"][split] == sum(by_class.values())
    (recorded,) = run.inputs.dataset_inputs
    assert recorded.dataset.name == "digits"
    assert manifest["digest"].startswith(recorded.dataset.digest)
    for picture in ("class_histogram.png", "samples.png"):
        with Image.open(artifacts(run) / "pictures" / picture) as image:
            assert image.width > 300


def test_bad_files_stop_it_or_are_listed(tmp_path: Path) -> None:
    for label, name in enumerate(('it\'s a "cat"', "Ünïcode 漢字")):
        (tmp_path / "my pets" / name).mkdir(parents=True)
        for number in range(30):
            pixels_HWC = np.random.default_rng(100 * label + number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels_HWC).save(tmp_path / "my pets" / name / f"{number}.png")
    for number in range(12):
        (tmp_path / "my pets" / name / f"bad {number}.png").write_text("no image")

    done = load_data(tmp_path, dataset="my pets")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "12 bad file(s)" in line
    assert "bad 0.png" in line
    assert "and 9 more" in line
    assert "Traceback" not in done.stderr
    assert last_run(tmp_path).info.status == "FAILED"

    done = load_data(tmp_path, dataset="my pets", on_error="skip", image_size=5)
    assert done.returncode == 0, done.stderr
    assert "60 images" in done.stdout
    assert "bad 0.png" in done.stdout
    run = last_run(tmp_path)
    manifest = json.loads((artifacts(run) / "manifest.json").read_text())
    assert len(manifest["bad"]) == run.data.metrics["data/bad_files"] == 12
    assert manifest["image_shape"] == [5, 5, 3]
    assert run.info.status == "FINISHED"
