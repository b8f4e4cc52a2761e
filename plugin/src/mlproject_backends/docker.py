"""Jobs as containers of a Docker engine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import tarfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import docker.errors

from mlproject_backends import JobError, NotSent, Unreachable
from mlproject_backends.config import Config
from mlproject_backends.engine import connect, engine_errors, pull, refusal
from mlproject_backends.environment import is_loopback
from mlproject_backends.job import CACHE_DIR, Job, Output, State, Tell
from mlproject_backends.status import CANCELLED, docker_state

CONTAINER_TAG, ENGINE_TAG = "mlproject.docker_container", "mlproject.docker_engine"
CACHE_VOLUME = "mlproject-cache"
SECRETS = "mlproject-secrets"
GRACE_S = 30  # between asking a container to stop and killing it; as on Kubernetes
ENGINE_WAIT_S = 60  # for an engine that restarts

# Where these name this machine itself, a container must share its network or call it by another name.
_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_HOST_ALIAS = "host.docker.internal"


class DockerTarget:
    """Runs jobs as containers of the engine that DOCKER_HOST names, else of the one at the default socket."""

    def __init__(self, config: Config, tell: Tell = lambda sentence: None):
        self._config, self._tell = config, tell

    def check(self) -> None:
        connect()

    def render(self, job: Job) -> dict[str, Any]:
        """The body of the Engine API's container create request, with the container's name as `Name`."""
        loopback = any(map(is_loopback, _addresses(job).values()))
        env = dict(_with_host_alias(job).env)
        if job.secrets:
            env["MLPROJECT_SECRETS_FILE"] = f"/{SECRETS}/env.json"
        body: dict[str, Any] = {
            "Name": job.name,
            "Image": job.image,
            "Entrypoint": [job.argv[0]],  # takes the place of one that the image may have
            "Cmd": list(job.argv[1:]),
            "Labels": {f"mlproject.{name}": value for name, value in sorted(job.labels.items())},
            "HostConfig": self._host_config(job, loopback),
        }
        if job.mounts and hasattr(os, "getuid"):
            # What the job writes into the launcher's folders belongs to the launcher. No image knows this user's name.
            body["User"] = f"{os.getuid()}:{os.getgid()}"
            env.setdefault("USER", "mlproject")
        body["Env"] = [f"{name}={value}" for name, value in sorted(env.items())]
        return body

    def _host_config(self, job: Job, loopback: bool) -> dict[str, Any]:
        resources = job.resources
        mounts = [{"Type": "bind", "Source": path, "Target": path} for path in job.mounts]
        if job.cache:
            mounts.append({"Type": "volume", "Source": self._config.cache_volume or CACHE_VOLUME, "Target": CACHE_DIR})
        host: dict[str, Any] = {"Init": True, "Mounts": mounts}
        if loopback and _shares_network():
            host["NetworkMode"] = "host"
        elif loopback:
            host["ExtraHosts"] = [f"{_HOST_ALIAS}:host-gateway"]
        if resources.cpu is not None:
            host["NanoCpus"] = round(resources.cpu * 10**9)
        if resources.memory_bytes is not None:
            host |= {"Memory": resources.memory_bytes, "MemorySwap": resources.memory_bytes}  # no swap on top
        if resources.shm_bytes is not None:
            host["ShmSize"] = resources.shm_bytes
        if resources.gpu:
            host["DeviceRequests"] = [{"Count": resources.gpu, "Capabilities": [["gpu"]]}]
        return host

    def submit(self, job: Job) -> SubmittedContainer:
        """Create and start the container; nothing is left of it where that fails (JobError)."""
        client, body = connect(self._config.docker_auth), self.render(job)
        name = body.pop("Name")
        with engine_errors(f"the container {name}"):
            engine = client.info()["ID"]
            try:
                container = client.create_container_from_config(body, name)["Id"]
            except docker.errors.ImageNotFound:
                pull(client, job.image, self._tell)
                container = client.create_container_from_config(body, name)["Id"]
            submitted = SubmittedContainer(client, container, engine)
            try:
                if job.secrets:
                    client.put_archive(container, "/", _secrets_archive(_with_host_alias(job).secrets))
                client.start(container)
            except BaseException as error:
                submitted.clean_up()
                if isinstance(error, docker.errors.NotFound):  # an executable or a device, not the container
                    raise JobError(refusal(f"to start {name}", error.explanation)) from error
                raise
        return submitted

    def find(self, tags: Mapping[str, str]) -> SubmittedContainer:
        """The container that an earlier submit() started. Raises NotSent, and JobError where another engine runs it."""
        if CONTAINER_TAG not in tags:
            raise NotSent(f"the run has no tag {CONTAINER_TAG}: it was not sent to Docker")
        client = connect()
        with engine_errors("to describe itself"):
            info = client.info()
        if tags.get(ENGINE_TAG, info["ID"]) != info["ID"]:
            raise JobError(
                f"the run's container belongs to another Docker engine than the one of {info['Name']}; ask on the "
                "machine that started it, or set DOCKER_HOST"
            )
        return SubmittedContainer(client, tags[CONTAINER_TAG], info["ID"])


class SubmittedContainer:
    """A container that was started for a job."""

    def __init__(self, client: Any, container: str, engine: str):
        self._client, self._container, self._short = client, container, container[:12]
        self.tags: Mapping[str, str] = {CONTAINER_TAG: container, ENGINE_TAG: engine}

    def watch(self, tell: Tell, output: Output) -> State:
        log, restarted = _Log(output), False
        tell(f"running in container {self._short}")
        while True:
            try:
                log.read(self._entries(follow=True, since=log.since))
                state = self.state()
                if state.ended:
                    log.read(self._entries(follow=False, since=log.since))  # what a broken stream has not brought
                    log.close()
                    return _after_restart(state) if restarted else state
            except Unreachable as error:
                tell(f"{error}; waiting up to {ENGINE_WAIT_S} s for it")
                if not self._engine_is_back():
                    log.close()
                    return State("FAILED", f"the Docker engine was lost while the job ran: {error}")
                tell("the Docker engine answers again")
                restarted = True
            time.sleep(0.1)  # the log ends a moment before the container does

    def state(self) -> State:
        try:
            with engine_errors(f"to describe container {self._short}"):
                return docker_state(self._client.inspect_container(self._container))
        except docker.errors.NotFound:
            return State("FAILED", f"container {self._short} is not there any more: someone removed it")

    def logs(self, output: Output) -> None:
        log = _Log(output)
        log.read(self._entries(follow=False))
        log.close()

    def cancel(self) -> None:
        if self.state().ended:
            return
        with contextlib.suppress(docker.errors.NotFound), engine_errors(f"to stop container {self._short}"):
            # The name tells every process that watches that this end was asked for.
            name = self._client.inspect_container(self._container)["Name"].lstrip("/")
            if not name.endswith(CANCELLED):
                self._client.rename(self._container, name + CANCELLED)
            self._client.stop(self._container, timeout=GRACE_S)

    def clean_up(self) -> None:
        with contextlib.suppress(docker.errors.NotFound), engine_errors(f"to remove container {self._short}"):
            self._client.remove_container(self._container, force=True)

    def _entries(self, follow: bool, since: int | None = None) -> Iterator[bytes]:
        """The log's entries, each with its time in front; none where the container is gone."""
        with contextlib.suppress(docker.errors.NotFound), engine_errors(f"the log of container {self._short}"):
            yield from self._client.logs(self._container, stream=True, follow=follow, timestamps=True, since=since)

    def _engine_is_back(self) -> bool:
        deadline = time.monotonic() + ENGINE_WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(Unreachable):
                self.state()
                return True
            time.sleep(0.5)
        return False


