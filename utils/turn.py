"""One retraining of a champion at a time, over all machines that share a tracking server.

MLflow has no lock. It has one thing that only one client can do: giving a parameter of a run its first value, which the
database's primary key of (run, parameter) decides; whoever comes second is refused, or finds another value there. So
the turns at retraining a champion are parameters of the run that trained it: `retraining_1`, `retraining_2`, ..., each
with the id of the run that took it. Turn n + 1 is taken only after turn n is over, and an owner whose turn is over
never works again, so no two are at work at once:

- A turn is over when its run has ended, which also a failure and Ctrl-C bring about.
- The run of a process that was killed never ends. An owner at work therefore tags its run with the time every
  BEAT_S seconds; without a sign of life for SILENCE_S it is taken for dead. That compares clocks of two machines, hence
  SILENCE_S is much more than clocks differ.
- An owner that was only cut off or asleep for so long has lost its turn. It asks before it moves `champion`
  (`check`), and `registry.promote` refuses a champion that moved meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from utils import RunFailed, UsageError
from utils.artifacts import mlflow_errors

TURN = "retraining_"
ALIVE = "alive_at"
"""Tag of a run at work: seconds since 1970."""

BEAT_S = 20.0
SILENCE_S = 600.0


class Taken(Exception):
    """Another run is at work; the message says which."""


class Turns:
    """The turns at retraining the model of the run `trained_by`."""

    def __init__(self, trained_by: str) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        self.trained_by = trained_by

    def last(self) -> tuple[int, str]:
        """Number and run of the last turn; 0 and "" before the first."""
        with mlflow_errors(f"runs:/{self.trained_by}"):
            params = self._client.get_run(self.trained_by).data.params
        taken = {int(name.removeprefix(TURN)): run_id for name, run_id in params.items() if name.startswith(TURN)}
        return max(taken.items(), default=(0, ""))

    @contextmanager
    def take(self, run_id: str) -> Iterator[None]:
        """It is the turn of `run_id` while in the block; raises Taken where another has it."""
        number, owner = self.last()
        if owner and (seen := self._at_work(owner)):
            raise Taken(seen)
        with mlflow_errors(f"runs:/{run_id}"):
            self._beat(run_id)
        refused = ""
        try:
            self._client.log_param(self.trained_by, f"{TURN}{number + 1}", run_id)
        except Exception as error:  # another was first, or the answer got lost: what is there now tells
            refused = str(error).splitlines()[0]
        now, owner = self.last()
        if now == number:
            raise RunFailed(f"run {self.trained_by} does not take the parameter {TURN}{number + 1}: {refused}")
        if owner != run_id:
            raise Taken(f"run {owner} was first")
        ended = threading.Event()
        thread = threading.Thread(target=self._beat_on, args=(run_id, ended), name="turn", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def hours_since_last(self) -> float | None:
        """Since the last turn ended in order; None if there was none, or if it failed and may be tried again."""
        _, owner = self.last()
        if not owner:
            return None
        run = self._run(owner)
        if run is None or run.info.status != "FINISHED":
            return None
        return float(time.time() - run.info.end_time / 1000) / 3600

    def check(self, run_id: str) -> None:
        """RunFailed unless `run_id` has the last turn still."""
        _, owner = self.last()
        if owner != run_id:
            raise RunFailed(f"run {owner} took over, because this one gave no sign of life for a while")

    def _at_work(self, run_id: str) -> str:
        """That a run is at work, in words; "" for one that has ended or is taken for dead."""
        run = self._run(run_id)
        if run is None or run.info.status != "RUNNING":
            return ""
        silent_s = time.time() - float(run.data.tags.get(ALIVE, 0))
        return "" if silent_s > SILENCE_S else f"run {run_id} is at work, seen {max(silent_s, 0):.0f} s ago"

    def _run(self, run_id: str) -> Any:
        """A run; None for one that was deleted."""
        try:
            with mlflow_errors(f"runs:/{run_id}"):
                run = self._client.get_run(run_id)
        except UsageError:  # deleted for good
            return None
        return None if run.info.lifecycle_stage == "deleted" else run

    def _beat(self, run_id: str) -> None:
        self._client.set_tag(run_id, ALIVE, f"{time.time():.0f}")

    def _beat_on(self, run_id: str, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            with suppress(Exception):  # the next one will arrive, or the turn is lost
                self._beat(run_id)
