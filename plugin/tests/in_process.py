"""The plainest target: a job is a child process of the test. It keeps the interface honest, and the contract quick."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mlproject_backends import JobError, NotSent
from mlproject_backends.backend import Backend
from mlproject_backends.config import Config
from mlproject_backends.job import Job, Output, State, Tell

TAG = "mlproject.process"


class InProcessBackend(Backend):
    name = "in-process"


class InProcessTarget:
    started: ClassVar[dict[str, "Process"]] = {}

    def __init__(self, config: Config):
        pass

    def check(self) -> None:
        pass

    def render(self, job: Job) -> dict[str, Any]:
        return {"argv": list(job.argv), "env": dict(job.env), "secrets": sorted(job.secrets)}

    def submit(self, job: Job) -> "Process":
        folder = Path(tempfile.mkdtemp(prefix="mlproject-in-process-"))

        # Each job of a container has /tmp to itself; here the folder takes its place.
        def moved(text: str) -> str:
            return text.replace("/tmp/mlproject", str(folder)).replace('"/cache"', repr(str(folder / "cache")))

        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {name: moved(text) for name, text in job.env.items()}
        log = folder / "output"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *map(moved, job.argv[1:])],
                env={"PATH": path, "HOME": str(folder), **env, **job.secrets},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started[str(process.pid)] = Process(process, log)
        return self.started[str(process.pid)]

    def find(self, tags: Mapping[str, str]) -> "Process":
        if TAG not in tags:
            raise NotSent("no process was started")
        if tags[TAG] not in self.started:
            raise JobError("no such process")
        return self.started[tags[TAG]]


class Process:
    def __init__(self, process: "subprocess.Popen[bytes]", log: Path):
        self.process, self.log = process, log
        self.tags = {TAG: str(process.pid)}
        self.removed = self.cancelled = False

    def watch(self, tell: Tell, output: Output) -> State:
        tell(f"running as process {self.process.pid}")
        with self.log.open(errors="replace") as file:
            while True:
                ended = self.state().ended
                for line in file:
                    output(line.rstrip("\n"))
                if ended:
                    return self.state()
                time.sleep(0.05)

    def state(self) -> State:
        code = self.process.poll()
        if self.removed:
            return State("FAILED", "the process is gone: someone removed it")
        if code is None:
            return State("RUNNING", f"running as process {self.process.pid}")
        if self.cancelled:
            return State("KILLED", "cancelled", code)
        return State("FAILED" if code else "FINISHED", f"exit code {code}", code)

    def logs(self, output: Output) -> None:
        if not self.removed:
            for line in self.log.read_text(errors="replace").splitlines():
                output(line)

    def cancel(self) -> None:
        if self.process.poll() is None:
            self.cancelled = True
            self.process.send_signal(signal.SIGTERM)

    def clean_up(self) -> None:
        pass
