"""A run and its job where one of the two cannot be reached, on the plainest target."""

from dataclasses import replace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import in_process
from mlproject_backends import JobError
from mlproject_backends.job_run import JobRun
from venues import Server, Venue, wait_for, wait_for_line


def test_a_job_whose_run_cannot_be_tagged_is_stopped(in_process_venue: Venue, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, sent = in_process.InProcessTarget.submit, []

    def tagged(*arguments: Any) -> in_process.Process:
        sent.append(submit(*arguments))
        sent[0].tags["refused!"] = "by the tracking store"
        return sent[0]

    monkeypatch.setattr(in_process.InProcessTarget, "submit", tagged)
    with pytest.raises(MlflowException, match="refused!"):
        in_process_venue.run("sleep")
    wait_for(lambda: sent[0].state().ended, "the job's end", timeout_s=30)
    assert sent[0].state().status == "KILLED"
    assert in_process_venue.the_run().info.status == "FAILED"


def test_a_job_is_stopped_though_the_tracking_server_is_away(
    in_process_venue: Venue, loopback_server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    venue = replace(in_process_venue, client=MlflowClient())
    job = venue.submit("sleep")
    wait_for_line(job, "ready")
    loopback_server.stop()
    with pytest.raises(MlflowException):  # the run cannot be ended now
        job.cancel()
    assert "the run cannot be told that it was cancelled by" in capfd.readouterr().err
    loopback_server.start()
    assert JobRun.find(job.run_id, venue.client).state().status == "KILLED"
    assert "got TERM" in venue.log_of(job.run_id)


def test_a_job_that_cannot_be_cleaned_up_has_ended_as_it_did(
    in_process_venue: Venue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clean_up(*arguments: Any) -> None:
        raise JobError("the Docker engine refused to remove container 0123: removal is already in progress")

    monkeypatch.setattr(in_process.Process, "clean_up", clean_up)
    assert in_process_venue.run().get_status() == "FINISHED"
    assert in_process_venue.the_run().info.status == "FINISHED"
