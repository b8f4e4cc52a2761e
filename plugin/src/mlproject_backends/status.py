"""From the native states of an engine or a cluster to MLflow's states, with a sentence that says why."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from mlproject_backends.inside import CANNOT_START
from mlproject_backends.job import State
from mlproject_backends.manifests import IMAGE_TIMEOUT, INDEX, MAIN, PENDING_TIMEOUT, waits_for_queue

CANCELLED = "-cancelled"
"""The end of the name of a container that cancel() has stopped: every process that looks at it sees why it ended."""


def docker_state(inspect: Mapping[str, Any]) -> State:
    """The state of a container from what the Engine API's inspect request answers."""
    state = inspect["State"]
    code = state["ExitCode"]
    match state["Status"]:
        case "created" if state["Error"]:
            return State("FAILED", f"the container could not be started: {' '.join(state['Error'].split())}", code)
        case "created":
            return State("SCHEDULED", "the container is about to start")
        case "running" | "restarting":
            return State("RUNNING", "the container runs")
        case "paused":
            return State("RUNNING", "the container is paused; `docker unpause` lets it go on")
    if inspect["Name"].endswith(CANCELLED):
        return State("KILLED", "cancelled", code)
    if code == 0:
        return State("FINISHED", "the command ended with exit code 0", code)
    return State("FAILED", _docker_failure(code, state["OOMKilled"], inspect), code)


def _docker_failure(code: int, out_of_memory: bool, inspect: Mapping[str, Any]) -> str:
    env = dict(variable.split("=", 1) for variable in inspect["Config"]["Env"] or ())
    limit = inspect["HostConfig"]["Memory"]
    if out_of_memory:
        who = "the job" if code == 137 else f"one of its processes (then exit code {code})"
        where = f"at its limit of {limit / 2**20:g} MiB" if limit else "because the machine had none left"
        return f"out of memory (OOMKilled): {who} was killed {where}; ask for more with `memory`"
    if code == 124 and "MLPROJECT_TIMEOUT_S" in env:
        return f"stopped at its time limit of {env['MLPROJECT_TIMEOUT_S']} s"
    return exit_reason(code)


def exit_reason(code: int) -> str:
    """What an exit code other than 0 says about the command."""
    sentences = {
        CANNOT_START: "the command could not be started (exit code 78); the log's last line says why",
        126: "the command may not be executed (exit code 126)",
        127: "command not found (exit code 127)",
    }
    if code in sentences:
        return sentences[code]
    try:
        return f"killed by signal {code - 128} ({signal.Signals(code - 128).name}, exit code {code})"
    except ValueError:
        return f"the command failed with exit code {code}"


# Kubernetes: a Job, its pods (also those that are gone, as they were last seen) and the events about them, as the API
# server gives them. A Job that waits says why only in its pods and events, and most of what it waits for never ends it.


class Patience(Enum):
    """How long something that keeps a job from running is borne with, before the job is given up."""

    NONE = "none"  # it cannot get better by itself
    BRIEF = "brief"  # it may be a hiccup
    IMAGE = "image"
    PENDING = "pending"


@dataclass(frozen=True)
class Obstacle:
    """What keeps a job from running, in a sentence."""

    patience: Patience
    reason: str


BRIEF_S = 10

_PULL_ADVICE = "check its name, that it was pushed, and the template's imagePullSecrets"
_WAITING = {  # a container's waiting reason
    "ErrImagePull": (Patience.IMAGE, "cannot pull the image {image}: {words}; " + _PULL_ADVICE),
    "ImagePullBackOff": (Patience.IMAGE, "cannot pull the image {image}: {words}; " + _PULL_ADVICE),
    "RegistryUnavailable": (Patience.IMAGE, "cannot pull the image {image}: {words}; " + _PULL_ADVICE),
    "InvalidImageName": (Patience.NONE, "'{image}' is no valid name of an image; correct `image` or `repository-uri`"),
    "ErrImageNeverPull": (Patience.NONE, "the image {image} is not on the node, and imagePullPolicy is Never"),
    "CreateContainerConfigError": (Patience.BRIEF, "the container cannot be made: {words}"),
    "CreateContainerError": (Patience.BRIEF, "the container cannot be made: {words}"),
    "RunContainerError": (Patience.BRIEF, "the container cannot be started: {words}"),
}
_POD_CANNOT_START = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")  # events; the pod says nothing
_NOT_STARTED = ("StartError", "ContainerCannotRun")  # a container's terminated reason


