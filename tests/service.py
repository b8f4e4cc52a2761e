"""The prediction service for tests: a model with known answers, and the real process started as a user would."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from models.networks import build
from models.onnx_export import to_onnx

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (10, 8, 3)
CLASSES = ("Äpfel", "<b onclick='x'>&amp;", "漢字")


def write_model(path: Path, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Path:
    """A network with random weights."""
    torch.manual_seed(seed)
    network = build("cnn", shape, len(CLASSES), [120.0] * shape[2], [70.0] * shape[2])
    to_onnx(network, shape, CLASSES, path)
    return path


def some_images(count: int, seed: int = 0) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


def expected_logits(model: Path, images_NHWC: np.ndarray) -> np.ndarray:
    """The answer of ONNX Runtime itself."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images_NHWC})[0])


def png(image_HWC: np.ndarray, scale: int = 1) -> bytes:
    """An image file whose pixels are exactly these."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC.repeat(scale, axis=0).repeat(scale, axis=1)).save(buffer, "PNG")
    return buffer.getvalue()


class Client:
    """Asks whoever listens on a port of this machine."""

    port: int

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers (in lower case) of a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return response.status, response.read(), {name.lower(): text for name, text in response.getheaders()}
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        return self.ask("GET", path, **headers)[:2]

    def post(self, path: str, value: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer to JSON."""
        status, body, _ = self.ask("POST", path, json.dumps(value).encode(), Content_Type="application/json", **headers)
        return status, json.loads(body)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PredictionService(Client):
    """`serve.py` as a process of its own."""

    script = ROOT / "serve.py"

    def command(self, *flags: str) -> list[str]:
        """What is started; a flag is `--name=value`."""
        return [sys.executable, str(self.script), *flags]

    def __init__(self, model_uri: str | Path, folder: Path, *flags: str, port: int = 0, **environment: str) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"serve-{self.port}.log"
        command = self.command(f"--model_uri={model_uri}", f"--port={self.port}", *flags)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                if self.get("/v2/health/ready")[0] == 200:
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1].decode())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """End it with its workers, whatever state it is in."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file for the service."""
    return write_model(tmp_path_factory.mktemp("served") / "model.onnx")


@pytest.fixture(scope="session")
def service(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PredictionService]:
    """A service with its defaults but for a body limit of 1 MiB, for all tests that do not disturb it."""
    service = PredictionService(served_model, tmp_path_factory.mktemp("service"), "--max_body_mb=1")
    service.wait()
    yield service
    service.kill()


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., PredictionService]]:
    """Start services of the test's own; ended with it."""
    started: list[PredictionService] = []

    def start(model_uri: str | Path, *flags: str, **environment: str) -> PredictionService:
        started.append(PredictionService(model_uri, tmp_path, *flags, **environment))
        started[-1].wait()
        return started[-1]

    yield start
    for service in started:
        service.kill()
