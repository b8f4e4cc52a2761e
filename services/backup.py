"""Backups of the tracking server, started by `make services` or `make services-local`.

    python services/backup.py backup            both databases, then the artifacts, into services/backups/TIME/
    python services/backup.py restore FOLDER    put a backup back; FORCE=1 in the environment: over what is there
    python services/backup.py upgrade           a backup, then both databases to the installed MLflow's schema

A backup is complete when its folder has its name: before, that ends in .partial. Its manifest has the SHA-256 of every
file. Artifacts are copied after the databases, so that all those exist to which the databases refer. MLflow serves
during a backup, and is stopped during a restore or an upgrade.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import local
import settings
from settings import Refused

import venues
from venues import DATABASES, Command, Venue

BACKUPS = settings.FOLDER / "backups"
LOCK = settings.FOLDER / ".backup.lock"
MANIFEST, ARTIFACTS = "manifest.json", "artifacts.tar"
CHUNK = 2**20
BAR = 30  # characters
# What a load begins with: nothing of before may stay.
EMPTIED = {
    "postgresql": "DROP SCHEMA public CASCADE; CREATE SCHEMA public;\n",
    "mariadb": "DROP DATABASE {0}; CREATE DATABASE {0} CHARACTER SET utf8mb4 COLLATE utf8mb4_bin; USE {0};\n",
}
TABLES = (
    "SELECT count(*) FROM information_schema.tables WHERE table_name = 'runs' AND table_schema IN ('public', 'mlflow')"
)
COUNTS = [f"(SELECT count(*) FROM {table})" for table in ("runs", "registered_models", "experiments")]
USED = f"SELECT {' + '.join(COUNTS)} - 1"  # one experiment is there from the beginning


def backup(venue: Venue) -> Path:
    """Make a backup and return its folder."""
    BACKUPS.mkdir(mode=0o700, exist_ok=True)
    folder = BACKUPS / time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(mode=0o700)
    try:
        for database in DATABASES:
            with (partial / f"{database}.sql.gz").open("wb") as file, gzip.GzipFile("", "wb", 3, file, 0) as packed:
                run(f"dump of {database}", venue.dump(database), output=packed)
        with (partial / ARTIFACTS).open("wb") as file:
            run("artifacts", venue.artifacts("save"), output=file)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in sorted(partial.iterdir())
        }
        manifest = {"database": venue.values["DATABASE"], "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"Backup: {folder} ({size / 1e6:.1f} MB)", flush=True)
    return folder


def restore(venue: Venue, folder: Path) -> None:
    """Put a backup back. Nothing is touched before every file of it is verified."""
    verify(folder, venue.values["DATABASE"])
    if os.environ.get("FORCE") != "1" and (held := content(venue)):
        raise Refused(f"the server is in use ({held}); to lose all that for the backup: FORCE=1 make restore ...")
    venue.stop_server()
    try:
        for database in DATABASES:
            empty = EMPTIED[venue.values["DATABASE"]].format(database).encode()
            with gzip.open(folder / f"{database}.sql.gz") as dumped:
                run(f"load of {database}", venue.client(database), source=chain(empty, dumped))
        with (folder / ARTIFACTS).open("rb") as file:
            total = (folder / ARTIFACTS).stat().st_size
            run("artifacts", venue.artifacts("load"), source=chain(b"", file), total=total)
    except Refused as error:
        raise Refused(
            f"{error}; the server stays stopped: FORCE=1 make restore BACKUP='{folder}' tries again", 1
        ) from None
    print(f"Restored {folder}", flush=True)


def upgrade(venue: Venue) -> None:
    """Bring both databases to the installed MLflow's schema, with a backup first."""
    folder = backup(venue)
    command = venue.upgrade()
    venue.stop_server()
    try:
        run("upgrade", command)
    except Refused as error:
        raise Refused(
            f"{error}; to go back, install the former MLflow and run: FORCE=1 make restore BACKUP='{folder}'", 1
        ) from None
    print("Both databases have the schema of the installed MLflow", flush=True)