def kubernetes_state(
    job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]] = ()
) -> State:
    """The state of a Job. Of its two last conditions the first decides: the other only follows it."""
    nodes = job["spec"].get("parallelism", 1)
    if _condition(job, "SuccessCriteriaMet") or _condition(job, "Complete"):
        who = f"all {nodes} pods" if nodes > 1 else "the command"
        return State("FINISHED", f"{who} ended with exit code 0", 0)
    if failed := _condition(job, "FailureTarget") or _condition(job, "Failed"):
        return _failed_job(job, pods, failed)
    if job["spec"].get("suspend"):
        queue = waits_for_queue(job)
        return State("SCHEDULED", f"queued in {queue}" if queue else "the Job is suspended")
    if obstacle := kubernetes_obstacle(job, pods, events):
        return State("SCHEDULED", obstacle.reason)
    running = [pod for pod in pods if _runs(pod) and not pod["metadata"].get("deletionTimestamp")]
    if running and nodes > 1:
        return State("RUNNING", f"{len(running)} of {nodes} pods run")
    if running:
        return State("RUNNING", f"running on {running[0]['spec']['nodeName']}")
    if any(_has_started(pod) for pod in pods):
        return State("RUNNING", "no pod of the Job runs at the moment")
    return State("SCHEDULED", next((words for pod in pods if (words := pod_progress(pod))), "waiting for its pod"))


def kubernetes_obstacle(
    job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]] = ()
) -> Obstacle | None:
    """What keeps a Job's pods from running; None where nothing does, or the Job waits in a queue."""
    if job["spec"].get("suspend"):
        return None
    alive = [pod for pod in pods if pod["status"].get("phase") == "Pending" or _runs(pod)]
    for pod in alive:
        if obstacle := _pod_obstacle(pod, events):
            return obstacle
    creations = [event for event in events if event["reason"] in ("FailedCreate", "SuccessfulCreate")]
    if len(alive) < job["spec"].get("parallelism", 1) and creations and creations[-1]["reason"] == "FailedCreate":
        return _refused_pod(creations[-1]["message"])
    return None


def given_up(job: Mapping[str, Any], obstacle: Obstacle) -> tuple[float, State]:
    """How many seconds an obstacle of a Job is borne with, and how the Job ends when they have passed."""
    annotations = job["metadata"].get("annotations", {})
    if obstacle.patience in (Patience.NONE, Patience.BRIEF):
        return (BRIEF_S if obstacle.patience is Patience.BRIEF else 0), State("FAILED", obstacle.reason)
    name = IMAGE_TIMEOUT if obstacle.patience is Patience.IMAGE else PENDING_TIMEOUT
    limit_s, option = float(annotations[name]), name.removeprefix("mlproject.")
    return limit_s, State("FAILED", f"{obstacle.reason}; given up after {limit_s:g} s ({option})")


