"""What the service refuses and how, what it does with nonsense, and how it ends."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from service import SHAPE, PredictionService, png, some_images
from starlette.routing import Router

import serve
from data_loader.images import decode_image
from serve import log_place
from serving.app import Options, application
from serving.http import Limits
from serving.inference_protocol import parse as parse_inference
from serving.model import ServedModel
from serving.prediction_log import Place
from serving.scoring_protocol import parse as parse_scoring
from serving.tensors import images_of_lists, images_of_text

INFER = "/v2/models/classifier/infer"
PATHS = ["/", "/predict", "/invocations", INFER, "/feedback", "/metrics", "/v2", "/nothing", "/v2/models/classifier"]
Answer = tuple[int, dict[str, str], bytes]


def zero_logits(images_NHWC: np.ndarray) -> np.ndarray:
    return np.zeros((len(images_NHWC), 2), np.float32)


def model(logits: Callable[[np.ndarray], np.ndarray] = zero_logits) -> ServedModel:
    return ServedModel("classifier", "1", ("a", "b"), SHAPE, logits)


def app(
    limits: Limits | None = None,
    logits: Callable[[np.ndarray], np.ndarray] = zero_logits,
    place: Place | None = None,
) -> Router:
    return application(model(logits), decode_image, Options(max_queue=2, limits=limits or Limits()), place=place)


async def ask(
    app: Router, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, chunk: int = 0
) -> Answer:
    """What the application answers; with `chunk` the body comes in pieces of that many bytes and without its length."""
    raw = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in (headers or {}).items()]
    pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)] if chunk else [body]
    if not chunk:
        raw.append((b"content-length", str(len(body)).encode()))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": "", "query_string": b"", "headers": raw}
    await app(scope, receive, send)
    start, *rest = sent
    answered = {name.decode(): text.decode() for name, text in start["headers"]}
    return start["status"], answered, b"".join(part.get("body", b"") for part in rest)


def answer(app: Router, *arguments: Any, **others: Any) -> Answer:
    async def main() -> Answer:
        async with app.lifespan_context(app):
            return await ask(app, *arguments, **others)

    return asyncio.run(main())


def inference(count: int = 1) -> bytes:
    tensor = {"name": "images", "shape": [count, *SHAPE], "datatype": "UINT8", "data": [0] * count * 240}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_a_body_is_taken_up_to_its_limit(chunk: int, encoding: str) -> None:
    body = inference()
    packed, headers = (gzip.compress(body), {"content-encoding": "gzip"}) if encoding else (body, {})
    for most, status in ((len(body), 200), (len(body) - 1, 413)):
        received = answer(app(Limits(body_bytes=most)), "POST", INFER, packed, headers, chunk=chunk)
        assert received[0] == status
    assert "the most that is taken" in received[2].decode()


def test_a_small_body_that_unpacks_to_a_large_one_is_refused_early() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert answer(app(Limits(100_000)), "POST", "/predict", bomb, {"content-encoding": "gzip"})[0] == 413
    assert answer(app(), "POST", "/predict", gzip.compress(b"x" * 99)[:-9], {"content-encoding": "gzip"})[0] == 400
    assert answer(app(), "POST", "/predict", b"x", {"content-encoding": "br"})[0] == 415


def test_an_image_of_too_many_pixels_is_refused() -> None:
    header = bytearray(png(some_images(1)[0])[:33])
    header[16:24] = (50_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    status, _, body = answer(app(), "POST", "/predict", bytes(header) + png(some_images(1)[0])[33:])
    assert status == 400
    assert b"decompression bomb" in body


def test_a_token_is_asked_of_everyone_but_probes_and_the_page() -> None:
    guarded = app(Limits(token="s3cret"))
    for path in ("/", "/ping", "/health", "/version", "/v2/health/live", "/v2/health/ready"):
        assert answer(guarded, "GET", path)[0] == 200
    for method, path in (
        ("POST", INFER),
        ("POST", "/invocations"),
        ("POST", "/predict"),
        ("POST", "/feedback"),
        ("GET", "/metrics"),
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}, {"authorization": "\xff"}):
            status, answered, body = answer(guarded, method, path, b"", headers)
            assert (status, answered["www-authenticate"]) == (401, "Bearer")
            assert b"s3cret" not in body
    assert answer(guarded, "POST", INFER, inference(), {"authorization": "Bearer s3cret"})[0] == 200


def test_a_full_queue_and_a_slow_network_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()

    def logits(images_NHWC: np.ndarray) -> np.ndarray:
        assert go.wait(30)
        return zero_logits(images_NHWC)

    async def main() -> list[Answer]:
        slow = app(Limits(timeout_s=1), logits)
        async with slow.lifespan_context(slow):
            waiting = asyncio.create_task(ask(slow, "POST", INFER, inference(2)))
            await asyncio.sleep(0.1)
            full = await ask(slow, "POST", INFER, inference())
            late = await waiting
            go.set()
            return [full, late]

    (full, headers, text), late = asyncio.run(main())
    assert (full, headers["retry-after"]) == (503, "1")
    assert b"the queue is full" in text
    assert late[0] == 504
    assert b"within 1 s" in late[2]


def test_a_bug_is_logged_and_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    def broken(images_NHWC: np.ndarray) -> np.ndarray:
        raise RuntimeError("the inside of it")

    status, _, body = answer(app(logits=broken), "POST", INFER, inference())
    assert status == 500
    assert b"inside" not in body
    assert "the inside of it" in caplog.text


# Nonsense.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("images") | json_values,
        "datatype": st.just("UINT8") | json_values,
        "shape": st.just([1, *SHAPE]) | st.lists(st.integers(-1, 2**40), max_size=5) | json_values,
        "data": st.just([0] * 240) | json_values,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 300)}) | json_values,
    },
)
outputs = st.lists(
    st.fixed_dictionaries({}, optional={"name": st.just("logits") | json_values, "parameters": json_values}), max_size=2
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "id": json_values,
        "inputs": st.lists(tensors, max_size=2) | json_values,
        "instances": json_values,
        "outputs": outputs | json_values,
        "parameters": json_values,
    },
)
truths = st.fixed_dictionaries(
    {},
    optional={
        "id": st.builds("{0.hex}-{1}".format, st.uuids(version=4), st.integers(0, 3)) | json_values,
        "label": st.sampled_from("abc") | json_values,
        "value": st.floats() | st.integers() | json_values,
    },
)
TRUTH = json.dumps({"id": f"{'0' * 12}4{'0' * 3}8{'0' * 15}-0", "label": "b", "value": -2}).encode()
told = truths | st.lists(truths, max_size=3)
bodies = st.binary(max_size=400) | (messages | told | json_values).map(lambda value: json.dumps(value).encode())
texts = st.text(st.characters(max_codepoint=255), max_size=30)
content_types = (
    st.sampled_from(["application/json", "image/png", "multipart/form-data; boundary=x", "text/csv"]) | texts
)
HEADER_PIECES = [b"Content-Disposition: form-data", b'; name="f"', b'; filename="\xff"', b"; filename*=utf-7''x"]
parts = st.lists(st.sampled_from([*HEADER_PIECES, b"--x", b"--x--", b"\r\n", b"\r\n\r\n", b":", b"\0"]), max_size=12)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]) | texts,
    st.sampled_from(PATHS) | st.text(max_size=20).map(lambda text: "/" + text),
    bodies | parts.map(b"".join),
    st.dictionaries(
        st.sampled_from(["content-type", "content-encoding", "inference-header-content-length", "authorization"]),
        content_types | texts | st.integers(0, 300).map(str),
    ),
)
@example("POST", INFER, b"{}", {"inference-header-content-length": "9" * 5000})
@example("POST", INFER, b"{}", {"inference-header-content-length": "0" * 20 + "9" * 5000})
@example("POST", INFER, b"{}", {"inference-header-content-length": "²"})
@example("POST", INFER, b"[" * 2000, {})
@example("POST", "/predict", b"--x", {"content-type": "multipart/form-data; boundary=x; charset=base64"})
@example("POST", "/predict", b'--x\r\nContent-Disposition: form-data; name="f"; filename="\xff"\r\n\r\ny\r\n--x--\r\n',
         {"content-type": "multipart/form-data; boundary=x; charset=utf-7"})  # fmt: skip
@example("POST", "/feedback", TRUTH, {})
@example("POST", "/feedback", b'{"id": "x", "label": "b", "value": 1' + b"0" * 400 + b"}", {})
def test_no_request_is_an_internal_error(method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
    status, _, text = answer(APP, method, path, body, headers)
    assert 200 <= status < 500, text


APP = app()
GOOD = [(INFER, inference(2)), ("/predict", png(some_images(1)[0])), ("/feedback", b"[%b, %b]" % (TRUTH, TRUTH))]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PATHS), bodies) | st.sampled_from(GOOD)))
def test_whatever_comes_the_log_has_a_row_for_each_prediction_and_each_feedback(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[str, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    logged = app(place=log_place(serve.Settings(model_uri="x", log=str(folder))))
    expected: dict[str, list[str]] = {"predictions": [], "feedback": []}

    async def main() -> None:
        async with logged.lifespan_context(logged):
            for path, body in requests:
                status, _, text = await ask(logged, "POST", path, body, {"content-type": "application/json"})
                assert 200 <= status < 500, text
                if status == 200 and path == "/feedback":
                    entries = json.loads(body)
                    expected["feedback"] += [one["id"] for one in (entries if isinstance(entries, list) else [entries])]
                elif status == 200 and path == INFER:
                    expected["predictions"] += json.loads(text)["parameters"]["ids"].split(",")
                elif status == 200 and path == "/predict":
                    expected["predictions"] += [one["id"] for one in json.loads(text)["predictions"]]

    asyncio.run(main())
    for table, ids in expected.items():
        files = [pq.read_table(path) for path in folder.glob(f"{table}/day=*/*")]
        assert sorted(one for file in files for one in file["id"].to_pylist()) == sorted(ids)


@pytest.fixture(autouse=True)
def no_noise() -> None:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_short_way_through_json_reads_what_the_long_way_reads(data: st.DataObject) -> None:
    """Valid or not, changed in places or not: either both read the same images, or the short way passes."""
    shape = (2, 1, 3)
    images_NHWC = np.array(data.draw(st.lists(st.integers(0, 255), min_size=6, max_size=6)), np.uint8)
    text = bytearray(json.dumps(images_NHWC.reshape(1, *shape).tolist()).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 1))] = data.draw(
            st.sampled_from([b"", b" ", b"[", b"]", b",", b"1", b"0", b".", b"-", b"e", b'"', b"\n"])
        )
    short = images_of_text(bytes(text), shape)
    if short is not None:
        np.testing.assert_array_equal(short, images_of_lists(json.loads(text), shape, "x"))


def test_no_list_is_copied_into_other_images() -> None:
    """Lists that hold the right number of values in the wrong places."""
    for nested in ([[[1, 2]], [[3]]], [[[1, 2, 3]], [[4], [5, 6]]], [{"a": 1, "b": 2, "c": 3}], ["abc"]):
        body = json.dumps({"inputs": nested}).encode()
        with pytest.raises(Exception, match="expected lists of the shape"):
            parse_scoring(body, "application/json", model())
        tensor = {"name": "images", "shape": [1, *SHAPE], "datatype": "UINT8", "data": nested}
        with pytest.raises(Exception, match="inputs: data"):
            parse_inference(json.dumps({"inputs": [tensor]}).encode(), "", model())


def until(reached: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def exchange(service: PredictionService, data: bytes) -> bytes:
    """What the socket answers to these bytes, until it closes, says a status, or says nothing for a while."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=0.3) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(65536)
        except OSError:  # closed or silent: both are answers to nonsense
            return b""


