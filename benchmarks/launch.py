"""How soon does a change of one line run in a container? Ours in Docker against stock MLflow's docker_env.

Both sides run the same trivial entry point in the same environment image, which is made before. Each round edits one
line of the project and then takes the time of `mlflow run` to the first line of the command's output and to its exit:
stock with `--build-image`, without which it would run no code at all; ours with `--backend docker`. They do so in a
bare folder, where nearly all the time is that of MLflow's own command, and in a working copy with its .venv beside the
code, as developers have it: stock copies that into the image. The last line has the ratio of the times to the exit in
the working copy; the goal is at most 0.6.

With TEST_KUBECONFIG, TEST_REGISTRY (where both push) and TEST_HOST (an address of this machine that pods can reach),
Kubernetes is compared too; stock needs kubernetes client 33 (STOCK_PYTHON: an interpreter that has it), and the goal is
at most 0.5. And `mlflow run --env-manager local` with the plugin may cost 0.1 s more than with its hook off; that is
measured in CPU seconds, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import kubernetes
import mlflow

from mlproject_backends.config import DOCKER, Config
from mlproject_backends.image import environment_image

MARK = "first line"
JOB = """\
apiVersion: batch/v1
kind: Job
metadata: {name: "{replaced with MLflow Project name}", namespace: NAMESPACE}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers:
        - name: "{replaced with MLflow Project name}"
          image: "{replaced with URI of Docker image created during Project execution}"
          command: ["{replaced with MLflow Project entry point command}"]
