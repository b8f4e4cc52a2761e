"""A run whose job was sent: follows the job, keeps its log, and ends the run with the reason."""

from __future__ import annotations

import contextlib
import getpass
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import TracebackType

from mlflow import MlflowClient
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.projects import SubmittedRun

from mlproject_backends import JobError
from mlproject_backends.config import DOCKER, KUBERNETES, Config
from mlproject_backends.inside import CANNOT_START, TIMED_OUT, first_line
from mlproject_backends.job import Output, State, Submitted, Target, Tell

TAG_BACKEND, TAG_REASON, TAG_EXIT_CODE = "mlproject.backend", "mlproject.reason", "mlproject.exit_code"
TAG_CANCELLED = "mlproject.cancelled"  # set before the job is stopped: whoever sees it end first knows why
LOG = "job.log"
ERROR = "mlproject: error: "  # how inside.py begins a line that says why

TARGETS = {
    DOCKER: "mlproject_backends.docker:DockerTarget",
    KUBERNETES: "mlproject_backends.kubernetes:KubernetesTarget",
}


def make_target(config: Config) -> Target:
    """The target that `config` is for; its client library is imported only now."""
    module, _, name = TARGETS[config.backend].partition(":")
    target: Target = getattr(import_module(module), name)(config)
    return target


def show(line: str) -> None:
    """Print a line of the job's output; a terminal that went away does not stop the job."""
    try:
        print(line, flush=True)
    except (BrokenPipeError, UnicodeEncodeError):
        print(line.encode("ascii", "replace").decode(), file=sys.stderr, flush=True)


def tell(sentence: str) -> None:
    """Print a sentence of progress, apart from the job's own output."""
    print(f"mlproject: {sentence}", file=sys.stderr, flush=True)


class JobRun(SubmittedRun):
    """MLflow's handle of a submitted job, for all targets."""

    def __init__(self, run_id: str, submitted: Submitted | None, client: MlflowClient, ended: State | None = None):
        self._run_id = run_id
        self._submitted = submitted  # None only where the run has `ended`
        self._client = client
        self._ended = ended

    @classmethod
    def find(cls, run_id: str, client: MlflowClient) -> JobRun:
        """The job of a run that was started before, maybe by another process and on another day.

        Raises:
            JobError: the run does not exist or was not started by one of the backends; NotSent: it has no job yet.
        """
        run = _run(client, run_id)
        tags = run.data.tags
        backend = tags.get(TAG_BACKEND)
        if backend not in TARGETS:
            raise JobError(f"run {run_id} was not started by the docker or kubernetes backend: it has no job")
        if ended := _settled(run):  # its engine or cluster may be gone, or out of reach from here
            return cls(run_id, None, client, ended)
        config = Config(
            backend, kube_context=tags.get("mlproject.kube_context"), namespace=tags.get("mlproject.kube_namespace")
        )
        return cls(run_id, make_target(config).find(tags), client)

    @property
    def run_id(self) -> str:
        return self._run_id

    @property
    def settled(self) -> bool:
        """Whether the run has ended and says why: there is nothing more to ask the target."""
        return self._ended is not None

    @property
    def _job(self) -> Submitted:
        if self._submitted is None:
            raise AssertionError("not reached: nothing is asked of the job of a settled run")
        return self._submitted

    def state(self) -> State:
        """How the job stands; a job that has ended ends its run too, with its log stored."""
        if self._ended:
            return self._ended
        state = self._job.state()
        if not state.ended:
            return state
        with _Log(self._client, self._run_id) as log:
            self._job.logs(log.write)
        return self._settle(log.explain(state))

    def follow(self, stop_on_interrupt: bool = True, tell: Tell = tell, show: Output = show) -> State:
        """Report progress and output until the job has ended, then end the run. Ctrl-C stops the job as well.

        The job is watched in a thread, so that after a Ctrl-C its last words are still read.
        """
        if self._ended:
            return self._ended
        with _Log(self._client, self._run_id) as log:
            watching = _Watch(self._job, log.both(tell, "mlproject: "), log.both(show))
            interrupted = False
            try:
                state = watching.wait()
            except KeyboardInterrupt:
                if not stop_on_interrupt:
                    raise
                interrupted = True
                tell("stopping the job; press Ctrl-C again to leave it to itself")
                state = self._stop("stopped by Ctrl-C", watching)
        state = self._settle(log.explain(state))
        if interrupted:
            raise KeyboardInterrupt
        return state

    def logs(self, show: Output = show) -> None:
        """The job's output so far; once the run has ended, from its artifacts."""
        if not self._ended:
            self._job.logs(show)
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = self._client.download_artifacts(self._run_id, f"logs/{LOG}", folder)
                for line in Path(path).read_text(errors="replace").splitlines():
                    show(line)
        except (MlflowException, OSError) as error:
            raise JobError(f"run {self._run_id} has no log among its artifacts: {first_line(error)}") from None

    def wait(self) -> bool:
        return self.follow().status == "FINISHED"

    def get_status(self) -> str:
        return self.state().status

    def cancel(self) -> None:
        """Stop the job and its pods and end the run as KILLED; nothing where it has ended already."""
        if self.state().ended:
            return
        with _Log(self._client, self._run_id) as log:
            watching = _Watch(self._job, log.write, log.write)
            state = self._stop(f"cancelled by {getpass.getuser()}", watching)
        self._settle(state)

    def _stop(self, reason: str, watching: _Watch) -> State:
        try:
            self._client.set_tag(self._run_id, TAG_CANCELLED, reason)
        except MlflowException as error:
            tell(f"the run cannot be told that it was {reason}; the job is stopped all the same: {first_line(error)}")
        self._job.cancel()
        return watching.wait()

    def _settle(self, state: State) -> State:
        """End the run as the job ended. A status that the script itself gave to a job that went well stays.

        Of two processes that look at a job the first one's reason stays.
        """
        run_id = self._run_id
        run = self._client.get_run(run_id)
        if settled := _settled(run):
            self._ended = settled
            return settled
        script = run.info.status
        if state.status == "FINISHED" and script in ("FAILED", "KILLED"):
            state = State(script, f"the command exited with 0 and ended its run as {script}", 0)
        elif state.status != "FINISHED" and TAG_CANCELLED in run.data.tags:
            state = State("KILLED", run.data.tags[TAG_CANCELLED], state.exit_code)
        self._client.set_tag(run_id, TAG_REASON, state.reason[:5000])
        if state.exit_code is not None:
            self._client.set_tag(run_id, TAG_EXIT_CODE, str(state.exit_code))
        if script != state.status:
            self._client.set_terminated(run_id, state.status)
        self._ended = state
        with contextlib.suppress(JobError):  # the run has ended as it says, whatever is left of the job
            self._job.clean_up()
        return state


