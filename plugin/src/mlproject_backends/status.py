"""From the native states of an engine or a cluster to MLflow's states, with a sentence that says why."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from mlproject_backends.job import State

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
        killed = f"at its limit of {limit / 2**20:g} MiB" if limit else "because the machine had none left"
        return f"out of memory (OOMKilled): the job was killed {killed}; ask for more with `memory`"
    if code == 124 and "MLPROJECT_TIMEOUT_S" in env:
        return f"stopped at its time limit of {env['MLPROJECT_TIMEOUT_S']} s"
    sentences = {
        78: "the command could not be started (exit code 78); the log's last line says why",
        126: "the command may not be executed (exit code 126)",
        127: "command not found (exit code 127)",
    }
    if code in sentences:
        return sentences[code]
    try:
        return f"killed by signal {code - 128} ({signal.Signals(code - 128).name}, exit code {code})"
    except ValueError:
        return f"the command failed with exit code {code}"
