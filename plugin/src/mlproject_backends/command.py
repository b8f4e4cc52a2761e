"""The entry point's command as it runs inside a job: the same shell line that the local backend would run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.utils.file_utils import get_local_path_or_none

from mlproject_backends import ConfigError
from mlproject_backends.inside import CODE

INPUTS = PurePosixPath("/tmp/mlproject/inputs")


@dataclass(frozen=True)
class Command:
    """A shell line, and what the job must download before: a URI for each path that the line names."""

    line: str
    downloads: Mapping[str, str]


def job_command(entry_point: Any, parameters: Mapping[str, str], project: Path, files: Collection[str]) -> Command:
    """The command of `entry_point` (MLflow's EntryPoint) with `parameters` for a job that has `files` of `project`.

    A `path` parameter with a remote value is downloaded in the job; one that lies in the project becomes the path
    that it has there.

    Raises:
        ConfigError: a local path that the job would not have.
        ExecutionException: what MLflow itself refuses (a `uri` that is none, a missing parameter).
    """
    values, downloads = dict(parameters), {}
    for position, (name, parameter) in enumerate(entry_point.parameters.items()):
        value = str(values.get(name, parameter.default))
        if parameter.type != "path":
            continue
        local = get_local_path_or_none(value)
        if local is None:
            uri = value.rstrip("/")  # MLflow downloads what is in a folder, and not the folder, where a slash ends it
            inside = str(INPUTS / str(position) / (PurePosixPath(uri).name or "input"))
            downloads[inside] = uri
        else:
            inside = _inside(name, Path(local), project, files)
        values[name] = inside
    # With no folder to download to, MLflow leaves `path` values as they are.
    return Command(entry_point.compute_command(values, None), downloads)


def _inside(name: str, path: Path, project: Path, files: Collection[str]) -> str:
    if not path.exists():
        raise ConfigError(f"parameter '{name}' is the path {path}, and there is no {path.absolute()}")
    root, absolute = project.resolve(), path.resolve()
    if absolute == root:
        return str(CODE)
    if absolute.is_relative_to(root):
        relative = absolute.relative_to(root).as_posix()
        if any(file == relative or file.startswith(f"{relative}/") for file in files):
            return str(CODE / relative)
    raise ConfigError(
        f"parameter '{name}' is the local path {path}, which a job does not have; allowed: a path among the "
        "project's files (not ignored by git, .dockerignore or .mlprojectignore) or a URI such as s3://bucket/key"
    )
