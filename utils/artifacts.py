"""Models and files in MLflow: logging an ONNX model to a run, fetching models and run artifacts.

MLflow is imported only when a URI needs it: a model in a local folder costs nothing more than reading it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from utils import RunFailed, UsageError
from utils.refusals import refusal, refusal_of_its_artifacts
from utils.runtime import without_passwords

MODEL_FILE = "model.onnx"
"""Name of the network's file inside a logged model, chosen by MLflow's ONNX flavour."""

CHECKPOINTS, LATEST, NETWORK = "checkpoints", "latest.pt", "model.pt"
"""Artifact folder of a run's checkpoints, the file that training goes on from, the network that it ended with."""

PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""A person waits while a model is looked up: a silent server is reported in seconds, not minutes."""


@dataclass(frozen=True)
class FetchedModel:
    """A model on this machine."""

    path: Path
    """The ONNX file."""
    run_id: str
    """The run that made it; empty for a model that came from a path."""


def fetch_model(model_uri: str, folder: Path) -> FetchedModel:
    """Find the ONNX file behind `model_uri`; what has to be downloaded goes to `folder`.

    Allowed: `runs:/RUN_ID/model`, `models:/NAME@ALIAS`, `models:/NAME/VERSION`, any artifact URI that MLflow
    knows, the path of a logged model's folder, the path of an ONNX file.
    """
    if not (model_uri.startswith(("runs:/", "models:/")) or "://" in model_uri):
        return FetchedModel(_model_file(Path(model_uri), model_uri), run_id="")
    with mlflow_errors(model_uri):
        import mlflow

        run_id = _run_of(model_uri)
        local = mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=str(folder))
    return FetchedModel(_model_file(Path(local), model_uri), run_id)


def model_run(model_uri: str) -> str:
    """The run that made a logged or registered model."""
    with mlflow_errors(model_uri):
        run_id = _run_of(model_uri)
    if not run_id:
        raise UsageError(
            f"model_uri '{model_uri}' names no run of training; give runs:/RUN_ID/model, models:/NAME@ALIAS or "
            "models:/NAME/VERSION"
        )
    return run_id


def fetch_run_file(run_id: str, artifact_path: str, folder: Path) -> Path:
    """Download one artifact of a run to `folder`."""
    with mlflow_errors(f"runs:/{run_id}/{artifact_path}"):
        import mlflow

        return Path(
            mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=artifact_path, dst_path=str(folder))
        )


def find_run_file(run_id: str, artifact_path: str, folder: Path, without: str) -> Path | None:
    """The same for a file that not every run has: None, and the line `without` with the reason, where there is none."""
    try:
        return fetch_run_file(run_id, artifact_path, folder)
    except UsageError as error:
        print(f"{without}: {error}")
        return None


@contextmanager
def checkpoint_to_go_on_from(run_id: str, resume: str) -> Iterator[Path | None]:
    """The checkpoint that the run left before (a retry), else that of the run `resume`; None where there is neither.

    The file is there as long as the block lasts. UsageError if `resume` names a run without a checkpoint.
    """
    with TemporaryDirectory() as folder:
        file = _latest_checkpoint(run_id, Path(folder)) if run_id else None
        if file is None and resume:
            file = _latest_checkpoint(resume, Path(folder))
            if file is None:
                raise UsageError(f"resume: run '{resume}' has no {CHECKPOINTS}/{LATEST}; give the id of a training run")
        yield file


def _latest_checkpoint(run_id: str, folder: Path) -> Path | None:
    with mlflow_errors(f"runs:/{run_id}"):
        import mlflow

        files = mlflow.MlflowClient().list_artifacts(run_id, CHECKPOINTS)
    path = f"{CHECKPOINTS}/{LATEST}"
    return fetch_run_file(run_id, path, folder) if path in [file.path for file in files] else None


def run_params(run_id: str) -> dict[str, str]:
    """The parameters that a run was started with."""
    with mlflow_errors(f"runs:/{run_id}"):
        import mlflow

        params = mlflow.MlflowClient().get_run(run_id).data.params
    return {name: _unquoted(value) for name, value in params.items()}


def _unquoted(text: str) -> str:
    """A parameter as it was given: `mlflow run` logs texts as a shell quotes them, an empty one as two quotes."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    return words[0] if len(words) == 1 and shlex.quote(words[0]) == text else text


