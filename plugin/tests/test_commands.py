"""`mlproject ...` and the comparison of runs."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

import in_process
from mlproject_backends import JobError
from mlproject_backends.cli import main
from venues import Venue, wait_for, wait_for_line


def mlproject(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def make_run(params: dict[str, Any], metrics: dict[str, list[float]], files: list[str], weights: str = "") -> str:
    client = MlflowClient()
    run_id: str = client.create_run("0").info.run_id
    for name, value in params.items():
        client.log_param(run_id, name, value)
    for name, values in metrics.items():
        for step, value in enumerate(values):
            client.log_metric(run_id, name, value, step=step)
    for name in files:
        client.log_text(run_id, "text", name)
    if weights:
        client.set_tag(run_id, "weights_sha256", weights)
    return run_id


def test_runs_that_agree(local_store: Path) -> None:
    params, metrics = {"epochs": 3}, {"loss": [0.5, 0.25], "epoch_s": [1.0]}
    left = make_run(params, metrics, ["checkpoints/latest.pt", "logs/job.log"], "abc")
    right = make_run(params, {**metrics, "epoch_s": [7.0], "system/cpu": [3.0]}, ["checkpoints/latest.pt"], "abc")
    done = mlproject("compare", left, right)
    assert (done.exit_code, done.output) == (0, "4 of 4 agree\n")
    everything = mlproject("compare", "--all", left, right).output.splitlines()
    assert [line.partition(":")[0] for line in everything[:-1]] == [
        "same    param epochs",
        "same    metric loss",
        "same    artifact checkpoints/latest.pt",
        "same    weights weights_sha256",
    ]


def test_each_difference_has_its_line(local_store: Path) -> None:
    left = make_run({"epochs": 3, "seed": 1}, {"loss": [0.5, 0.25]}, ["a.png", "b.png"], "abc")
    right = make_run({"epochs": 4}, {"loss": [0.75, 0.25]}, ["a.png"], "abd")
    done = mlproject("compare", left, right)
    assert done.exit_code == 1
    *lines, total = done.output.splitlines()
    assert total == "1 of 6 agree"
    assert [line.partition(":")[0] for line in lines] == [
        "DIFFERS param epochs",
        "DIFFERS param seed",
        "DIFFERS metric loss",
        "DIFFERS artifact b.png",
        "DIFFERS weights weights_sha256",
    ]
    assert "3 | 4" in lines[0]
    assert "1 | (absent)" in lines[1]


def test_a_run_that_does_not_exist_is_one_line(local_store: Path) -> None:
    for command in (["status"], ["logs"], ["cancel"]):
        done = mlproject(*command, "0" * 32)
        assert done.exit_code == 1
        assert done.output.startswith("Error: no run 00000000000000000000000000000000")
        assert len(done.output.splitlines()) == 1


def test_an_unknown_experiment_is_refused_with_the_known_ones(local_store: Path) -> None:
    done = mlproject("list", "--experiment", "absent")
    assert (done.exit_code, done.output) == (2, "Error: no experiment 'absent'; allowed: Default\n")


def test_status_logs_and_cancel_of_a_running_job(in_process_venue: Venue) -> None:
    job = in_process_venue.submit("sleep")
    wait_for_line(job, "ready")
    assert mlproject("status", job.run_id).output.startswith("RUNNING: ")
    assert "ready" in mlproject("logs", job.run_id).output.splitlines()
    (listed,) = mlproject("list").output.splitlines()
    assert listed.split()[:4] == [job.run_id, "RUNNING", "in-process", "sleep"]
    assert mlproject("cancel", job.run_id).output.startswith("KILLED: cancelled by ")
    assert mlproject("status", job.run_id).output.startswith("KILLED: cancelled by ")
    assert "got TERM" in mlproject("logs", job.run_id).output.splitlines()


def test_follow_ends_as_the_job_does(in_process_venue: Venue) -> None:
    job = in_process_venue.submit("fail")
    done = mlproject("logs", "--follow", job.run_id)
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == f"Error: run {job.run_id} failed: exit code 7"


@pytest.mark.parametrize("backend", ["docker", "kubernetes"])
def test_cancel_ends_a_run_whose_launcher_was_killed_before_it_sent_a_job(local_store: Path, backend: str) -> None:
    client = MlflowClient()
    run_id = client.create_run("0", tags={"mlproject.backend": backend}).info.run_id
    assert "was not sent" in mlproject("status", run_id).output
    done = mlproject("cancel", run_id)
    assert (done.exit_code, done.output.partition(" by ")[0]) == (0, "KILLED: cancelled")
    assert client.get_run(run_id).info.status == "KILLED"
    assert mlproject("status", run_id).output == done.output


def test_a_run_that_is_cancelled_while_its_job_is_sent_leaves_no_job(
    in_process_venue: Venue, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, sent = in_process.InProcessTarget.submit, []

    def cancelled(*arguments: Any) -> in_process.Process:
        sent.append(submit(*arguments))
        assert mlproject("cancel", in_process_venue.the_run().info.run_id).exit_code == 0
        return sent[0]

    monkeypatch.setattr(in_process.InProcessTarget, "submit", cancelled)
    with pytest.raises(JobError, match=r"was cancelled by .* before its job was sent"):
        in_process_venue.run("sleep")
    wait_for(lambda: sent[0].state().ended, "the job's end")
    assert sent[0].state().status == "KILLED"
    assert in_process_venue.the_run().info.status == "KILLED"


def test_an_ended_run_needs_its_engine_no_more(in_process_venue: Venue, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = in_process_venue.run().run_id
    monkeypatch.setattr(in_process.InProcessTarget, "started", {})  # as on a machine with another engine
    assert mlproject("status", run_id).output == "FINISHED: exit code 0\n"
    assert "c" in mlproject("logs", run_id).output.splitlines()
    assert mlproject("cancel", run_id).output == "FINISHED: exit code 0\n"


def test_a_run_that_could_not_be_sent_says_why(in_process_venue: Venue, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise JobError("no room")

    monkeypatch.setattr(in_process.InProcessTarget, "submit", refuse)
    with pytest.raises(JobError):
        in_process_venue.run()
    run_id = in_process_venue.the_run().info.run_id
    assert mlproject("status", run_id).output == "FAILED: the job was not sent: no room\n"


def test_the_run_of_another_backend_is_refused(local_store: Path) -> None:
    run_id = make_run({}, {}, [])
    done = mlproject("status", run_id)
    assert done.exit_code == 1
    assert "was not started by the docker or kubernetes backend" in done.output


def test_a_report_of_nothing_is_no_agreement(local_store: Path) -> None:
    done = mlproject("compare", make_run({}, {}, []), make_run({}, {}, []))
    assert (done.exit_code, done.output) == (1, "0 of 0 agree\n")
