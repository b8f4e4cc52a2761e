"""Files on their way to the prediction log: written to this machine's disk first, brought to their place by a thread.

So whoever writes never waits for a network. What cannot be brought there stays on the disk and is tried again, after a
restart too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

log = logging.getLogger("uvicorn.error")

Put = Callable[[Path, str], None]
"""Brings a file to a name under the log's address; it may take the file away. Raises what explains itself."""

AT_ONCE = 4
"""Files that are brought at a time: a small object takes S3 some ten milliseconds, most of them waiting."""

PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""After the first failure in a row, the second ...; after the last one it stays."""

MOST_BYTES = 2**30
"""What may wait on the disk: at a thousand rows a second of 64 numbers, an hour without the store."""

TEMPORARY = ".tmp"

SLASH = "+"
"""Stands for the / of a name, so that no folders are left behind."""


class Spool:
    """A folder of files that a thread brings to their place, under the same names."""

    def __init__(self, folder: Path, put: Put, waiting: Callable[[int], None], failed: Callable[[], None]) -> None:
        """`waiting` is told how many files wait, `failed` called after every attempt that was in vain.

        OSError where the folder cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._put, self._waiting, self._failed = put, waiting, failed
        self._new: SimpleQueue[str | None] = SimpleQueue()
        self._sizes: dict[str, int] = {}
        """Bytes of each file that waits, by name, in the order of coming."""
        self._bytes = 0
        self._lock = threading.Lock()
        self._error: Exception | None = None
        """The first failure since the last attempt began."""
        self._pool = ThreadPoolExecutor(AT_ONCE, "put")
        self._bring_thread = threading.Thread(target=self._bring, name="log-store", daemon=True)
        for path in sorted(folder.iterdir()):  # of a service that ended before the store came back
            if path.suffix != TEMPORARY and not path.name.startswith("."):
                with suppress(FileNotFoundError):  # another worker has brought it to its place by now
                    self._note(path.name.replace(SLASH, "/"), path.stat().st_size)
        self._bring_thread.start()

    def write(self, name: str, write: Callable[[Path], None]) -> int:
        """The bytes of a new file, which `write` made; OSError where it could not."""
        path = self._path(name)
        temporary = path.with_name(f"{path.name}{TEMPORARY}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            size = temporary.stat().st_size
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._note(name, size)
        return size

    @property
    def full(self) -> bool:
        """Whether no more should be written."""
        return self._bytes >= MOST_BYTES

    def close(self) -> None:
        """Bring what waits, tables before images; give up at the first failure, and say what stays."""
        self._new.put(None)
        self._bring_thread.join()
        self._pool.shutdown()
        if self._sizes:
            log.warning(
                "prediction log: %d files stay in %s; the next start brings them to their place",
                len(self._sizes),
                self.folder.resolve(),
            )

    def _path(self, name: str) -> Path:
        return self.folder / name.replace("/", SLASH)

    def _note(self, name: str, size: int) -> None:
        with self._lock:
            self._sizes[name] = size
            self._bytes += size
        self._waiting(len(self._sizes))
        self._new.put(name)

    def _bring(self) -> None:
        failures, closing, next_try = 0, False, 0.0
        while True:
            try:
                wait_s = max(0.0, next_try - time.monotonic()) if failures else None
                closing |= self._new.get(timeout=wait_s) is None
            except Empty:
                pass
            if failures and not closing and time.monotonic() < next_try:
                continue
            error = self._bring_all(closing)
            self._waiting(len(self._sizes))
            if error is None:
                if failures:
                    log.info("prediction log: everything is at its place again")
                failures = 0
            else:
                self._failed()
                if not failures:
                    log.warning("prediction log: %s; files wait in %s", _one_line(error), self.folder)
                next_try = time.monotonic() + PAUSES_S[min(failures, len(PAUSES_S) - 1)]
                failures += 1
            if closing:
                return

    def _bring_all(self, tables_first: bool) -> Exception | None:
        """Bring what waits, a few files at a time, up to the first failure, which is returned."""
        self._error = None
        while self._sizes and self._error is None:
            with self._lock:
                names = list(self._sizes)
            if tables_first:
                names.sort(key=lambda name: not name.endswith(".parquet"))
            list(self._pool.map(self._bring_one, names[: 8 * AT_ONCE]))
        return self._error

    def _bring_one(self, name: str) -> None:
        if self._error is not None:  # of a file before: it may have waited long for the store
            return
        path = self._path(name)
        try:
            if path.exists():  # or another worker that found it has brought it
                self._put(path, name)
                path.unlink(missing_ok=True)
        except Exception as error:  # of the store, of S3, of the disk
            if not isinstance(error, FileNotFoundError) or path.exists():
                self._error = error
                return
        with self._lock:
            self._bytes -= self._sizes.pop(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
