"""Talking to the Docker engine: the connection, what an error means in one line, images from and to a registry."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import docker
import docker.errors
import urllib3.exceptions
from docker.utils import kwargs_from_env, parse_repository_tag

from mlproject_backends import JobError, Unreachable
from mlproject_backends.job import Tell

# What a dropped connection looks like: requests' errors are OSErrors, a stream cut inside a frame is a struct.error.
_DROPPED = (OSError, urllib3.exceptions.HTTPError, struct.error, docker.errors.DockerException)


def connect() -> Any:
    """A client of the engine that DOCKER_HOST names, or of the one at the default socket.

    Raises Unreachable where no engine answers, JobError where the user may not talk to it.
    """
    with engine_errors("to answer"):
        return docker.APIClient(version="auto", **kwargs_from_env())


@contextlib.contextmanager
def engine_errors(refused: str) -> Iterator[None]:
    """Turn the SDK's errors into Unreachable and JobError; `refused` completes "the Docker engine refused ...".

    docker.errors.NotFound passes: what is missing, only the caller knows.
    """
    try:
        yield
    except docker.errors.NotFound:
        raise
    except docker.errors.APIError as error:
        raise JobError(refusal(refused, error.explanation or str(error))) from error
    except _DROPPED as error:
        raise _no_engine(error) from error


def refusal(refused: str, explanation: str) -> str:
    """One line from what the engine said when it refused something."""
    said = " ".join(explanation.split())
    if "no space left on device" in said.lower():
        return "the disk of the Docker engine is full; `docker system prune` frees what nothing uses"
    if "could not select device driver" in said:
        return "the Docker engine has no GPU to give; install the NVIDIA container toolkit, or ask for gpu: 0"
    if "Range of CPUs" in said:
        return f"the job asks for more CPU than the Docker engine has ({said}); ask for less, as in -A cpu=1"
    return f"the Docker engine refused {refused}: {said}"


def _no_engine(error: Exception) -> JobError:
    where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(cause, PermissionError) for cause in causes):
        return JobError(
            f"this user may not talk to the Docker engine at {where}; an administrator can add the user to the group "
            "docker, or set DOCKER_HOST to an engine of your own"
        )
    reason = getattr(causes[-1], "strerror", None) or str(causes[-1]) or type(causes[-1]).__name__
    return Unreachable(f"no Docker engine answers at {where} ({reason}); start it, or set DOCKER_HOST to another one")


def pull(client: Any, image: str, tell: Tell, auth: Mapping[str, str] | None = None) -> None:
    """Fetch an image from its registry. Raises JobError where the registry does not have or does not give it."""
    repository, tag = parse_repository_tag(image)
    tell(f"pulling {image}")
    try:
        with engine_errors(f"to pull {image}"):
            # Without a tag the engine would fetch every tag that there is.
            for event in client.pull(repository, tag or "latest", stream=True, decode=True, auth_config=auth):
                if "error" in event:
                    raise JobError(refusal(f"to pull {image}", event["error"]))
    except docker.errors.NotFound as error:
        raise JobError(
            f"there is no image {image}, neither in the Docker engine nor in its registry; build and push it, correct "
            "its name, or log in to the registry (docker login)"
        ) from error
