"""What a git repository with DVC holds at a commit, through DVC's Python API; no git executable is needed.

Every file is held against the hash that DVC recorded for it, and every listing of a folder against its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from data_loader import DataError, Unreachable, s3

CONNECT_TIMEOUT_S, READ_TIMEOUT_S, ROUNDS = 5, 10, 2  # in each round botocore tries five times
NAMED_IN_ERRORS = 10


@dataclass(frozen=True)
class TrackedFile:
    """path: from the repository's root; algorithm: md5, md5-dos2unix (DVC's before 3.0), or git for git's own files."""

    path: str
    algorithm: str
    hash: str
    info: dict[str, Any] = field(repr=False)

    @property
    def identity(self) -> str:
        return f"{self.algorithm} {self.hash}"


@dataclass(frozen=True)
class Tree:
    """version: what the user called the commit; commit: its full hash; fs: DVC's file system of it."""

    version: str
    commit: str
    fs: Any

    def top(self) -> list[str]:
        """The names at the root that are not hidden."""
        return sorted(name for path in self.fs.ls("/", detail=False) if not (name := path.lstrip("/")).startswith("."))

    def files(self, path: str) -> dict[str, TrackedFile]:
        """The files at and below a path, by their names below it (a single file by its own name).

        Raises FileNotFoundError if there is none, DataError if a listing cannot be had or is not the one recorded.
        """
        root = PurePosixPath("/", path)
        kind = self.fs.info(str(root))["type"]
        with self._one_line_errors(f"the listing of {path}"):
            found = self.fs.find(str(root), withdirs=True, detail=True)
            for each in (*map(str, root.parents), *found):
                self._check_listing(each)
        start = root if kind == "directory" else root.parent
        return {
            str(PurePosixPath(name).relative_to(start)): _tracked(name.lstrip("/"), info)
            for name, info in found.items()
            if info["type"] == "file"
        }

    def get(self, file: TrackedFile, to: Path) -> None:
        """Write a file to the path `to`. Raises DataError if it cannot be had or is not the one that was recorded."""
        with self._one_line_errors(file.path, f"object {file.hash}"):
            self.fs.get_file(f"/{file.path}", str(to), info=dict(file.info))
        if file.algorithm != "git" and (received := hash_of(to, file.algorithm)) != file.hash:
            raise DataError(self._changed(file.path, file.hash, received))

    def _check_listing(self, path: str) -> None:
        """Hold the listing of a folder that DVC tracks as a whole against its hash."""
        from dvc_data.hashfile.tree import Tree as Listing

        tracked = self.fs.info(path).get("dvc_info", {}).get("entry")
        if tracked is None or not (tracked.hash_info and tracked.hash_info.isdir):
            return
        listing = Listing()
        for info in self.fs.find(path, detail=True).values():
            entry = info["dvc_info"]["entry"]
            listing.add(entry.key[len(tracked.key) :], None, entry.hash_info)
        listing.digest(name=tracked.hash_info.name)
        if listing.oid != tracked.hash_info.value:
            raise DataError(self._changed(f"the listing of {path[1:]}", tracked.hash_info.value, str(listing.oid)))

    def _changed(self, what: str, expected: str, received: str) -> str:
        return (
            f"{what} of {self.version}: its object in {self._remote()} has changed (expected {expected}, received"
            f" {received}); delete it there and dvc push it from a copy that has it"
        )

    def _remote(self) -> str:
        """The default remote, for people."""
        config = self.fs.repo.config
        found = config.get("remote", {}).get(config.get("core", {}).get("remote"), {})
        if not found:
            return "DVC's cache (there is no default remote: dvc remote add -d)"
        return f"DVC's remote {found['url']}" + (f" at {found['endpointurl']}" if found.get("endpointurl") else "")

    @contextmanager
    def _one_line_errors(self, what: str, thing: str = "it") -> Iterator[None]:
        """What DVC and its S3 client raise in the block as one line: who has to do what."""
        from botocore import exceptions as boto
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexDirError
        from dvc_objects.errors import ObjectFormatError

        try:
            yield
        except (DvcException, DataIndexDirError, boto.BotoCoreError, boto.ClientError, OSError) as error:
            where, causes = f"{what} of {self.version}: {self._remote()}", _causes(error)
            if _first(causes, FileNotFoundError):
                message = f"{where} lacks {thing}; dvc push it from a copy that has it"
            elif reason := _first(causes, ObjectFormatError):
                message = f"{where} has it changed ({reason}); delete it there and dvc push it again"
            elif reason := _first(causes, PermissionError, boto.NoCredentialsError):
                message = (
                    f"{where} does not let these credentials read ({reason}); look at AWS_ACCESS_KEY_ID,"
                    " AWS_SECRET_ACCESS_KEY, the profile and the rights"
                )
            elif reason := _first(causes, boto.HTTPClientError, boto.ConnectionError, ConnectionError, TimeoutError):
                raise Unreachable(f"{where} cannot be reached: {reason}") from None
            else:
                message = f"{where} cannot be read: {causes[-1]}"
            raise DataError(message) from None


