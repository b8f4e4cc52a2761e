"""States of a Job that no recording shows: made of the fields that the Kubernetes API documents."""

from typing import Any

import pytest

from mlproject_backends.job import State
from mlproject_backends.status import (
    Obstacle,
    Patience,
    kubernetes_obstacle,
    kubernetes_state,
    pod_progress,
    retry_progress,
)


def job(*conditions: str, reason: str = "", message: str = "", **spec: Any) -> dict[str, Any]:
    listed = [{"type": name, "status": "True", "reason": reason, "message": message} for name in conditions]
    return {"metadata": {"name": "j"}, "spec": spec, "status": {"conditions": listed}}


def pod(
    phase: str, name: str = "j-x", rank: int | None = None, init: dict[str, Any] | None = None, **state: Any
) -> dict[str, Any]:
    """A pod on node1 whose container is in a state; `status` adds to its status, `limits` to its container."""
    status = {"phase": phase, **state.pop("status", {})}
    container = {"name": "main", "resources": {"limits": state.pop("limits", {})}}
    if state:
        side = {"name": "side", "image": "s", "state": {"terminated": {"exitCode": 137}}}
        status["containerStatuses"] = [side, {"name": "main", "image": "i", "state": state}]
    if init:
        status["initContainerStatuses"] = [{"name": "setup", "image": "s", "state": init}]
    annotations = {} if rank is None else {"batch.kubernetes.io/job-completion-index": str(rank)}
    return {
        "metadata": {"name": name, "creationTimestamp": "2026-11-21T08:00:00Z", "annotations": annotations},
        "spec": {"nodeName": "node1", "containers": [{"name": "side"}, container]},
        "status": status,
    }


def ended(code: int, at: str = "2026-11-21T08:01:00Z", **more: str) -> dict[str, Any]:
    return {"exitCode": code, "finishedAt": at, **more}


def event(reason: str, message: str, name: str = "j") -> dict[str, Any]:
    return {"reason": reason, "message": message, "involvedObject": {"name": name}}


FAILED = job(
    "FailureTarget", "Failed", reason="BackoffLimitExceeded", message="Job has reached the limit", backoffLimit=0
)
DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]}
PRESSURE = {"reason": "Evicted", "message": "The node was low on resource: memory. "}


@pytest.mark.parametrize(
    ("failed", "reason", "code"),
    [
        (pod("Failed", terminated=ended(137)), "killed by signal 9 (SIGKILL, exit code 137)", 137),
        (pod("Failed", terminated=ended(1)), "the command failed with exit code 1", 1),
        (pod("Failed", terminated=ended(127)), "command not found (exit code 127)", 127),
        (
            pod("Failed", terminated=ended(137, reason="OOMKilled")),
            "out of memory (OOMKilled): the job was killed because its node had no memory left; "
            "ask for more with `memory`",
            137,
        ),
        (
            pod("Failed", limits={"memory": "4Gi"}, terminated=ended(137, reason="OOMKilled")),
            "out of memory (OOMKilled): the job was killed at its memory limit of 4Gi; ask for more with `memory`",
            137,
        ),
        (pod("Failed", status=PRESSURE), "evicted from node1: The node was low on resource: memory.", None),
        (pod("Failed", status=DISRUPTED), "evicted from node1 (PreemptionByScheduler)", None),
        (pod("Failed", terminated=ended(78, message="no server\n")), "no server (exit code 78)", 78),
        (pod("Failed", init={"terminated": ended(3)}), "container setup failed with exit code 3", 3),
        (
            pod("Failed", status={"reason": "NodeLost", "message": "Node node1 is gone"}),
            "NodeLost: Node node1 is gone",
            None,
        ),
        (
            pod("Failed", terminated=ended(128, reason="StartError", message="x: container process: exec: no\nfile")),
            "the image cannot run the command: exec: no file",
            128,
        ),
    ],
)
def test_why_a_pod_failed(failed: dict[str, Any], reason: str, code: int | None) -> None:
    assert kubernetes_state(FAILED, [failed]) == State("FAILED", reason, code)


def test_of_several_ranks_the_first_that_failed_by_itself_is_the_cause() -> None:
    stopped = pod("Failed", "j-0-a", 0, terminated=ended(143, "2026-11-21T08:00:30Z"))
    stopped["metadata"]["deletionTimestamp"] = "2026-11-21T08:01:00Z"
    first = pod("Failed", "j-2-b", 2, terminated=ended(5, "2026-11-21T08:00:50Z"))
    second = pod("Failed", "j-1-c", 1, terminated=ended(6, "2026-11-21T08:00:55Z"))
    failed = job("FailureTarget", parallelism=3)
    assert kubernetes_state(failed, [stopped, second, first]).reason == "rank 2: the command failed with exit code 5"


