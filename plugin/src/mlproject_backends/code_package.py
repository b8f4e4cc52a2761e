"""The project's files as one archive whose bytes depend on them alone: what travels to a job in place of an image."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pathspec

from mlproject_backends import ConfigError

LIMIT_BYTES = 100 * 2**20
IGNORE_FILES = (".dockerignore", ".mlprojectignore")
# Never code, and large: what a walk without git must pass by.
_NEVER = (".git", "__pycache__", ".venv", "mlruns", "mlartifacts")


@dataclass(frozen=True)
class CodePackage:
    """An archive on disk, the SHA-256 of its bytes, and the files in it, relative and sorted."""

    path: Path
    sha256: str
    files: tuple[str, ...]


def pack(project: Path, folder: Path) -> CodePackage:
    """Write the project's files to `folder`/code.tar.gz: tar with names sorted, times zero, owners none.

    Raises:
        ConfigError: more than LIMIT_BYTES of files, or a symlink that leads out of the project.
    """
    files = sorted(project_files(project))
    _refuse_outside_links(project, files)
    _refuse_too_large(project, files)
    path = folder / "code.tar.gz"
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in files:
            archive.add(project / name, arcname=name, recursive=False, filter=_plain)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return CodePackage(path, digest, tuple(files))


def project_files(project: Path) -> list[str]:
    """Relative paths of the files and symlinks that belong to the project.

    In a git checkout these are the tracked and the untracked but not ignored ones, elsewhere all; without what
    .dockerignore and .mlprojectignore name. The MLproject itself always belongs.
    """
    found = _listed_by_git(project)
    if found is None:
        found = _walked(project)
    ignored = ignore_rules(project)
    return [
        name
        for name in dict.fromkeys(found)
        if (name.lower() == "mlproject" or not ignored(name)) and os.path.lexists(project / name)
    ]


def ignore_rules(project: Path) -> Ignored:
    return Ignored(
        line.strip()
        for name in IGNORE_FILES
        if (project / name).is_file()
        for line in (project / name).read_text().splitlines()
    )


class Ignored:
    """Docker's ignore rules: patterns from the root, `**` for any depth, `!` takes one back; the last match counts."""

    def __init__(self, lines: Iterable[str]):
        rules = (line for line in lines if line and not line.startswith("#"))
        # Docker anchors every pattern at the root, as gitignore does those with a slash in front.
        anchored = ("!" * rule.startswith("!") + "/" + rule.lstrip("!").strip().lstrip("/") for rule in rules)
        self._spec = pathspec.GitIgnoreSpec.from_lines(anchored)

    def __call__(self, name: str) -> bool:
        return self._spec.match_file(name)


def _listed_by_git(project: Path) -> list[str] | None:
    command = ["git", "-C", str(project), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    # A submodule is listed as a folder; its files are the submodule's own.
    names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    if not names:
        return None  # a folder that some outer checkout ignores
    submodules = [name for name in names if (project / name).is_dir() and not (project / name).is_symlink()]
    inside = [f"{folder}/{name}" for folder in submodules for name in _listed_by_git(project / folder) or []]
    return [name for name in names if name not in submodules] + inside


def _walked(project: Path) -> list[str]:
    def walk(folder: Path) -> Iterator[str]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name in _NEVER:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from walk(Path(entry.path))
            elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                yield str(PurePosixPath(Path(entry.path).relative_to(project)))

    return list(walk(project))


def _refuse_outside_links(project: Path, files: list[str]) -> None:
    root = project.resolve()
    for name in files:
        path = project / name
        if path.is_symlink() and (path.readlink().is_absolute() or not path.resolve().is_relative_to(root)):
            raise ConfigError(
                f"'{name}' is a symlink to {path.readlink()}, which a job does not have; allowed: relative links "
                f"that stay inside the project. Copy the file in, or name the link in .mlprojectignore"
            )


def _refuse_too_large(project: Path, files: list[str]) -> None:
    sizes = {name: (project / name).lstat().st_size for name in files}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MB)" for name in largest)
        raise ConfigError(
            f"the project's files are {total / 2**20:.0f} MB; allowed: {LIMIT_BYTES // 2**20} MB. "
            f"The largest: {named}. Name what a job does not need in .mlprojectignore"
        )


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
    member.mode = 0o755 if member.mode & 0o100 or not member.isfile() else 0o644
    return member
