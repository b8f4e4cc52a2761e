"""What runs first in a job's container: check the tracking server, fetch the code, run the command in it.

This file is not imported there: its text is the job's `python -c` argument, because an image holds an environment and
no plugin. It needs Python 3.8 and MLflow (mlflow-skinny is enough) and reads what to do from variables that start with
MLPROJECT_. It ends with the command's own exit code, 128+n when signal n ended it, 124 past the time limit, and 78
(EX_CONFIG) when the command could not be started; then one line that begins with `mlproject: error:` says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any, NoReturn

CANNOT_START = 78
TIMED_OUT = 124
CODE = Path("/tmp/mlproject/code")
CACHE = Path("/cache")
CONNECT_S = 60  # a server that restarts is waited for
RANKS_S = 600  # pods of one job may start minutes apart: each node pulls the image
MASTER_TAG = "mlproject.master"
GRACE_S = 25  # under the 30 s that Kubernetes gives before it kills


class CannotStart(Exception):
    """The command cannot be started; the text is one line for the user."""


def main() -> int:
    command = os.environ.pop("MLPROJECT_COMMAND")
    child: dict[str, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda number, frame: stop(child, number))
    signal.signal(signal.SIGINT, lambda number, frame: stop(child, number))
    try:
        take_secrets(os.environ.pop("MLPROJECT_SECRETS_FILE", None))
        prepare()
    except CannotStart as error:
        fail(str(error))
    return run(command, child)


def take_secrets(path: str | None) -> None:
    """Set the variables that the file holds and remove it: they were kept out of the container's description."""
    if path:
        os.environ.update(json.loads(Path(path).read_text()))
        Path(path).unlink()


def prepare() -> None:
    """Fetch the code into CODE, after the server and the artifact store answered."""
    if not os.access(Path("~").expanduser(), os.W_OK):
        os.environ["HOME"] = "/tmp"  # an image's user has a home, the launcher's own uid has none there
    CODE.mkdir(parents=True, exist_ok=True)
    tracking_uri = os.environ["MLFLOW_TRACKING_URI"]
    wait_for(tracking_uri, "the tracking server", "name an address that the job can reach as 'tracking-uri'")
    client, run = connect()
    artifact_uri = run.info.artifact_uri
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if artifact_uri.startswith("s3:") and endpoint:
        wait_for(endpoint, "the S3 endpoint", "set MLFLOW_S3_ENDPOINT_URL to an address that the job can reach")
    if os.environ.get("RANK", "0") == "0":
        check_writable(client, run)
    unpack(fetch_code(run))
    find_master(client, run.info.run_id)
    for folder in json.loads(os.environ.pop("MLPROJECT_CACHE", "[]")):
        keep_in_cache(folder)
    for path, uri in json.loads(os.environ.pop("MLPROJECT_DOWNLOADS", "{}")).items():
        download(uri, path)


