"""Where the tracking server runs, for backups: as processes of this machine, or in Docker's containers.

Each venue says by which commands its databases are dumped and loaded and its artifacts saved; backup.py runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import compose
import local
import settings
from settings import Refused

DATABASES = ("mlflow", "mlflow_auth")
# Dumps hold no owners: what is loaded belongs to the role that loads it, the server's.
PG_DUMP = ["--username=mlflow", "--no-owner", "--no-privileges"]
PSQL = ["--username=mlflow", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]
MARIADB = "--user=mlflow --host=127.0.0.1 --default-character-set=utf8mb4"
MARIADB_DUMP = f"{MARIADB} --single-transaction --skip-lock-tables --no-tablespaces"


@dataclass(frozen=True)
class Command:
    """A program to run, with its whole environment: there the secrets are, never among the words."""

    words: list[str]
    environment: Mapping[str, str]


class Venue(Protocol):
    """What backup.py asks of a venue."""

    values: Mapping[str, str]

    def storage(self, serve: bool) -> AbstractContextManager[None]:
        """While the databases and the S3 server run. With `serve` MLflow is started at the end."""

    def stop_server(self) -> None:
        """End MLflow, so that nobody writes."""

    def dump(self, database: str) -> Command:
        """Writes a database as SQL."""

    def client(self, database: str) -> Command:
        """Runs the SQL of standard input, all of it or (PostgreSQL) nothing; answers with bare rows."""

    def artifacts(self, action: str) -> Command:
        """artifacts.py with the keys that may do everything."""

    def upgrade(self) -> Command:
        """`server.py upgrade` of the MLflow that is installed now."""


class Processes:
    """The server of local.py."""

    def __init__(self, values: Mapping[str, str]):
        self.values = values
        self.store: Mapping[str, str] = {}

    @contextmanager
    def storage(self, serve: bool) -> Iterator[None]:
        with local.one_at_a_time(), ExitStack() as undo:
            local.check(self.values)
            local.start_database(self.values, undo)
            self.store = local.start_s3(self.values, undo)
            yield
            if serve:
                local.start_server(self.values, self.store, undo)
                print(f"The tracking server is up: {settings.address(self.values)}")
                undo.pop_all()

    def stop_server(self) -> None:
        local.SERVER.stop()

    def dump(self, database: str) -> Command:
        return self._postgresql("pg_dump", *PG_DUMP, database)

    def client(self, database: str) -> Command:
        return self._postgresql("psql", *PSQL, "--single-transaction", database)

    def _postgresql(self, program: str, *words: str) -> Command:
        where = ["--host=127.0.0.1", f"--port={self.values['DATABASE_PORT']}"]
        environment = {**os.environ, "PGPASSWORD": self.values["DATABASE_PASSWORD"]}
        return Command([local.postgresql_program(program), *where, *words], environment)

    def artifacts(self, action: str) -> Command:
        environment = local.server_environment(self.values, self.store) | as_administrator(self.values)
        return Command([sys.executable, str(settings.FOLDER / "artifacts.py"), action], environment)

    def upgrade(self) -> Command:
        environment = local.server_environment(self.values, self.store)
        return Command([sys.executable, str(settings.FOLDER / "server.py"), "upgrade"], environment)


class Containers:
    """The server of compose.py."""

    def __init__(self, values: Mapping[str, str]):
        self.values = values
        self.stack = compose.Stack(compose.compose_command(), values)

    @contextmanager
    def storage(self, serve: bool) -> Iterator[None]:
        self.stack.start_storage()
        yield
        if serve:
            self.stack.up()

    def stop_server(self) -> None:
        self.stack.run("stop", "server")

    def dump(self, database: str) -> Command:
        if self.values["DATABASE"] == "postgresql":
            return self._command("exec", "-T", "postgresql", "pg_dump", *PG_DUMP, database)
        return self._mariadb(f"mariadb-dump {MARIADB_DUMP}", database)

    def client(self, database: str) -> Command:
        if self.values["DATABASE"] == "postgresql":
            return self._command("exec", "-T", "postgresql", "psql", *PSQL, "--single-transaction", database)
        return self._mariadb(f"mariadb {MARIADB} --batch --skip-column-names", database)

    def _mariadb(self, program: str, database: str) -> Command:
        shell = f'MYSQL_PWD="$MARIADB_PASSWORD" exec {program} {database}'
        return self._command("exec", "-T", "mariadb", "sh", "-c", shell)

    def artifacts(self, action: str) -> Command:
        return self._in_server("artifacts.py", action, more=as_administrator(self.values))

    def upgrade(self) -> Command:
        self.stack.run("build", "server")
        return self._in_server("server.py", "upgrade", more={})

    def _in_server(self, *script: str, more: Mapping[str, str]) -> Command:
        return self._command("run", "--rm", "-T", "--no-deps", "server", "python", *script, more=more)

    def _command(self, *words: str, more: Mapping[str, str] | None = None) -> Command:
        return Command([*self.stack.command, *words], {**self.stack.environment, **(more or {})})


def as_administrator(values: Mapping[str, str]) -> dict[str, str]:
    """The administrator's S3 keys in the place of the server's."""
    return dict(zip(settings.SERVER_KEYS, settings.admin_keys(values), strict=True))


def of_this_machine() -> Venue:
    """The venue that runs here, else the one that has data here."""
    values = settings.load()
    if local.DATABASE.pid():
        return Processes(values)
    if shutil.which("docker"):
        label = f"label=com.docker.compose.project={compose.project()}"
        found = subprocess.run(["docker", "ps", "--all", "--quiet", "--filter", label], capture_output=True, text=True)
        if found.stdout.strip():
            return Containers(values)
    if local.POSTGRESQL.exists():
        return Processes(values)
    raise Refused("there is no tracking server here; start one: make services, or make services-local")
