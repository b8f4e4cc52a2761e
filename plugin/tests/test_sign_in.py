"""A tracking server that wants a name and a password: jobs of every backend sign in, and who may not is told so."""

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.server.auth.client import AuthServiceClient

from cluster import TestCluster, address_for_nodes, host_of_containers, in_cluster
from venues import PROJECT, Server

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
USER_SECRET = "tracking-user"


@dataclass
class SignIn:
    """A server with sign-in, its users, and an experiment that `writer` may edit and `reader` may read."""

    uri: str
    experiment: str
    passwords: dict[str, str]

    def environment(self, user: str, password: str | None = None) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password or self.passwords[user],
        }

    def runs(self) -> list[Run]:
        return list(MlflowClient(self.uri).search_runs([self.experiment]))


@contextmanager
def serve_with_sign_in(folder: Path, empty_store: Path, host: str, destination: str | None = None) -> Iterator[SignIn]:
    """The server; this process is signed in as its administrator."""
    passwords = {user: secrets.token_urlsafe(16) for user in ("admin", "writer", "reader")}
    server = Server(folder, empty_store, host, destination)
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server.options = ("--app-name", "basic-auth")
    server.environment = {
        "MLFLOW_AUTH_CONFIG_PATH": f"{folder}/auth.ini",
        "MLFLOW_AUTH_ADMIN_PASSWORD": passwords["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
    }
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        found = SignIn(server.uri, "", passwords)
        for name, value in found.environment("admin").items():
            patch.setenv(name, value)
        users = AuthServiceClient(server.uri)
        for user in ("writer", "reader"):
            users.create_user(user, passwords[user])
        found.experiment = MlflowClient(server.uri).create_experiment("signed-in")
        users.grant_user_permission("writer", "experiment", found.experiment, "EDIT")
        yield found
    server.stop()


@pytest.fixture(scope="module")
def sign_in(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SignIn]:
    """The server, where containers and pods can reach it."""
    real = os.environ.get("TEST_KUBECONFIG")
    host = address_for_nodes() if real else host_of_containers(request.getfixturevalue("engine"))
    with serve_with_sign_in(tmp_path_factory.mktemp("sign-in"), request.getfixturevalue("empty_store"), host) as found:
        yield found


@dataclass
class Backend:
    """The words of `mlflow run` for a backend, and how to see what it tells about its jobs."""

    words: list[str]
    described: Callable[[], str] = lambda: ""

    def run(self, sign_in: SignIn, environment: dict[str, str], entry_point: str = "metric") -> Any:
        command = [sys.executable, "-m", "mlflow", "run", str(PROJECT), "--entry-point", entry_point, *self.words]
        return subprocess.run(
            [*command, "--experiment-id", sign_in.experiment],
            env={**os.environ, **environment, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture
def local() -> Backend:
    return Backend(["--env-manager", "local"])


@pytest.fixture
def docker(engine: Any, job_image: str) -> Backend:
    def described() -> str:
        return json.dumps([engine.inspect_container(found["Id"]) for found in engine.containers(all=True)])

    return Backend(["--backend", "docker", "--backend-config", json.dumps({"image": job_image})], described)


@pytest.fixture
def kubernetes(cluster: TestCluster, engine: Any, job_image: str, sign_in: SignIn) -> Iterator[Backend]:
    """Jobs take their name and password from a Secret of the namespace."""
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": USER_SECRET},
        "stringData": {"name": "writer", "password": sign_in.passwords["writer"]},
    }
    cluster.api.create(cluster.api.path("secrets"), secret)
    names = {"MLFLOW_TRACKING_USERNAME": f"{USER_SECRET}/name", "MLFLOW_TRACKING_PASSWORD": f"{USER_SECRET}/password"}
    config = {"image": in_cluster(cluster, engine, job_image), "env-from-secret": names}

    def described() -> str:
        return json.dumps([cluster.api.get(cluster.api.path(kind)) for kind in ("jobs", "pods", "events")])

    yield Backend(["--backend", "kubernetes", "--backend-config", json.dumps(config)], described)
    cluster.api.delete(cluster.api.path("secrets", USER_SECRET))


@pytest.fixture(params=["local", "docker", "kubernetes"])
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(request.param)
    return found


@contextmanager
def on_view(described: Callable[[], str]) -> Iterator[set[str]]:
    """All command lines of this machine and all descriptions of jobs that can be read within the block."""
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:  # it has ended
                    continue
            try:
                seen.add(described())
            except Exception:  # a job that went while it was looked at
                continue

    watcher = threading.Thread(target=look)
    watcher.start()
    yield seen
    done.set()
    watcher.join()


def test_a_user_runs_and_the_password_is_nowhere_to_be_read(backend: Backend, sign_in: SignIn, tmp_path: Path) -> None:
    before = {run.info.run_id for run in sign_in.runs()}
    with on_view(backend.described) as seen:
        done = backend.run(sign_in, sign_in.environment("writer"))
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = [run for run in sign_in.runs() if run.info.run_id not in before]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"answer": 42})
    assert any("mlflow run" in line for line in seen)
    local = "local" in backend.words
    assert local or any(run.info.run_id in text for text in seen if text.startswith("[{"))
    artifacts = Path(MlflowClient(sign_in.uri).download_artifacts(run.info.run_id, "", str(tmp_path)))
    stored = [path.read_bytes().decode(errors="replace") for path in artifacts.rglob("*") if path.is_file()]
    for text in [*seen, *stored, done.stdout, done.stderr, str(run.data), str(run.info)]:
        assert sign_in.passwords["writer"] not in text


@pytest.mark.parametrize(
    ("user", "password", "reason"),
    [
        ("writer", "not the password", "'writer' (You are not authenticated); set MLFLOW_TRACKING_USERNAME and "),
        ("reader", None, "'reader' (Permission denied); ask an administrator for EDIT on the experiment"),
    ],
)
def test_who_may_not_is_told_in_one_line(
    backend: Backend, sign_in: SignIn, user: str, password: str | None, reason: str
) -> None:
    before = len(sign_in.runs())
    done = backend.run(sign_in, sign_in.environment(user, password))
    assert done.returncode == 1
    assert f"the tracking server refuses the user {reason}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr
    assert len(sign_in.runs()) == before


@pytest.mark.parametrize("backend", ["docker", "kubernetes"], indirect=True)
def test_a_job_that_is_refused_ends_its_run(backend: Backend, sign_in: SignIn) -> None:
    """The launcher signs in, the job, which has another password, does not."""
    *words, config = backend.words
    given = json.loads(config)
    given.pop("env-from-secret", None)
    backend.words = [*words, json.dumps({**given, "env": {"MLFLOW_TRACKING_PASSWORD": "not the password"}})]
    before = {run.info.run_id for run in sign_in.runs()}
    done = backend.run(sign_in, sign_in.environment("writer"))
    assert done.returncode == 1
    (run,) = [run for run in sign_in.runs() if run.info.run_id not in before]
    assert run.info.status == "FAILED"
    reason = run.data.tags["mlproject.reason"]
    assert reason.startswith("the tracking server refuses the job (")
    assert reason.endswith("; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN")
    assert reason in done.stderr.splitlines()[-1]
