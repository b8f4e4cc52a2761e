"""Who is not let in is told by whom in one line, and at once: S3 keys of a job, S3 keys of the server, sign-in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from s3_server import S3Server
from services_stack import ADMIN_PASSWORD, MlflowServer, Stack

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
IN_SECONDS = 120
"""Far above what is needed, far below TRACKING_PATIENCE_S and MLflow's own retries."""

Start = Callable[..., "subprocess.Popen[str]"]
ENTRY_POINTS = {
    "load_data.py": 1,  # had begun when its first artifact was refused
    "train.py --epochs=1": 2,
    "evaluate.py --model_uri=runs:/{run}/model": 2,
    "predict.py --model_uri=runs:/{run}/model --input=nothing": 2,
    "export.py --model_uri=runs:/{run}/model": 2,
}


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Its exit code and the lines of its errors, which hold no traceback."""
    _, errors = process.communicate(timeout=IN_SECONDS)
    assert "Traceback" not in errors
    return process.returncode, [line for line in errors.splitlines() if line.startswith("error: ")]


@pytest.fixture
def run(project: Path, s3: S3Server) -> str:
    """A run whose artifacts are in S3; the clients reach S3 themselves."""
    client = MlflowClient()
    experiment = client.create_experiment("direct", artifact_location=f"s3://{s3.new_bucket()}/team")
    return str(client.create_run(experiment).info.run_id)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_wrong_keys_of_a_client(entry_point: str, run: str, start: Start) -> None:
    script, *flags = entry_point.format(run=run).split()
    wrong = {"AWS_SECRET_ACCESS_KEY": "not the secret", "MLFLOW_EXPERIMENT_NAME": "direct"}
    code, lines = ended(start(script, *flags, **wrong))
    assert code == ENTRY_POINTS[entry_point]
    (line,) = lines
    assert "S3 refuses the keys (SignatureDoesNotMatch); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY " in line
    assert "not the secret" not in line


def test_no_keys_at_all(run: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    given = {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}
    code, (line,) = ended(start("load_data.py", MLFLOW_EXPERIMENT_NAME="direct", **given))
    assert code == 1
    assert "there are no S3 keys here" in line


def test_a_model_that_is_not_there_is_no_refusal(run: str, start: Start) -> None:
    code, (line,) = ended(start("predict.py", f"--model_uri=runs:/{run}/model", "--input=nothing"))
    assert code == 2
    assert f"'runs:/{run}/model' does not exist" in line


@pytest.fixture
def stack(new_stack: Callable[..., Stack], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A server that keeps artifacts in S3 for its clients; this process is signed in as its administrator."""
    made = new_stack("postgresql", s3_server)
    for name, value in made.server.environment().items():
        monkeypatch.setenv(name, value)
    yield made


def test_keys_of_the_server_that_were_taken_away(stack: Stack, s3_server: S3Server, start: Start) -> None:
    run = MlflowClient().create_run("0").info.run_id
    replace(s3_server, access_key=stack.server.settings["S3_ACCESS_KEY"]).remove_keys()
    for script, flags in (("load_data.py", []), ("predict.py", [f"--model_uri=runs:/{run}/model", "--input=nothing"])):
        code, (line,) = ended(start(script, *flags))
        assert code in (1, 2)
        assert "the tracking server's own S3 keys are refused; whoever runs it has to give it others" in line


def users(server: MlflowServer, *words: str, password: str = "") -> None:
    command = [sys.executable, str(ROOT / "services" / "users.py"), *words]
    environment = {**os.environ, **server.environment()}
    subprocess.run(command, env=environment, input=f"{password}\n", text=True, check=True, capture_output=True)


def test_who_cannot_open_a_run(stack: Stack, start: Start) -> None:
    users(stack.server, "add", "reader", password="a-reader-of-the-tests")
    for password, reason in (
        ("not the password", "does not accept the sign-in; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("a-reader-of-the-tests", "does not let reader do this; ask its administrator for EDIT on the experiment"),
    ):
        code, (line,) = ended(start("load_data.py", **stack.server.environment("reader", password)))
        assert code == 2
        assert reason in line


def test_a_password_that_is_changed_during_a_run(stack: Stack, start: Start, tmp_path: Path) -> None:
    users(stack.server, "add", "writer", password="a-writer-of-the-tests")
    users(stack.server, "grant", "writer", "Default", "EDIT")
    process = start("train.py", "--epochs=40", **stack.server.environment("writer", "a-writer-of-the-tests"))
    assert process.stdout is not None
    for printed in process.stdout:
        if "2/40" in printed:
            break
    users(stack.server, "password", "writer", password="another-password-of-it")
    code, lines = ended(process)
    assert code == 1
    assert "the tracking server does not accept the sign-in" in lines[-1]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert (folder / "unsent.jsonl").is_file()
    assert ADMIN_PASSWORD not in str(lines)
