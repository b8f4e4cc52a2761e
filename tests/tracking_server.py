"""MLflow stores for tests: a real server that can be stopped and started, and a database for runs in this process."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parent.parent


class TrackingServer:
    """A real `mlflow server` on 127.0.0.1, over SQLite and a folder of artifacts that it serves itself."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.database = f"sqlite:///{folder}/mlflow.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                assert self._process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.2)
        raise TimeoutError("the tracking server did not start in 120 s")

    def stop(self) -> None:
        """Kill it with its workers, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with all tables and no run: made once, because its migrations take seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def copy_database(database: Path, folder: Path, artifacts: str) -> None:
    """Put a copy of an empty database into `folder`; the default experiment keeps its artifacts at `artifacts`."""
    copy = folder / "mlflow.db"
    shutil.copy(database, copy)
    with closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", (artifacts,))


@pytest.fixture
def tracking_server(tmp_path: Path, empty_database: Path) -> Iterator[TrackingServer]:
    """A server of this test's own, started."""
    folder = tmp_path / "server"
    folder.mkdir()
    copy_database(empty_database, folder, "mlflow-artifacts:/0")
    server = TrackingServer(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder with an MLflow database of its own, for entry points called in this process."""
    import mlflow

    folder = tmp_path / "project"
    folder.mkdir()
    copy_database(empty_database, folder, str(folder / "mlruns" / "0"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    yield folder
    mlflow.end_run()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start an entry script as a user would, with a working folder and environment of its own; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *flags: str, cwd: Path | None = None, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags],
            cwd=cwd or tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
