"""Kubernetes for tests: a real cluster where TEST_KUBECONFIG names one, else the API server in this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from api_server import ApiServer


@pytest.fixture
def api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API server with nothing behind it; KUBECONFIG names it. Tests give it a controller."""
    server = ApiServer()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
    yield server
    server.stop()
