"""Jobs in Docker whose artifacts are in S3: reached directly, or through the tracking server."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient

from cluster import host_of_containers
from object_storage import ObjectStorage
from venues import PROJECT, Server, Venue, tracked_at, use_store, wait_for_line

pytestmark = pytest.mark.slow

MULTIPART_FROM = "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE"
BAD_SECRET = "not-the-secret-of-storage"


@pytest.fixture
def in_s3(
    object_storage: ObjectStorage, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStorage]:
    """A tracking database here, its artifacts in a bucket; the environment has the credentials."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the keys that it had at first
    for name, value in object_storage.environment().items():
        monkeypatch.setenv(name, value)
    uri = use_store(empty_store, tmp_path / "store", f"s3://runs/{tmp_path.name}")
    yield from tracked_at(uri, monkeypatch, object_storage)


@pytest.fixture(params=["127.0.0.1", "bridge"])
def proxied(
    request: pytest.FixtureRequest,
    engine: Any,
    object_storage: ObjectStorage,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Server]:
    """A tracking server that alone knows the bucket; one at the bridge's address has its jobs there, away from S3."""
    host = host_of_containers(engine) if request.param == "bridge" else request.param
    server = Server(tmp_path / "server", empty_store, host, f"s3://runs/{tmp_path.name}")
    server.environment = object_storage.environment()
    server.start()
    yield from tracked_at(server.uri, monkeypatch, server)
    server.stop()


def test_artifacts_in_s3(engine: Any, job_image: str, in_s3: ObjectStorage, tmp_path: Path) -> None:
    venue = Venue("docker", lambda run: None, {"image": job_image})
    job = venue.submit("sleep", seconds="20")  # longer than the questions take
    wait_for_line(job, "ready")
    run = venue.client.get_run(job.run_id)
    described = json.dumps(engine.inspect_container(run.data.tags["mlproject.docker_container"]))
    assert in_s3.endpoint in described
    assert in_s3.secret_key not in described
    assert in_s3.access_key not in described
    assert job.wait()
    stored = in_s3.client().list_objects_v2(Bucket="runs", Prefix=tmp_path.name)["Contents"]
    names = {item["Key"].partition("/artifacts/")[2] for item in stored}
    assert names == {"code/code.tar.gz", "logs/environment.txt", "logs/job.log"}


def test_a_wrong_secret_is_said_in_one_line(job_image: str, in_s3: ObjectStorage) -> None:
    # The launcher's own credentials are good: `env` gives the job others.
    bad = {"AWS_SECRET_ACCESS_KEY": BAD_SECRET}
    command = [sys.executable, "-m", "mlflow", "run", str(PROJECT), "--backend", "docker", "--backend-config"]
    done = subprocess.run([*command, json.dumps({"image": job_image, "env": bad})], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert BAD_SECRET not in done.stdout + done.stderr
    (run,) = MlflowClient().search_runs(["0"])
    reason = run.data.tags["mlproject.reason"]
    assert run.info.status == "FAILED"
    assert reason.startswith("the job cannot write to the artifact store s3://runs/")
    assert "credentials" in reason
    assert reason in done.stderr.splitlines()[-1]


def test_the_server_serves_what_only_it_can_reach(job_image: str, proxied: Server) -> None:
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
    # MLflow's client would ask this server where S3 is, for every download and, with this limit, for every upload.
    venue = Venue("docker", lambda run: None, {"image": job_image, "env": {MULTIPART_FROM: "1"}})
    run = venue.client.get_run(venue.run("metric").run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    read = venue.run("read", file=f"runs:/{run.info.run_id}/note.txt")
    assert "written by the job" in venue.log_of(read.run_id)


@pytest.mark.parametrize("proxied", ["bridge"], indirect=True)
def test_those_jobs_cannot_reach_s3(
    engine: Any, base_image: str, proxied: Server, object_storage: ObjectStorage
) -> None:
    """The test above is about something: the server points at S3, and a container on the bridge is not let in."""
    (port,) = re.findall(r":(\d+)$", object_storage.endpoint)
    information = json.load(urllib.request.urlopen(f"{proxied.uri}/api/3.0/mlflow/server-info", timeout=30))
    assert information["multipart_downloads_enabled"] and information["multipart_uploads_enabled"]
    for host in ("127.0.0.1", host_of_containers(engine)):
        connect = f"import socket; socket.create_connection(('{host}', {port}), timeout=5)"
        container = engine.create_container(base_image, ["python3", "-c", connect])["Id"]
        engine.start(container)
        assert engine.wait(container)["StatusCode"] == 1
        assert b"ConnectionRefusedError" in engine.logs(container)
        engine.remove_container(container)
