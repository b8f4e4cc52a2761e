"""services/kubernetes-serving/, as kubectl renders it: fields that exist, references that resolve, pods that the
restricted standard admits, and a service that answers where the manifests say, from the files that its image gets."""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes.client
import pytest
import yaml
from service import PredictionService
from service_images import find
from test_services_kubernetes import Object, matches, named, of_kind, values_of

from serve import Settings
from utils.settings import parse

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "services" / "kubernetes-serving"
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """Every object that `kubectl apply -k` would send where the Prometheus operator runs."""
    folder = tmp_path_factory.mktemp("kubernetes") / "serving"
    shutil.copytree(MANIFESTS, folder)
    plain = render(folder)
    file = folder / "kustomization.yaml"
    file.write_text(file.read_text().replace("# - podmonitor.yaml", "- podmonitor.yaml"))
    everything = render(folder)
    assert [one["kind"] for one in everything if one not in plain] == ["PodMonitor"]
    return everything


def render(folder: Path) -> list[Object]:
    done = subprocess.run([find("kubectl"), "kustomize", folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def secret() -> Object:
    """The Secret that the command in docs/operations.md makes."""
    section = (ROOT / "docs" / "operations.md").read_text().split("## The prediction service on Kubernetes")[1]
    (command,) = re.findall(r"^kubectl create secret .*?[^\\]$", section, re.MULTILINE | re.DOTALL)
    given = {name: f"value-of-{name}" for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
    command = command.replace("kubectl", shlex.quote(find("kubectl")), 1) + " --dry-run=client --output=yaml"
    environment = {"PATH": "/usr/bin:/bin", "SERVING_TOKEN": TOKEN, **given, "AWS_PROFILE": "not-for-the-cluster"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout))


@pytest.fixture(scope="session")
def pod(rendered: list[Object]) -> Object:
    """The template of the service's pods."""
    return dict(named(rendered, "Deployment", "serving")["spec"]["template"])


@pytest.fixture(scope="session")
def container(pod: Object) -> Object:
    (container,) = pod["spec"]["containers"]
    return dict(container)


def test_every_field_exists(rendered: list[Object]) -> None:
    from api_rules import refuse_unknown_fields

    kinds = {one["kind"] for one in rendered} - {"PodMonitor"}
    assert kinds == {
        *("Namespace", "ConfigMap", "Service", "Deployment", "NetworkPolicy"),
        *("HorizontalPodAutoscaler", "PodDisruptionBudget"),
    }
    for one in of_kind(rendered, *kinds):
        version = one["apiVersion"].rpartition("/")[2].upper()
        assert hasattr(kubernetes.client, f"{version}{one['kind']}")  # else nothing would be compared
        refuse_unknown_fields(one)


def test_a_field_that_does_not_exist_would_be_found(rendered: list[Object]) -> None:
    from api_rules import Problem, refuse_unknown_fields

    scaler = named(rendered, "HorizontalPodAutoscaler", "serving")
    metric = {"type": "Resource", "resource": {"name": "cpu", "target": {"averageUtilisation": 70}}}
    with pytest.raises(Problem, match="averageUtilisation"):
        refuse_unknown_fields({**scaler, "spec": {**scaler["spec"], "metrics": [metric]}})


def test_pods_pass_the_restricted_standard_that_their_namespace_enforces(
    rendered: list[Object], pod: Object, container: Object
) -> None:
    from pod_security import restricted

    (namespace,) = of_kind(rendered, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = {one["metadata"]["namespace"] for one in rendered if one["kind"] != "Namespace"}
    assert others == {namespace["metadata"]["name"]}
    assert restricted(pod) == []
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["limits"]["memory"]
    assert re.search(r":\d+\.\d+[\w.-]*$", container["image"])


def test_references_resolve(rendered: list[Object], secret: Object, pod: Object, container: Object) -> None:
    (settings,) = of_kind(rendered, "ConfigMap")
    assert [one["configMapRef"]["name"] for one in container["envFrom"]] == [settings["metadata"]["name"]]
    # In the Secret is what the documented command puts in, no more and no less; none is among the objects themselves.
    keys = list(values_of(container["env"], "secretKeyRef"))
    assert {one["name"] for one in keys} == {secret["metadata"]["name"]}
    needed = {one["key"] for one in keys if not one.get("optional")}
    assert needed == secret["data"].keys()
    assert {one["key"] for one in keys} - needed == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert [one["name"] for one in container["env"]] == [one["key"] for one in keys]
    assert base64.b64decode(secret["data"]["SERVING_TOKEN"]).decode() == TOKEN
    assert secret["metadata"]["namespace"] == settings["metadata"]["namespace"]
    assert of_kind(rendered, "Secret") == []
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}


def test_selectors_ports_and_names_meet(rendered: list[Object], pod: Object, container: Object) -> None:
    labels = pod["metadata"]["labels"]
    deployment, scaler = (
        named(rendered, "Deployment", "serving"),
        named(rendered, "HorizontalPodAutoscaler", "serving"),
    )
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert matches(labels, deployment["spec"]["selector"])
    assert "replicas" not in deployment["spec"]  # each apply would put back what the autoscaler has set
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "serving"}
    assert container["resources"]["requests"]["cpu"]  # what utilization is a share of
    (budget,) = of_kind(rendered, "PodDisruptionBudget")
    assert matches(labels, budget["spec"]["selector"])
    # A node can be drained, and someone answers meanwhile.
    assert 0 < budget["spec"]["maxUnavailable"] < scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
    (spread,) = pod["spec"]["topologySpreadConstraints"]
    assert matches(labels, spread["labelSelector"])
    service = named(rendered, "Service", "serving")
    assert matches(labels, {"matchLabels": service["spec"]["selector"]})
    assert [port["targetPort"] in ports for port in service["spec"]["ports"]] == [True]
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert [one["httpGet"]["port"] for one in probes] == ["http"] * 3
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(ports["http"])


def test_only_clients_and_prometheus_reach_the_service(rendered: list[Object], pod: Object) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(rendered, "NetworkPolicy")}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert matches(pod["metadata"]["labels"], policies["serving"]["podSelector"])
    (rule,) = policies["serving"]["ingress"]
    assert [one["namespaceSelector"]["matchLabels"] for one in rule["from"]] == [
        {"serving-client": "true"},
        {"kubernetes.io/metadata.name": "monitoring"},
    ]
    assert rule["ports"] == [{"port": "http"}]