STARTS = [b"GET ", b"POST ", b"\x16\x03\x01", b""]
TARGETS = [b"/", INFER.encode(), b"/%ff%00", b"//", b"http://x/", b"*", b"/\xff"]
HEADERS = [
    b"Host: x\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 1e9\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\n",
    b"Connection: Upgrade\r\n",
    b"X: \xff\0\r\n",
]
ENDS = [b"\r\n", b"\r\nhello", b"\r\n5\r\nhello\r\n0\r\n\r\n", b"\r\nZZ\r\n", b""]
raw_requests = st.tuples(
    st.sampled_from(STARTS),
    st.sampled_from(TARGETS),
    st.sampled_from([b" HTTP/1.1\r\n", b" HTTP/9\r\n", b"\r\n"]),
    st.lists(st.sampled_from(HEADERS), max_size=4).map(b"".join),
    st.sampled_from(ENDS),
).map(b"".join)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=500) | raw_requests)
def test_no_bytes_break_the_process(service: PredictionService, data: bytes) -> None:
    received = exchange(service, data)
    assert not received.startswith(b"HTTP/1.1 5"), received
    assert service.process.poll() is None


@pytest.mark.slow
def test_after_all_that_it_still_serves_and_has_logged_no_error(service: PredictionService) -> None:
    assert service.ask("POST", "/predict", png(some_images(1)[0]))[0] == 200
    assert "Traceback" not in service.log.read_text()
    assert service.ask("POST", "/predict", bytes(2**20 + 1))[0] == 413


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_there_is_no_torch_in_the_process(service: PredictionService) -> None:
    assert service.ask("POST", "/predict", png(some_images(1)[0]))[0] == 200
    maps = Path(f"/proc/{service.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_answers_what_is_under_way(
    start_service: Callable[..., PredictionService], served_model: Path, workers: int
) -> None:
    """Requests whose bodies are still on their way when the signal comes are answered; then the process is gone."""
    service = start_service(served_model, f"--workers={workers}")
    image = png(some_images(1)[0])
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n".encode()
    connections = [socket.create_connection(("127.0.0.1", service.port), timeout=30) for _ in range(8)]
    for connection in connections:
        connection.sendall(head + image[:50])
    until(lambda: service.metric("serving_requests_in_progress", endpoint="predict") == 8)
    stopping = threading.Thread(target=service.stop)
    stopping.start()
    until(lambda: "Shutting down" in service.log.read_text())
    for connection in connections:
        connection.sendall(image[50:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        connection.close()
    stopping.join()
    assert service.process.returncode == 0
    with pytest.raises(OSError, match="refused"):
        service.get("/ping")
