"""What breaks under runs that log much: it is tried again until all is there, or a run fails and keeps it on disk.

What is there is asked of PostgreSQL and of the S3 server; what a person sees is the script's exit code and last line.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from heavy_run import Logged, Point, files_in_bucket, points_in_database
from network import Network
from s3_server import S3Server
from services_stack import MlflowServer, Part, PostgreSQL, new_folder, server_settings

from conftest import missing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LOAD = ("--points=4000", "--files=4", "--file_bytes=1000000", "--seconds=3")
RUNS = 2
EPOCHS = 20

Start = Callable[..., "subprocess.Popen[str]"]
Load = Callable[..., "list[Run]"]


class Gateway(Part):
    """The tracking server's own way into Ceph; other tests share the rest of it."""

    def __init__(self, folder: Path, s3: S3Server):
        super().__init__(folder)
        self.s3 = replace(s3, endpoint=f"http://127.0.0.1:{self.port}")

    def launch(self, log: Any) -> "subprocess.Popen[bytes]":
        command = ["radosgw", "--conf", str(self.s3.config), "--name", "client.rgw", "-f"]
        command += [f"--rgw_frontends=beast endpoint=127.0.0.1:{self.port}"]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def answers(self) -> bool:
        try:
            self.s3.client().list_buckets()
        except Exception:
            return False
        return True

    def fall_silent(self) -> None:
        """Stop without ending: connections are accepted, and nothing comes."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)


class Services:
    """The tracking server's parts, and what has arrived in them."""

    def __init__(self, database: PostgreSQL, gateway: Gateway, server: MlflowServer):
        self.database, self.gateway, self.server = database, gateway, server

    def points(self, run_id: str) -> list[Point]:
        return points_in_database(self.database, run_id)

    def files(self, run_id: str) -> dict[str, str]:
        return files_in_bucket(self.server.settings, run_id)

    def status(self, run_id: str) -> str:
        ((status,),) = self.database.execute(f"SELECT status FROM runs WHERE run_uuid = '{run_id}'")
        return str(status)


class Run:
    """A run in a process and a folder of its own."""

    def __init__(self, start: Start, folder: Path, seed: int, environment: dict[str, str]):
        folder.mkdir()
        self._folder = folder
        self._process = start("tests/heavy_run.py", f"--seed={seed}", *LOAD, cwd=folder, **environment)

    def is_half_done(self) -> None:
        """Wait until it has logged the second of its four artifacts."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) != "file 1\n":
            assert line, self._process.communicate()

    def goes_on(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Wait for its end; then there is more to know about it."""
        _, self.err = self._process.communicate(timeout=120)
        self.exit_code = self._process.returncode
        (path,) = self._folder.glob("*.json")
        self.logged = Logged.read(path)
        self.id = self.logged.run_id
        self.kept = self._folder / "outputs" / self.id

    def unsent_points(self) -> list[Point]:
        rows = [json.loads(line) for line in (self.kept / "unsent.jsonl").read_text().splitlines()]
        return [(row["metric"], row["step"], row["value"], row["timestamp"]) for row in rows if "metric" in row]


