"""`make lock`: a second time it changes nothing, and without a network it changes nothing either."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import missing

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the locks, of what they are made from, and of the script, in a path with a space."""
    if not (TOOLS / "uv").exists():
        missing("uv is not in this environment (make .venv/installed-dev)")
    folder = tmp_path / "a copy"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/lock.py", folder / ".ci")
    (folder / "plugin").mkdir()
    shutil.copy(ROOT / "plugin/pyproject.toml", folder / "plugin")
    for name in ("services", "tests"):
        (folder / name).mkdir()
    for path in [*ROOT.glob("requirements*"), *ROOT.glob("*/requirements*"), ROOT / "conda.yaml"]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def lock(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{TOOLS}:/usr/bin:/bin", **variables}
    environment.pop("CONDA_EXE", None)
    command = [sys.executable, str(folder / ".ci/lock.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Path -> (text, time of the last change) of every file; make looks at the times."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_text(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_locking_again_changes_nothing_and_says_why_there_is_no_conda_lock(folder: Path) -> None:
    before = contents(folder)
    done = lock(folder)
    if "error sending request" in done.stderr or "dns error" in done.stderr:
        missing("the package index cannot be reached")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "conda-lock.yml was not remade: there is no conda executable here\n"
    assert contents(folder) == before


def test_a_new_requirement_without_a_network_changes_no_file(folder: Path, tmp_path: Path) -> None:
    with (folder / "requirements.in").open("a") as file:
        file.write("requests-toolbelt\n")
    before = contents(folder)
    done = lock(folder, UV_OFFLINE="1", UV_CACHE_DIR=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert done.stderr.endswith("error: the locks could not be made, and no file was changed\n")
    assert contents(folder) == before


def test_conda_yaml_is_what_the_script_writes(folder: Path) -> None:
    """A hand-made change of conda.yaml is found here, not at the next `make lock`."""
    program = (
        "import pathlib, sys; sys.path.insert(0, '.ci'); from lock import conda_yaml;"
        "print(conda_yaml(pathlib.Path('requirements.lock').read_text()), end='')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout == (ROOT / "conda.yaml").read_text()
