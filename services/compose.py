"""The tracking server in Docker containers, by Docker Compose.

    python3 services/compose.py up       build what is to be built, start what is not running, wait until all is well
    python3 services/compose.py down     end and remove the containers; runs and artifacts stay in their volumes
    python3 services/compose.py WORDS    any other command of Compose with the same settings: ps, logs server, exec ...

The settings are in services/.env, which the first start writes. It needs Python, Docker, and `docker compose` or
`docker-compose` (1.28 or later), and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import settings
from settings import FILE, FOLDER, TRITON_PORTS, Refused
from watching import alertmanager_config, prometheus_config

STORAGE = ("postgresql", "mariadb", "s3")
SERVICES = {  # by profile
    **{name: (name,) for name in STORAGE},
    "tls": ("proxy",),
    "monitoring": ("prometheus", "alertmanager", "pushgateway", "node-exporter"),
    "grafana": ("grafana",),
    "triton": ("triton",),
}
PATIENCE_S = 300
TLS_PATIENCE_S = 30
AUTHORITY = FOLDER / "tls-root.crt"
# "Bind for HOST:PORT failed: port is already allocated", "listen tcp4 HOST:PORT: bind: address already in use", and
# since Engine 28 "failed to bind host port HOST:PORT/tcp: address already in use".
PORT_TAKEN = re.compile(
    r"(?:listen tcp[46]? |bind for |bind host port (?:for )?)([\d.]+|\[[\da-f:]+\]):(\d+)\b.*(?:in use|allocated)",
    re.IGNORECASE,
)


class Stack:
    """All containers of one project, with their settings."""

    def __init__(self, compose: list[str], values: Mapping[str, str]):
        self.values = values
        self.environment = {**os.environ, **environment(values)}
        self.command = [*compose, "--project-directory", str(FOLDER)]

    def up(self) -> None:
        """Start everything in order, and return when it is healthy."""
        print("Building the server's image; the first time takes some minutes", flush=True)
        self.run("build", "server")
        self.start_storage()
        self.run("up", "--detach", "--remove-orphans")
        self._wait(["server"])
        self._remove_unused()
        self._wait([name for profile in beside(self.values) for name in SERVICES[profile]])
        if self.values["TLS"] != "off":
            self._wait_for_tls()
        print(welcome(self.values))

    def start_storage(self) -> None:
        """Start the database and the S3 server, with its bucket."""
        storage = [name for name in profiles(self.values) if name in STORAGE]
        self.run("up", "--detach", *storage)
        self._wait(storage)
        if "s3" in storage:
            self._make_bucket()

    def all_profiles(self) -> dict[str, str]:
        """The environment in which Compose minds the services of every profile, not only of those in use."""
        return {**self.environment, "COMPOSE_PROFILES": ",".join(SERVICES)}

    def run(self, *words: str, text: str = "", all_profiles: bool = False) -> str:
        """A command of Compose; what it says is shown only if it fails."""
        done = subprocess.run(
            [*self.command, *words],
            env=self.all_profiles() if all_profiles else self.environment,
            input=text,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise self._failure(words[0], done.stdout)
        return done.stdout

    def _failure(self, command: str, said: str) -> Refused:
        if taken := PORT_TAKEN.search(said):
            host, port = taken.groups()
            ours = [name for name, value in self.values.items() if name.endswith("_PORT") and value == port]
            return Refused(f"port {port} of {host} is taken; end what listens there, or set {ours[0]} in {FILE}", 2)
        print(said, file=sys.stderr)
        return Refused(f"`{command}` of Compose failed; its last words are above", 1)

    def _wait(self, services: list[str]) -> None:
        """Until the services are healthy, with a line for each that becomes so."""
        waiting, deadline = set(services), time.monotonic() + PATIENCE_S
        while waiting:
            states = self._states()
            for name in sorted(waiting & states.keys()):
                if states[name]["Health"]["Status"] == "healthy":
                    print(f"{name} is up", flush=True)
                    waiting.remove(name)
                elif states[name]["Status"] in ("restarting", "exited"):
                    raise Refused(f"{name} ended: {self._last_words(name)}", 1)
            if time.monotonic() > deadline:
                names = ", ".join(sorted(waiting))
                raise Refused(f"not up after {PATIENCE_S} s: {names}; look at: python3 services/compose.py logs", 1)
            time.sleep(0.5)

    def _states(self) -> dict[str, Any]:
        """Docker's description of the state of each container, by service."""
        labels = [f"label=com.docker.compose.{label}" for label in (f"project={project()}", "oneoff=False")]
        found = docker("ps", "--all", "--quiet", "--filter", labels[0], "--filter", labels[1]).split()
        described = json.loads(docker("inspect", *found)) if found else []
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one["State"] for one in described}

    def _last_words(self, service: str) -> str:
        lines = [line for line in self.run("logs", "--no-color", "--tail=20", service).splitlines() if line.strip()]
        said = [line.split("|", 1)[-1].strip() for line in lines] or ["(it said nothing)"]
        return next((line for line in reversed(said) if line.startswith("error:")), said[-1]).removeprefix("error: ")

    def _wait_for_tls(self) -> None:
        """Until the proxy shows a certificate; keep the authority that signed it, if that is the proxy's own."""
        deadline = time.monotonic() + TLS_PATIENCE_S
        while not certificate_of(reachable(self.values["BIND"]), int(self.values["TLS_PORT"]), self.values["TLS_HOST"]):
            if time.monotonic() > deadline:
                raise Refused(f"the proxy shows no certificate: {self._last_words('proxy')}", 1)
            time.sleep(0.5)
        if self.values["TLS"] == "internal":
            AUTHORITY.write_text(self.run("exec", "-T", "proxy", "cat", "/data/caddy/pki/authorities/local/root.crt"))

    def _remove_unused(self) -> None:
        """End what an earlier start had and these settings have not; its data stays."""
        used = {"server", *(name for profile in profiles(self.values) for name in SERVICES[profile])}
        if unused := sorted(self._states().keys() - used):
            self.run("rm", "--stop", "--force", *unused, all_profiles=True)

    def _make_bucket(self) -> None:
        """In the S3 server's own shell, which needs no keys; a bucket that is there stays."""
        shell = ("exec", "-T", "s3", "weed", "shell")
        bucket = self.values["S3_BUCKET"]
        if not re.search(rf"^\s*{re.escape(bucket)}\s", self.run(*shell, text="s3.bucket.list\n"), re.MULTILINE):
            self.run(*shell, text=f"s3.bucket.create -name {bucket}\n")


