"""The tracking server's parts for tests, all real: PostgreSQL, MariaDB, and MLflow as services/server.py starts it.

Each has start(), stop() (as asked to) and kill() (as a crash would), keeps its port, and listens on 127.0.0.1 alone.
Databases are copies of one that was made at the first use, with MLflow's tables and its administrator. They run as an
unprivileged user when the tests run as root, in folders that this user can reach, without fsync.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ROOT / "services"
START_TIMEOUT_S = 180
PASSWORD, ADMIN_PASSWORD = "a-database-password/of+tests", "an-administrator-of-tests"


def unprivileged() -> dict[str, Any]:
    """Arguments of subprocess for programs that refuse to run as root."""
    if os.getuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


class Part(ABC):
    """A process that can be stopped, killed and started again."""

    may_try_again = False

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.reason = ""  # why it did not answer, when asked last
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def launch(self, log: Any) -> subprocess.Popen[bytes]:
        """Start the process in a session of its own."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it serves."""

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder / "log.txt"

    def start(self) -> None:
        """Start it and wait until it serves."""
        deadline = time.monotonic() + START_TIMEOUT_S
        self._process = None
        while not (self._process and self.answers()):
            if self._process is None or self._process.poll() is not None:
                assert self._process is None or self.may_try_again, self.log.read_text()
                with self.log.open("ab") as log:
                    self._process = self.launch(log)
            assert time.monotonic() < deadline, f"{self.log.read_text()}\nnot up in {START_TIMEOUT_S} s: {self.reason}"
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and wait."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it and its children at once."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Database(Part):
    """A database server with the databases `mlflow` and `mlflow_auth`, both of the user `mlflow`."""

    name: str
    may_try_again = True  # after a kill, its helpers may hold its lock for a moment longer

    @property
    def uri(self) -> str:
        """As DATABASE_URI has it: without the password."""
        return f"{self.name}://mlflow@127.0.0.1:{self.port}/mlflow"

    @abstractmethod
    def make(self) -> None:
        """Make the data folder, and the database and user in it."""

    def do(self, *command: object, **more: Any) -> None:
        """Run a command to its end as the database's user."""
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, cwd=self.folder, **unprivileged(), **more)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def execute(self, statement: str, database: str = "mlflow") -> list[Any]:
        """Run SQL as `mlflow` and return the rows."""
        import sqlalchemy

        driver = {"postgresql": "postgresql+psycopg2", "mariadb": "mysql+pymysql"}[self.name]
        uri = sqlalchemy.make_url(self.uri).set(drivername=driver, password=PASSWORD, database=database)
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.execute(sqlalchemy.text(statement))
            return list(result) if result.returns_rows else []

    def answers(self) -> bool:
        from sqlalchemy.exc import OperationalError

        try:
            self.execute("SELECT 1")
        except OperationalError as error:
            self.reason = str(error.orig)
            return False
        return True


