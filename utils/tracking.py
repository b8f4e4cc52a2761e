"""The run in MLflow, written in the background: logging neither slows the work nor ends it.

Everything that a script logs goes into an outbox that one thread empties in order, metrics in batches. While the server
is away the thread tries again; the work goes on. When the server does not come back within TRACKING_PATIENCE_S seconds
(environment, 600 by default), what was not sent is put on disk and leaving the run raises `RunFailed`, or prints the
same where the script fails for a reason of its own.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils import RunFailed, UsageError
from utils.outbox import FINAL_CODES, Letter, Outbox
from utils.provenance import Origin, image, run_name, venue
from utils.refusals import refusal
from utils.runtime import git_tags, without_passwords
from utils.settings import as_params, as_text

SYSTEM_METRICS_EVERY_S = 10.0
LONGEST_REASON = 5000
"""MLflow takes 8,000 characters in a tag."""
OUTPUTS = Path("outputs")
"""Where runs keep their files until the server has them, one folder a run."""


@contextmanager
def start_run(settings: Any, entry_point: str, *, about: Sequence[str] = (), enabled: bool = True) -> Iterator[Run]:
    """Join the run that `mlflow run` made (MLFLOW_RUN_ID), else make one; log the settings and where it comes from.

    `about` says in a word or two what the run is about; with its venue that is the run's name.
    With `enabled=False` (every process of a distributed run but the first) the run swallows all that is logged.
    Leaving the block sends what is left; RunFailed if the server never came back. A run that fails has the reason as
    the tag `reason`.
    """
    if not enabled:
        yield Run(os.environ.get("MLFLOW_RUN_ID", ""), OUTPUTS, None)
        return
    patience_s = _patience_s()
    # Our own retries keep the run alive; long ones inside the client would only hide an outage from us.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Twenty runs at once kept a starved server busy for half a minute a request; what is sent again keeps it busier.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    import mlflow

    try:
        active = mlflow.start_run(log_system_metrics=False)
    except Exception as error:
        raise _start_error(error, mlflow.get_tracking_uri()) from error
    client = mlflow.MlflowClient()
    folder = OUTPUTS / active.info.run_id
    folder.mkdir(parents=True, exist_ok=True)
    outbox = Outbox(client, active.info.run_id, folder, set(active.data.params), patience_s)
    tags, origin = _whence(settings, entry_point, active.data)
    run = Run(active.info.run_id, folder, outbox, origin)
    status = "FAILED"
    try:
        run.params(as_params(settings))
        run.tags(tags)
        run.rename(run_name(active.info.run_name, about or (entry_point,), origin.venue))
        run.describe("")
        yield run
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    except Exception as error:
        run.tags({"reason": without_passwords(" ".join(str(error).split()) or type(error).__name__)[:LONGEST_REASON]})
        raise
    finally:
        run.later(lambda client: client.set_terminated(run.id, status), {"status": status})
        lost = outbox.close()
        if lost is not None and status != "FINISHED":  # what ended the script is told by whoever catches it
            print(f"error: {without_passwords(lost)}", file=sys.stderr, flush=True)
        if lost is None:
            shutil.rmtree(folder, ignore_errors=True)
        # MLflow prints the run's address whenever a run is ended, and has done so for the outbox.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        with suppress(Exception):  # the status has been sent, or cannot be; this only clears MLflow's own state
            mlflow.end_run(status if lost is None else "FAILED")
    if lost is not None:
        raise RunFailed(lost)


def introduce_run(settings: Any, entry_point: str, *, about: Sequence[str], tags: dict[str, str]) -> None:
    """Say on the run that `mlflow run` made, if there is one, what it is; for a service, which logs nothing more on it.

    Its settings, name, tags and description, as `start_run` gives them; the run goes on.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    import mlflow
    from mlflow.entities import Param, RunTag

    client = mlflow.MlflowClient()
    try:
        present = client.get_run(run_id)
        found, origin = _whence(settings, entry_point, present.data)
        texts = {**found, **tags, "mlflow.note.content": origin.markdown("")}
        values = {key: value for key, value in as_params(settings).items() if key not in present.data.params}
        params = [Param(key, as_text(value)) for key, value in values.items()]
        client.log_batch(run_id, params=params, tags=[RunTag(key, as_text(value)) for key, value in texts.items()])
        client.update_run(run_id, name=run_name(present.info.run_name, about, origin.venue))
    except Exception as error:
        raise _start_error(error, mlflow.get_tracking_uri()) from error


