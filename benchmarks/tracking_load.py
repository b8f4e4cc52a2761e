"""Twenty runs at once, each with 10,000 metric points and 20 MB of artifacts: our tracking against MLflow's own calls.

The server is this project's (services/server.py: one worker, sign-in, proxied artifacts) over PostgreSQL and Ceph's S3
gateway. Each run is a process of its own, as trainings are. The clock runs from the moment when all have their imports
and files to the end of the last run; then every point is looked up in PostgreSQL, every byte read from the S3 server.

Ours logs everything. With `mlflow.log_metric` that takes the better part of an hour, so the other side logs all of the
artifacts but only two shares of the points, the second twice the first: if it takes twice as long, time goes with the
points, and the whole is reckoned from it. `--all` has it log all of them. Goal: at least 10 times faster.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import s3_server
from heavy_run import FOLDER, KEYS, Logged, Settings, files_in_bucket, log, now_ms, points_in_database, write_files
from services_stack import MlflowServer, PostgreSQL, Stack, new_folder, server_settings

RUNS = 20
LOAD = Settings(points=10_000, files=4, file_bytes=5_000_000)
SHARES = (0.01, 0.02)
READY_TIMEOUT_S = 300

Log = Callable[[Settings, list[Path]], Logged]

# Imports once what all runs need.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mlflow", "heavy_run"])


@dataclass(frozen=True)
class Measured:
    """A run: when it began and ended (monotonic seconds), and what each of its HTTP requests took."""

    logged: Logged
    start: float
    end: float
    requests_s: list[float]


def stock(settings: Settings, files: list[Path]) -> Logged:
    """The run of `heavy_run.log`, with the calls of MLflow's own guide."""
    import mlflow

    times: list[tuple[int, int]] = []
    with mlflow.start_run() as run:
        for step in range(settings.steps):
            before = now_ms()
            for key, value in settings.values(step).items():
                mlflow.log_metric(key, value, step=step)
            times.append((before, now_ms()))
            for number in settings.files_after(step):
                mlflow.log_artifact(str(files[number]), FOLDER)
    return Logged(run.info.run_id, settings, times)


def one_run(log: Log, settings: Settings, ready: Any) -> Measured:
    """In a process of its own: log one run once all are ready."""
    import requests

    requests_s, send = [], requests.Session.send

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return send(self, *arguments, **options)
        finally:
            requests_s.append(time.perf_counter() - start)

    requests.Session.send = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        files = write_files(settings, Path(name))
        ready.wait(READY_TIMEOUT_S)
        start = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            logged = log(settings, files)
        return Measured(logged, start, time.monotonic(), requests_s)


def measure(name: str, log: Log, settings: Settings, stack: Stack) -> float:
    """The seconds that RUNS runs at once take; prints them, and sees that everything is there."""
    with PROCESSES.Manager() as manager, ProcessPoolExecutor(RUNS, mp_context=PROCESSES) as pool:
        ready = manager.Barrier(RUNS)
        futures = [pool.submit(one_run, log, replace(settings, seed=seed), ready) for seed in range(RUNS)]
        runs = [future.result() for future in futures]
    seconds: float = max(run.end for run in runs) - min(run.start for run in runs)
    points, megabytes = RUNS * settings.steps * len(KEYS), RUNS * settings.files * settings.file_bytes / 1e6
    p99_s = statistics.quantiles([request for run in runs for request in run.requests_s], n=100)[98]
    print(
        f"{name}: {points} points and {megabytes:.0f} MB in {seconds:.1f} s: {points / seconds:.0f} points/s, "
        f"{megabytes / seconds:.1f} MB/s, p99 of a request {p99_s:.2f} s",
        flush=True,
    )
    for run in runs:
        run.logged.check_points(points_in_database(stack.database, run.logged.run_id))
        run.logged.check_files(files_in_bucket(stack.server.settings, run.logged.run_id))
    return seconds


@contextlib.contextmanager
def new_stack() -> Iterator[Stack]:
    with contextlib.ExitStack() as at_end:
        folder = new_folder(at_end)
        database = PostgreSQL(new_folder(at_end))
        database.make()
        at_end.callback(database.kill)
        database.start()
        s3 = s3_server.start(folder, at_end)
        server = MlflowServer(folder, server_settings(database, folder, s3))
        at_end.callback(server.kill)
        server.start()
        os.environ.update(server.environment(), MLFLOW_DISABLE_TELEMETRY="true")
        yield Stack(database, server, s3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="log all points on the other side too: an hour")
    arguments = parser.parse_args()
    with new_stack() as stack:
        ours_s = measure("ours", log, LOAD, stack)
        if arguments.all:
            other_s = measure("other", stock, LOAD, stack)
        else:
            other_s = measure("other, artifacts", stock, replace(LOAD, points=len(KEYS)), stack)
            for share in SHARES:
                part = replace(LOAD, points=round(LOAD.points * share), files=0)
                part_s = measure(f"other, {share:.0%} of the points", stock, part, stack)
            other_s += part_s / share
    print(f"ratio: {other_s / ours_s:.2f} (ours {ours_s:.1f} s, other {other_s:.1f} s)")


if __name__ == "__main__":
    main()