def test_a_failed_job_without_pods_says_what_the_cluster_says() -> None:
    assert kubernetes_state(FAILED, []) == State("FAILED", "BackoffLimitExceeded: Job has reached the limit")


def test_evictions_are_no_tries() -> None:
    evicted = pod("Failed", "j-a", status=DISRUPTED, terminated=ended(137, "2026-11-21T08:00:01Z"))
    failed = pod("Failed", "j-b", terminated=ended(1, "2026-11-21T08:00:02Z"))
    again = pod("Failed", "j-c", terminated=ended(1, "2026-11-21T08:00:03Z"))
    assert kubernetes_state(FAILED, [evicted, failed]).reason == "the command failed with exit code 1"
    assert kubernetes_state(FAILED, [evicted, failed, again]).reason.endswith("; the last of 2 tries")
    assert retry_progress(job(backoffLimit=1), [again, evicted, failed]) == {
        "j-a": "evicted from node1 (PreemptionByScheduler); another pod goes on",
        "j-b": "the command failed with exit code 1; trying again (1 of 1)",
    }


@pytest.mark.parametrize(
    ("waiting", "patience", "reason"),
    [
        ("InvalidImageName", Patience.NONE, "'i' is no valid name of an image; correct `image` or `repository-uri`"),
        ("ErrImageNeverPull", Patience.NONE, "the image i is not on the node, and imagePullPolicy is Never"),
        ("CreateContainerError", Patience.BRIEF, "the container cannot be made: words"),
        ("RunContainerError", Patience.BRIEF, "the container cannot be started: words"),
        (
            "ErrImagePull",
            Patience.IMAGE,
            "cannot pull the image i: words; check its name, that it was pushed, and the template's imagePullSecrets",
        ),
    ],
)
def test_what_a_container_waits_for(waiting: str, patience: Patience, reason: str) -> None:
    stuck = pod("Pending", waiting={"reason": waiting, "message": "rpc error: code = X desc = words"})
    assert kubernetes_obstacle(job(), [stuck]) == Obstacle(patience, reason)
    assert kubernetes_state(job(), [stuck]) == State("SCHEDULED", reason)


def test_a_volume_that_cannot_be_mounted_is_an_obstacle_until_the_container_runs() -> None:
    told = [event("FailedMount", 'MountVolume.SetUp failed for volume "v" : configmap "c" not found', "j-x")]
    creating = pod("Pending", waiting={"reason": "ContainerCreating"})
    reason = 'the pod cannot start: MountVolume.SetUp failed for volume "v" : configmap "c" not found'
    assert kubernetes_obstacle(job(), [creating], told) == Obstacle(Patience.PENDING, reason)
    assert kubernetes_obstacle(job(), [pod("Running", running={})], told) is None
    assert kubernetes_obstacle(job(), [creating], [*told, event("Pulling", 'Pulling image "i"', "j-x")]) is None


def test_a_pod_that_was_refused_and_made_at_last_is_no_obstacle() -> None:
    words = 'error looking up service account ml/a: serviceaccount "a" not found'
    refused = event("FailedCreate", f'Error creating: pods "j-x" is forbidden: {words}')
    assert kubernetes_obstacle(job(), [], [refused]) == Obstacle(Patience.PENDING, f"the pod is refused: {words}")
    assert kubernetes_obstacle(job(), [], [refused, event("SuccessfulCreate", "Created pod: j-x")]) is None


def test_a_job_in_a_queue_meets_no_obstacle() -> None:
    queued = job(suspend=True)
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    assert kubernetes_state(queued, []) == State("SCHEDULED", "queued in gpus")
    assert kubernetes_obstacle(queued, [], [event("FailedCreate", "no")]) is None


def test_running() -> None:
    running = [pod("Running", f"j-{rank}", rank, running={}) for rank in range(2)]
    assert kubernetes_state(job(parallelism=4), running) == State("RUNNING", "2 of 4 pods run")
    assert kubernetes_state(job(), running[:1]) == State("RUNNING", "running on node1")
    assert pod_progress(running[0]) == "running on node1"
    over = [pod("Failed", terminated=ended(1))]
    assert kubernetes_state(job(backoffLimit=2), over) == State("RUNNING", "no pod of the Job runs at the moment")


def test_pulling() -> None:
    creating = pod("Pending", waiting={"reason": "ContainerCreating"})
    assert pod_progress(creating) == "scheduled on node1"
    assert pod_progress(creating, [event("Pulling", 'Pulling image "i"', "j-x")]) == "pulling the image i on node1"
    told = [event("Pulling", 'Pulling image "i"', "j-x"), event("Pulled", "Successfully pulled", "j-x")]
    assert pod_progress(creating, told) == "scheduled on node1"
