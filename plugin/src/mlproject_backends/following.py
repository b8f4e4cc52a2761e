"""Threads that follow what happens in a cluster: list and watch of a collection, and the output of a pod.

Each puts calls into an inbox, and the one that follows a job takes them out: everything is handled in one thread.
A connection that breaks is made again, from where it was.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mlproject_backends import Unreachable
from mlproject_backends.cluster import Cluster, Refused

WATCH_S = 60  # then the server ends a watch; a dead connection is noticed soon after
SILENCE_S = 300  # of a job's output; then it is asked for again, for the connection may be dead
LONGEST_PAUSE_S = 4.0
NODE_AWAY = 5  # attempts to read a log
AWAY_S = 600  # how long an API server may be away before following is given up

Inbox = queue.Queue[Callable[[], None]]
Changed = Callable[[str, dict[str, Any]], None]  # ADDED, MODIFIED or DELETED, and the object


class Connection:
    """Whether the API server answers, as all threads see it: told once when it stops, once when it is back."""

    def __init__(self, inbox: Inbox, tell: Callable[[str], None], fail: Callable[[Exception], None]):
        self.stopped = threading.Event()
        self._inbox, self._tell, self._fail = inbox, tell, fail
        self._lock = threading.Lock()
        self._lost: dict[str, float] = {}  # who it does not answer -> since when
        self._pauses: Counter[str] = Counter()

    def put(self, call: Callable[[], None]) -> None:
        """Into the inbox; waits while it is full, and gives up with everything else."""
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._inbox.put(call, timeout=0.5)
                break

    def answered(self, who: str) -> None:
        with self._lock:
            self._pauses[who] = 0
            if self._lost.pop(who, None) is not None and not self._lost:
                self.put(lambda: self._tell("the API server answers again"))

    def lost(self, who: str, error: Unreachable) -> None:
        """Wait before the next try, a little longer each time."""
        with self._lock:
            if not self._lost:
                self.put(lambda: self._tell(f"{error}; the job goes on meanwhile, trying again"))
            since = self._lost.setdefault(who, time.monotonic())
            self._pauses[who] += 1
            pause = min(LONGEST_PAUSE_S, 0.25 * 2 ** min(self._pauses[who], 10))
        if time.monotonic() - since > AWAY_S:
            self.failed(error)
        self.stopped.wait(pause)

    def is_lost(self) -> bool:
        with self._lock:
            return bool(self._lost)

    def failed(self, error: Exception) -> None:
        """Following cannot go on; the error is raised in the thread that takes from the inbox."""
        self.put(partial(self._fail, error))


class _Follower(threading.Thread):
    """A thread whose faults are not lost."""

    def __init__(self, name: str, cluster: Cluster, connection: Connection):
        super().__init__(name=name, daemon=True)
        self._cluster, self._connection = cluster, connection

    def run(self) -> None:
        try:
            self._follow()
        except Exception as error:
            self._connection.failed(error)

    def _follow(self) -> None:
        raise NotImplementedError


class _Gone(Exception):
    """The server does not remember as far back as the version that was asked for."""


class Watcher(_Follower):
    """List and watch of some objects. `listed` gets all there are, at first and after a gap; `changed` one change.

    `selector` chooses what is listed, and what is watched unless `watch_all` says that `changed` chooses itself.
    """

    def __init__(
        self,
        cluster: Cluster,
        connection: Connection,
        kind: str,
        selector: Mapping[str, str],
        listed: Callable[[list[dict[str, Any]]], None],
        changed: Changed,
        refused: Callable[[Refused], None],
        watch_all: bool = False,
    ):
        super().__init__(f"watch {kind}", cluster, connection)
        self._path, self._selector = cluster.path(kind), selector
        self._watch_selector = {} if watch_all else selector
        self._listed, self._changed, self._refused = listed, changed, refused

    def _follow(self) -> None:
        while not self._connection.stopped.is_set():
            try:
                version = self._list()
                self._connection.answered(self.name)
                while not self._connection.stopped.is_set():
                    version = self._watch(version)
                    self._connection.stopped.wait(0.1)
            except _Gone:
                self._connection.stopped.wait(0.1)
            except Unreachable as error:
                self._connection.lost(self.name, error)
            except Refused as error:
                self._connection.answered(self.name)
                self._connection.put(partial(self._refused, error))
                break

    def _list(self) -> str:
        answer = self._cluster.get(self._path, **self._selector)
        self._connection.put(partial(self._listed, answer["items"]))
        version: str = answer["metadata"]["resourceVersion"]
        return version

    def _watch(self, version: str) -> str:
        """One watch, to its end; the version to go on from."""
        parameters = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
            **self._watch_selector,
        }
        try:
            for line in self._cluster.lines(self._path, self._connection.stopped, WATCH_S + 15, **parameters):
                event = json.loads(line)
                kind, thing = event["type"], event["object"]
                if kind == "ERROR" and thing.get("code") == 410:
                    raise _Gone
                if kind == "ERROR":
                    raise Unreachable(f"the API server ended a watch ({thing.get('message')})")
                version = thing["metadata"]["resourceVersion"]
                if kind != "BOOKMARK":
                    self._connection.put(partial(self._changed, kind, thing))
        except Refused as error:
            if error.status == 410:
                raise _Gone from error
            raise
        return version


class PodLog(_Follower):
    """The output of one pod's container, line by line, to its end; a broken stream is taken up where it broke."""

    def __init__(
        self,
        cluster: Cluster,
        connection: Connection,
        pod: str,
        container: str,
        output: Callable[[str], None],
        remark: Callable[[str], None],
    ):
        super().__init__(f"log of {pod}", cluster, connection)
        self._path, self._pod, self._container = cluster.path("pods", pod) + "/log", pod, container
        self._output, self._remark = output, remark
        self.ended = threading.Event()  # set when the container has ended: what the log holds then is all
        self._lines = LogLines()
        self._failures = 0  # one after the other

    def _follow(self) -> None:
        while not self._connection.stopped.is_set():
            complete = self.ended.is_set()
            try:
                self._read()
                self._failures = 0
                if complete:
                    break
                self.ended.wait(0.5)  # the log ends a moment before the pod says so
            except Unreachable as error:
                self._wait(error)
            except Refused as error:
                if error.status == 403:
                    self._connection.put(partial(self._remark, f"no output can be shown: {error}"))
                if error.status in (403, 404) or complete:  # 404: the pod is gone, and its log with it
                    break
                self._connection.stopped.wait(0.5)

    def _wait(self, error: Unreachable) -> None:
        """Before the next try. That the API server is away, the watchers tell; that a node is, only its logs show."""
        self._failures += 1
        if self._failures == NODE_AWAY and not self._connection.is_lost():
            self._connection.put(partial(self._remark, f"the output of {self._pod} cannot be read now: {error}"))
        self._connection.stopped.wait(min(LONGEST_PAUSE_S, 0.25 * 2 ** min(self._failures, 10)))

    def _read(self) -> None:
        parameters = {"container": self._container, "timestamps": "true", "follow": "true", **self._lines.since()}
        self._lines.again()
        for entry in self._cluster.lines(self._path, self._connection.stopped, SILENCE_S, **parameters):
            line = self._lines.new(entry)
            if line is not None:
                self._connection.put(partial(self._output, line))


class LogLines:
    """Passes each entry of a log on once, though a log that is asked for again starts at a full second."""

    def __init__(self) -> None:
        self._second = ""
        self._offset = ""
        self._seen: Counter[str] = Counter()  # the entries of that second and later
        self._known: Counter[str] = Counter()  # of these, the ones that are about to come again

    def since(self) -> dict[str, str]:
        return {"sinceTime": self._second + self._offset} if self._second else {}

    def again(self) -> None:
        """The log is asked for again, from since() on."""
        self._known = self._seen.copy()

    def new(self, entry: str) -> str | None:
        """The text of an entry that was not passed on before; None of one that was, or that the node put there."""
        stamp, _, text = entry.partition(" ")
        time = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)", stamp)
        if not time:
            return None
        if self._known[entry]:
            self._known[entry] -= 1
            return None
        if time[1] > self._second:
            self._second, self._offset = time.groups()
            self._seen.clear()
        self._seen[entry] += 1
        return text.rstrip("\r")
