"""`mlflow run --env-manager local | uv | virtualenv | conda` gives the same run from the one conda.yaml.

MLflow's own code makes each environment in full (5.4 GB, removed after its run). Two things it would
fetch from elsewhere are offered here: pyenv's Python (pyenv_shim.py) and conda with its channel
(conda_front_end.py and conda_channel.py). TEST_CONDA_HOME=/path/to/miniforge3 puts a real conda in the place
of the front end.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import conda_front_end
import pyenv_shim
import pytest
from conftest import missing
from mlflow import MlflowClient
from mlflow.entities import FileInfo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = ["-P", "epochs=2"]
# Durations, rates and the machine's load differ between two runs of the same program.
CLOCKED = ("seconds", "images_per_s", "system/")


@dataclass(frozen=True)
class Outcome:
    """What has to be equal: everything a run logged, without ids and times. `files`: of the run and its model."""

    weights_sha256: str
    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    files: list[str]


def walk(listing: Callable[[str | None], list[FileInfo]], folder: str | None = None) -> Iterator[str]:
    for entry in listing(folder):
        if entry.is_dir:
            yield from walk(listing, entry.path)
        else:
            yield entry.path


def outcome(client: MlflowClient, experiment_id: str) -> Outcome:
    (run,) = client.search_runs([experiment_id])
    assert run.info.status == "FINISHED"
    (model,) = run.outputs.model_outputs
    run_files = walk(partial(client.list_artifacts, run.info.run_id))
    model_files = walk(partial(client.list_logged_model_artifacts, model.model_id))
    names = [name for name in run.data.metrics if not any(word in name for word in CLOCKED)]
    return Outcome(
        weights_sha256=run.data.tags["weights_sha256"],
        params=run.data.params,
        metrics={
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in sorted(names)
        },
        files=[*sorted(run_files), *(f"model/{name}" for name in sorted(model_files))],
    )


@dataclass(frozen=True)
class Bench:
    """One tracking store, and one download of everything that is locked, for all cases."""

    folder: Path
    wheels: Path
    client: MlflowClient

    def run(self, manager: str, path: tuple[Path, ...] = (), **variables: str) -> Outcome:
        """Run the project under `manager` in an environment made new for it, and remove that environment."""
        scratch = self.folder / manager
        experiment = self.client.create_experiment(manager, (scratch / "artifacts").as_uri())
        environment = {
            **{name: value for name, value in os.environ.items() if name not in HIDDEN},
            "PATH": os.pathsep.join([*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "MLFLOW_TRACKING_URI": self.client.tracking_uri,
            # uv and virtualenv name an environment alike: without roots of their own they would share one.
            "MLFLOW_ENV_ROOT": str(scratch / "envs"),
            # The lock's files are all that may be installed: with no index, a missing pin would fail.
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
            "PIP_NO_COMPILE": "1",
            "UV_NO_INDEX": "1",
            "UV_FIND_LINKS": self.wheels.as_uri(),
            "UV_CACHE_DIR": str(scratch / "envs/uv-cache"),
            **variables,
        }
        command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", manager]
        command += ["--experiment-id", experiment, *PARAMETERS]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        finally:
            shutil.rmtree(scratch / "envs", ignore_errors=True)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return outcome(self.client, experiment)


# What would tell MLflow or pip that they are inside a test, or inside another environment.
HIDDEN = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "VIRTUAL_ENV", "CONDA_EXE", "CONDA_PREFIX", "PYTHONPATH"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("managers")
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(wheels), "--requirement", str(ROOT / "requirements.lock")]
    subprocess.run(command, check=True)
    yield Bench(folder, wheels, MlflowClient(f"sqlite:///{folder}/mlflow.db"))
    shutil.rmtree(wheels)


@pytest.fixture(scope="module")
def local(bench: Bench) -> Outcome:
    return bench.run("local")


def assert_same(got: Outcome, local: Outcome) -> None:
    assert local.weights_sha256 and local.metrics["test/accuracy"] and "model/model.onnx" in local.files
    assert asdict(got) == asdict(local)


def test_uv_trains_what_local_trains(bench: Bench, local: Outcome) -> None:
    if not shutil.which("uv", path=str(Path(sys.executable).parent)):
        missing("uv is not in this environment (make .venv/installed-dev)")
    assert_same(bench.run("uv"), local)


def test_virtualenv_trains_what_local_trains(bench: Bench, local: Outcome) -> None:
    needs_python_3_11()
    if not importlib.util.find_spec("ensurepip"):
        missing("ensurepip is not here, and `python -m venv` needs it (Debian: apt-get install python3-venv)")
    root = bench.folder / "pyenv"
    pyenv_shim.make_root(root)
    assert_same(bench.run("virtualenv", path=(root / "bin",), PYENV_ROOT=str(root)), local)


def test_conda_trains_what_local_trains(bench: Bench, local: Outcome) -> None:
    needs_python_3_11()
    if not importlib.util.find_spec("rattler"):
        missing("py-rattler is not in this environment (make .venv/installed-dev)")
    from conda_channel import make_channel

    make_channel(bench.folder / "channels/conda-forge")
    home = os.environ.get("TEST_CONDA_HOME")
    if not home:
        home = str(bench.folder / "conda-home")
        conda_front_end.make_home(Path(home))
    got = bench.run(
        "conda",
        MLFLOW_CONDA_HOME=home,
        CONDA_ENVS_PATH=str(bench.folder / "conda/envs"),
        CONDA_PKGS_DIRS=str(bench.folder / "packages"),
        CONDA_CHANNEL_ALIAS=(bench.folder / "channels").as_uri(),
    )
    assert_same(got, local)


def needs_python_3_11() -> None:
    if sys.version_info[:2] != (3, 11):
        missing("the tests do not run on the Python 3.11 that conda.yaml asks for")
