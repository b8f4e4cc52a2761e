"""services/users.py against a real server: what each user may then do is asked by MLflow's own client."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from services_stack import ADMIN_PASSWORD, SERVICES, MlflowServer, Stack

pytestmark = pytest.mark.slow

FIRST, SECOND = "first password of theirs", "second-password-of-theirs"


def users(
    server: MlflowServer, *words: str, typed: str = "", folder: Path = SERVICES, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command as its administrator gives it, with nothing but Python's standard library."""
    return subprocess.run(
        [sys.executable, "-S", str(folder / "users.py"), *words],  # -S: without what is installed
        env={"PATH": os.environ["PATH"], **server.environment(), **environment},
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
    )


def said(server: MlflowServer, *words: str, typed: str = "") -> str:
    done = users(server, *words, typed=typed)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(server: MlflowServer, *words: str, typed: str = "", **environment: str) -> str:
    """The one line that a person reads, without what they know; bad input has exit code 2."""
    done = users(server, *words, typed=typed, **environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ").removeprefix(f"{server.uri} ").removeprefix("refused: ")


class Person:
    """What a user may do, by MLflow's client."""

    def __init__(self, server: MlflowServer, name: str, patch: pytest.MonkeyPatch):
        self._environment, self._patch = server.environment(name, FIRST), patch

    def may(self, action: Callable[[MlflowClient], Any], password: str = FIRST) -> bool:
        with self._patch.context() as patch:
            for name, value in {**self._environment, "MLFLOW_TRACKING_PASSWORD": password}.items():
                patch.setenv(name, value)
            try:
                action(MlflowClient())
            except MlflowException as error:
                assert error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED")
                return False
            return True


def test_from_the_first_day_of_a_user_to_the_last(
    new_stack: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_stack().server
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    admin = MlflowClient()
    experiment = admin.create_experiment("цифры 数字")
    admin.create_registered_model("digits")
    anna = Person(server, "anna", monkeypatch)

    def read(client: MlflowClient) -> Any:
        return client.get_experiment(experiment)

    def write(client: MlflowClient) -> Any:
        return client.create_run(experiment)

    def rename(client: MlflowClient) -> Any:
        return client.rename_experiment(experiment, "цифры 数字")

    def delete(client: MlflowClient) -> Any:
        return client.delete_experiment(experiment)

    def register(client: MlflowClient) -> Any:
        return client.set_registered_model_tag("digits", "by", "anna")

    assert not anna.may(read)
    assert FIRST not in said(server, "add", "anna", typed=f"{FIRST}\n")
    # Everyone may read everything, and make experiments, which are then theirs.
    assert [anna.may(action) for action in (read, write, register)] == [True, False, False]
    assert anna.may(lambda client: client.create_run(client.create_experiment("of anna")))

    said(server, "grant", "anna", "цифры 数字", "EDIT")
    said(server, "grant", "anna", "models:/digits", "EDIT")
    assert [anna.may(action) for action in (read, write, rename, register)] == [True] * 4
    assert not anna.may(delete)
    assert said(server, "list").splitlines() == [
        "admin: administrator, MANAGE цифры 数字, MANAGE models:/digits",
        "anna: MANAGE of anna, EDIT цифры 数字, EDIT models:/digits",
    ]
    said(server, "grant", "anna", "цифры 数字", "READ")
    assert [anna.may(action) for action in (read, write)] == [True, False]
    said(server, "grant", "anna", "цифры 数字", "DENY")
    assert not anna.may(read)
    said(server, "grant", "anna", "цифры 数字", "MANAGE")
    assert anna.may(delete)

    said(server, "password", "anna", typed=f"{SECOND}\n")
    assert not anna.may(write)
    own = server.environment("anna", SECOND)
    done = users(server, "password", "anna", typed=f"{FIRST}\n", **own)
    assert done.returncode == 0, done.stderr
    assert not anna.may(lambda client: client.get_experiment("0"), SECOND)
    assert anna.may(lambda client: client.get_experiment("0"))
    said(server, "remove", "anna")
    assert not anna.may(lambda client: client.get_experiment("0"))


def test_what_cannot_be_done_is_one_line(new_stack: Callable[..., Stack]) -> None:
    server = new_stack().server
    said(server, "add", "anna", typed=f"{FIRST}\n")
    anna = server.environment("anna", FIRST)
    assert refused(server, "add", "anna", typed=f"{FIRST}\n") == "User (username=anna) already exists."
    assert refused(server, "add", "bert", typed="short\n") == "Password must be at least 12 characters."
    assert refused(server, "add", "bert").startswith("no password given; ")
    assert refused(server, "remove", "bert") == "User with username=bert not found"
    assert refused(server, "grant", "anna", "nothing", "EDIT") == "Could not find experiment with name 'nothing'"
    assert refused(server, "grant", "anna", "models:/none", "EDIT") == "Registered Model with name=none not found"
    assert refused(server, "grant", "bert", "Default", "EDIT") == "User with username=bert not found"
    assert refused(server, "remove", "admin").startswith("Users cannot delete their own account.")
    wrong = refused(server, "list", MLFLOW_TRACKING_PASSWORD="not the password")
    assert wrong.startswith("does not know 'admin' with this password; ")
    assert refused(server, "remove", "admin", **anna).startswith("'anna' may not do this (Permission denied); ")
    assert refused(server, "list", MLFLOW_TRACKING_URI="sqlite:///a").startswith(
        "MLFLOW_TRACKING_URI is 'sqlite:///a'; "
    )
    assert refused(server, "list", MLFLOW_TRACKING_PASSWORD="").startswith("MLFLOW_TRACKING_PASSWORD not set; ")
    away = users(server, "list", MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert away.returncode == 1
    assert away.stderr.startswith("error: cannot reach http://127.0.0.1:1 ([Errno 111] Connection refused); ")


def test_on_the_servers_own_machine_nothing_has_to_be_said(new_stack: Callable[..., Stack], tmp_path: Path) -> None:
    """services/.env does. With TLS the server itself is on loopback, whatever BIND is."""
    server = new_stack().server
    for name in ("users.py", "settings.py", ".env.example"):
        shutil.copy(SERVICES / name, tmp_path)
    secrets = ("DATABASE_PASSWORD", "FLASK_SECRET_KEY", "S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_ADMIN_ACCESS_KEY")
    lines = [f"{name}=of-the-tests-{name}" for name in (*secrets, "S3_ADMIN_SECRET_KEY")]
    lines += [f"ADMIN_PASSWORD={ADMIN_PASSWORD}", f"MLFLOW_PORT={server.port}", "BIND=127.0.0.1"]
    (tmp_path / ".env").write_text("\n".join(lines) + "\n")
    (tmp_path / ".env").chmod(0o600)
    silent = dict.fromkeys(server.environment(), "")
    for where in ({}, {"BIND": "0.0.0.0"}, {"BIND": "192.0.2.1", "TLS": "internal"}):
        done = users(server, "list", folder=tmp_path, **silent, **where)
        assert (done.returncode, done.stdout) == (0, "admin: administrator\n"), done.stderr
    done = users(server, "list", folder=tmp_path, **silent, BIND="::1", MLFLOW_PORT="1")
    assert done.stderr.startswith("error: cannot reach http://[::1]:1 (")


def test_a_server_without_sign_in_has_no_users(new_stack: Callable[..., Stack]) -> None:
    server = new_stack(AUTH="none").server
    assert refused(server, "list").startswith("has no users; ")


def test_a_password_is_typed_twice_and_not_shown(new_stack: Callable[..., Stack]) -> None:
    server = new_stack().server
    for again, code in ((SECOND, 2), (FIRST, 0)):
        terminal, other_end = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, str(SERVICES / "users.py"), "add", "anna"],
            env={**os.environ, **server.environment()},
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            start_new_session=True,
        )
        os.close(other_end)
        shown = b""
        for answer in (FIRST, again):
            while not shown.endswith(b": "):
                shown += os.read(terminal, 1000)
            os.write(terminal, f"{answer}\n".encode())
            shown += b"|"
        assert process.wait(timeout=60) == code
        shown += os.read(terminal, 1000)
        os.close(terminal)
        assert FIRST.encode() not in shown
        assert (b"the two passwords differ; nothing was changed" in shown) == (code == 2)