def data_to_load(settings: Any, trained_by: str) -> dict[str, str]:
    """dataset, data_version and data_repo as the settings have them, without those that are empty.

    Where they name no data set it is the one that the run `trained_by` was trained on, at the commit that it had then.
    """
    names = ("dataset", "data_version", "data_repo")
    asked = {name: value for name in names if (value := getattr(settings, name, ""))}
    if "dataset" in asked or not trained_by:
        return asked
    params = run_params(trained_by)
    trained = {name: params[name] for name in names if params.get(name)}
    if "data_commit" in params:
        trained["data_version"] = params["data_commit"]
    return trained | asked


def log_onnx_model(run_id: str, path: Path, example: Any, step: int = 0) -> str:
    """Log the ONNX file `path` to the run as the model `model` and return its URI.

    `example` (a NumPy array) becomes the input example; the signature is read from the file. The requirements
    are given, because MLflow would otherwise run the model in another process to find them out. Loads with
    `mlflow.pyfunc` anywhere, contains no pickle. `step` is the training step it was made at, whose metrics MLflow shows
    with it.
    """
    import mlflow
    import mlflow.onnx
    import onnx

    model = onnx.load(path)
    info = mlflow.onnx.log_model(
        model,
        name="model",
        run_id=run_id,
        step=step,
        signature=mlflow.models.ModelSignature(inputs=_schema(model.graph.input), outputs=_schema(model.graph.output)),
        input_example=example,
        pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    return str(info.model_uri)


def _schema(ends: Any) -> Any:
    """The inputs or outputs of an ONNX graph in MLflow's words; a dimension with a name may have any size."""
    import onnx
    from mlflow.types import Schema, TensorSpec

    return Schema(
        [
            TensorSpec(
                onnx.helper.tensor_dtype_to_np_dtype(end.type.tensor_type.elem_type),
                tuple(-1 if side.dim_param else side.dim_value for side in end.type.tensor_type.shape.dim),
                end.name,
            )
            for end in ends
        ]
    )


def _model_file(path: Path, model_uri: str) -> Path:
    file = path / MODEL_FILE if path.is_dir() else path
    if file.suffix == ".onnx" and file.is_file():
        return file
    received = f"a folder without {MODEL_FILE}" if path.is_dir() else "no .onnx file"
    raise UsageError(
        f"model_uri '{model_uri}' is {received}; give runs:/RUN_ID/model, models:/NAME@ALIAS, "
        "models:/NAME/VERSION, the folder of a logged ONNX model or an .onnx file"
    )


def _run_of(model_uri: str) -> str:
    """The run that logged a model: named in a `runs:/` URI, looked up for a registered or logged model."""
    scheme, _, rest = model_uri.partition(":/")
    if scheme == "runs":
        return rest.lstrip("/").split("/")[0]
    if scheme != "models":
        return ""
    import mlflow

    client = mlflow.MlflowClient()
    if "@" in rest:
        name, _, alias = rest.rpartition("@")
        return str(client.get_model_version_by_alias(name, alias).run_id or "")
    name, _, number = rest.rpartition("/")
    if name:
        return str(client.get_model_version(name, number).run_id or "")
    return str(client.get_logged_model(rest).source_run_id or "")


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """MLflow's exceptions as one line each, after seconds and not minutes of retries."""
    before = {key: os.environ.get(key) for key in PATIENCE}
    os.environ.update({key: value for key, value in PATIENCE.items() if before[key] is None})
    try:
        yield
    except (UsageError, RunFailed):
        raise
    except Exception as error:  # Stores raise their own kinds: MLflow's, requests', botocore's, OSError.
        raise _explained(uri, error) from error
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)


def _explained(uri: str, error: Exception) -> Exception:
    import mlflow

    code = getattr(error, "error_code", "")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    server = without_passwords(mlflow.get_tracking_uri())
    lost = code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND") or isinstance(error, FileNotFoundError)
    refused = refusal(error)
    if lost and uri.startswith("runs:/"):
        refused = refused or refusal_of_its_artifacts(mlflow.MlflowClient(), _run_of(uri))
    if refused:
        return UsageError(f"cannot fetch '{uri}' from {server}: {refused}")
    if lost:
        return UsageError(f"'{uri}' does not exist on {server}: {reason}")
    if code == "INVALID_PARAMETER_VALUE":
        return UsageError(f"'{uri}' was refused by {server}: {reason}")
    if "Max retries exceeded" in reason or "ConnectionError" in type(error).__name__:
        return RunFailed(f"cannot reach {server} to fetch '{uri}'; is the server up and MLFLOW_TRACKING_URI right?")
    return RunFailed(f"cannot fetch '{uri}' from {server}: {reason}")
