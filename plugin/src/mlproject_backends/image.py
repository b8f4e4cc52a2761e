"""The environment image of a project: what it is made of, its name, and building it only where it is missing."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import string
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import docker.errors
import mlflow
import yaml
from docker.utils.build import PatternMatcher
from mlflow.exceptions import MlflowException
from mlflow.utils.environment import _PythonEnv

from mlproject_backends import ConfigError, JobError, engine
from mlproject_backends.config import Config
from mlproject_backends.job import Tell

JOB_STORES = ("sqlalchemy", "alembic", "boto3")  # what mlflow-skinny lacks for a database and for S3 artifacts
BASE_IMAGE = "python:{}-slim-bookworm"


@dataclass(frozen=True)
class Context:
    """All that a build sees: files by their path in the context, as (executable, content), and build arguments."""

    files: Mapping[str, tuple[bool, bytes]]
    build_args: Mapping[str, str]

    @property
    def digest(self) -> str:
        """A hash that changes when, and only when, something in here does."""
        files = {name: (mode, hashlib.sha256(content).hexdigest()) for name, (mode, content) in self.files.items()}
        return hashlib.sha256(json.dumps([files, dict(self.build_args)], sort_keys=True).encode()).hexdigest()

    def archive(self) -> bytes:
        """A tar of the files, the same bytes for the same digest."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for name, (executable, content) in sorted(self.files.items()):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o755 if executable else 0o644
                tar.addfile(info, io.BytesIO(content))
        return stream.getvalue()


def environment_image(
    project_dir: Path, env_file: Path | None, env_type: str, config: Config, tell: Tell, push: bool
) -> str:
    """The name of an image that holds the project's environment, after building, pulling or pushing what is missing.

    `env_file` is the project's conda.yaml or python_env.yaml, as `env_type` ("conda_env", "python_env") says; it
    counts where the project has no Dockerfile. With `push` the image is in the registry afterwards, else in the
    local engine. An image that the configuration names is taken as it is, and no engine is needed.

    Raises:
        ConfigError: a file that cannot be used; nothing was built.
        JobError: the image cannot be built, pulled or pushed.
    """
    if config.image:
        return config.image
    if push and not config.repository_uri:
        raise ConfigError(
            "Kubernetes pulls the environment image from a registry; set 'repository-uri' to one that you may push to, "
            "or 'image' to an image that is there already"
        )
    context = image_context(project_dir, env_file, env_type, config.build_args)
    image = f"{config.repository_uri or _local_repository(project_dir)}:{context.digest[:16]}"
    client = engine.connect(config.docker_auth)
    local = _in_engine(client, image)
    remote = _in_registry(client, image, tell, push) if config.repository_uri and (push or not local) else False
    if config.build_image or not (local or remote):
        engine.build(client, image, context.archive(), context.build_args, tell)
    elif not push and not local:
        engine.pull(client, image, tell)
    if push and (config.build_image or not remote):
        engine.push(client, image, tell)
    return image


def image_context(project_dir: Path, env_file: Path | None, env_type: str, build_args: Mapping[str, str]) -> Context:
    """The Dockerfile of the project and the files that it copies, or the plugin's own with the packages to install."""
    dockerfile = project_dir / "Dockerfile"
    if dockerfile.is_file():
        paths = _copied_paths(project_dir, dockerfile.read_text(), build_args)
        files = {path.relative_to(project_dir).as_posix(): _read(path, project_dir) for path in {dockerfile, *paths}}
        return Context(files, build_args)
    environment = _python_environment(env_file, env_type)
    default = resources.files("mlproject_backends").joinpath("Dockerfile.default").read_bytes()
    base = BASE_IMAGE.format(_minor_version(environment.python))
    return Context(
        {"Dockerfile": (False, default), **_requirements(project_dir, environment)}, {"BASE": base, **build_args}
    )


def _read(path: Path, project_dir: Path) -> tuple[bool, bytes]:
    if not path.resolve().is_relative_to(project_dir.resolve()):
        raise ConfigError(f"{path} leads out of the project, and an image holds only files from inside; copy it there")
    return bool(path.stat().st_mode & 0o100), path.read_bytes()


def _copied_paths(project_dir: Path, dockerfile: str, build_args: Mapping[str, str]) -> Iterator[Path]:
    """The files that COPY and ADD take from the project, without those that .dockerignore names."""
    ignore = project_dir / ".dockerignore"
    lines = [line.strip() for line in ignore.read_text().splitlines()] if ignore.is_file() else []
    ignored = PatternMatcher([line for line in lines if line and not line.startswith("#")])
    arguments: dict[str, str] = {}
    for instruction, rest in _instructions(dockerfile):
        if instruction == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = build_args.get(name, default.strip("\"'"))
        elif instruction in ("COPY", "ADD"):
            for source in _sources(rest):
                paths = list(_matches(project_dir, string.Template(source).safe_substitute(arguments)))
                paths = [path for path in paths if not ignored.matches(path.relative_to(project_dir).as_posix())]
                if not paths:
                    raise ConfigError(
                        f"the Dockerfile copies '{source}', and the project has no such file outside .dockerignore"
                    )
                yield from paths