def test_the_tracking_server_lets_the_service_in(rendered: list[Object]) -> None:
    """By the policies of both sides, at the address in the settings."""
    server = render(ROOT / "services" / "kubernetes")
    (settings,) = of_kind(rendered, "ConfigMap")
    (namespace,) = of_kind(rendered, "Namespace")
    service = named(server, "Service", "mlflow")
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    where = service["metadata"]["namespace"]
    assert settings["data"]["MLFLOW_TRACKING_URI"] == f"http://{name}.{where}:{port}"
    (out, _) = named(rendered, "NetworkPolicy", "serving")["spec"]["egress"]
    (to,) = out["to"]
    assert to["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": where}
    deployment = named(server, "Deployment", "mlflow")
    assert matches(deployment["spec"]["template"]["metadata"]["labels"], to["podSelector"])
    assert {one["port"] for one in out["ports"]} == {
        one["containerPort"] for one in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    (rule,) = named(server, "NetworkPolicy", "mlflow")["spec"]["ingress"]
    (peer,) = rule["from"]
    assert matches(namespace["metadata"]["labels"], peer["namespaceSelector"])


def test_the_prometheus_operator_finds_the_pods_and_shows_the_token(
    rendered: list[Object], secret: Object, pod: Object, container: Object
) -> None:
    (monitor,) = of_kind(rendered, "PodMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"].keys() == {"selector", "podMetricsEndpoints"}
    assert matches(pod["metadata"]["labels"], monitor["spec"]["selector"])
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]
    assert endpoint["path"] == pod["metadata"]["annotations"]["prometheus.io/path"]
    credentials = endpoint["authorization"]["credentials"]
    assert (endpoint["authorization"]["type"], credentials["name"]) == ("Bearer", secret["metadata"]["name"])
    assert credentials["key"] in secret["data"]
    # The queries and rules of services/ look for this job.
    jobs = yaml.safe_load((ROOT / "services/prometheus/prometheus.yml").read_text())["scrape_configs"]
    (label,) = endpoint["relabelings"]
    assert label["targetLabel"] == "job"
    assert label["replacement"] in [job["job_name"] for job in jobs]


