"""One Job followed to its end: its progress told, its pods' output passed on, and given up when it cannot run."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mlproject_backends import JobError, Unreachable
from mlproject_backends.cluster import Cluster, Refused
from mlproject_backends.following import AWAY_S, LONGEST_PAUSE_S, Connection, Inbox, PodLog, Watcher
from mlproject_backends.job import Output, State, Tell
from mlproject_backends.manifests import JOB_NAME, MAIN
from mlproject_backends.status import (
    Obstacle,
    Patience,
    given_up,
    gone,
    has_log,
    kubernetes_obstacle,
    kubernetes_state,
    main_state,
    pod_progress,
    rank,
    retry_progress,
)

DRAIN_S = 30  # for the last words of pods that are being stopped, after the time that Kubernetes gives them
AT_ONCE = 10_000  # lines that may wait to be shown


class JobWatch:
    """Used once, by one thread: all that the threads find out is handled in run()."""

    def __init__(self, cluster: Cluster, name: str, cancelled: Callable[[], bool], tell: Tell, output: Output):
        self._cluster, self._name, self._cancelled = cluster, name, cancelled
        self._tell, self._output = tell, output
        self._inbox: Inbox = queue.Queue(AT_ONCE)
        self._connection = Connection(self._inbox, tell, self._fail)
        self._job: dict[str, Any] | None = None
        self._pods: dict[str, dict[str, Any]] = {}  # also those that are gone, as they were last
        self._events: dict[str, dict[str, Any]] = {}  # the latest last
        self._logs: dict[str, PodLog] = {}
        self._state: State | None = None  # once it has ended
        self._ended_by_itself = False  # and not because someone deleted the Job or it was given up
        self._failure: Exception | None = None
        self._obstacle: Obstacle | None = None
        self._blocked_since = 0.0  # when the first obstacle of its kind was seen
        self._told: set[tuple[str, str]] = set()
        self._shown_at = 0.0  # when the last line came

    def run(self) -> State:
        """Follow the Job until it has ended and all its output was passed on."""
        job, pods = f"metadata.name={self._name}", f"{JOB_NAME}={self._name}"
        watchers = [
            self._watcher("jobs", {"fieldSelector": job}, self._jobs_listed, self._job_changed, self._fail),
            self._watcher("pods", {"labelSelector": pods}, self._pods_listed, self._pod_changed, self._told_less),
            self._watcher(
                "events",
                {"fieldSelector": f"involvedObject.name={self._name}"},
                self._events_listed,
                self._event_changed,
                self._told_less,
                watch_all=True,  # of all pods, whose names are not known yet
            ),
        ]
        for watcher in watchers:
            watcher.start()
        try:
            while self._state is None:
                self._handle_next(self._time_left())
                self._give_up_in_time()
            self._drain()
            return self._explained(self._state)
        finally:
            self._connection.stopped.set()
            self._cluster.close_streams()
            for thread in (*watchers, *self._logs.values()):
                thread.join(timeout=1)

    def _watcher(self, *arguments: Any, **options: Any) -> Watcher:
        return Watcher(self._cluster, self._connection, *arguments, **options)

    def _handle_next(self, timeout_s: float | None) -> None:
        with contextlib.suppress(queue.Empty):
            self._inbox.get(timeout=timeout_s)()
        if self._failure:
            raise self._failure

    # What the watchers found

    def _jobs_listed(self, jobs: list[dict[str, Any]]) -> None:
        if jobs:
            self._job_changed("MODIFIED", jobs[0])
        else:
            self._end(State("KILLED", "cancelled") if self._cancelled() else gone(self._name))

    def _job_changed(self, kind: str, job: dict[str, Any]) -> None:
        self._job = job
        self._look()
        if kind == "DELETED" and self._cancelled():
            self._end(State("KILLED", "cancelled"))
        elif kind == "DELETED":
            self._end(State("FAILED", f"someone deleted the Job {self._name} before it ended"))

    def _pods_listed(self, pods: list[dict[str, Any]]) -> None:
        there = {pod["metadata"]["name"] for pod in pods}
        for name in self._pods.keys() - there:
            self._pod_changed("DELETED", self._pods[name])
        for pod in pods:
            self._pod_changed("MODIFIED", pod)

    def _pod_changed(self, kind: str, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        self._pods[name] = pod
        if has_log(pod) and name not in self._logs:
            prefix = "" if rank(pod) is None else f"[{rank(pod)}] "
            show = partial(self._show, prefix)
            self._logs[name] = PodLog(self._cluster, self._connection, name, MAIN, show, self._tell)
            self._logs[name].start()
        if name in self._logs and (kind == "DELETED" or main_state(pod, "terminated")):
            self._logs[name].ended.set()
        self._look()

    def _events_listed(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._event_changed("MODIFIED", event)

    def _event_changed(self, kind: str, event: dict[str, Any]) -> None:
        about = event["involvedObject"].get("name", "")
        if kind != "DELETED" and (about == self._name or about in self._pods or about.startswith(f"{self._name}-")):
            self._events.pop(event["metadata"]["name"], None)
            self._events[event["metadata"]["name"]] = event
            self._look()

    def _told_less(self, error: Refused) -> None:
        self._tell(f"not everything can be shown: {error}")

    def _fail(self, error: Exception) -> None:
        self._failure = error

    def _show(self, prefix: str, line: str) -> None:
        self._shown_at = time.monotonic()
        self._output(prefix + line)

    # What it means

    def _look(self) -> None:
        """See whether the Job has ended, and tell what is new."""
        if self._job is None or self._state:
            return
        pods, events = list(self._pods.values()), list(self._events.values())
        state = kubernetes_state(self._job, pods, events)
        if state.ended:
            self._ended_by_itself = True
            self._end(state)
            return
        obstacle = kubernetes_obstacle(self._job, pods, events)
        if obstacle and (not self._obstacle or self._obstacle.patience is not obstacle.patience):
            self._blocked_since = time.monotonic()
        self._obstacle = obstacle
        if obstacle and obstacle.patience is not Patience.NONE:
            self._tell_once("", obstacle.reason)
        if self._job["spec"].get("suspend"):
            self._tell_once("", state.reason)
        for name, sentence in retry_progress(self._job, pods).items():
            self._tell_once(f"{name} failed", sentence)
        for name, pod in self._pods.items():
            if progress := pod_progress(pod, events):
                self._tell_once(name, progress if rank(pod) is None else f"rank {rank(pod)}: {progress}")

    def _tell_once(self, about: str, sentence: str) -> None:
        if (about, sentence) not in self._told:
            self._told.add((about, sentence))
            self._tell(sentence)

    def _end(self, state: State) -> None:
        if self._state is None:
            self._state = state

    def _explained(self, state: State) -> State:
        """The end, by all pods: a Job may be seen to have failed before its pods are, which know why."""
        if self._job is None or not self._ended_by_itself:
            return state
        return kubernetes_state(self._job, list(self._pods.values()), list(self._events.values()))

    def _time_left(self) -> float | None:
        if self._obstacle is None or self._job is None:
            return None
        limit_s, _ = given_up(self._job, self._obstacle)
        return max(0.0, self._blocked_since + limit_s - time.monotonic())

    def _give_up_in_time(self) -> None:
        """Delete a Job that something keeps from running for too long: by itself it would wait for ever."""
        if self._state or self._obstacle is None or self._job is None or self._time_left():
            return
        _, state = given_up(self._job, self._obstacle)
        self._end(state)
        with contextlib.suppress(JobError):  # it has failed in any case, and says why
            delete_job(self._cluster, self._name)

    def _drain(self) -> None:
        """Wait until all pods' output was passed on: of those that ended, however long it is."""
        with contextlib.suppress(Unreachable, Refused):  # pods that the watch has not shown yet
            pods = self._cluster.get(self._cluster.path("pods"), labelSelector=f"{JOB_NAME}={self._name}")
            self._pods_listed(pods["items"])
        graces = [pod["spec"].get("terminationGracePeriodSeconds", 30) for pod in self._pods.values()]
        began, wait_s = time.monotonic(), DRAIN_S + max(graces, default=0)
        while (reading := [log for log in self._logs.values() if log.is_alive()]) or not self._inbox.empty():
            progress = self._shown_at if all(log.ended.is_set() for log in reading) else began
            if time.monotonic() - max(began, progress) > wait_s:
                self._tell("the job's output may not be complete: its pods did not end in time")
                break
            self._handle_next(0.1)


def delete(cluster: Cluster, kind: str, name: str) -> None:
    """Delete an object and, in the background, what it owns: a bare delete of a Job would leave its pods running."""
    try:
        cluster.delete(cluster.path(kind, name), propagationPolicy="Background")
    except Refused as error:
        if error.status != 404:
            raise


def delete_job(cluster: Cluster, name: str) -> None:
    """Delete a Job, again while the API server is not well: nothing else would stop it. Gives up after AWAY_S."""
    began, pause_s = time.monotonic(), 0.25
    while True:
        try:
            delete(cluster, "jobs", name)
            return
        except Unreachable:
            if time.monotonic() - began > AWAY_S:
                raise
        time.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
