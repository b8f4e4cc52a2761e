"""Starts the MLflow server, in every venue: on this machine, in Compose, on Kubernetes.

    python services/server.py            check everything, then serve
    python services/server.py upgrade    bring both databases to the schema of the installed MLflow; take a backup first

All it knows comes from the environment: the settings of .env.example, and DATABASE_URI, as
postgresql://mlflow@HOST:PORT/mlflow or mariadb://... (the password is DATABASE_PASSWORD). Users and rights are kept in
a second database of that server, mlflow_auth. ARTIFACTS_FOLDER in place of the S3 settings keeps artifacts in a folder.
What is wrong is told in one line before the server starts; secrets travel by environment and in a private file alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import settings
from settings import Refused

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection

DRIVERS = {"postgresql": "postgresql+psycopg2", "mysql": "mysql+pymysql", "mariadb": "mysql+pymysql"}
# How a database says that waiting will not help: PostgreSQL in words, MariaDB and MySQL by number.
WRONG_PASSWORD = ("password authentication failed", "no pg_hba.conf entry", "(1045,", "(1698,")
NO_DATABASE = ('" does not exist', "(1049,", "(1044,")
TEXT_OF = {
    "postgresql": "SELECT pg_encoding_to_char(encoding), 'exact' FROM pg_database WHERE datname = current_database()",
    "mysql": "SELECT @@character_set_database, @@collation_database",
}
AUTH_DATABASE = "mlflow_auth"
# Checking a password costs more than all else of a request, by design. With one worker process changes count at once,
# with several within this time.
PASSWORD_CACHE_S = 60


class Away(Exception):
    """Not there yet: waiting may help."""


def database_uri() -> URL:
    """The tracking database's address, with its password and the driver that is installed."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        uri = make_url(os.environ.get("DATABASE_URI", ""))
        driver = DRIVERS[uri.get_backend_name()]
    except (ArgumentError, KeyError):
        raise Refused("DATABASE_URI has to be postgresql://USER@HOST:PORT/DATABASE or mariadb://...") from None
    if not uri.password and not os.environ.get("DATABASE_PASSWORD"):
        raise Refused("DATABASE_PASSWORD is empty; set it to the database's password")
    return uri.set(drivername=driver, password=uri.password or os.environ["DATABASE_PASSWORD"])


def wait(what: str, attempt: Callable[[], None]) -> None:
    """Try until what is needed is there, for STARTUP_TIMEOUT_S (60) seconds."""
    timeout_s = float(os.environ.get("STARTUP_TIMEOUT_S", 60))
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        try:
            return attempt()
        except Away as error:
            if time.monotonic() > deadline:
                raise Refused(
                    f"no {what} after {timeout_s:g} s: {error}; start it, or correct its address", 1
                ) from None
            if not told:
                print(f"waiting for the {what} ({error})", flush=True)
            told = True
        time.sleep(0.5)


@contextmanager
def connection(uri: URL) -> Iterator[Connection]:
    """A connection on which every statement counts at once. Raises Away, Refused, or LookupError: no such database."""
    import sqlalchemy
    from sqlalchemy.exc import DBAPIError

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
    try:
        opened = engine.connect()
    except DBAPIError as error:
        said = " ".join(str(error.orig).split())
        if any(sign in said for sign in WRONG_PASSWORD):
            raise Refused(
                f"the database at {uri.host}:{uri.port} refuses {uri.username} with this DATABASE_PASSWORD"
            ) from None
        if any(sign in said for sign in NO_DATABASE):
            raise LookupError(uri.database) from None
        raise Away(said) from None
    with opened:
        yield opened


def check_database(uri: URL) -> None:
    """See that the tracking database is there and keeps any script's text apart."""
    from sqlalchemy import text

    try:
        with connection(uri) as opened:
            charset, collation = opened.execute(text(TEXT_OF[uri.get_backend_name()])).one()
    except LookupError:
        raise Refused(
            f"the server at {uri.host}:{uri.port} has no database '{uri.database}' for {uri.username}; create it"
        ) from None
    if charset.lower() not in ("utf8", "utf8mb4") or not collation.endswith(("exact", "_bin")):
        # By MariaDB's own collation A equals a, and every emoji any other: names and metrics would collide.
        raise Refused(
            f"the database '{uri.database}' keeps text as {charset} {collation}; MLflow's names need UTF-8 compared "
            "exactly (PostgreSQL: ENCODING 'UTF8'; MariaDB: CHARACTER SET utf8mb4 COLLATE utf8mb4_bin); create it anew"
        )