class _Watch:
    """Submitted.watch() in a thread."""

    def __init__(self, submitted: Submitted, tell: Tell, output: Output):
        self._result: Future[State] = Future()

        def watch() -> None:
            try:
                self._result.set_result(submitted.watch(tell, output))
            except BaseException as error:  # goes on in the thread that waits
                self._result.set_exception(error)

        threading.Thread(target=watch, daemon=True).start()

    def wait(self) -> State:
        """The state that the job ended in, once it has; a signal gets through at any time."""
        while not self._result.done():
            wait([self._result], timeout=0.2)
        return self._result.result()


class _Log:
    """A file that gathers a job's output and becomes the artifact logs/job.log when the block ends.

    An empty one, as of a job that is gone, does not take the place of one that was stored before.
    """

    def __init__(self, client: MlflowClient, run_id: str):
        self._client, self._run_id = client, run_id
        self._lock = threading.Lock()
        self._broken = False
        self._error = ""

    def __enter__(self) -> _Log:
        self._folder = tempfile.TemporaryDirectory(prefix="mlproject-")
        self._path = Path(self._folder.name) / LOG
        self._file = self._path.open("w", encoding="utf-8", errors="replace")
        return self

    def write(self, line: str) -> None:
        with self._lock:
            self._error = line.partition(ERROR)[2] or self._error
            if self._broken:
                return
            try:
                self._file.write(f"{line}\n")
            except OSError as error:
                self._broken = True
                tell(f"the log is no longer kept on this machine ({error.strerror}); the job goes on")

    def explain(self, state: State) -> State:
        """The state with what the job itself said where its command could not be started or was given up."""
        if state.exit_code in (CANNOT_START, TIMED_OUT) and self._error:
            return replace(state, reason=self._error)
        return state

    def both(self, sink: Callable[[str], None], prefix: str = "") -> Callable[[str], None]:
        """A function that gives a line to `sink` and to the file."""

        def write(line: str) -> None:
            sink(line)
            self.write(prefix + line)

        return write

    def _is_stored(self) -> bool:
        return any(item.path == f"logs/{LOG}" for item in self._client.list_artifacts(self._run_id, "logs"))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._folder, self._lock:
            self._broken = True
            try:
                self._file.close()
                if self._path.stat().st_size or not self._is_stored():
                    self._client.log_artifact(self._run_id, str(self._path), "logs")
            except (MlflowException, OSError) as reason:
                tell(f"the log is not among the run's artifacts: {first_line(reason)}")


def cancel_unsent(run_id: str, client: MlflowClient) -> State:
    """End a run that has no job as KILLED; a launcher that still works on it sees that, and keeps none."""
    state = State("KILLED", f"cancelled by {getpass.getuser()} before its job was sent")
    client.set_tag(run_id, TAG_CANCELLED, state.reason)
    client.set_tag(run_id, TAG_REASON, state.reason)
    client.set_terminated(run_id, state.status)
    return state


def _run(client: MlflowClient, run_id: str) -> Run:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise JobError(f"no run {run_id} on the tracking server: {first_line(error)}") from None


def _settled(run: Run) -> State | None:
    """How a run ended that was settled before."""
    ended = RunStatus.is_terminated(RunStatus.from_string(run.info.status))
    return State(run.info.status, run.data.tags[TAG_REASON]) if ended and TAG_REASON in run.data.tags else None
