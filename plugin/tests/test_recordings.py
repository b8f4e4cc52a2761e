"""Every recording of a real cluster is played to the plugin, which has to say how the job ended and why."""

import re
import time
from dataclasses import dataclass, field

import pytest

from api_server import ApiServer, Fault
from mlproject_backends import JobError, status
from mlproject_backends.config import Config
from mlproject_backends.job import Job, State
from mlproject_backends.kubernetes import KubernetesTarget
from replay import RECORDINGS, Recording, Replay

JOB = Job("image-classifier-main-0a1b2c3d", "run", {}, "registry/image:tag", ("python",), {})
CONFIG = Config("kubernetes", image_timeout_s=1, pending_timeout_s=1)


@dataclass(frozen=True)
class Ending:
    """What a recording comes to: words of the reason, of what was told, and the job's output."""

    status: str
    reason: str  # a pattern
    told: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    exit_code: int | None = None
    deletes: bool = field(default=False)  # the plugin gives the job up and deletes it


ENDINGS = {
    "api-errors": Ending("FINISHED", "exit code 0", ("scheduled on node1", "running on node1"), exit_code=0),
    "success": Ending(
        "FINISHED",
        "exit code 0",
        ("scheduled on node1", "running on node1"),
        ("step 0", "step 1", "step 2", "step 3", "step 4"),
        0,
    ),
    "exit-code": Ending("FAILED", "exit code 7", ("running on node1",), exit_code=7),
    "oom": Ending("FAILED", "OOMKilled.* memory limit of 64Mi", exit_code=137),
    "bad-command": Ending("FAILED", 'cannot run the command: exec: "no-such-binary"', exit_code=128),
    "deadline": Ending("FAILED", "time limit of 5 s"),
    "image-pull": Ending(
        "FAILED",
        r"cannot pull the image 127.0.0.1:5050/no/such:image: .*not found; .*given up after 1 s \(image-timeout-s\)",
        ("pulling the image 127.0.0.1:5050/no/such:image on node1", "cannot pull the image"),
        deletes=True,
    ),
    "unschedulable": Ending(
        "FAILED",
        r"0/1 nodes are available: 1 Insufficient memory.*given up after 1 s \(pending-timeout-s\)",
        ("no node takes the pod: 0/1 nodes are available: 1 Insufficient memory",),
        deletes=True,
    ),
    "missing-secret": Ending("FAILED", 'secret "absent" not found', ("scheduled on node1",), deletes=True),
    "quota": Ending(
        "FAILED",
        r"exceeded quota: q, requested: pods=1, used: pods=\d, limited: pods=0; given up after 1 s",
        ("the pod is refused: exceeded quota: q",),
        deletes=True,
    ),
    "pod-security": Ending("FAILED", 'Pod Security Standard .*"restricted:latest"', deletes=True),
    "suspended": Ending("FINISHED", "exit code 0", ("the Job is suspended", "running on node1"), exit_code=0),
    "ttl-deleted": Ending("FINISHED", "exit code 0", exit_code=0),
    "cancel-background": Ending("FAILED", "someone deleted the Job", ("running on node1",)),
    "cancel-bare": Ending("FAILED", "someone deleted the Job", ("running on node1",)),
    "indexed": Ending("FINISHED", "all 2 pods", ("rank 0: running on node1", "rank 1: running on node1"), exit_code=0),
    "indexed-fail": Ending("FAILED", "rank 1: .*exit code 3", ("rank 0: running on node1",), exit_code=3),
    "retried": Ending(
        "FAILED",
        "exit code 1; the last of 3 tries",
        ("exit code 1; trying again (1 of 2)", "exit code 1; trying again (2 of 2)"),
        exit_code=1,
    ),
}
GOES_ON = {"evicted"}  # the recording stops while the job still runs


def test_there_is_an_ending_for_every_recording() -> None:
    assert {path.stem for path in RECORDINGS.glob("*.jsonl")} == ENDINGS.keys() | GOES_ON


