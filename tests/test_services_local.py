"""`make services-local`: PostgreSQL, Ceph's gateway and MLflow as processes, started, ended, crashed and refused."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from ports import free_port
from services_stack import Place

pytestmark = pytest.mark.slow
SECRETS = ("ADMIN_PASSWORD", "DATABASE_PASSWORD", "FLASK_SECRET_KEY", "S3_SECRET_KEY", "S3_ADMIN_SECRET_KEY")


def s3_of(place: Place, keys: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{place.ports['S3_PORT']}",
        aws_access_key_id=place.setting(f"{keys}_ACCESS_KEY"),
        aws_secret_access_key=place.setting(f"{keys}_SECRET_KEY"),
        region_name="us-east-1",
    )


def check_run(place: Place, run_id: str) -> None:
    client = place.client()
    assert client.get_run(run_id).data.metrics == {"loss": 0.5}
    assert Path(client.download_artifacts(run_id, "a folder/заметка.txt")).read_text() == "kept"


def test_it_starts_stops_crashes_and_keeps_everything(place: Place) -> None:
    done = place.run("local.py", "start")
    assert done.returncode == 0, done.stderr
    assert f"The tracking server is up: {place.uri} (sign in as admin; the password is ADMIN_PASSWORD in" in done.stdout
    assert done.stdout.index("Starting PostgreSQL") < done.stdout.index("Starting MLflow")
    run_id = place.client().create_run("0", run_name="первый").info.run_id
    place.client().log_metric(run_id, "loss", 0.5)
    place.client().log_text(run_id, "kept", "a folder/заметка.txt")
    check_run(place, run_id)
    assert place.ask("GET", "2.0/mlflow/users/list", auth=None).status_code == 401

    # Started twice, it starts nothing.
    running = place.processes()
    again = place.run("local.py", "start")
    assert (again.returncode, again.stdout) == (0, f"The tracking server runs already: {place.uri}\n")
    assert place.processes().keys() == running.keys()

    # Secrets are in .env and in what the server alone can read.
    secrets = [place.setting(name) for name in SECRETS]
    logs = [path.read_text(errors="replace") for path in (place.services / "data/logs").glob("*.log")]
    assert not [secret for secret in secrets for text in [*running.values(), *logs, done.stdout] if secret in text]
    folders = [path for path in (place.services / "data").iterdir() if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}

    # The server's own S3 keys are good for its part of the bucket alone.
    s3_of(place, "S3_ADMIN").put_object(Bucket="mlflow", Key="others/secret", Body=b"x")
    for act in (
        lambda: s3_of(place, "S3").get_object(Bucket="mlflow", Key="others/secret"),
        lambda: s3_of(place, "S3").put_object(Bucket="mlflow", Key="others/mine", Body=b"x"),
        lambda: s3_of(place, "S3").create_bucket(Bucket="mine"),
    ):
        with pytest.raises(ClientError):
            act()

    done = place.run("local.py", "stop")
    assert done.returncode == 0, done.stderr
    assert not place.processes()
    assert place.run("local.py", "stop").stdout == "Nothing runs here\n"
    assert place.run("local.py", "start").returncode == 0
    check_run(place, run_id)

    # A crash of everything, as when the power goes.
    place.kill()
    done = place.run("local.py", "start")
    assert done.returncode == 0, done.stderr
    check_run(place, run_id)

    # New secrets count from the next start on.
    place.run("local.py", "stop")
    file = place.services / ".env"
    text = file.read_text()
    for name in ("DATABASE_PASSWORD", "S3_SECRET_KEY", "S3_ADMIN_SECRET_KEY"):
        text = text.replace(f"{name}={place.setting(name)}", f"{name}={name[::-1].lower()}-of-tomorrow")
    file.write_text(text)
    done = place.run("local.py", "start")
    assert done.returncode == 0, done.stderr
    check_run(place, run_id)
    place.run("local.py", "stop")


@pytest.mark.parametrize("name", ["MLFLOW_PORT", "DATABASE_PORT", "S3_PORT"])
def test_a_port_that_is_taken_is_one_line(place: Place, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = place.run("local.py", "start", **{name: port})
    assert (done.returncode, done.stdout.count("Starting"), done.stderr.count("\n")) == (2, 0, 1)
    assert f"port {port} of 127.0.0.1 is taken; end what listens there, or set {name} in" in done.stderr
    assert not place.processes()


def test_ctrl_c_in_the_first_start_leaves_nothing_half_made(place: Place) -> None:
    data = place.services / "data"
    shutil.rmtree(data, ignore_errors=True)
    for told in ("Starting PostgreSQL", "Starting Ceph", "Starting MLflow"):
        start = subprocess.Popen(
            **place.command("local.py", "start"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert start.stdout
        assert start.stderr
        while told not in (line := start.stdout.readline()):
            assert line, start.stderr.read()
        time.sleep(0.3)
        os.killpg(start.pid, signal.SIGINT)  # as a terminal does: to all that runs in the foreground
        assert start.wait(120) == 130, start.stderr.read()
        assert start.stderr.read() == "stopped\n"
        start.stdout.close()
        start.stderr.close()
        # The signal went to grandchildren too, as to the shell in which initdb fills a database: they end in a moment.
        deadline = time.monotonic() + 10
        while place.processes():
            assert time.monotonic() < deadline, place.processes()
            time.sleep(0.1)
        assert not list(data.glob("*.partial"))
    done = place.run("local.py", "start")
    assert done.returncode == 0, done.stderr
    place.run("local.py", "stop")


def test_a_folder_serves_where_there_is_no_ceph(place: Place) -> None:
    shutil.rmtree(place.services / "data", ignore_errors=True)
    place.ports["MLFLOW_PORT"] = str(free_port())  # a client remembers of an address whether S3 is behind it
    done = place.run("local.py", "start", PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "because there is no S3 server (apt-get install ceph-mon ceph-osd radosgw)" in done.stdout
    run_id = place.client().create_run("0").info.run_id
    place.client().log_metric(run_id, "loss", 0.5)
    place.client().log_text(run_id, "kept", "a folder/заметка.txt")
    place.run("local.py", "stop")
    # What was chosen stays, also where Ceph has come meanwhile.
    assert place.run("local.py", "start").returncode == 0
    check_run(place, run_id)
    place.run("local.py", "stop")


def test_without_postgresql_one_line_says_what_to_install(place: Place, tmp_path: Path) -> None:
    code = (
        "import sys, local, settings; local.PROGRAMS = local.DATA; sys.argv[1:] = ['start']; settings.run(local.main)"
    )
    shutil.rmtree(place.services / "data", ignore_errors=True)
    how = place.command("local.py", PATH=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=how["env"], cwd=place.services, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no postgres of PostgreSQL; install it (Debian: apt-get install postgresql)" in done.stderr


def test_mariadb_needs_docker(place: Place) -> None:
    done = place.run("local.py", "start", DATABASE="mariadb")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "without Docker it has to be postgresql" in done.stderr
