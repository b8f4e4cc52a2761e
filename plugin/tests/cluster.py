"""Kubernetes for tests: a real cluster where TEST_KUBECONFIG names one, else the API server in this folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api_server import ApiServer
from job_controller import Containers
from mlproject_backends.cluster import Cluster


@pytest.fixture
def api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API server with nothing behind it; KUBECONFIG names it. Tests give it a controller."""
    server = ApiServer()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
    yield server
    server.stop()


@dataclass
class TestCluster:
    """A cluster that runs containers: what a user has to name, and what only a test may do."""

    __test__ = False  # for pytest: no tests in here

    kubeconfig: Path
    context: str
    namespace: str
    registry: str | None  # where its nodes pull from; None: they have the images of the local Docker engine
    server: ApiServer | None  # the one in this folder; None: a real one
    api: Cluster

    def delete_job(self, name: str) -> None:
        """What `kubectl delete job` does."""
        self.api.delete(self.api.path("jobs", name), propagationPolicy="Background")

    def jobs(self) -> set[str]:
        """The names of all Jobs that the plugin made."""
        found = self.api.get(self.api.path("jobs"), labelSelector="app.kubernetes.io/managed-by=mlproject-backends")
        return {job["metadata"]["name"] for job in found["items"]}

    def pods(self, job: str) -> list[dict[str, Any]]:
        found = self.api.get(self.api.path("pods"), labelSelector=f"batch.kubernetes.io/job-name={job}")
        items: list[dict[str, Any]] = found["items"]
        return items


@pytest.fixture
def cluster_image(cluster: TestCluster, base_image: str, engine: Any) -> str:
    """An image with Python that the cluster's nodes can run."""
    if cluster.registry is None:
        return base_image
    name = f"{cluster.registry}/mlproject-tests/{base_image}"
    engine.tag(base_image, name)
    for event in engine.push(name, stream=True, decode=True):
        assert "error" not in event, event["error"]
    return name


@pytest.fixture
def own_server(cluster: TestCluster) -> ApiServer:
    """The API server in this folder: what is done to it, nobody does to a real one."""
    if cluster.server is None:
        pytest.skip("a real cluster is not made to fail")
    return cluster.server


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[TestCluster]:
    """A cluster that runs containers; KUBECONFIG names it.

    A real one where TEST_KUBECONFIG names a kubeconfig: its current context and namespace are used, and TEST_REGISTRY
    (host:port) is where images are pushed. It should enforce the restricted Pod Security Standard.
    """
    real = os.environ.get("TEST_KUBECONFIG")
    if real:
        monkeypatch.setenv("KUBECONFIG", real)
        api = Cluster.connect(None, None)
        found = TestCluster(Path(real), api.context, api.namespace, os.environ.get("TEST_REGISTRY"), None, api)
        before = found.jobs()
        yield found
        for name in found.jobs() - before:
            found.delete_job(name)
        api.close()
        return
    containers = Containers(request.getfixturevalue("engine"))
    server = ApiServer(controller=containers, enforce="restricted")
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    api = Cluster.connect(None, None)
    yield TestCluster(kubeconfig, api.context, api.namespace, None, server, api)
    api.close()
    containers.close()
    server.stop()
