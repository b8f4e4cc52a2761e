"""The tracking server's settings: services/.env, made by the first start from .env.example with random secrets.

A variable of the environment goes before the file, as in Docker Compose. Standard library only: this runs on hosts
that have nothing but Python.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FILE = FOLDER / ".env"
EXAMPLE = FOLDER / ".env.example"

PORT = (r"[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]", "a port from 1 to 65535")
IMAGE = (r"[\w./:@-]*", "an image's name, or nothing for the one in compose.yaml")
NAMES = (r"[^\s,]+(,[^\s,]+)*|", "names with commas between them, or nothing")
TRITON_PORTS = ("TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT")
WATCHING = ("PROMETHEUS", "ALERTMANAGER", "PUSHGATEWAY", "NODE_EXPORTER", "GRAFANA")
RULES = {
    "BIND": (r"[\da-fA-F.:]+", "an IP address of this machine, such as 127.0.0.1 or 0.0.0.0"),
    "MLFLOW_PORT": PORT,
    "AUTH": ("basic|none", "basic or none"),
    "ADMIN_USERNAME": (r"[^\s:]+", "a name without spaces and colons"),
    "DATABASE": ("postgresql|mariadb", "postgresql or mariadb"),
    "DATABASE_PORT": PORT,
    "S3_ENDPOINT_URL": (r"https?://[^\s/]+/?|", "http(s)://HOST[:PORT], or nothing for the store started here"),
    "S3_PORT": PORT,
    "S3_REGION": (r"[a-z\d-]+", "a region's name, such as us-east-1"),
    "S3_BUCKET": (r"[a-z\d][a-z\d.-]{1,61}[a-z\d]", "3 to 63 lower-case letters, digits, dots and hyphens"),
    "S3_PREFIX": (r"[\w-][\w./-]*[\w-]|\w", "a path of letters, digits, hyphens, dots and slashes"),
    "ARTIFACTS": ("proxied|direct", "proxied or direct"),
    "WORKERS": (r"[1-9]\d?", "a number of processes from 1 to 99"),
    "ALLOWED_HOSTS": NAMES,
    "CORS_ALLOWED_ORIGINS": (r"(\*|https?://[^\s,/]+)(,(\*|https?://[^\s,/]+))*|", "http(s)://HOST[:PORT] with commas"),
    "TLS": ("off|internal|/.+", "off, internal, or the path of a folder with tls.crt and tls.key"),
    "TLS_HOST": (r"[\w.-]+", "a host name"),
    "TLS_PORT": PORT,
    "MONITORING": ("off|prometheus|grafana", "off, prometheus, or grafana (with Prometheus)"),
    "SERVING_TARGETS": (r"[\w.-]+:\d+(,[\w.-]+:\d+)*", "HOST:PORT, or several with commas between them"),
    "ALERT_WEBHOOK_URL": (r"https?://.+|", "http(s)://..., or nothing"),
    "SERVING_TOKEN": (".*", "the prediction service's token, or nothing"),
    "RETENTION_DAYS": (r"[1-9]\d{0,3}", "a number of days from 1 to 9999"),
    "TRITON_MODELS": ("/.+|", "the path of a model repository, from / on, or nothing"),
    "TRITON_MEMORY": (r"[1-9]\d*[mg]", "a size such as 4g or 2048m"),
    **{f"{name}_PORT": PORT for name in WATCHING},
    **dict.fromkeys(TRITON_PORTS, PORT),
    **{f"{name}_IMAGE": IMAGE for name in ("BASE", "SERVER", "POSTGRESQL", "MARIADB", "S3", "PROXY", *WATCHING)},
    "TRITON_IMAGE": IMAGE,
}
PASSWORDS = ("ADMIN_PASSWORD", "DATABASE_PASSWORD", "FLASK_SECRET_KEY", "GRAFANA_PASSWORD")
NOT_SHOWN = ("ALERT_WEBHOOK_URL", "SERVING_TOKEN")
SERVER_KEYS = ("S3_ACCESS_KEY", "S3_SECRET_KEY")
ADMIN_KEYS = ("S3_ADMIN_ACCESS_KEY", "S3_ADMIN_SECRET_KEY")
SECRETS = (*PASSWORDS, *SERVER_KEYS, *ADMIN_KEYS)
KNOWN = (*RULES, *SECRETS)
SHORTEST_PASSWORD = 12  # MLflow accepts no shorter one
WELL_KNOWN = re.compile(
    r"((admin|mlflow|minio|minioadmin|postgres|mysql|mariadb|root|test|secret|password|passw0rd|change-?me|"
    r"change-?this|your|example|x{3,}|1234)[\W_\d]*)+",
    re.IGNORECASE,
)


class Refused(Exception):
    """One line for the user; exit code 2 for bad input, 1 for what failed."""

    def __init__(self, text: str, exit_code: int = 2):
        super().__init__(text)
        self.exit_code = exit_code


def load() -> dict[str, str]:
    """Every setting by its name, checked; makes services/.env where there is none."""
    if not FILE.exists():
        _write_first()
    if FILE.stat().st_mode & 0o077:
        raise Refused(f"{FILE} holds secrets and others can read it; run: chmod 600 '{FILE}'")
    settings = {**parse(EXAMPLE), **parse(FILE), **_from_environment()}
    check(settings, KNOWN)
    return settings


def parse(file: Path) -> dict[str, str]:
    """The NAME=VALUE lines of a file; a name that is no setting is refused."""
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        name, assigned, value = line.partition("=")
        if not assigned or name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, 1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are in {EXAMPLE.name}"
            raise Refused(f"{file}, line {number}: '{name}' is no setting; {hint}")
        found[name] = value
    return found


def check(settings: Mapping[str, str], names: tuple[str, ...]) -> None:
    """Refuse the first of the named settings whose value cannot work; secrets are not shown."""
    external = bool(settings.get("S3_ENDPOINT_URL"))
    for name in names:
        value = settings.get(name, "")
        if re.search(r"[\s'\"$`\\]", value):
            raise Refused(f"{name} has a space, a quote, a backslash or a $ in it; choose a value without")
        if name in RULES:
            rule, allowed = RULES[name]
            if not re.fullmatch(rule, value):
                shown = "cannot be that" if name in NOT_SHOWN else f"is '{value}'"
                raise Refused(f"{name} {shown}; it has to be {allowed}")
        elif not value and name == "GRAFANA_PASSWORD" and settings.get("MONITORING") != "grafana":
            continue  # a file from before there was a Grafana
        elif not value and not (external and name in ADMIN_KEYS):
            hint = "the keys of the store that S3_ENDPOINT_URL names" if external and "S3" in name else "a random value"
            raise Refused(f"{name} is empty; give it {hint}")
        elif WELL_KNOWN.fullmatch(value) or (name in PASSWORDS and len(value) < SHORTEST_PASSWORD):
            raise Refused(f"{name} is too easy to guess; give it {SHORTEST_PASSWORD} random characters or more")


def admin_keys(settings: Mapping[str, str]) -> tuple[str, str]:
    """The S3 keys that make buckets and take backups: the administrator's, else the server's."""
    access, secret = (settings.get(name, "") for name in ADMIN_KEYS)
    return (access, secret) if access else (settings["S3_ACCESS_KEY"], settings["S3_SECRET_KEY"])


def address(settings: Mapping[str, str]) -> str:
    """Where this machine finds the server itself, without the proxy."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = everywhere.get(settings["BIND"], settings["BIND"])
    return f"http://{f'[{host}]' if ':' in host else host}:{settings['MLFLOW_PORT']}"


