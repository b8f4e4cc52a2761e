"""The documentation is true: legal commands, right tables and links, and two commands that do what they promise."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.cli import run as mlflow_run

from conftest import missing
from utils.settings import parse

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "plugin/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shell_lines(document: Path) -> list[str]:
    """The lines of a document's ```sh blocks."""
    blocks = [code for language, code in FENCE.findall(document.read_text()) if language == "sh"]
    return [line for block in blocks for line in block.splitlines() if line]


def quoted_commands() -> list[tuple[str, str]]:
    """Every command in the documents' ```sh blocks and `inline code` that this repository answers for."""
    found = []
    for document in DOCUMENTS:
        inline = re.findall(r"`([^`]+)`", FENCE.sub("", document.read_text()))
        for line in [*shell_lines(document), *(" ".join(code.split()) for code in inline)]:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words[:1] in (["make"], ["python"], ["torchrun"]) or words[:2] == ["mlflow", "run"] != words:
                found.append((document.relative_to(ROOT).as_posix(), shlex.join(words)))
    return found


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, assigned, _ = word.partition("=")
        assert re.search(rf"^{re.escape(name)} \?=" if assigned else rf"^{re.escape(name)}:", makefile, re.MULTILINE)


def settings_of(script: str) -> Any:
    return importlib.import_module(script.removesuffix(".py")).Settings


def check_script(script: str, flags: list[str]) -> None:
    if flags != ["--help"]:
        parse(settings_of(script), flags)


def check_mlflow_run(words: list[str]) -> None:
    """MLflow's own command line takes the words, and the script's own parser the command that comes out of them."""
    given = mlflow_run.make_context("mlflow run", list(words)).params
    entry_point = MLPROJECT["entry_points"][given["entry_point"]]
    parameters = dict(pair.split("=", 1) for pair in given["param_list"])
    assert parameters.keys() <= entry_point["parameters"].keys()
    check_script(entry_point["command"].split()[1], [f"--{name}={value}" for name, value in parameters.items()])


@pytest.mark.parametrize(("document", "command"), quoted_commands())
def test_a_quoted_command_is_legal(document: str, command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        check_make(words)
    elif program == "mlflow":
        check_mlflow_run(words[1:])
    else:
        script = next(place for place, word in enumerate(words) if word.endswith(".py"))
        check_script(words[script], words[script + 1 :])


def test_the_readme_quotes_every_make_target_and_entry_point() -> None:
    commands = " ".join(command for document, command in quoted_commands() if document == "README.md")
    assert all(f"make {target}" in commands for target in ("run", "test", "ui", "bench"))
    assert all(f"-e {name}" in commands for name in MLPROJECT["entry_points"] if name != "main")


def test_the_parameter_tables_say_what_mlproject_and_the_scripts_say() -> None:
    (tables,) = re.findall(r"<!-- parameters.*?-->(.*?)<!-- end", (ROOT / "README.md").read_text(), re.DOTALL)
    received = {}
    for section in tables.split("\n### ")[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", section, re.MULTILINE)
        received[section.split("`")[1]] = {name: (default.strip("` "), meaning) for name, default, meaning in rows}
    expected = {}
    for entry_point, spec in MLPROJECT["entry_points"].items():
        fields = settings_of(spec["command"].split()[1]).__dataclass_fields__
        expected[entry_point] = {
            name: (
                "(required)" if isinstance(parameter, str) else str(parameter["default"]),
                ": ".join(filter(None, [described["help"], ", ".join(f"`{c}`" for c in described["choices"] or ())])),
            )
            for name, parameter in spec["parameters"].items()
            for described in [fields[name].metadata]
        }
    assert received == expected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text())):
        if not link.startswith(("http://", "https://", "#")):
            assert (document.parent / link.split("#")[0]).exists(), link


def test_every_picture_is_shown_and_small() -> None:
    shown = set(re.findall(r"!\[[^]]+\]\((docs/images/[^)]+)\)", (ROOT / "README.md").read_text()))
    pictures = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in ROOT.glob("docs/images/*")}
    assert pictures.keys() == shown
    assert all(size <= 150_000 for size in pictures.values())


def newcomer_environment(home: Path) -> dict[str, str]:
    """The environment of someone who has just logged in: nothing of this test, its venv or MLflow.

    The home folder is new, so that what is written there shows; pip's settings and cache are the present ones.
    """
    present = Path.home()
    for shared in (".cache/pip", ".config/pip"):
        if (present / shared).is_dir():
            (home / shared).parent.mkdir(parents=True, exist_ok=True)
            (home / shared).symlink_to(present / shared)
    (home / "tmp").mkdir(parents=True)
    foreign = ("MLFLOW_", "PYTEST_", "PYTHON", "VIRTUAL_ENV", "CONDA", "MAKE", "MFLAGS", "ARGS", "AWS_", "XDG_")
    foreign += ("CI", "REQUIRE_ALL")  # both change what MLflow and the tests do
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not folder.startswith(sys.prefix)]
    return {**environment, "PATH": os.pathsep.join(path), "HOME": str(home), "TMPDIR": str(home / "tmp")}


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A fresh clone of what is committed, in a path with a space and a quote; removed afterwards (5 GB)."""
    inside = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--git-dir"], capture_output=True)
    if inside.returncode:
        missing("this copy is no git clone, so there is nothing to clone")
    clone = tmp_path / "a new place" / "the team's classifier"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    yield clone
    shutil.rmtree(clone)


KEPT = (".cache/matplotlib/", ".rustup/", "tmp/pytest-of-")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_two_commands_work_in_a_fresh_clone(clone: Path, tmp_path: Path) -> None:
    make_run, make_test = shell_lines(clone / "README.md")[:2]
    home = tmp_path / "home"
    environment = newcomer_environment(home)
    # All tests here would be this test within itself, and so on: one file stands for them.
    for command in (make_run, f"ARGS=tests/test_settings.py {make_test}"):
        done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert re.search(r"^=+ \d+ passed", done.stdout, re.MULTILINE)

    client = MlflowClient(f"sqlite:///{clone}/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/accuracy"] >= 0.98
    (model,) = client.search_logged_models(["0"])
    assert (model.source_run_id, model.status) == (run.info.run_id, "READY")
    assert list(clone.glob("mlruns/**/model.onnx"))

    # Everything it wrote is in the clone, where git ignores it.
    status = subprocess.run(["git", "-C", str(clone), "status", "--porcelain"], capture_output=True, text=True)
    assert (status.returncode, status.stdout) == (0, "")
    assert list(clone.parent.iterdir()) == [clone]
    # matplotlib keeps its list of fonts, pytest the folders of its last runs; pip asks for the version of Rust, and
    # rustup notes that it was asked.
    written = {path.relative_to(home).as_posix() for path in home.rglob("*") if not path.is_dir()}
    assert [path for path in written if not path.startswith(KEPT)] == []
