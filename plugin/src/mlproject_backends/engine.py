"""Talking to the Docker engine: the connection, what an error means in one line, images from and to a registry."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from textwrap import shorten
from typing import Any

import docker
import docker.errors
import urllib3.exceptions
from docker.utils import kwargs_from_env, parse_repository_tag
from tqdm import tqdm

from mlproject_backends import JobError, Unreachable
from mlproject_backends.job import Tell

# What a dropped connection looks like: requests' errors are OSErrors, a stream cut inside a frame is a struct.error.
_DROPPED = (OSError, urllib3.exceptions.HTTPError, struct.error, docker.errors.DockerException)

ENVIRONMENT_LABEL = "mlproject.environment"  # on every image built here: `docker image prune --filter label=...`

_STEP = re.compile(r"Step (?P<number>\d+)/(?P<of>\d+) : (?P<what>.*)")
_STEPS = "{desc}: {n_fmt}/{total_fmt} |{bar}| {postfix}"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def connect(docker_auth: Mapping[str, str] | None = None) -> Any:
    """A client of the engine that DOCKER_HOST names, or of the one at the default socket.

    `docker_auth` logs in to a registry for this client, besides the logins that `docker login` has stored.

    Raises Unreachable where no engine answers, JobError where the user may not talk to it.
    """
    with engine_errors("to answer"):
        client = docker.APIClient(version="auto", **kwargs_from_env())
    if docker_auth:
        with engine_errors("the login to the registry"):
            client.login(**docker_auth)
    return client


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
    login = any(word in said for word in ("no basic auth", "unauthorized", "to the resource is denied"))
    return f"the Docker engine refused {refused}: {said}" + "; log in to the registry (docker login)" * login


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


def build(client: Any, image: str, context: bytes, build_args: Mapping[str, str], tell: Tell) -> None:
    """Build `image` from a tar with a Dockerfile. Raises JobError with the step that failed and why."""
    tell(f"building the environment image {image}")
    with engine_errors(f"to build {image}"):
        events = client.build(
            fileobj=io.BytesIO(context), custom_context=True, tag=image, rm=True, forcerm=True, decode=True,
            buildargs=dict(build_args), labels={ENVIRONMENT_LABEL: image},
        )  # fmt: skip
        _follow_build(events, tell)


def pull(client: Any, image: str, tell: Tell) -> None:
    """Fetch an image from its registry. Raises JobError where the registry does not have or does not give it."""
    repository, tag = parse_repository_tag(image)
    tell(f"pulling {image}")
    try:
        with engine_errors(f"to pull {image}"):
            # Without a tag the engine would fetch every tag that there is.
            _follow_layers(client.pull(repository, tag or "latest", stream=True, decode=True), f"to pull {image}")
    except docker.errors.NotFound as error:
        raise JobError(
            f"there is no image {image}, neither in the Docker engine nor in its registry; build and push it, correct "
            "its name, or log in to the registry (docker login)"
        ) from error


def push(client: Any, image: str, tell: Tell) -> None:
    """Send an image to its registry. Raises JobError where the registry does not take it."""
    tell(f"pushing {image}")
    with engine_errors(f"to push {image}"):
        _follow_layers(client.push(image, stream=True, decode=True), f"to push {image}")


def _follow_build(events: Iterable[Mapping[str, Any]], tell: Tell) -> None:
    """Show a build's steps: as a bar on a terminal, else line by line."""
    step, said, error = "", collections.deque[str](maxlen=50), ""
    with tqdm(desc="building", unit="step", bar_format=_STEPS, leave=False, disable=None) as bar:
        for event in events:
            error = event.get("error", error)
            for line in _ESCAPES.sub("", event.get("stream", "")).splitlines():
                if found := _STEP.match(line):
                    step = f"step {found['number']}/{found['of']} ({shorten(found['what'], 100, placeholder=' ...')})"
                    bar.total, bar.n = int(found["of"]), int(found["number"])
                    said.clear()
                    if bar.disable:
                        tell(f"building: {step}")
                elif line.strip():
                    said.append(line.strip())
                bar.set_postfix_str(line.strip()[:60])
    if error:  # only now, because a stream that is read to its end closes its connection
        raise JobError(_build_failure(step, list(said), error))


def _build_failure(step: str, said: list[str], error: str) -> str:
    if "no space left on device" in " ".join([error, *said]).lower():
        return refusal("the build", "no space left on device")
    why = error
    if code := re.search(r"returned a non-zero code: (\d+)", error):  # then the command's own words say more
        words = [line for line in said if "error" in line.lower()] or [line for line in said if "--->" not in line]
        why = "; ".join([f"exit code {code[1]}", *(shorten(line, 200, placeholder=" ...") for line in words[-2:])])
    return f"the environment image could not be built: {step + ': ' if step else ''}{' '.join(why.split())}"


def _follow_layers(events: Iterable[Mapping[str, Any]], refused: str) -> None:
    """Show how much of an image's layers has travelled."""
    sizes: dict[str, tuple[int, int]] = {}
    error = ""
    with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for event in events:
            error = event.get("error", error)
            progress = event.get("progressDetail") or {}
            if event.get("status") in ("Downloading", "Pushing") and "total" in progress:
                sizes[event["id"]] = progress["current"], progress["total"]
                bar.n, bar.total = (sum(column) for column in zip(*sizes.values(), strict=True))
                bar.refresh()
    if error:
        raise JobError(refusal(refused, error))
