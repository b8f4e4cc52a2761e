"""`make scan`: holes are told, and what was not looked up never passes as clean. The service it asks is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock", "services/requirements.lock", "tests/requirements.lock")
HOLE = {
    "id": "GHSA-test",
    "summary": "a hole",
    "affected": [
        {
            "package": {"name": "sqlalchemy", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
        }
    ],
}


@pytest.fixture
def service() -> Iterator[Callable[[Callable[[str], Any]], str]]:
    """Start a service with OSV's interface, which answers a package's name with a value, or with 500 for None."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[str], Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                value = answer(asked["package"]["name"])
                body = json.dumps(value).encode()
                self.send_response(500 if value is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever).start()
        return f"http://127.0.0.1:{server.server_port}/v1/query"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def scan(url: str) -> tuple[int, list[str]]:
    """Its exit code and lines."""
    command = [sys.executable, str(ROOT / ".ci/scan.py"), "--vulnerability-service", "osv", "--osv-url", url]
    without_trivy = {**os.environ, "PATH": ""}
    done = subprocess.run(command, env=without_trivy, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_every_package_of_every_lock_is_looked_up(service: Callable[..., str]) -> None:
    asked: set[str] = set()
    code, lines = scan(service(lambda name: asked.add(name) or {}))
    assert code == 0
    for lock in LOCKS:
        assert any(line.startswith(f"{lock}: ") and line.endswith("packages, no hole is known") for line in lines)
    assert {"torch", "mlflow", "psycopg2-binary", "pytest"} <= asked
    assert any(line.startswith("not scanned: the systems in the images mlflow-tracking-server, ") for line in lines)


def test_a_hole_is_told_with_the_release_that_mends_it(service: Callable[..., str]) -> None:
    code, lines = scan(service(lambda name: {"vulns": [HOLE]} if name == "sqlalchemy" else {}))
    assert code == 1
    (line,) = [line for line in lines if line.startswith("services/requirements.lock: ")]
    assert line.startswith("services/requirements.lock: sqlalchemy 2.")
    assert line.endswith(": GHSA-test, mended in 99.1")


@pytest.mark.parametrize("away", [True, False])
def test_without_an_answer_nothing_is_clean(away: bool, service: Callable[..., str]) -> None:
    code, lines = scan("http://127.0.0.1:1/v1/query" if away else service(lambda name: None))
    assert code == 2
    for lock in LOCKS:
        assert any(line.startswith(f"not scanned: {lock}: ") for line in lines)
    assert not any("no hole is known" in line for line in lines)
