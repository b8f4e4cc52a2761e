"""`make services` with real parts: Docker, Compose, PostgreSQL or MariaDB, SeaweedFS, Caddy and MLflow's client."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import requests
import yaml
from advisories import hole, scan
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ports import free_port
from service import PredictionService, expected_logits, some_images
from service_images import CANNOT_BE_MADE, find, make_stand_in
from triton_server import PYTHON, check_that_it_runs

from models.triton import to_repository
from serving.remote import Remote

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ROOT / "services"
sys.path += [str(SERVICES), str(ROOT / "plugin" / "tests")]
pytest_plugins = ["engine"]
pytestmark = pytest.mark.slow
RESTART_S = 60


class Stack:
    """A copy of services/ with a Compose project of its own."""

    def __init__(self, folder: Path, engine: Any, **settings: str):
        shutil.copytree(SERVICES, folder, ignore=shutil.ignore_patterns(".env", "data", "backups", "__pycache__"))
        self.folder, self.engine = folder, engine
        self.project = f"test-{uuid.uuid4().hex[:8]}"
        ports = {name: str(free_port()) for name in ("MLFLOW_PORT", "S3_PORT", "TLS_PORT")}
        self.said = ""
        self.given = {
            "COMPOSE_PROJECT_NAME": self.project,
            "SERVER_IMAGE": "mlflow-tracking-server-test",
            **ports,
            **settings,
        }

    def run(self, *words: str, script: str = "compose.py", **environment: str) -> subprocess.CompletedProcess[str]:
        """compose.py as on a host that has Python's standard library and nothing else (-S)."""
        return subprocess.run(
            [sys.executable, "-S", script, *words],
            cwd=self.folder,
            env={**os.environ, **self.given, **environment},
            capture_output=True,
            text=True,
        )

    def up(self, **environment: str) -> None:
        done = self.run("up", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stdout

    def remove(self) -> None:
        """With its data: nothing there is worth a slow end."""
        self.run("kill")
        self.run("down", "--volumes")

    @property
    def values(self) -> dict[str, str]:
        """The settings in .env."""
        lines = (self.folder / ".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]", line))

    def containers(self) -> dict[str, Any]:
        """What Docker knows of each container, by service."""
        label = {"label": f"com.docker.compose.project={self.project}"}
        found = [self.engine.inspect_container(one["Id"]) for one in self.engine.containers(all=True, filters=label)]
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}

    def sign_in(self, patch: pytest.MonkeyPatch) -> MlflowClient:
        """A client with the variables that `up` printed, as a shell has them."""
        lines = "\n".join(line for line in self.said.splitlines() if line.startswith("  export "))
        shell = subprocess.run(
            ["bash", "-c", f"{lines}\nenv"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
        )
        for name, value in re.findall(r"^(MLFLOW_\w+)=(.*)$", shell.stdout, re.MULTILINE):
            patch.setenv(name, value)
        return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])

    def s3(self, prefix: str) -> Any:
        """A client of the S3 server with the keys of one of its two users."""
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.given['S3_PORT']}",
            aws_access_key_id=self.values[f"{prefix}_ACCESS_KEY"],
            aws_secret_access_key=self.values[f"{prefix}_SECRET_KEY"],
            region_name="us-east-1",
        )


@pytest.fixture(scope="module")
def images(engine: Any, base_image: str) -> None:
    """An image for every service, under the name that compose.yaml has for it."""
    if not shutil.which("docker-compose"):
        from conftest import missing

        missing("there is no docker-compose")
    for name, service in yaml.safe_load((SERVICES / "compose.yaml").read_text())["services"].items():
        if name not in ("server", "triton", *CANNOT_BE_MADE):
            make_stand_in(engine, name, image_of(service))


def image_of(service: dict[str, Any]) -> str:
    """The image that compose.yaml has for a service where the settings name no other."""
    (image,) = re.findall(r"^\$\{\w+:-(.+)\}$", service["image"])
    return str(image)