class PostgreSQL(Database):
    name = "postgresql"

    def make(self) -> None:
        secret = self.folder / "secret"
        secret.write_text(PASSWORD)
        how = ["--username=mlflow", f"--pwfile={secret}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
        self.do(program("initdb"), "--pgdata", self.folder / "data", *how, "--no-sync", "--wal-segsize=1")
        single = [program("postgres"), "--single", "-D", self.folder / "data", "postgres"]
        self.do(*single, input="CREATE DATABASE mlflow;\nCREATE DATABASE mlflow_auth;\n")

    def launch(self, log: Any) -> subprocess.Popen[bytes]:
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off"}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        command = [program("postgres"), "-D", str(self.folder / "data"), *words]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **unprivileged())

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ask it to end without waiting for its clients."""
        super().stop(how)


class MariaDB(Database):
    name = "mariadb"

    def make(self) -> None:
        database = "CREATE DATABASE IF NOT EXISTS {} CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;\n"
        (self.folder / "data").mkdir()
        (self.folder / "data/init.sql").write_text(
            "".join(database.format(name) for name in ("mlflow", "mlflow_auth"))
            + f"CREATE USER IF NOT EXISTS mlflow@'%' IDENTIFIED BY '{PASSWORD}';\n"
            + "".join(f"GRANT ALL ON {name}.* TO mlflow@'%';\n" for name in ("mlflow", "mlflow_auth"))
        )
        if who := unprivileged():
            os.chown(self.folder / "data", who["user"], who["group"])
        small = ("--innodb-log-file-size=8M", "--skip-test-db")
        self.do("mariadb-install-db", "--no-defaults", f"--datadir={self.folder}/data", *small)

    def launch(self, log: Any) -> subprocess.Popen[bytes]:
        options = ["--bind-address=127.0.0.1", f"--port={self.port}", f"--socket={self.folder}/socket"]
        options += ["--innodb-flush-log-at-trx-commit=2", "--innodb-log-file-size=8M"]
        data = self.folder / "data"
        command = [program("mariadbd"), "--no-defaults", f"--datadir={data}", f"--init-file={data}/init.sql", *options]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **unprivileged())


DATABASES: dict[str, type[Database]] = {kind.name: kind for kind in (PostgreSQL, MariaDB)}


class MlflowServer(Part):
    """The server as services/server.py starts it; `settings` are its whole environment besides the present PATH."""

    def __init__(self, folder: Path, settings: Mapping[str, str]):
        super().__init__(folder)
        self.settings = {**settings, "MLFLOW_PORT": str(self.port)}
        self.uri = f"http://127.0.0.1:{self.port}"

    def launch(self, log: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(SERVICES / "server.py")]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), **self.settings}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError as error:
            self.reason = str(error)
            return False
        return True

    def environment(self, username: str = "admin", password: str = ADMIN_PASSWORD) -> dict[str, str]:
        """What a client needs to sign in."""
        names = ("URI", "USERNAME", "PASSWORD")
        return {f"MLFLOW_TRACKING_{name}": v for name, v in zip(names, (self.uri, username, password), strict=True)}


@dataclass
class Stack:
    """A server with its database; `settings` and `s3` are what it was started with."""

    database: Database
    server: MlflowServer
    s3: S3Server | None


def program(name: str) -> str:
    """A program's path; PostgreSQL's are not on everyone's."""
    places = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", *places]))
    if not found:
        from conftest import missing

        missing(f"there is no {name} here (apt-get install postgresql-15 mariadb-server-core mariadb-client-core)")
    return found


def new_folder(at_end: ExitStack) -> Path:
    """A folder that the databases' user owns and reaches, as it would not reach pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="services-", dir="/tmp"))
    at_end.callback(shutil.rmtree, folder, ignore_errors=True)
    if who := unprivileged():
        os.chown(folder, who["user"], who["group"])
    return folder


def server_settings(database: Database, folder: Path, s3: S3Server | None, **settings: str) -> dict[str, str]:
    """The server's environment: artifacts in a bucket of its own with the least rights, else in a folder."""
    fixed = {"BIND": "127.0.0.1", "AUTH": "basic", "ARTIFACTS": "proxied", "WORKERS": "1", "ADMIN_USERNAME": "admin"}
    fixed |= {"DATABASE_URI": database.uri, "DATABASE_PASSWORD": PASSWORD, "ADMIN_PASSWORD": ADMIN_PASSWORD}
    fixed |= {"FLASK_SECRET_KEY": "a-key-that-signs-forms-of-tests"}
    if s3 is None:
        return {**fixed, "ARTIFACTS_FOLDER": str(folder / "artifacts"), **settings}
    bucket = s3.new_bucket()
    policy = (SERVICES / "s3-policies/server.json").read_text().replace("BUCKET", bucket).replace("PREFIX", "artifacts")
    user = s3.new_user(policy)
    fixed |= {"S3_ENDPOINT_URL": s3.endpoint, "S3_REGION": "us-east-1", "S3_BUCKET": bucket, "S3_PREFIX": "artifacts"}
    return {**fixed, "S3_ACCESS_KEY": user.access_key, "S3_SECRET_KEY": user.secret_key, **settings}


@pytest.fixture(scope="session")
def database_template() -> Iterator[Callable[[str], Path]]:
    """A stopped database's folder, with MLflow's tables, by the kind's name; made at its first use."""
    made: dict[str, Path] = {}
    with ExitStack() as at_end:

        def template(kind: str) -> Path:
            if kind not in made:
                database = DATABASES[kind](new_folder(at_end))
                database.make()
                database.start()
                at_end.callback(database.kill)
                server = MlflowServer(database.folder, server_settings(database, database.folder, None))
                at_end.callback(server.kill)
                server.start()
                server.stop()
                database.stop()
                made[kind] = database.folder
            return made[kind]

        yield template


@pytest.fixture
def new_database(database_template: Callable[[str], Path]) -> Iterator[Callable[..., Database]]:
    """Start a database of the test's own: new_database("postgresql"); empty=True: without MLflow's tables."""
    with ExitStack() as at_end:

        def new(kind: str = "postgresql", empty: bool = False) -> Database:
            database = DATABASES[kind](new_folder(at_end))
            if empty:
                database.make()
            else:
                subprocess.run(["cp", "-a", str(database_template(kind) / "data"), str(database.folder)], check=True)
            at_end.callback(database.kill)
            database.start()
            return database

        yield new


@pytest.fixture
def new_stack(new_database: Callable[..., Database]) -> Iterator[Callable[..., Stack]]:
    """Start a server of the test's own: new_stack("mariadb", s3_server, AUTH="none", ARTIFACTS="direct").

    Without an S3 server, artifacts are in a folder. The experiment `Default` is always a proxied one.
    """
    with ExitStack() as at_end:

        def new(kind: str = "postgresql", s3: S3Server | None = None, **settings: str) -> Stack:
            database = new_database(kind)
            folder = new_folder(at_end)
            server = MlflowServer(folder, server_settings(database, folder, s3, **settings))
            at_end.callback(server.kill)
            server.start()
            return Stack(database, server, s3)

        yield new


class Place:
    """A copy of services/ in a path with a space and a quote, whose scripts run as from its own Makefile."""

    def __init__(self, folder: Path):
        folder.chmod(0o755)  # PostgreSQL's user has to pass
        self.folder = folder
        self.services = folder / "the team's server" / "services"
        left_out = shutil.ignore_patterns(".env", "data", "backups", "__pycache__", "kubernetes")
        shutil.copytree(SERVICES, self.services, ignore=left_out)
        self.ports = {name: str(free_port()) for name in ("MLFLOW_PORT", "DATABASE_PORT", "S3_PORT")}
        self.known_password = ""

    @property
    def uri(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.ports['MLFLOW_PORT']}"

    def command(self, *words: str, **more: str) -> dict[str, Any]:
        """The arguments of subprocess for a script of services/; more: variables of the environment."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
        command = [sys.executable, str(self.services / words[0]), *words[1:]]
        return {"args": command, "env": {**clean, **self.ports, **more}, "cwd": self.folder, "text": True}

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        return subprocess.run(**self.command(*words, **more), capture_output=True, timeout=600)

    def setting(self, name: str) -> str:
        """A value of .env."""
        lines = (self.services / ".env").read_text().splitlines()
        return next(line.partition("=")[2] for line in lines if line.startswith(f"{name}="))

    @property
    def password(self) -> str:
        """The administrator's: that of .env, unless another one is known."""
        return self.known_password or self.setting("ADMIN_PASSWORD")

    def client(self) -> Any:
        """MLflow's client, signed in as the administrator by this process's environment."""
        from mlflow import MlflowClient

        os.environ.update(MLFLOW_TRACKING_USERNAME="admin", MLFLOW_TRACKING_PASSWORD=self.password)
        return MlflowClient(self.uri)

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """A request to the server's interface, as the administrator unless `auth` says who."""
        import requests

        return requests.request(method, f"{self.uri}/api/{path}", **{"auth": ("admin", self.password), **more})

    def processes(self) -> dict[int, str]:
        """Every process that was started here, by its id, with its command line and those of its children."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if str(self.folder) in command + environment and int(entry.name) != os.getpid():
                found[int(entry.name)] = command
        return found

    def kill(self) -> None:
        """End everything that was started here at once, as when the power goes, and wait until it is gone."""
        killed = list(self.processes())
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        while any(map(_holds_its_ports, killed)):
            time.sleep(0.1)


def _holds_its_ports(pid: int) -> bool:
    """A killed process loses its command line first and its sockets later; as a zombie it has none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A place of a test file's own, in which nothing was started yet; all is ended and removed afterwards."""
    with ExitStack() as at_end, pytest.MonkeyPatch.context() as environment:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            environment.setenv(name, "")  # put back as it was at the end
        folder = Path(tempfile.mkdtemp(prefix="services-", dir="/tmp"))
        at_end.callback(shutil.rmtree, folder, ignore_errors=True)
        place = Place(folder)
        program("postgres")
        at_end.callback(place.run, "local.py", "stop")
        yield place
