"""The locks, conda.yaml and the Makefile say one thing, and what they say installs and fits together."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["requirements", "requirements-dev", "services/requirements", "tests/requirements"]


def locked(source: str) -> list[str]:
    """The requirements of a lock file, each with its `--hash` options, continuation lines joined."""
    return (ROOT / f"{source}.lock").read_text().replace("\\\n", " ").splitlines()


def requirement(line: str) -> Requirement:
    return Requirement(line.split("--hash")[0].strip())


@pytest.mark.parametrize("source", SOURCES)
def test_every_locked_requirement_is_an_exact_pin_with_hashes(source: str) -> None:
    for line in locked(source):
        assert re.fullmatch(r"==[^*]+", str(requirement(line).specifier)), line
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", line), line


@pytest.mark.parametrize("source", SOURCES)
def test_every_direct_requirement_is_locked(source: str) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / f"{source}.in").read_text().splitlines()]
    direct = {canonicalize_name(requirement(line).name) for line in lines if line and not line.startswith("-")}
    assert direct <= {canonicalize_name(requirement(line).name) for line in locked(source)}


@pytest.mark.parametrize("name", [*(f"{source}.lock" for source in SOURCES), "conda.yaml"])
def test_no_lock_names_an_address(name: str) -> None:
    assert not re.search(r"://|index-url|find-links|trusted-host", (ROOT / name).read_text())


def test_the_locks_agree_where_they_overlap() -> None:
    pins = [{(requirement(line).name, requirement(line).specifier) for line in locked(s)} for s in SOURCES]
    everything = set().union(*pins)
    assert len({name for name, _ in everything}) == len(everything)


def test_conda_yaml_holds_the_pins_of_the_lock() -> None:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    python, pip, section = conda["dependencies"]
    assert conda["channels"] == ["conda-forge"]
    assert python == "python=3.11"
    assert [Requirement(pin) for pin in section["pip"]] == [requirement(line) for line in locked("requirements")]
    assert Requirement(pip.replace("=", "==")) in [Requirement(pin) for pin in section["pip"]]


def test_mlflow_reads_conda_yaml_as_it_stands() -> None:
    """MLflow's own parser, used for uv and virtualenv, keeps Python, pip and every pin with its marker."""
    from mlflow.utils.environment import _PythonEnv

    environment = _PythonEnv.from_conda_yaml(str(ROOT / "conda.yaml"))
    pip = next(requirement(line) for line in locked("requirements") if line.startswith("pip=="))
    assert environment.python == "3.11"
    assert environment.build_dependencies == [str(pip)]
    assert len(environment.dependencies) == len(locked("requirements"))


def test_what_is_installed_is_what_is_locked() -> None:
    wrong = {}
    for line in [*locked("requirements"), *locked("requirements-dev")]:
        wanted = requirement(line)
        if wanted.marker is None or wanted.marker.evaluate():
            have = importlib.metadata.version(wanted.name)
            if have not in wanted.specifier:
                wrong[wanted.name] = have
    assert wrong == {}


def test_torch_and_torchvision_fit() -> None:
    """By torchvision's declaration, and by its operators: of two boxes that overlap by half, one stays."""
    import torch
    from torchvision.ops import nms

    wanted = [Requirement(text) for text in importlib.metadata.requires("torchvision") or []]
    torch_range = next(item.specifier for item in wanted if item.name == "torch")
    assert importlib.metadata.version("torch") in torch_range
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]


def test_make_alone_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    listed = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^make ([\w-]+) +\S", listed, re.MULTILINE)) == commands
    assert commands >= {"run", "test", "lint", "lock", "ui", "bench", "help"}


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make on a copy of the Makefile, away from this environment."""
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "--silent", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}
    )


def fake_python(folder: Path, version: str) -> str:
    """A stand-in at the process boundary: it answers only the question for the version."""
    script = folder / "python-stand-in"
    info = f"({version.replace('.', ', ')})"
    script.write_text(
        f"#!{Path(sys.executable).resolve()}\nimport sys\nsys.version, sys.version_info = '{version} (x)', {info}\n"
        "exec(sys.argv[2])\n"
    )
    script.chmod(0o755)
    return str(script)


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").touch()
    done = make(tmp_path, "run", f"PYTHON={fake_python(tmp_path, '3.10.4')}")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        f"error: Python 3.11 or later is needed, {tmp_path}/python-stand-in is 3.10.4; "
        "name another: make PYTHON=python3.12"
    ]
    assert not (tmp_path / ".venv").exists()


def test_a_missing_python_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").touch()
    done = make(tmp_path, "run", "PYTHON=python-that-is-not-here")
    assert "error: no python-that-is-not-here here; install Python 3.11 or later" in done.stdout + done.stderr


def test_a_half_made_environment_is_made_again(tmp_path: Path) -> None:
    """An install that fails leaves no stamp; the next one starts from nothing and leaves one."""
    folder = tmp_path / "with a space"
    folder.mkdir()
    lock = folder / "requirements.lock"
    lock.write_text("no-such-file-of-ours @ file:///nowhere/none-1.0-py3-none-any.whl --hash=sha256:" + "0" * 64 + "\n")
    python = f"PYTHON={shutil.which('python3')}"
    assert make(folder, ".venv/installed", python).returncode != 0
    assert not (folder / ".venv/installed").exists()
    left_over = folder / ".venv/lib/left-over"
    left_over.touch()
    lock.write_text("")
    done = make(folder, ".venv/installed", python)
    assert done.returncode == 0, done.stderr
    assert (folder / ".venv/installed").exists()
    assert not left_over.exists()
