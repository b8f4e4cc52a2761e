"""What every target owes its user, tried on each of them through MLflow's own interface."""

import _thread
import hashlib
import re
import shlex
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import ExecutionException

from mlproject_backends import ConfigError, JobError
from mlproject_backends.job_run import JobRun
from venues import PROJECT, Venue, wait_for, wait_for_line

VENUES = ["in_process", *(pytest.param(name, marks=pytest.mark.slow) for name in ("docker", "kubernetes"))]


@pytest.fixture(params=VENUES)
def venue(request: pytest.FixtureRequest) -> Venue:
    found: Venue = request.getfixturevalue(f"{request.param}_venue")
    return found


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:12]


def test_the_command_means_what_it_means_in_a_local_shell(venue: Venue, capfd: pytest.CaptureFixture[str]) -> None:
    done = venue.run(who='O\'Neil & "friends" $HOME')
    printed = capfd.readouterr().out.splitlines()
    expected = ['hello  two spaces O\'Neil & "friends" $HOME', "c", "b", "a", "to stderr"]
    assert [line for line in printed if line in expected] == expected
    run = venue.client.get_run(done.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"who": shlex.quote('O\'Neil & "friends" $HOME')}
    assert [line for line in venue.log_of(done.run_id) if line in expected] == expected
    assert run.data.tags["mlflow.project.backend"].endswith(venue.backend)
    assert done.get_status() == "FINISHED"
    assert done.wait()


def test_a_failing_command_fails_the_run_with_its_exit_code(venue: Venue) -> None:
    with pytest.raises(ExecutionException, match="exit code 7") as failure:
        venue.run("fail")
    run = venue.the_run()
    assert run.info.run_id in str(failure.value)
    assert (run.info.status, run.data.tags["mlproject.exit_code"]) == ("FAILED", "7")
    assert "exit code 7" in run.data.tags["mlproject.reason"]
    assert "before" in venue.log_of(run.info.run_id)


def test_what_the_command_logs_is_on_the_run(venue: Venue) -> None:
    run_id = venue.run("metric").run_id
    run = venue.client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"answer": 42})
    names = {item.path for item in venue.client.list_artifacts(run_id)}
    assert names == {"code", "logs", "note.txt"}
    package = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="code/code.tar.gz")
    assert hashlib.sha256(Path(package).read_bytes()).hexdigest() == run.data.tags["mlproject.code_sha256"]