def _whence(settings: Any, entry_point: str, present: Any) -> tuple[dict[str, str], Origin]:
    """The tags that say where a run comes from, and the same for its description; `present` is what is on it."""
    place = {"venue": venue(present.tags), "image": image(present.tags)}
    tags = {"entry_point": entry_point, **git_tags(Path.cwd()), **{key: value for key, value in place.items() if value}}
    return tags, Origin(settings, entry_point, place["venue"], {**present.tags, **tags}, present.params)


class Run:
    """What a script may say about its run; every call returns at once."""

    def __init__(self, run_id: str, folder: Path, outbox: Outbox | None, origin: Origin | None = None):
        self.id = run_id
        self.folder = folder
        """The run's own folder on this machine; removed when everything in it has been sent."""
        self._outbox = outbox
        self._origin = origin
        self._model_uri = ""

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters that are not on the run yet: `mlflow run` logged its own, perhaps in another spelling."""
        if self._outbox is None:
            return
        from mlflow.entities import Param

        new = {key: value for key, value in values.items() if key not in self._outbox.logged_params}
        self._outbox.logged_params.update(new)
        params = [Param(key, as_text(value)) for key, value in new.items()]
        records = [{"param": param.key, "value": param.value} for param in params]
        self._outbox.put(Letter(lambda client: client.log_batch(self.id, params=params), records))

    def tags(self, values: dict[str, Any]) -> None:
        """Set tags."""
        if self._outbox is None:
            return
        from mlflow.entities import RunTag

        tags = [RunTag(key, as_text(value)) for key, value in values.items()]
        records = [{"tag": tag.key, "value": tag.value} for tag in tags]
        self._outbox.put(Letter(lambda client: client.log_batch(self.id, tags=tags), records))

    def rename(self, name: str) -> None:
        """Give the run a name."""
        self.later(lambda client: client.update_run(self.id, name=name), {"run_name": name})

    def describe(self, result: str) -> None:
        """Set the run's description: `result` in Markdown, the command that made it and the one that repeats it."""
        if self._origin is not None:
            self.tags({"mlflow.note.content": self._origin.markdown(result)})

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics at `step` with the time of this call."""
        if self._outbox is not None:
            now_ms = int(time.time() * 1000)
            self._outbox.put_metrics([(key, float(value), now_ms, step) for key, value in values.items()])

    def picture(self, figure: Any, path: str) -> None:
        """Store a matplotlib figure as the artifact `path`."""
        if self._outbox is not None:
            self._outbox.put(
                Letter(lambda client: client.log_figure(self.id, figure, path), store=(path, figure.savefig))
            )

    def text(self, text: str, path: str) -> None:
        """Store a text as the artifact `path`."""
        if self._outbox is not None:
            write = functools.partial(Path.write_text, data=text, encoding="utf-8")
            self._outbox.put(Letter(lambda client: client.log_text(self.id, text, path), store=(path, write)))

    def json(self, value: Any, path: str) -> None:
        """Store a JSON-able value as the artifact `path`."""
        self.text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)

    def artifact(self, path: Path, folder: str = "", *, replaces: str = "") -> None:
        """Store a file in the artifact folder `folder`.

        The file may be replaced by renaming right after this call: what is sent is the present one. `replaces` names a
        series (such as the latest checkpoint) of which only the newest unsent member is sent.
        """
        if self._outbox is None:
            return
        kept = self._outbox.keep(path)
        self._outbox.put(
            Letter(
                lambda client: client.log_artifact(self.id, str(kept), folder or None),
                store=(str(Path(folder) / path.name), kept.replace),
                file=kept,
                series=replaces,
            )
        )

    def table(self, rows: list[dict[str, Any]], path: str) -> None:
        """Store rows of equal keys as the artifact `path`, a CSV file with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.text(text.getvalue(), path)

    def model(self, path: Path, example: Any, *, step: int) -> None:
        """Log an ONNX file as the run's model (see `log_onnx_model`)."""

        def send(client: Any) -> None:
            from utils.artifacts import log_onnx_model

            self._model_uri = log_onnx_model(self.id, path, example, step=step)

        self.later(send, {"model": path.name})

    def register(self, name: str, description: str, tags: dict[str, Any]) -> None:
        """Register the run's model under `name` (see `registry.register`)."""

        def send(client: Any) -> None:
            from utils.registry import register

            texts = {key: as_text(value) for key, value in tags.items()}
            register(client, name, run_id=self.id, model_uri=self._model_uri, description=description, tags=texts)

        self.later(send, {"register_as": name, "description": description, "tags": tags})

    def dataset(
        self,
        *,
        name: str,
        digest: str,
        source: str,
        context: str,
        profile: dict[str, Any],
        version: dict[str, str] | None = None,
    ) -> None:
        """Log a data set as an input of the run; MLflow keeps 36 characters of the digest, the tag all of them.

        `version` are more tags, which say what version of the data it is.
        """
        if self._outbox is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind, where = _source(source)
        entity = Dataset(name, digest[:32], kind, json.dumps(where), profile=json.dumps(profile))
        inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", context)])]
        record = {"dataset": name, "digest": digest, "source": where, "context": context, "profile": profile}
        self._outbox.put(Letter(lambda client: client.log_inputs(self.id, inputs), [record]))
        self.tags({"data_digest": digest, **(version or {})})

    def later(self, send: Callable[[Any], Any], record: dict[str, Any]) -> None:
        """Queue any other call: `send` gets the MlflowClient, and is called again after a failure.

        `record` says in plain values what is in it, for when it cannot be sent.
        """
        if self._outbox is not None:
            self._outbox.put(Letter(send, [record]))

    def flush(self) -> None:
        """Wait until everything logged so far has been sent, or the server is given up."""
        if self._outbox is not None:
            self._outbox.flush()

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """While in the block, log MLflow's system metrics (CPU, memory, disk, network, GPU) every ten seconds."""
        if self._outbox is None:
            yield
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.id)
        left = threading.Event()

        def sample() -> None:
            step = 0
            while True:
                monitor.collect_metrics()
                self.metrics({f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}, step)
                for source in monitor.monitors:
                    source.clear_metrics()
                step += 1
                if left.wait(SYSTEM_METRICS_EVERY_S):
                    return

        thread = threading.Thread(target=sample, name="system-metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()


def _patience_s() -> float:
    text = os.environ.get("TRACKING_PATIENCE_S", "600")
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"TRACKING_PATIENCE_S is '{text}' in the environment; allowed: a number of seconds") from None


def _start_error(error: Exception, uri: str) -> Exception:
    code = getattr(error, "error_code", None)
    if refused := refusal(error):
        return UsageError(f"cannot open a run at {without_passwords(uri)}: {refused}")
    if code == "RESOURCE_DOES_NOT_EXIST":
        advice = "check MLFLOW_RUN_ID and MLFLOW_EXPERIMENT_NAME"
    else:
        advice = "start the server or set MLFLOW_TRACKING_URI"
    kind = UsageError if code in FINAL_CODES else RunFailed
    return kind(f"cannot open a run at {without_passwords(uri)}: {str(error).splitlines()[0][:200]}; {advice}")


def _source(source: str) -> tuple[str, dict[str, Any]]:
    """MLflow's type and description of where data came from."""
    if source.startswith("s3://"):
        return "s3", {"uri": source}
    if source.startswith(("http://", "https://")):
        return "http", {"url": source}
    if Path(source).exists():
        return "local", {"uri": source}
    return "code", {"tags": {"source": source}}
