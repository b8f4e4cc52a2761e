"""What an API server keeps: objects with resource versions, and what happened to them for those who watch."""

import copy
import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
Selector = Callable[[Object], bool]
FORGOTTEN = "forgotten"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """Objects by kind ("jobs") and name, in one namespace. Threads may share it."""

    def __init__(self, namespace: str):
        self.namespace = namespace
        self.changed = threading.Condition(threading.RLock())
        self._objects: dict[str, dict[str, Object]] = {}
        self._history: list[tuple[int, str, str, str]] = []  # version, kind, type of event, object as JSON
        self._oldest = 0
        self._versions = itertools.count(1001)
        self.version = 1000

    def get(self, kind: str, name: str) -> Object | None:
        with self.changed:
            return copy.deepcopy(self._objects.get(kind, {}).get(name))

    def list(self, kind: str, selector: Selector = lambda thing: True) -> tuple[list[Object], int]:
        with self.changed:
            found = [copy.deepcopy(thing) for thing in self._objects.get(kind, {}).values() if selector(thing)]
            return found, self.version

    def put(self, kind: str, thing: Object) -> Object:
        """Add or replace an object; everyone who watches sees it."""
        with self.changed:
            known = self._objects.setdefault(kind, {})
            name = thing["metadata"]["name"]
            self._record(kind, "MODIFIED" if name in known else "ADDED", thing)
            known[name] = copy.deepcopy(thing)
            return copy.deepcopy(thing)

    def change(self, kind: str, name: str, change: Callable[[Object], None]) -> Object | None:
        """Apply `change` to an object; None where it is not there any more."""
        with self.changed:
            thing = self.get(kind, name)
            if thing is None:
                return None
            change(thing)
            return self.put(kind, thing)

    def remove(self, kind: str, name: str) -> Object | None:
        with self.changed:
            thing = self._objects.get(kind, {}).pop(name, None)
            if thing is not None:
                self._record(kind, "DELETED", thing)
            return thing

    def forget(self) -> None:
        """Keep no history: who watches from an earlier version than the present is told that it is gone."""
        with self.changed:
            self.version = next(self._versions)
            self._oldest = self.version
            self._history.clear()

    def _record(self, kind: str, event: str, thing: Object) -> None:
        self.version = next(self._versions)
        thing["metadata"]["resourceVersion"] = str(self.version)
        self._history.append((self.version, kind, event, json.dumps(thing)))
        self.changed.notify_all()

    def watch(
        self, kind: str, since: int, selector: Selector, timeout_s: float, stopped: Callable[[], bool]
    ) -> Iterator[tuple[str, Object]]:
        """The events after a version, as they come. FORGOTTEN where they are not known any more."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not stopped():
            with self.changed:
                if since < self._oldest:
                    yield FORGOTTEN, {"version": since, "oldest": self._oldest}
                    return
                new = [entry for entry in self._history if entry[0] > since]
                if not new:
                    self.changed.wait(0.2)
                    continue
            for version, changed_kind, event, text in new:
                since = version
                thing = json.loads(text)
                if changed_kind == kind and selector(thing):
                    yield event, thing


def selector_of(parameters: Mapping[str, str]) -> Selector:
    """labelSelector and fieldSelector, of which only `=` and `,` are known here."""
    labels = [part.split("=", 1) for part in parameters.get("labelSelector", "").split(",") if part]
    fields = [part.split("=", 1) for part in parameters.get("fieldSelector", "").split(",") if part]

    def selects(thing: Object) -> bool:
        has = thing["metadata"].get("labels") or {}
        return all(has.get(name) == value for name, value in labels) and all(
            _field(thing, path) == value for path, value in fields
        )

    return selects


def _field(thing: Object, path: str) -> Any:
    value: Any = thing
    for part in path.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return value


def new_metadata(metadata: Object, namespace: str) -> Object:
    """What a server adds to an object's metadata."""
    return {
        **metadata,
        "namespace": namespace,
        "uid": str(uuid.uuid4()),
        "generation": 1,
        "creationTimestamp": now(),
    }


def event(about: Object, kind: str, reason: str, message: str, warning: bool = False) -> Object:
    """An Event about an object, as controllers write it."""
    api_version = {"Job": "batch/v1"}.get(kind, "v1")
    metadata = about["metadata"]
    return {
        "kind": "Event",
        "apiVersion": "v1",
        "metadata": new_metadata({"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}"}, metadata["namespace"]),
        "involvedObject": {
            "kind": kind,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "apiVersion": api_version,
        },
        "reason": reason,
        "message": message,
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "count": 1,
        "type": "Warning" if warning else "Normal",
        "eventTime": None,
    }


class PodOutput:
    """The log of one container as a node keeps it: entries with their time. It grows until it is closed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.entries: list[str] = []
        self.closed = False

    def add(self, text: str, stamp: str | None = None) -> None:
        with self.changed:
            stamp = stamp or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
            self.entries.append(f"{stamp} {text}")
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def read(self, follow: bool, since: str, timestamps: bool, stopped: Callable[[], bool]) -> Iterator[str]:
        """Entries from a time on; with `follow` until the container has ended."""
        position = 0
        while not stopped():
            with self.changed:
                new, closed = self.entries[position:], self.closed
                if not new and follow and not closed:
                    self.changed.wait(0.2)
                    continue
            position += len(new)
            for entry in new:
                stamp, _, text = entry.partition(" ")
                if not since or re.sub(r"\.\d+Z", "Z", stamp) >= since:
                    yield entry if timestamps else text
            if not follow or closed:
                return
