"""The Kubernetes target against a cluster that runs containers, and against API servers that are not well."""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api_server import ApiServer, Fault
from cluster import TestCluster
from conftest import missing
from mlproject_backends import ConfigError, JobError, Unreachable, status
from mlproject_backends.config import Config
from mlproject_backends.following import LogLines
from mlproject_backends.job import Job, Resources, State
from mlproject_backends.kubernetes import KubernetesTarget, SubmittedJob

SLEEP_UNTIL_TERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("got TERM", flush=True), sys.exit(143)))
print("ready", flush=True)
time.sleep(600)
"""
COUNT = "import time\nfor number in range(60): print(number, flush=True); time.sleep(0.05)"


def job(image: str, code: str = "print('done')", **fields: Any) -> Job:
    labels = {"run-id": "0123abcd", "project": "tests", "entry-point": "main"}
    name = f"tests-main-{uuid.uuid4().hex[:8]}"
    return Job(name, "0123abcd", labels, image, ("python", "-u", "-c", code), fields.pop("env", {}), **fields)


class Watched:
    """What a watch has told and shown, and how it ended; `on` has what is done each time a line or sentence comes."""

    def __init__(self, submitted: SubmittedJob, on: dict[str, list[Callable[[], None]]] | None = None):
        self.told: list[str] = []
        self.output: list[str] = []
        self._on = on or {}
        self.state = submitted.watch(lambda text: self._got(self.told, text), lambda text: self._got(self.output, text))
        submitted.clean_up()

    def _got(self, texts: list[str], text: str) -> None:
        texts.append(text)
        if actions := self._on.get(text):
            actions.pop(0)()


def submit(cluster: TestCluster, sent: Job, **config: Any) -> SubmittedJob:
    target = KubernetesTarget(Config("kubernetes", **config))
    target.check()
    return target.submit(sent)


# Endings


@pytest.mark.slow
def test_output_and_progress(cluster: TestCluster, cluster_image: str) -> None:
    code = "print('one'); print('ü'); print(); print('x' * 40_000); print('no newline', end='')"
    watched = Watched(submit(cluster, job(cluster_image, code)))
    assert watched.state == State("FINISHED", "the command ended with exit code 0", 0)
    assert watched.output == ["one", "ü", "", "x" * 40_000, "no newline"]
    assert [sentence.split(" on ")[0] for sentence in watched.told][-1] == "running"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "resources", "reason", "exit_code"),
    [
        ("import sys; print('before'); sys.exit(7)", Resources(), "exit code 7", 7),
        ("raise SystemExit(137)", Resources(), "killed by signal 9 .SIGKILL", 137),
        (
            "blocks = []\nwhile True: blocks.append(bytearray(10_000_000))",
            Resources(memory_bytes=64 * 2**20),
            "OOMKilled.*limit of 64Mi",
            137,
        ),
        (
            "open('/dev/termination-log', 'w').write('no tracking server'); raise SystemExit(78)",
            Resources(),
            "^no tracking server",
            78,
        ),
    ],
)
def test_a_failure_says_why(
    cluster: TestCluster, cluster_image: str, code: str, resources: Resources, reason: str, exit_code: int
) -> None:
    watched = Watched(submit(cluster, job(cluster_image, code, resources=resources), retries=2 * (exit_code == 78)))
    assert (watched.state.status, watched.state.exit_code) == ("FAILED", exit_code)
    assert re.search(reason, watched.state.reason)
    assert not any("trying again" in sentence for sentence in watched.told)


@pytest.mark.slow
def test_a_failed_pod_is_tried_again_and_all_output_shown(cluster: TestCluster, cluster_image: str) -> None:
    watched = Watched(submit(cluster, job(cluster_image, "print('try'); raise SystemExit(1)"), retries=1))
    assert watched.state == State("FAILED", "the command failed with exit code 1; the last of 2 tries", 1)
    assert watched.output == ["try", "try"]
    assert "the command failed with exit code 1; trying again (1 of 1)" in watched.told


@pytest.mark.slow
def test_an_evicted_pod_does_not_count(cluster: TestCluster, cluster_image: str) -> None:
    submitted = submit(cluster, job(cluster_image, SLEEP_UNTIL_TERM))
    name = submitted.tags["mlproject.kube_job"]

    def evict() -> None:
        (pod,) = cluster.pods(name)
        path = cluster.api.path("pods", pod["metadata"]["name"])
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod["metadata"]["name"]}}
        cluster.api.create(f"{path}/eviction", body)

    watched = Watched(submitted, {"ready": [evict, submitted.cancel]})
    assert watched.state == State("KILLED", "cancelled")
    assert watched.output == ["ready", "got TERM", "ready", "got TERM"]
    assert any("EvictionByEvictionAPI" in sentence and "another pod goes on" in sentence for sentence in watched.told)


@pytest.mark.slow
def test_a_time_limit_ends_the_job(cluster: TestCluster, cluster_image: str) -> None:
    watched = Watched(submit(cluster, job(cluster_image, SLEEP_UNTIL_TERM), timeout_s=3))
    assert watched.state.status == "FAILED"
    assert "time limit of 3 s" in watched.state.reason
    assert watched.output == ["ready", "got TERM"]


@pytest.mark.slow
def test_an_image_that_cannot_be_pulled(cluster: TestCluster) -> None:
    watched = Watched(submit(cluster, job("127.0.0.1:9/none:1"), image_timeout_s=1))
    assert watched.state.status == "FAILED"
    assert "cannot pull the image 127.0.0.1:9/none:1" in watched.state.reason
    assert watched.state.reason.endswith("given up after 1 s (image-timeout-s)")
    assert cluster.pods("tests") == []


@pytest.mark.slow
def test_an_image_name_that_is_none(cluster: TestCluster) -> None:
    watched = Watched(submit(cluster, job("No Image")))
    assert watched.state == State(
        "FAILED", "'No Image' is no valid name of an image; correct `image` or `repository-uri`"
    )


@pytest.mark.slow
def test_a_command_that_is_not_in_the_image(cluster: TestCluster, cluster_image: str) -> None:
    sent = Job(f"tests-{uuid.uuid4().hex[:8]}", "r", {}, cluster_image, ("no-such-binary",), {})
    watched = Watched(submit(cluster, sent))
    assert (watched.state.status, watched.state.exit_code) == ("FAILED", 128)
    assert "no-such-binary" in watched.state.reason


@pytest.mark.slow
def test_a_secret_that_is_missing(cluster: TestCluster, cluster_image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BRIEF_S", 1)
    watched = Watched(submit(cluster, job(cluster_image), env_from_secret={"PASSWORD": "absent/key"}))
    assert watched.state == State("FAILED", 'the container cannot be made: secret "absent" not found')


@pytest.mark.slow
def test_a_pod_that_no_node_takes(cluster: TestCluster, cluster_image: str) -> None:
    sent = job(cluster_image, resources=Resources(memory_bytes=10 * 2**40))
    watched = Watched(submit(cluster, sent, pending_timeout_s=1))
    assert watched.state.status == "FAILED"
    assert "Insufficient memory" in watched.state.reason
    assert any(sentence.startswith("no node takes the pod: 0/") for sentence in watched.told)


@pytest.mark.slow
def test_a_pod_that_the_security_standard_refuses(cluster: TestCluster, cluster_image: str, tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text("{kind: Job, spec: {template: {spec: {hostNetwork: true, containers: [{name: main}]}}}}")
    watched = Watched(submit(cluster, job(cluster_image), kube_job_template_path=str(template)))
    assert watched.state.status == "FAILED"
    assert 'violates PodSecurity "restricted:latest": host namespaces' in watched.state.reason
    assert any(sentence.startswith("the cluster warns: would violate PodSecurity") for sentence in watched.told)


@pytest.mark.slow
def test_a_queued_job_says_so_until_it_is_let_go(cluster: TestCluster, cluster_image: str) -> None:
    submitted = submit(cluster, job(cluster_image), queue="gpus")
    name = submitted.tags["mlproject.kube_job"]
    assert submitted.state() == State("SCHEDULED", "queued in gpus")

    def let_go() -> None:
        cluster.api.patch(cluster.api.path("jobs", name), {"spec": {"suspend": False}})

    watched = Watched(submitted, {"queued in gpus": [let_go]})
    assert watched.state.status == "FINISHED"
    assert watched.output == ["done"]


# Several nodes


@pytest.mark.slow
def test_ranks_find_each_other(cluster: TestCluster, cluster_image: str) -> None:
    code = """
