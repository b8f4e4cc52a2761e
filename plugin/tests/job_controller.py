"""Runs the Jobs of the test API server as a cluster does, with shorter pauses."""

import itertools
import threading
import time
import uuid
from typing import Any

import pod_security
from api_server import ApiServer
from object_store import Object, event, now
from pods import LABEL, TICK_S, RunningPod, suffix


class Containers:
    """A controller for ApiServer."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.labels = {LABEL: uuid.uuid4().hex}  # of all that is made in the engine
        self.refused = ""  # with these words, every pod is refused
        self.claims: set[str] = set()  # names of the volumes that there are
        self.jobs: dict[str, RunningJob] = {}

    def __call__(self, server: ApiServer, job: Object) -> None:
        if self._told_of_deletions not in server.on_delete:
            server.on_delete.append(self._told_of_deletions)
        running = RunningJob(self, server, job)
        self.jobs[job["metadata"]["name"]] = running
        running.start()

    def _told_of_deletions(self, thing: Object, how: str) -> None:
        name = thing["metadata"]["name"]
        if name in self.jobs:
            self.jobs[name].deleted(how)
        for job in self.jobs.values():
            for pod in job.pods:
                if pod.name == name:
                    pod.stop(how == "Eviction")

    def close(self) -> None:
        """Remove everything that was made."""
        for job in self.jobs.values():
            job.gone.set()
            job.join(10)
            for pod in job.pods:
                pod.kill()
        chosen = {"label": [f"{name}={value}" for name, value in self.labels.items()]}
        for network in self.engine.networks(filters=chosen):
            self.engine.remove_network(network["Id"])
        for volume in self.engine.volumes(filters=chosen)["Volumes"] or ():
            self.engine.remove_volume(volume["Name"])


class RunningJob(threading.Thread):
    """The Job controller of one Job."""

    def __init__(self, containers: Containers, server: ApiServer, job: Object):
        super().__init__(daemon=True)
        self.containers, self.server, self.job = containers, server, job
        self.name = job["metadata"]["name"]
        self.spec = job["spec"]
        self.pods: list[RunningPod] = []
        self.gone = threading.Event()
        self._attempts = itertools.count()
        self._next_pod_at = 0.0

    def run(self) -> None:
        if self.spec["suspend"]:
            self._wait_until_resumed()
        self._status(startTime=now())
        started = time.monotonic()
        deadline = started + self.spec.get("activeDeadlineSeconds", 10**9)
        while not self.gone.wait(TICK_S):
            if reason := self._reason_to_fail(deadline):
                self._fail(*reason)
                break
            succeeded = {pod.index for pod in self.pods if pod.phase == "Succeeded"}
            if len(succeeded) == self.spec["completions"]:
                self._complete()
                break
            alive = {pod.index for pod in self.pods if pod.phase not in ("Succeeded", "Failed")}
            for index in sorted(set(range(self.spec["completions"])) - succeeded - alive):
                self._create_pod(index)
            self._status(active=len(alive), ready=sum(pod.phase == "Running" for pod in self.pods))

    def deleted(self, how: str) -> None:
        self.gone.set()
        if how != "Orphan":
            for pod in self.pods:
                pod.stop()

    def tell(self, reason: str, message: str, warning: bool = False) -> None:
        self.server.store.put("events", event(self.job, "Job", reason, message, warning))

    def _wait_until_resumed(self) -> None:
        self._condition("Suspended", "JobSuspended", "Job suspended")
        self.tell("Suspended", "Job suspended")
        while not self.gone.wait(TICK_S):
            job = self.server.store.get("jobs", self.name)
            if job and not job["spec"]["suspend"]:
                self._condition("Suspended", "JobResumed", "Job resumed", "False")
                self.tell("Resumed", "Job resumed")
                break

    def _create_pod(self, index: int) -> None:
        if time.monotonic() < self._next_pod_at:
            return
        if refused := self.containers.refused or self._violations():
            self._next_pod_at = time.monotonic() + 2 ** next(self._attempts)
            message = f'Error creating: pods "{self.name}-{suffix()}" is forbidden: {refused}'
            self.tell("FailedCreate", message, warning=True)
            return
        pod = RunningPod(self, index)
        self.pods.append(pod)
        pod.start()
        self.tell("SuccessfulCreate", f"Created pod: {pod.name}")

    def _violations(self) -> str:
        violations = pod_security.restricted(self.spec["template"]) if self.server.enforce else ()
        return f'violates PodSecurity "restricted:latest": {", ".join(violations)}' if violations else ""

    def _reason_to_fail(self, deadline: float) -> tuple[str, str] | None:
        if time.monotonic() > deadline:
            return "DeadlineExceeded", "Job was active longer than specified deadline"
        counted = 0
        for pod in self.pods:
            if pod.phase == "Failed":
                action = self._policy(pod)
                if action == "FailJob":
                    return (
                        "PodFailurePolicy",
                        f"Container main for pod {pod.name} failed with exit code {pod.exit_code}",
                    )
                counted += action == "Count"
                self._next_pod_at = max(self._next_pod_at, pod.ended_at + 0.5)
        if counted > self.spec["backoffLimit"]:
            return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        return None

    def _policy(self, pod: RunningPod) -> str:
        for rule in self.spec.get("podFailurePolicy", {}).get("rules", ()):
            codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", ())
            if codes and (pod.exit_code in codes["values"]) == (codes["operator"] == "In"):
                return str(rule["action"])
            if pod.disrupted and any(one["type"] == "DisruptionTarget" for one in conditions):
                return str(rule["action"])
        return "Count"

    def _fail(self, reason: str, message: str) -> None:
        for pod in self.pods:
            if pod.phase not in ("Succeeded", "Failed"):
                self.tell("SuccessfulDelete", f"Deleted pod: {pod.name}")
                pod.stop()
        self._condition("FailureTarget", reason, message)
        while any(pod.is_alive() for pod in self.pods) and not self.gone.wait(TICK_S):
            pass
        self._status(active=0, ready=0, failed=sum(pod.phase == "Failed" for pod in self.pods))
        self._condition("Failed", reason, message)
        self.tell(reason, message, warning=True)

    def _complete(self) -> None:
        words = "CompletionsReached", "Reached expected number of succeeded pods"
        self._status(active=0, ready=0, succeeded=self.spec["completions"], completionTime=now())
        self._condition("SuccessCriteriaMet", *words)
        time.sleep(TICK_S)
        self._condition("Complete", *words)
        self.tell("Completed", "Job completed")

    def _status(self, **values: Any) -> None:
        job = self.server.store.get("jobs", self.name)
        if job and {**job["status"], **values} != job["status"]:
            self.server.store.change("jobs", self.name, lambda job: job["status"].update(values))

    def _condition(self, kind: str, reason: str, message: str, status: str = "True") -> None:
        new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}

        def change(job: Object) -> None:
            others = [one for one in job["status"].get("conditions", ()) if one["type"] != kind]
            job["status"]["conditions"] = [*others, new]

        self.server.store.change("jobs", self.name, change)