def settings_of(rendered: list[Object], container: Object) -> Settings:
    """What serve.py makes of the container's arguments; $(NAME) is a variable of the ConfigMap, as for the kubelet."""
    (values,) = of_kind(rendered, "ConfigMap")
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: values["data"][found[1]], one) for one in container["args"]]
    return parse(Settings, arguments)


def test_serve_takes_the_arguments_and_ends_within_the_grace_period(
    rendered: list[Object], pod: Object, container: Object
) -> None:
    settings = settings_of(rendered, container)
    assert settings.model_uri == "models:/image-classifier@champion"
    assert (settings.host, settings.log) == ("0.0.0.0", "")
    assert [port["containerPort"] for port in container["ports"]] == [settings.port]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    # What serving.server gives uvicorn, and a margin for the end of workers and the prediction log.
    drain_s = round(settings.timeout_s) + 1
    assert pod["spec"]["terminationGracePeriodSeconds"] >= float(seconds) + drain_s + 15


class ImageService(PredictionService):
    """The service from the files that its image has."""

    script: Path


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the Dockerfile copies."""
    folder = tmp_path_factory.mktemp("image") / "service"
    folder.mkdir()
    copied = re.findall(r"^COPY (\S+) (\S+)$", (MANIFESTS / "Dockerfile").read_text(), re.MULTILINE)
    for source, target in copied:
        if source.endswith("/"):
            shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, folder / target)
    return folder


@pytest.fixture(scope="module")
def in_the_pod(
    rendered: list[Object], container: Object, image_files: Path, served_model: Path, tmp_path_factory: Any
) -> Iterator[PredictionService]:
    """The service as the container starts it, but for model, address and port."""
    dockerfile = (MANIFESTS / "Dockerfile").read_text()
    assert re.search(r"^WORKDIR /opt/service$", dockerfile, re.MULTILINE)
    assert 'ENTRYPOINT ["python", "/opt/service/serve.py"]' in dockerfile
    # Where it works, it may write: the prediction log's files wait below.
    assert container["workingDir"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    ImageService.script = image_files / "serve.py"
    given = ("--model_uri=", "--host=", "--port=", "--log=")
    flags = [one for one in container["args"] if not one.startswith(given)]
    service = ImageService(served_model, tmp_path_factory.mktemp("pod"), *flags, "--log=log", SERVING_TOKEN=TOKEN)
    service.wait()
    yield service
    service.kill()


@pytest.mark.slow
def test_the_service_answers_where_the_manifests_say(
    in_the_pod: PredictionService, pod: Object, container: Object
) -> None:
    probes = [container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert [in_the_pod.get(path)[0] for path in probes] == [200] * 3
    metrics = pod["metadata"]["annotations"]["prometheus.io/path"]
    assert in_the_pod.get(metrics)[0] == 401
    status, text = in_the_pod.get(metrics, Authorization=f"Bearer {TOKEN}")
    assert status == 200
    assert b"serving_model_workers" in text
    assert in_the_pod.stop() == 0


def test_the_image_gets_what_serve_imports_and_no_secret(image_files: Path) -> None:
    """Whatever a module there imports of the project is there too."""
    names = {path.name for path in image_files.iterdir()}
    rooms = names - {"serve.py"}
    for file in image_files.rglob("*.py"):
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.MULTILINE))
        own = {one for one in imported if (ROOT / one / "__init__.py").exists() or (ROOT / f"{one}.py").exists()}
        assert own <= rooms, file
    assert {path.suffix for path in image_files.rglob("*") if path.is_file()} <= {".py", ".html"}
