"""Talking to a Kubernetes API server: the connection, requests in plain dicts, what an error means in one line.

The kubernetes client gives the connection (kubeconfig, certificates, log-ins, proxies). Requests are made here, because
its generated functions differ between versions, drop unknown fields of a manifest, and hide the server's warnings.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes
import urllib3
from kubernetes.config.config_exception import ConfigException

from mlproject_backends import ConfigError, JobError, Unreachable, __version__
from mlproject_backends.inside import first_line

CONNECT_S, ANSWER_S = 10, 30
IN_CLUSTER = "in-cluster"
client: Any = kubernetes.client  # not all of its functions have types
config: Any = kubernetes.config
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)


class Refused(JobError):
    """The API server answered that it will not do it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Cluster:
    """One context of the kubeconfig, or the cluster that this process runs in. Threads may share it."""

    def __init__(self, configuration: Any, context: str, namespace: str):
        configuration.connection_pool_maxsize = 32  # a stream for each pod keeps one
        self._api = client.ApiClient(configuration)
        self._streams: set[urllib3.BaseHTTPResponse] = set()
        self._lock = threading.Lock()
        self.context, self.namespace = context, namespace

    @classmethod
    def connect(cls, context: str | None, namespace: str | None) -> Cluster:
        """Read the kubeconfig (KUBECONFIG, ~/.kube/config), or what a pod has; nothing is sent.

        Raises ConfigError where there is neither, or no such context.
        """
        configuration = client.Configuration()
        files = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
        if not any(Path(file).expanduser().is_file() for file in files.split(os.pathsep)):
            return cls._inside(configuration, context, namespace, files)
        try:
            contexts, current = config.list_kube_config_contexts(files)
        except Exception as error:  # whatever a YAML parser or the loader finds
            raise ConfigError(f"the kubeconfig {files} cannot be read: {first_line(error)}") from error
        names = sorted(entry["name"] for entry in contexts)
        chosen = next((entry for entry in contexts if entry["name"] == context), None) if context else current
        if not chosen:
            raise ConfigError(f"the kubeconfig {files} has no context '{context}'; allowed: {', '.join(names)}")
        try:
            config.load_kube_config(files, chosen["name"], configuration)
        except Exception as error:
            raise ConfigError(f"context '{chosen['name']}' of {files} cannot be used: {first_line(error)}") from error
        return cls(configuration, chosen["name"], namespace or chosen["context"].get("namespace") or "default")

    @classmethod
    def _inside(cls, configuration: Any, context: str | None, namespace: str | None, files: str) -> Cluster:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except ConfigException:
            raise ConfigError(
                f"there is no kubeconfig at {files}, and this is not inside a cluster; "
                "set KUBECONFIG to the file that your cluster gave you"
            ) from None
        if context not in (None, IN_CLUSTER):
            raise ConfigError(f"'kube-context' is '{context}', but there is no kubeconfig at {files} to find it in")
        own = _OWN_NAMESPACE.read_text().strip() if _OWN_NAMESPACE.is_file() else "default"
        return cls(configuration, IN_CLUSTER, namespace or own)

    def path(self, kind: str, name: str = "") -> str:
        """Where the API has this namespace's objects of a kind, or one of them."""
        group = "/apis/batch/v1" if kind == "jobs" else "/api/v1"
        return f"{group}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        return self._json("GET", path, parameters)[0]

    def create(self, path: str, body: Mapping[str, Any], **parameters: str) -> tuple[dict[str, Any], list[str]]:
        """The object as the server made it, and the server's warnings."""
        return self._json("POST", path, parameters, body)

    def patch(self, path: str, body: Mapping[str, Any]) -> None:
        self._json("PATCH", path, {}, body, "application/merge-patch+json")

    def delete(self, path: str, **parameters: str) -> None:
        self._json("DELETE", path, parameters)

    def text(self, path: str, **parameters: str) -> str:
        with self._answer("GET", path, parameters) as answer:
            return answer.data.decode(errors="replace")

    def lines(
        self, path: str, stop: threading.Event, silence_s: float | None = None, **parameters: str
    ) -> Iterator[str]:
        """The lines of an answer that goes on, as they come.

        It ends when the server ends it, when the connection breaks, when nothing comes for `silence_s`, and with
        close_streams() after `stop` was set.
        """
        with self._answer("GET", path, parameters, read_s=silence_s) as answer:
            with self._lock:
                self._streams.add(answer)
            try:
                yield from _lines(answer) if not stop.is_set() else ()
            finally:
                with self._lock:
                    self._streams.discard(answer)

    def close_streams(self) -> None:
        """End all lines() that other threads wait for."""
        with self._lock:
            for answer in self._streams:
                sock = getattr(getattr(answer, "connection", None), "sock", None)
                if sock:
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own: another thread reads

    def close(self) -> None:
        self._api.rest_client.pool_manager.clear()

    def _json(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> tuple[dict[str, Any], list[str]]:
        with self._answer(method, path, parameters, body, content_type) as answer:
            return json.loads(answer.data), [_warning_text(text) for text in answer.headers.getlist("Warning")]

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        read_s: float | None = ANSWER_S,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """A good answer, closed at the end of the block. Raises Refused and Unreachable."""
        configuration = self._api.configuration
        headers = {"Accept": "application/json", "User-Agent": f"mlproject-backends/{__version__}"}
        try:
            if token := configuration.auth_settings().get("BearerToken"):  # made anew when it has expired
                headers[token["key"]] = token["value"]
        except ConfigException as error:
            raise Refused(f"the log-in of context '{self.context}' failed: {first_line(error)}", 401) from error
        if body is not None:
            headers["Content-Type"] = content_type
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            answer = self._api.rest_client.pool_manager.request(
                method,
                f"{configuration.host}{path}{query}",
                body=None if body is None else json.dumps(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
                retries=False,
                preload_content=False,
            )
            try:
                if not 200 <= answer.status < 300:
                    raise self._error(answer.status, answer.data)
                yield answer
            finally:
                answer.close()
                answer.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(
                f"the API server {configuration.host} of context '{self.context}' does not answer ({_cause(error)})"
            ) from error

    def _error(self, status: int, body: bytes) -> JobError:
        """The server's Status as one line, with what to do."""
        try:
            said = json.loads(body)
        except ValueError:
            said = {}
        message = " ".join(str(said.get("message") or body.decode(errors="replace") or "no reason given").split())
        if status in _TRY_AGAIN:
            return Unreachable(f"the API server is not well ({status}: {message})")
        if status == 401:
            return Refused(f"the API server does not know the user of context '{self.context}'; log in again", status)
        if status == 403:
            words = message.partition(" is forbidden: ")[2] or message
            advice = "; ask the cluster's administrator for that right" if " cannot " in words else ""
            return Refused(f"forbidden: {words}{advice}", status)
        if status == 404 and said.get("details", {}).get("kind") == "namespaces":
            return Refused(
                f"the namespace '{self.namespace}' does not exist in context '{self.context}'; name another as "
                f"'namespace', or create it: kubectl create namespace {self.namespace}",
                status,
            )
        return Refused(f"the API server refused: {message}", status)


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[str]:
    rest = b""
    try:
        for chunk in answer.stream(amt=None, decode_content=False):
            *complete, rest = (rest + chunk).split(b"\n")
            for line in complete:
                yield line.decode(errors="replace")
    except (urllib3.exceptions.HTTPError, OSError):
        return
    if rest:
        yield rest.decode(errors="replace")


def _warning_text(header: str) -> str:
    """The text of a Warning header: 299 - "text"."""
    match = re.fullmatch(r'\d{3} \S+ "(.*)"', header)
    return re.sub(r"\\(.)", r"\1", match[1]) if match else header


def _cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return getattr(error, "strerror", None) or first_line(error)
