"""A program that runs on after the command that started it, and is found again by its process id.

The id stands in a file, with the time at which the process started: after a reboot the same id may be another's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_TIMEOUT_S = 60


def as_user(user: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments of subprocess for another user and group, and none of this one's."""
    return {} if user is None else {"user": user[0], "group": user[1], "extra_groups": []}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C counts only when the block has ended: within it, a program may have started that nobody knows of yet."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed and callable(before):
            before(signal.SIGINT, None)


def run_to_end(
    command: Sequence[str], *, text: str | None = None, timeout_s: float | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """subprocess.run with text, which after Ctrl-C goes on only once the program is gone: it writes files of ours."""
    pipe, program = subprocess.PIPE, None
    try:
        with uninterrupted():
            program = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **more)
        output, errors = program.communicate(text, timeout_s)
    except BaseException:
        if program:
            program.kill()
            program.wait()
        raise
    return subprocess.CompletedProcess(command, program.returncode, output, errors)


@dataclass(frozen=True)
class Process:
    """One program; `folder` holds its process id and what it prints."""

    name: str
    folder: Path
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def log(self) -> Path:
        """What it prints; the start before has its own file, with .1 at its end."""
        return self.folder / f"{self.name}.log"

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], user: tuple[int, int] | None = None
    ) -> None:
        """Run the command detached from this one, as the user and group given."""
        if self.log.exists():
            self.log.replace(f"{self.log}.1")
        with self.log.open("wb") as log, uninterrupted():
            started = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in this terminal is not for it
                cwd="/",
                **as_user(user),
            )
            partial = self._file.with_suffix(".partial")
            partial.write_text(f"{started.pid} {_started_at(started.pid)}")
            partial.replace(self._file)

    def pid(self) -> int | None:
        """The process's id while it runs."""
        try:
            pid, started_at = self._file.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if _started_at(int(pid)) == started_at else None

    def stop(self) -> bool:
        """End it, at last by force with all of its session; whether it ran."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, self.stop_signal)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while self.pid() is not None and time.monotonic() < deadline:
                time.sleep(0.05)
            if self.pid() is not None:
                os.killpg(pid, signal.SIGKILL)
        self._file.unlink(missing_ok=True)
        return pid is not None

    def last_words(self) -> str:
        """The line that says why it ended: its error line, else the last one."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "error:" in line.lower()), lines[-1] if lines else "no word")


def _started_at(pid: int) -> str:
    """When the kernel started a process, in clock ticks after boot; nothing if there is none or it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return "" if fields[0] == "Z" else fields[19]
