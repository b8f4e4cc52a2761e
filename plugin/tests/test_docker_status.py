"""What a container's end means, over what a real engine (20.10) answered: containers/inspected.json."""

import json
from pathlib import Path

import pytest

from mlproject_backends.status import docker_state

INSPECTED = json.loads((Path(__file__).parent / "containers" / "inspected.json").read_text())

EXPECTED = {
    "created": ("SCHEDULED", None, "the container is about to start"),
    "cannot-start": ("FAILED", 127, 'exec: "nope": executable file not found in $PATH'),
    "running": ("RUNNING", None, "the container runs"),
    "paused": ("RUNNING", None, "docker unpause"),
    "finished": ("FINISHED", 0, "exit code 0"),
    "exit-7": ("FAILED", 7, "the command failed with exit code 7"),
    "out-of-memory": ("FAILED", 137, "out of memory (OOMKilled): the job was killed at its limit of 64 MiB"),
    "child-out-of-memory": ("FINISHED", 0, "exit code 0"),
    "command-not-found": ("FAILED", 127, "command not found (exit code 127)"),
    "not-executable": ("FAILED", 126, "may not be executed (exit code 126)"),
    "cannot-begin": ("FAILED", 78, "could not be started (exit code 78)"),
    "time-limit": ("FAILED", 124, "stopped at its time limit of 5 s"),
    "exit-124": ("FAILED", 124, "the command failed with exit code 124"),
    "killed": ("FAILED", 137, "killed by signal 9 (SIGKILL, exit code 137)"),
    "cancelled": ("KILLED", 143, "cancelled"),
}


def test_every_recording_has_an_expectation() -> None:
    assert set(EXPECTED) == set(INSPECTED)


@pytest.mark.parametrize("scenario", EXPECTED)
def test_what_the_engine_answered_in_a_sentence(scenario: str) -> None:
    status, exit_code, reason = EXPECTED[scenario]
    state = docker_state(INSPECTED[scenario])
    assert (state.status, state.exit_code) == (status, exit_code)
    assert reason in state.reason
    assert "\n" not in state.reason


def test_a_child_that_ran_out_of_memory_is_named_when_the_command_fails_by_it() -> None:
    inspected = json.loads(json.dumps(INSPECTED["child-out-of-memory"]))
    inspected["State"]["ExitCode"] = 1
    reason = docker_state(inspected).reason
    assert (
        "out of memory (OOMKilled): one of its processes (then exit code 1) was killed at its limit of 64 MiB" in reason
    )
