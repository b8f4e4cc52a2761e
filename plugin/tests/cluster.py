"""Kubernetes for tests: a real cluster where TEST_KUBECONFIG names one, else the API server in this folder."""

import ipaddress
import os
import socket
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
    host: str  # an address of this machine that pods can reach

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


def in_cluster(cluster: TestCluster, engine: Any, image: str) -> str:
    """The name under which the cluster's nodes find an image of the local Docker engine; pushed if need be."""
    if cluster.registry is None:
        return image
    name = f"{cluster.registry}/{image}"
    engine.tag(image, name)
    for event in engine.push(name, stream=True, decode=True):
        assert "error" not in event, event["error"]
    return name


@pytest.fixture
def cluster_image(cluster: TestCluster, base_image: str, engine: Any) -> str:
    """An image with Python that the cluster's nodes can run."""
    return in_cluster(cluster, engine, base_image)


def host_of_containers(engine: Any) -> str:
    """This machine's address in the network that containers are in."""
    (network,) = engine.inspect_network("bridge")["IPAM"]["Config"]
    return str(network.get("Gateway") or ipaddress.ip_network(network["Subnet"])[1])


def address_for_nodes() -> str:
    """The address that this machine's packets leave from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return os.environ.get("TEST_HOST") or str(probe.getsockname()[0])


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
    (host:port) is where images are pushed. It should enforce the restricted Pod Security Standard. TEST_HOST is an
    address of this machine that pods can reach, where it is not the one that its packets leave from.
    """
    real = os.environ.get("TEST_KUBECONFIG")
    if real:
        monkeypatch.setenv("KUBECONFIG", real)
        api = Cluster.connect(None, None)
        found = TestCluster(
            Path(real), api.context, api.namespace, os.environ.get("TEST_REGISTRY"), None, api, address_for_nodes()
        )
        before = found.jobs()
        yield found
        for name in found.jobs() - before:
            found.delete_job(name)
        api.close()
        return
    engine = request.getfixturevalue("engine")
    containers = Containers(engine)
    server = ApiServer(controller=containers, enforce="restricted")
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    api = Cluster.connect(None, None)
    yield TestCluster(kubeconfig, api.context, api.namespace, None, server, api, host_of_containers(engine))
    api.close()
    containers.close()
    server.stop()
