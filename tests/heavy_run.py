"""A run that logs much, and whether all of it arrived: asked of PostgreSQL and of the S3 server, not of MLflow.

As a script it is an entry point like the project's own, logging through `utils.tracking`. What it logs follows from its
settings; when it logged what, it writes to `RUN_ID.json` in the working folder, for whoever checks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.runtime import launch
from utils.settings import setting
from utils.tracking import start_run

KEYS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
FOLDER = "files"

Point = tuple[str, int, float, int]  # key, step, value, time in ms


@dataclass(frozen=True)
class Settings:
    """What one run logs."""

    seed: int = setting(0, "what its values and bytes are drawn from")
    points: int = setting(10_000, "metric points, over four metrics")
    files: int = setting(4, "artifacts, spread over the run", minimum=0)
    file_bytes: int = setting(5_000_000, "size of each artifact")
    seconds: float = setting(0.0, "how long the run takes at least", minimum=0)

    @property
    def steps(self) -> int:
        return self.points // len(KEYS)

    def values(self, step: int) -> dict[str, float]:
        """The metrics of one step: numbers of 53 significant bits."""
        return {key: math.sin(self.seed + number + step / 3) for number, key in enumerate(KEYS)}

    def content(self, number: int) -> bytes:
        """An artifact; no part of it is like another."""
        return random.Random(f"{self.seed} {number}").randbytes(self.file_bytes)

    def files_after(self, step: int) -> range:
        """The numbers of the artifacts that are logged after a step."""
        return range(step * self.files // self.steps, (step + 1) * self.files // self.steps)


@dataclass(frozen=True)
class Logged:
    """A run that was logged, and for each step the time before and after (ms)."""

    run_id: str
    settings: Settings
    times: list[tuple[int, int]]

    def write(self) -> None:
        Path(f"{self.run_id}.json").write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Logged:
        fields = json.loads(path.read_text())
        return cls(fields["run_id"], Settings(**fields["settings"]), [(low, high) for low, high in fields["times"]])

    def check_points(self, points: list[Point]) -> None:
        """Every point once, with its value and a time at which it was logged, and no other."""
        wanted = {(key, step, value) for step in range(self.settings.steps) for key, value in self._values(step)}
        got = [(key, step, value) for key, step, value, _ in points]
        assert len(got) == len(set(got)), f"{len(got) - len(set(got))} points are there twice"
        assert set(got) == wanted, f"{len(wanted - set(got))} points missing, {len(set(got) - wanted)} not logged"
        for key, step, _, time_ms in points:
            low, high = self.times[step]
            assert low <= time_ms <= high, f"{key} at step {step}: {time_ms} ms is not in {low} to {high}"

    def _values(self, step: int) -> list[tuple[str, float]]:
        return list(self.settings.values(step).items())

    def check_files(self, digests: dict[str, str]) -> None:
        """Every artifact with every byte, and no other file in their folder."""
        wanted = {
            f"{FOLDER}/{number}.bin": hashlib.sha256(self.settings.content(number)).hexdigest()
            for number in range(self.settings.files)
        }
        assert digests == wanted, f"wrong or missing: {sorted(dict(digests.items() ^ wanted.items()))}"


def points_in_database(database: Any, run_id: str) -> list[Point]:
    """The metric points of a run, by SQL."""
    rows = database.execute(f"SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = '{run_id}'")
    return [(key, step, value, time_ms) for key, step, value, time_ms in rows]


def files_in_bucket(settings: Mapping[str, str], run_id: str) -> dict[str, str]:
    """Path and SHA-256 of what lies in a run's artifact folder, by boto3 with the tracking server's settings."""
    import boto3

    s3 = boto3.client(
        "s3",
        endpoint_url=settings["S3_ENDPOINT_URL"],
        region_name=settings["S3_REGION"],
        aws_access_key_id=settings["S3_ACCESS_KEY"],
        aws_secret_access_key=settings["S3_SECRET_KEY"],
    )
    bucket, mark = settings["S3_BUCKET"], f"/{run_id}/artifacts/"
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=settings["S3_PREFIX"] + "/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ()) if mark in entry["Key"]]
    objects = {key.partition(mark)[2]: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}
    return {path: hashlib.sha256(content).hexdigest() for path, content in objects.items()}


def write_files(settings: Settings, folder: Path) -> list[Path]:
    """The artifacts, on this machine."""
    paths = [folder / f"{number}.bin" for number in range(settings.files)]
    for number, path in enumerate(paths):
        path.write_bytes(settings.content(number))
    return paths


def now_ms() -> int:
    return int(time.time() * 1000)


def main(settings: Settings) -> None:
    log(settings, write_files(settings, Path.cwd())).write()


def log(settings: Settings, files: list[Path]) -> Logged:
    """One run through the project's own tracking."""
    times: list[tuple[int, int]] = []
    with start_run(settings, "heavy_run") as run:
        logged = Logged(run.id, settings, times)
        print(f"run {run.id}", flush=True)
        start = time.monotonic()
        for step in range(settings.steps):
            time.sleep(max(0.0, start + settings.seconds * step / settings.steps - time.monotonic()))
            before = now_ms()
            run.metrics(settings.values(step), step)
            times.append((before, now_ms()))
            for number in settings.files_after(step):
                run.artifact(files[number], FOLDER)
                print(f"file {number}", flush=True)
        logged.write()
    return logged


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