def blocked_since(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> datetime:
    """The last time that a Job which an obstacle keeps from running came forward, by its cluster's clock."""
    scheduled = [_condition(pod, "PodScheduled", status) for pod in pods for status in ("True", "False")]
    times = [condition["lastTransitionTime"] for condition in scheduled if condition]
    times.append(job["status"].get("startTime", job["metadata"]["creationTimestamp"]))
    return max(datetime.fromisoformat(time) for time in times)


def _pod_obstacle(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Obstacle | None:
    scheduled = _condition(pod, "PodScheduled", "False")
    if scheduled and scheduled.get("reason") == "Unschedulable":
        return Obstacle(Patience.PENDING, f"no node takes the pod: {one_line(scheduled.get('message', ''))}")
    for status in _container_statuses(pod):
        waiting = status["state"].get("waiting", {})
        if waiting.get("reason") in _WAITING:
            patience, sentence = _WAITING[waiting["reason"]]
            words = one_line(waiting.get("message", "")).rpartition(" desc = ")[2]
            return Obstacle(patience, sentence.format(image=status["image"], words=words))
    if pod["status"].get("phase") == "Pending":
        name = pod["metadata"]["name"]
        told = [event for event in events if event["involvedObject"].get("name") == name]
        if told and told[-1]["reason"] in _POD_CANNOT_START:
            return Obstacle(Patience.PENDING, f"the pod cannot start: {one_line(told[-1]['message'])}")
    return None


def _refused_pod(message: str) -> Obstacle:
    words = one_line(message).removeprefix("Error creating: ")
    words = words.partition(" is forbidden: ")[2] or words  # what comes before is the pod's name, new at every attempt
    if "violates PodSecurity" in words:
        advice = "see securityContext in the job template"
        return Obstacle(Patience.NONE, f"the namespace's Pod Security Standard refuses the pod: {words}; {advice}")
    return Obstacle(Patience.PENDING, f"the pod is refused: {words}")


def pod_progress(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """How far a pod has come on its way to running; None where there is nothing to say."""
    node = pod["spec"].get("nodeName")
    if _runs(pod):
        return f"running on {node}"
    if pod["status"].get("phase") != "Pending" or not node or _pod_obstacle(pod, events):
        return None
    told = [event for event in events if event["involvedObject"].get("name") == pod["metadata"]["name"]]
    pulling = next((event for event in reversed(told) if event["reason"] in ("Pulling", "Pulled")), None)
    if pulling and pulling["reason"] == "Pulling":
        return f"{one_line(pulling['message'])} on {node}".replace("Pulling image", "pulling the image").replace(
            '"', ""
        )
    return f"scheduled on {node}"


def retry_progress(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each pod that failed and is followed by another one, by name: why it failed."""
    if job["spec"].get("parallelism", 1) > 1:
        return {}  # no rank is replaced
    retries, counted = job["spec"].get("backoffLimit", 0), 0
    sentences: dict[str, str] = {}
    for pod in sorted(filter(_has_failed, pods), key=_ended_at):
        reason, code = pod_failure(pod)
        name = pod["metadata"]["name"]
        if _disruption(pod):
            sentences[name] = f"{reason}; another pod goes on"
        elif code != CANNOT_START and counted < retries:
            counted += 1
            sentences[name] = f"{reason}; trying again ({counted} of {retries})"
    return sentences


def _failed_job(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], failed: Mapping[str, Any]) -> State:
    spec = job["spec"]
    if failed.get("reason") == "DeadlineExceeded":
        limit = spec.get("activeDeadlineSeconds")
        return State("FAILED", f"stopped at its deadline, a time limit of {limit} s; allow more with `timeout-s`")
    ended = [pod for pod in pods if _has_failed(pod)]
    # Pods that the cluster stopped because another one failed explain nothing.
    causes = [pod for pod in ended if _disruption(pod) or not pod["metadata"].get("deletionTimestamp")] or ended
    if not causes:
        return State("FAILED", one_line(f"{failed.get('reason', 'failed')}: {failed.get('message', '')}"))
    several = spec.get("parallelism", 1) > 1
    pod = min(causes, key=_ended_at) if several else max(causes, key=_ended_at)
    reason, code = pod_failure(pod)
    if several:
        reason = f"rank {rank(pod)}: {reason}"
    tries = sum(not _disruption(pod) for pod in ended)
    if tries > 1 and not several:
        reason += f"; the last of {tries} tries"
    return State("FAILED", reason, code)


def pod_failure(pod: Mapping[str, Any]) -> tuple[str, int | None]:
    """Why a pod failed, and the exit code of its job."""
    status, node = pod["status"], pod["spec"].get("nodeName")
    ended = main_state(pod, "terminated") or {}
    code = ended.get("exitCode")
    if disruption := _disruption(pod):
        return one_line(f"evicted from {node} ({disruption['reason']}): {disruption.get('message', '')}"), code
    if status.get("reason") == "Evicted":
        return one_line(f"evicted from {node}: {status.get('message', '')}"), code
    if ended.get("reason") == "OOMKilled":
        limit = _main(pod["spec"]["containers"]).get("resources", {}).get("limits", {}).get("memory")
        where = f"at its memory limit of {limit}" if limit else "because its node had no memory left"
        return f"out of memory (OOMKilled): the job was killed {where}; ask for more with `memory`", code
    message = one_line(ended.get("message", ""))
    if ended.get("reason") in _NOT_STARTED:
        return f"the image cannot run the command: {message.rpartition('container process: ')[2]}", code
    if code == CANNOT_START and message:
        return f"{message} (exit code {code})", code
    if code:
        return exit_reason(code), code
    for other in _container_statuses(pod):
        if other["state"].get("terminated", {}).get("exitCode"):
            other_code = other["state"]["terminated"]["exitCode"]
            return f"container {other['name']} failed with exit code {other_code}", other_code
    return one_line(f"{status.get('reason') or 'the pod failed'}: {status.get('message', 'no reason given')}"), code


def gone(name: str) -> State:
    """The state of a Job that the cluster does not have any more, when its end was not seen."""
    return State(
        "FAILED",
        f"the Job {name} is gone: someone deleted it, or its time after the end was up (ttlSecondsAfterFinished)",
    )


def main_state(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The `waiting`, `running` or `terminated` state of the container that runs the job."""
    statuses = pod["status"].get("containerStatuses")
    return _main(statuses)["state"].get(kind) if statuses else None


def has_log(pod: Mapping[str, Any]) -> bool:
    """Whether the container that runs the job has been started, so that its output can be asked for."""
    ended = main_state(pod, "terminated")
    return _runs(pod) or (ended is not None and ended.get("reason") not in _NOT_STARTED)


def rank(pod: Mapping[str, Any]) -> str | None:
    """The pod's rank among several, or None."""
    index: str | None = (pod["metadata"].get("annotations") or {}).get(INDEX)
    return index


def one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(" :")


def _main(containers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((container for container in containers if container["name"] == MAIN), containers[0])


def _container_statuses(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    status = pod["status"]
    return [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]


def _condition(thing: Mapping[str, Any], kind: str, status: str = "True") -> Mapping[str, Any] | None:
    conditions = thing["status"].get("conditions") or ()
    return next((one for one in conditions if one["type"] == kind and one["status"] == status), None)


def _disruption(pod: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return _condition(pod, "DisruptionTarget")


def _runs(pod: Mapping[str, Any]) -> bool:
    return main_state(pod, "running") is not None


def _has_started(pod: Mapping[str, Any]) -> bool:
    return _runs(pod) or main_state(pod, "terminated") is not None


def _has_failed(pod: Mapping[str, Any]) -> bool:
    ended = main_state(pod, "terminated")
    return pod["status"].get("phase") == "Failed" or bool(ended and ended["exitCode"])


def _ended_at(pod: Mapping[str, Any]) -> str:
    ended = main_state(pod, "terminated") or {}
    at: str = ended.get("finishedAt") or pod["metadata"]["creationTimestamp"]
    return at