def _instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """Each instruction's name and the rest of its line, with continued lines joined."""
    joined = ""
    for line in [*dockerfile.splitlines(), ""]:
        if line.lstrip().startswith("#"):
            continue
        joined += line.rstrip()
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
        elif joined:
            name, _, rest = joined.strip().partition(" ")
            yield name.upper(), rest.strip()
            joined = ""


def _sources(arguments: str) -> list[str]:
    """What a COPY or ADD line takes from the project: not from another stage, from the network or from the line."""
    while arguments.startswith("--"):
        flag, _, arguments = arguments.partition(" ")
        arguments = arguments.lstrip()
        if flag.startswith("--from="):
            return []
    try:
        words = json.loads(arguments)
    except ValueError:
        words = arguments.split()
    return [word for word in words[:-1] if "://" not in word and not word.startswith(("<<", "git@"))]


def _matches(project_dir: Path, source: str) -> Iterator[Path]:
    """The files that a source means: patterns as for a shell, folders with all that is in them."""
    pattern = posixpath.normpath(source.lstrip("/") or ".")
    for match in [project_dir] if pattern == "." else [] if pattern.startswith("..") else project_dir.glob(pattern):
        yield from (path for path in ([match] if match.is_file() else match.rglob("*")) if path.is_file())


def _python_environment(env_file: Path | None, env_type: str) -> Any:
    """MLflow's own reading of a conda.yaml or python_env.yaml; it warns about conda packages that pip cannot get."""
    reader: Any = _PythonEnv
    if env_file is None:
        return reader()
    try:
        return reader.from_conda_yaml(env_file) if env_type == "conda_env" else reader.from_yaml(env_file)
    except (OSError, yaml.YAMLError, MlflowException, TypeError, AttributeError) as error:
        raise ConfigError(f"{env_file} cannot be read as a {env_type}: {' '.join(str(error).split())}") from error


def _minor_version(python: str) -> str:
    found = re.search(r"\d+\.\d+", python)
    if not found:
        raise ConfigError(f"the project asks for Python {python!r}; allowed: a version such as 3.11")
    return found[0]


def _requirements(project_dir: Path, environment: Any) -> dict[str, tuple[bool, bytes]]:
    """The files that the default Dockerfile gives to pip, with those that they refer to."""
    lines = list(environment.dependencies)
    referred = dict(_referred(project_dir, "\n".join(lines)))
    texts = ["\n".join(lines), *(content.decode() for _, content in referred.values())]
    if not any(re.search(r"^\s*mlflow([-_.]skinny)?\s*($|[\[=<>!~;@#])", text, re.I | re.M) for text in texts):
        lines += [f"mlflow-skinny=={mlflow.__version__}", *JOB_STORES]  # a job logs to the tracking server
    return {
        **referred,
        "mlproject-build.txt": (False, "\n".join(environment.build_dependencies or ["pip"]).encode()),
        "mlproject-requirements.txt": (False, "\n".join(lines).encode()),
    }


def _referred(
    folder: Path, requirements: str, project_dir: Path | None = None
) -> Iterator[tuple[str, tuple[bool, bytes]]]:
    """The files that `-r` and `-c` lines name, and those that these name in turn."""
    project_dir = project_dir or folder
    for match in re.finditer(r"^\s*(?:-[rc]|--requirement|--constraint)[=\s]*([^\s#]+)", requirements, re.M):
        path = folder / match[1]
        if "://" in match[1]:
            continue
        if not path.is_file():
            raise ConfigError(f"the project's requirements refer to {match[1]}, and there is no such file in {folder}")
        file = _read(path, project_dir)
        yield path.resolve().relative_to(project_dir.resolve()).as_posix(), file
        yield from _referred(path.parent, file[1].decode(), project_dir)


def _local_repository(project_dir: Path) -> str:
    """The name of the images of a project that no registry holds."""
    spec = next((path for path in project_dir.iterdir() if path.name.lower() == "mlproject"), None)
    name = (yaml.safe_load(spec.read_text()) or {}).get("name") if spec else None
    return "mlproject-env/" + (
        re.sub(r"[^a-z0-9]+", "-", str(name or project_dir.name).lower()).strip("-") or "project"
    )


def _in_engine(client: Any, image: str) -> bool:
    try:
        with engine.engine_errors(f"to look for {image}"):
            client.inspect_image(image)
    except docker.errors.NotFound:
        return False
    return True


def _in_registry(client: Any, image: str, tell: Tell, needed: bool) -> bool:
    """Whether the registry has the image; where it does not answer, that counts only if it is `needed`."""
    try:
        with engine.engine_errors(f"to ask the registry for {image}"):
            client.inspect_distribution(image)
    except docker.errors.NotFound:
        return False
    except JobError as error:
        # Registries answer so for what does not exist as well; a push without the right will say more.
        if not needed or getattr(error.__cause__, "status_code", None) in (401, 403):
            tell(f"{error}; going on without it")
            return False
        raise
    return True
