"""Fixtures of the plugin's tests. They start what they need for real: an engine, a registry, a tracking server."""

import os
import signal
from pathlib import Path
from typing import NoReturn

import pytest

pytest_plugins = ["engine", "cluster", "venues", "object_storage"]

PROJECTS = Path(__file__).parent / "projects"


def pytest_configure() -> None:
    """What a shell without job control starts in the background ignores Ctrl-C, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(reason: str) -> NoReturn:
    """Skip a test for want of something on this machine; with REQUIRE_ALL=1 that is a failure."""
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(f"REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason)
