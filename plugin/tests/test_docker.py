"""Jobs in Docker: what is sent, as whole specifications, and what a real engine makes of it."""

import json
import os
import platform
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker.errors
import pytest

from engine import Daemon
from mlproject_backends import JobError, Unreachable
from mlproject_backends import docker as target_module
from mlproject_backends.config import Config
from mlproject_backends.docker import DockerTarget, SubmittedContainer
from mlproject_backends.job import Job, Resources, State

SPECIFICATIONS = Path(__file__).parent / "containers"
JOB = Job(
    name="shapes-main-1f2e3d4c",
    run_id="7c0ffee",
    labels={"run-id": "7c0ffee", "entry-point": "main"},
    image="mlproject-env/shapes:0123456789abcdef",
    argv=("python", "-c", "print(1)"),
    env={"MLFLOW_TRACKING_URI": "https://tracking.example", "GREETING": "hello there"},
)
TARGET = DockerTarget(Config("docker"))
SECRET = "s3cret-of-this-test"

Submit = Callable[..., SubmittedContainer]


def specification(name: str) -> Any:
    return json.loads((SPECIFICATIONS / f"{name}.json").read_text())


def watch(job: SubmittedContainer) -> tuple[State, list[str]]:
    lines: list[str] = []
    return job.watch(lambda sentence: None, lines.append), lines


# What is sent


def test_a_plain_job() -> None:
    assert TARGET.render(JOB) == specification("plain")


def test_a_job_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setattr(os, "getgid", lambda: 5678)
    job = replace(
        JOB,
        env={"MLFLOW_TRACKING_URI": "http://localhost:5000"},
        secrets={"MLFLOW_TRACKING_PASSWORD": SECRET},
        resources=Resources(cpu=1.5, memory_bytes=4 * 2**30, gpu=2, shm_bytes=2**30),
        mounts=("/home/ada/mlruns",),
        cache=True,
    )
    assert TARGET.render(job) == specification("everything")


@pytest.mark.parametrize(
    ("address", "shared"),
    [
        ("http://127.0.0.1:5000", True),
        ("http://127.9.8.7", True),
        ("http://localhost:5000/path", True),
        ("http://[::1]:5000", True),
        ("postgresql://me@localhost/runs", True),
        ("https://localhost.example", False),
        ("http://10.0.0.1:5000", False),
        ("sqlite:////home/ada/mlflow.db", False),
        ("/home/ada/mlruns", False),
    ],
)
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3"])
def test_a_loopback_address_shares_the_network_of_this_machine(name: str, address: str, shared: bool) -> None:
    for job in (replace(JOB, env={name: address}), replace(JOB, env={}, secrets={name: address})):
        assert (TARGET.render(job)["HostConfig"].get("NetworkMode") == "host") == shared


def test_elsewhere_than_on_linux_this_machine_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    env = {"MLFLOW_TRACKING_URI": "http://localhost:5000/p", "MLFLOW_S3_ENDPOINT_URL": "http://me:pw@127.0.0.1"}
    body = TARGET.render(replace(JOB, env={**env, "OTHER": "http://localhost"}))
    assert body["HostConfig"]["ExtraHosts"] == ["host.docker.internal:host-gateway"]
    assert "NetworkMode" not in body["HostConfig"]
    assert body["Env"] == [
        "MLFLOW_S3_ENDPOINT_URL=http://me:pw@host.docker.internal",
        "MLFLOW_TRACKING_URI=http://host.docker.internal:5000/p",
        "OTHER=http://localhost",
    ]


# What a real engine makes of it


@pytest.fixture
def submit(engine: Any, base_image: str) -> Iterator[Submit]:
    """Starts a Python program as a job, with a Job's fields by name; cleans up."""
    submitted: list[SubmittedContainer] = []

    def start(program: str, target: DockerTarget = TARGET, **fields: Any) -> SubmittedContainer:
        job = replace(JOB, name=f"test-{uuid4().hex}", image=base_image, argv=("python", "-uc", program), env={})
        submitted.append(target.submit(replace(job, **fields)))
        return submitted[-1]

    yield start
    for job in submitted:
        job.clean_up()


def test_a_job_and_its_output(submit: Submit, engine: Any) -> None:
    job = submit("print(*range(300), sep='\\n'); print('x' * 40_000); print('\\u2713 last', end='')")
    state, lines = watch(job)
    assert lines == [*map(str, range(300)), "x" * 40_000, "\u2713 last"]  # the engine cuts lines at 16 KiB
    assert (state.status, state.exit_code) == ("FINISHED", 0)
    again: list[str] = []
    TARGET.find(job.tags).logs(again.append)
    assert again == lines
    job.cancel()  # of what has ended: nothing
    assert job.state() == state
    job.clean_up()
    job.clean_up()
    job.cancel()
    assert (job.state().status, "someone removed it" in job.state().reason) == ("FAILED", True)
    with pytest.raises(docker.errors.NotFound):
        engine.inspect_container(job.tags["mlproject.docker_container"])


