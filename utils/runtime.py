"""The process around an entry point: exit codes, stop signals, git state, the place among several processes."""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from utils import UsageError
from utils.settings import parse

SettingsT = TypeVar("SettingsT")

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


def launch(main: Callable[[SettingsT], None], settings_class: type[SettingsT], *, imports: Sequence[str] = ()) -> None:
    """Run an entry script: settings from the command line, errors for people as one line, bugs as tracebacks.

    An exception that carries an `exit_code` (the rooms' DataError, ModelError, UsageError, RunFailed) is meant for the
    user; every other one is a bug. Ctrl-C exits 130. `imports` names large modules that `main` is going to import in
    any case; here they take less time.
    """
    settings = parse(settings_class)
    # torch's threads (of GNU OpenMP) wait for each other in a loop of 300,000 rounds. Where another program wants the
    # core that is time lost: on two cores, beside one busy process, training took three to five times as long as with
    # 3,000 rounds; alone it made no difference. To be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # A tracking server that serves artifacts sends MLflow's client to its own S3 server, for downloads and for large
    # uploads. Where that is out of reach the client tries for two minutes; through the tracking server it always goes.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    if imports:
        import_all(imports)
    try:
        main(settings)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        sys.exit(exit_code)


def import_all(modules: Sequence[str]) -> None:
    """Import large modules without looking for garbage in them, now or later: they stay.

    The search takes a quarter of the time that torch and MLflow take to import, and a second when the process ends.
    """
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def without_passwords(text: str) -> str:
    """The text with `user:password@` taken out of every address in it: errors of clients quote whole addresses."""
    return re.sub(r"://[^/@\s]+@", "://", text)


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM no longer ends the process but makes the yielded function return True.

    The caller then saves its work and exits with EXIT_TERMINATED, as a process ended by the signal would.
    """
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Place:
    """Which of the `world_size` cooperating processes this is; torchrun and Kubernetes Indexed Jobs set it."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def leads(self) -> bool:
        """Rank 0 alone reports, writes and logs."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Place:
        """Read RANK, LOCAL_RANK and WORLD_SIZE; a single process where they are not set."""
        return cls(rank=_number("RANK", 0), local_rank=_number("LOCAL_RANK", 0), world_size=_number("WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is '{text}' in the environment; allowed: a whole number, as torchrun sets it")
    return int(text)


def git_tags(folder: Path) -> dict[str, str]:
    """The commit of the code in `folder` and whether its files differ from it; empty where nobody knows.

    In a container the code comes without its history; MLPROJECT_GIT_COMMIT and MLPROJECT_GIT_DIRTY (true or false) in
    the environment then say what the launcher saw.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        told = {"git_commit": "MLPROJECT_GIT_COMMIT", "git_dirty": "MLPROJECT_GIT_DIRTY"}
        return {tag: os.environ[name] for tag, name in told.items() if os.environ.get(name)}
    return {"git_commit": commit, "git_dirty": "true" if changes else "false"}
