"""The hook into `mlflow run`, seen from outside: commands as a user types them, on machines that lack this or that."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend import loader

from venues import PROJECT, Venue

BIN = Path(sys.executable).parent


def mlflow_run(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    # MLflow cannot activate an environment in a folder with a space.
    hidden = {"MLFLOW_CONDA_HOME", "CONDA_EXE", "VIRTUAL_ENV"}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, "-m", "mlflow", "run", *arguments],
        cwd=folder,
        env={**inherited, "MLFLOW_ENV_ROOT": str(folder.parent / "envs"), **environment},
        capture_output=True,
        text=True,
    )


def conda_project(folder: Path, *packages: str) -> Path:
    project = folder / "a conda project"
    project.mkdir()
    (project / "MLproject").write_text(
        "name: small\nconda_env: conda.yaml\nentry_points: {main: {command: 'python -c \"print(6 * 7)\"'}}\n"
    )
    lines = [f"      - {package}" for package in packages]
    listed = "\n".join(["dependencies:", "  - python=3.11", "  - pip", *(["  - pip:", *lines] if lines else [])])
    (project / "conda.yaml").write_text(f"{listed}\n")
    return project


def path_with(folder: Path, *programs: str) -> str:
    """A PATH on which of all environment managers only these are found."""
    tools = folder / "tools"
    tools.mkdir()
    for program in (*programs, "python", "bash", "git"):
        found = shutil.which(program, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
        assert found, program
        (tools / program).symlink_to(found)
    return str(tools)


def test_kubernetes_is_this_plugins_backend(in_process_venue: Venue, monkeypatch: pytest.MonkeyPatch) -> None:
    import in_process

    monkeypatch.setitem(loader.MLFLOW_BACKENDS, "mlproject-kubernetes", in_process.InProcessBackend)
    done = mlflow.projects.run(str(PROJECT), backend="kubernetes", backend_config={"image": "none"}, run_name="mine")
    run = in_process_venue.client.get_run(done.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")


@pytest.mark.parametrize(("backend", "loaded"), [("docker", "docker"), ("kubernetes", "mlproject-kubernetes")])
def test_detach_returns_at_once_though_mlflow_would_wait(
    in_process_venue: Venue, monkeypatch: pytest.MonkeyPatch, backend: str, loaded: str
) -> None:
    import in_process

    monkeypatch.setitem(loader.MLFLOW_BACKENDS, loaded, in_process.InProcessBackend)
    config = {"image": "none", "detach": True}
    job = mlflow.projects.run(
        str(PROJECT), "sleep", parameters={"seconds": "5"}, backend=backend, backend_config=config
    )
    assert job.get_status() == "RUNNING"
    job.cancel()


def test_a_run_that_fails_keeps_its_name(in_process_venue: Venue) -> None:
    with pytest.raises(ExecutionException):
        mlflow.projects.run(
            str(PROJECT), "fail", backend="in-process", backend_config={"image": "none"}, run_name="mine"
        )
    assert in_process_venue.the_run().info.run_name == "mine"


@pytest.mark.slow
def test_the_hook_can_be_switched_off(local_store: Path, tmp_path: Path) -> None:
    command = [str(PROJECT), "--backend", "kubernetes", "--backend-config", '{"nodes": "many"}']
    ours = mlflow_run(tmp_path, *command)
    assert (ours.returncode, ours.stderr.splitlines()[-1][:19]) == (2, "Error: 'nodes' is '")
    stock = mlflow_run(tmp_path, *command, MLPROJECT_BACKENDS_ALIAS="0")
    assert stock.returncode == 1
    assert "'nodes'" not in stock.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("installed", "used"), [(("uv", "virtualenv"), "uv"), (("virtualenv",), "virtualenv")])
def test_without_conda_another_manager_is_used_and_named(
    local_store: Path, tmp_path: Path, installed: tuple[str, ...], used: str
) -> None:
    project = conda_project(tmp_path)
    done = mlflow_run(project, ".", PATH=path_with(tmp_path, *installed))
    assert f"mlproject: no conda here; using {used} for the project's conda.yaml" in done.stderr.splitlines()
    (run,) = MlflowClient().search_runs(["0"])
    assert run.data.tags["mlflow.project.env"] == used
    if used == "uv":  # virtualenv needs pyenv as well, which MLflow then says
        assert (done.returncode, run.info.status) == (0, "FINISHED"), done.stderr[-2000:]
        assert "42" in done.stdout.splitlines()


@pytest.mark.slow
def test_a_run_whose_environment_cannot_be_made_has_failed(local_store: Path, tmp_path: Path) -> None:
    project = conda_project(tmp_path, "pytest==0.0.0.1")
    done = mlflow_run(project, ".", "--env-manager", "uv", PATH=path_with(tmp_path, "uv"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "FAILED"
    assert "the environment could not be made" in run.data.tags["mlproject.reason"]
    assert "uv pip install -r" in run.data.tags["mlproject.reason"]  # what it said is on the terminal


@pytest.mark.slow
def test_a_command_that_fails_locally_is_stocks_affair(local_store: Path, tmp_path: Path) -> None:
    done = mlflow_run(tmp_path, str(PROJECT), "--env-manager", "local", "--entry-point", "fail", "-P", "code=3")
    (run,) = MlflowClient().search_runs(["0"])
    assert (done.returncode, run.info.status) == (1, "FAILED")
    assert "mlproject.reason" not in run.data.tags