def welcome(settings: Mapping[str, str], address: str) -> list[str]:
    """What to do with a server that is up at `address`: lines for the user's shell, the first one to be read."""
    lines = [f"The tracking server is up: {address}", f"  export MLFLOW_TRACKING_URI={address}"]
    if settings["AUTH"] == "basic":
        lines[0] += f" (sign in as {settings['ADMIN_USERNAME']}; the password is ADMIN_PASSWORD in {FILE})"
        lines.append(f"  export MLFLOW_TRACKING_USERNAME={settings['ADMIN_USERNAME']}")
        lines.append(f"  export MLFLOW_TRACKING_PASSWORD=$(sed -n s/^ADMIN_PASSWORD=//p '{FILE}')")
    return lines


def run(action: Callable[[], None]) -> None:
    """Run a script's action; a refusal becomes one line on standard error and its exit code."""
    try:
        action()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _from_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in KNOWN if os.environ.get(name)}


def _write_first() -> None:
    """Write .env whole or not at all; of two first starts at once the earlier one's file stays."""
    given = _from_environment()
    # Keys of a store of yours cannot be invented.
    invented = PASSWORDS if given.get("S3_ENDPOINT_URL") else SECRETS
    values = {**{name: secrets.token_hex(10 if "ACCESS" in name else 24) for name in invented}, **given}
    check({**parse(EXAMPLE), **values}, KNOWN)
    lines = [
        f"{name}={values.get(name, old)}" if assigned and name in KNOWN else line
        for line in EXAMPLE.read_text(encoding="utf-8").splitlines()
        for name, assigned, old in [line.partition("=")]
    ]
    descriptor, temporary = tempfile.mkstemp(dir=FOLDER, prefix=".env.")  # mode 600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    try:
        os.link(temporary, FILE)
        print(f"Wrote {FILE} with random secrets (mode 600)")
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()