class _Log:
    """Passes lines on once each, though the engine may send entries again after a broken connection."""

    def __init__(self, output: Output):
        self._output = output
        self._second = b""
        self._seen: Counter[bytes] = Counter()  # the entries of that second: the engine's `since` is no finer
        self._line = b""

    @property
    def since(self) -> int | None:
        """The time to ask for entries from, in seconds since 1970; None for all of them."""
        return int(datetime.fromisoformat(self._second.decode() + "+00:00").timestamp()) if self._second else None

    def read(self, entries: Iterable[bytes]) -> None:
        known = self._seen.copy()
        for entry in entries:
            if known[entry]:
                known[entry] -= 1
                continue
            stamp, _, text = entry.partition(b" ")
            if stamp[:19] > self._second:  # 2026-11-21T08:30:00 of a time in UTC
                self._second = stamp[:19]
                self._seen.clear()
            self._seen[entry] += 1
            self._line += text  # the engine cuts a line after 16 KiB
            if text.endswith(b"\n"):
                self.close()

    def close(self) -> None:
        """Pass on a last line that has no newline."""
        if self._line:
            self._output(self._line.decode(errors="replace").rstrip("\r\n"))
            self._line = b""


def _after_restart(state: State) -> State:
    if (state.exit_code or 0) <= 128:
        return state
    return replace(state, reason=f"{state.reason}; the Docker engine stopped meanwhile, and its containers with it")


def _addresses(job: Job) -> dict[str, str]:
    values = {**job.env, **job.secrets}
    return {name: values[name] for name in _ADDRESSES if name in values}


def _shares_network() -> bool:
    """Whether `host` networking reaches this machine: elsewhere the engine runs in a virtual machine."""
    return platform.system() == "Linux"


def _with_host_alias(job: Job) -> Job:
    """The job with loopback addresses in the name that a container has for this machine, where it needs one."""
    if _shares_network():
        return job
    moved = {name: _rename_host(value) for name, value in _addresses(job).items() if is_loopback(value)}
    return replace(
        job,
        env={name: moved.get(name, value) for name, value in job.env.items()},
        secrets={name: moved.get(name, value) for name, value in job.secrets.items()},
    )


def _rename_host(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    user, at, _ = parts.netloc.rpartition("@")
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=f"{user}{at}{_HOST_ALIAS}{port}").geturl()


def _secrets_archive(secrets: Mapping[str, str]) -> bytes:
    """A tar of the folder that the job reads its secrets from, and removes them in, whatever its user is."""
    text = json.dumps(dict(secrets)).encode()
    folder, file = tarfile.TarInfo(SECRETS), tarfile.TarInfo(f"{SECRETS}/env.json")
    folder.type, folder.mode = tarfile.DIRTYPE, 0o777
    file.size, file.mode = len(text), 0o444
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(folder)
        tar.addfile(file, io.BytesIO(text))
    return archive.getvalue()