def profiles(values: Mapping[str, str]) -> list[str]:
    """The parts of compose.yaml that the settings ask for, besides the server."""
    own_store, tls = not values["S3_ENDPOINT_URL"], values["TLS"] != "off"
    return [values["DATABASE"], *(["s3"] if own_store else []), *(["tls"] if tls else []), *beside(values)]


def beside(values: Mapping[str, str]) -> list[str]:
    """The parts of compose.yaml that are none of the tracking server's, as far as the settings ask for them."""
    watching = {"off": [], "prometheus": ["monitoring"], "grafana": ["monitoring", "grafana"]}[values["MONITORING"]]
    return [*watching, *(["triton"] if values["TRITON_MODELS"] else [])]


def environment(values: Mapping[str, str]) -> dict[str, str]:
    """The variables of compose.yaml."""
    database, tls = values["DATABASE"], values["TLS"]
    more = {
        "COMPOSE_PROJECT_NAME": project(),
        "COMPOSE_PROFILES": ",".join(profiles(values)),
        "DATABASE_URI": f"{database}://mlflow@{database}/mlflow",
        "S3_ENDPOINT_URL": values["S3_ENDPOINT_URL"] or "http://s3:8333",
        "S3_IDENTITIES": json.dumps(identities(values)),
        # Next to the proxy, the server itself talks to this machine alone.
        "SERVER_BIND": values["BIND"] if tls == "off" else "127.0.0.1",
        "SERVER_MEMORY": f"{1024 * (1 + int(values['WORKERS']))}m",
        "TLS_CERTIFICATE": "internal",
        "PROMETHEUS_CONFIG": prometheus_config(values),
        "ALERTMANAGER_CONFIG": alertmanager_config(values),
    }
    if tls not in ("off", "internal"):
        if absent := [name for name in ("tls.crt", "tls.key") if not (Path(tls) / name).is_file()]:
            raise Refused(f"TLS names the folder {tls}, which has no {' and no '.join(absent)}")
        more |= {"TLS_FOLDER": tls, "TLS_CERTIFICATE": "/certificate/tls.crt /certificate/tls.key"}
    if (models := values["TRITON_MODELS"]) and not list(Path(models).glob("*/config.pbtxt")):
        raise Refused(
            f"TRITON_MODELS names {models}, where no folder has a config.pbtxt; give the triton/ of an export"
        )
    return {**values, **more}


