"""`client` against our service over HTTP, and against Triton over HTTP and gRPC."""

from __future__ import annotations

import csv
import io
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from mlflow import MlflowClient
from service import CLASSES, ROOT, PredictionService, expected_logits, free_port, some_images
from triton_server import TokenProxy, Triton, running

import client
import evaluate
from data_loader.dataset import load
from models.networks import build
from models.onnx_export import to_onnx
from models.triton import to_repository
from serving import load as load_on
from serving.remote import Remote, RemoteError
from utils import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights for the images of digits."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("digits") / "model.onnx"
    to_onnx(build("cnn", (8, 8, 1), 10, [80.0], [60.0]), (8, 8, 1), tuple("0123456789"), path)
    return path


@pytest.fixture(scope="module")
def ours(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PredictionService]:
    service = PredictionService(model, tmp_path_factory.mktemp("ours"))
    service.wait()
    yield service
    service.kill()


@pytest.fixture(scope="module")
def repository(model: Path, served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    to_repository(model, "classifier", folder)
    to_repository(served_model, "fruit", folder)
    return folder


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    with running(Triton(tmp_path_factory.mktemp("triton"), repository)) as server:
        yield server


def everywhere(ours: PredictionService, triton: Triton | TokenProxy) -> list[tuple[str, str]]:
    """Address and protocol of all that serves."""
    return [(ours.url, "http"), *((url, protocol) for protocol, url in triton.urls.items())]


def accuracy_of(model: Path, split: str = "test") -> tuple[float, int]:
    """Accuracy of ONNX Runtime alone, and the images of the split."""
    data = load("digits", data_dir=Path("data"))
    rows = data.rows[split]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    guesses_N = session.run(None, {"images": data.images_NHWC[rows]})[0].argmax(axis=1)
    return float(np.mean(guesses_N == data.labels_N[rows])), len(rows)


def table(run: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/tables/requests.csv"))))


def last_run() -> Any:
    return MlflowClient().search_runs(["0"], max_results=1)[0]


def check_run(run: Any, model: Path, *, split: str, requests: int) -> None:
    """Accuracy as ONNX Runtime has it; percentiles and throughput as the raw latencies have them."""
    accuracy, _ = accuracy_of(model, split)
    metrics, rows = run.data.metrics, table(run)
    assert run.info.status == "FINISHED"
    assert metrics[f"{split}/accuracy"] == pytest.approx(accuracy)
    assert 0.02 < accuracy < 0.5  # so that an order of images other than the labels' would show
    latencies_ms = [float(row["latency_ms"]) for row in rows]
    assert len(latencies_ms) == requests
    assert min(latencies_ms) > 0
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    for rank in (50, 90, 95, 99):
        assert metrics[f"latency_p{rank}_ms"] == pytest.approx(cuts[rank - 1])
    seconds = max(float(row["started_s"]) + float(row["latency_ms"]) / 1e3 for row in rows)
    assert metrics["requests_per_s"] == pytest.approx(requests / seconds)
    assert run.data.tags["served_version"] == "1"
    assert [file.path for file in MlflowClient().list_artifacts(run.info.run_id, "pictures")] == [
        "pictures/latencies.png"
    ]


@pytest.mark.parametrize(("split", "batch_size", "concurrency"), [("test", 1, 8), ("val", 7, 3)])
def test_our_service_over_http(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    ours: PredictionService,
    split: str,
    batch_size: int,
    concurrency: int,
) -> None:
    before = ours.metric("serving_request_seconds_count", endpoint="infer")
    client.main(client.Settings(url=ours.url, split=split, batch_size=batch_size, concurrency=concurrency))
    accuracy, images = accuracy_of(model, split)
    requests = -(-images // batch_size)
    assert ours.metric("serving_request_seconds_count", endpoint="infer") - before == requests + concurrency
    check_run(last_run(), model, split=split, requests=requests)
    said = capsys.readouterr().out
    assert f"{split} accuracy {accuracy:.4f} on {images} images, version 1 of classifier at {ours.url} (http)" in said
    assert re.search(r"images/s over \d+ connections; p50 [\d.]+ ms, p90 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms", said)


@pytest.mark.parametrize(("protocol", "batch_size", "concurrency"), [("http", 1, 8), ("grpc", 1, 8), ("grpc", 32, 4)])
def test_triton(project: Path, model: Path, triton: Triton, protocol: str, batch_size: int, concurrency: int) -> None:
    """It gets every image once, and puts requests together as config.pbtxt allows."""
    counters = ("nv_inference_count", "nv_inference_request_success", "nv_inference_exec_count")
    before = [triton.metric(name) for name in counters]
    client.main(
        client.Settings(
            url=triton.urls[protocol], protocol=protocol, batch_size=batch_size, concurrency=concurrency, passes=2
        )
    )
    found, asked, executed = (triton.metric(name) - was for name, was in zip(counters, before, strict=True))
    _, images = accuracy_of(model)
    requests = 2 * -(-images // batch_size)
    assert (found, asked) == (2 * images + concurrency * batch_size, requests + concurrency)
    assert executed < asked
    check_run(last_run(), model, split="test", requests=requests)


def test_both_servers_have_the_accuracy_that_evaluate_finds(
    project: Path, model: Path, ours: PredictionService, triton: Triton
) -> None:
    evaluate.main(evaluate.Settings(model_uri=str(model), dataset="digits"))
    expected = last_run().data.metrics["test/accuracy"]
    for url, protocol in everywhere(ours, triton):
        client.main(client.Settings(url=url, protocol=protocol, batch_size=64))
        assert last_run().data.metrics["test/accuracy"] == expected


def test_both_servers_describe_the_same_model(ours: PredictionService, triton: Triton) -> None:
    """Our service's names and shapes are those of the config.pbtxt that `export` writes."""
    with Remote(ours.url, "http") as remote:
        found = remote.model("classifier")
    assert (found.image_shape, found.classes) == ((8, 8, 1), 10)
    for protocol, url in triton.urls.items():
        with Remote(url, protocol) as remote:
            assert remote._client.is_model_ready("classifier", "1")
            assert remote.model("classifier") == found


def test_triton_names_the_classes_from_the_repository(served_model: Path, triton: Triton) -> None:
    """Its classification extension answers VALUE:NUMBER:NAME, in the order of the values."""
    image_NHWC = some_images(1)
    order = expected_logits(served_model, image_NHWC)[0].argsort()[::-1]
    with Remote(triton.urls["http"], "http") as remote:
        tensor = remote._api.InferInput("images", image_NHWC.shape, "UINT8").set_data_from_numpy(image_NHWC)
        wanted = remote._api.InferRequestedOutput("logits", class_count=3)
        (row,) = remote._client.infer("fruit", [tensor], outputs=[wanted]).as_numpy("logits")
    assert [said.decode().split(":", 1)[1] for said in row] == [f"{number}:{CLASSES[number]}" for number in order]


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Something at a port that is no prediction server: it answers with that body, or never."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer is None:
                over.wait(30)
                return
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words: object) -> None:
            pass

    over = threading.Event()
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def refused(capsys: pytest.CaptureFixture[str], **settings: Any) -> RemoteError | UsageError:
    """The one line that ends the client."""
    with pytest.raises((RemoteError, UsageError)) as error:
        client.main(client.Settings(**settings))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    return error.value


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nobody_there(project: Path, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    error = refused(capsys, url=address, protocol=protocol)
    assert str(error).startswith(f"no server answers at {address} ({protocol}): ")
    assert str(error).endswith("start it, or check url and protocol")
    assert error.exit_code == 1


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1:80", "http://", "127.0.0.1:port", "a b:80", "127.0.0.1", "127.0.0.1:99999"]
)
def test_no_address(project: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    error = refused(capsys, url=url)
    assert url in str(error)


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b"[]", b'{"inputs": 3, "outputs": null}'])
def test_another_server_is_there(project: Path, capsys: pytest.CaptureFixture[str], answer: bytes) -> None:
    with listening(answer) as address:
        error = refused(capsys, url=address)
    assert address in str(error)
    assert error.exit_code == 2


def test_a_server_that_never_answers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listening(None) as address:
        error = refused(capsys, url=address, timeout_s=0.2)
    assert str(error).startswith(f"{address} did not answer in time")
    assert error.exit_code == 1


@pytest.mark.parametrize("wrong", [{"model_name": "other"}, {"model_version": "7"}])
def test_a_wrong_model_or_version(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    ours: PredictionService,
    triton: Triton,
    wrong: dict[str, str],
) -> None:
    for url, protocol in everywhere(ours, triton):
        error = refused(capsys, url=url, protocol=protocol, **wrong)
        assert re.match(rf"{re.escape(url)} has no model '\w+'", str(error))
        assert "check model_name and model_version" in str(error)
        assert error.exit_code == 2


def test_a_data_set_of_another_kind(
    project: Path, capsys: pytest.CaptureFixture[str], ours: PredictionService, tmp_path: Path
) -> None:
    colour, few = tmp_path / "colour.npz", tmp_path / "few.npz"
    random = np.random.default_rng(0)
    np.savez(colour, images=random.integers(0, 256, (60, 8, 8, 3), np.uint8), labels=np.arange(60) % 10)
    np.savez(few, images=random.integers(0, 256, (60, 8, 8, 1), np.uint8), labels=np.arange(60) % 3)
    assert "has images (8, 8, 3), the model" in str(refused(capsys, url=ours.url, dataset=str(colour)))
    assert "has 3 classes, the model" in str(refused(capsys, url=ours.url, dataset=str(few)))


def test_a_token_is_shown_and_asked_for(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    triton: Triton,
    tmp_path: Path,
    start_service: Callable[..., PredictionService],
) -> None:
    """By our service, and by a proxy before Triton, which asks nobody."""
    service = start_service(model, SERVING_TOKEN="open sesame")
    with running(TokenProxy(tmp_path, triton, "open sesame")) as proxy:
        for url, protocol in everywhere(service, proxy):
            monkeypatch.delenv("SERVING_TOKEN", raising=False)
            error = refused(capsys, url=url, protocol=protocol)
            assert str(error).startswith(f"{url} asks for a token; put it into the environment variable SERVING_TOKEN")
            monkeypatch.setenv("SERVING_TOKEN", "guess")
            error = refused(capsys, url=url, protocol=protocol)
            assert str(error).startswith(f"{url} refuses the token in the environment variable SERVING_TOKEN")
            assert ("guess" not in str(error), error.exit_code) == (True, 2)
            monkeypatch.setenv("SERVING_TOKEN", "open sesame")
            client.main(client.Settings(url=url, protocol=protocol, split="val", batch_size=64))
            run = last_run()
            assert run.info.status == "FINISHED"
            assert "sesame" not in f"{run.data.params} {run.data.tags} {capsys.readouterr().out}"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_triton_refuses(project: Path, capsys: pytest.CaptureFixture[str], triton: Triton, protocol: str) -> None:
    """A batch that config.pbtxt does not allow, and images of another shape."""
    url = triton.urls[protocol]
    error = refused(capsys, url=url, protocol=protocol, batch_size=257)
    assert re.search("batch-size must be <= 256", str(error))
    assert (last_run().info.status, error.exit_code) == ("FAILED", 2)
    with Remote(url, protocol) as remote:
        found = remote.model("classifier")
        with pytest.raises(RemoteError, match=r"Expected \[-1,8,8,1\], got \[2,8,8,3\]") as raised:
            remote.infer(found, np.zeros((2, 8, 8, 3), np.uint8))
    assert "\n" not in str(raised.value)


def test_the_first_error_ends_the_load_and_is_the_one_that_is_told() -> None:
    asked: list[int] = []

    @contextmanager
    def connect() -> Iterator[Callable[[int], int]]:
        def ask(number: int) -> int:
            asked.append(number)
            if number == 5:
                raise KeyError("the fifth")
            return number * number

        yield ask

    with pytest.raises(KeyError, match="the fifth"):
        load_on.measure(connect, 1000, 4)
    assert len(asked) < 500
    advanced: list[int] = []
    found = load_on.measure(connect, 5, 3, lambda: advanced.append(1))
    assert (found.answers, len(advanced)) == ([0, 1, 4, 9, 16], 5)
    values_s = np.random.default_rng(0).exponential(size=999)
    measured = load_on.Measured([0] * 999, np.zeros(999), values_s, 1.0)
    expected_ms = np.percentile(values_s, [50, 90, 95, 99]) * 1e3
    np.testing.assert_allclose(list(measured.percentiles_ms().values()), expected_ms)


def test_a_connection_that_cannot_be_opened_ends_the_others() -> None:
    lock, opened = threading.Lock(), []

    @contextmanager
    def connect() -> Iterator[Callable[[int], int]]:
        with lock:
            opened.append(1)
            last = len(opened) == 3
        if last:
            raise OSError("too many connections")
        yield lambda number: number

    with pytest.raises(OSError, match="too many connections"):
        load_on.measure(connect, 100, 3)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_mlflow_run(project: Path, ours: PredictionService, triton: Triton, model: Path, protocol: str) -> None:
    url = {"http": ours.url, "grpc": triton.urls["grpc"]}[protocol]
    command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", str(ROOT), "-e", "client"]
    settings = (f"url={url}", f"protocol={protocol}", f"data_dir={project / 'data'}", "concurrency=2")
    command += [word for setting in settings for word in ("-P", setting)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MLFLOW_EXPERIMENT_ID": "0"})
    assert done.returncode == 0, done.stderr
    accuracy, images = accuracy_of(model)
    assert f"test accuracy {accuracy:.4f} on {images} images" in done.stdout
    check_run(last_run(), model, split="test", requests=images)


def test_as_a_user_sees_it(project: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, str(ROOT / "client.py"), f"--url={address}"], capture_output=True, text=True, cwd=tmp_path
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: no server answers at {address} \(http\): .*\n", done.stderr)