@contextmanager
def opened(where: str, version: str, *, own: bool) -> Iterator[Tree]:
    """The repository at `where` (a folder or an address; own: the project's) as it is at a tag, branch or commit.

    A clone is removed afterwards. Raises DataError, or Unreachable for an address that does not answer.
    """
    from dulwich.errors import NotGitRepository
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.open_repo import clean_repos
    from scmrepo.exceptions import RevError, SCMError
    from scmrepo.git import Git

    with TemporaryDirectory() as site:
        config = {"core": {"analytics": False, "site_cache_dir": site}}
        try:
            with Repo.open(where, uninitialized=True, config=config) as repo:
                if not isinstance(repo.scm, Git):
                    raise DataError(_no_repository(where, own))
                try:
                    commit = str(repo.scm.resolve_rev(version))
                except RevError:
                    known = ", ".join(sorted(repo.scm.list_tags())[-NAMED_IN_ERRORS:]) or "none"
                    raise DataError(
                        f"data_version={version!r} is no tag, branch or commit of {where}; its tags: {known}"
                    ) from None
            fs = DVCFileSystem(where, rev=commit, config=config)
            with fs.repo:
                _set_up_s3(fs.repo.config)
                yield Tree(version, commit, fs)
        except (DvcException, SCMError) as error:
            reason = _causes(error)[-1]
            if isinstance(reason, NotGitRepository):
                raise DataError(_no_repository(where, own)) from None
            if Path(where).exists():
                raise DataError(f"the repository {where} cannot be read: {reason}") from None
            raise Unreachable(
                f"cannot clone data_repo={where!r}: {reason} (look at the address, the network and git's credentials)"
            ) from None
        finally:
            clean_repos()


def _set_up_s3(config: dict[str, Any]) -> None:
    """Where the repository says nothing: the endpoint of the environment, as for all other data, and short waits."""
    from s3fs import S3FileSystem

    S3FileSystem.retries = ROUNDS  # its own five on top of botocore's would wait five minutes for a silent server
    usual = {"endpointurl": s3.endpoint(), "connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    for remote in config.get("remote", {}).values():
        if remote.get("url", "").startswith("s3://"):
            remote.update({name: value for name, value in usual.items() if value and name not in remote})


def _tracked(path: str, info: dict[str, Any]) -> TrackedFile:
    if "fs_info" in info:
        return TrackedFile(path, "git", info["fs_info"]["sha"], info)
    hash_info = info["dvc_info"]["entry"].hash_info
    if not hash_info:
        raise DataError(f"{path} has no hash in DVC's files, so it cannot be checked; dvc add it")
    return TrackedFile(path, hash_info.name, hash_info.value, info)


def hash_of(path: Path, algorithm: str) -> str:
    """A file's hash as DVC computes it."""
    from dvc_data.hashfile.hash import file_md5
    from dvc_objects.fs.local import localfs

    return str(file_md5(str(path), localfs, name=algorithm))


def _causes(error: BaseException) -> list[BaseException]:
    """An error, what caused it, what caused that."""
    return [error, *(_causes(error.__cause__) if error.__cause__ else [])]


def _first(errors: list[BaseException], *kinds: type[BaseException]) -> BaseException | None:
    return next((error for error in errors if isinstance(error, kinds)), None)


def _no_repository(where: str, own: bool) -> str:
    if own:
        return (
            f"{where}: data_version needs a git repository, and the project's folder is none here (in a container the"
            " code comes without its history); give data_repo= its address"
        )
    return f"data_repo={where!r} is no git repository; give the folder or the address of one"
