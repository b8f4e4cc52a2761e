"""`mlflow run --env-manager local | uv | virtualenv | conda` gives the same runs from the one conda.yaml.

Every entry point runs under each: the training first, then the others on its data and model. MLflow's own code makes
each environment in full (5.4 GB, removed after its runs). Two things it would fetch from elsewhere are offered here:
pyenv's Python (pyenv_shim.py) and conda with its channel (conda_front_end.py and conda_channel.py).
TEST_CONDA_HOME=/path/to/miniforge3 puts a real conda in the place of the front end.
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
from mlflow import MlflowClient
from mlflow.entities import FileInfo, Run
from PIL import Image
from sklearn.datasets import load_digits

from conftest import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = ("main", "load_data", "evaluate", "predict", "export")
# Durations, rates and the machine's load differ between two runs of the same program.
CLOCKED = ("seconds", "images_per_s", "system/")
# These have the run's id or a folder of the environment manager's own in them.
NAMED_ANEW = ("model_uri", "output")


@dataclass(frozen=True)
class Outcome:
    """What has to be equal: everything a run logged, without ids and times. `files`: of the run and its model."""

    weights_sha256: str | None
    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    files: list[str]


def walk(listing: Callable[[str | None], list[FileInfo]], folder: str | None = None) -> Iterator[str]:
    for entry in listing(folder):
        if entry.is_dir:
            yield from walk(listing, entry.path)
        else:
            yield entry.path


def outcome(client: MlflowClient, run: Run) -> Outcome:
    assert run.info.status == "FINISHED"
    files = sorted(walk(partial(client.list_artifacts, run.info.run_id)))
    for model in run.outputs.model_outputs:
        listing = partial(client.list_logged_model_artifacts, model.model_id)
        files += [f"model/{name}" for name in sorted(walk(listing))]
    names = [name for name in run.data.metrics if not any(word in name for word in CLOCKED)]
    return Outcome(
        weights_sha256=run.data.tags.get("weights_sha256"),
        params={name: value for name, value in run.data.params.items() if name not in NAMED_ANEW},
        metrics={
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in sorted(names)
        },
        files=files,
    )


@dataclass(frozen=True)
class Bench:
    """One tracking store, and one download of everything that is locked, for all cases."""

    folder: Path
    wheels: Path
    images: Path
    client: MlflowClient

    def run(self, manager: str, path: tuple[Path, ...] = (), **variables: str) -> dict[str, Outcome]:
        """Run every entry point under `manager` in an environment made new for it, and remove that environment."""
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
        command += ["--experiment-id", experiment]
        outcomes: dict[str, Outcome] = {}
        model_uri = ""
        try:
            for entry_point in ENTRY_POINTS:
                parameters = {
                    "main": ["epochs=2"],
                    "load_data": [],
                    "evaluate": [f"model_uri={model_uri}"],
                    "predict": [f"model_uri={model_uri}", f"input={self.images}", f"output={scratch}/predictions.csv"],
                    "export": [f"model_uri={model_uri}"],
                }[entry_point]
                line = [*command, "-e", entry_point, *(word for each in parameters for word in ("-P", each))]
                done = subprocess.run(line, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{entry_point}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
                (run,) = self.client.search_runs([experiment], f"tags.entry_point = '{entry_point}'")
                assert run.data.tags["venue"] == manager
                outcomes[entry_point] = outcome(self.client, run)
                if entry_point == "main":
                    model_uri = f"runs:/{run.info.run_id}/model"
        finally:
            shutil.rmtree(scratch / "envs", ignore_errors=True)
        return outcomes


# What would tell MLflow or pip that they are inside a test, or inside another environment.
HIDDEN = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "VIRTUAL_ENV", "CONDA_EXE", "CONDA_PREFIX", "PYTHONPATH"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("managers")
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(wheels), "--requirement", str(ROOT / "requirements.lock")]
    subprocess.run(command, check=True)
    images = folder / "images"
    images.mkdir()
    for number, pixels_HW in enumerate(load_digits().images[:20]):
        Image.fromarray((pixels_HW * 15).astype("uint8")).save(images / f"{number}.png")
    yield Bench(folder, wheels, images, MlflowClient(f"sqlite:///{folder}/mlflow.db"))
    shutil.rmtree(wheels)


@pytest.fixture(scope="module")
def local(bench: Bench) -> dict[str, Outcome]:
    return bench.run("local")


def assert_same(got: dict[str, Outcome], local: dict[str, Outcome]) -> None:
    assert local["main"].weights_sha256
    for entry_point, metric, file in (
        ("main", "test/accuracy", "model/model.onnx"),
        ("load_data", "data/train_images", "manifest.json"),
        ("evaluate", "test/accuracy", "tables/per_class.csv"),
        ("predict", "images", "predictions/predictions.csv"),
        ("export", "export/int8_accuracy", "export/model.pt2"),
    ):
        assert local[entry_point].metrics[metric] and file in local[entry_point].files, entry_point
        assert asdict(got[entry_point]) == asdict(local[entry_point]), entry_point


def test_uv_does_what_local_does(bench: Bench, local: dict[str, Outcome]) -> None:
    if not shutil.which("uv", path=str(Path(sys.executable).parent)):
        missing("uv is not in this environment (make .venv/installed-dev)")
    assert_same(bench.run("uv"), local)


def test_virtualenv_does_what_local_does(bench: Bench, local: dict[str, Outcome]) -> None:
    needs_python_3_11()
    if not importlib.util.find_spec("ensurepip"):
        missing("ensurepip is not here, and `python -m venv` needs it (Debian: apt-get install python3-venv)")
    root = bench.folder / "pyenv"
    pyenv_shim.make_root(root)
    assert_same(bench.run("virtualenv", path=(root / "bin",), PYENV_ROOT=str(root)), local)


def test_conda_does_what_local_does(bench: Bench, local: dict[str, Outcome]) -> None:
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