@pytest.fixture(scope="module")
def stack(images: None, engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """PostgreSQL, S3 and MLflow, up from nothing; for all tests of this file."""
    stack = Stack(tmp_path_factory.mktemp("compose") / "services", engine)
    stack.up()
    yield stack
    stack.remove()


def log_run(client: MlflowClient, experiment: str, folder: Path) -> tuple[str, bytes]:
    """A run with a metric and a file; its id and the file's bytes."""
    run = client.create_run(client.create_experiment(experiment), run_name=experiment)
    content = os.urandom(9 * 2**20)  # sent to S3 in parts
    (folder / "weights.bin").write_bytes(content)
    client.log_metric(run.info.run_id, "loss", 0.25, step=3)
    client.log_artifact(run.info.run_id, str(folder / "weights.bin"), "model")
    client.set_terminated(run.info.run_id)
    return run.info.run_id, content


def check_run(client: MlflowClient, run_id: str, content: bytes) -> None:
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.25})
    assert Path(client.download_artifacts(run_id, "model/weights.bin")).read_bytes() == content


def test_up_from_nothing(stack: Stack) -> None:
    assert re.findall(r"^(\w+) is up$", stack.said, re.MULTILINE)[-1] == "server"
    assert stat.S_IMODE((stack.folder / ".env").stat().st_mode) == 0o600
    containers = stack.containers()
    assert containers.keys() == {"postgresql", "s3", "server"}
    for one in containers.values():
        host = one["HostConfig"]
        assert one["State"]["Health"]["Status"] == "healthy"
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["Memory"] > 0
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
    host = containers["server"]["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"]) == (True, ["ALL"])
    uids = {name: Path(f"/proc/{one['State']['Pid']}/status").read_text() for name, one in containers.items()}
    assert all(re.search(r"^Uid:\s+(?!0\b)", text, re.MULTILINE) for text in uids.values())


def test_only_the_server_and_s3_are_reached_from_this_machine_and_from_no_other(stack: Stack) -> None:
    bound = {name: one["HostConfig"]["PortBindings"] or {} for name, one in stack.containers().items()}
    ports = [(name, port["HostIp"]) for name, binding in bound.items() for each in binding.values() for port in each]
    assert sorted(ports) == [("s3", "127.0.0.1"), ("server", "127.0.0.1")]
    # Of the S3 server's many ports the server reaches the one that asks for signatures.
    code = "import socket, sys\nfor port in sys.argv[1:]: print(socket.socket().connect_ex(('s3', int(port))) == 0)"
    ports = ["8333", "8888", "18888", "9333", "19333", "8080", "18080"]
    assert stack.run("exec", "-T", "server", "python", "-c", code, *ports).stdout.split() == ["True"] + ["False"] * 6