def verify(folder: Path, database: str) -> None:
    """Refuse a backup that is not whole, or of another kind of database."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, dict[str, str]] = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise Refused(f"'{folder}' is no complete backup: it has no {MANIFEST}; name a folder of {BACKUPS}") from None
    for name in sorted({*files, ARTIFACTS, *(f"{database}.sql.gz" for database in DATABASES)}):
        if name not in files or not (folder / name).is_file():
            raise Refused(f"'{folder}' lacks {name}; restore another backup")
        if digest(folder / name) != files[name]["sha256"]:
            raise Refused(f"{folder / name} is not as it was written: its SHA-256 differs; restore another backup")
    if manifest["database"] != database:
        raise Refused(f"the backup is of {manifest['database']}, DATABASE is {database}; set it to that of the backup")


def content(venue: Venue) -> str:
    """What is on the server, in words; nothing for an empty one."""
    artifacts = int(ask("artifacts", venue.artifacts("count")))
    tables = int(ask("database", venue.client("mlflow"), TABLES))
    used = int(ask("database", venue.client("mlflow"), USED)) if tables else 0
    return f"{used} experiments, runs and models; {artifacts} artifacts" if used or artifacts else ""


def ask(what: str, command: Command, statement: str = "") -> str:
    """A command's short answer, to an SQL statement or to nothing."""
    answer = io.BytesIO()
    sent = iter([f"{statement};\n".encode()]) if statement else None
    run(what, command, source=sent, output=answer, quiet=True)
    return answer.getvalue().decode()


def run(
    what: str,
    command: Command,
    source: Iterator[bytes] | None = None,
    output: IO[bytes] | gzip.GzipFile | None = None,
    total: int = 0,
    quiet: bool = False,
) -> None:
    """Run a command to its end, between `source` and `output`, showing how far it is of `total` bytes."""
    shown = Bar(what, total, quiet)
    process = subprocess.Popen(
        command.words,
        env=command.environment,
        stdin=subprocess.DEVNULL if source is None else subprocess.PIPE,
        stdout=subprocess.DEVNULL if output is None else subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    listener = threading.Thread(target=shown.listen, args=(process.stderr,))
    listener.start()
    try:
        if process.stdin and source:
            # A program that ends early says why on standard error.
            with contextlib.suppress(BrokenPipeError), process.stdin:
                for chunk in source:
                    process.stdin.write(chunk)
                    shown.add(len(chunk))
        if process.stdout and output:
            while chunk := process.stdout.read(CHUNK):
                output.write(chunk)
                shown.add(len(chunk))
    finally:
        if sys.exc_info()[0]:
            process.kill()
        code = process.wait()
        listener.join()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
        shown.end()
    if code:
        raise Refused(f"{what} failed: {shown.last_words or f'exit code {code}'}", 1)


class Bar:
    """How far one step is, on a terminal; elsewhere only its name, once."""

    def __init__(self, what: str, total: int, quiet: bool):
        self.what, self.total, self.done, self.last_words = what, total, 0, ""
        self.told = False  # by the program itself, which knows how much there is
        self.terminal = sys.stdout.isatty() and not quiet
        if not (self.terminal or quiet):
            print(what, flush=True)

    def listen(self, lines: IO[bytes]) -> None:
        """Read a program's standard error: "DONE TOTAL" is how far it is, all else what it says."""
        for line in lines:
            text = line.decode(errors="replace").strip()
            if numbers := re.fullmatch(r"(\d+) (\d+)", text):
                self.told = True
                self.done, self.total = map(int, numbers.groups())
                self.draw()
            elif text:
                self.last_words = text.removeprefix("error: ")

    def add(self, count: int) -> None:
        """So many bytes have passed."""
        if not self.told:
            self.done += count
            self.draw()

    def draw(self) -> None:
        if self.terminal:
            filled = BAR * self.done // self.total if self.total else 0
            bar = f"[{'#' * filled:{BAR}}] " if self.total else ""
            print(f"\r{self.what:20} {bar}{self.done / 1e6:.1f} MB", end="", flush=True)

    def end(self) -> None:
        if self.terminal:
            print()


def chain(first: bytes, file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    """The first bytes, then the file's."""
    yield first
    while chunk := file.read(CHUNK):
        yield chunk


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Do what the command line says."""
    words = sys.argv[1:]
    if words not in (["backup"], ["upgrade"]) and (len(words) != 2 or words[0] != "restore"):
        raise Refused("what to do? backup, restore FOLDER or upgrade")
    if words[-1] == "":
        raise Refused(f"which backup? make restore BACKUP=FOLDER, with a folder of {BACKUPS}")
    with local.alone(LOCK, "backup, restore or upgrade is at work here"):
        venue = venues.of_this_machine()
        with venue.storage(serve=words != ["backup"]):
            if words == ["backup"]:
                backup(venue)
            elif words == ["upgrade"]:
                upgrade(venue)
            else:
                restore(venue, Path(words[1]).resolve())


if __name__ == "__main__":
    settings.run(main)
