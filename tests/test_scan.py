"""`make scan`: holes are told, and what was not looked up never passes as clean. The service it asks is a stand-in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from advisories import hole, scan

LOCKS = ("requirements.lock", "requirements-dev.lock", "services/requirements.lock", "tests/requirements.lock")


def test_every_package_of_every_lock_is_looked_up(advisories: Callable[..., str]) -> None:
    asked: set[str] = set()
    code, lines = scan(advisories(lambda name: asked.add(name) or {}))
    assert code == 0
    for lock in LOCKS:
        assert any(line.startswith(f"{lock}: ") and line.endswith("packages, no hole is known") for line in lines)
    assert {"torch", "mlflow", "psycopg2-binary", "pytest"} <= asked
    assert "not scanned: the packages in our images: Docker does not answer" in lines
    assert any(line.startswith("not scanned: the systems in the images mlflow-tracking-server, ") for line in lines)


def test_a_hole_is_told_with_the_release_that_mends_it(advisories: Callable[..., str]) -> None:
    code, lines = scan(advisories(lambda name: hole(name) if name == "sqlalchemy" else {}))
    assert code == 1
    (line,) = [line for line in lines if line.startswith("services/requirements.lock: ")]
    assert line.startswith("services/requirements.lock: sqlalchemy 2.")
    assert line.endswith(": GHSA-test, mended in 99.1")


@pytest.mark.parametrize("away", [True, False])
def test_without_an_answer_nothing_is_clean(away: bool, advisories: Callable[..., str]) -> None:
    code, lines = scan("http://127.0.0.1:1/v1/query" if away else advisories(lambda name: None))
    assert code == 2
    for lock in LOCKS:
        assert any(line.startswith(f"not scanned: {lock}: ") for line in lines)
    assert not any("no hole is known" in line for line in lines)
