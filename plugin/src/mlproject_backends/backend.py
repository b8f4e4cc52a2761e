"""What MLflow calls: check the project, make the Job, hand it to a target. Only this file touches mlflow.projects."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import yaml
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.projects._project_spec import _find_mlproject
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.utils import fetch_and_validate_project, get_or_create_run, load_project
from mlflow.utils.mlflow_tags import MLFLOW_PROJECT_BACKEND, MLFLOW_PROJECT_ENV, MLFLOW_RUN_NAME
from mlflow.utils.validation import _validate_param

from mlproject_backends import ConfigError, JobError, alias
from mlproject_backends.code_package import CodePackage, pack
from mlproject_backends.command import Command, job_command
from mlproject_backends.config import DOCKER, KUBERNETES, Config, declared_resources, parse
from mlproject_backends.environment import Environment, job_environment
from mlproject_backends.image import environment_image
from mlproject_backends.job import Job, Resources, Target
from mlproject_backends.job_run import TAG_BACKEND, TAG_CANCELLED, TAG_REASON, JobRun, make_target, tell

CODE_ARTIFACT = "code"


@dataclass(frozen=True)
class _Project:
    """A project that was read: its folder, MLflow's view of it, and the keys that MLflow passes over."""

    folder: Path
    spec: Any
    name: str
    resources: Resources
    cache: tuple[str, ...]


@dataclass(frozen=True)
class _Request:
    """What is to run, read and checked: no run was made for it yet."""

    config: Config
    target: Target
    project: _Project
    entry_point: str
    command: Command
    environment: Environment
    package: CodePackage

    @property
    def resources(self) -> Resources:
        return self.config.resources(self.project.resources)

    def image(self) -> str:
        """The environment image, built and pushed where need be."""
        path = self.project.spec.env_config_path
        return environment_image(
            self.project.folder,
            Path(path) if path else None,
            str(self.project.spec.env_type),
            self.config,
            tell,
            push=self.config.backend == KUBERNETES,
        )

    def job(self, run: Any, experiment: Experiment, image: str) -> Job:
        return Job(
            name=job_name(self.project.name, self.entry_point),
            run_id=run.info.run_id,
            labels=_labels(run.info.run_id, experiment, self.project.name, self.entry_point),
            image=image,
            argv=("python", "-c", files("mlproject_backends").joinpath("inside.py").read_text()),
            env={**_threads(self.resources), **self.environment.env, **_instructions(run, self)},
            secrets=self.environment.secrets,
            resources=self.resources,
            mounts=self.environment.mounts,
            cache=bool(self.project.cache),
        )


