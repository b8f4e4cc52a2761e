"""A job in plain values: all that a target needs to run it, and nothing of MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Resources:
    """What a container may use; None leaves it to the engine or the cluster."""

    cpu: float | None = None  # cores
    memory_bytes: int | None = None
    gpu: int = 0  # whole devices
    shm_bytes: int | None = None  # size of /dev/shm


@dataclass(frozen=True)
class Job:
    """One run of one entry point.

    The command that the user typed is not here: `argv` starts the small program (inside.py) that checks the tracking
    server, unpacks the code, and runs the command in it; what it needs to know is in `env` and `secrets`.
    """

    name: str  # unique, a DNS label of at most 50 characters
    run_id: str
    labels: Mapping[str, str]  # run-id, experiment, project, entry-point: valid label values
    image: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  # may be shown
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # must not be shown, by variable name
    resources: Resources = Resources()
    mounts: tuple[str, ...] = ()  # folders of this machine that the job needs at the same path (local stores)
    cache: bool = False  # mount the cache volume at CACHE_DIR


CACHE_DIR = "/cache"


@dataclass(frozen=True)
class State:
    """How a job stands, in MLflow's words for a run's status, and a sentence that says why.

    `status` is SCHEDULED (waiting: queued, pulling, unschedulable), RUNNING, FINISHED, FAILED or KILLED.
    """

    status: str
    reason: str
    exit_code: int | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("FINISHED", "FAILED", "KILLED")


Tell = Callable[[str], None]
"""Takes one sentence of progress."""

Output = Callable[[str], None]
"""Takes one line of the job's output, without its newline; several pods' lines come with a `[rank] ` in front."""


class Submitted(Protocol):
    """A job that was sent. Methods raise Unreachable while the engine or cluster does not answer."""

    tags: Mapping[str, str]  # enough to find it again from another process; become tags of the run

    def watch(self, tell: Tell, output: Output) -> State:
        """Report progress and output from the job's start until it has ended; the state it ended in.

        A dropped connection is taken up again without repeating or losing a line.
        """

    def state(self) -> State:
        """How the job stands now. A job that is not there any more is FAILED with the reason."""

    def logs(self, output: Output) -> None:
        """The output there is so far, from the start."""

    def cancel(self) -> None:
        """Stop the job and all that belongs to it; no error where it has ended or is gone."""

    def clean_up(self) -> None:
        """Remove what an ended job leaves behind, once its log is safe."""


class Target(Protocol):
    """A place that runs jobs: Docker, Kubernetes. Made from a Config; making one sends nothing."""

    def check(self) -> None:
        """Raise ConfigError or JobError, in one line, where jobs cannot be sent (no daemon, no rights, ...)."""

    def render(self, job: Job) -> Any:
        """What would be sent, as plain JSON values; pure. Secret values are not in it."""

    def submit(self, job: Job) -> Submitted:
        """Send what render() returns, and the secrets by a safe way."""

    def find(self, tags: Mapping[str, str]) -> Submitted:
        """The job whose `tags` these are, sent before, maybe by another process; NotSent where they name none."""