import os, socket, time
where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
print("of", os.environ["WORLD_SIZE"], flush=True)
if os.environ["RANK"] == "0":
    with socket.create_server(("", where[1])) as server:
        print(server.accept()[0].recv(100).decode())
else:
    for attempt in range(300):
        try:
            socket.create_connection(where).sendall(b"hello from 1")
            break
        except OSError:
            time.sleep(0.1)
"""
    watched = Watched(submit(cluster, job(cluster_image, code), nodes=2, timeout_s=60))
    events = cluster.api.get(cluster.api.path("events"))["items"]
    if any(event["reason"] == "MissingClusterDNS" for event in events):
        missing("this cluster has no DNS")
    assert watched.state == State("FINISHED", "all 2 pods ended with exit code 0", 0)
    assert sorted(watched.output) == ["[0] hello from 1", "[0] of 2", "[1] of 2"]
    assert {sentence[:15] for sentence in watched.told if "running" in sentence} == {
        "rank 0: running",
        "rank 1: running",
    }


@pytest.mark.slow
def test_a_failing_rank_stops_the_others(cluster: TestCluster, cluster_image: str) -> None:
    code = "import os, time\nif os.environ['RANK'] == '1': time.sleep(2); raise SystemExit(3)\n" + SLEEP_UNTIL_TERM
    watched = Watched(submit(cluster, job(cluster_image, code), nodes=2))
    assert watched.state == State("FAILED", "rank 1: the command failed with exit code 3", 3)
    assert watched.output == ["[0] ready", "[0] got TERM"]


def test_retries_of_several_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="'retries' is 1 and 'nodes' is 2; retries are for one node"):
        KubernetesTarget(Config("kubernetes", nodes=2, retries=1)).check()


# Another process


@pytest.mark.slow
def test_a_job_is_found_by_its_tags(cluster: TestCluster, cluster_image: str) -> None:
    submitted = submit(cluster, job(cluster_image, SLEEP_UNTIL_TERM))
    tags = {**submitted.tags, "something": "else"}
    assert set(submitted.tags) == {"mlproject.kube_context", "mlproject.kube_namespace", "mlproject.kube_job"}
    found = KubernetesTarget(Config("kubernetes")).find(tags)
    lines: list[str] = []
    deadline = time.monotonic() + 120
    while "ready" not in lines and time.monotonic() < deadline:
        lines.clear()
        found.logs(lines.append)
        time.sleep(0.1)
    assert lines == ["ready"]
    assert found.state().status == "RUNNING"
    watched = Watched(submitted, {"ready": [found.cancel]})
    assert watched.output == ["ready", "got TERM"]
    assert watched.state.status == "FAILED"  # as far as this process can know
    assert "someone deleted the Job" in watched.state.reason
    assert found.state() == State("KILLED", "cancelled")
    found.cancel()  # of a job that is gone: nothing
    found.clean_up()


def test_a_run_of_another_backend_is_not_found(api_server: ApiServer) -> None:
    with pytest.raises(JobError, match="was not sent to Kubernetes"):
        KubernetesTarget(Config("kubernetes")).find({})


# Secrets and variables


@pytest.mark.slow
def test_variables_arrive_as_they_are(cluster: TestCluster, cluster_image: str) -> None:
    env = {"A": "a", "LITERAL": "$(A) $$ $HOME $$(A) 'x' \"y\" ü\n2"}
    code = "import os; print(ascii(os.environ['LITERAL'])); print('$(A) $$')"
    watched = Watched(submit(cluster, job(cluster_image, code, env=env)))
    assert watched.output == [ascii(env["LITERAL"]), "$(A) $$"]


@pytest.mark.slow
def test_secrets_are_seen_by_the_job_alone(cluster: TestCluster, cluster_image: str) -> None:
    code = "import os; print(os.environ['PASSWORD'][::-1])"
    sent = job(cluster_image, code, secrets={"PASSWORD": "hush-77"})
    target = KubernetesTarget(Config("kubernetes"))
    assert "hush-77" not in json.dumps(target.render(sent))
    assert "hush-77" not in repr(sent)
    submitted = target.submit(sent)
    secret = cluster.api.get(cluster.api.path("secrets", sent.name))
    made = cluster.api.get(cluster.api.path("jobs", sent.name))
    assert "hush-77" not in json.dumps(made)
    assert secret["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    watched = Watched(submitted)
    assert watched.output == ["77-hsuh"]
    with pytest.raises(JobError, match="not found"):
        cluster.api.get(cluster.api.path("secrets", sent.name))


@pytest.mark.slow
def test_without_the_right_to_make_secrets_one_is_to_be_named(own_server: ApiServer, cluster_image: str) -> None:
    own_server.forbidden.add(("create", "secrets"))
    sent = job(cluster_image, secrets={"PASSWORD": "hush"})
    with pytest.raises(JobError, match=r'cannot create resource "secrets".*PASSWORD.*\'env-from-secret\'') as refusal:
        KubernetesTarget(Config("kubernetes")).submit(sent)
    assert "hush" not in str(refusal.value)
    assert own_server.made("jobs") == []


# Sending


def test_everything_is_tried_before_anything_is_sent(api_server: ApiServer) -> None:
    sent = job("image", secrets={"PASSWORD": "hush"})
    KubernetesTarget(Config("kubernetes", nodes=2)).submit(sent).clean_up()
    posts = [
        (one.path.rpartition("/")[2], "dryRun" in one.query) for one in api_server.requests if one.method == "POST"
    ]
    kinds = ["secrets", "services", "jobs"]
    assert posts == [(kind, True) for kind in kinds] + [(kind, False) for kind in kinds]
    assert all(one.query["fieldValidation"] == "Strict" for one in api_server.requests if one.method == "POST")


def test_nothing_is_left_of_a_job_that_is_refused_at_last(api_server: ApiServer) -> None:
    # Not in the dry run, whose query has more.
    api_server.faults = [Fault(422, "POST", "/jobs", query="?fieldValidation=Strict")]
    with pytest.raises(JobError, match="made to fail"):
        KubernetesTarget(Config("kubernetes", nodes=2)).submit(job("image", secrets={"PASSWORD": "hush"}))
    assert [api_server.store.list(kind)[0] for kind in ("jobs", "secrets", "services")] == [[], [], []]
    assert [len(api_server.made(kind)) for kind in ("jobs", "secrets", "services")] == [1, 1, 1]


def test_a_template_that_the_server_does_not_understand(api_server: ApiServer, tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text("{kind: Job, spec: {retryies: 3, template: {spec: {containers: [{name: main}]}}}}")
    target = KubernetesTarget(Config("kubernetes", kube_job_template_path=str(template)))
    with pytest.raises(JobError, match=r'strict decoding error: unknown field "spec\.retryies"'):
        target.submit(job("image"))


@pytest.mark.parametrize(
    ("text", "words"),
    [("kind: Pod", "holds a Pod; allowed: one Job"), ("[1, 2]", "holds a list; allowed"), ("{", "cannot be read: ")],
)
def test_a_template_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text(text)
    with pytest.raises(ConfigError, match=words) as refusal:
        KubernetesTarget(Config("kubernetes", kube_job_template_path=str(template))).render(job("image"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_server_that_is_not_well_is_asked_again(api_server: ApiServer, code: int) -> None:
    api_server.faults = [Fault(code, "POST", "/jobs", times=2)]
    KubernetesTarget(Config("kubernetes")).submit(job("image")).clean_up()
    assert len(api_server.store.list("jobs")[0]) == 1


@pytest.mark.parametrize("code", [429, 500, 503, 0])
def test_a_job_is_stopped_though_the_server_is_not_well(api_server: ApiServer, code: int) -> None:
    submitted = KubernetesTarget(Config("kubernetes")).submit(job("image"))
    if code:
        api_server.faults = [Fault(code, "DELETE", "/jobs/", times=2)]
    else:  # it refuses connections
        api_server.stop()
        threading.Timer(1, api_server.start).start()
    submitted.cancel()
    assert api_server.store.list("jobs")[0] == []
    submitted.clean_up()


def test_a_job_is_not_stopped_for_ever(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlproject_backends.job_watch.AWAY_S", 1)
    submitted = KubernetesTarget(Config("kubernetes")).submit(job("image"))
    api_server.stop()
    with pytest.raises(Unreachable, match="does not answer"):
        submitted.cancel()
    submitted.clean_up()


def test_the_namespace_is_the_configs_the_templates_or_the_contexts(api_server: ApiServer, tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text("{kind: Job, metadata: {namespace: of-the-template}}")
    path = str(template)
    for config, namespace in [
        (Config("kubernetes", namespace="named", kube_job_template_path=path), "named"),
        (Config("kubernetes", kube_job_template_path=path), "of-the-template"),
        (Config("kubernetes"), "ml"),
    ]:
        api_server.namespace = api_server.store.namespace = namespace
        target = KubernetesTarget(config)
        target.check()
        submitted = target.submit(job("image"))
        assert submitted.tags["mlproject.kube_namespace"] == namespace
        assert api_server.made("jobs")[-1]["metadata"]["namespace"] == namespace
        submitted.clean_up()


# Where nothing can be sent


def check(**config: Any) -> str:
    with pytest.raises((ConfigError, JobError)) as refusal:
        KubernetesTarget(Config("kubernetes", **config)).check()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert check().startswith(
        f"there is no kubeconfig at {tmp_path}/absent, and this is not inside a cluster; set KUBE"
    )


def test_a_kubeconfig_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text("{ no: [")
    monkeypatch.setenv("KUBECONFIG", str(path))
    assert check().startswith(f"the kubeconfig {path} cannot be read: ")


def test_a_wrong_context(api_server: ApiServer) -> None:
    assert check(kube_context="prod").endswith("has no context 'prod'; allowed: test")


def test_a_server_that_is_away(api_server: ApiServer) -> None:
    api_server.stop()
    with pytest.raises(Unreachable) as refusal:
        KubernetesTarget(Config("kubernetes")).check()
    assert str(refusal.value) == (
        f"the API server {api_server.url} of context 'test' does not answer (Connection refused)"
    )


def test_no_right_to_create_jobs(api_server: ApiServer) -> None:
    api_server.forbidden.add(("create", "jobs"))
    assert check().startswith("forbidden: this user may not create jobs in the namespace 'ml' of context 'test'; ask")


def test_an_unknown_user(api_server: ApiServer) -> None:
    api_server.faults = [Fault(401)]
    assert check() == "the API server does not know the user of context 'test'; log in again"


def test_a_missing_namespace(api_server: ApiServer) -> None:
    assert check(namespace="nowhere") == (
        "the namespace 'nowhere' does not exist in context 'test'; name another as 'namespace', or create it: "
        "kubectl create namespace nowhere"
    )
    api_server.forbidden.add(("get", "namespaces"))  # who may not ask whether it is there sees it when sending
    KubernetesTarget(Config("kubernetes", namespace="nowhere")).check()


def test_inside_a_cluster_no_kubeconfig_is_needed(
    api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    from mlproject_backends import cluster as module

    token, certificate, namespace = tmp_path / "token", tmp_path / "ca.crt", tmp_path / "namespace"
    token.write_text("token")
    certificate.write_text("certificate")
    namespace.write_text("own\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setattr(module, "_OWN_NAMESPACE", namespace)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api_server.port))
    found = module.Cluster.connect(None, None)
    assert (found.context, found.namespace) == ("in-cluster", "own")
    assert "mlproject.kube_context" not in SubmittedJob(found, "job", Config("kubernetes")).tags


# An API server that is not well while a job is watched


def numbers(watched: Watched) -> None:
    """The job printed 0 to 59: nothing is lost, nothing comes twice."""
    assert watched.state == State("FINISHED", "the command ended with exit code 0", 0)
    assert watched.output == [str(number) for number in range(60)]


@pytest.mark.slow
def test_connections_that_break_are_made_again(cluster: TestCluster, own_server: ApiServer, cluster_image: str) -> None:
    break_at = {str(number): [own_server.drop_connections] for number in (5, 17, 18, 40)}
    watched = Watched(submit(cluster, job(cluster_image, COUNT)), {**break_at})
    numbers(watched)
    assert not any("API server" in sentence for sentence in watched.told)  # not worth a word


@pytest.mark.slow
def test_a_server_that_forgot_its_history(cluster: TestCluster, own_server: ApiServer, cluster_image: str) -> None:
    def forget() -> None:
        own_server.store.forget()
        own_server.drop_connections()

    numbers(Watched(submit(cluster, job(cluster_image, COUNT)), {"10": [forget], "40": [forget]}))


@pytest.mark.slow
@pytest.mark.parametrize("code", [429, 500])
def test_errors_while_watching_only_delay(
    cluster: TestCluster, own_server: ApiServer, cluster_image: str, code: int
) -> None:
    def fail() -> None:
        own_server.faults = [Fault(code, "GET", path, times=2) for path in ("/jobs", "/pods", "/events", "/log")]
        own_server.drop_connections()

    watched = Watched(submit(cluster, job(cluster_image, COUNT)), {"10": [fail]})
    numbers(watched)
    told = [sentence for sentence in watched.told if "API server" in sentence]
    assert told[0].startswith(f"the API server is not well ({code}: made to fail")
    assert told[1:] == ["the API server answers again"]


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while(cluster: TestCluster, own_server: ApiServer, cluster_image: str) -> None:
    def go_away() -> None:
        own_server.stop()
        threading.Timer(6, own_server.start).start()

    watched = Watched(submit(cluster, job(cluster_image, COUNT)), {"10": [go_away]})
    numbers(watched)
    told = [sentence for sentence in watched.told if "API server" in sentence]
    assert re.match("the API server .* does not answer .*; the job goes on meanwhile", told[0])
    assert told[1:] == ["the API server answers again"]


@pytest.mark.slow
def test_a_server_that_stays_away(
    cluster: TestCluster, own_server: ApiServer, cluster_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlproject_backends.following.AWAY_S", 1)
    submitted = submit(cluster, job(cluster_image, SLEEP_UNTIL_TERM))
    with pytest.raises(Unreachable, match="does not answer"):
        Watched(submitted, {"ready": [own_server.stop]})
    with pytest.raises(Unreachable, match="does not answer"):
        submitted.state()
    own_server.start()
    assert submitted.state().status == "RUNNING"


@pytest.mark.slow
@pytest.mark.parametrize("right", [("get", "pods/log"), ("list", "events"), ("list", "pods")])
def test_less_rights_show_less(
    cluster: TestCluster, own_server: ApiServer, cluster_image: str, right: tuple[str, str]
) -> None:
    own_server.forbidden.add(right)
    submitted = submit(cluster, job(cluster_image))
    watched = Watched(submitted)
    assert watched.state.status == submitted.state().status == "FINISHED"
    assert watched.output == (["done"] if right[1] == "events" else [])
    assert sum(f'cannot {right[0]} resource "{right[1]}"' in sentence for sentence in watched.told) == 1


def test_who_may_not_look_at_jobs_is_told(api_server: ApiServer) -> None:
    submitted = KubernetesTarget(Config("kubernetes")).submit(job("image"))
    api_server.forbidden.add(("list", "jobs"))
    with pytest.raises(JobError, match='forbidden: User "tester" cannot list resource "jobs"'):
        submitted.watch(print, print)
    submitted.clean_up()


def test_a_job_without_a_pod_is_refused_by_a_quota(cluster: TestCluster, own_server: ApiServer) -> None:
    own_server.controller.refused = "exceeded quota: gpus, requested: pods=1, used: pods=4, limited: pods=4"  # type: ignore[attr-defined]
    watched = Watched(submit(cluster, job("image"), pending_timeout_s=1))
    assert watched.state.reason.startswith("the pod is refused: exceeded quota: gpus, requested: pods=1")
    assert own_server.store.list("jobs")[0] == []


def test_lines_of_a_log_that_is_read_again_come_once() -> None:
    entries = [f"2026-11-21T08:00:0{number // 4}.{number % 4 // 2}Z {number % 2}" for number in range(36)]
    entries += ["2026-11-21T08:00:09.5+02:00 same", "2026-11-21T08:00:09.5+02:00 same"]
    for broken in range(len(entries) + 1):
        lines = LogLines()
        first = [lines.new(entry) for entry in entries[:broken]]
        lines.again()
        since = lines.since().get("sinceTime", "")[:19]
        rest = [lines.new(entry) for entry in entries if entry[:19] >= since]
        assert [line for line in first + rest if line is not None] == [entry.split()[1] for entry in entries]
    assert lines.since() == {"sinceTime": "2026-11-21T08:00:09+02:00"}
    assert lines.new("unable to retrieve container logs for containerd://0123") is None
