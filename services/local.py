"""The tracking server without Docker: PostgreSQL, an S3 server and MLflow as processes of this machine, on loopback.

    python services/local.py start    start what is not running, and wait until it serves
    python services/local.py stop     end exactly these processes; the data stays

Everything is in services/data/. The S3 server is S3_ENDPOINT_URL of the settings, else Ceph's gateway where it is
installed, else artifacts are kept in a folder. PostgreSQL refuses to run as root: then it runs as `postgres`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ceph
import settings
from process import Process, as_user, run_to_end
from settings import Refused

DATA = settings.FOLDER / "data"
LOGS = DATA / "logs"
POSTGRESQL, CEPH, ARTIFACTS = DATA / "postgresql", DATA / "ceph", DATA / "artifacts"
PROGRAMS = Path("/usr/lib/postgresql")  # of every release, as Debian has them
START_TIMEOUT_S = 120
DATABASE = Process("postgresql", LOGS, signal.SIGINT)  # does not wait for clients to leave
S3 = [Process(name, LOGS) for name in ceph.DAEMONS]
SERVER = Process("mlflow", LOGS)
EVERYTHING = [DATABASE, *S3, SERVER]


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Refuse while another start, stop, backup or restore is at work here."""
    DATA.mkdir(mode=0o711, exist_ok=True)  # `postgres` has to pass, not to look
    DATA.chmod(0o711)
    LOGS.mkdir(mode=0o700, exist_ok=True)
    with alone(DATA / "lock", f"command is at work on {DATA}"):
        yield


@contextmanager
def alone(lock: Path, other: str) -> Iterator[None]:
    """Refuse while another command holds the lock, with words for it; a lock ends with its process."""
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another {other}; wait until it has ended") from None
        yield


def start(values: Mapping[str, str]) -> None:
    """Start everything that is not running; if one part fails, end those that were started here."""
    check(values)
    if all(part.pid() for part in parts(values)):
        print(f"The tracking server runs already: {settings.address(values)}")
        return
    with ExitStack() as undo:
        start_database(values, undo)
        store = start_s3(values, undo)
        start_server(values, store, undo)
        undo.pop_all()
    print(welcome(values))


def stop() -> None:
    """End the processes, those that use others first."""
    ended = [part.name for part in reversed(EVERYTHING) if part.stop()]
    print(f"Ended {', '.join(ended)}; the data stays in {DATA}" if ended else "Nothing runs here")


def parts(values: Mapping[str, str]) -> list[Process]:
    """The processes that these settings need."""
    return [DATABASE, *(S3 if uses_ceph(values) else []), SERVER]


def uses_ceph(values: Mapping[str, str]) -> bool:
    """Whether artifacts go to Ceph: what was chosen at the first start stays."""
    return not values["S3_ENDPOINT_URL"] and (CEPH.exists() or not (ARTIFACTS.exists() or ceph.absent()))


