"""The Kubernetes target: a job as a Job of the cluster that the kubeconfig names."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from mlproject_backends import ConfigError, JobError, NotSent, Unreachable
from mlproject_backends.cluster import IN_CLUSTER, Cluster, Refused
from mlproject_backends.config import Config
from mlproject_backends.following import LogLines
from mlproject_backends.job import Job, Output, State, Tell
from mlproject_backends.job_watch import JobWatch, delete, delete_job
from mlproject_backends.manifests import JOB_NAME, MAIN, Manifest, render
from mlproject_backends.status import (
    blocked_since,
    given_up,
    gone,
    has_log,
    kubernetes_obstacle,
    kubernetes_state,
    rank,
)

CONTEXT_TAG, NAMESPACE_TAG, JOB_TAG = "mlproject.kube_context", "mlproject.kube_namespace", "mlproject.kube_job"
_CLOCKS = timedelta(minutes=1)  # this machine's and the cluster's may differ, and a launcher that watches comes first
_PAUSES_S = (0.5, 1, 2, 4, 8)  # between the attempts to send something
_COLLECTION = {"Secret": "secrets", "Service": "services", "Job": "jobs"}


class KubernetesTarget:
    """Sends jobs to the context and namespace of a configuration, the current ones by default."""

    def __init__(self, config: Config):
        self._config = config

    def check(self) -> None:
        if self._config.nodes > 1 and self._config.retries:
            raise ConfigError(
                f"'retries' is {self._config.retries} and 'nodes' is {self._config.nodes}; retries are for one node, "
                "because a lost rank cannot rejoin the others: leave 'retries' out, and resume by a new run"
            )
        with contextlib.closing(self._connect()) as cluster:
            try:
                cluster.get(f"/api/v1/namespaces/{cluster.namespace}")
            except Refused as error:
                if error.status != 403:  # not everyone may ask
                    raise
            attributes = {"namespace": cluster.namespace, "verb": "create", "group": "batch", "resource": "jobs"}
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": attributes},
            }
            answer, _ = cluster.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
            if not answer["status"]["allowed"]:
                raise JobError(
                    f"forbidden: this user may not create jobs in the namespace '{cluster.namespace}' of context "
                    f"'{cluster.context}'; ask the cluster's administrator for that right, or name another namespace"
                )

    def render(self, job: Job) -> list[Manifest]:
        """The manifests, in the order of sending. Without a namespace where neither config nor template name one."""
        return render(job, self._config, self._template())

    def submit(self, job: Job) -> SubmittedJob:
        """Send the manifests after a dry run of them all; nothing is left of them where one is refused."""
        cluster, manifests, sent = self._connect(), self.render(job), False
        warnings: list[str] = []
        try:
            for manifest in manifests:
                _create(cluster, job, manifest, dryRun="All", fieldValidation="Strict")
            sent = True
            for manifest in manifests:
                made, warned = _create(cluster, job, manifest, fieldValidation="Strict")
                warnings += warned
        except BaseException:
            for kind in ("jobs", "services", "secrets") if sent else ():
                with contextlib.suppress(JobError):
                    delete(cluster, kind, job.name)
            cluster.close()
            raise
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job.name, "uid": made["metadata"]["uid"]}
        for manifest in manifests[:-1]:  # so that they go when the Job goes; clean_up() deletes them in any case
            with contextlib.suppress(JobError):
                path = cluster.path(_COLLECTION[manifest["kind"]], job.name)
                cluster.patch(path, {"metadata": {"ownerReferences": [owner]}})
        return SubmittedJob(cluster, job.name, warnings)

    def find(self, tags: Mapping[str, str]) -> SubmittedJob:
        """The Job that an earlier submit() sent."""
        if JOB_TAG not in tags:
            raise NotSent(f"the run has no tag {JOB_TAG}: it was not sent to Kubernetes")
        context = self._config.kube_context or tags.get(CONTEXT_TAG)
        return SubmittedJob(Cluster.connect(context, tags.get(NAMESPACE_TAG)), tags[JOB_TAG])

    def _connect(self) -> Cluster:
        namespace = self._config.namespace or self._template().get("metadata", {}).get("namespace")
        return Cluster.connect(self._config.kube_context, namespace)

    def _template(self) -> Manifest:
        path = self._config.kube_job_template_path
        if path is None:
            return {}
        try:
            template = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"'kube-job-template-path' {path} cannot be read: {' '.join(str(error).split())}"
            ) from None
        kind = template.get("kind") if isinstance(template, dict) else type(template).__name__
        if kind != "Job" or not isinstance(template.get("spec", {}), dict):
            raise ConfigError(f"'kube-job-template-path' {path} holds a {kind}; allowed: one Job of batch/v1")
        return dict(template)


class SubmittedJob:
    """A Job that was sent."""

    def __init__(self, cluster: Cluster, name: str, warnings: list[str] | None = None):
        self._cluster, self._name = cluster, name
        self._warnings = warnings or []
        self._cancelled = threading.Event()
        self._given_up = False
        self.tags: Mapping[str, str] = {JOB_TAG: name, NAMESPACE_TAG: cluster.namespace}
        if cluster.context != IN_CLUSTER:
            self.tags = {**self.tags, CONTEXT_TAG: cluster.context}

    def watch(self, tell: Tell, output: Output) -> State:
        for warning in dict.fromkeys(self._warnings):
            tell(f"the cluster warns: {warning}")
        return JobWatch(self._cluster, self._name, self._cancelled.is_set, tell, output).run()

    def state(self) -> State:
        try:
            job = self._cluster.get(self._cluster.path("jobs", self._name))
        except Refused as error:
            if error.status != 404:
                raise
            return State("KILLED", "cancelled") if self._cancelled.is_set() else gone(self._name)
        events = self._found("events", fieldSelector=f"involvedObject.name={self._name}")
        pods = self._pods()  # of their events, they themselves say enough
        state = kubernetes_state(job, pods, events)
        if state.status == "SCHEDULED" and (obstacle := kubernetes_obstacle(job, pods, events)):
            limit_s, failed = given_up(job, obstacle)
            waited = datetime.now(UTC) - blocked_since(job, pods)
            if waited > timedelta(seconds=limit_s) + _CLOCKS:
                self._given_up = True
                return failed
        return state

    def logs(self, output: Output) -> None:
        for pod in filter(has_log, self._pods()):
            prefix = "" if rank(pod) is None else f"[{rank(pod)}] "
            path, entries = self._cluster.path("pods", pod["metadata"]["name"]) + "/log", LogLines()
            with contextlib.suppress(Refused):  # a pod that went meanwhile took its log along
                for entry in self._cluster.lines(path, threading.Event(), 60, container=MAIN, timestamps="true"):
                    if (line := entries.new(entry)) is not None:
                        output(prefix + line)

    def cancel(self) -> None:
        self._cancelled.set()
        delete_job(self._cluster, self._name)

    def clean_up(self) -> None:
        """Delete the Secret and the Service; the Job stays for a day, or what its template says, to be looked at.

        One that was given up would wait for ever, and goes.
        """
        if self._given_up:
            with contextlib.suppress(JobError):
                delete_job(self._cluster, self._name)
        for kind in ("secrets", "services"):
            with contextlib.suppress(JobError):
                delete(self._cluster, kind, self._name)
        self._cluster.close()

    def _pods(self) -> list[dict[str, Any]]:
        pods = self._found("pods", labelSelector=f"{JOB_NAME}={self._name}")
        return sorted(pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], rank(pod) or ""))

    def _found(self, kind: str, **selector: str) -> list[dict[str, Any]]:
        """Objects of a kind; none where this user may not list them, for the Job says the most important by itself."""
        try:
            items: list[dict[str, Any]] = self._cluster.get(self._cluster.path(kind), **selector)["items"]
        except Refused as error:
            if error.status != 403:
                raise
            return []
        return items


def _create(cluster: Cluster, job: Job, manifest: Manifest, **parameters: str) -> tuple[dict[str, Any], list[str]]:
    """Create one object, again while the server is not well: a name that is taken then is our own first attempt's."""
    kind, path = manifest["kind"], cluster.path(_COLLECTION[manifest["kind"]])
    if kind == "Secret":
        manifest = {**manifest, "stringData": {name: job.secrets[name] for name in manifest["stringData"]}}
    manifest = {**manifest, "metadata": {**manifest["metadata"], "namespace": cluster.namespace}}
    for attempt in range(len(_PAUSES_S) + 1):
        try:
            return cluster.create(path, manifest, **parameters)
        except Unreachable:
            if attempt == len(_PAUSES_S):
                raise
            time.sleep(_PAUSES_S[attempt])
        except Refused as error:
            if error.status == 409 and attempt:
                return cluster.get(f"{path}/{job.name}"), []
            if kind == "Secret" and error.status == 403:
                names = ", ".join(manifest["stringData"])
                raise JobError(
                    f"{error}; or put {names} into a Secret yourself and name it in 'env-from-secret'"
                ) from error
            raise
    raise AssertionError("not reached")