@pytest.mark.parametrize(
    ("fields", "exit_code", "reason"),
    [
        ({"argv": ("python", "-c", "raise SystemExit(7)")}, 7, "exit code 7"),
        ({"argv": ("no-such-program",)}, 127, "command not found"),
        ({"argv": ("/etc",)}, 126, "may not be executed"),
        (
            {"argv": ("python", "-c", "bytearray(10**9)"), "resources": Resources(memory_bytes=64 * 2**20)},
            137,
            "at its limit of 64 MiB",
        ),
    ],
)
def test_a_job_that_fails_says_why(submit: Submit, fields: dict[str, Any], exit_code: int, reason: str) -> None:
    state, _ = watch(submit("", **fields))
    assert (state.status, state.exit_code) == ("FAILED", exit_code)
    assert reason in state.reason


SLEEPER = "import time\nprint('up')\ntime.sleep(600)"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda engine, container: engine.kill(container), "killed by signal 9"),
        (lambda engine, container: engine.remove_container(container, force=True), "someone removed it"),
    ],
)
def test_a_container_taken_away_while_it_is_watched(
    submit: Submit, engine: Any, fault: Callable[[Any, str], None], reason: str
) -> None:
    job = submit(SLEEPER)
    state = job.watch(lambda sentence: None, lambda line: fault(engine, job.tags["mlproject.docker_container"]))
    assert state.status == "FAILED"
    assert reason in state.reason


def test_cancel_from_another_process(submit: Submit) -> None:
    job = submit("import signal\nsignal.signal(signal.SIGTERM, lambda *_: exit(3))\nprint('up')\nsignal.pause()")
    assert job.state().status == "RUNNING"
    state = job.watch(lambda sentence: None, lambda line: TARGET.find(job.tags).cancel())
    assert (state.status, state.exit_code) == ("KILLED", 3)
    assert job.state() == state


def test_secrets_reach_the_job_and_nothing_else(submit: Submit, engine: Any) -> None:
    program = """
import json, os, pathlib
path = pathlib.Path(os.environ['MLPROJECT_SECRETS_FILE'])
secret = json.loads(path.read_text())['TOKEN']
path.unlink()
print(secret)
processes = pathlib.Path('/proc').glob('[0-9]*')
print([name for process in processes for name in ('cmdline', 'environ') if secret in (process / name).read_text()])
print('ready')
import time; time.sleep(600)
"""
    job = submit(program, secrets={"TOKEN": SECRET}, argv=("python", "-uc", program))
    container = job.tags["mlproject.docker_container"]
    seen: list[str] = []

    def look(line: str) -> None:
        seen.append(line)
        if line == "ready":
            assert SECRET not in json.dumps(engine.inspect_container(container))
            assert SECRET not in json.dumps(engine.top(container, "aux"))
            engine.kill(container)

    job.watch(lambda sentence: None, look)
    assert seen == [SECRET, "[]", "ready"]


def test_mounted_folders_belong_to_the_launcher(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:  # so that the container's user differs from the image's
        monkeypatch.setattr(os, "getuid", lambda: 4321)
        monkeypatch.setattr(os, "getgid", lambda: 4321)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        program = f"import getpass, pathlib; pathlib.Path('{folder}/made').touch(); print(getpass.getuser())"
        state, lines = watch(submit(program, mounts=(str(folder),)))
        assert (state.status, lines) == ("FINISHED", ["mlproject"])
        made = (folder / "made").stat()
        assert (made.st_uid, made.st_gid) == (os.getuid(), os.getgid())


def test_limits_and_the_cache_volume(submit: Submit, engine: Any) -> None:
    target = DockerTarget(Config("docker", cache_volume=f"test-{uuid4().hex}"))
    resources = Resources(shm_bytes=256 * 2**20, memory_bytes=2**30, cpu=0.5)
    program = "import shutil; print(shutil.disk_usage('/dev/shm').total); open('/cache/kept', 'x')"
    job = submit(program, target, cache=True, resources=resources)
    state, lines = watch(job)
    assert (state.status, lines) == ("FINISHED", [str(256 * 2**20)])
    limits = engine.inspect_container(job.tags["mlproject.docker_container"])["HostConfig"]
    assert (limits["NanoCpus"], limits["Memory"], limits["MemorySwap"]) == (5 * 10**8, 2**30, 2**30)
    assert watch(submit("print(open('/cache/kept').read() == '')", target, cache=True))[1] == ["True"]
    for container in engine.containers(all=True, filters={"volume": target._config.cache_volume}):
        engine.remove_container(container["Id"])
    engine.remove_volume(target._config.cache_volume)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"resources": Resources(gpu=1000)}, "GPU"),
        ({"resources": Resources(cpu=10_000)}, "ask for less, as in -A cpu=1"),
        ({"resources": Resources(memory_bytes=1000)}, "emory"),
        ({"image": "127.0.0.1:9/no/such:image"}, "pull 127.0.0.1:9/no/such:image"),
        ({"mounts": ("/no/such/folder",)}, "/no/such/folder"),
    ],
)
def test_a_job_that_cannot_start_leaves_nothing_behind(
    submit: Submit, engine: Any, fields: dict[str, Any], reason: str
) -> None:
    name = f"test-{uuid4().hex}"
    with pytest.raises(JobError) as refusal:
        submit("", name=name, **fields)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not engine.containers(all=True, filters={"name": name})


