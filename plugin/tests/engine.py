"""Docker for tests: an engine, a second one that may be stopped, a base image, a registry, an image that runs jobs."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
from docker.utils import kwargs_from_env

from local_ports import free_port

BASE_IMAGE = "python:3.11-slim-bookworm"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlproject-backends-tests"


def pytest_configure(config: pytest.Config) -> None:
    # Docker's SDK leaves a socket open that could not connect; one that was connected has an address more.
    config.addinivalue_line("filterwarnings", r"ignore:unclosed <socket.socket fd=\d+, family=1, type=1, proto=0>")


class Daemon:
    """A Docker engine of its own: its images and containers lie in `folder`, and nothing else uses it."""

    def __init__(self, folder: Path, *options: str, wrapper: tuple[str, ...] = ()):
        self.folder = folder
        self._wrapper = wrapper
        self.host = f"unix://{folder}/docker.sock"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it and wait until it answers; `options` go to dockerd this time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [*self._wrapper, "dockerd", "--host", self.host, "--pidfile", f"{self.folder}/dockerd.pid"]
        command += ["--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec"]
        with (self.folder / "dockerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options, *options], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.client().close()
                return
            except docker.errors.DockerException:
                time.sleep(0.1)
        raise RuntimeError("dockerd does not start: " + (self.folder / "dockerd.log").read_text()[-2000:])

    def another(self, name: str) -> "Daemon":
        """A further engine under this one's folder, kept apart in the same way."""
        return Daemon(self.folder / name, *self._options, wrapper=self._wrapper)

    def client(self) -> Any:
        return docker.APIClient(self.host, version="auto")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it: by SIGTERM as a service manager does, or by SIGKILL as a crash would."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=60)
            self._process = None
            # Killed, it takes its containerd along; the next one must not wait for that in vain.
            (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)


def _daemon(folder: Path, *options: str, wrapper: tuple[str, ...] = ()) -> Daemon:
    from conftest import missing

    if os.getuid() != 0 or not shutil.which("dockerd"):
        missing("only root can start a Docker engine, and only where dockerd is installed (Debian: docker.io)")
    return Daemon(folder, *options, wrapper=wrapper)


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """A client of the engine that answers here, else of one that is started for the tests; DOCKER_HOST names it."""
    try:
        client = docker.APIClient(version="auto", **kwargs_from_env())
    except docker.errors.DockerException:
        daemon = _daemon(CACHE / "docker")
        daemon.start()
        with pytest.MonkeyPatch.context() as patch, closing(daemon.client()) as client:
            patch.setenv("DOCKER_HOST", daemon.host)
            yield client
        daemon.stop()
    else:
        with closing(client):
            yield client


@pytest.fixture(scope="session")
def base_image(engine: Any) -> str:
    """The base image of the Dockerfiles; made from Debian's packages where it is not there (half a minute)."""
    from conftest import missing

    try:
        engine.inspect_image(BASE_IMAGE)
    except docker.errors.ImageNotFound:
        if os.getuid() != 0 or not (shutil.which("mmdebstrap") and shutil.which("docker")):
            missing(f"there is no image {BASE_IMAGE}, and root, mmdebstrap and docker are needed to make one")
        subprocess.run([Path(__file__).with_name("base_image.sh"), BASE_IMAGE], check=True)
    return BASE_IMAGE


@pytest.fixture(scope="session")
def job_image(engine: Any, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image that can run any job: the base image and mlflow-skinny, as the plugin makes it for a project."""
    from mlproject_backends.config import Config
    from mlproject_backends.image import environment_image

    project = tmp_path_factory.mktemp("job-image") / "mlproject-tests"
    project.mkdir()
    env_file = project / "python_env.yaml"
    env_file.write_text('python: "3.11"\n')
    return environment_image(project, env_file, "python_env", Config("docker"), print, push=False)


@pytest.fixture(scope="session")
def private_engine(engine: Any, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A second engine that has the base image and may be stopped and started.

    It has a network namespace to itself: an engine with `--bridge=none` would remove the first one's bridge.
    """
    folder = tmp_path_factory.mktemp("engine")
    options = ["--containerd-namespace=mlproject-tests", "--containerd-plugins-namespace=mlproject-tests-plugins"]
    daemon = _daemon(folder, *options, wrapper=("unshare", "--net"))
    daemon.start()
    with closing(daemon.client()) as client:
        list(client.load_image(engine.get_image(base_image)))  # until it is done
    yield daemon
    daemon.stop()
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        if (path := mount.split()[1]).startswith(f"{folder}/"):  # an engine keeps its network namespaces mounted
            subprocess.run(["umount", "--lazy", path], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real image registry on this machine, empty at first."""
    with serve_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@contextmanager
def serve_registry(folder: Path, more: str = "") -> Iterator[str]:
    """host:port of a registry that keeps its images in `folder`; `more` are further lines of its configuration."""
    from conftest import missing

    program = shutil.which("docker-registry")
    if not program:
        missing("there is no docker-registry (Debian: docker-registry)")
    address = f"127.0.0.1:{free_port()}"
    (folder / "config.yml").write_text(
        f"version: 0.1\nhttp: {{addr: {address}}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n{more}"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        _wait_for_port(address, process, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait()


def _wait_for_port(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{address} does not answer: {log.read_text()[-2000:]}")
