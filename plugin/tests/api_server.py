"""A small Kubernetes API server for tests: the requests that the plugin makes, answered as the recordings show.

What becomes of a Job is for a controller: replay.py plays a recording, pods.py runs containers.
"""

import base64
import contextlib
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pod_security
from api_rules import Problem, fill_in_job, refuse_bad_job, refuse_unknown_fields
from local_ports import free_port
from object_store import FORGOTTEN, Object, PodOutput, Store, new_metadata, selector_of

KINDS = {"jobs": "Job", "pods": "Pod", "events": "Event", "secrets": "Secret", "services": "Service"}
GROUPS = {"jobs": "batch", "selfsubjectaccessreviews": "authorization.k8s.io"}
USER = "tester"


@dataclass
class Fault:
    """Requests that are answered with an error, the next `times` of them."""

    code: int
    method: str = ""
    path: str = ""  # a part of it
    query: str = ""  # a part of it, with the ? in front
    times: int = 1
    status: Object | None = None  # what the server says


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    body: Any = None


@dataclass
class ApiServer:
    """One namespace of a cluster, served at a port of 127.0.0.1. It can go away and come back, with all it knows."""

    namespace: str = "ml"
    controller: Callable[["ApiServer", Object], None] = lambda server, job: None  # is given each new Job
    enforce: str = ""  # "restricted": the Pod Security Standard of the namespace
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    forbidden: set[tuple[str, str]] = field(default_factory=set)  # (verb, resource)
    logs: dict[str, PodOutput] = field(default_factory=dict)  # by pod

    def __post_init__(self) -> None:
        self.store = Store(self.namespace)
        self.port = free_port()
        self.on_delete: list[Callable[[Object, str], None]] = []  # told of each Job that goes, and how
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, at the same port as before."""
        self._connections: set[socket.socket] = set()
        self._stopped = threading.Event()
        self._server = _Listener(("127.0.0.1", self.port), _Handler)
        self._server.api = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close everything, in the middle of whatever it is, and refuse connections."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Break all connections that are open now."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stopped(self) -> bool:
        return self._stopped.is_set()

    def kubeconfig(self, path: Path, context: str = "test", namespace: str | None = None) -> Path:
        """Write a kubeconfig of one context for this server."""
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": context,
                    "clusters": [{"name": "here", "cluster": {"server": self.url}}],
                    "users": [{"name": USER, "user": {"token": "no-secret"}}],
                    "contexts": [
                        {
                            "name": context,
                            "context": {"cluster": "here", "user": USER, "namespace": namespace or self.namespace},
                        }
                    ],
                }
            )
        )
        return path

    def made(self, kind: str) -> list[Any]:
        """The bodies that were posted for a kind and not only tried."""
        return [
            request.body
            for request in self.requests
            if request.method == "POST" and request.path.endswith(f"/{kind}") and "dryRun" not in request.query
        ]

    # What the requests do

    def answer(self, request: Request) -> tuple[int, Object | Iterator[str], list[str]]:
        """Status, body (an object, or lines that go on) and warnings."""
        self.requests.append(request)
        for fault in self.faults:
            query = "?" + urllib.parse.urlencode(request.query)
            if fault.times and fault.method in request.method and fault.path in request.path and fault.query in query:
                fault.times -= 1
                reason = _REASONS.get(fault.code, "InternalError")
                raise Problem(fault.code, reason, f"made to fail: {fault.code}", said=fault.status)
        if request.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = request.body["spec"]["resourceAttributes"]
            allowed = (asked["verb"], asked["resource"]) not in self.forbidden
            return 201, {**request.body, "status": {"allowed": allowed}}, []
        match = re.fullmatch(
            r"/apis?(?:/batch)?/v1/namespaces/([^/]+)(?:/([^/]+)(?:/([^/]+)(?:/([^/]+))?)?)?", request.path
        )
        if not match:
            raise Problem(404, "NotFound", "the server could not find the requested resource")
        namespace, kind, name, part = match.groups()
        self._authorize(request, kind, name, part)
        if namespace != self.namespace and (request.method == "POST" or not kind):
            raise _not_found("namespaces", namespace, core=True)
        if not kind:
            return 200, {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": namespace}}, []
        if part == "log":
            return 200, self._log(name, request.query), []
        if part == "eviction":
            return 201, self._evict(name), []
        if request.method == "POST":
            return self._create(kind, request)
        if request.method == "GET" and not name:
            return 200, self._list_or_watch(kind, namespace, request.query), []
        thing = self.store.get(kind, name) if namespace == self.namespace else None
        if thing is None:
            raise _not_found(kind, name)
        if request.method == "DELETE":
            return 200, self._delete(kind, thing, request.query, request.body), []
        if request.method == "PATCH":
            return 200, self.store.change(kind, name, lambda old: _merge(old, request.body)) or {}, []
        return 200, thing, []

    def _authorize(self, request: Request, kind: str | None, name: str | None, part: str | None) -> None:
        verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "GET": "get" if name or not kind else "list"}
        verb = "watch" if "watch" in request.query else verbs[request.method]
        resource = "/".join(word for word in (kind or "namespaces", part) if word)
        if (verb, resource) in self.forbidden:
            group = GROUPS.get(kind or "", "")
            where = f"{resource}.{group}" if group else resource
            raise Problem(
                403,
                "Forbidden",
                f'{where} is forbidden: User "{USER}" cannot {verb} resource "{resource}" in API group "{group}" '
                f'in the namespace "{self.namespace}"',
                {"kind": kind, **({"group": group} if group else {})},
            )

    def _create(self, kind: str, request: Request) -> tuple[int, Object, list[str]]:
        thing = json.loads(json.dumps(request.body))
        if request.query.get("fieldValidation") == "Strict":
            refuse_unknown_fields(thing)
        if kind == "jobs":
            refuse_bad_job(thing)
        name = thing["metadata"]["name"]
        if self.store.get(kind, name):
            group = GROUPS.get(kind, "")
            message = f'{kind}{"." if group else ""}{group} "{name}" already exists'
            raise Problem(409, "AlreadyExists", message, {"name": name, "group": group, "kind": kind})
        thing["metadata"] = new_metadata(thing["metadata"], self.namespace)
        warnings = []
        if kind == "jobs":
            fill_in_job(thing)
            if self.enforce and (violations := pod_security.restricted(thing["spec"]["template"])):
                warnings = [f'would violate PodSecurity "restricted:latest": {", ".join(violations)}']
        if kind == "secrets":
            values = thing.pop("stringData", {})
            thing["data"] = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        if "dryRun" in request.query:
            return 201, thing, warnings
        thing = self.store.put(kind, thing)
        if kind == "jobs":
            self.controller(self, thing)
        return 201, thing, warnings

    def _list_or_watch(self, kind: str, namespace: str, query: dict[str, str]) -> Object | Iterator[str]:
        selector = selector_of(query)
        if namespace != self.namespace:
            selector = lambda thing: False  # noqa: E731
        if "watch" in query:
            return self._watch(kind, query, selector)
        items, version = self.store.list(kind, selector)
        return {
            "kind": f"{KINDS[kind]}List",
            "apiVersion": "batch/v1" if kind == "jobs" else "v1",
            "metadata": {"resourceVersion": str(version)},
            # Items of a list carry neither: the list says what they are.
            "items": [
                {key: value for key, value in item.items() if key not in ("kind", "apiVersion")} for item in items
            ],
        }

    def _watch(self, kind: str, query: dict[str, str], selector: Callable[[Object], bool]) -> Iterator[str]:
        since, timeout_s = int(query["resourceVersion"]), float(query.get("timeoutSeconds", 60))
        for event, thing in self.store.watch(kind, since, selector, timeout_s, self.stopped):
            if event == FORGOTTEN:
                message = f"too old resource version: {thing['version']} ({thing['oldest']})"
                yield json.dumps({"type": "ERROR", "object": Problem(410, "Expired", message).status})
            else:
                yield json.dumps({"type": event, "object": thing})
        if "allowWatchBookmarks" in query and not self.stopped():
            mark = {"kind": KINDS[kind], "metadata": {"resourceVersion": str(self.store.version)}}
            yield json.dumps({"type": "BOOKMARK", "object": mark})

    def _delete(self, kind: str, thing: Object, query: dict[str, str], body: Any) -> Object:
        name = thing["metadata"]["name"]
        policy = query.get("propagationPolicy") or (body or {}).get("propagationPolicy") or "Orphan"
        if kind == "pods":
            for told in self.on_delete:
                told(thing, "Pod")
            return thing
        self.store.remove(kind, name)
        if kind == "jobs":
            for told in self.on_delete:
                told(thing, policy)
            if policy != "Orphan":
                self._collect_garbage(thing)
        group = GROUPS.get(kind, "")
        details = {"name": name, "group": group, "kind": kind, "uid": thing["metadata"]["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def _collect_garbage(self, owner: Object) -> None:
        for kind in ("secrets", "services"):
            for thing in self.store.list(kind)[0]:
                owners = thing["metadata"].get("ownerReferences", ())
                if any(one["uid"] == owner["metadata"]["uid"] for one in owners):
                    self.store.remove(kind, thing["metadata"]["name"])

    def _evict(self, name: str) -> Object:
        pod = self.store.get("pods", name)
        if pod is None:
            raise _not_found("pods", name, core=True)
        for told in self.on_delete:
            told(pod, "Eviction")
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}

    def _log(self, name: str, query: dict[str, str]) -> Iterator[str]:
        pod = self.store.get("pods", name)
        if pod is None:
            raise _not_found("pods", name, core=True)
        if name not in self.logs:
            status = (
                pod["status"].get("containerStatuses") or [{"state": {"waiting": {"reason": "ContainerCreating"}}}]
            )[0]
            reason = status["state"].get("waiting", {}).get("reason", "ContainerCreating")
            message = f'container "{query["container"]}" in pod "{name}" is waiting to start: {reason}'
            raise Problem(400, "BadRequest", message)
        follow, timestamps = query.get("follow") == "true", query.get("timestamps") == "true"
        return self.logs[name].read(follow, query.get("sinceTime", ""), timestamps, self.stopped)


_REASONS = {401: "Unauthorized", 403: "Forbidden", 410: "Expired", 429: "TooManyRequests", 503: "ServiceUnavailable"}


def _not_found(kind: str, name: str, core: bool = False) -> Problem:
    group = "" if core else GROUPS.get(kind, "")
    details = {"name": name, "kind": kind, **({"group": group} if group else {})}
    return Problem(404, "NotFound", f'{kind}{"." if group else ""}{group} "{name}" not found', details)


def _merge(old: Object, patch: Object) -> None:
    for key, value in patch.items():
        if value is None:
            old.pop(key, None)
        elif isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value)
        else:
            old[key] = value


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    api: ApiServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.api._connections.add(self.connection)

    def finish(self) -> None:
        self.server.api._connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the other side is gone, or drop_connections() was called
            self.close_connection = True

    def _answer(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        request = Request(self.command, address.path, dict(urllib.parse.parse_qsl(address.query)), body)
        try:
            code, answer, warnings = self.server.api.answer(request)
        except Problem as problem:
            code, answer, warnings = problem.code, problem.status, []
        if isinstance(answer, dict):
            self._send(code, answer, warnings)
        else:
            self._send_lines(code, answer)

    def _send_lines(self, code: int, answer: Iterator[str]) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if "/log?" in self.path else "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in answer:
            data = f"{line}\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, code: int, body: Object, warnings: list[str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for warning in warnings:
            quoted = warning.replace("\\", "\\\\").replace('"', '\\"')
            self.send_header("Warning", f'299 - "{quoted}"')
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
