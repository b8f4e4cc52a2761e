"""The program that runs first in a container, function by function; its whole way is in the contract."""

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from mlproject_backends import inside


@pytest.fixture
def no_dns(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")


@pytest.fixture
def run_id(local_store: Any) -> str:
    return str(MlflowClient().create_run("0").info.run_id)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: str, job: str = "job-1") -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("MASTER_ADDR", f"{job}-0.{job}")


def test_without_dns_the_ranks_meet_by_the_run(monkeypatch: pytest.MonkeyPatch, no_dns: None, run_id: str) -> None:
    for rank in ("0", "1"):
        as_rank(monkeypatch, rank)
        inside.find_master(MlflowClient(), run_id)
        assert os.environ["MASTER_ADDR"] == "10.1.2.3"


def test_where_an_earlier_job_of_the_run_was_does_not_count(
    monkeypatch: pytest.MonkeyPatch, no_dns: None, run_id: str
) -> None:
    as_rank(monkeypatch, "0", "job-1")
    inside.find_master(MlflowClient(), run_id)
    as_rank(monkeypatch, "1", "job-2")
    monkeypatch.setattr(inside, "RANKS_S", 0)
    with pytest.raises(inside.CannotStart, match="rank 0 did not start within 0 s"):
        inside.find_master(MlflowClient(), run_id)


def test_a_name_that_resolves_is_left_alone(monkeypatch: pytest.MonkeyPatch, run_id: str) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    inside.find_master(MlflowClient(), run_id)
    assert os.environ["MASTER_ADDR"] == "localhost"


def test_one_node_needs_no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    inside.find_master(SimpleNamespace(), "no run is asked")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@db/mlflow", "postgresql://db/mlflow"),
        ("s3://bucket/path", "s3://bucket/path"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_passwords_in_addresses_are_not_shown(text: str, shown: str) -> None:
    assert inside.without_password(text) == shown
