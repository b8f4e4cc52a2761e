"""The backend configuration: what `--backend-config` and `-A` may hold, checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlproject_backends import ConfigError
from mlproject_backends.job import Resources

DOCKER, KUBERNETES = "docker", "kubernetes"

# What MLflow itself puts into the dict that a backend receives.
MLFLOW_KEYS = {"ENV_MANAGER", "SYNCHRONOUS", "DOCKER_ARGS", "STORAGE_DIR", "build_image", "docker_auth"}

_BINARY = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_DECIMAL = {"k": 10**3, "K": 2**10, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Config:
    """One field a key, with `_` for `-`; README.md's table says what each means and holds the same defaults."""

    backend: str
    image: str | None = None
    build_image: bool = False
    repository_uri: str | None = None
    build_args: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)  # None: copied from the launcher's environment
    env_from_secret: Mapping[str, str] = field(default_factory=dict)  # variable -> "secret/key"
    tracking_uri: str | None = None
    detach: bool = False
    cpu: float | None = None
    memory: int | None = None
    gpu: int | None = None
    shm: int | None = None
    cache_volume: str | None = None
    timeout_s: int | None = None
    docker_auth: Mapping[str, str] | None = field(default=None, repr=False)  # as mlflow.projects.run() takes it
    # Kubernetes alone
    kube_context: str | None = None
    kube_job_template_path: str | None = None
    namespace: str | None = None
    nodes: int = 1
    retries: int = 0
    queue: str | None = None
    image_timeout_s: int = 120
    pending_timeout_s: int = 600

    def resources(self, declared: Resources) -> Resources:
        """What the entry point declared, with what this configuration sets in its place."""
        return Resources(
            cpu=declared.cpu if self.cpu is None else self.cpu,
            memory_bytes=declared.memory_bytes if self.memory is None else self.memory,
            gpu=declared.gpu if self.gpu is None else self.gpu,
            shm_bytes=declared.shm_bytes if self.shm is None else self.shm,
        )


KUBERNETES_ONLY = {
    "kube_context", "kube_job_template_path", "namespace", "nodes", "retries", "queue", "image_timeout_s",
    "pending_timeout_s", "env_from_secret",
}  # fmt: skip


def size(value: object, key: str) -> int:
    """Bytes from 4Gi, 512Mi, 2G (as Kubernetes writes them), 512m, 4g (as Docker does) or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
    number, unit = match.groups() if match else ("", "?")
    factor = _BINARY.get(unit) or _DECIMAL.get(unit) or {"m": 2**20, "g": 2**30, "t": 2**40}.get(unit)
    if isinstance(value, bool) or not factor or not float(number):
        raise ConfigError(f"'{key}' is {value!r}; allowed: a size such as 512Mi, 4Gi or 4g")
    return int(float(number) * factor)


def cores(value: object, key: str) -> float:
    """CPU cores from 2, 0.5 or 500m."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(value))
    if isinstance(value, bool) or not match or not float(match[1]):
        raise ConfigError(f"'{key}' is {value!r}; allowed: a number of cores such as 2, 0.5 or 500m")
    return float(match[1]) / (1000 if match[2] else 1)


def _whole(least: int) -> Any:
    def parse(value: object, key: str) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)) or int(str(value)) < least:
            raise ConfigError(f"'{key}' is {value!r}; allowed: a whole number of at least {least}")
        return int(str(value))

    return parse


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"'{key}' is {value!r}; allowed: a text")
    return value


def _flag(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"'{key}' is {value!r}; allowed: true or false")
    return value


def _texts(value: object, key: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ConfigError(f"'{key}' is {value!r}; allowed: an object of texts by name")
    return value


def _environment(value: object, key: str) -> dict[str, str | None]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value)
    try:
        return {**_texts(value, key)}
    except ConfigError:
        message = f"'{key}' is {value!r}; allowed: a list of variable names to copy, or an object of values by name"
        raise ConfigError(message) from None


def _secrets(value: object, key: str) -> dict[str, str]:
    secrets = _texts(value, key)
    for variable, reference in secrets.items():
        if not re.fullmatch(r"[a-z0-9.-]+/[\w.-]+", reference):
            raise ConfigError(f"'{key}' gives {variable} as {reference!r}; allowed: SECRET/KEY of a Kubernetes Secret")
    return secrets


_PARSERS: dict[str, Any] = {
    "image": _text,
    "build-image": _flag,
    "repository-uri": _text,
    "build-args": _texts,
    "env": _environment,
    "env-from-secret": _secrets,
    "tracking-uri": _text,
    "detach": _flag,
    "cpu": cores,
    "memory": size,
    "gpu": _whole(0),
    "shm": size,
    "cache-volume": _text,
    "timeout-s": _whole(1),
    "kube-context": _text,
    "kube-job-template-path": _text,
    "namespace": _text,
    "nodes": _whole(1),
    "retries": _whole(0),
    "queue": _text,
    "image-timeout-s": _whole(1),
    "pending-timeout-s": _whole(1),
}

# Names that `docker run` has for the same things, for `-A`.
_DOCKER_NAMES = {"cpus": "cpu", "gpus": "gpu", "shm-size": "shm", "m": "memory"}
_RESOURCE_KEYS = ("cpu", "memory", "gpu", "shm")


def parse(backend: str, received: Mapping[str, Any]) -> Config:
    """The Config of `backend` from the dict that MLflow hands to it.

    Raises:
        ConfigError: an unknown key, a value of the wrong kind, or a key that this backend cannot honour.
    """
    values: dict[str, Any] = {}
    allowed = [key for key in _PARSERS if backend == KUBERNETES or key.replace("-", "_") not in KUBERNETES_ONLY]
    for key, value in received.items():
        if key in MLFLOW_KEYS or key.startswith("_"):
            continue
        if key not in allowed:
            raise ConfigError(_unknown(f"key '{key}' in the {backend} backend's configuration", key, allowed))
        values[key.replace("-", "_")] = _PARSERS[key](value, key)
    for name, value in (received.get("DOCKER_ARGS") or {}).items():
        key = _DOCKER_NAMES.get(name, name)
        if key not in _RESOURCE_KEYS:
            raise ConfigError(_unknown(f"argument -A {name}", name, [*_RESOURCE_KEYS, *_DOCKER_NAMES]))
        values[key] = _PARSERS[key](value, f"-A {name}")
    values["build_image"] = bool(values.get("build_image") or received.get("build_image"))
    return Config(backend=backend, docker_auth=received.get("docker_auth"), **values)


def declared_resources(entry_point: str, declared: object) -> Resources:
    """What an entry point's `resources:` in the MLproject asks for."""
    if declared is None:
        return Resources()
    where = f"resources of entry point '{entry_point}'"
    if not isinstance(declared, dict):
        raise ConfigError(f"{where} are {declared!r}; allowed: an object of {', '.join(_RESOURCE_KEYS)}")
    for key in declared:
        if key not in _RESOURCE_KEYS:
            raise ConfigError(_unknown(f"key '{key}' in the {where}", str(key), list(_RESOURCE_KEYS)))
    values = {key: _PARSERS[key](value, f"{key} in the {where}") for key, value in declared.items()}
    return Config(DOCKER, **values).resources(Resources())


def _unknown(what: str, name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown {what}{hint}; allowed: {', '.join(allowed)}"