def make_auth_database(uri: URL) -> None:
    """Make the database of users and rights where there is none."""
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    try:
        with connection(uri.set(database=AUTH_DATABASE)):
            return
    except LookupError:
        pass
    suffix = "" if uri.get_backend_name() == "postgresql" else " CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
    try:
        with connection(uri) as opened:
            opened.execute(text(f"CREATE DATABASE {AUTH_DATABASE}{suffix}"))
    except DBAPIError as error:
        raise Refused(
            f"cannot make the database '{AUTH_DATABASE}' ({error.orig}); make it as the database's administrator and "
            f"give {uri.username} all rights to it"
        ) from None


def tell_keys_apart() -> None:
    """Let MLflow's users live in MariaDB and MySQL, where no two foreign keys of a database may share a name.

    MLflow's first migration of them names two keys fk_user_id; nothing refers to these names later.
    """
    from sqlalchemy import ForeignKeyConstraint
    from sqlalchemy.ext.compiler import compiles

    @compiles(ForeignKeyConstraint, "mysql")
    def render(key: ForeignKeyConstraint, compiler: Any, **_: Any) -> Any:
        if key.name == "fk_user_id":
            key.name = f"{key.table.name}_fk_user_id"
        return compiler.visit_foreign_key_constraint(key)


def check_schema(uri: URL, migrations: str, version_table: str) -> None:
    """Refuse a database whose schema is another than the installed MLflow's; an empty one is fine."""
    import mlflow
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with connection(uri) as opened:
        found = MigrationContext.configure(opened, opts={"version_table": version_table}).get_current_revision()
    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / migrations))
    if found is None or found == scripts.get_current_head():
        return
    if found not in {script.revision for script in scripts.walk_revisions()}:
        raise Refused(
            f"the database '{uri.database}' was written by a newer MLflow than {mlflow.__version__}; install that one"
        )
    raise Refused(
        f"the database '{uri.database}' has the schema of an older MLflow; run: make upgrade "
        "(on Kubernetes: docs/operations.md)"
    )


def check_bucket() -> None:
    """See that the bucket is there and opens to the server's keys."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    endpoint, bucket = os.environ["S3_ENDPOINT_URL"], os.environ["S3_BUCKET"]
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=os.environ["S3_REGION"],
        aws_access_key_id=os.environ["S3_ACCESS_KEY"],
        aws_secret_access_key=os.environ["S3_SECRET_KEY"],
        config=Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 1}),
    )
    try:
        client.list_objects_v2(Bucket=bucket, Prefix=f"{os.environ['S3_PREFIX']}/", MaxKeys=1)
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status >= 500:
            raise Away(f"{endpoint} answers {status} {code}") from None
        if code == "NoSuchBucket":
            raise Refused(f"{endpoint} has no bucket '{bucket}'; make it, or correct S3_BUCKET") from None
        raise Refused(
            f"{endpoint} does not open {bucket}/{os.environ['S3_PREFIX']}/ to S3_ACCESS_KEY with S3_SECRET_KEY "
            f"({code}); correct the keys, or give their owner the rights of s3-policies/server.json"
        ) from None
    except BotoCoreError as error:
        raise Away(" ".join(str(error).split())) from None


def allowed_names() -> dict[str, str]:
    """Hosts and origins that MLflow may answer: loopback, private addresses, and the names that were set."""
    from mlflow.server.security_utils import get_localhost_addresses, get_private_ip_patterns

    names = [name for name in os.environ.get("ALLOWED_HOSTS", "").split(",") if name]
    if os.environ.get("TLS_HOST", "localhost") != "localhost":
        names.append(os.environ["TLS_HOST"])
    here = [*get_localhost_addresses(), *names]
    hosts = [
        *here,
        *(at_any_port(name) for name in here if ":" not in name or name.endswith("]")),
        *get_private_ip_patterns(),
    ]
    # The server's own pages, behind a proxy or not, come from these names too.
    own = [f"{scheme}://{host}" for name in names for scheme in ("http", "https") for host in (name, at_any_port(name))]
    origins = [*own, *filter(None, os.environ.get("CORS_ALLOWED_ORIGINS", "").split(","))]
    return {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
    }


def at_any_port(name: str) -> str:
    """MLflow's pattern for a name with a port: of fnmatch, to which the bracket of an IPv6 address begins a set."""
    return f"{name.replace('[', '[[]')}:*"