def test_the_environment_arrives_and_secrets_stay_secret(
    venue: Venue, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {
        "AWS_ACCESS_KEY_ID": "key-6d1c",
        "AWS_SECRET_ACCESS_KEY": "secret/9f3+a",
        "AWS_SESSION_TOKEN": "token-77b2",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "TEST_COPIED": "from here",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    done = venue.run("environment", {"env": {"TEST_GIVEN": "given $HOME", "TEST_PASSWORD": "pass-1f0e"}})
    first = capfd.readouterr()
    seen = dict(line.split() for line in first.out.splitlines() if re.fullmatch(r"[A-Z_0-9]+ [0-9a-f]{12}", line))
    expected = {**values, "TEST_GIVEN": "given $HOME", "TEST_PASSWORD": "pass-1f0e", "MLFLOW_RUN_ID": done.run_id}
    del expected["TEST_COPIED"]  # named by nobody
    assert {name: seen.get(name) for name in expected} == {name: digest(value) for name, value in expected.items()}
    assert "TEST_COPIED" not in seen
    run = venue.client.get_run(done.run_id)
    everything = "\n".join([first.out, first.err, *venue.log_of(done.run_id), str(run.data.tags), str(run.data.params)])
    for secret in ("secret/9f3+a", "token-77b2", "pass-1f0e"):
        assert secret not in everything


def test_a_variable_to_copy_that_is_not_set_is_refused(venue: Venue) -> None:
    with pytest.raises(ConfigError, match="TEST_ABSENT, which is not set here"):
        venue.run("environment", {"env": ["TEST_ABSENT"]})
    assert venue.runs() == []


def test_a_path_in_the_project_is_found_in_the_job(venue: Venue, capfd: pytest.CaptureFixture[str]) -> None:
    venue.run("read", file=str(PROJECT / "some data.txt"))
    assert "some data" in capfd.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("file", "message"), [("/etc/hostname", "which a job does not have"), ("absent.csv", "there is no .*absent.csv")]
)
def test_a_path_that_the_job_would_not_have_is_refused(venue: Venue, file: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        venue.run("read", file=file)
    assert refusal.value.exit_code == 2
    assert venue.runs() == []


def test_a_detached_job_is_settled_by_whoever_asks(venue: Venue) -> None:
    run_id = venue.submit().run_id
    assert venue.client.get_run(run_id).info.status == "RUNNING"
    found = JobRun.find(run_id, venue.client)
    wait_for(lambda: found.state().ended, "the job's end")
    run = venue.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "c" in venue.log_of(run_id)
    assert JobRun.find(run_id, venue.client).settled


def test_a_detached_job_can_be_followed(venue: Venue, capfd: pytest.CaptureFixture[str]) -> None:
    run_id = venue.submit("sleep", seconds="3").run_id
    state = JobRun.find(run_id, venue.client).follow()
    assert state.status == "FINISHED"
    printed = capfd.readouterr().out.splitlines()
    assert [line for line in printed if line in ("ready", "slept")] == ["ready", "slept"]


def test_cancel_stops_the_job_and_says_so(venue: Venue) -> None:
    job = venue.submit("sleep")
    wait_for_line(job, "ready")
    JobRun.find(job.run_id, venue.client).cancel()
    run = venue.client.get_run(job.run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlproject.reason"].startswith("cancelled by ")
    assert "got TERM" in venue.log_of(job.run_id)
    JobRun.find(job.run_id, venue.client).cancel()  # once more does nothing
    assert venue.client.get_run(job.run_id).info.status == "KILLED"


def test_ctrl_c_stops_the_job_and_keeps_its_last_words(venue: Venue) -> None:
    job = venue.submit("sleep")
    with pytest.raises(KeyboardInterrupt):
        job.follow(show=lambda line: _thread.interrupt_main() if line == "ready" else None)
    run = venue.client.get_run(job.run_id)
    assert (run.info.status, run.data.tags["mlproject.reason"]) == ("KILLED", "stopped by Ctrl-C")
    assert "got TERM" in venue.log_of(job.run_id)


def test_a_job_is_stopped_at_its_time_limit(venue: Venue) -> None:
    with pytest.raises(ExecutionException, match=r"timeout-s|time limit of 3 s"):
        venue.run("sleep", {"timeout-s": 3})
    assert venue.the_run().info.status == "FAILED"
    assert "ready" in venue.log_of(venue.the_run().info.run_id)


def test_a_job_that_vanished_has_failed(venue: Venue) -> None:
    job = venue.submit("sleep")
    wait_for_line(job, "ready")
    venue.remove(venue.client.get_run(job.run_id))
    state = JobRun.find(job.run_id, venue.client).state()
    assert state.status == "FAILED"
    assert venue.client.get_run(job.run_id).info.status == "FAILED"


def test_the_log_of_a_job_that_vanished_is_kept(venue: Venue) -> None:
    job = venue.submit("sleep")
    with pytest.raises(KeyboardInterrupt):  # which stores what there is
        job.follow(stop_on_interrupt=False, show=lambda line: _thread.interrupt_main() if line == "ready" else None)
    assert "ready" in venue.log_of(job.run_id)
    venue.remove(venue.client.get_run(job.run_id))
    assert JobRun.find(job.run_id, venue.client).state().status == "FAILED"
    assert "ready" in venue.log_of(job.run_id)


def test_a_code_package_that_was_changed_is_not_run(venue: Venue, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = "mlproject_backends.backend.pack"
    from mlproject_backends.code_package import CodePackage, pack

    def tampered(project: Path, folder: Path) -> CodePackage:
        package = pack(project, folder)
        return CodePackage(package.path, "0" * 64, package.files)

    monkeypatch.setattr(packed, tampered)
    with pytest.raises(ExecutionException, match="someone changed it"):
        venue.run()
    assert venue.the_run().info.status == "FAILED"


def test_a_run_of_another_backend_has_no_job(venue: Venue) -> None:
    run = venue.client.create_run("0")
    with pytest.raises(JobError, match="was not started by"):
        JobRun.find(run.info.run_id, venue.client)
