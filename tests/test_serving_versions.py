"""An alias that moves under a running service, and several workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from service import ROOT, SHAPE, PredictionService, expected_logits, free_port, some_images, write_model
from test_serving_limits import until

from serving.model import ServedModel, follow
from utils.artifacts import log_onnx_model

NAME = "digits reader"


class Source:
    """Versions that a test sets; a version may be an error to load."""

    def __init__(self) -> None:
        self.current = "1"
        self.unloadable: dict[str, Exception] = {}
        self.loads: list[str] = []
        self.away = False

    def latest(self) -> str:
        if self.away:
            raise OSError("nobody there")
        return self.current

    def load(self, version: str) -> ServedModel:
        self.loads.append(version)
        if version in self.unloadable:
            raise self.unloadable[version]
        value = np.nan if version == "nan" else float(len(version))
        return ServedModel(
            "m", version, ("a", "b"), SHAPE, lambda images_NHWC: np.full((len(images_NHWC), 2), value, np.float32)
        )


class Refused(Exception):
    exit_code = 2


def test_what_does_not_load_is_not_served_and_what_is_bad_is_not_tried_again() -> None:
    source, served, failures = Source(), [], []

    async def main() -> None:
        served.append(source.load("1"))
        following = asyncio.create_task(
            follow(source, lambda: served[-1], served.append, lambda: failures.append(1), 0.005)
        )

        async def reach(reached: Callable[[], bool]) -> None:
            async with asyncio.timeout(30):
                while not reached():
                    await asyncio.sleep(0.005)

        async def fail_more() -> None:
            before = len(failures)
            await reach(lambda: len(failures) > before + 2)

        for version, error, loads in (("bad", Refused("cut short"), 1), ("nan", None, 1), ("2", OSError("away"), 3)):
            if error:
                source.unloadable[version] = error
            source.current = version
            await reach(lambda version=version, loads=loads: source.loads.count(version) >= loads)
            await asyncio.sleep(0.05)
            assert served[-1].version == "1"
            assert loads > 1 or source.loads.count(version) == 1
        source.away = True
        await fail_more()
        source.away, source.unloadable = False, {}
        await reach(lambda: served[-1].version == "2")
        source.current = "1"
        await reach(lambda: served[-1].version == "1")
        following.cancel()

    asyncio.run(main())
    assert [model.version for model in served] == ["1", "2", "1"]


def promote(path: Path, version: str) -> None:
    """Log and register an ONNX file as the next version, and make it the champion."""
    with mlflow.start_run() as run:
        mlflow.register_model(log_onnx_model(run.info.run_id, path, some_images(1)), NAME)
    MlflowClient().set_registered_model_alias(NAME, "champion", version)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_follows_its_alias_without_losing_a_request_and_stays_where_the_new_model_is_broken(
    project: Path, start_service: Callable[..., PredictionService], workers: int
) -> None:
    models = [write_model(project / f"{seed}.onnx", seed) for seed in (1, 2)]
    image_NHWC = some_images(1)
    expected = [expected_logits(model, image_NHWC) for model in models]
    assert not np.allclose(*expected, atol=1e-3)
    promote(models[0], "1")
    service = start_service(f"models:/{NAME}@champion", "--poll_s=0.2", "--max_queue=10000", f"--workers={workers}")
    until(lambda: service.metric("serving_model_workers", version="1") == workers)
    path, stopped, wrong = f"/v2/models/{NAME.replace(' ', '%20')}/infer", threading.Event(), []
    tensor = {"name": "images", "shape": image_NHWC.shape, "datatype": "UINT8", "data": image_NHWC.ravel().tolist()}
    seen = set()

    def keep_asking() -> None:
        while not stopped.is_set():
            status, answer = service.post(path, {"inputs": [tensor]})
            version = int(answer.get("model_version", 0))
            seen.add(version)
            if status != 200 or not np.allclose(answer["outputs"][0]["data"], expected[version - 1][0], atol=1e-5):
                wrong.append((status, answer))

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: 1 in seen)
        promote(models[1], "2")
        until(lambda: 2 in seen and service.metric("serving_model_workers", version="2") == workers)
        broken = MlflowClient().create_model_version(NAME, str(project / "nothing here")).version
        MlflowClient().set_registered_model_alias(NAME, "champion", broken)
        until(lambda: service.metric("serving_model_failed_changes_total") >= workers)
        MlflowClient().set_registered_model_alias(NAME, "champion", "1")
        until(lambda: service.metric("serving_model_workers", version="1") == workers)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert seen == {1, 2}
    assert service.metric("serving_model_workers", version="2") == 0
    assert service.metric("serving_model_changes_total") == 2 * workers
    assert service.metric("serving_requests_total", endpoint="infer", status="200") > 0
    assert f"version {broken} does not load" in service.log.read_text()


@pytest.mark.slow
def test_workers_share_the_work_and_add_up_their_metrics(
    start_service: Callable[..., PredictionService], served_model: Path
) -> None:
    service = start_service(served_model, "--workers=2")
    until(lambda: service.metric("serving_model_workers", version="1") == 2)
    assert service.metric("serving_queue_limit_images") == 2 * 1024
    images_NHWC = some_images(20)
    logits_NK = expected_logits(served_model, images_NHWC)
    for image_HWC, logits_K in zip(images_NHWC, logits_NK, strict=True):
        status, answer = service.post("/invocations", {"inputs": [image_HWC.tolist()]})
        assert status == 200
        np.testing.assert_allclose(answer["predictions"]["logits"][0], logits_K, atol=1e-5)
    assert service.metric("serving_requests_total", endpoint="invocations", status="200") == 20
    until(lambda: service.metric("serving_predictions_total") == 20)
    until(lambda: service.metric("serving_confidence_count") == 20)
    assert service.post("/invocations", {})[0] == 400
    assert service.metric("serving_bad_inputs_total", endpoint="invocations") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_uri", "told", "code"),
    [
        ("models:/nobody@champion", "cannot look up 'models:/nobody@champion'", 2),
        ("nothing.onnx", "model_uri 'nothing.onnx' is no .onnx file", 2),
        ("broken.onnx", "is not a readable ONNX model", 2),
    ],
)
def test_a_start_without_a_model_ends_with_one_line(
    project: Path, start: Callable[..., object], model_uri: str, told: str, code: int
) -> None:
    (project / "broken.onnx").write_bytes(b"no model")
    process = start("serve.py", f"--model_uri={model_uri}", cwd=project)
    _, stderr = process.communicate(timeout=120)  # type: ignore[attr-defined]
    assert process.returncode == code  # type: ignore[attr-defined]
    assert told in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_cannot_start_is_no_regular_end(workers: int, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "from serving.server import serve\n"
        "async def app(scope, receive, send):\n"
        "    raise OSError('no room')\n"
        "def application():\n"
        "    return app\n"
        "if __name__ == '__main__':\n"
        f"    serve(application, host='127.0.0.1', port={free_port()}, workers={workers}, drain_s=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "broken.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 3, done.stderr.decode()


class RunByMlflow(PredictionService):
    """The service, started by `mlflow run`."""

    def command(self, *flags: str) -> list[str]:
        words = [word for flag in flags for word in ("-P", flag.removeprefix("--"))]
        return [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", str(ROOT), "-e", "serve", *words]


def test_the_run_of_a_service_says_what_it_is_while_it_serves(project: Path) -> None:
    model = write_model(project / "digits reader.onnx")
    service = RunByMlflow(model, project, "--max_batch=7")
    try:
        service.wait()
        (run,) = MlflowClient().search_runs(["0"])
        assert (run.info.run_name, run.info.status) == ("serve-digits reader.onnx-local", "RUNNING")
        assert run.data.params["max_batch"] == "7"
        assert run.data.params["max_queue"] == "1024"
        assert run.data.tags["entry_point"] == "serve"
        assert run.data.tags["model_version"] == "1"
        assert len(run.data.tags["git_commit"]) == 40
        assert "-e serve" in run.data.tags["mlflow.note.content"]
        os.killpg(service.process.pid, signal.SIGINT)  # Ctrl-C, which reaches both
        service.process.wait(60)
        assert MlflowClient().get_run(run.info.run_id).info.status in ("FINISHED", "FAILED", "KILLED")
    finally:
        service.kill()
