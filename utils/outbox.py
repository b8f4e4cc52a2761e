"""The outbox of a run: letters in order, and the thread that sends them, tries again, or puts them on disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.refusals import refusal, refusal_of_its_artifacts
from utils.runtime import without_passwords

BATCH_METRICS = 1000  # MLflow's own limit for the metrics of one log_batch call
SEND_EVERY_S = 1.0
RETRY_FIRST_S, RETRY_LONGEST_S = 0.5, 10.0

Metric = tuple[str, float, int, int]  # key, value, time in ms, step


UNSENT = "unsent"
"""In a run's folder: what could not be sent. `unsent.jsonl` has a JSON object a line, `unsent/` the artifacts."""


@dataclass
class Letter:
    """One entry of the outbox: a call, or metrics, which are merged with their neighbours."""

    send: Callable[[Any], Any] | None = None
    """Sends it; gets the MlflowClient."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """What is in it, as plain values, for when it cannot be sent."""
    store: tuple[str, Callable[[Path], Any]] | None = None
    """For an artifact: its path, and a function that writes it to a file."""
    metrics: list[Metric] = field(default_factory=list)
    file: Path | None = None
    """The kept file that `send` sends; it goes when it has been sent or a newer one of its series is there."""
    series: str = ""

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.store[0] if self.store else "what the run logged"

    def done(self) -> None:
        if self.file is not None:
            shutil.rmtree(self.file.parent, ignore_errors=True)


class Outbox:
    """Letters in order, and the thread that sends them.

    Every method returns at once but `flush` and `close`.
    """

    def __init__(self, client: Any, run_id: str, folder: Path, logged_params: set[str], patience_s: float):
        self.logged_params = logged_params
        self._patience_s = patience_s
        self._client = client
        self._run_id = run_id
        self._folder = folder
        self._kept = 0
        self._letters: list[Letter] = []
        self._changed = threading.Condition()
        self._sending = False
        self._hurry = False
        self._closed = False
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def put(self, letter: Letter) -> None:
        with self._changed:
            for older in [each for each in self._letters if each.series and each.series == letter.series]:
                self._letters.remove(older)
                older.done()
            self._letters.append(letter)
            self._changed.notify_all()

    def put_metrics(self, metrics: list[Metric]) -> None:
        with self._changed:
            last = self._letters[-1] if self._letters else None
            if last is None or last.send is not None or len(last.metrics) + len(metrics) > BATCH_METRICS:
                last = Letter()
                self._letters.append(last)
            last.metrics += metrics
            self._changed.notify_all()

    def keep(self, path: Path) -> Path:
        """A second name for the file as it is now, under which it stays the same until it has been sent."""
        self._kept += 1
        kept = self._folder / "sending" / str(self._kept) / path.name
        kept.parent.mkdir(parents=True)
        try:
            os.link(path, kept)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, kept)
        return kept

    def flush(self) -> None:
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._letters and not self._sending)
            self._hurry = False

    def close(self) -> str | None:
        """Send the rest; None if all went well, else the sentence for the user."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        return self._lost

    def _work(self) -> None:
        while True:
            with self._changed:
                self._sending = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._letters or self._closed)
                if not self._letters:
                    return
                self._changed.wait_for(self._is_due, timeout=SEND_EVERY_S)
                letters, self._letters, self._sending = self._letters, [], True
            for letter in letters:
                self._deliver(letter)

    def _is_due(self) -> bool:
        """Metrics gather for a while, so that a request carries many; everything else goes at once."""
        return self._hurry or self._closed or any(letter.send for letter in self._letters)

    def _deliver(self, letter: Letter) -> None:
        """Send a letter, again and again while the server is away; once it is given up, keep everything."""
        patience = f"{self._patience_s:.0f} s"
        failing_since, pause_s = None, RETRY_FIRST_S
        while self._lost is None:
            try:
                self._send(letter)
            except Exception as error:
                why = f"{letter.name} ({_brief(error)})"
                if refused := self._refusal(letter, error):
                    self._give_up(f"{letter.name} was not taken: {refused}")
                    break
                if not _may_pass(error):
                    self._give_up(f"the tracking server refused {why}")
                    break
                if failing_since is None:
                    failing_since = time.monotonic()
                    _tell(f"the tracking server did not take {why}; trying for {patience}, the run goes on")
                elif time.monotonic() - failing_since > self._patience_s:
                    self._give_up(f"for {patience} the tracking server did not take {why}")
                    break
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_LONGEST_S)
            else:
                letter.done()
                if failing_since is not None:
                    _tell("the tracking server is back")
                return
        self._save(letter)

    def _refusal(self, letter: Letter, error: Exception) -> str:
        """Why somebody has to be let in first; the server itself may be who is not."""
        if letter.store and "error responses" in str(error):
            return refusal_of_its_artifacts(self._client, self._run_id)
        return refusal(error)

    def _send(self, letter: Letter) -> None:
        if letter.send is not None:
            letter.send(self._client)
            return
        from mlflow.entities import Metric as MlflowMetric

        for start in range(0, len(letter.metrics), BATCH_METRICS):
            batch = letter.metrics[start : start + BATCH_METRICS]
            self._client.log_batch(self._run_id, metrics=[MlflowMetric(*metric) for metric in batch])

    def _give_up(self, why: str) -> None:
        folder = self._folder.resolve()
        self._lost = (
            f"{why}; the run's files are safe in {folder}, what was not sent in {UNSENT}.jsonl and the folder {UNSENT} "
            "there: mend the server, then run again with the same run id to go on from the last checkpoint"
        )

    def _save(self, letter: Letter) -> None:
        """Put on disk what cannot be sent: artifacts under their names, all else as one JSON object a line."""
        records = letter.records + [
            {"metric": key, "value": value, "step": step, "timestamp": time_ms}
            for key, value, time_ms, step in letter.metrics
        ]
        try:
            with (self._folder / f"{UNSENT}.jsonl").open("a") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            if letter.store is not None:
                name, write = letter.store
                path = self._folder / UNSENT / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
            letter.done()
        except Exception as error:  # such as a full disk; the rest of the letters may still fit
            _tell(f"not even kept: {[letter.store and letter.store[0], *records]} ({_brief(error)})")


