"""The process around an entry point: exit codes, one-line errors, no password in them."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_loader import DataError
from models import ModelError
from utils import RunFailed, UsageError
from utils.compute import Compute
from utils.runtime import Place, git_tags, launch, stop_requested, without_passwords

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.parametrize(("kind", "code"), [(DataError, 2), (ModelError, 2), (UsageError, 2), (RunFailed, 1)])
def test_an_error_for_the_user_is_one_line_and_its_code(
    kind: type[Exception], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(settings: object) -> None:
        raise kind("cannot reach https://ada:secret@mlflow.example.org:5000/api")

    monkeypatch.setattr("utils.runtime.parse", lambda settings_class: settings_class())
    with pytest.raises(SystemExit) as stop:
        launch(main, object)
    assert stop.value.code == code
    assert capsys.readouterr().err == "error: cannot reach https://mlflow.example.org:5000/api\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.runtime.parse", lambda settings_class: settings_class())
    with pytest.raises(ZeroDivisionError):
        launch(lambda settings: 1 / 0, object)  # type: ignore[arg-type, return-value]


def test_passwords_are_taken_out_of_addresses_only() -> None:
    text = "postgresql://u:p%40ss@db/x and s3://bucket/a@b, mail ada@example.org"
    assert without_passwords(text) == "postgresql://db/x and s3://bucket/a@b, mail ada@example.org"


def test_ctrl_c_exits_130_and_leaves_the_run_killed(project: Path, start: Start) -> None:
    import mlflow

    process = start("train.py", "--epochs=10000", cwd=project)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert "error: interrupted" in err
    assert mlflow.search_runs(search_all_experiments=True).status.tolist() == ["KILLED"]


def test_sigterm_is_seen_within_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requested() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_place_comes_from_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.from_environment() == Place(0, 0, 1)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    place = Place.from_environment()
    assert (place, place.leads) == (Place(5, 1, 8), False)


INTEL, AMD = {"cpu_name": "Intel Xeon"}, {"cpu_name": "AMD EPYC"}


@pytest.mark.parametrize(
    ("able", "precision"),
    [
        (INTEL | {"avx512_bf16": True, "amx_bf16": True}, "bf16"),
        (INTEL | {"avx512_bf16": True, "amx_bf16": False}, "fp32"),
        (AMD | {"avx512_bf16": True}, "bf16"),
        (AMD | {"avx512_bf16": False}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_precision_auto_is_bf16_where_the_processor_is_faster_at_it(
    able: dict[str, object], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    assert Compute.pick("cpu", "auto").precision == precision
    assert Compute.pick("cpu", "fp32").precision == "fp32"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Of 160,000 pages that are used again, hardly any is cleared anew; by default, most often, all of them are."""
    code = """
import resource, torch
from utils.compute import keep_freed_memory
keep_freed_memory()
def step():
    held = [torch.ones(2**21) for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000


def test_half_a_group_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two'"):
        Place.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(UsageError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"),
        Compute.pick("cpu", "fp32").processes(),
    ):
        pass


def test_outside_a_checkout_the_launcher_tells_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_tags(tmp_path) == {}
    monkeypatch.setenv("MLPROJECT_GIT_COMMIT", "a" * 40)
    monkeypatch.setenv("MLPROJECT_GIT_DIRTY", "true")
    assert git_tags(tmp_path) == {"git_commit": "a" * 40, "git_dirty": "true"}
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    commit = ["git", "-C", tmp_path, *identity, "commit", "--quiet", "--allow-empty", "-m", "first"]
    subprocess.run(commit, check=True)
    here = git_tags(tmp_path)
    assert here["git_commit"] != "a" * 40, "a checkout is its own witness"
    assert here["git_dirty"] == "false"
