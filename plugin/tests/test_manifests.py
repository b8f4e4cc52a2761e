"""What is sent to a cluster, compared with manifests that a person has read. UPDATE_GOLDEN=1 writes them anew."""

import copy
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import pod_security
from api_server import ApiServer
from mlproject_backends.config import Config
from mlproject_backends.job import Job, Resources
from mlproject_backends.kubernetes import KubernetesTarget
from mlproject_backends.manifests import Manifest, merged, render

GOLDEN = Path(__file__).parent / "manifests"
TEMPLATE = GOLDEN / "user_template.yaml"

JOB = Job(
    name="image-classifier-main-5f2a91c4",
    run_id="0123456789abcdef0123456789abcdef",
    labels={
        "run-id": "0123456789abcdef0123456789abcdef",
        "experiment": "Default",
        "project": "image-classifier",
        "entry-point": "main",
    },
    image="registry.example/team/image-classifier:1f9c0b7d",
    argv=("python", "-c", "print('the bootstrap')"),
    env={"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLPROJECT_COMMAND": "python train.py --epochs=3 && echo $HOME"},
    resources=Resources(cpu=2, memory_bytes=4 * 2**30),
)
CONFIG = Config("kubernetes")
CASES: dict[str, tuple[Job, Config]] = {
    "plain": (JOB, CONFIG),
    "gpu": (
        replace(JOB, resources=Resources(cpu=7.5, memory_bytes=30 * 2**30, gpu=1, shm_bytes=2 * 2**30), cache=True),
        Config("kubernetes", cache_volume="datasets", timeout_s=3600, retries=2),
    ),
    "nodes": (JOB, Config("kubernetes", nodes=4)),
    "queue": (JOB, Config("kubernetes", queue="gpus", namespace="research")),
    "secret": (
        replace(JOB, secrets={"AWS_SECRET_ACCESS_KEY": "hush", "MLFLOW_TRACKING_PASSWORD": "hush"}),
        Config("kubernetes", env_from_secret={"MLFLOW_TRACKING_PASSWORD": "mlflow/password"}),
    ),
    "template": (
        replace(JOB, secrets={"AWS_SECRET_ACCESS_KEY": "hush"}, cache=True),
        Config("kubernetes", kube_job_template_path=str(TEMPLATE)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_manifests(name: str) -> None:
    job, config = CASES[name]
    manifests = KubernetesTarget(config).render(job)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(yaml.safe_dump_all(manifests, sort_keys=False, width=110))
    assert manifests == list(yaml.safe_load_all(path.read_text())), "read the difference, then run with UPDATE_GOLDEN=1"


def goldens(name: str) -> dict[str, Any]:
    """A golden file's manifests by kind."""
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text())}


def main_of(job: Any) -> Any:
    return job["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", CASES)
def test_they_pass_the_restricted_pod_security_standard(name: str) -> None:
    assert pod_security.restricted(goldens(name)["Job"]["spec"]["template"]) == []


def test_the_checker_finds_what_the_admission_controller_found() -> None:
    """The recorded pod and the recorded words of a real cluster's refusal."""
    from replay import Recording

    recording = Recording("pod-security")
    words = [entry["event"]["object"].get("message", "") for entry in recording.watched]
    said = next(text for text in words if "violates PodSecurity" in text)
    found = pod_security.restricted(recording.job["spec"]["template"])
    assert said.endswith(f'violates PodSecurity "restricted:latest": {", ".join(found)}')


@pytest.mark.parametrize(
    ("change", "control"),
    [
        (lambda pod: pod.update(hostPID=True), "host namespaces"),
        (lambda pod: pod.update(volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "restricted volume types"),
        (lambda pod: pod["securityContext"].update(runAsNonRoot=False), "runAsNonRoot"),
        (lambda pod: pod["securityContext"].update(seccompProfile={"type": "Unconfined"}), "seccompProfile"),
        (lambda pod: pod["containers"][0]["securityContext"].update(privileged=True), "privileged"),
        (lambda pod: pod["containers"][0].update(ports=[{"hostPort": 80}]), "hostPort"),
        (lambda pod: pod["containers"].append({"name": "side"}), 'container "side"'),
    ],
)
def test_the_checker_finds_violations(change: Any, control: str) -> None:
    template = copy.deepcopy(goldens("plain")["Job"]["spec"]["template"])
    change(template["spec"])
    assert any(control in violation for violation in pod_security.restricted(template))


@pytest.mark.parametrize("name", CASES)
def test_a_server_with_strict_field_validation_takes_them(name: str, api_server: ApiServer) -> None:
    job, config = CASES[name]
    KubernetesTarget(replace(config, namespace="ml")).submit(job).clean_up()
    (made,) = api_server.made("jobs")
    assert made["metadata"]["name"] == job.name


def test_rendering_is_pure_and_shows_no_secret() -> None:
    job, config = CASES["template"]
    template = yaml.safe_load(TEMPLATE.read_text())
    before = copy.deepcopy(template)
    first = render(job, config, template)
    assert render(job, config, template) == first
    assert template == before
    assert "hush" not in str(first)


def test_of_a_template_all_survives_but_what_names_and_runs_the_job() -> None:
    job = goldens("template")["Job"]
    template = yaml.safe_load(TEMPLATE.read_text())
    spec, theirs = job["spec"]["template"]["spec"], template["spec"]["template"]["spec"]
    for key in ("nodeSelector", "tolerations", "serviceAccountName", "imagePullSecrets", "initContainers"):
        assert spec[key] == theirs[key]
    assert job["metadata"]["annotations"].items() >= template["metadata"]["annotations"].items()
    assert job["metadata"]["labels"]["team"] == job["spec"]["template"]["metadata"]["labels"]["team"] == "vision"
    assert job["spec"]["ttlSecondsAfterFinished"] == 100
    assert job["spec"]["backoffLimit"] == 3
    assert spec["securityContext"]["runAsUser"] == 2000
    main = main_of(job)
    assert (main["name"], main["image"], main["command"]) == ("main", JOB.image, list(JOB.argv))
    assert "args" not in main
    assert main["envFrom"] == theirs["containers"][0]["envFrom"]
    assert main["resources"]["limits"] == {"memory": "4Gi", "ephemeral-storage": "20Gi", "cpu": "2"}
    env = {variable["name"]: variable.get("value") for variable in main["env"]}
    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert env["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert {mount["mountPath"] for mount in main["volumeMounts"]} == {"/data", "/cache"}
    assert "generateName" not in job["metadata"]
    assert job["metadata"]["namespace"] == "vision"


def test_a_container_named_main_is_ours_wherever_it_stands() -> None:
    containers = [{"name": "side", "image": "side"}, {"name": "main", "stdin": True}]
    (job,) = render(JOB, CONFIG, {"kind": "Job", "spec": {"template": {"spec": {"containers": containers}}}})
    ours, side = job["spec"]["template"]["spec"]["containers"]
    assert (ours["name"], ours["image"], ours["stdin"]) == ("main", JOB.image, True)
    assert side == containers[0]


def test_a_variable_has_one_source() -> None:
    env = [{"name": "MLFLOW_TRACKING_URI", "valueFrom": {"configMapKeyRef": {"name": "mlflow", "key": "uri"}}}]
    template = {"spec": {"template": {"spec": {"containers": [{"name": "main", "env": env}]}}}}
    (job,) = render(JOB, CONFIG, template)
    assert main_of(job)["env"][0] == {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"}


def test_evictions_do_not_count_on_one_node_and_end_the_job_on_several() -> None:
    actions = {
        name: goldens(name)["Job"]["spec"]["podFailurePolicy"]["rules"][0]["action"] for name in ("gpu", "nodes")
    }
    assert actions == {"gpu": "Ignore", "nodes": "FailJob"}


def test_names_fit() -> None:
    """With the longest name that a Job may have here, the ranks' host names are still DNS labels."""
    longest = replace(JOB, name="x" * 50)
    for manifest in render(longest, Config("kubernetes", nodes=9999)):
        address = {v["name"]: v.get("value") for v in main_of(manifest)["env"]} if manifest["kind"] == "Job" else {}
        assert re.fullmatch(r"[a-z0-9-]{1,63}", f"{manifest['metadata']['name']}-9999")
        for label in address.get("MASTER_ADDR", "x").split("."):
            assert len(label) <= 63


def test_merging_lays_one_manifest_on_another() -> None:
    under: Manifest = {"a": {"b": 1, "c": [1]}, "containers": [{"name": "x", "image": "1", "tty": True}], "d": 4}
    over: Manifest = {"a": {"c": [2]}, "containers": [{"name": "x", "image": "2"}, {"name": "y"}]}
    containers = [{"name": "x", "image": "2", "tty": True}, {"name": "y"}]
    assert merged(under, over) == {"a": {"b": 1, "c": [2]}, "containers": containers, "d": 4}


def test_the_projects_own_template_passes_too(api_server: ApiServer) -> None:
    path = Path(__file__).parents[2] / "kubernetes_job_template.yaml"
    assert pod_security.restricted(yaml.safe_load(path.read_text())["spec"]["template"]) == []
    KubernetesTarget(Config("kubernetes", kube_job_template_path=str(path))).submit(JOB).clean_up()
    (made,) = api_server.made("jobs")
    assert pod_security.restricted(made["spec"]["template"]) == []