FINAL_CODES = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}
"""MLflow's error codes (mlflow.protos.databricks_pb2.ErrorCode) that trying again cannot mend."""

_FINAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT}
_PASSING_STATUSES = {408, 409, 425, 429}
"""HTTP's 4xx that say nothing about the request itself."""
_CLIENTS = {"boto3", "botocore", "mlflow", "requests", "s3transfer", "sqlalchemy", "urllib3"}


def _may_pass(error: Exception) -> bool:
    """Whether an error may be gone the next time: an outage, not a refusal and not a mistake in the program."""
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNOS:
        return False
    if getattr(error, "error_code", None) in FINAL_CODES:
        return False
    status = _http_status(error)
    if 400 <= status < 500 and status not in _PASSING_STATUSES:
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS


def _http_status(error: BaseException | None) -> int:
    """The status of the HTTP answer behind an error; 0 where there was none."""
    if error is None:
        return 0
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        return int(response["ResponseMetadata"]["HTTPStatusCode"])
    if response is not None:  # requests'
        return int(response.status_code)
    return _http_status(error.__cause__ or error.__context__)


def _brief(error: BaseException) -> str:
    """The first line of an error; of a request that was tried several times, what ended the last try."""
    line = next(iter(str(error).splitlines()), "")
    if answers := re.search(r"too many (\d+) error responses", line):
        return f"it answers {answers[1]}, its log says why"
    cause = re.search(r"\(Caused by \w+\(['\"](.*)['\"]\)\)", line)
    return f"{type(error).__name__}: {cause[1] if cause else line}"[:300]


def _tell(text: str) -> None:
    print(f"warning: {without_passwords(text)}", file=sys.stderr, flush=True)