def test_a_container_of_another_engine_is_not_taken_for_gone(submit: Submit) -> None:
    tags = {**submit("").tags, "mlproject.docker_engine": "another"}
    with pytest.raises(JobError, match="belongs to another Docker engine"):
        TARGET.find(tags)
    with pytest.raises(JobError, match="was not sent to Docker"):
        TARGET.find({})


# No engine, or one that goes


def test_no_engine_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with pytest.raises(Unreachable) as refusal:
        TARGET.check()
    expected = f"no Docker engine answers at unix://{tmp_path}/docker.sock (No such file or directory); "
    assert str(refusal.value) == expected + "start it, or set DOCKER_HOST to another one"


def test_no_rights_on_the_socket_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        path = Path(folder) / "docker.sock"
        server.bind(str(path))
        server.listen()
        path.chmod(0o600)
        Path(folder).chmod(0o755)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        else:
            path.chmod(0)
        try:
            with pytest.raises(JobError, match=r"may not talk to the Docker engine at unix://.*the group docker"):
                TARGET.check()
        finally:
            if root:
                os.seteuid(0)


COUNTER = "import time\nfor number in range(60):\n    print(number, flush=True)\n    time.sleep(0.05)"


@pytest.fixture
def restartable(private_engine: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setenv("DOCKER_HOST", private_engine.host)
    yield private_engine
    private_engine.stop()
    private_engine.start()


@pytest.fixture
def counting(restartable: Daemon, submit: Submit) -> SubmittedContainer:
    """A job that outlives its engine and counts for three seconds."""
    restartable.stop()
    restartable.start("--live-restore")
    return submit(COUNTER)


@pytest.mark.slow
def test_a_job_outlives_an_engine_that_crashes_and_comes_back(
    counting: SubmittedContainer, restartable: Daemon
) -> None:
    told: list[str] = []
    lines: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        if "waiting" in sentence:
            restartable.start("--live-restore")

    def output(line: str) -> None:
        lines.append(line)
        if line == "10":
            restartable.stop(signal.SIGKILL)

    state = counting.watch(tell, output)
    assert (state.status, state.exit_code) == ("FINISHED", 0)
    assert lines == [str(number) for number in range(60)]
    assert told[2:] == ["the Docker engine answers again"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_that_restarts_takes_the_job_along(restartable: Daemon, submit: Submit, number: int) -> None:
    job, lines = submit(COUNTER), []

    def output(line: str) -> None:
        lines.append(line)
        if line == "10":
            restartable.stop(number)

    def tell(sentence: str) -> None:
        if "waiting" in sentence:
            restartable.start()  # without live-restore, an engine that starts ends what still runs

    state = job.watch(tell, output)
    assert state.status == "FAILED"
    assert state.reason.endswith("; the Docker engine stopped meanwhile, and its containers with it")
    assert lines == [str(number) for number in range(len(lines))]


@pytest.mark.slow
def test_an_engine_that_does_not_come_back_fails_the_job(
    counting: SubmittedContainer, restartable: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "ENGINE_WAIT_S", 1)
    state = counting.watch(lambda sentence: None, lambda line: restartable.stop(signal.SIGKILL))
    assert state.status == "FAILED"
    assert "the Docker engine was lost while the job ran: no Docker engine answers at unix://" in state.reason
    with pytest.raises(Unreachable):
        counting.state()
    restartable.start()