def identities(values: Mapping[str, str]) -> dict[str, Any]:
    """SeaweedFS's users: the administrator, and the server with the rights of s3-policies/server.json."""
    policy = (FOLDER / "s3-policies" / "server.json").read_text()
    policy = policy.replace("BUCKET", values["S3_BUCKET"]).replace("PREFIX", values["S3_PREFIX"])

    def user(name: str, prefix: str, **rights: list[str]) -> dict[str, Any]:
        keys = {"accessKey": values[f"{prefix}_ACCESS_KEY"], "secretKey": values[f"{prefix}_SECRET_KEY"]}
        return {"name": name, "credentials": [keys], **rights}

    admin = user("admin", "S3_ADMIN", actions=["Admin", "Read", "List", "Tagging", "Write"])
    server = user("server", "S3", policyNames=["server"])
    return {"identities": [admin, server], "policies": [{"name": "server", "content": policy}]}


def project() -> str:
    """Compose's name for all of it, and the beginning of the volumes' names."""
    return os.environ.get("COMPOSE_PROJECT_NAME") or "mlflow-tracking"


def address(values: Mapping[str, str]) -> str:
    """Where clients find the server."""
    if values["TLS"] != "off":
        return f"https://{values['TLS_HOST']}:{values['TLS_PORT']}".removesuffix(":443")
    return f"http://{reachable(values['BIND'])}:{values['MLFLOW_PORT']}"


def reachable(host: str) -> str:
    """Where this machine reaches what listens at `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host


def certificate_of(host: str, port: int, name: str) -> bytes | None:
    """The certificate that a server shows to whoever asks for `name`; None where it shows none."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # looked at, not trusted
    try:
        with (
            socket.create_connection((host, port), timeout=5) as connection,
            context.wrap_socket(connection, server_hostname=name) as secured,
        ):
            return secured.getpeercert(binary_form=True)
    except OSError:
        return None


def welcome(values: Mapping[str, str]) -> str:
    """What to do with a server that is up."""
    lines = settings.welcome(values, address(values))
    if values["ARTIFACTS"] == "proxied":
        # MLflow's client would ask for signed addresses of the S3 server, which it need not reach.
        lines.append("  export MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD=false MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=false")
    if values["TLS"] == "internal":
        lines.append(f"  export MLFLOW_TRACKING_SERVER_CERT_PATH='{AUTHORITY}'")
    if values["TRITON_MODELS"]:
        http, grpc, _ = (values[name] for name in TRITON_PORTS)
        lines.append(f"Triton is up: http://127.0.0.1:{http}, and by gRPC 127.0.0.1:{grpc}")
    if values["MONITORING"] != "off":
        lines.append(f"Prometheus is up: http://127.0.0.1:{values['PROMETHEUS_PORT']}")
    if values["MONITORING"] == "grafana":
        where = f"http://127.0.0.1:{values['GRAFANA_PORT']}"
        lines.append(f"Grafana is up: {where} (sign in as admin; the password is GRAFANA_PASSWORD in {FILE})")
    return "\n".join(lines)


def docker(*words: str) -> str:
    """What a command of Docker answers."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise Refused(f"Docker does not answer ({said}); is it running, and may you use it? See: docker info", 1)
    return done.stdout


def compose_command() -> list[str]:
    """Compose as Docker's plugin, else as a program of its own."""
    if not shutil.which("docker"):
        raise Refused("there is no docker here; install Docker Engine with Compose, or run: make services-local", 2)
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    raise Refused("Docker has no Compose here; install its plugin or docker-compose, or run: make services-local", 2)


def check_data() -> None:
    """Refuse to make new passwords for old data."""
    volumes = docker("volume", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={project()}").split()
    if volumes and not FILE.exists():
        raise Refused(
            f"{FILE} is gone, but the data of a server with its passwords is here; put the file back, or delete the "
            f"data for good: docker volume rm {' '.join(volumes)}",
            2,
        )


def main() -> None:
    """Do what the command line says."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    compose = compose_command()
    docker("version", "--format", "{{.Server.Version}}")
    check_data()
    stack = Stack(compose, settings.load())
    if words == ["up"]:
        stack.up()
    else:
        sys.exit(subprocess.run([*stack.command, *words], env=stack.all_profiles()).returncode)


if __name__ == "__main__":
    settings.run(main)
