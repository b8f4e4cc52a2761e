"""services/server.py: what starts the tracking server in every venue, over real databases and a real S3 server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ports import free_port
from s3_server import S3Server
from services_stack import ADMIN_PASSWORD, PASSWORD, SERVICES, Database, MlflowServer, Stack, server_settings

pytestmark = pytest.mark.slow
# By MariaDB's default order of text, all emoji are equal to one another, and upper case to lower.
NAMES = ["图像分类 基线", "이미지 분류", "Классификация", "КЛАССИФИКАЦИЯ", "🚀", "🐶", "été", "ete"]


def signed_in(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return MlflowClient(server.uri)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_names_of_every_script_and_a_crash(
    kind: str, new_stack: Callable[..., Stack], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = new_stack(kind, s3_server)
    client = signed_in(stack.server, monkeypatch)
    for name in NAMES:
        experiment = client.create_experiment(name, tags={"имя": name})
        run = client.create_run(experiment, run_name=name, tags={"имя": name}).info
        client.log_param(run.run_id, "name", name)
        client.log_metric(run.run_id, "точность", 0.5)
        client.log_text(run.run_id, name, "a folder/日本 🐶.txt")
        client.create_registered_model(name, description=name)
    with pytest.raises(MlflowException, match="already exists"):
        client.create_experiment(NAMES[4])

    stack.server.kill()
    stack.database.kill()
    stack.database.start()
    stack.server.start()
    for name in NAMES:
        (run,) = client.search_runs(
            [client.get_experiment_by_name(name).experiment_id], f"attributes.run_name = '{name}'"
        )
        assert (run.info.run_name, run.data.params["name"], run.data.tags["имя"]) == (name, name, name)
        assert run.data.metrics == {"точность": 0.5}
        downloaded = client.download_artifacts(run.info.run_id, "a folder/日本 🐶.txt")
        assert Path(downloaded).read_text() == name
        assert client.get_registered_model(name).description == name
    keys = [
        found["Key"]
        for found in s3_server.client().list_objects_v2(Bucket=stack.server.settings["S3_BUCKET"])["Contents"]
    ]
    assert len(keys) == len(NAMES)
    assert all(key.startswith("artifacts/") for key in keys)


def test_secrets_are_on_no_command_line_and_in_no_log(new_stack: Callable[..., Stack], s3_server: S3Server) -> None:
    server = new_stack("postgresql", s3_server).server
    secrets = [PASSWORD, PASSWORD.replace("/", "%2F"), ADMIN_PASSWORD, server.settings["FLASK_SECRET_KEY"]]
    secrets += [server.settings["S3_SECRET_KEY"]]
    assert requests.get(f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1", timeout=20).status_code == 401
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert any(f"--port {server.port}" in line for line in lines)  # MLflow's workers are among them
    assert not [secret for secret in secrets for text in [*lines, server.log.read_text()] if secret in text]


def test_names_that_clients_use(new_stack: Callable[..., Stack]) -> None:
    server = new_stack(AUTH="none", ALLOWED_HOSTS="mlflow.example.org,[fd12::7]", TLS_HOST="tls.example.org").server
    url = f"{server.uri}/api/2.0/mlflow/experiments/"

    def status(host: str, origin: str = "") -> int:
        headers = {"Host": host} | ({"Origin": origin} if origin else {})
        if origin:
            json = {"name": f"{host} {origin}"}
            return requests.post(f"{url}create", json=json, headers=headers, timeout=20).status_code
        return requests.get(f"{url}search?max_results=1", headers=headers, timeout=20).status_code

    private = ("localhost:5000", "127.0.0.1", "[::1]:5000", "10.1.2.3:5000")
    for host in (*private, "mlflow.example.org:5000", "tls.example.org"):
        assert status(host) == 200, host
    assert status("other.example.org") == 403
    # The server's own pages under its names may write; those of other sites may not.
    assert status("tls.example.org:8443", "https://tls.example.org:8443") == 200
    assert status("mlflow.example.org", "http://mlflow.example.org") == 200
    assert status("[fd12::7]:5000", "http://[fd12::7]:5000") == 200
    assert status("mlflow.example.org", "https://evil.example.org") == 403


def test_what_was_proxied_stays_within_reach_once_clients_go_direct(
    new_stack: Callable[..., Stack], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stack = new_stack("postgresql", s3_server)
    client = signed_in(stack.server, monkeypatch)
    before = client.create_run(client.create_experiment("before")).info
    client.log_text(before.run_id, "proxied", "a.txt")
    stack.server.stop()
    stack.server.settings["ARTIFACTS"] = "direct"
    stack.server.start()
    after = client.create_run(client.create_experiment("after")).info
    assert after.artifact_uri.startswith(f"s3://{stack.server.settings['S3_BUCKET']}/artifacts/")
    assert before.artifact_uri.startswith("mlflow-artifacts:/")
    assert Path(client.download_artifacts(before.run_id, "a.txt", str(tmp_path))).read_text() == "proxied"


def refusal(settings: dict[str, str], folder: Path) -> str:
    """The one line with which the server does not start."""
    server = MlflowServer(folder, {**settings, "STARTUP_TIMEOUT_S": "1"})
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **server.settings}
    done = subprocess.run(
        [sys.executable, str(SERVICES / "server.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert not [secret for secret in (PASSWORD, ADMIN_PASSWORD, "wrong-secret") if secret in line]
    return line


def test_what_is_wrong_is_one_line(new_database: Callable[..., Database], s3_server: S3Server, tmp_path: Path) -> None:
    database = new_database("postgresql")
    right = server_settings(database, tmp_path, s3_server)
    for change, reason in (
        ({"DATABASE_URI": f"postgresql://mlflow@127.0.0.1:{free_port()}/mlflow"}, "no database after 1 s"),
        ({"DATABASE_PASSWORD": "wrong-secret"}, "refuses mlflow with this DATABASE_PASSWORD"),
        ({"DATABASE_URI": database.uri + "2"}, "has no database 'mlflow2'"),
        ({"DATABASE_URI": "sqlite:///x.db"}, "DATABASE_URI has to be postgresql://"),
        ({"S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}, "no S3 server after 1 s"),
        ({"S3_BUCKET": "absent-bucket"}, "has no bucket 'absent-bucket'"),
        ({"S3_SECRET_KEY": "wrong-secret"}, "(SignatureDoesNotMatch); correct the keys"),
        ({"S3_ACCESS_KEY": "absent-key"}, "(InvalidAccessKeyId); correct the keys"),
        ({"S3_PREFIX": "elsewhere"}, "(AccessDenied); correct the keys"),
        ({"ADMIN_PASSWORD": ""}, "ADMIN_PASSWORD is empty"),
        ({"FLASK_SECRET_KEY": "changeme1234"}, "FLASK_SECRET_KEY is too easy to guess"),
        ({"AUTH": ""}, "AUTH is ''; it has to be basic or none"),
    ):
        assert reason in refusal({**right, **change}, tmp_path), change


def test_a_database_that_confuses_names_is_refused(new_database: Callable[..., Database], tmp_path: Path) -> None:
    database = new_database("mariadb", empty=True)
    database.execute("ALTER DATABASE mlflow CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci")
    line = refusal(server_settings(database, tmp_path, None), tmp_path)
    assert "keeps text as utf8mb4 utf8mb4_general_ci; MLflow's names need UTF-8 compared exactly" in line
    database.execute("ALTER DATABASE mlflow CHARACTER SET latin1 COLLATE latin1_bin")
    assert "keeps text as latin1" in refusal(server_settings(database, tmp_path, None), tmp_path)
    line = refusal({**server_settings(database, tmp_path, None), "DATABASE_PASSWORD": "wrong-secret"}, tmp_path)
    assert "refuses mlflow with this DATABASE_PASSWORD" in line


def test_a_newer_schema_is_refused(new_database: Callable[..., Database], tmp_path: Path) -> None:
    database = new_database("postgresql")
    database.execute("UPDATE alembic_version SET version_num = 'of_tomorrow'")
    assert "was written by a newer MLflow" in refusal(server_settings(database, tmp_path, None), tmp_path)
