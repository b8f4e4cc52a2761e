"""A run's venue, its name, and the command in its description, which is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.utils.name_utils import _generate_random_name
from tracking_server import ROOT

import evaluate
import train
from conftest import missing
from utils import provenance
from utils.provenance import Origin

PROJECT = {"mlflow.project.entryPoint": "main"}


def words(lines: str) -> list[str]:
    """What a shell makes of some lines."""
    printed = subprocess.run(
        ["bash", "-c", f'git() {{ printf "%s\\0" git "$@"; }}; mlflow() {{ printf "%s\\0" mlflow "$@"; }};'
         f'python() {{ printf "%s\\0" python "$@"; }}; {lines}'], capture_output=True, text=True, check=True
    )  # fmt: skip
    return printed.stdout.split("\0")[:-1]


def of(settings: object, **facts: object) -> Origin:
    known = {"entry_point": "main", "venue": "local", "tags": {}, "params": {}}
    return Origin(settings, **{**known, **facts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "cfg", "folder", "expected"),
    [
        ("mlflow-" + "0" * 40, "home = /usr/bin\nuv = 0.9.1\n", "", "uv"),
        ("mlflow-" + "0" * 40, "home = /usr/bin\nversion = 3.11.7\n", "", "virtualenv"),
        (".venv", "home = /usr\nvirtualenv = 20.30.0\n", "", "virtualenv"),
        (".venv", "command = python -m venv /uv = x\n", "", "local"),
        ("mlflow-env", "", "conda-meta", "conda"),
        ("usr", "", "", "local"),
    ],
)
def test_an_environment_is_known_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cfg: str, folder: str, expected: str
) -> None:
    prefix = tmp_path / name
    (prefix / folder).mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    if cfg:
        (prefix / "pyvenv.cfg").write_text(cfg)
    assert provenance.venue(PROJECT) == expected


def test_a_container_is_known_by_its_marks_and_not_where_mlflow_run_started_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(provenance, "_SERVICE_ACCOUNT", tmp_path / "serviceaccount")
    monkeypatch.setattr(provenance, "_CONTAINER_MARKS", (tmp_path / ".dockerenv",))
    job = {**PROJECT, "mlflow.project.env": "docker"}
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert {provenance.venue(tags) for tags in ({}, PROJECT, job)} == {"local"}
    (tmp_path / ".dockerenv").touch()
    assert [provenance.venue(tags) for tags in ({}, PROJECT, job)] == ["docker", "local", "docker"]
    (tmp_path / "serviceaccount").mkdir()
    assert [provenance.venue(tags) for tags in ({}, PROJECT, job)] == ["kubernetes", "local", "kubernetes"]
    (tmp_path / "serviceaccount").rmdir()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert provenance.venue(job) == "kubernetes"


def test_only_a_name_that_mlflow_made_up_is_replaced() -> None:
    for _ in range(200):
        name = _generate_random_name()
        if len(name) < 20:  # a longer one is cut
            assert provenance.run_name(name, ("mnist", "cnn"), "docker") == "mnist-cnn-docker"
    for chosen in ("digits-cnn-3", "my run", "bold-ant", "mnist-cnn-docker"):
        assert provenance.run_name(chosen, ("mnist", "cnn"), "uv") == chosen


def test_names_are_short() -> None:
    addresses = [
        "runs:/0123456789abcdef/model",
        "models:/digits@champion",
        "models:/digits/3",
        "/data/photos/",
        "a.npz",
    ]
    assert list(map(provenance.short, addresses)) == ["01234567", "digits@champion", "digits-v3", "photos", "a"]
    assert provenance.short("s3://key:secret@bucket/set") == "set"


@pytest.mark.parametrize("awkward", ["it's", "a b", "$HOME", "`id`", "x;rm", '"', "ä\\", "```", "#", ""])
def test_the_reproduction_survives_the_shell_and_leaves_the_registry_alone(awkward: str) -> None:
    settings = evaluate.Settings(model_uri=awkward, min_accuracy=1e-05)
    lines = of(settings, entry_point="evaluate", tags={"git_commit": "c" * 40}).reproduction()
    assert words(lines)[:3] == ["git", "checkout", "c" * 40]
    expected = [
        "--env-manager",
        "local",
        ".",
        "-e",
        "evaluate",
        "-P",
        f"model_uri={awkward}",
        "-P",
        "min_accuracy=1e-05",
    ]
    assert words(lines)[3:] == ["mlflow", "run", *expected]


@pytest.mark.parametrize(
    ("venue", "options"),
    [
        ("docker", "--backend docker"),
        ("kubernetes", "--backend kubernetes --backend-config kubernetes_config.json"),
        ("uv", "--env-manager uv"),
        ("conda", "--env-manager conda"),
    ],
)
def test_the_reproduction_goes_where_the_run_was(venue: str, options: str) -> None:
    assert of(train.Settings(epochs=3), venue=venue).reproduction() == f"mlflow run {options} . -P epochs=3"


def test_a_group_of_processes_is_started_again_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert of(train.Settings(epochs=3)).reproduction() == "torchrun --nproc-per-node 2 train.py --epochs=3"
    assert of(train.Settings(), venue="docker").reproduction() == "mlflow run --backend docker ."


def test_a_description_holds_no_password_and_says_what_is_not_the_same() -> None:
    settings = train.Settings(dataset="s3://key:secret@bucket/set", epochs=3)
    params = {"epochs": "2", "learning_rate": "1e-2", "resume": "''", "dataset": settings.dataset}
    tags = {"git_commit": "c" * 40, "git_dirty": "true", "mlflow.source.git.repoURL": "https://ada:token@host/r.git"}
    text = of(settings, params=params, tags=tags).markdown("result")
    assert not {"secret", "token"} & set(re.findall(r"\w+", text))
    assert "a clone of https://host/r.git" in text
    assert "The run was begun with other settings (epochs=2) and went on" in text
    assert "The files differed" in text


@pytest.mark.slow
def test_the_command_in_the_description_makes_the_same_weights(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        missing("this copy is no git clone, so there is no commit to go back to")
    clone = tmp_path / "a clone"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "plugin/", "benchmarks/")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{clone}/mlflow.db"}

    def shell(command: str) -> str:
        options = {"cwd": clone, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(["bash", "-ec", command], **options)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    commit = "git -c user.name=T -c user.email=t@localhost commit --quiet --message=first"
    shell(f"git init --quiet && git add --all && {commit}")
    shell(
        "mlflow run --env-manager local . -P epochs=2 -P learning_rate=5e-3 -P data_dir='my data' -P register_as=digits"
    )
    shell(
        "echo '# later' >> train.py && git add --all && git -c user.name=T -c user.email=t@localhost commit -qm second"
    )
    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    (first,) = client.search_runs(["0"])
    assert first.info.run_name == f"digits-cnn-{first.data.tags['venue']}"
    description = first.data.tags["mlflow.note.content"]
    reproduction, made_by = re.findall(r"```sh\n(.*?)\n```", description, re.DOTALL)
    assert {"--dataset=digits", "--data_dir=my data", "--epochs=2"} <= set(words(made_by))
    assert words(made_by)[:2] == ["python", "train.py"]
    shell(reproduction)
    again, _ = client.search_runs(["0"])
    assert again.info.run_id != first.info.run_id
    assert again.data.tags["weights_sha256"] == first.data.tags["weights_sha256"]
    assert again.data.tags["git_commit"] == first.data.tags["git_commit"] == shell("git rev-parse HEAD").strip()
    assert again.data.tags["mlflow.note.content"].startswith("Test accuracy")
    assert len(client.search_model_versions("name = 'digits'")) == 1, "it registers nothing"