"""


@dataclass(frozen=True)
class Side:
    """A project folder and the command that runs it."""

    name: str
    folder: Path
    command: list[str]
    environment: dict[str, str]

    def launch(self, number: int) -> tuple[float, float]:
        """Edit a line, run, and return the seconds to the first line of output and to the exit."""
        (self.folder / "say.py").write_text(f'print("{MARK} {number}", flush=True)\n')
        start = time.perf_counter()
        process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines, first = [], None
        for line in process.stdout:
            lines.append(line)
            # Stock Kubernetes shows no output at all.
            if first is None and line.startswith(f"{MARK} {number}"):
                first = time.perf_counter() - start
        if process.wait() != 0:
            sys.exit(f"error: {self.name} failed:\n{''.join(lines[-20:])}")
        total = time.perf_counter() - start
        return first or total, total


def remove_stock_images() -> None:
    """Stock keeps the image of every launch: a copy of the project each."""
    with contextlib.closing(docker.from_env().api) as engine:
        for image in engine.images("launch"):
            engine.remove_image(image["Id"], force=True)


def make_project(folder: Path, environment: str) -> Path:
    folder.mkdir()
    (folder / "MLproject").write_text(
        f"name: launch\n{environment}\nentry_points:\n  main: {{command: python say.py}}\n"
    )
    (folder / "python_env.yaml").write_text('python: "3.11"\n')
    return folder


def compare(ours: Side, other: Side, rounds: int) -> tuple[float, float, float]:
    """Alternate the two; print the medians. The ratio of the times to the exit, and both times."""
    times: dict[str, list[tuple[float, float]]] = {ours.name: [], other.name: []}
    for number in range(rounds + 1):
        for side in (ours, other):
            measured = side.launch(number)
            remove_stock_images()
            if number:  # the first is for caches
                times[side.name].append(measured)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    for name, (first, total) in medians.items():
        print(f"{name}: first line after {first:.1f} s, exit after {total:.1f} s")
    a, b = medians[ours.name][1], medians[other.name][1]
    return a / b, a, b


def add_virtual_environment(folder: Path) -> None:
    """What a developer has beside the code: an environment with the one dependency of the project."""
    venv.create(folder / ".venv", with_pip=True)
    pip = [str(folder / ".venv/bin/python"), "-m", "pip", "install", "--quiet", f"mlflow-skinny=={mlflow.__version__}"]
    subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)


def in_docker(work: Path, image: str, rounds: int) -> tuple[float, float, float]:
    run = [sys.executable, "-m", "mlflow", "run", "."]
    ours = make_project(work / "ours", "python_env: python_env.yaml")
    stock = make_project(work / "stock", f"docker_env: {{image: {json.dumps(image)}}}")
    config = json.dumps({"image": image})
    sides = (
        Side("ours in Docker", ours, [*run, "--backend", "docker", "--backend-config", config], {}),
        Side("stock docker_env --build-image", stock, [*run, "--build-image"], {"MLPROJECT_BACKENDS_ALIAS": "0"}),
    )
    print("a bare folder")
    ratio, a, b = compare(*sides, rounds)
    print(f"ratio in a bare folder: {ratio:.2f} (ours {a:.1f}, other {b:.1f})")
    print("a working copy with its .venv")
    for side in sides:
        add_virtual_environment(side.folder)
    return compare(*sides, rounds)


def on_kubernetes(work: Path, image: str, rounds: int) -> tuple[float, float, float]:
    registry, stock_python = os.environ["TEST_REGISTRY"], os.environ.get("STOCK_PYTHON", sys.executable)
    ours = make_project(work / "ours-kubernetes", "python_env: python_env.yaml")
    stock = make_project(work / "stock-kubernetes", f"docker_env: {{image: {json.dumps(image)}}}")
    _, context = kubernetes.config.list_kube_config_contexts(os.environ["TEST_KUBECONFIG"])
    (stock / "job.yaml").write_text(JOB.replace("NAMESPACE", context["context"].get("namespace", "default")))
    config = {"repository-uri": f"{registry}/launch-ours"}
    stock_config = {"kube-job-template-path": "job.yaml", "repository-uri": f"{registry}/launch"}
    run = ["-m", "mlflow", "run", ".", "--backend", "kubernetes"]
    with tracking_server(work / "server", os.environ["TEST_HOST"]) as uri:
        shared = {"KUBECONFIG": os.environ["TEST_KUBECONFIG"], "MLFLOW_TRACKING_URI": uri}
        return compare(
            Side("ours on Kubernetes", ours, [sys.executable, *run, "--backend-config", json.dumps(config)], shared),
            Side(
                "stock Kubernetes",
                stock,
                [stock_python, *run, "--build-image", "--backend-config", json.dumps(stock_config)],
                {**shared, "MLPROJECT_BACKENDS_ALIAS": "0"},
            ),
            rounds,
        )


@contextlib.contextmanager
def tracking_server(folder: Path, host: str) -> Iterator[str]:
    """A server that pods can reach at `host`; its address."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind((host, 0))
        uri = f"http://{host}:{probe.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        host,
        "--port",
        uri.rpartition(":")[2],
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            time.sleep(0.1)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def cost_of_the_hook(work: Path, rounds: int) -> float:
    """CPU seconds that `mlflow run --env-manager local` takes more with the plugin's hook than without.

    The least of each side: what else the machine does only adds to them.
    """
    folder = make_project(work / "local", "python_env: python_env.yaml")
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local"]
    sides = Side("with", folder, command, {}), Side("without", folder, command, {"MLPROJECT_BACKENDS_ALIAS": "0"})
    pairs = [[cpu_s(side, number) for side in sides] for number in range(rounds + 1)][1:]
    ours, other = map(min, zip(*pairs, strict=True))
    return ours - other


def cpu_s(side: Side, number: int) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    side.launch(number)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of launches (default: 5)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="launch-") as name:
        work = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work}/mlflow.db"
        project = make_project(work / "environment", "python_env: python_env.yaml")
        image = environment_image(project, project / "python_env.yaml", "python_env", Config(DOCKER), print, push=False)
        print(f"the hook costs {cost_of_the_hook(work, rounds):+.2f} s of CPU in a local run (goal: at most 0.1)")
        if os.environ.get("TEST_KUBECONFIG"):
            ratio, ours, other = on_kubernetes(work, image, rounds)
            print(f"Kubernetes ratio: {ratio:.2f} (ours {ours:.1f}, other {other:.1f})")
        ratio, ours, other = in_docker(work, image, rounds)
    print(f"ratio: {ratio:.2f} (ours {ours:.1f}, other {other:.1f})")


if __name__ == "__main__":
    main()