class Backend(AbstractBackend):
    """One run() for all targets."""

    name: ClassVar[str]

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, str] | None,
        version: str | None,
        backend_config: Mapping[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> JobRun:
        """Send the entry point as a job and, unless the configuration says `detach`, follow it to its end.

        Raises:
            ConfigError: bad input; nothing was started and no run exists.
            ExecutionException: the job failed, or could not be sent; its run has ended and says why.
        """
        folder = Path(fetch_and_validate_project(project_uri, version, entry_point, params))
        project = _read(folder, entry_point)
        config = _with_paths(parse(self.name, backend_config), project)
        target = make_target(config)
        target.check()
        client = MlflowClient(tracking_uri)
        experiment = client.get_experiment(experiment_id)
        environment = job_environment(config, tracking_uri, experiment.artifact_location, os.environ)
        with tempfile.TemporaryDirectory(prefix="mlproject-") as temporary:
            package = pack(folder, Path(temporary))
            command = job_command(project.spec.get_entry_point(entry_point), params or {}, folder, package.files)
            _refuse_names(params or {})
            request = _Request(config, target, project, entry_point, command, environment, package)
            run = get_or_create_run(None, project_uri, experiment_id, str(folder), version, entry_point, params)
            try:
                submitted = _submit(request, client, run, experiment)
            except BaseException as error:
                _end_unsent(client, run.info.run_id, error)
                raise
        return submitted if config.detach else _follow(submitted)


def _submit(request: _Request, client: MlflowClient, run: Any, experiment: Experiment) -> JobRun:
    run_id, backend = run.info.run_id, request.config.backend
    tags = {TAG_BACKEND: backend, MLFLOW_PROJECT_BACKEND: backend, MLFLOW_PROJECT_ENV: "docker"}
    if name := alias.run_name.get():
        tags[MLFLOW_RUN_NAME] = name
    _tag(client, run_id, {**tags, "mlproject.code_sha256": request.package.sha256})
    tell(f"run {run_id}")
    image = request.image()
    _tag(client, run_id, {"mlproject.image": image})
    client.log_artifact(run_id, str(request.package.path), CODE_ARTIFACT)
    submitted = request.target.submit(request.job(run, experiment, image))
    try:
        _tag(client, run_id, submitted.tags)
        if cancelled := client.get_run(run_id).data.tags.get(TAG_CANCELLED):  # while there was no job to stop
            raise JobError(f"run {run_id} was {cancelled}")
    except BaseException:  # without its tags nobody would find the job again
        for undo in (submitted.cancel, submitted.clean_up):
            with contextlib.suppress(JobError):
                undo()
        raise
    return JobRun(run_id, submitted, client)


def _tag(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_tag(run_id, key, value)


class DockerBackend(Backend):
    """`mlflow run --backend docker`."""

    name = DOCKER


class KubernetesBackend(Backend):
    """`mlflow run --backend kubernetes`, by way of alias.py."""

    name = KUBERNETES


def job_name(project: str, entry_point: str) -> str:
    """A DNS label of at most 50 characters, so that pods and services have room for more, and no two alike."""
    stem = re.sub(r"[^a-z0-9]+", "-", f"{project}-{entry_point}".lower()).strip("-")
    if not stem[:1].isalpha():
        stem = f"job-{stem}"
    return f"{stem[:41].rstrip('-')}-{secrets.token_hex(4)}"


def _read(folder: Path, entry_point: str) -> _Project:
    spec = load_project(str(folder))
    path = _find_mlproject(str(folder))
    raw = yaml.safe_load(Path(path).read_text()) if path else {}
    declared = ((raw.get("entry_points") or {}).get(entry_point) or {}).get("resources")
    cache = raw.get("cache") or []
    if not isinstance(cache, list) or not all(
        isinstance(name, str) and name and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name in cache
    ):
        raise ConfigError(f"'cache' in the MLproject is {cache!r}; allowed: a list of folders inside the project")
    name = spec.name or folder.name or "project"
    return _Project(folder, spec, name, declared_resources(entry_point, declared), tuple(cache))


def _with_paths(config: Config, project: _Project) -> Config:
    """The template found beside the caller or else in the project, and a docker_env project's own image."""
    if template := config.kube_job_template_path:
        found = next((path for path in (Path(template), project.folder / template) if path.is_file()), None)
        if found is None:
            raise ConfigError(
                f"'kube-job-template-path' is {template!r}, and there is no such file here or in the project"
            )
        config = replace(config, kube_job_template_path=str(found))
    if project.spec.docker_env and not config.image:
        config = replace(config, image=project.spec.docker_env["image"])
    return config


def _refuse_names(params: Mapping[str, str]) -> None:
    """Before there is a run: one whose parameters cannot be logged would stay RUNNING."""
    for name in params:
        try:
            _validate_param(name, "")
        except MlflowException as error:
            raise ConfigError(f"parameter {name[:80]!r}: {error.message}") from None


def _labels(run_id: str, experiment: Experiment, project: str, entry_point: str) -> dict[str, str]:
    """Label values as Kubernetes allows them: 63 characters, letters, digits, and -_. within."""

    def value(text: str) -> str:
        return re.sub(r"[^A-Za-z0-9]+$|^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:63])

    labels = {"run-id": run_id, "experiment": experiment.name, "project": project, "entry-point": entry_point}
    return {name: value(text) for name, text in labels.items()}


def _threads(allowed: Resources) -> dict[str, str]:
    """As many threads as cores the job may use: libraries count those of the machine, and trip over each other."""
    return {"OMP_NUM_THREADS": str(math.ceil(allowed.cpu))} if allowed.cpu else {}


def _instructions(run: Any, request: _Request) -> dict[str, str]:
    """What inside.py reads."""
    project, command, package = request.project, request.command, request.package
    values = {
        "MLFLOW_RUN_ID": run.info.run_id,
        "MLFLOW_EXPERIMENT_ID": run.info.experiment_id,
        "MLPROJECT_NAME": re.sub(r"[^A-Za-z0-9_.-]+", "-", project.name),
        "MLPROJECT_COMMAND": command.line,
        "MLPROJECT_CODE": f"{CODE_ARTIFACT}/{package.path.name}",
        "MLPROJECT_CODE_SHA256": package.sha256,
    }
    if command.downloads:
        values["MLPROJECT_DOWNLOADS"] = json.dumps(command.downloads)
    if request.config.timeout_s and request.config.backend != KUBERNETES:  # which keeps the time itself
        values["MLPROJECT_TIMEOUT_S"] = str(request.config.timeout_s)
    if project.cache:
        values["MLPROJECT_CACHE"] = json.dumps(project.cache)
    return {**values, **_git_state(project.folder)}


def _git_state(folder: Path) -> dict[str, str]:
    """The commit and whether files differ from it: the job has no .git to ask."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"MLPROJECT_GIT_COMMIT": commit, "MLPROJECT_GIT_DIRTY": "true" if changes else "false"}


def _end_unsent(client: MlflowClient, run_id: str, error: BaseException) -> None:
    """End a run that never became a job; the reason that counts is `error`, which goes on to the user."""
    if cancelled := client.get_run(run_id).data.tags.get(TAG_CANCELLED):
        status, reason = "KILLED", cancelled
    elif isinstance(error, KeyboardInterrupt):
        status, reason = "KILLED", "stopped by Ctrl-C before the job was sent"
    else:
        status, reason = "FAILED", f"the job was not sent: {_message(error)}"
    client.set_tag(run_id, TAG_REASON, reason[:5000])
    client.set_terminated(run_id, status)


def _message(error: BaseException) -> str:
    return getattr(error, "message", None) or str(error) or type(error).__name__


def _follow(submitted: JobRun) -> JobRun:
    state = submitted.follow()
    if state.status != "FINISHED":
        raise ExecutionException(f"Run (ID '{submitted.run_id}') {state.status.lower()}: {state.reason}")
    tell(f"finished: {state.reason}")
    return submitted