def test_a_run_outlives_the_containers(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = stack.sign_in(monkeypatch)
    run_id, content = log_run(client, "заметки 笔记 🚀", tmp_path)
    check_run(client, run_id, content)
    secrets = (stack.folder / ".env").read_bytes()
    assert stack.run("down").returncode == 0
    assert stack.containers() == {}
    stack.up()
    assert (stack.folder / ".env").read_bytes() == secrets
    check_run(client, run_id, content)


def lose_everything_and_restore(stack: Stack) -> None:
    done = stack.run("backup", script="backup.py")
    assert done.returncode == 0, done.stdout + done.stderr
    (backup,) = (stack.folder / "backups").iterdir()
    stack.remove()
    stack.up()
    # It is refused where anything is left.
    done = stack.run("restore", str(backup), script="backup.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_backup_brings_everything_back(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = stack.sign_in(monkeypatch)
    run_id, content = log_run(client, "kept", tmp_path)
    lose_everything_and_restore(stack)
    check_run(client, run_id, content)


def test_nobody_gets_in_without_a_password(stack: Stack) -> None:
    address = f"http://127.0.0.1:{stack.given['MLFLOW_PORT']}/api/2.0/mlflow/experiments/search?max_results=1"
    admin = (stack.values["ADMIN_USERNAME"], stack.values["ADMIN_PASSWORD"])
    assert requests.get(address, auth=admin).status_code == 200
    assert requests.get(address).status_code == 401
    assert requests.get(address, auth=(admin[0], "wrong-password")).status_code == 401
    assert requests.get(address, auth=admin, headers={"Host": "elsewhere.example.org"}).status_code == 403


def test_a_killed_server_comes_back(stack: Stack) -> None:
    before = stack.containers()["server"]["State"]["StartedAt"]
    stack.run("exec", "-T", "server", "python", "-c", "import os; os.kill(-1, 9)")  # all but itself and init
    deadline = time.monotonic() + RESTART_S
    while (state := stack.containers()["server"]["State"])["StartedAt"] == before or state["Health"][
        "Status"
    ] != "healthy":
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_the_server_has_its_part_of_the_bucket_and_nothing_else(stack: Stack) -> None:
    admin, server = stack.s3("S3_ADMIN"), stack.s3("S3")
    bucket, prefix = stack.values["S3_BUCKET"], stack.values["S3_PREFIX"]
    admin.put_object(Bucket=bucket, Key="elsewhere", Body=b"secret")
    server.put_object(Bucket=bucket, Key=f"{prefix}/mine", Body=b"text")
    assert server.get_object(Bucket=bucket, Key=f"{prefix}/mine")["Body"].read() == b"text"
    for refused in (
        lambda: server.get_object(Bucket=bucket, Key="elsewhere"),
        lambda: server.delete_object(Bucket=bucket, Key="elsewhere"),
        lambda: server.list_objects_v2(Bucket=bucket),
        lambda: server.create_bucket(Bucket="another"),
        lambda: server.delete_bucket(Bucket=bucket),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            refused()
    assert requests.get(f"http://127.0.0.1:{stack.given['S3_PORT']}/{bucket}/elsewhere").status_code == 403


def test_no_secret_shows(stack: Stack) -> None:
    secrets = [value for name, value in stack.values.items() if name.endswith(("_PASSWORD", "_KEY"))]
    assert len(secrets) == 8
    image = stack.given["SERVER_IMAGE"]
    history = subprocess.run(["docker", "history", "--no-trunc", image], capture_output=True, text=True, check=True)
    shown = {
        "image": f"{stack.engine.inspect_image(image)}{history.stdout}",
        "logs": stack.run("logs", "--no-color").stdout,
        "up": stack.said,
    }
    watched, processes = (
        subprocess.Popen(
            [sys.executable, "compose.py", "up"],
            cwd=stack.folder,
            env={**os.environ, **stack.given},
            stdout=subprocess.DEVNULL,
        ),
        set(),
    )
    while watched.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                processes.add(path.read_bytes().decode(errors="replace"))
            except OSError:
                continue
        time.sleep(0.05)
    assert any("server.py" in one for one in processes)
    shown["processes"] = "\n".join(processes)
    assert [(where, name) for where, text in shown.items() for name in secrets if name in text] == []


def test_a_hole_in_the_servers_image_is_told(stack: Stack, advisories: Callable[..., str]) -> None:
    """By what is installed in it, also where no lock knows of it: pip comes with the base image."""
    image, asked = "mlflow-tracking-server-test:latest", set()
    url = advisories(lambda name: asked.add(name) or (hole(name) if name == "pip" else {}))
    code, lines = scan(url, PATH=os.environ["PATH"])
    assert (code, {"gunicorn", "mlflow", "psycopg2-binary"} - asked) == (1, set())
    (line,) = [line for line in lines if line.startswith(f"{image}: ")]
    assert re.fullmatch(rf"{image}: pip [\d.]+: GHSA-test, mended in 99.1", line)


def test_tls(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a certificate that the proxy signs, then with one that is given, then without."""
    stack.up(TLS="internal")
    client = stack.sign_in(monkeypatch)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"https://localhost:{stack.given['TLS_PORT']}"
    check_run(client, *log_run(client, "by TLS", tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    with pytest.raises(MlflowException, match="CERTIFICATE_VERIFY_FAILED"):
        client.search_experiments()

    files = {"tls.key": "-keyout", "tls.crt": "-out"}
    words = [word for name, option in files.items() for word in (option, str(tmp_path / name))]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [find("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *words],
        check=True,
        capture_output=True,
    )
    stack.up(TLS=str(tmp_path))
    with pytest.raises(MlflowException, match="CERTIFICATE_VERIFY_FAILED"):
        client.search_experiments()
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "tls.crt"))
    assert [one.name for one in client.search_experiments(filter_string="name LIKE 'by TLS'")] == ["by TLS"]

    stack.up()
    assert "proxy" not in stack.containers()


def test_prometheus_watches_a_service_with_a_token(stack: Stack, served_model: Path, tmp_path: Path) -> None:
    """All that watches listens on loopback, and ends when it is no longer asked for."""
    names = ("PROMETHEUS", "ALERTMANAGER", "PUSHGATEWAY", "NODE_EXPORTER")
    ports = {f"{name}_PORT": str(free_port()) for name in names}
    token = "a-token-of-the-tests"
    service = PredictionService(served_model, tmp_path, SERVING_TOKEN=token)
    config = stack.folder / "prometheus" / "prometheus.yml"
    config.write_text(config.read_text().replace("15s", "1s"))  # a shorter wait
    try:
        service.wait()
        targets = {"SERVING_TARGETS": f"127.0.0.1:{service.port}", "SERVING_TOKEN": token}
        stack.up(MONITORING="prometheus", **ports, **targets)
        watching = {"prometheus", "alertmanager", "pushgateway", "node-exporter"}
        containers = stack.containers()
        assert containers.keys() == {"postgresql", "s3", "server", *watching}
        for name in watching:
            host = containers[name]["HostConfig"]
            assert containers[name]["State"]["Health"]["Status"] == "healthy"
            assert (host["ReadonlyRootfs"], host["CapDrop"], host["Memory"] > 0) == (True, ["ALL"], True)
            status = Path(f"/proc/{containers[name]['State']['Pid']}/status").read_text()
            assert re.search(r"^Uid:\s+65534\b", status, re.MULTILINE)
        listening = subprocess.run([find("ss"), "-Hltn"], capture_output=True, text=True, check=True).stdout
        assert {line.split()[3] for line in listening.splitlines()} >= {f"127.0.0.1:{port}" for port in ports.values()}
        assert not re.search(rf"(\*|0\.0\.0\.0|\[::\]):({'|'.join(ports.values())})\s", listening)

        prometheus = f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}"
        assert f"Prometheus is up: {prometheus}" in stack.said
        jobs = {"serving", "pushgateway", "node", "alertmanager", "prometheus"}
        deadline = time.monotonic() + RESTART_S
        while {one["metric"]["job"] for one in ask_prometheus(prometheus, "up == 1")} != jobs:
            assert time.monotonic() < deadline, ask_prometheus(prometheus, "up")
            time.sleep(0.5)
        shown = requests.get(f"{prometheus}/api/v1/status/config").text + stack.run("logs", "--no-color").stdout
        assert token not in shown
    finally:
        service.kill()
    stack.up()
    assert stack.containers().keys() == {"postgresql", "s3", "server"}


def ask_prometheus(address: str, query: str) -> list[dict[str, Any]]:
    return list(requests.get(f"{address}/api/v1/query", {"query": query}).json()["data"]["result"])


def test_mariadb_with_clients_that_reach_s3(
    images: None, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack(tmp_path / "services", engine, DATABASE="mariadb", ARTIFACTS="direct")
    try:
        stack.up()
        client = stack.sign_in(monkeypatch)
        assert stack.containers().keys() == {"mariadb", "s3", "server"}
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{stack.given['S3_PORT']}")
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it would keep these keys for later tests
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", stack.values["S3_ACCESS_KEY"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", stack.values["S3_SECRET_KEY"])
        names = ["실험 😀", "실험 🚀", "заметки 笔记", "Заметки 笔记"]
        runs = [log_run(client, name, tmp_path) for name in names]
        assert {one.name for one in client.search_experiments()} == {"Default", *names}
        for name, (run_id, content) in zip(names, runs, strict=True):
            assert client.get_run(run_id).info.run_name == name
            assert client.get_run(run_id).info.artifact_uri.startswith("s3://mlflow/artifacts/")
            check_run(client, run_id, content)
        lose_everything_and_restore(stack)
        assert {one.name for one in client.search_experiments()} == {"Default", *names}
        check_run(client, *runs[0])
    finally:
        stack.remove()


def test_triton_serves_what_export_wrote(stack: Stack, served_model: Path, tmp_path: Path) -> None:
    """As long as the settings name a model repository."""
    check_that_it_runs()
    if PYTHON != "3.11":
        from conftest import missing

        missing(f"the packages for Triton's backend are those of Python {PYTHON}, the base image has Python 3.11")
    service = yaml.safe_load((SERVICES / "compose.yaml").read_text())["services"]["triton"]
    make_stand_in(stack.engine, "triton", image_of(service))
    to_repository(served_model, "classifier", tmp_path / "triton")
    ports = {name: str(free_port()) for name in ("TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT")}
    stack.up(TRITON_MODELS=str(tmp_path / "triton"), **ports)
    assert stack.containers()["triton"]["State"]["Health"]["Status"] == "healthy"
    images_NHWC = some_images(20)
    for protocol in ("http", "grpc"):
        url = f"127.0.0.1:{ports[f'TRITON_{protocol.upper()}_PORT']}"
        assert url in stack.said
        with Remote(url, protocol) as remote:
            logits_NK, _ = remote.infer(remote.model("classifier"), images_NHWC)
        np.testing.assert_allclose(logits_NK, expected_logits(served_model, images_NHWC), atol=1e-5)
    metrics = requests.get(f"http://127.0.0.1:{ports['TRITON_METRICS_PORT']}/metrics").text
    assert 'nv_inference_count{model="classifier",version="1"} 40\n' in metrics
    stack.up()
    assert stack.containers().keys() == {"postgresql", "s3", "server"}


def test_the_prediction_services_image_is_made_as_the_manual_says(base_image: str) -> None:
    """On the base image in place of the environment image, which is why the program can only say what it takes."""
    section = (ROOT / "docs/operations.md").read_text().split("## The prediction service on Kubernetes")[1]
    (command,) = re.findall(r"^docker build (--file .*) \.$", section, re.MULTILINE)
    image = "image-classifier-serving-test"
    words = re.sub(r"(?<=BASE=)\S+", base_image, re.sub(r"(?<=--tag )\S+", image, command)).split()
    subprocess.run(["docker", "build", *words, "."], cwd=ROOT, check=True, capture_output=True)
    run = ["docker", "run", "--rm", "--read-only", "--network=none", "--user=1000"]
    done = subprocess.run([*run, "--workdir=/tmp", image, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model_uri" in done.stdout
    listed = subprocess.run([*run, "--entrypoint=ls", image, "-A"], capture_output=True, text=True, check=True)
    there = set(listed.stdout.split()) - {"__pycache__"}
    assert there == {"serve.py", "data_loader", "models", "monitoring", "serving", "utils"}


def test_lost_settings_are_not_replaced(stack: Stack) -> None:
    """New passwords would not open the data."""
    (stack.folder / ".env").rename(stack.folder / "kept")
    done = stack.run("up")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: .*\.env is gone, .*{stack.project}_postgresql.*\n", done.stderr)
    assert not (stack.folder / ".env").exists()
    (stack.folder / "kept").rename(stack.folder / ".env")


@pytest.mark.parametrize(
    "said",
    [
        "programming external connectivity failed: Bind for 127.0.0.1:5000 failed: port is already allocated",
        "Error starting userland proxy: listen tcp4 127.0.0.1:5000: bind: address already in use",
        "failed to bind host port 127.0.0.1:5000/tcp: address already in use",
        "failed to bind host port for 127.0.0.1:5000:172.18.0.2:5000/tcp: address already in use",
    ],
)
def test_how_docker_says_that_a_port_is_taken(said: str) -> None:
    import compose

    assert (found := compose.PORT_TAKEN.search(said)) and found.groups() == ("127.0.0.1", "5000")


def test_a_port_that_is_taken(stack: Stack) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = stack.run("up", TLS="internal", TLS_PORT=str(port))
    assert done.returncode == 2
    assert re.fullmatch(rf"error: port {port} of 127\.0\.0\.1 is taken; .* set TLS_PORT in .*\.env\n", done.stderr)
    stack.up()


def test_without_docker_a_daemon_or_compose(stack: Stack, tmp_path: Path) -> None:
    assert_refused(stack.run("up", PATH="/nowhere"), 2, "there is no docker here")
    assert_refused(stack.run("up", DOCKER_HOST="unix:///nowhere"), 1, "Docker does not answer")
    (tmp_path / "docker").symlink_to(find("docker"))
    if not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("Docker has Compose as a plugin here, which no PATH hides")
    assert_refused(stack.run("up", PATH=str(tmp_path)), 2, "Docker has no Compose")


def assert_refused(done: subprocess.CompletedProcess[str], exit_code: int, words: str) -> None:
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert re.fullmatch(rf"error: {words}.*\n", done.stderr)


def test_an_interrupt_ends_it_in_a_line(stack: Stack) -> None:
    started = subprocess.Popen(
        [sys.executable, "compose.py", "up"],
        cwd=stack.folder,
        env={**os.environ, **stack.given},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout.readline().startswith("Building")
    os.killpg(started.pid, signal.SIGINT)
    _, error = started.communicate()
    assert (started.returncode, error) == (130, "stopped\n")
