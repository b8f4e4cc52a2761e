"""How much the kept images may weigh, counted by all workers together in one small file."""

from __future__ import annotations

import fcntl
from pathlib import Path


class Room:
    """A number of bytes in a file, and the most that it may become."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = folder / ".kept-bytes", most_bytes

    def begin(self, taken_bytes: int) -> None:
        """Make the file: so many bytes are there already."""
        self._path.write_text(str(taken_bytes))

    def take(self, size: int) -> bool:
        """Whether there is room for `size` bytes more; then they count."""
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            taken_bytes = int(file.read() or 0) + size
            if taken_bytes > self._most_bytes:
                return False
            file.truncate(0)  # what is written next to a file opened for "a" comes to its end
            file.write(str(taken_bytes))
        return True
