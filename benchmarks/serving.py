"""Requests a second and 99th percentile of our service against `mlflow models serve` and MLServer, same model and body.

    python benchmarks/serving.py
    python benchmarks/serving.py --sweep

All servers run at once on this machine and are asked in turns, by wrk with 8 connections, one 32x32 image a request;
medians over the turns. MLServer gets an environment of its own (uv) and calls ONNX Runtime itself, in its own process
(`parallel_workers: 0`), without adaptive batching: of its settings the fastest, as `--sweep` shows. Ours runs with its
defaults, and once more with a process for each core. Beside them: our binary protocol, and ONNX Runtime in this
process, which is what nobody can pass.

Goals: 10 times `mlflow models serve`; 4 times MLServer, with a lower 99th percentile. The last line has both in their
fastest settings: ours with a process for each core (`workers`), MLServer, which more processes make slower, with one.
The comparison before it has one process each. Only an idle machine has room for a process of ours on each core.

`--sweep` prints the table of docs/serving-report.md instead: our service and MLServer, each with other settings.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
import onnxruntime
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.networks import build
from models.onnx_export import to_onnx
from utils.artifacts import log_onnx_model

ROOT = Path(__file__).resolve().parents[1]
SHAPE, CLASSES = (32, 32, 3), tuple("0123456789")
MLSERVER = "1.7.1"
CONNECTIONS, SECONDS, TURNS = 8, 2, 11
SWEEP_CONNECTIONS, SWEEP_SECONDS, SWEEP_TURNS = (8, 64), 2, 3
OURS = (
    "",
    "--max_delay_us=0",
    "--max_delay_us=1000",
    "--max_batch=1",
    "--max_batch=8",
    "--threads=2",
    "--workers=2",
)
THEIRS: dict[str, dict[str, float]] = {
    "parallel_workers: 0": {"parallel_workers": 0},
    "parallel_workers: 1 (its default)": {"parallel_workers": 1},
    "parallel_workers: 2": {"parallel_workers": 2},
    "parallel_workers: 0, batches of 8 in 1 ms": {"parallel_workers": 0, "max_batch_size": 8, "max_batch_time": 0.001},
}
PATIENCE_S = 120

MLSERVER_RUNTIME = """
import numpy, onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

class Classifier(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0])
        logits = self.session.run(None, {"images": images})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])
"""

WRK_SCRIPT = """
wrk.method, wrk.path = "POST", "{path}"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()
{headers}
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("\\nRESULT %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass
class Side:
    """A server and the request that it gets."""

    name: str
    port: int
    path: str
    body: bytes
    headers: dict[str, str]
    server: psutil.Process
    rates: list[float] = field(default_factory=list)
    """Requests a second, turn by turn."""
    p99s_ms: list[float] = field(default_factory=list)
    costs_us: list[float] = field(default_factory=list)
    """Processor time of the server and its children for a request: hardly changed by what else the machine does."""

    @property
    def rate(self) -> float:
        """Requests a second, the median."""
        return statistics.median(self.rates)

    @property
    def p99_ms(self) -> float:
        """99th percentile of the latency, the median of the turns'."""
        return statistics.median(self.p99s_ms)


def main() -> None:
    """Make a model, start the servers, ask them in turns, print the ratios."""
    for program in ("wrk", "uv"):
        if not shutil.which(program, path=search_path()):
            sys.exit(f"error: {program} is needed (Debian: apt-get install wrk; uv is in requirements-dev.lock)")
    with TemporaryDirectory() as scratch, ExitStack() as servers:
        folder = Path(scratch)
        model, uri = make_model(folder)
        image_NHWC = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), np.uint8)
        ports = [free_port() for _ in range(4)]
        processes = [
            servers.enter_context(mlflow_server(uri, ports[0])),
            servers.enter_context(mlserver(model, ports[1], folder, mlserver_environment(folder))),
            servers.enter_context(our_server(model, ports[2])),
            servers.enter_context(our_server(model, ports[3], f"--workers={os.cpu_count()}")),
        ]
        sides = requests(image_NHWC, *zip(ports, processes, strict=True))
        for side in sides.values():
            wait_for(side)
            ask(side, folder, seconds=1)
        for _ in range(TURNS):
            for side in sides.values():
                measure(side, folder, SECONDS)
        alone = {batch: in_process(model, batch) for batch in (1, 64)}
    for side in sides.values():
        cost_us = statistics.median(side.costs_us)
        print(
            f"{side.name}: {side.rate:,.0f} requests/s, p99 {side.p99_ms:.1f} ms, {cost_us:,.0f} us of processor each"
        )
    for batch, rate in alone.items():
        print(f"ONNX Runtime in process, batch {batch}: {rate:,.0f} images/s")
    print(f"load average of the last minute on {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}")
    show("against mlflow models serve, MLflow's protocol (goal 10)", sides["ours, MLflow"], sides["mlflow"])
    against = "against MLServer, inference protocol, JSON (goal 4)"
    show(f"{against}, one process each", sides["ours, v2"], sides["MLServer"])
    show(f"{against}, each in its fastest setting", sides["ours, all cores"], sides["MLServer"])


