"""The service with a prediction log: ids, feedback, stops, S3, and the reference of the model's run."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.deployments import PredictionsResponse
from network import Network
from s3_server import S3Server
from service import CLASSES, SHAPE, PredictionService, expected_logits, png, some_images, write_model
from test_prediction_log import fill, small_disk
from test_serving_limits import until
from test_serving_protocols import form

from conftest import missing
from data_loader.images import decode_image
from data_loader.statistics import image_statistics
from data_loader.store import open_store
from models.onnx_model import OnnxClassifier
from monitoring.distance import Distances
from monitoring.prediction_log import read_feedback, read_window
from monitoring.reference import make_reference, write_reference
from utils.artifacts import log_onnx_model

pytestmark = pytest.mark.slow

__all__ = ["small_disk"]  # a fixture

INFER = "/v2/models/classifier/infer"


def tensor(images_NHWC: np.ndarray) -> dict[str, Any]:
    return {"name": "images", "shape": images_NHWC.shape, "datatype": "UINT8", "data": images_NHWC.ravel().tolist()}


def ids_of(service: PredictionService, images_NHWC: np.ndarray, way: int) -> list[str]:
    """Have the images predicted by one of the three protocols; the ids in the answer."""
    if way == 0:
        status, answer = service.post("/invocations", {"inputs": images_NHWC.tolist()})
        ids = answer["ids"]
    elif way == 1:
        status, answer = service.post(INFER, {"inputs": [tensor(images_NHWC)]})
        ids = answer["parameters"]["ids"].split(",")
    else:
        body, content_type = form({f"{n}.png": png(image_HWC) for n, image_HWC in enumerate(images_NHWC)})
        status, text, _ = service.ask("POST", "/predict", body, Content_Type=content_type)
        ids = [row["id"] for row in json.loads(text)["predictions"]]
    assert status == 200
    assert len(ids) == len(images_NHWC)
    return ids


def rows(log: Path, table: str = "predictions") -> list[dict[str, Any]]:
    return [row for path in log.glob(f"{table}/day=*/*.parquet") for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "of the" / "service"


@pytest.fixture(scope="module")
def service(served_model: Path, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PredictionService]:
    """Two workers with a log."""
    flags = [f"--log={log}", "--workers=2", "--keep_below=0"]
    service = PredictionService(served_model, tmp_path_factory.mktemp("service"), *flags)
    service.wait()
    yield service
    service.kill()


def test_clients_read_answers_that_have_ids(service: PredictionService, served_model: Path) -> None:
    images_NHWC = some_images(2)
    logits_NK = expected_logits(served_model, images_NHWC)
    body = json.dumps({"inputs": images_NHWC.tolist()}).encode()
    status, text, _ = service.ask("POST", "/invocations", body, Content_Type="application/json")
    assert status == 200
    read = PredictionsResponse.from_json(text.decode()).get_predictions(predictions_format="ndarray")
    np.testing.assert_allclose(read.item()["logits"], logits_NK, atol=1e-5)
    try:
        from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    except (ImportError, RuntimeError):
        missing("tritonclient has no HTTP support here (pip install tritonclient[http])")
    with InferenceServerClient(service.url.removeprefix("http://")) as client:
        given = InferInput("images", list(images_NHWC.shape), "UINT8")
        given.set_data_from_numpy(images_NHWC)
        for binary in (True, False):
            outputs = [InferRequestedOutput("logits", binary_data=binary)]
            result = client.infer("classifier", [given], outputs=outputs)
            np.testing.assert_allclose(result.as_numpy("logits"), logits_NK, atol=1e-5)
            ids = result.get_response()["parameters"]["ids"].split(",")
            assert [int(each.rpartition("-")[2]) for each in ids] == logits_NK.argmax(axis=1).tolist()


def test_feedback_is_counted_over_workers_and_logged(service: PredictionService, served_model: Path, log: Path) -> None:
    images_NHWC = some_images(60, seed=1)
    ids = [each for n in range(60) for each in ids_of(service, images_NHWC[n : n + 1], n % 3)]
    predicted = expected_logits(served_model, images_NHWC).argmax(axis=1)
    labels = np.random.default_rng(2).integers(0, len(CLASSES), 60)
    values = [None, 2.5, -1.25]
    entries = [
        {"id": each, "label": CLASSES[label]} | ({"value": values[n % 3]} if n % 3 else {})
        for n, (each, label) in enumerate(zip(ids, labels, strict=True))
    ]
    for entry in entries[:20]:
        assert service.post("/feedback", entry) == (200, {"accepted": 1})
    assert service.post("/feedback", entries[20:]) == (200, {"accepted": 40})
    for label, name in enumerate(CLASSES):
        for correct, count in (("true", (predicted == label)), ("false", (predicted != label))):
            expected = int((count & (labels == label)).sum())
            assert service.metric("serving_feedback_total", label=name, correct=correct) == expected
    right = service.metric("serving_feedback_total", correct="true") / service.metric("serving_feedback_total")
    assert right == pytest.approx((predicted == labels).mean())
    assert service.metric("serving_feedback_value_total", sign="gain") == 2.5 * 20
    assert service.metric("serving_feedback_value_total", sign="loss") == 1.25 * 20
    until(lambda: len(rows(log, "feedback")) == 60)
    received = {row["id"]: (row["label"], row["value"]) for row in rows(log, "feedback")}
    assert received == {entry["id"]: (entry["label"], entry.get("value")) for entry in entries}
    # What monitoring makes of the same log.
    until(lambda: {row["id"] for row in rows(log)} >= set(ids))
    today = datetime.now(UTC)
    window = read_window(open_store(str(log)), today - timedelta(hours=1), today + timedelta(hours=1))
    read = read_feedback(open_store(str(log)), window)
    assert window.classes == CLASSES
    assert {window.ids[row]: label for row, label in zip(read.rows_F, read.labels, strict=True)} == {
        entry["id"]: entry["label"] for entry in entries
    }
    assert read.right_F.mean() == pytest.approx(right)
    assert np.nansum(read.values_F) == 20 * (2.5 - 1.25)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"[]", "a list of 1 to 10000"),
        (b"3", "expected an object with the keys id, label, value"),
        (b"{}", "expected an object with the keys id and label"),
        ({"id": "ID", "label": "A", "extra": 1}, "keys id and label"),
        ([{"id": "ID", "label": "A"}, 7], "feedback 1: expected an object"),
        ({"id": "ID"[:-1], "label": "A"}, "id: expected the id of a prediction"),
        ({"id": 7, "label": "A"}, "id: expected the id of a prediction"),
        ({"id": "LARGE", "label": "A"}, "id: expected the id of a prediction"),
        ({"id": "ID", "label": "dog"}, "label: received 'dog', allowed: Äpfel, "),
        ({"id": "ID", "label": 0}, "label: allowed: Äpfel, "),
        ({"id": "ID", "label": None}, "label: allowed: "),
        ({"id": "ID", "label": "A", "value": "3"}, "value: expected a finite number"),
        ({"id": "ID", "label": "A", "value": True}, "value: expected a finite number"),
        (b'{"id": "ID", "label": "A", "value": 1e999}', "not JSON"),
        (b'{"id": "ID", "label": "A", "value": NaN}', "not JSON"),
    ],
)
def test_what_is_wrong_with_feedback_is_told_and_nothing_is_counted(
    service: PredictionService, body: Any, told: str
) -> None:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    words = {
        b'"ID"': b'"%s-2"' % (b"0" * 12 + b"4" + b"0" * 3 + b"8" + b"0" * 15),
        b'"A"': json.dumps(CLASSES[0]).encode(),
    }
    words[b'"LARGE"'] = words[b'"ID"'].replace(b"-2", b"-3")
    for word, meant in words.items():
        text = text.replace(word, meant)
    before = service.metric("serving_feedback_total")
    status, answer, _ = service.ask("POST", "/feedback", text)
    assert status == 400
    assert told in json.loads(answer)["error"]
    assert "\n" not in json.loads(answer)["error"]
    assert service.metric("serving_feedback_total") == before


def test_a_logged_service_has_no_torch_in_it_either(service: PredictionService) -> None:
    ids_of(service, some_images(1), 0)
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in children]
    assert sum("onnxruntime" in text and "libarrow" in text for text in maps) == 2
    assert not any("libtorch" in text for text in maps)


def test_no_row_is_lost_at_sigterm_under_load(
    start_service: Callable[..., PredictionService], served_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "log"
    service = start_service(served_model, f"--log={folder}", "--workers=2", "--keep_share=0.1", "--keep_below=0")
    images_NHWC = some_images(3)
    answered: list[str] = []
    unanswered: list[int] = []

    def keep_asking(way: int) -> None:
        count = 0
        while True:
            count = count % 3 + 1
            try:
                answered.extend(ids_of(service, images_NHWC[:count], way))
            except (OSError, ValueError, AssertionError):  # it is gone, maybe in the middle of this request
                unanswered.append(count)
                return

    threads = [threading.Thread(target=keep_asking, args=(n % 3,)) for n in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(answered) > 1500 and len(rows(folder)) > 0)
    assert service.stop() == 0
    for thread in threads:
        thread.join()
    logged = Counter(row["id"] for row in rows(folder))
    assert set(logged.values()) == {1}
    assert set(answered) <= logged.keys()
    assert len(logged) - len(answered) <= sum(unanswered)
    kept = {row["image"] for row in rows(folder)} - {""}
    assert kept == {path.relative_to(folder).as_posix() for path in folder.glob("images/*/*.png")}
    assert 0.05 < len(kept) / len(logged) < 0.15
    assert "rows are lost" not in service.log.read_text()
    assert list((folder / ".unsent").iterdir()) == [folder / ".unsent" / ".kept-bytes"]


def objects(s3: S3Server, bucket: str) -> dict[str, bytes]:
    client = s3.client()
    found = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {one["Key"]: client.get_object(Bucket=bucket, Key=one["Key"])["Body"].read() for one in found}


def test_a_log_on_s3_is_whole_though_s3_was_silent_for_a_while(
    start_service: Callable[..., PredictionService], served_model: Path, s3: S3Server, tmp_path: Path
) -> None:
    bucket = s3.new_bucket()
    network = Network(int(s3.endpoint.rpartition(":")[2]))
    environment = s3.environment() | {"AWS_ENDPOINT_URL_S3": network.uri}
    flags = [f"--log=s3://{bucket}/some/log", "--keep_share=0.5", "--keep_below=0"]
    service = start_service(served_model, *flags, **environment)
    images_NHWC = some_images(30, seed=4)
    ids = [each for n in range(10) for each in ids_of(service, images_NHWC[n : n + 1], n % 3)]
    until(lambda: any("predictions" in key for key in objects(s3, bucket)))
    network.fall_silent()
    ids += [each for n in range(10, 20) for each in ids_of(service, images_NHWC[n : n + 1], n % 3)]
    until(lambda: service.metric("serving_log_unsent_files") > 1)
    ids += [each for n in range(20, 30) for each in ids_of(service, images_NHWC[n : n + 1], n % 3)]
    spool = next((tmp_path / "outputs" / "unsent").iterdir())
    assert list(spool.glob("predictions+*.parquet"))
    network.speak()
    assert service.stop() == 0
    network.close()
    stored = objects(s3, bucket)
    tables = [pq.read_table(io.BytesIO(data)) for key, data in stored.items() if key.endswith(".parquet")]
    found = {row["id"]: row for table in tables for row in table.to_pylist()}
    assert sum(map(len, tables)) == len(found) == 30
    assert found.keys() == set(ids)
    for each, image_HWC in zip(ids, images_NHWC, strict=True):
        row = found[each]
        assert row["kept"] == ("sampled" if row["image"] else "")
        if row["image"]:
            np.testing.assert_array_equal(decode_image(stored[f"some/log/{row['image']}"], *SHAPE), image_HWC)
    assert 5 <= sum(bool(row["image"]) for row in found.values()) <= 25
    assert not any(path.suffix in (".parquet", ".png") for path in spool.iterdir())
    assert s3.secret_key not in service.log.read_text()


def test_a_full_disk_delays_rows_and_no_answer(
    start_service: Callable[..., PredictionService], served_model: Path, small_disk: Path
) -> None:
    service = start_service(served_model, f"--log={small_disk}", "--keep_below=0")
    filler = fill(small_disk)
    images_NHWC = some_images(9)
    ids = [each for n in range(9) for each in ids_of(service, images_NHWC[n : n + 1], n % 3)]
    until(lambda: service.metric("serving_log_failures_total") > 0)
    ids += [each for n in range(9) for each in ids_of(service, images_NHWC[n : n + 1], n % 3)]
    assert service.metric("serving_log_dropped_rows_total") == 0
    filler.unlink()
    assert service.stop() == 0
    assert {row["id"] for row in rows(small_disk)} == set(ids)
    assert "No space left on device" in service.log.read_text()


def test_a_log_that_cannot_be_written_ends_the_start_with_one_line(
    start: Callable[..., Any], served_model: Path, tmp_path: Path, s3: S3Server
) -> None:
    (tmp_path / "file").write_text("in the way")
    processes = {
        "file/log": f"nothing can be written to '{tmp_path}/file/log' ({tmp_path}/file/log/.unsent: Not a directory)",
        "s3://no-such-bucket-here/log": "no such bucket: check its name and the endpoint",
    }
    for address, told in processes.items():
        log = address if address.startswith("s3:") else tmp_path / address
        process = start("serve.py", f"--model_uri={served_model}", f"--log={log}", **s3.environment())
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2
        assert told in stderr
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1


def test_images_far_from_the_reference_of_the_models_run_are_kept_by_every_version(
    project: Path, start_service: Callable[..., PredictionService]
) -> None:
    """Version 1 has a reference, version 2 another one, version 3 none."""
    random = np.random.default_rng(5)
    dark_NHWC = random.integers(0, 60, (300, *SHAPE), dtype=np.uint8)
    bright_NHWC = random.integers(200, 256, (300, *SHAPE), dtype=np.uint8)
    classifiers = []
    for seed, reference_NHWC in enumerate((dark_NHWC, bright_NHWC, None)):
        path = write_model(project / f"{seed}.onnx", seed)
        classifiers.append(OnnxClassifier(path))
        with mlflow.start_run() as run:
            mlflow.register_model(log_onnx_model(run.info.run_id, path, dark_NHWC[:1]), "far")
            if reference_NHWC is not None:
                table = make_reference(
                    reference_NHWC,
                    np.zeros(300, np.int64),
                    np.arange(200),
                    CLASSES,
                    outputs=classifiers[-1].outputs(reference_NHWC[:200]),
                    statistics=image_statistics,
                )
                reference = write_reference(table, project / "reference.parquet")
                mlflow.log_artifact(str(reference), "monitoring")
    MlflowClient().set_registered_model_alias("far", "champion", "1")
    folder = project / "log"
    service = start_service(
        "models:/far@champion", f"--log={folder}", "--keep_share=0", "--keep_below=0", "--poll_s=0.2"
    )
    images_NHWC = np.concatenate([dark_NHWC[200:230], bright_NHWC[200:230]])
    expected: dict[str, str] = {}
    for version, reference_NHWC in (("1", dark_NHWC), ("2", bright_NHWC), ("3", None)):
        MlflowClient().set_registered_model_alias("far", "champion", version)
        until(lambda version=version: service.metric("serving_model_workers", version=version) == 1)
        ids = ids_of(service, images_NHWC, 0)
        far_N = np.zeros(60, bool)
        if reference_NHWC is not None:
            outputs = classifiers[int(version) - 1].outputs
            distances = Distances(outputs(reference_NHWC[:200])[1])
            far_N = distances.to(outputs(images_NHWC)[1]) > distances.threshold
            assert 25 < far_N.sum() < 40
        expected |= dict(zip(ids, np.where(far_N, "far", ""), strict=True))
    assert service.stop() == 0
    assert {row["id"]: row["kept"] for row in rows(folder)} == expected
    assert {row["version"] for row in rows(folder)} == {"1", "2", "3"}
    assert "no reference, so no image is told to be far from it" in service.log.read_text()