def digests(folder: Path) -> dict[str, str]:
    """Path and SHA-256 of the files in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def services(s3_server: S3Server, database_template: Callable[[str], Path]) -> Iterator[Services]:
    with ExitStack() as at_end:
        database = PostgreSQL(new_folder(at_end))
        subprocess.run(["cp", "-a", database_template("postgresql") / "data", database.folder], check=True)
        gateway = Gateway(new_folder(at_end), s3_server)
        for part in (database, gateway):
            at_end.callback(part.kill)
            part.start()
        folder = new_folder(at_end)
        server = MlflowServer(folder, server_settings(database, folder, gateway.s3))
        at_end.callback(server.kill)
        server.start()
        yield Services(database, gateway, server)


@pytest.fixture
def load(start: Start, tmp_path: Path, services: Services) -> Load:
    """Start runs and wait until each is half done; `uri` is another way to the server."""

    def load(uri: str = services.server.uri, **environment: str) -> list[Run]:
        environment = {**services.server.environment(), **environment, "MLFLOW_TRACKING_URI": uri}
        runs = [Run(start, tmp_path / str(seed), seed, environment) for seed in range(RUNS)]
        for run in runs:
            run.is_half_done()
        return runs

    return load


@pytest.fixture
def network(services: Services) -> Iterator[Network]:
    network = Network(services.server.port)
    yield network
    network.close()


def all_is_there(services: Services, runs: list[Run]) -> None:
    """Each run ended well; every point and every byte arrived, no point twice; nothing is left on this machine."""
    for run in runs:
        run.end()
        assert run.exit_code == 0, run.err
        assert services.status(run.id) == "FINISHED"
        run.logged.check_points(services.points(run.id))
        run.logged.check_files(services.files(run.id))
        assert not run.kept.exists()


def failed_and_kept_all(services: Services, run: Run, reason: str, stored: dict[str, str]) -> None:
    """The run says in one line why it failed; what did not arrive is on disk, and what did is complete."""
    assert run.exit_code == 1
    (told,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert re.search(reason, told) and str(run.kept) in told and "Traceback" not in run.err
    run.logged.check_points(list({*services.points(run.id), *run.unsent_points()}))
    unsent = digests(run.kept / "unsent")
    run.logged.check_files(stored | unsent)
    run.logged.check_files(unsent | stored)


def away(part: Part, runs: list[Run], seconds: float) -> None:
    """Leave a part that was ended where it is for a while, then start it; the runs wait for it."""
    time.sleep(seconds)
    assert all(run.goes_on() for run in runs)
    part.start()


def test_a_tracking_server_that_is_killed(services: Services, load: Load) -> None:
    runs = load()
    services.server.kill()
    away(services.server, runs, 2)
    all_is_there(services, runs)


@pytest.mark.parametrize("end", [PostgreSQL.stop, PostgreSQL.kill])
def test_a_database_that_is_restarted(services: Services, load: Load, end: Callable[[PostgreSQL], None]) -> None:
    runs = load()
    end(services.database)
    away(services.database, runs, 3)
    all_is_there(services, runs)


@pytest.fixture
def training(services: Services, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """`mlflow run` of this project, in its first epochs."""
    command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", str(ROOT)]
    for parameter in (f"data_dir={tmp_path}/data", f"epochs={EPOCHS}", "log_every=1", "device=cpu"):
        command += ["-P", parameter]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **services.server.environment(), "PATH": path, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("epoch"):
            assert line, process.communicate()
        yield process
        process.kill()


def test_a_store_that_is_away_for_half_a_minute(
    services: Services, load: Load, training: "subprocess.Popen[str]"
) -> None:
    """First the S3 server is silent, then it refuses connections."""
    runs = load()
    services.gateway.fall_silent()
    time.sleep(15)
    services.gateway.kill()
    away(services.gateway, runs, 15)
    all_is_there(services, runs)
    out, err = training.communicate(timeout=120)
    assert training.returncode == 0, err
    run_id = re.search(r"; run (\w{32})$", out, re.MULTILINE)[1]  # type: ignore[index]
    assert services.status(run_id) == "FINISHED"
    accuracies = [step for key, step, *_ in services.points(run_id) if key == "val/accuracy"]
    assert len(accuracies) == EPOCHS
    assert {"checkpoints/latest.pt", "checkpoints/model.pt"} <= set(services.files(run_id))


def test_a_connection_that_is_cut_in_the_middle_of_an_upload(services: Services, load: Load, network: Network) -> None:
    runs = load(network.uri)
    network.cut_after(500_000)
    assert network.cut.wait(30)
    all_is_there(services, runs)


def test_answers_that_are_lost(services: Services, load: Load, network: Network) -> None:
    """The server gets the same requests again, which change nothing."""
    runs = load(network.uri)
    network.cut_answers(8)
    assert network.cut.wait(30)
    all_is_there(services, runs)


# A request may be silent for three seconds, and MLflow's client does not send it again by itself.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def test_a_network_that_is_silent_for_a_while(services: Services, load: Load, network: Network) -> None:
    runs = load(network.uri, **IMPATIENT)
    network.fall_silent()
    time.sleep(6)
    assert all(run.goes_on() for run in runs)
    network.speak()
    all_is_there(services, runs)
    assert any("the tracking server is back" in run.err for run in runs)


def test_a_network_that_stays_silent_after_a_cut(services: Services, load: Load, network: Network) -> None:
    runs = load(network.uri, TRACKING_PATIENCE_S="2", **IMPATIENT)
    network.cut_after(500_000, then_silent=True)
    for run in runs:
        run.end()
        stored = services.files(run.id)
        assert len(stored) < 4
        failed_and_kept_all(services, run, "for 2 s the tracking server did not take .* timed out", stored)
    assert network.cut.is_set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]).returncode:
        missing("no right to mount a disk of memory (mount -t tmpfs)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_of_the_store_that_is_full(services: Services, load: Load, small_disk: Path, tmp_path: Path) -> None:
    """Another server with the same database, and a folder for the artifacts."""
    settings = server_settings(services.database, small_disk, None)
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server", settings)
    server.start()
    try:
        runs = load(server.uri, TRACKING_PATIENCE_S="4")
        for run in runs:
            run.end()
            (stored,) = small_disk.rglob(f"{run.id}/artifacts")
            # It answers before it has read all, so a client may find the connection closed in place of the answer.
            why = r"(it answers 500, its log says why|\w+: .*Connection.*)"
            reason = rf"for 4 s the tracking server did not take files/\d.bin \({why}\)"
            failed_and_kept_all(services, run, reason, digests(stored))
            assert services.status(run.id) == "FAILED"
        assert "No space left on device" in server.log.read_text()
    finally:
        server.kill()