def sweep() -> None:
    """Start every variant, ask them in turns with few and with many connections, print a table in Markdown."""
    with TemporaryDirectory() as scratch, ExitStack() as servers:
        folder = Path(scratch)
        model, _ = make_model(folder)
        image_NHWC = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), np.uint8)
        sides: dict[int, list[Side]] = {connections: [] for connections in SWEEP_CONNECTIONS}

        def add(name: str, port: int, process: psutil.Process) -> None:
            for each in sides.values():
                each.append(replace(requests(image_NHWC, *[(port, process)] * 4)["ours, v2"], name=name))
                each[-1].rates, each[-1].p99s_ms, each[-1].costs_us = [], [], []

        for flag in OURS:
            port = free_port()
            name = f"ours, {flag.removeprefix('--') or 'defaults'}"
            add(name, port, servers.enter_context(our_server(model, port, *filter(None, [flag]))))
        environment = mlserver_environment(folder)
        for name, settings in THEIRS.items():
            port = free_port()
            process = servers.enter_context(mlserver(model, port, folder, environment, **settings))
            add(f"MLServer, {name}", port, process)
        for connections, each in sides.items():
            for side in each:
                wait_for(side)
                ask(side, folder, seconds=1, connections=connections)
        for _ in range(SWEEP_TURNS):
            for connections, each in sides.items():
                for side in each:
                    measure(side, folder, SWEEP_SECONDS, connections)
    head = [f"{connections} connections: requests/s | spread | p99 ms | us each" for connections in sides]
    print(f"| settings | {' | '.join(head)} |")
    print("|---" + "|--:" * 4 * len(sides) + "|")
    for pair in zip(*sides.values(), strict=True):
        cells = [
            f"{side.rate:,.0f} | {min(side.rates):,.0f} to {max(side.rates):,.0f} | {side.p99_ms:.1f} | "
            f"{statistics.median(side.costs_us):,.0f}"
            for side in pair
        ]
        print(f"| {pair[0].name} | {' | '.join(cells)} |")
    print(f"load average of the last minute on {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}")


def measure(side: Side, folder: Path, seconds: int, connections: int = CONNECTIONS) -> None:
    """One turn of load on a server, noted on its side."""
    before_s = cpu_s(side.server)
    count, rate, p99_ms = ask(side, folder, seconds, connections)
    side.rates.append(rate)
    side.p99s_ms.append(p99_ms)
    side.costs_us.append((cpu_s(side.server) - before_s) / count * 1e6)


def requests(image_NHWC: np.ndarray, *servers: tuple[int, psutil.Process]) -> dict[str, Side]:
    """The same image in every protocol, for the ports and processes of MLflow, MLServer, ours and ours on all cores."""
    (mlflow_port, mlflow_process), (mlserver_port, mlserver_process), (our_port, ours), (many_port, many) = servers
    tensor = {"name": "images", "shape": list(image_NHWC.shape), "datatype": "UINT8"}
    scoring = json.dumps({"inputs": image_NHWC.tolist()}).encode()
    inference = json.dumps({"inputs": [{**tensor, "data": image_NHWC.ravel().tolist()}]}).encode()
    raw = image_NHWC.tobytes()
    head = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
        "parameters": {"binary_data_output": True},
    }
    binary = json.dumps(head).encode()
    as_json = {"Content-Type": "application/json"}
    as_bytes = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(binary))}
    infer = "/v2/models/classifier/infer"
    return {  # in this order they are asked: what is compared comes one after the other
        "mlflow": Side("mlflow models serve", mlflow_port, "/invocations", scoring, as_json, mlflow_process),
        "ours, MLflow": Side("ours, MLflow's protocol", our_port, "/invocations", scoring, as_json, ours),
        "MLServer": Side(f"MLServer {MLSERVER}", mlserver_port, infer, inference, as_json, mlserver_process),
        "ours, v2": Side("ours, inference protocol, JSON", our_port, infer, inference, as_json, ours),
        "ours, all cores": Side("ours, JSON, all cores", many_port, infer, inference, as_json, many),
        "ours, binary": Side("ours, inference protocol, binary", our_port, infer, binary + raw, as_bytes, ours),
    }


