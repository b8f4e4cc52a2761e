"""`mlflow run --backend docker` as a user types it: this repository's project, a foreign one, and what goes wrong."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cluster import TestCluster, in_cluster
from conftest import PROJECTS
from mlproject_backends.code_package import project_files
from mlproject_backends.config import Config
from mlproject_backends.image import environment_image
from venues import PROJECT, Server, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TRAINING = ["-P", "epochs=3", "-P", "seed=5"]
CACHE = "mlproject-tests"
CONFIG = {"build-args": {"DEVICE": "cpu"}, "cache-volume": CACHE}


def command(program: str, *arguments: str, config: dict[str, Any] | None = None) -> list[str]:
    chosen = ["--backend-config", json.dumps(config)] if config is not None else []
    return [sys.executable, "-m", program, *arguments, *chosen]


def run(folder: Path, *arguments: str, config: dict[str, Any] | None = None) -> str:
    """`mlflow run ARGUMENTS`, which must go well; its run."""
    done = subprocess.run(
        command("mlflow", "run", *arguments, config=config),
        cwd=folder,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    newest: Run = MlflowClient().search_runs(["0"], max_results=1, order_by=["attributes.start_time DESC"])[0]
    assert newest.info.status == "FINISHED"
    return str(newest.info.run_id)


def mlproject(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command("mlproject_backends.cli", *arguments), capture_output=True, text=True)


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start `mlflow run` and go on; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, config: dict[str, Any] | None = None) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command("mlflow", "run", *arguments, config=config),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(process: "subprocess.Popen[str]", pattern: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            return
    raise AssertionError(f"{pattern} was not printed; {process.stderr.read() if process.stderr else ''}")


def the_run() -> Run:
    (found,) = MlflowClient().search_runs(["0"])
    return found


@pytest.fixture
def checkout(tmp_path: Path, engine: Any, base_image: str) -> Iterator[Path]:
    """The repository's files as git would have them, in a folder with a space, and an empty cache volume."""
    folder = tmp_path / "a check out"
    for name in project_files(ROOT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    yield folder
    with contextlib.suppress(docker.errors.NotFound):
        engine.remove_volume(CACHE)


def test_this_project_comes_to_the_same_in_docker_as_locally(loopback_server: Server, checkout: Path) -> None:
    local = run(checkout, ".", "--env-manager", "local", *TRAINING)
    docker = run(checkout, ".", "--backend", "docker", *TRAINING, config=CONFIG)
    compared = mlproject("compare", "--all", local, docker)
    assert compared.returncode == 0, compared.stdout
    agreed = compared.stdout
    for kind in ("param epochs", "metric test/accuracy", "artifact checkpoints/latest.pt", "weights weights_sha256"):
        assert f"same    {kind}" in agreed
    evaluate = ["-P", f"model_uri=runs:/{docker}/model", "-P", "min_accuracy=0.9"]
    run(checkout, ".", "--backend", "docker", "--entry-point", "evaluate", *evaluate, config=CONFIG)
    # A change of code costs no build: the same image for all.
    images = {found.data.tags.get("mlproject.image") for found in MlflowClient().search_runs(["0"])} - {None}
    assert len(images) == 1


def retrain_on(backend: str, config: dict[str, Any], checkout: Path) -> None:
    """`retrain` here, its training on the backend: what comes out becomes champion."""
    client = MlflowClient()
    first = run(checkout, ".", "--env-manager", "local", "-P", "epochs=1", "-P", "register_as=digits")
    client.set_registered_model_alias("digits", "champion", "1")
    (checkout / "rules.toml").write_text("[training]\nepochs = 6\n")
    asked = {"name": "digits", "rules": "rules.toml", "force": "true", "backend": backend}
    asked["backend_config"] = json.dumps(config)
    words = [word for name, value in asked.items() for word in ("-P", f"{name}={value}")]
    training = client.get_run(run(checkout, ".", "--env-manager", "local", "--entry-point", "retrain", *words))
    assert (training.data.tags["venue"], training.data.params["epochs"]) == (backend, "6")
    look = client.get_run(training.data.tags["mlflow.parentRunId"])
    assert (look.info.status, look.data.tags["venue"]) == ("FINISHED", "local")
    assert look.data.tags["training_run"] == training.info.run_id != first
    assert look.data.metrics["test/accuracy"] == training.data.metrics["test/accuracy"]
    assert str(client.get_registered_model("digits").aliases["champion"]) == "2", look.data.tags["outcome"]


def test_retrain_trains_in_a_container_and_promotes_what_comes_out(loopback_server: Server, checkout: Path) -> None:
    retrain_on("docker", CONFIG, checkout)


def test_a_server_that_is_away_for_half_a_minute_costs_nothing(
    loopback_server: Server, checkout: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = start(str(checkout), "--backend", "docker", "-P", "epochs=400", config=CONFIG)
    read_until(process, r"^epoch +2/400")
    loopback_server.stop()
    time.sleep(30)
    loopback_server.start()
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, f"{output[-2000:]}\n{errors[-2000:]}"
    found = the_run()
    assert found.info.status == "FINISHED"
    history = MlflowClient().get_metric_history(found.info.run_id, "val/loss")
    assert len({point.step for point in history}) == 400


@pytest.fixture
def project_image(cluster: TestCluster, engine: Any, base_image: str) -> str:
    """This project's own image, where the cluster's nodes find it."""
    config = Config("docker", build_args=CONFIG["build-args"])
    image = environment_image(ROOT, ROOT / "conda.yaml", "conda_env", config, print, push=False)
    return in_cluster(cluster, engine, image)


def test_this_project_comes_to_the_same_on_kubernetes_as_locally(
    project_image: str, pod_server: Server, checkout: Path
) -> None:
    config = {**json.loads((ROOT / "kubernetes_config.json").read_text()), "image": project_image}
    local = run(checkout, ".", "--env-manager", "local", *TRAINING)
    kubernetes = run(checkout, ".", "--backend", "kubernetes", *TRAINING, config=config)
    compared = mlproject("compare", local, kubernetes)
    assert (compared.returncode, compared.stderr) == (0, ""), compared.stdout


def test_retrain_trains_on_kubernetes_and_promotes_what_comes_out(
    project_image: str, pod_server: Server, checkout: Path
) -> None:
    retrain_on("kubernetes", {"image": project_image}, checkout)


def test_pods_train_together(cluster: TestCluster, project_image: str, pod_server: Server, checkout: Path) -> None:
    run_id = run(checkout, ".", "--backend", "kubernetes", *TRAINING, config={"image": project_image, "nodes": 2})
    found = MlflowClient().get_run(run_id)
    pods = cluster.pods(found.data.tags["mlproject.kube_job"])
    assert [pod["status"]["phase"] for pod in pods] == ["Succeeded", "Succeeded"]
    assert found.data.metrics["test/accuracy"] > 0.9
    log = mlproject("logs", run_id).stdout.splitlines()
    assert any(line.startswith("[0] epoch") for line in log)
    assert not any(line.startswith("[1] epoch") for line in log)


def test_a_foreign_project_runs_untouched(base_image: str, local_store: Path, tmp_path: Path) -> None:
    project = PROJECTS / "wine"
    run_id = run(project, ".", "--backend", "docker", "-P", "neighbours=3")
    docker = MlflowClient().get_run(run_id)
    assert docker.data.params == {"table": "wine.csv", "neighbours": "3"}
    assert docker.data.metrics["accuracy"] > 0.9
    log = mlproject("logs", run_id).stdout.splitlines()
    assert "kept 175 of 178 rows" in log


def test_ctrl_c_ends_run_and_container(
    engine: Any, job_image: str, local_store: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = start(str(PROJECT), "--backend", "docker", "--entry-point", "sleep", config={"image": job_image})
    read_until(process, "^ready")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "got TERM" in output
    assert "Traceback" not in errors
    found = the_run()
    assert (found.info.status, found.data.tags["mlproject.reason"]) == ("KILLED", "stopped by Ctrl-C")
    assert engine.containers(all=True, filters={"label": f"mlproject.run-id={found.info.run_id}"}) == []


def test_a_launcher_that_was_killed_loses_nothing(
    job_image: str, local_store: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    sleep = ["--entry-point", "sleep", "-P", "seconds=30"]  # longer than the questions take
    process = start(str(PROJECT), "--backend", "docker", *sleep, config={"image": job_image})
    read_until(process, "^ready")
    process.kill()
    found = the_run()
    assert found.info.status == "RUNNING"
    run_id = found.info.run_id
    assert mlproject("status", run_id).stdout.startswith("RUNNING: ")
    assert mlproject("logs", run_id).stdout.splitlines() == ["ready"]
    wait_for(lambda: mlproject("status", run_id).stdout.startswith("FINISHED: "), "the run's end")
    assert the_run().info.status == "FINISHED"
    assert mlproject("logs", run_id).stdout.splitlines() == ["ready", "slept"]


def test_bad_input_exits_2_with_one_line(local_store: Path) -> None:
    done = subprocess.run(
        command("mlflow", "run", str(PROJECT), "--backend", "docker", config={"imag": "x"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: unknown key 'imag' in the docker backend's configuration")
    assert MlflowClient().search_runs(["0"]) == []


def test_without_a_daemon_there_is_one_line(local_store: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command("mlflow", "run", str(PROJECT), "--backend", "docker"),
        capture_output=True,
        text=True,
        env={**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "none.sock") in done.stderr.splitlines()[-1]
    assert MlflowClient().search_runs(["0"]) == []


@pytest.mark.parametrize("text", [None, '{"a": ', "[1]"])
def test_a_config_file_that_cannot_be_used_is_one_line(local_store: Path, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    arguments = [str(PROJECT), "--backend", "docker", "--backend-config", str(path)]
    done = subprocess.run(command("mlflow", "run", *arguments), capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr.splitlines()[-1]


def test_without_a_tracking_server_there_is_one_line() -> None:
    done = subprocess.run(
        command("mlflow", "run", str(PROJECT), "--backend", "docker"),
        capture_output=True,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "http://127.0.0.1:9" in done.stderr.splitlines()[-1]
