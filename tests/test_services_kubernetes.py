"""services/kubernetes/, as kubectl renders it: fields that exist, references that resolve, pods that the restricted
standard admits, settings that the server takes, and a launcher that may do what the plugin does and nothing else."""

from __future__ import annotations

import base64
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from service_images import find
from services_stack import PASSWORD, Database, program

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ROOT / "services"
sys.path += [str(SERVICES), str(ROOT / "plugin" / "tests")]
pytest_plugins = ["cluster"]
WORKLOADS = ("Deployment", "StatefulSet")

Object = dict[str, Any]


@pytest.fixture(scope="session")
def rendered() -> list[Object]:
    """Every object that `kubectl apply -k` would send."""
    done = subprocess.run([find("kubectl"), "kustomize", SERVICES / "kubernetes"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Object:
    """The Secret that the command in docs/operations.md makes from services/.env."""
    (command,) = re.findall(r"^kubectl create secret .*$", manual(), re.MULTILINE)
    folder = tmp_path_factory.mktemp("secret")
    (folder / "services").mkdir()
    import settings

    values = "".join(f"{name}=value-of-{name}\n" for name in settings.KNOWN)
    (folder / "services" / ".env").write_text(values)
    command = command.replace("kubectl", shlex.quote(find("kubectl")), 1) + " --dry-run=client --output=yaml"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout))


def manual() -> str:
    """The section on Kubernetes of docs/operations.md."""
    return (ROOT / "docs" / "operations.md").read_text().split("## Bring it up on Kubernetes")[1].split("\n## ")[0]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    return next(one for one in of_kind(objects, kind) if one["metadata"]["name"] == name)