@pytest.mark.parametrize("name", ENDINGS)
def test_recording(name: str, api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BRIEF_S", 0.3)
    recording, ending = Recording(name), ENDINGS[name]
    api_server.controller = Replay(recording)
    told: list[str] = []
    output: list[str] = []
    submitted = KubernetesTarget(CONFIG).submit(JOB)
    state = submitted.watch(told.append, output.append)
    submitted.clean_up()
    assert (state.status, state.exit_code) == (ending.status, ending.exit_code)
    assert re.search(ending.reason, state.reason)
    assert "\n" not in state.reason
    for words in ending.told:
        assert any(words in sentence for sentence in told), told
    assert len(told) == len(set(told)) or name == "retried"  # the same again only for another pod
    assert tuple(output) == ending.output
    deletions = [one for one in api_server.requests if one.method == "DELETE" and "/jobs/" in one.path]
    assert [one.query for one in deletions] == [{"propagationPolicy": "Background"}] * ending.deletes


def test_an_evicted_pod_is_replaced_and_the_job_goes_on(api_server: ApiServer) -> None:
    replay = api_server.controller = Replay(Recording("evicted"))
    told: list[str] = []
    submitted = KubernetesTarget(CONFIG).submit(JOB)

    def tell(sentence: str) -> None:
        told.append(sentence)
        if sentence == "running on node1" and told.count(sentence) == 2:  # the second pod
            assert replay.ended.wait(10)
            assert submitted.state() == State("RUNNING", "running on node1")
            submitted.cancel()

    state = submitted.watch(tell, print)
    submitted.clean_up()
    assert state == State("KILLED", "cancelled")
    assert "evicted from node1 (EvictionByEvictionAPI): Eviction API: evicting; another pod goes on" in told


def test_a_job_that_its_ttl_took_before_anyone_looked_has_failed(api_server: ApiServer) -> None:
    replay = api_server.controller = Replay(Recording("ttl-deleted"), watched=False)
    submitted = KubernetesTarget(CONFIG).submit(JOB)
    assert replay.ended.wait(10)
    for state in (submitted.state(), submitted.watch(print, print)):
        assert state.status == "FAILED"
        assert "ttlSecondsAfterFinished" in state.reason
    submitted.clean_up()


def test_a_job_that_is_seen_to_fail_before_its_pods_are_says_why(api_server: ApiServer) -> None:
    """Nothing is heard of the pods, but they can be listed in the end."""
    api_server.controller = Replay(Recording("exit-code"), pace=0)
    api_server.faults.append(Fault(500, "GET", "/pods", "watch=", times=1000))
    submitted = KubernetesTarget(CONFIG).submit(JOB)
    state = submitted.watch(print, print)
    submitted.clean_up()
    assert (state.status, state.exit_code) == ("FAILED", 7)
    assert "exit code 7" in state.reason


def test_a_blocked_job_is_deleted_though_the_server_is_not_well(api_server: ApiServer) -> None:
    api_server.controller = Replay(Recording("unschedulable"))
    api_server.faults.append(Fault(503, "DELETE", "/jobs/", times=2))
    submitted = KubernetesTarget(CONFIG).submit(JOB)
    assert submitted.watch(print, print).status == "FAILED"
    assert api_server.store.list("jobs")[0] == []
    submitted.clean_up()


@pytest.mark.parametrize(
    ("name", "words", "option"),
    [
        ("image-pull", "cannot pull the image", "image-timeout-s"),
        ("unschedulable", "Insufficient memory", "pending-timeout-s"),
    ],
)
def test_a_stuck_job_that_nobody_watches_is_given_up_by_whoever_asks(
    name: str, words: str, option: str, api_server: ApiServer
) -> None:
    api_server.controller = Replay(Recording(name), watched=False)
    patient = KubernetesTarget(Config("kubernetes", image_timeout_s=10**9, pending_timeout_s=10**9)).submit(JOB)
    deadline = time.monotonic() + 10
    while words not in patient.state().reason:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    waiting = patient.state()
    assert waiting.status == "SCHEDULED"
    [sent] = api_server.store.list("jobs")[0]
    api_server.store.put(
        "jobs", {**sent, "metadata": {**sent["metadata"], "annotations": {f"mlproject.{option}": "1"}}}
    )
    hasty = KubernetesTarget(Config("kubernetes")).find(patient.tags)
    state = hasty.state()
    assert (state.status, state.reason) == ("FAILED", f"{waiting.reason}; given up after 1 s ({option})")
    hasty.clean_up()
    assert api_server.store.list("jobs")[0] == []


def refusals() -> list[tuple[str, int, str]]:
    """The recorded answers to a POST of a Job that are no success, and what the user has to read in each."""
    return [
        ("invalid name", 422, "metadata.name: Invalid value"),
        ("invalid quantity", 400, "quantities must match"),
        ("restartPolicy Always not allowed", 422, "spec.template.spec.restartPolicy"),
        ("name of 70 characters", 422, "must be no more than 63 bytes"),
        ("unknown field, strict", 400, 'unknown field "spec.retryies"'),
        ("namespace does not exist", 404, "the namespace 'ml' does not exist in context 'test'"),
        ("name exists already", 409, 'jobs.batch "dup" already exists'),
        (
            "user without the right",
            403,
            'cannot create resource "jobs" in API group "batch" in the namespace "ml"; ask',
        ),
    ]


@pytest.mark.parametrize(("note", "code", "words"), refusals())
def test_recorded_refusal(note: str, code: int, words: str, api_server: ApiServer) -> None:
    (recorded,) = [one for one in Recording("api-errors").requests if one.get("note") == note]
    assert recorded["status"] == code
    api_server.faults.append(Fault(code, "POST", "/jobs", status=recorded["response"]))
    with pytest.raises(JobError) as refusal:
        KubernetesTarget(CONFIG).submit(JOB)
    message = str(refusal.value)
    assert words in message
    assert "\n" not in message
    assert api_server.made("jobs") == []  # it was refused in the dry run


def test_every_recorded_refusal_of_a_job_is_tried() -> None:
    requests = Recording("api-errors").requests
    recorded = {one["note"] for one in requests if one["method"] == "POST" and one["status"] >= 400}
    assert recorded == {note for note, _, _ in refusals()}
