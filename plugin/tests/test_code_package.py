import gzip
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlproject_backends import ConfigError, code_package
from mlproject_backends.code_package import Ignored, pack, project_files


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "my project"
    write(folder, "MLproject", "train.py", "library/part.py")
    return folder


def test_a_git_checkout_gives_tracked_and_new_files_but_no_ignored_ones(project: Path) -> None:
    git(project, "init")
    write(project, ".gitignore", "umlaut ä.py", "new\nline.py", "data/large.bin", "gone.py")
    (project / ".gitignore").write_text("data/\n")
    git(project, "add", ".")
    (project / "gone.py").unlink()
    write(project, "untracked.py")
    expected = [".gitignore", "MLproject", "library/part.py", "new\nline.py", "train.py", "umlaut ä.py", "untracked.py"]
    assert sorted(project_files(project)) == expected


def test_without_git_all_files_count_but_environments_and_runs(project: Path) -> None:
    write(project, ".venv/bin/python", "mlruns/0/meta.yaml", "library/__pycache__/part.pyc", ".env.example")
    assert sorted(project_files(project)) == [".env.example", "MLproject", "library/part.py", "train.py"]


def test_a_project_inside_a_folder_that_git_ignores_is_walked(project: Path) -> None:
    git(project.parent, "init")
    write(project.parent, ".gitignore")
    (project.parent / ".gitignore").write_text("my project/\n")
    assert sorted(project_files(project)) == ["MLproject", "library/part.py", "train.py"]


def test_both_ignore_files_hold_but_never_for_the_mlproject(project: Path) -> None:
    write(project, "notes.md", "library/notes.md", "big.csv", "keep.csv")
    (project / ".dockerignore").write_text("# comment\n\n**/*.md\nMLproject\n.dockerignore\n")
    (project / ".mlprojectignore").write_text("*.csv\n!keep.csv\n.mlprojectignore\n")
    assert sorted(project_files(project)) == ["MLproject", "keep.csv", "library/part.py", "train.py"]


@pytest.mark.parametrize(
    ("rule", "name", "ignored"),
    [
        ("*.md", "README.md", True),
        ("*.md", "docs/README.md", False),  # Docker anchors at the root
        ("**/*.md", "docs/deep/README.md", True),
        ("docs", "docs/README.md", True),
        ("/docs/", "docs/README.md", True),
        ("docs/*", "docs/README.md", True),
        ("tes?", "test", True),
    ],
)
def test_ignore_rules_are_dockers(rule: str, name: str, ignored: bool) -> None:
    assert Ignored([rule])(name) is ignored


def test_the_archive_depends_on_names_and_contents_alone(project: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    before = pack(project, first)
    for path in project.rglob("*"):
        os.utime(path, (1, 1))
    (project / "train.py").chmod(0o600)
    assert pack(project, second).sha256 == before.sha256
    (project / "train.py").write_text("one more line")
    assert pack(project, second).sha256 != before.sha256


def test_the_archive_holds_what_was_there(project: Path, tmp_path: Path) -> None:
    (project / "run.sh").write_text("#!/bin/sh\n")
    (project / "run.sh").chmod(0o755)
    (project / "link.py").symlink_to("library/part.py")
    package = pack(project, tmp_path)
    with gzip.open(package.path) as unpacked, tarfile.open(fileobj=unpacked) as archive:
        assert archive.getnames() == list(package.files) == sorted(package.files)
        assert archive.getmember("run.sh").mode == 0o755
        assert archive.getmember("train.py").mode == 0o644
        assert archive.getmember("link.py").linkname == "library/part.py"
        assert {(member.uid, member.mtime, member.uname) for member in archive} == {(0, 0, "")}
        archive.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out/link.py").read_text() == "content of library/part.py"


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "library/../../secret"])
def test_a_link_out_of_the_project_is_refused(project: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (project / "link").symlink_to(target)
    with pytest.raises(ConfigError, match=r"'link' is a symlink to .*stay inside the project"):
        pack(project, tmp_path)


def test_a_large_project_is_refused_with_its_largest_files(project: Path, tmp_path: Path) -> None:
    for name, megabytes in (("a.bin", 60), ("b.bin", 50)):
        with (project / name).open("wb") as file:
            file.truncate(megabytes * 2**20)
    with pytest.raises(ConfigError, match=r"110 MB; allowed: 100 MB. The largest: a.bin \(60 MB\), b.bin \(50 MB\)"):
        pack(project, tmp_path)
    assert not (tmp_path / "code.tar.gz").exists()


@given(st.dictionaries(st.from_regex(r"[a-z][a-z ]{0,8}\.py", fullmatch=True), st.binary(max_size=50), max_size=6))
def test_unpacking_gives_back_every_file(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]) -> None:
    folder = tmp_path_factory.mktemp("any")
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for name, content in contents.items():
        (source / name).write_bytes(content)
    with tarfile.open(code_package.pack(source, folder).path) as archive:
        archive.extractall(target, filter="data")
    assert {path.name: path.read_bytes() for path in target.glob("*")} == contents