def values_of(value: Any, key: str) -> Iterator[Any]:
    """What stands under a key, at any depth."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name == key:
                yield item
            yield from values_of(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from values_of(item, key)


def matches(labels: Object, selector: Object) -> bool:
    """Whether a label selector selects what has these labels."""
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def test_every_field_exists(rendered: list[Object]) -> None:
    from api_rules import refuse_unknown_fields

    for one in rendered:
        refuse_unknown_fields(one)


def test_a_field_that_does_not_exist_would_be_found(rendered: list[Object]) -> None:
    from api_rules import Problem, refuse_unknown_fields

    (deployment,) = of_kind(rendered, "Deployment")
    container = {**deployment["spec"]["template"]["spec"]["containers"][0], "readynessProbe": {}}
    spec = {"template": {"spec": {"containers": [container]}}}
    with pytest.raises(Problem, match="readynessProbe"):
        refuse_unknown_fields({**deployment, "spec": spec})


def test_pods_pass_the_restricted_standard_that_their_namespaces_enforce(rendered: list[Object]) -> None:
    from pod_security import restricted

    namespaces = {one["metadata"]["name"]: one["metadata"]["labels"] for one in of_kind(rendered, "Namespace")}
    assert all(labels["pod-security.kubernetes.io/enforce"] == "restricted" for labels in namespaces.values())
    assert {one["metadata"]["namespace"] for one in rendered if one["kind"] != "Namespace"} == namespaces.keys()
    for one in of_kind(rendered, *WORKLOADS):
        template = one["spec"]["template"]
        assert restricted(template) == []
        assert template["spec"]["automountServiceAccountToken"] is False
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"]
            assert container.keys() >= {"startupProbe", "readinessProbe", "livenessProbe"}


def test_references_resolve(rendered: list[Object], secret: Object) -> None:
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(rendered, "ConfigMap")}
    workloads = of_kind(rendered, *WORKLOADS)
    wanted = list(values_of(workloads, "configMapRef")) + list(values_of(workloads, "configMap"))
    assert {one["name"] for one in wanted} == maps.keys()
    keys = list(values_of(workloads, "secretKeyRef"))
    assert {one["name"] for one in keys} == {secret["metadata"]["name"]}
    # What the documented command puts in, no more and no less; nothing of it is among the objects themselves.
    assert {one["key"] for one in keys} == secret["data"].keys()
    assert secret["metadata"]["namespace"] == "tracking"
    assert of_kind(rendered, "Secret") == []
    for workload in workloads:
        spec = workload["spec"]["template"]["spec"]
        volumes = {one["name"] for one in spec.get("volumes", ())}
        volumes |= {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", ())}
        assert {mount["name"] for one in spec["containers"] for mount in one["volumeMounts"]} == volumes


def test_selectors_and_ports_meet(rendered: list[Object]) -> None:
    workloads = of_kind(rendered, *WORKLOADS)
    for one in workloads:
        assert matches(one["spec"]["template"]["metadata"]["labels"], one["spec"]["selector"])

    def selected(selector: Object) -> list[Object]:
        return [one for one in workloads if matches(one["spec"]["template"]["metadata"]["labels"], selector)]

    def port_names(workload: Object) -> set[str]:
        containers = workload["spec"]["template"]["spec"]["containers"]
        return {port["name"] for container in containers for port in container["ports"]}

    for service in of_kind(rendered, "Service"):
        (workload,) = selected({"matchLabels": service["spec"]["selector"]})
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= port_names(workload)
    statefulset = named(rendered, "StatefulSet", "postgresql")
    assert named(rendered, "Service", statefulset["spec"]["serviceName"])["spec"]["clusterIP"] == "None"
    for policy in of_kind(rendered, "NetworkPolicy"):
        spec = policy["spec"]
        for peer in values_of(spec, "podSelector"):
            assert selected(peer)
        for rule in spec.get("ingress", ()) if spec["podSelector"] else ():
            (workload,) = selected(spec["podSelector"])
            assert {port["port"] for port in rule.get("ports", ())} <= port_names(workload)


def test_only_the_server_reaches_the_database_and_only_clients_the_server(rendered: list[Object]) -> None:
    policies = {
        one["metadata"]["name"]: one["spec"]
        for one in of_kind(rendered, "NetworkPolicy")
        if one["metadata"]["namespace"] == "tracking"
    }
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (rule,) = policies["postgresql"]["ingress"]
    assert rule["from"] == [{"podSelector": named(rendered, "Deployment", "mlflow")["spec"]["selector"]}]
    assert "egress" not in policies["postgresql"]
    (rule,) = policies["mlflow"]["ingress"]
    (peer,) = rule["from"]
    clients = [
        one["metadata"]
        for one in of_kind(rendered, "Namespace")
        if matches(one["metadata"]["labels"], peer["namespaceSelector"])
    ]
    assert [one["name"] for one in clients] == ["tracking-jobs"]


def test_images_are_pinned(rendered: list[Object]) -> None:
    images = set(values_of(of_kind(rendered, *WORKLOADS), "image"))
    assert all(re.search(r":\d+\.\d+[\w.-]*$", image) for image in images)
    compose = yaml.safe_load((SERVICES / "compose.yaml").read_text())["services"]
    assert compose["postgresql"]["image"].removeprefix("${POSTGRESQL_IMAGE:-").removesuffix("}") in images


def test_the_server_accepts_its_settings(
    rendered: list[Object], secret: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the check that it begins with; the passwords are some that settings.py takes."""
    import server
    import settings

    for name in settings.KNOWN:
        monkeypatch.delenv(name, raising=False)
    (container,) = named(rendered, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    (source,) = container["envFrom"]
    given = dict(named(rendered, "ConfigMap", source["configMapRef"]["name"])["data"])
    assert given.keys() <= {*settings.KNOWN, "DATABASE_URI"}
    for one in container["env"]:
        given[one["name"]] = base64.b64decode(secret["data"][one["valueFrom"]["secretKeyRef"]["key"]]).decode()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings.check(given, server.needed())
    assert server.database_uri().host == named(rendered, "Service", "postgresql")["metadata"]["name"]
    (port,) = named(rendered, "Service", "mlflow")["spec"]["ports"]
    assert str(port["port"]) == given["MLFLOW_PORT"]
    namespace = named(rendered, "Deployment", "mlflow")["metadata"]["namespace"]
    assert f"mlflow.{namespace}:*" in server.allowed_names()["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_an_upgrade_runs_as_the_server_does_and_never_by_itself(rendered: list[Object]) -> None:
    from pod_security import restricted

    assert "--from=cronjob/upgrade\n" in manual()
    cron_job = named(rendered, "CronJob", "upgrade")
    job = cron_job["spec"]["jobTemplate"]["spec"]
    assert (cron_job["spec"]["suspend"], job["backoffLimit"]) == (True, 0)
    template, servers = job["template"], named(rendered, "Deployment", "mlflow")["spec"]["template"]
    assert restricted(template) == []
    # The network policies know the server by these.
    assert template["metadata"]["labels"] == servers["metadata"]["labels"]
    assert {**template["spec"], "containers": []} == {**servers["spec"], "containers": [], "restartPolicy": "Never"}
    (container,), (server,) = template["spec"]["containers"], servers["spec"]["containers"]
    serving = {"ports", "startupProbe", "readinessProbe", "livenessProbe"}
    as_server = {name: value for name, value in server.items() if name not in serving}
    assert container == {**as_server, "name": "upgrade", "command": ["python", "server.py", "upgrade"]}


@pytest.mark.slow
def test_what_the_manual_dumps_it_restores(new_database: Callable[..., Database], tmp_path: Path) -> None:
    """Its commands, with PostgreSQL's own programs, which `kubectl exec` would run in the pod."""
    database = new_database()
    stand_in = tmp_path / "kubectl"
    stand_in.write_text('#!/bin/sh\nuntil [ "${1---}" = -- ]; do shift; done\n[ $# = 0 ] || { shift; "$@"; }\n')
    stand_in.chmod(0o755)
    path = f"{tmp_path}:{Path(program('psql')).parent}:{os.environ['PATH']}"
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(database.port), "PGPASSWORD": PASSWORD}

    def do(what: str) -> None:
        (block,) = [code for code in re.findall(r"```sh\n(.*?)```", manual(), re.DOTALL) if f"-- {what} " in code]
        command = ["bash", "-e", "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env={**where, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def names() -> list[Any]:
        users = database.execute("SELECT username FROM users", "mlflow_auth")
        return [*database.execute("SELECT name FROM experiments"), *users]

    database.execute("UPDATE experiments SET name = 'до'")
    before = names()
    assert len(before) == 2
    do("pg_dump")
    assert (tmp_path / "mlflow_auth.sql").stat().st_mode & 0o777 == 0o600
    database.execute("UPDATE experiments SET name = 'после'")
    database.execute("CREATE TABLE of_tomorrow ()")
    database.execute("UPDATE users SET username = 'после'", "mlflow_auth")
    do("psql")
    assert names() == before
    assert database.execute("SELECT to_regclass('of_tomorrow')") == [(None,)]


class Rights:
    """What a Role does not allow, for ApiServer.forbidden; it keeps what was asked for."""

    def __init__(self, role: Object):
        self.granted = {
            (verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]
        }
        self.asked: set[tuple[str, str]] = set()

    def __contains__(self, right: tuple[str, str]) -> bool:
        self.asked.add(right)
        return right not in self.granted


def test_the_launcher_may_do_what_the_plugin_does_and_nothing_else(
    rendered: list[Object], api_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request of the plugin for a job of two nodes with a secret, against an API server that asks the Role."""
    from mlproject_backends.config import Config
    from mlproject_backends.job import Job
    from mlproject_backends.kubernetes import KubernetesTarget
    from replay import Recording, Replay

    role = named(rendered, "Role", "launcher")
    (binding,) = of_kind(rendered, "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    account = named(rendered, "ServiceAccount", subject["name"])
    assert {role["metadata"]["namespace"], subject["namespace"], account["metadata"]["namespace"]} == {"tracking-jobs"}

    api_server.forbidden = rights = Rights(role)
    api_server.controller = Replay(Recording("indexed"))
    job = Job("image-classifier-main-0a1b2c3d", "run", {}, "registry/image:1", ("python",), {}, secrets={"TOKEN": "s"})
    target = KubernetesTarget(Config("kubernetes", nodes=2))
    target.check()
    submitted = target.submit(job)
    told: list[str] = []
    assert submitted.watch(told.append, told.append).status == "FINISHED"
    assert submitted.state().status == "FINISHED"
    submitted.logs(told.append)
    submitted.cancel()
    submitted.clean_up()
    # It asks whether the namespace is there, and goes on where it may not know.
    assert rights.asked - rights.granted == {("get", "namespaces")}
    assert rights.granted - rights.asked == set()
