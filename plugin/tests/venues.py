"""Where the contract is tried: in a child process, in Docker, on Kubernetes. Each with a tracking store of its own."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.projects.backend import loader

import in_process
from cluster import TestCluster, address_for_nodes, host_of_containers, in_cluster
from local_ports import free_port
from mlproject_backends import job_run
from mlproject_backends.job_run import JobRun

PROJECT = Path(__file__).parent / "projects" / "shell"


@dataclass
class Venue:
    """A backend, how to call it, and how to take a job away behind its back."""

    backend: str
    remove: Callable[[Run], None]
    config: dict[str, Any] = field(default_factory=dict)
    experiment: str = "0"
    client: MlflowClient = field(default_factory=MlflowClient)

    def submit(self, entry_point: str = "main", config: dict[str, Any] | None = None, **parameters: str) -> JobRun:
        """Start an entry point of the shell project and do not wait."""
        return self.run(entry_point, {"detach": True, **(config or {})}, **parameters)

    def run(self, entry_point: str = "main", config: dict[str, Any] | None = None, **parameters: str) -> JobRun:
        return mlflow.projects.run(
            str(PROJECT),
            entry_point,
            parameters=parameters,
            backend=self.backend,
            backend_config={**self.config, **(config or {})},
            experiment_id=self.experiment,
            synchronous=False,
        )

    def runs(self) -> list[Run]:
        return list(self.client.search_runs([self.experiment]))

    def the_run(self) -> Run:
        (only,) = self.runs()
        return only

    def log_of(self, run_id: str) -> list[str]:
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="logs/job.log")
        return Path(path).read_text().splitlines()


def wait_for(happened: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not seen in {timeout_s} s: {what}"
        time.sleep(0.1)


def wait_for_line(job: JobRun, expected: str) -> None:
    """Until the job has printed a line."""

    def printed() -> bool:
        lines: list[str] = []
        job.logs(lines.append)
        return any(expected in line for line in lines)

    wait_for(printed, f"the line {expected!r}")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with all tables and no run: made once, because its migrations take seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def use_store(empty: Path, folder: Path, artifacts: str) -> str:
    """Put a copy of the empty store into `folder`; its address."""
    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "mlflow.db"
    database.write_bytes(empty.read_bytes())
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", (artifacts,))
    return f"sqlite:///{database}"


@pytest.fixture
def local_store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a tracking database and artifacts, which MLFLOW_TRACKING_URI names."""
    folder = tmp_path / "store with a space"
    uri = use_store(empty_store, folder, str(folder / "artifacts"))
    yield from tracked_at(uri, monkeypatch, folder)


def tracked_at(uri: str, monkeypatch: pytest.MonkeyPatch, value: Any) -> Iterator[Any]:
    # By the variable alone: what mlflow.set_tracking_uri() sets would outlive the test and go before the variable.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert mlflow.get_tracking_uri() == uri
    yield value


class Server:
    """A real `mlflow server` that serves its artifacts; it can be killed and started again."""

    options: tuple[str, ...] = ()  # more words of its command
    environment: Mapping[str, str] = {}  # and of its environment

    def __init__(self, folder: Path, empty_store: Path, host: str, destination: str | None = None):
        self._database, self._folder = use_store(empty_store, folder, "mlflow-artifacts:/0"), folder
        self._destination = destination or str(folder / "artifacts")
        self._host, self._port = host, free_port(host)
        self.uri = f"http://{host}:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", self._host]
        command += ["--port", str(self._port), "--backend-store-uri", self._database]
        command += ["--artifacts-destination", self._destination, "--allowed-hosts", "*", *self.options]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self._answers, "an answer of the tracking server")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def loopback_server(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A tracking server that only this machine can reach."""
    server = Server(tmp_path / "server", empty_store, "127.0.0.1")
    server.start()
    yield from tracked_at(server.uri, monkeypatch, server)
    server.stop()


@pytest.fixture
def in_process_venue(local_store: Path, monkeypatch: pytest.MonkeyPatch) -> Venue:
    monkeypatch.setitem(job_run.TARGETS, "in-process", "in_process:InProcessTarget")
    monkeypatch.setitem(loader.MLFLOW_BACKENDS, "in-process", in_process.InProcessBackend)

    def remove(run: Run) -> None:
        process = in_process.InProcessTarget.started[run.data.tags[in_process.TAG]]
        process.process.kill()
        process.process.wait()
        process.removed = True

    return Venue("in-process", remove, {"image": "none"})


@pytest.fixture
def docker_venue(engine: Any, job_image: str, local_store: Path) -> Venue:
    def remove(run: Run) -> None:
        engine.remove_container(run.data.tags["mlproject.docker_container"], force=True)

    return Venue("docker", remove, {"image": job_image})


@pytest.fixture(scope="session")
def shared_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tracking server that pods can reach."""
    real = os.environ.get("TEST_KUBECONFIG")
    host = address_for_nodes() if real else host_of_containers(request.getfixturevalue("engine"))
    server = Server(tmp_path_factory.mktemp("shared"), request.getfixturevalue("empty_store"), host)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def pod_server(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from tracked_at(shared_server.uri, monkeypatch, shared_server)


@pytest.fixture
def kubernetes_venue(cluster: TestCluster, pod_server: Server, job_image: str, engine: Any) -> Venue:
    def remove(run: Run) -> None:
        cluster.delete_job(run.data.tags["mlproject.kube_job"])

    experiment = MlflowClient().create_experiment(f"contract {time.time_ns()}")
    return Venue("kubernetes", remove, {"image": in_cluster(cluster, engine, job_image)}, experiment)
