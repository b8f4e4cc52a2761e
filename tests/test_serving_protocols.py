"""The service's protocols against their own clients and against what MLflow's server answers."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import uvicorn
from mlflow.pyfunc import scoring_server
from service import CLASSES, SHAPE, Client, PredictionService, expected_logits, free_port, png, some_images
from tracking_server import copy_database

from conftest import missing
from utils.artifacts import log_onnx_model

pytestmark = pytest.mark.slow

INFER = "/v2/models/classifier/infer"


@pytest.fixture(scope="module")
def triton(service: PredictionService) -> Iterator[Any]:
    try:
        from tritonclient.http import InferenceServerClient
    except (ImportError, RuntimeError):
        missing("tritonclient has no HTTP support here (pip install tritonclient[http])")
    with InferenceServerClient(service.url.removeprefix("http://")) as client:
        yield client


def test_tritons_client_reads_what_the_server_is(triton: Any) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("classifier")
    assert triton.is_model_ready("classifier", "1")
    assert not triton.is_model_ready("other")
    assert not triton.is_model_ready("classifier", "2")
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    assert triton.get_model_metadata("classifier") == {
        "name": "classifier",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, *SHAPE]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, len(CLASSES)]}],
    }
    assert triton.get_model_config("classifier")["output"][0]["dims"] == [len(CLASSES)]


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False, None])
@pytest.mark.parametrize("compression", ["gzip", "deflate", None])
def test_tritons_client_gets_onnx_runtimes_logits(
    triton: Any, served_model: Path, binary_input: bool, binary_output: bool | None, compression: str | None
) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput

    images_NHWC = some_images(3)
    tensor = InferInput("images", list(images_NHWC.shape), "UINT8")
    tensor.set_data_from_numpy(images_NHWC, binary_data=binary_input)
    outputs = None if binary_output is None else [InferRequestedOutput("logits", binary_data=binary_output)]
    result = triton.infer(
        "classifier",
        [tensor],
        outputs=outputs,
        request_id="seven",
        model_version="1",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_allclose(result.as_numpy("logits"), expected_logits(served_model, images_NHWC), atol=1e-5)
    assert result.get_response()["id"] == "seven"
    assert result.get_response()["model_version"] == "1"


def test_json_may_be_flat_or_nested(service: PredictionService, served_model: Path) -> None:
    images_NHWC = some_images(2)
    logits_NK = expected_logits(served_model, images_NHWC)
    for data in (images_NHWC.tolist(), images_NHWC.ravel().tolist()):
        tensor = {"name": "images", "shape": images_NHWC.shape, "datatype": "UINT8", "data": data}
        status, answer = service.post(INFER, {"inputs": [tensor]})
        assert status == 200
        (output,) = answer["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", list(logits_NK.shape))
        np.testing.assert_allclose(np.reshape(output["data"], logits_NK.shape), logits_NK, atol=1e-5)


TENSOR = {"name": "images", "shape": [1, *SHAPE], "datatype": "UINT8", "data": [0] * int(np.prod(SHAPE))}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "pixels"}, "tensor 'images'"),
        ({"datatype": "FP32"}, "datatype UINT8"),
        ({"shape": [1, 8, 10, 3]}, "shape [n, 10, 8, 3]"),
        ({"shape": [0, *SHAPE]}, "n at least 1"),
        ({"shape": [True, *SHAPE]}, "n at least 1"),
        ({"shape": [2, *SHAPE]}, "as many as [2, 10, 8, 3] says"),
        ({"shape": [10**30, *SHAPE]}, "n at least 1"),
        ({"shape": [2**62, *SHAPE]}, "whole numbers"),
        ({"shape": None}, "shape"),
        ({"data": [0.5] * 240}, "whole numbers from 0 to 255"),
        ({"data": [256] * 240}, "whole numbers from 0 to 255"),
        ({"data": [-1] * 240}, "whole numbers from 0 to 255"),
        ({"data": ["0"] * 240}, "whole numbers from 0 to 255"),
        ({"data": 240}, "expected data"),
        ({"data": [[0] * 240]}, "expected lists of the shape [n, 10, 8, 3]"),
        ({"parameters": {"binary_data_size": 240}}, "binary_data_size 240 and as many bytes"),
        ({"parameters": {"shared_memory_region": "x"}, "data": None}, "expected data"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_told(service: PredictionService, change: dict[str, Any], told: str) -> None:
    status, answer = service.post(INFER, {"inputs": [{**TENSOR, **change}]})
    assert status == 400
    assert told in answer["error"]


@pytest.mark.parametrize("path", ["/v2/models/other/infer", "/v2/models/classifier/versions/2/infer"])
def test_another_model_or_version_is_not_here(service: PredictionService, path: str) -> None:
    status, answer = service.post(path, {"inputs": [TENSOR]})
    assert (status, answer["error"]) == (404, "there is no such model; this service has 'classifier', version 1")


@pytest.fixture(scope="module")
def mlflows_own(served_model: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Client]:
    """What `mlflow models serve` runs, over the same model."""
    folder = tmp_path_factory.mktemp("mlflow")
    copy_database(empty_database, folder, str(folder / "artifacts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        with mlflow.start_run(experiment_id="0") as run:
            uri = log_onnx_model(run.info.run_id, served_model, some_images(1))
        app = scoring_server.init(mlflow.pyfunc.load_model(uri))
    os.environ.pop("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", None)
    client = Client()
    client.port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=client.port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield client
    server.should_exit = True
    thread.join()


IMAGES = some_images(3)


@pytest.mark.parametrize(
    "message",
    [
        {"inputs": IMAGES.tolist()},
        {"inputs": {"images": IMAGES.tolist()}},
        {"instances": IMAGES.tolist()},
        {"instances": [{"images": image} for image in IMAGES.tolist()]},
        {"inputs": IMAGES.tolist(), "params": {}},
    ],
    ids=["inputs", "named inputs", "instances", "named instances", "params"],
)
def test_invocations_answer_as_mlflow_does(
    service: PredictionService, mlflows_own: Client, message: dict[str, Any]
) -> None:
    status, theirs, their_headers = mlflows_own.ask(
        "POST", "/invocations", json.dumps(message).encode(), Content_Type="application/json"
    )
    assert status == 200
    for text in (json.dumps(message), json.dumps(message, indent=1), json.dumps(message, separators=(",", ":"))):
        status, body, headers = service.ask(
            "POST", "/invocations", text.encode(), Content_Type="application/json; charset=utf-8"
        )
        assert status == 200
        assert headers["content-type"] == their_headers["content-type"]
        ours, others = json.loads(body), json.loads(theirs)
        assert ours.keys() == others.keys()
        np.testing.assert_allclose(ours["predictions"]["logits"], others["predictions"]["logits"], atol=1e-5)


@pytest.mark.parametrize(
    "message",
    [{}, {"inputs": 3}, {"inputs": [[1]]}, {"inputs": [], "instances": []}, {"inputs": {"pixels": IMAGES.tolist()}}],
)
def test_what_mlflow_refuses_is_refused(
    service: PredictionService, mlflows_own: Client, message: dict[str, Any]
) -> None:
    status, answer = service.post("/invocations", message)
    their_status, theirs = mlflows_own.post("/invocations", message)
    assert status == their_status == 400
    assert answer.keys() == {"error_code", "message"} <= theirs.keys()


def test_ping_health_and_version_are_mlflows(service: PredictionService, mlflows_own: Client) -> None:
    for path in ("/ping", "/health", "/version"):
        assert service.get(path) == mlflows_own.get(path)
    assert service.ask("POST", "/invocations", b"a,b\n1,2", Content_Type="text/csv")[0] == 415


def form(files: dict[str, bytes], boundary: str = "frontier") -> tuple[bytes, str]:
    """A body of multipart/form-data and its content type."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode() + data
        for name, data in files.items()
    ]
    return b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def shares(model: Path, images_NHWC: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(expected_logits(model, images_NHWC)).double(), 1).numpy()


