"""A stand-in for the service that knows the holes, for the tests of `make scan`."""

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


def hole(package: str) -> dict[str, Any]:
    """The service's answer for a package with a hole that 99.1 mends."""
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}]
    affected = [{"package": {"name": package, "ecosystem": "PyPI"}, "ranges": ranges}]
    return {"vulns": [{"id": "GHSA-test", "summary": "a hole", "affected": affected}]}


@pytest.fixture
def advisories() -> Iterator[Callable[[Callable[[str], Any]], str]]:
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


def scan(url: str, **environment: str) -> tuple[int, list[str]]:
    """Its exit code and lines; without Docker and trivy, unless another PATH is given."""
    command = [sys.executable, str(ROOT / ".ci/scan.py"), "--vulnerability-service", "osv", "--osv-url", url]
    environment = {**os.environ, "PATH": "", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()
