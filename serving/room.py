"""How much the kept images may weigh, counted by all workers together in one small file."""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("uvicorn.error")

FILE = ".kept-bytes"

FIRST_S, EVERY_S = 5.0, 3600.0
"""How long a start waits to know what is there (S3 lists a million images in a minute or two), and when to look again:
someone may have made room."""


class Room:
    """A number of bytes in a file of `folder`, and the most that it may become; no room until someone has looked."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = folder / FILE, most_bytes

    def watch(self, measure: Callable[[], int]) -> None:
        """Let a thread look how many bytes are there, now and every hour; what goes wrong at once is raised."""
        first_look, errors = threading.Event(), list[Exception]()

        def look() -> None:
            while True:
                try:
                    self.set(measure())
                except Exception as error:  # of the store
                    errors.append(error)
                    if first_look.is_set():
                        log.warning("prediction log: cannot see how much is kept: %s", error)
                first_look.set()
                time.sleep(EVERY_S)

        self._path.unlink(missing_ok=True)
        threading.Thread(target=look, name="room", daemon=True).start()
        if first_look.wait(FIRST_S) and errors:
            raise errors[0]

    def set(self, taken_bytes: int) -> None:
        """So many bytes are there."""
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(str(taken_bytes))

    def take(self, size: int) -> bool:
        """Whether there is room for `size` bytes more; then they count."""
        try:
            with self._path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                taken_bytes = int(file.read() or self._most_bytes) + size
                if taken_bytes > self._most_bytes:
                    return False
                file.seek(0)
                file.write(str(taken_bytes))
                return True
        except OSError:  # no such file yet, a full disk
            return False