def check_ranking(row: dict[str, Any], shares_K: np.ndarray) -> None:
    order = np.argsort(-shares_K)
    assert [entry["class"] for entry in row["ranking"]] == [CLASSES[label] for label in order]
    np.testing.assert_allclose([entry["probability"] for entry in row["ranking"]], shares_K[order], atol=1e-6)
    assert (row["class"], row["probability"]) == (row["ranking"][0]["class"], row["ranking"][0]["probability"])


def test_one_image_is_the_body(service: PredictionService, served_model: Path) -> None:
    (image_HWC,) = images_NHWC = some_images(1, seed=3)
    status, body, _ = service.ask("POST", "/predict", png(image_HWC), Content_Type="image/png")
    answer = json.loads(body)
    assert (status, answer["model"], answer["version"]) == (200, "classifier", "1")
    check_ranking(answer["predictions"][0], shares(served_model, images_NHWC)[0])


def test_several_images_are_a_form_and_a_bad_one_spoils_no_other(
    service: PredictionService, served_model: Path
) -> None:
    images_NHWC = some_images(2, seed=4)
    files = {"a.png": png(images_NHWC[0]), "ü.png": b"no image", "b.png": png(images_NHWC[1])}
    body, content_type = form(files)
    status, text, _ = service.ask("POST", "/predict", body, Content_Type=content_type)
    rows = json.loads(text)["predictions"]
    assert (status, [row["file"] for row in rows]) == (200, list(files))
    assert rows[1] == {"file": "ü.png", "error": "not a PNG, JPEG, BMP or WebP image"}
    for row, shares_K in zip([rows[0], rows[2]], shares(served_model, images_NHWC), strict=True):
        check_ranking(row, shares_K)


@pytest.mark.parametrize(
    ("body", "content_type", "told"),
    [
        (b"", "image/png", "empty file"),
        (png(some_images(1)[0])[:-30], "image/png", "corrupt or truncated"),
        (form({"a": b"x"})[0], "multipart/form-data", "boundary"),
        (form({"a": b"x"})[0][:-20], form({})[1], "file"),
        (form({})[0], form({})[1], "no file"),
        (form({str(n): b"x" for n in range(300)})[0], form({})[1], "Too many files"),
    ],
)
def test_what_is_no_image_is_told(service: PredictionService, body: bytes, content_type: str, told: str) -> None:
    status, text, _ = service.ask("POST", "/predict", body, Content_Type=content_type)
    assert status == 400
    assert told in text.decode()


def test_parallel_requests_share_batches_and_get_their_own_answers(
    service: PredictionService, served_model: Path
) -> None:
    images_NHWC = some_images(40, seed=5)
    logits_NK = expected_logits(served_model, images_NHWC)
    before = [service.metric(f"serving_batch_images_{name}") for name in ("count", "sum")]

    async def ask(row: int) -> np.ndarray:
        message = {"inputs": images_NHWC[row : row + 1].tolist()}
        _, answer = await asyncio.to_thread(service.post, "/invocations", message)
        return np.asarray(answer["predictions"]["logits"])

    async def ask_all() -> list[np.ndarray]:
        return await asyncio.gather(*map(ask, range(len(images_NHWC))))

    np.testing.assert_allclose(np.concatenate(asyncio.run(ask_all())), logits_NK, atol=1e-5)
    after = [service.metric(f"serving_batch_images_{name}") for name in ("count", "sum")]
    assert after[1] - before[1] == len(images_NHWC)
    assert after[0] - before[0] <= len(images_NHWC)