def make_model(folder: Path) -> tuple[Path, str]:
    """The default network with random weights as an ONNX file, and the URI of the same file logged in MLflow."""
    torch.manual_seed(0)
    path = folder / "model.onnx"
    to_onnx(build("cnn", SHAPE, len(CLASSES), [120.0] * 3, [70.0] * 3), SHAPE, CLASSES, path)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("benchmark", str(folder / "artifacts")))
    with mlflow.start_run() as run:
        return path, log_onnx_model(run.info.run_id, path, np.zeros((1, *SHAPE), np.uint8))


def our_server(model: Path, port: int, *flags: str) -> AbstractContextManager[psutil.Process]:
    """`serve` with its defaults but for the flags."""
    return started([sys.executable, str(ROOT / "serve.py"), f"--model_uri={model}", f"--port={port}", *flags])


def mlflow_server(uri: str, port: int) -> AbstractContextManager[psutil.Process]:
    """`mlflow models serve` in this environment."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri, "--port", str(port)]
    return started([*command, "--env-manager", "local"])


def mlserver_environment(folder: Path) -> Path:
    """MLServer's own environment, with our release of ONNX Runtime."""
    environment = folder / "mlserver"
    uv = str(shutil.which("uv", path=search_path()))
    subprocess.run([uv, "venv", "--quiet", "--python", "3.11", environment], check=True)
    # Its worker processes do not start with a later uvloop ("There is no current event loop").
    packages = [f"mlserver=={MLSERVER}", f"onnxruntime=={version('onnxruntime')}", "uvloop<0.22"]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", environment / "bin/python", *packages], check=True)
    return environment


def mlserver(
    model: Path, port: int, folder: Path, environment: Path, parallel_workers: float = 0, **batching: float
) -> AbstractContextManager[psutil.Process]:
    """MLServer with a runtime of a few lines over ONNX Runtime."""
    project = folder / f"mlserver-{port}"
    project.mkdir()
    (project / "runtime.py").write_text(MLSERVER_RUNTIME)
    settings = {"name": "classifier", "implementation": "runtime.Classifier", "parameters": {"uri": str(model)}}
    (project / "model-settings.json").write_text(json.dumps({**settings, **batching}))
    ports = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    server = {"host": "127.0.0.1", "parallel_workers": parallel_workers, **ports}
    (project / "settings.json").write_text(json.dumps(server))
    return started([str(environment / "bin/mlserver"), "start", str(project)], cwd=project)


@contextmanager
def started(command: list[str], cwd: Path | None = None) -> Iterator[psutil.Process]:
    """A server with what it starts, quiet, ended with the block."""
    environment = {**os.environ, "PATH": search_path(), "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(side: Side) -> None:
    """Until the server answers this request."""
    deadline = time.monotonic() + PATIENCE_S
    request = urllib.request.Request(f"http://127.0.0.1:{side.port}{side.path}", side.body, side.headers)
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"error: {side.name} did not answer within {PATIENCE_S} s: {error}")
            time.sleep(0.3)


def cpu_s(process: psutil.Process) -> float:
    """Processor time of a process and its children."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def ask(side: Side, folder: Path, seconds: int, connections: int = CONNECTIONS) -> tuple[int, float, float]:
    """Requests, requests a second and the 99th percentile in ms of `seconds` of load; any error ends the benchmark."""
    body, script = folder / "body", folder / "wrk.lua"
    body.write_bytes(side.body)
    headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in side.headers.items())
    script.write_text(WRK_SCRIPT.format(path=side.path, body=body, headers=headers))
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
        "-s",
        str(script),
        f"http://127.0.0.1:{side.port}",
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count, duration_us, p99_us, errors = map(int, output.split("RESULT ")[1].split())
    if errors:
        sys.exit(f"error: {errors} of {count} requests to {side.name} failed")
    return count, count / duration_us * 1e6, p99_us / 1e3


def in_process(model: Path, batch: int) -> float:
    """Images a second of ONNX Runtime with one thread and nothing around it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    images_NHWC = np.zeros((batch, *SHAPE), np.uint8)
    rates = []
    for _ in range(TURNS):
        started_s, images = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started_s) < 1:
            session.run(None, {"images": images_NHWC})
            images += batch
        rates.append(images / seconds)
    return statistics.median(rates)


def show(what: str, ours: Side, other: Side) -> None:
    """One comparison."""
    ratio = statistics.median(our / their for our, their in zip(ours.rates, other.rates, strict=True))
    print(
        f"{what}; p99 {ours.p99_ms:.1f} ms against {other.p99_ms:.1f} ms:\n"
        f"ratio: {ratio:.2f} (ours {ours.rate:.0f} requests/s, other {other.rate:.0f} requests/s)",
        flush=True,
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def search_path() -> str:
    """PATH with this environment's programs first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


if __name__ == "__main__":
    sweep() if sys.argv[1:] == ["--sweep"] else main()
