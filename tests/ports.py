"""Ports for servers under test."""

from __future__ import annotations

import secrets
import socket

FIRST, LAST = 10_000, 32_000
"""Below what the system gives to outgoing connections (32768 and up on Linux): a server that is away for a while, or
not started yet, finds its port free."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    while True:
        port = FIRST + secrets.randbelow(LAST - FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
