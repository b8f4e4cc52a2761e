"""Small changes to MLflow's own `mlflow run`, made when it is imported: docs/decisions/0009 says why each is needed.

1. `--backend kubernetes` reaches this plugin: MLflow answers to that name before it looks at plugins. MLflow does not
   wait for runs of this plugin's backends, which wait by themselves unless the configuration says `detach`.
2. Without `--env-manager` and without conda, a conda_env project runs under uv, else virtualenv.
3. A run whose environment cannot be made ends as FAILED with the reason; stock MLflow leaves it RUNNING for ever.
4. A tracking server that refuses the sign-in, or a right, is told in one line on every backend.

MLPROJECT_BACKENDS_ALIAS=0 switches all of them off. MLflow imports this module at every start (the entry point
group mlflow.run_context_provider), so it imports next to nothing.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from contextvars import ContextVar
from typing import Any

import wrapt
from mlflow.tracking.context.abstract_context import RunContextProvider
from mlflow.version import VERSION

PLUGIN_NAME = "mlproject-kubernetes"
OUR_BACKENDS = ("docker", PLUGIN_NAME)
# The release lines whose code was read and is tested against.
SUPPORTED_MAJOR = ("2", "3")

SIGN_IN = {
    "UNAUTHENTICATED": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "PERMISSION_DENIED": "ask an administrator for EDIT on the experiment",
}
"""MLflow's error codes for a user whom the tracking server refuses, and what to do."""

run_name: ContextVar[str | None] = ContextVar("run_name", default=None)
"""The --run-name of the run being started: MLflow hands it to no backend, and sets it only on runs that went well."""

_local_run: ContextVar[list[str] | None] = ContextVar("local_run", default=None)


class Unused(RunContextProvider):
    """Adds no tags: it is here so that MLflow imports this module."""

    def in_context(self) -> bool:
        return False

    def tags(self) -> dict[str, str]:
        return {}


def run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """In place of mlflow.projects.run: our backends, which wait by themselves, the run's name, short errors."""
    from mlflow.exceptions import ExecutionException, MlflowException

    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if call.arguments.get("backend") == "kubernetes":
        call.arguments["backend"] = PLUGIN_NAME
    ours = call.arguments.get("backend") in OUR_BACKENDS
    if ours:
        call.arguments["synchronous"] = False
    if ours and isinstance(call.arguments.get("backend_config"), str):
        call.arguments["backend_config"] = _read_config(call.arguments["backend_config"])
    token = run_name.set(call.arguments.get("run_name"))
    try:
        return wrapped(*call.args, **call.kwargs)
    except MlflowException as error:
        advice = SIGN_IN.get(error.error_code)
        if isinstance(error, ExecutionException) or not (ours or advice):
            raise
        # `mlflow run` shows any other one with its traceback: a tracking server that is away, a name it refuses.
        raise ExecutionException(_in_one_line(error) if advice is None else _refusal(error, advice)) from error
    finally:
        run_name.reset(token)


def _read_config(path: str) -> dict[str, Any]:
    """The backend configuration in a file; MLflow shows a traceback for one that it cannot read."""
    import json
    from pathlib import Path

    from mlproject_backends import ConfigError

    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--backend-config {path} cannot be read: {error}; allowed: a file that holds JSON") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--backend-config {path} holds {config!r}; allowed: a JSON object such as {{}}")
    return config


def env_manager(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """In place of _env_type_to_env_manager, which MLflow asks when the user named no environment manager."""
    chosen = wrapped(*args, **kwargs)
    if chosen != "conda" or os.environ.get("MLFLOW_CONDA_HOME") or shutil.which("conda"):
        return chosen
    instead = "uv" if shutil.which("uv") else "virtualenv"
    print(f"mlproject: no conda here; using {instead} for the project's conda.yaml", file=sys.stderr, flush=True)
    return instead


def remember_run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """In place of get_or_create_run in MLflow's local backend."""
    made = wrapped(*args, **kwargs)
    runs = _local_run.get()
    if runs is not None:
        runs.append(made.info.run_id)
    return made


def local_run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """In place of LocalBackend.run: what fails before the command has started ends the run that was made for it."""
    from mlflow.exceptions import ExecutionException

    runs: list[str] = []
    token = _local_run.set(runs)
    try:
        return wrapped(*args, **kwargs)
    except KeyboardInterrupt:
        _end(runs, "KILLED", "stopped by Ctrl-C while its environment was made")
        raise
    except ExecutionException as error:
        _end(runs, "FAILED", str(error))
        raise
    except Exception as error:
        if not runs:
            raise
        reason = f"the environment could not be made: {_in_one_line(error)}"
        _end(runs, "FAILED", reason)
        raise ExecutionException(f"Run (ID '{runs[0]}') failed: {reason}") from error
    finally:
        _local_run.reset(token)


def _end(runs: list[str], status: str, reason: str) -> None:
    from mlflow import MlflowClient

    for run_id in runs:
        MlflowClient().set_tag(run_id, "mlproject.reason", reason[:5000])
        MlflowClient().set_terminated(run_id, status)


def _in_one_line(error: Exception) -> str:
    """The error's first line and its last ones, which hold the cause where a program's output is quoted."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return "; ".join(lines if len(lines) < 4 else [lines[0], *lines[-2:]])


def _refusal(error: Exception, advice: str) -> str:
    answer = _in_one_line(error).rpartition("Response body: ")[2].strip("'").partition(". ")[0]
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    who = f"the user '{user}'" if user else "who is not signed in"
    return f"the tracking server refuses {who} ({answer}); {advice}"


def _install(projects: Any) -> None:
    from mlflow.projects.backend import local

    wrapt.wrap_function_wrapper(projects, "run", run)
    wrapt.wrap_function_wrapper(local, "_env_type_to_env_manager", env_manager)
    wrapt.wrap_function_wrapper(local, "get_or_create_run", remember_run)
    wrapt.wrap_function_wrapper(local.LocalBackend, "run", local_run)


if os.environ.get("MLPROJECT_BACKENDS_ALIAS") != "0" and VERSION.split(".")[0] in SUPPORTED_MAJOR:
    wrapt.register_post_import_hook(_install, "mlflow.projects")