def check(values: Mapping[str, str]) -> None:
    """Refuse what cannot work before anything is started."""
    if values["DATABASE"] != "postgresql":
        raise Refused(f"DATABASE is {values['DATABASE']}; without Docker it has to be postgresql")
    postgresql_program("postgres")
    if uses_ceph(values) and (absent := ceph.absent()):
        raise Refused(f"the artifacts are in {CEPH}, but {', '.join(absent)} is not installed ({ceph.PACKAGES})")
    host = ipaddress.ip_address(values["BIND"])
    wanted = [("MLFLOW_PORT", str(host), SERVER), ("DATABASE_PORT", "127.0.0.1", DATABASE)]
    wanted += [("S3_PORT", "127.0.0.1", S3[-1])] if uses_ceph(values) else []
    for name, where, part in wanted:
        if not part.pid() and not _free(where, int(values[name])):
            raise Refused(
                f"port {values[name]} of {where} is taken; end what listens there, or set {name} in {settings.FILE}"
            )


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def start_database(values: Mapping[str, str], undo: ExitStack) -> None:
    """Start PostgreSQL, making its data where there is none. The role's password becomes that of the settings."""
    if DATABASE.pid():
        return
    tell("PostgreSQL")
    if not POSTGRESQL.exists():
        make_database()
    forget_crash()
    role = f"ALTER ROLE mlflow PASSWORD '{values['DATABASE_PASSWORD']}';\n"
    _as_database("postgres", "--single", "-D", str(POSTGRESQL), "postgres", text=role)
    where = {"listen_addresses": "127.0.0.1", "port": values["DATABASE_PORT"], "unix_socket_directories": ""}
    options = [word for name, value in where.items() for word in ("-c", f"{name}={value}")]
    command = [postgresql_program("postgres"), "-D", str(POSTGRESQL), *options]
    undo.callback(DATABASE.stop)
    DATABASE.start(command, _plain_environment(), database_user())

    def ready() -> bool:
        asked = [postgresql_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", values["DATABASE_PORT"]]
        return subprocess.run(asked, env=_plain_environment()).returncode == 0

    wait_for(ready, DATABASE)


def forget_crash() -> None:
    """Wait for what a killed server left running, and remove its lock, whose process id may be another's by now."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while any(_works_in(POSTGRESQL, entry) for entry in Path("/proc").glob("[0-9]*")):
        if time.monotonic() > deadline:
            raise Refused(f"a PostgreSQL that was not started here is at work on {POSTGRESQL}; end it", 1)
        time.sleep(0.1)
    (POSTGRESQL / "postmaster.pid").unlink(missing_ok=True)


def _works_in(folder: Path, process: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder
    except OSError:  # it has ended, or is someone else's
        return False


def make_database() -> None:
    """Make PostgreSQL's data folder with the server's role, which owns its two databases and nothing else."""
    with _new_folder(POSTGRESQL) as partial:
        user = database_user()
        if user:
            os.chown(partial, *user)
        # Nobody signs in as the superuser: there is no socket, and he has no password.
        how = ["--username=postgres", "--auth-local=peer", "--auth-host=scram-sha-256"]
        _as_database("initdb", "--pgdata", str(partial), *how, "--encoding=UTF8", "--locale=C.UTF-8")
        roles = "CREATE ROLE mlflow LOGIN;\nCREATE DATABASE mlflow OWNER mlflow;\n"
        roles += "CREATE DATABASE mlflow_auth OWNER mlflow;\n"
        _as_database("postgres", "--single", "-D", str(partial), "postgres", text=roles)


def start_s3(values: Mapping[str, str], undo: ExitStack) -> dict[str, str]:
    """See that the S3 server runs, with its bucket; what the MLflow server has to know of it."""
    if values["S3_ENDPOINT_URL"]:
        make_bucket(values, values["S3_ENDPOINT_URL"])
        return {"S3_ENDPOINT_URL": values["S3_ENDPOINT_URL"]}
    if not uses_ceph(values):
        print(f"Artifacts are kept in {ARTIFACTS}, because there is no S3 server ({ceph.PACKAGES})", flush=True)
        ARTIFACTS.mkdir(mode=0o700, exist_ok=True)
        return {"ARTIFACTS_FOLDER": str(ARTIFACTS)}
    endpoint = f"http://127.0.0.1:{values['S3_PORT']}"
    if not all(part.pid() for part in S3):
        tell("Ceph's S3 gateway")
        start_ceph(int(values["S3_PORT"]), undo)
        wait_for(lambda: _answers(endpoint), *S3)
    cluster = ceph.Ceph(CEPH)
    cluster.set_user("admin", values["S3_ADMIN_ACCESS_KEY"], values["S3_ADMIN_SECRET_KEY"], admin=True)
    cluster.set_user("server", values["S3_ACCESS_KEY"], values["S3_SECRET_KEY"])
    make_bucket(values, endpoint)
    give_rights(values, endpoint)
    return {"S3_ENDPOINT_URL": endpoint}


def start_ceph(port: int, undo: ExitStack) -> None:
    """Start the daemons that do not run, making the cluster where there is none."""
    if not CEPH.exists():
        with _new_folder(CEPH) as partial:
            ceph.Ceph(partial).make()
    cluster = ceph.Ceph(CEPH)
    cluster.configure(port)
    for part in S3:
        if not part.pid():
            undo.callback(part.stop)
            part.start(ceph.DAEMONS[part.name], cluster.environment)


def make_bucket(values: Mapping[str, str], endpoint: str) -> None:
    """Make the bucket, with the administrator's keys."""
    from artifacts import Bucket
    from botocore.exceptions import BotoCoreError, ClientError

    access_key, secret_key = settings.admin_keys(values)
    keys = {"S3_ENDPOINT_URL": endpoint, "S3_ACCESS_KEY": access_key, "S3_SECRET_KEY": secret_key}
    try:
        Bucket({**values, **keys}).make()
    except (BotoCoreError, ClientError) as error:
        raise Refused(
            f"{endpoint} does not give the bucket '{values['S3_BUCKET']}' ({' '.join(str(error).split())}); correct "
            f"S3_ENDPOINT_URL, S3_BUCKET or S3_ADMIN_ACCESS_KEY with its secret (empty: the server's keys count) in "
            f"{settings.FILE}"
        ) from None


def give_rights(values: Mapping[str, str], endpoint: str) -> None:
    """Give the server's S3 user the rights of s3-policies/server.json, and no others."""
    import boto3

    policy = (settings.FOLDER / "s3-policies" / "server.json").read_text()
    access_key, secret_key = settings.admin_keys(values)
    administrator = boto3.client(
        "iam",
        endpoint_url=endpoint,
        region_name=values["S3_REGION"],
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )
    policy = policy.replace("BUCKET", values["S3_BUCKET"]).replace("PREFIX", values["S3_PREFIX"])
    administrator.put_user_policy(UserName="server", PolicyName="server", PolicyDocument=policy)


def start_server(values: Mapping[str, str], store: Mapping[str, str], undo: ExitStack) -> None:
    """Start MLflow by server.py, and wait for its health."""
    if SERVER.pid():
        return
    tell("MLflow")
    undo.callback(SERVER.stop)
    SERVER.start([sys.executable, str(settings.FOLDER / "server.py")], server_environment(values, store))
    wait_for(lambda: _answers(f"{settings.address(values)}/health"), SERVER)


def server_environment(values: Mapping[str, str], store: Mapping[str, str]) -> dict[str, str]:
    """All that server.py is told. The administrator's S3 keys are not its business."""
    told = {name: value for name, value in values.items() if name not in settings.ADMIN_KEYS}
    uri = f"postgresql://mlflow@127.0.0.1:{values['DATABASE_PORT']}/mlflow"
    return {**_plain_environment(), **told, **store, "DATABASE_URI": uri, "TMPDIR": str(LOGS)}


def _plain_environment() -> dict[str, str]:
    """This process's environment without what would change the programs: their own variables."""
    theirs = ("PG", "MLFLOW_", "AWS_", "CEPH_")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)}


