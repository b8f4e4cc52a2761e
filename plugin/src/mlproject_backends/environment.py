"""What travels from the launcher's environment into a job, and how the job reaches the tracking server."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlproject_backends import ConfigError
from mlproject_backends.config import KUBERNETES, Config

_TRAVELS = re.compile(r"MLFLOW_\w+|AWS_\w+|S3_\w+|DATABRICKS_\w+")
# Settings of this machine or of a server that runs on it.
_STAYS = re.compile(
    r"MLFLOW_(SERVER|FLASK|AUTH|BACKEND|ARTIFACTS|DEFAULT|SERVE|WORKERS|HOST|PORT|GUNICORN|UVICORN|CONDA|ENV|RUN|EXPERIMENT"
    r"|TRACKING_URI|CRYPTO|KMS)(_\w*)?|AWS_(PROFILE|DEFAULT_PROFILE|CONFIG_FILE|SHARED_CREDENTIALS_FILE|CA_BUNDLE)"
)
_SECRET = re.compile(r"SECRET|PASSW|TOKEN|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE", re.IGNORECASE)


@dataclass(frozen=True)
class Environment:
    """Variables that may be shown, those that must not, and local folders that a container needs at the same path."""

    env: Mapping[str, str]
    secrets: Mapping[str, str]
    mounts: tuple[str, ...] = ()


def job_environment(config: Config, tracking_uri: str, artifact_root: str, here: Mapping[str, str]) -> Environment:
    """The environment of a job that logs to `tracking_uri`, its experiment's artifacts being under `artifact_root`.

    `here` is the launcher's environment.

    Raises:
        ConfigError: a variable that the configuration names is not set, or a store that a pod cannot reach.
    """
    uri = config.tracking_uri or tracking_uri
    if config.backend == KUBERNETES:
        uri = config.tracking_uri or here.get("KUBE_MLFLOW_TRACKING_URI") or tracking_uri
    mounts = _local_folders(uri, artifact_root)
    if config.backend == KUBERNETES:
        _refuse_out_of_reach(uri, mounts)
    values = {name: here[name] for name in here if _TRAVELS.fullmatch(name) and not _STAYS.fullmatch(name)}
    if artifact_root.startswith("s3:") and "AWS_ACCESS_KEY_ID" not in values and config.backend != KUBERNETES:
        values |= _aws_profile()
    for name, value in config.env.items():
        if value is None and name not in here:
            raise ConfigError(f"'env' names {name}, which is not set here; set it, or give it a value in 'env'")
        values[name] = here[name] if value is None else value
    values["MLFLOW_TRACKING_URI"] = _absolute(uri)
    # Otherwise a server that serves artifacts sends the client to S3 itself, which a job may not reach: for every
    # download, and for uploads of 500 MB and more.
    values.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    values.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    values.setdefault("PYTHONUNBUFFERED", "1")  # its output is followed live
    for name in config.env_from_secret:
        values.pop(name, None)
    secrets = {name: value for name, value in values.items() if is_secret(name, value)}
    return Environment({name: value for name, value in values.items() if name not in secrets}, secrets, mounts)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable must not be shown: its name says so, or its value is an address with a password."""
    return bool(_SECRET.search(name) or re.search(r"://[^/@\s]*:[^/@\s]+@", value))


def is_loopback(uri: str) -> bool:
    """Whether the host in `uri` is this machine and no other."""
    try:
        host = urllib.parse.urlsplit(uri).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _absolute(uri: str) -> str:
    """The same store, with no path that depends on the working directory."""
    scheme, slashes, rest = uri.partition(":///")
    if slashes and scheme.startswith("sqlite") and rest and not rest.startswith("/"):
        return f"{scheme}:///{Path(rest).resolve()}"
    if "://" not in uri and uri != "databricks" and not uri.startswith("file:"):
        return str(Path(uri).resolve())
    return uri


def _local_folders(uri: str, artifact_root: str) -> tuple[str, ...]:
    """Folders of this machine that hold the tracking store and the artifacts, none inside another."""
    store = _local_path(_absolute(uri))
    if store and uri.startswith("sqlite"):
        store = store.parent  # SQLite writes its journal beside the database
    folders = [path for path in (store, _local_path(artifact_root)) if path]
    outer = [path for path in folders if not any(path != other and path.is_relative_to(other) for other in folders)]
    return tuple(dict.fromkeys(map(str, outer)))


def _local_path(address: str) -> Path | None:
    scheme, path = re.match(r"(?:([\w+.-]+):(?://)?)?(.*)", address).groups()  # type: ignore[union-attr]
    if address == "databricks":
        return None
    local = scheme is None or scheme == "file" or scheme.startswith("sqlite")
    return Path(urllib.parse.unquote(path) if scheme == "file" else path.replace("//", "/")) if local else None


def _refuse_out_of_reach(uri: str, mounts: tuple[str, ...]) -> None:
    advice = (
        "start `mlflow server --host 0.0.0.0` with a database and artifacts that it serves, and name its address as "
        "'tracking-uri' in the backend configuration or in KUBE_MLFLOW_TRACKING_URI"
    )
    if mounts:
        raise ConfigError(
            f"a pod cannot reach the tracking store or its artifacts in {mounts[0]} on this machine; {advice}"
        )
    if is_loopback(uri):
        raise ConfigError(f"a pod cannot reach the tracking server at {uri}, which only this machine can; {advice}")


def _aws_profile() -> dict[str, str]:
    """Credentials of the user's AWS profile or role, which a container has no files of."""
    try:
        import boto3
    except ImportError:
        return {}
    session = boto3.Session()
    credentials = session.get_credentials()
    if credentials is None:
        return {}
    frozen = credentials.get_frozen_credentials()
    found = {
        "AWS_ACCESS_KEY_ID": frozen.access_key,
        "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
        "AWS_SESSION_TOKEN": frozen.token,
        "AWS_DEFAULT_REGION": session.region_name,
    }
    return {name: value for name, value in found.items() if value}
