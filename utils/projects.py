"""Starting an entry point of this project as a run of its own, by MLflow's project API, on any backend."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils import RunFailed, UsageError
from utils.artifacts import run_params

BACKENDS = ("local", "docker", "kubernetes")
PLUGIN = {"docker": "docker", "kubernetes": "mlproject-kubernetes"}
"""Names under which the plugin offers backends; MLflow's own of the same names cannot run this project."""

REASONS = ("reason", "mlproject.reason")
"""Tags that say why a run failed: of the script itself (utils.tracking), of the plugin."""


def entry_point_parameters(entry_point: str, project: str = ".") -> tuple[str, ...]:
    """The names of an entry point's parameters, as the MLproject has them."""
    from mlflow.projects.utils import load_project

    return tuple(load_project(project).get_entry_point(entry_point).parameters)


def parameters_like(run_id: str, entry_point: str, leave_out: Sequence[str]) -> dict[str, str]:
    """The parameters that a run was started with, those that the entry point still has, without some."""
    was = run_params(run_id)
    return {name: was[name] for name in entry_point_parameters(entry_point) if name in was and name not in leave_out}


def read_backend_config(backend: str, text: str) -> dict[str, Any]:
    """The configuration of a backend, a JSON file or JSON itself; UsageError also where the backend is not here."""
    from importlib.metadata import entry_points

    if backend in PLUGIN and PLUGIN[backend] not in entry_points(group="mlflow.project_backend").names:
        raise UsageError(f"backend={backend} needs the plugin in the Python that retrains: pip install ./plugin")
    if not text:
        return {}
    try:
        config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"backend_config '{text}' cannot be read: {error}; give a JSON file or a JSON object"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"backend_config '{text}' holds {config!r}; give a JSON object such as {{}}")
    return config


def run_entry_point(entry_point: str, parameters: Mapping[str, str], backend: str, config: dict[str, Any]) -> str:
    """Run an entry point of the project in the working folder, below the active run, and wait for it; gives its run.

    The local backend uses the present Python. A stop signal stops it too. RunFailed, with what is known of why, where
    it does not end well.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    active = mlflow.active_run()
    assert active is not None, "the run of the script, which utils.tracking.start_run has made"
    parent = active.info
    if backend == "local":  # the command says `python`: the one that runs this, whatever the shell has
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        with _stopping_is_an_interrupt():
            done = mlflow.projects.run(
                ".",
                entry_point,
                parameters=dict(parameters),
                experiment_id=parent.experiment_id,
                backend=backend,
                backend_config=config,
                env_manager="local" if backend == "local" else None,
            )
    except MlflowException as error:
        raise RunFailed(f"{entry_point} did not end well: {_reason(parent, error)}") from error
    return str(done.run_id)


@contextmanager
def _stopping_is_an_interrupt() -> Iterator[None]:
    """SIGTERM as Ctrl-C: MLflow and the plugin then stop what they have started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(parent: Any, error: Exception) -> str:
    """MLflow's error, and what a backend left on the run that failed, below the run `parent`."""
    import mlflow

    told = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    below = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    runs = mlflow.MlflowClient().search_runs([parent.experiment_id], below)
    reasons = [run.data.tags[tag] for run in runs for tag in REASONS if tag in run.data.tags]
    return told if not reasons or reasons[0] in told else f"{told}: {reasons[0]}"
