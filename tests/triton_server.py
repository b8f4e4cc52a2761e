"""NVIDIA's Triton Inference Server for tests: the real program, from the wheel in tests/requirements.lock.

What reads config.pbtxt, puts batches together and speaks HTTP and gRPC is Triton. The wheel has no ONNX Runtime
backend, but Triton takes backends written in Python, and stand_ins/triton/onnxruntime/ is one under that name. So a
repository is served as it is; of Triton's own ONNX Runtime backend, and of its speed, nothing is tried.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from service_images import find
from services_stack import Part

WHEEL = Path(sys.prefix) / "triton"
SERVER, LIBRARIES = WHEEL / "pytriton" / "tritonserver", WHEEL / "nvidia_pytriton.libs"
PYTHON = sysconfig.get_python_version()
STUB = SERVER / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
BACKEND = Path(__file__).resolve().parent / "stand_ins" / "triton" / "onnxruntime"

Served = TypeVar("Served", bound=Part)


class Triton(Part):
    """Triton with all models of a repository."""

    def __init__(self, folder: Path, repository: Path):
        super().__init__(folder)
        self.repository = repository
        self.metrics_port, grpc_port = free_port(), free_port()
        self.urls = {"http": f"127.0.0.1:{self.port}", "grpc": f"127.0.0.1:{grpc_port}"}
        self._ports = {"http": self.port, "grpc": grpc_port, "metrics": self.metrics_port}

    def launch(self, log: Any) -> subprocess.Popen[bytes]:
        check_that_it_runs()
        # Copies: it refuses a backend behind a link.
        backends = self.folder / "backends"
        shutil.copytree(SERVER / "backends" / "python", backends / "python")
        shutil.copy(STUB, backends / "python")
        shutil.copytree(BACKEND, backends / "onnxruntime")
        command = [SERVER / "bin" / "tritonserver", f"--model-repository={self.repository}"]
        command += [f"--backend-directory={backends}", "--exit-timeout-secs=10"]
        for name, port in self._ports.items():
            command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)

    def answers(self) -> bool:
        self.reason = status_of(f"http://{self.urls['http']}/v2/health/ready")
        return self.reason == "200"

    def metric(self, name: str) -> float:
        """The sum of a counter's samples."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return sum(sample.value for family in families for sample in family.samples if sample.name == f"{name}_total")


class TokenProxy(Part):
    """Caddy before Triton, which asks nobody for a token, over HTTP and gRPC."""

    def __init__(self, folder: Path, triton: Triton, token: str):
        super().__init__(folder)
        self.urls = {"http": f"127.0.0.1:{self.port}", "grpc": f"127.0.0.1:{free_port()}"}
        sites = [
            f'http://{self.urls[protocol]} {{\n@known header authorization "Bearer {token}"\n'
            f"handle @known {{\nreverse_proxy {scheme}://{triton.urls[protocol]}\n}}\n"
            "handle {\nrespond 401\n}\n}\n"
            for protocol, scheme in (("http", "http"), ("grpc", "h2c"))
        ]
        head = "{\nadmin off\nservers {\nprotocols h1 h2c\n}\n}\n"
        (folder / "Caddyfile").write_text("".join([head, *sites]))

    def launch(self, log: Any) -> subprocess.Popen[bytes]:
        command = [find("caddy"), "run", "--config", str(self.folder / "Caddyfile"), "--adapter", "caddyfile"]
        home = {**os.environ, "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)}
        return subprocess.Popen(command, stdout=log, stderr=log, env=home, start_new_session=True)

    def answers(self) -> bool:
        self.reason = " ".join(status_of(f"http://{url}/") for url in self.urls.values())
        return self.reason == "401 401"


@contextmanager
def running(part: Served) -> Iterator[Served]:
    """Start it; it is ended with the block, as asked to: a killed Triton leaves shared memory behind."""
    try:
        part.start()
        yield part
    finally:
        part.stop()


def status_of(url: str) -> str:
    """What is answered to a GET: the status, or why there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return str(error.code)
    except OSError as error:
        return str(error)


def environment() -> dict[str, str]:
    """With this interpreter and its library first: the stub, which runs backends in Python, looks for them there."""
    libraries = [str(LIBRARIES), sysconfig.get_config_var("LIBDIR")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}


def check_that_it_runs() -> None:
    """Skip the test where it does not."""
    from conftest import missing

    if not STUB.exists():
        missing(f"there is no Triton for Python {PYTHON} in {WHEEL} (make .venv/installed-dev)")
    linked = subprocess.run(["ldd", STUB], capture_output=True, text=True, env=environment()).stdout
    if absent := [line.split()[0] for line in linked.splitlines() if line.endswith("not found")]:
        missing(f"there is no {absent[0]} for Triton (Debian: apt-get install libpython{PYTHON})")