def wait_for(uri: str, what: str, advice: str) -> None:
    """Wait until the host in `uri` takes a connection, for as long as a restart takes."""
    address = urllib.parse.urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return
    where = (address.hostname, address.port or {"http": 80, "https": 443}[address.scheme])
    deadline, told = time.monotonic() + CONNECT_S, False
    while True:
        try:
            socket.create_connection(where, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise CannotStart(
                    f"the job cannot reach {what} at {where[0]}:{where[1]} from inside its container "
                    f"({error.strerror or error}); {advice}"
                ) from None
        if not told:
            say(f"waiting for {what} at {where[0]}:{where[1]}")
            told = True
        time.sleep(1)


def connect() -> tuple[Any, Any]:
    """A client and the job's run."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise CannotStart(f"the image has no MLflow ({error}); install mlflow or mlflow-skinny in it") from None
    try:
        client = MlflowClient()
        return client, client.get_run(os.environ["MLFLOW_RUN_ID"])
    except MlflowException as error:
        code, text = getattr(error, "get_http_status_code", lambda: 0)(), first_line(error)
        advice = "check 'tracking-uri'; a database needs sqlalchemy and alembic beside mlflow-skinny in the image"
        if code == 401 or "401" in text:
            advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        elif code == 403 or "403" in text:
            advice = "give the user the right to it, or name this host in the server's --allowed-hosts"
        raise CannotStart(f"the tracking server refuses the job ({text}); {advice}") from None
    except Exception as error:  # a store's driver that is absent, a file that is not mounted
        raise CannotStart(
            f"the job cannot open the tracking store ({first_line(error)}); check 'tracking-uri'"
        ) from None


def check_writable(client: Any, run: Any) -> None:
    """Prove that artifacts can be written, by one that says what the job runs in."""
    from importlib.metadata import distributions

    packages = sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()}, key=str.lower)
    lines = [
        f"host: {socket.gethostname()}",
        f"platform: {platform.platform()}",
        f"python: {platform.python_version()}",
    ]
    try:
        client.log_text(run.info.run_id, "\n".join([*lines, "packages:", *packages, ""]), "logs/environment.txt")
    except Exception as error:
        raise CannotStart(
            f"the job cannot write to the artifact store {without_password(run.info.artifact_uri)} "
            f"({first_line(error)}); give it the store's credentials and endpoint (keys 'env', 'env-from-secret'), "
            "or let the tracking server serve artifacts"
        ) from None


def fetch_code(run: Any) -> str:
    """Download the code package and check its hash; its local path."""
    from mlflow.artifacts import download_artifacts

    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # for one small file; the command has it again
    artifact, expected = os.environ.pop("MLPROJECT_CODE"), os.environ.pop("MLPROJECT_CODE_SHA256")
    try:
        path = download_artifacts(run_id=run.info.run_id, artifact_path=artifact, dst_path="/tmp/mlproject")
    except Exception as error:
        raise CannotStart(
            f"the job cannot read its code from {without_password(run.info.artifact_uri)} ({first_line(error)}); "
            "check the artifact store's address and credentials"
        ) from None
    os.environ.pop("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")
    received = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if received != expected:
        raise CannotStart(f"the code package has the hash {received}, not {expected}: someone changed it; run again")
    return path


def unpack(path: str) -> None:
    with tarfile.open(path) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which older Pythons do not have
        archive.extractall(CODE)
    Path(path).unlink()


def find_master(client: Any, run_id: str) -> None:
    """Make MASTER_ADDR an address that this rank can reach, also before the cluster's DNS knows it, or without DNS.

    Rank 0 says on the run where it is; a rank that cannot resolve MASTER_ADDR reads it there.
    """
    name, leads = os.environ.get("MASTER_ADDR"), os.environ.get("RANK") == "0"
    if not name or "RANK" not in os.environ:
        return
    if leads:
        client.set_tag(run_id, MASTER_TAG, f"{name} {socket.gethostbyname(socket.gethostname())}")
    deadline = time.monotonic() + RANKS_S
    while True:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(name, None)
            return
        told, _, address = client.get_run(run_id).data.tags.get(MASTER_TAG, "").partition(" ")
        if told == name:
            os.environ["MASTER_ADDR"] = address
            return
        if time.monotonic() > deadline:
            raise CannotStart(f"rank 0 did not start within {RANKS_S} s; look at its pod with kubectl get pods")
        time.sleep(1)


def keep_in_cache(folder: str) -> None:
    """Make the project's `folder` live in the cache volume, where there is one that this user may write to."""
    kept, link = CACHE / os.environ.get("MLPROJECT_NAME", "project") / folder, CODE / folder
    try:
        kept.mkdir(parents=True, exist_ok=True)
        if not os.access(kept, os.W_OK):
            raise PermissionError(f"no right to write to {kept}")
    except OSError as error:
        say(f"'{folder}' is not kept between jobs: {error.strerror or error}")
        return
    if link.exists() or link.is_symlink():
        say(f"'{folder}' is not kept between jobs: it is part of the project's files")
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(kept)


def download(uri: str, path: str) -> None:
    from mlflow.artifacts import download_artifacts

    try:
        folder = Path(path).parent
        folder.mkdir(parents=True)
        Path(download_artifacts(artifact_uri=uri, dst_path=str(folder))).rename(path)
    except Exception as error:
        raise CannotStart(f"the job cannot download {without_password(uri)} ({first_line(error)})") from None


def run(command: str, child: dict[str, subprocess.Popen[bytes]]) -> int:
    """Run the command in the code's folder as the head of a process group of its own; its exit code."""
    limit_s = float(os.environ.pop("MLPROJECT_TIMEOUT_S", 0))
    shell = shutil.which("bash") or "sh"
    # One stream: an engine reads two apart, and mixes up the order of their lines.
    process = subprocess.Popen([shell, "-c", command], cwd=CODE, stderr=subprocess.STDOUT, start_new_session=True)
    child["process"] = process
    try:
        code = process.wait(limit_s or None)
    except subprocess.TimeoutExpired:
        say(f"error: stopped after timeout-s = {limit_s:g} seconds")
        stop(child, signal.SIGTERM)
        process.wait()
        return TIMED_OUT
    return code if code >= 0 else 128 - code


def stop(child: dict[str, subprocess.Popen[bytes]], number: int) -> None:
    """Pass a signal on to the command and all its children, and kill what is left before the engine would."""
    process = child.get("process")
    if process is None:
        sys.exit(128 + number)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
    timer = threading.Timer(GRACE_S, kill)
    timer.daemon = True
    timer.start()


def say(text: str) -> None:
    print(f"mlproject: {text}", flush=True)


def first_line(error: BaseException) -> str:
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0][:300])


def without_password(text: str) -> str:
    head, at, tail = text.partition("@")
    scheme, slashes, _ = head.rpartition("//")
    return scheme + slashes + tail if at and slashes else text


def fail(text: str) -> NoReturn:
    say(f"error: {text}")
    with contextlib.suppress(OSError):
        Path("/dev/termination-log").write_text(text)  # Kubernetes shows it as the reason
    sys.exit(CANNOT_START)


if __name__ == "__main__":
    sys.exit(main())