def wait_for(ready: Callable[[], bool], *parts: Process) -> None:
    """Until they serve; refused with its own words if one ends before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        for part in parts:
            if not part.pid():
                raise Refused(f"{part.name} ended: {part.last_words().removeprefix('error: ')} (see {part.log})", 1)
        if time.monotonic() > deadline:
            raise Refused(f"{parts[-1].name} is not up after {START_TIMEOUT_S} s; look at {parts[-1].log}", 1)
        time.sleep(0.1)


def tell(what: str) -> None:
    print(f"Starting {what}", flush=True)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


def welcome(values: Mapping[str, str]) -> str:
    """What to do with a server that is up."""
    return "\n".join([*settings.welcome(values, settings.address(values)), "End it: make services-stop"])


def postgresql_program(name: str) -> str:
    """The path of one of PostgreSQL's programs: the data folder's version, else the newest that is installed."""
    version = POSTGRESQL / "PG_VERSION"
    wanted = version.read_text().strip() if os.access(version, os.R_OK) else "*"
    places = sorted(PROGRAMS.glob(f"{wanted}/bin"), key=lambda path: float(path.parent.name))
    found = shutil.which(name, path=os.pathsep.join([*map(str, reversed(places)), os.environ["PATH"]]))
    if not found:
        number = "" if wanted == "*" else f" {wanted}, which the data in {POSTGRESQL} needs"
        raise Refused(f"there is no {name} of PostgreSQL{number}; install it (Debian: apt-get install postgresql)")
    return found


def database_user() -> tuple[int, int] | None:
    """User and group for PostgreSQL when this runs as root."""
    if os.getuid():
        return None
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return found.pw_uid, found.pw_gid
    raise Refused("PostgreSQL does not run as root, and there is no user `postgres`; run this as another user")


def _as_database(program: str, *words: str, text: str = "") -> None:
    """Run one of PostgreSQL's programs to its end, with text on standard input."""
    user = database_user()
    command = [postgresql_program(program), *words]
    done = run_to_end(command, text=text, env=_plain_environment(), cwd="/", **as_user(user))
    if user and "Permission denied" in done.stderr and str(DATA) in done.stderr:
        name = pwd.getpwuid(user[0]).pw_name
        raise Refused(f"{name}, as whom PostgreSQL runs for root, cannot reach {DATA}; move the project elsewhere")
    # A server's own refusals come with exit code 0; the statement, with its password, is not shown.
    said = [line for line in done.stderr.splitlines() if re.search(r"\b(ERROR|FATAL|PANIC|error):", line)]
    if done.returncode or said:
        raise Refused(f"{program} failed: {said[0] if said else f'exit code {done.returncode}'}", 1)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which gets its name at the end; nothing stays of it otherwise."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main() -> None:
    """Do what the command line says."""
    actions: dict[str, Callable[[], None]] = {"start": lambda: start(settings.load()), "stop": stop}
    action = actions.get(sys.argv[1] if len(sys.argv) == 2 else "")
    if not action:
        raise Refused("what to do? start or stop")
    with one_at_a_time():
        action()


if __name__ == "__main__":
    settings.run(main)