def artifacts() -> dict[str, str]:
    """Where MLflow keeps artifacts, in its own variables."""
    if folder := os.environ.get("ARTIFACTS_FOLDER"):
        return {"MLFLOW_ARTIFACTS_DESTINATION": folder}
    root = f"s3://{os.environ['S3_BUCKET']}/{os.environ['S3_PREFIX']}"
    return {
        # Experiments keep the way they were made with, so the server goes on serving those of before.
        **({"MLFLOW_DEFAULT_ARTIFACT_ROOT": root} if os.environ["ARTIFACTS"] == "direct" else {}),
        "MLFLOW_ARTIFACTS_DESTINATION": root,
        "MLFLOW_S3_ENDPOINT_URL": os.environ["S3_ENDPOINT_URL"],
        "AWS_DEFAULT_REGION": os.environ["S3_REGION"],
        "AWS_ACCESS_KEY_ID": os.environ["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": os.environ["S3_SECRET_KEY"],
        # Not every store knows the newer checksums.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


@contextmanager
def sign_in(uri: URL) -> Iterator[dict[str, str]]:
    """MLflow's variables for its sign-in; one file holds a password: mode 600, and gone with the server."""
    if os.environ["AUTH"] == "none":
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="mlflow-auth-"))  # mode 700
    file = folder / "basic_auth.ini"
    try:
        file.touch(0o600)
        address = uri.set(database=AUTH_DATABASE).render_as_string(hide_password=False).replace("%", "%%")
        told = {"default_permission": "READ", "database_uri": address, "auth_cache_ttl_seconds": PASSWORD_CACHE_S}
        file.write_text("[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in told.items()), encoding="utf-8")
        yield {
            "MLFLOW_AUTH_CONFIG_PATH": str(file),
            "MLFLOW_AUTH_ADMIN_USERNAME": os.environ["ADMIN_USERNAME"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ["ADMIN_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ["FLASK_SECRET_KEY"],
        }
    finally:
        shutil.rmtree(folder)


def serve(uri: URL) -> None:
    """Run `mlflow server` in this process: every value reaches it and its workers by environment."""
    from mlflow.cli import cli

    command = ["server", "--host", os.environ["BIND"], "--port", os.environ["MLFLOW_PORT"]]
    command += ["--workers", os.environ["WORKERS"]]
    command += ["--app-name", "basic-auth"] if os.environ["AUTH"] == "basic" else []
    with sign_in(uri) as secret:
        os.environ.update(
            artifacts(),
            **allowed_names(),
            **secret,
            MLFLOW_BACKEND_STORE_URI=uri.render_as_string(hide_password=False),
        )
        cli(command, standalone_mode=False)


def upgrade(uri: URL) -> None:
    """Bring both databases to the installed MLflow's schema."""
    import sqlalchemy
    from mlflow.db import upgrade as upgrade_tracking
    from mlflow.server.auth.db import utils as auth

    upgrade_tracking.main([uri.render_as_string(hide_password=False)], standalone_mode=False)
    engine = sqlalchemy.create_engine(uri.set(database=AUTH_DATABASE))
    auth.migrate(engine, "head")
    engine.dispose()


def main() -> None:
    """Check what the environment says, the database and the bucket; then serve, or upgrade."""
    # Nothing here reports to anyone, and job runners would take three times the memory.
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    settings.check(os.environ, needed())
    uri = database_uri()
    wait("database", lambda: check_database(uri))
    make_auth_database(uri)
    tell_keys_apart()
    if sys.argv[1:] == ["upgrade"]:
        upgrade(uri)
        return
    check_schema(uri, "store/db_migrations", "alembic_version")
    check_schema(uri.set(database=AUTH_DATABASE), "server/auth/db/migrations", "alembic_version_auth")
    if not os.environ.get("ARTIFACTS_FOLDER"):
        wait("S3 server", check_bucket)
    serve(uri)


def needed() -> tuple[str, ...]:
    """The settings that the server reads."""
    names = ["BIND", "MLFLOW_PORT", "AUTH", "ARTIFACTS", "WORKERS", "ALLOWED_HOSTS", "CORS_ALLOWED_ORIGINS"]
    if os.environ.get("AUTH") != "none":
        names += ["ADMIN_USERNAME", "ADMIN_PASSWORD", "FLASK_SECRET_KEY"]
    if not os.environ.get("ARTIFACTS_FOLDER"):
        names += ["S3_REGION", "S3_BUCKET", "S3_PREFIX", *settings.SERVER_KEYS]
        if not os.environ.get("S3_ENDPOINT_URL"):
            raise Refused("S3_ENDPOINT_URL is empty; the server needs the address of the S3 server")
        names.append("S3_ENDPOINT_URL")
    return tuple(names)


if __name__ == "__main__":
    # As the first process of a container it would not end by itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings.run(main)
