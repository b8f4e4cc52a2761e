"""Versions of data: DVC's own program makes them in git and a real S3 server, data_version= brings them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from ports import free_port
from s3_server import S3Server
from tracking_server import TrackingServer

from data_loader import DataError
from data_loader.dataset import Dataset, load

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("cats", "dogs")
WITH_PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def run(folder: Path, *commands: str, **environment: str) -> None:
    """Shell lines in a folder, with the programs of this environment, one author and no report of use."""
    author = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    everything = {**os.environ, "PATH": WITH_PROGRAMS, "DVC_NO_ANALYTICS": "1", **author, **environment}
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=everything, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def paint(folder: Path, numbers: range) -> None:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            pixels_HWC = np.random.default_rng([label, number]).integers(0, 256, (6, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels_HWC).save(folder / name / f"{number}.png")


@dataclass(frozen=True)
class Repository:
    """A DVC repository as a colleague has cloned it: without data, which is in the bucket."""

    folder: Path
    s3: S3Server
    bucket: str

    @property
    def address(self) -> str:
        return f"file://{self.folder}"

    def md5(self, path: str, version: str) -> str:
        """What DVC recorded of a tracked path, from its own file in git."""
        show = ["git", "-C", str(self.folder), "show", f"{version}:{path}.dvc"]
        recorded = yaml.safe_load(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
        return str(recorded["outs"][0]["md5"])

    @contextmanager
    def with_object(self, md5: str, content: bytes | None) -> Iterator[None]:
        """The bucket with an object changed, or without it (None), as long as the block lasts."""
        client, where = self.s3.client(), {"Bucket": self.bucket, "Key": f"data/files/md5/{md5[:2]}/{md5[2:]}"}
        before = client.get_object(**where)["Body"].read()
        client.delete_object(**where)
        if content is not None:
            client.put_object(**where, Body=content)
        try:
            yield
        finally:
            client.put_object(**where, Body=before)


@pytest.fixture(scope="module")
def original(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Versions v1.0 (40 images) and v2.0 (60), pushed; `plain/v1.0` and `plain/v2.0` beside it are the same folders."""
    folder, bucket, environment = tmp_path_factory.mktemp("data"), s3_server.new_bucket(), s3_server.environment()
    made = folder / "made"
    made.mkdir()
    (made / "in git" / "notes").mkdir(parents=True)
    (made / "in git" / "notes" / "a.txt").write_text("no image")
    run(made, "git init -qb main", "dvc init -q", f"dvc remote add -d store s3://{bucket}/data")
    for tag, numbers in (("v1.0", range(20)), ("v2.0", range(20, 30))):
        paint(made / "pets" / "images", numbers)
        run(made, "dvc add -q pets/images", "git add .", f"git commit -qm {tag}", f"git tag -a {tag} -m {tag}")
        run(made, "dvc push -q", **environment)
        shutil.copytree(made / "pets" / "images", folder / "plain" / tag)
    run(folder, "git clone -q made cloned")
    return Repository(folder / "cloned", s3_server, bucket)


@pytest.fixture
def repository(original: Repository, s3: S3Server) -> Repository:
    return original


def pets(repository: Repository, version: str, data_dir: Path, **others: str) -> Dataset:
    settings = {"data_repo": str(repository.folder), **others}
    return load("pets/images", data_dir=data_dir, data_version=version, **settings)


def refusal(**settings: Any) -> DataError:
    """The error; asserts that it is one line."""
    with pytest.raises(DataError) as error:
        load(**settings)
    assert "\n" not in str(error.value)
    return error.value


def left_behind(data_dir: Path) -> dict[str, tuple[int, int]]:
    """The downloaded images on disk: {path: (inode, time)}."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in (data_dir / "dvc").rglob("*.png")}


@pytest.mark.parametrize("version", ["v1.0", "v2.0"])
@pytest.mark.parametrize("kind", ["folder", "address"])
def test_a_tag_is_exactly_its_folder(repository: Repository, tmp_path: Path, version: str, kind: str) -> None:
    """Also: digests alone tell two data sets apart, whether DVC keeps them or nobody does."""
    where = repository.address if kind == "address" else str(repository.folder)
    found = pets(repository, version, tmp_path, data_repo=where)
    plain = {tag: load(str(repository.folder.parent / "plain" / tag), data_dir=tmp_path) for tag in ("v1.0", "v2.0")}
    assert found.digest == plain[version].digest
    assert len({each.digest for each in plain.values()}) == 2
    assert np.array_equal(found.images_NHWC, plain[version].images_NHWC)
    assert found.name == "images"
    assert found.source == f"{where}@{version}:pets/images"
    commit = subprocess.run(
        ["git", "-C", str(repository.folder), "rev-parse", f"{version}^{{commit}}"], capture_output=True, text=True
    ).stdout.strip()
    assert found.version == {"data_version": version, "data_commit": commit}
    assert pets(repository, commit, tmp_path).digest == found.digest


def test_an_unchanged_version_downloads_nothing_and_another_only_what_is_new(
    repository: Repository, tmp_path: Path
) -> None:
    first = pets(repository, "v1.0", tmp_path)
    before = left_behind(tmp_path)
    (shared,) = (entry["sha256"] for entry in first.manifest["files"] if entry["path"] == "cats/0.png")
    image = repository.folder.parent / "plain" / "v1.0" / "cats" / "0.png"
    with repository.with_object(md5_of(image), b"whoever downloads this fails"):
        assert pets(repository, "v1.0", tmp_path).digest == first.digest
        assert left_behind(tmp_path) == before
        second = pets(repository, "v2.0", tmp_path)
    assert shared in {entry["sha256"] for entry in second.manifest["files"]}
    assert before.items() <= left_behind(tmp_path).items()


def md5_of(path: Path) -> str:
    return subprocess.run(["md5sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]


def test_a_tag_that_moved_and_a_branch_bring_the_new_data(repository: Repository, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository.folder, copy)
    run(copy, "git tag moving v1.0^{}", "git branch stable v1.0")
    old = pets(repository, "moving", tmp_path, data_repo=f"file://{copy}")
    assert pets(repository, "stable", tmp_path, data_repo=f"file://{copy}").digest == old.digest
    run(copy, "git tag -f moving v2.0^{}")
    new = pets(repository, "moving", tmp_path, data_repo=f"file://{copy}")
    assert (len(old.labels_N), len(new.labels_N)) == (40, 60)
    assert new.digest == pets(repository, "v2.0", tmp_path).digest
    assert new.version["data_commit"] != old.version["data_commit"]


def test_what_was_changed_on_disk_is_put_right(repository: Repository, tmp_path: Path) -> None:
    """Also where it is linked to the copy that versions share, and where size and cache would hide it."""
    first = pets(repository, "v1.0", tmp_path)
    shutil.rmtree(tmp_path / "cache")
    victim = next((tmp_path / "dvc").rglob("*.png"))
    victim.write_bytes(bytes(victim.stat().st_size))
    assert pets(repository, "v1.0", tmp_path).digest == first.digest


def test_a_missing_and_a_changed_object_are_named(repository: Repository, tmp_path: Path) -> None:
    image = repository.folder.parent / "plain" / "v1.0" / "dogs" / "7.png"
    md5, listing = md5_of(image), repository.md5("pets/images", "v1.0")
    # The bucket knows a listing by the MD5 of the whole folder; without one line it is still a legal listing.
    shorter = b'[{"md5": "%s", "relpath": "cats/0.png"}]' % md5.encode()
    cases = [
        (md5, None, ["pets/images/dogs/7.png of v1.0", md5, "lacks", f"s3://{repository.bucket}/data"]),
        (md5, b"another image", ["pets/images/dogs/7.png of v1.0", md5, "has changed"]),
        (listing, None, ["the listing of pets/images of v1.0", "lacks"]),
        (listing, shorter, ["the listing of pets/images of v1.0", listing, "has changed"]),
        (listing, b"no listing", ["the listing of pets/images of v1.0", listing, "changed"]),
    ]
    settings = {"dataset": "pets/images", "data_version": "v1.0", "data_repo": repository.address}
    for changed, content, words in cases:
        with repository.with_object(changed, content):
            error = refusal(data_dir=tmp_path, **settings)
        assert [word for word in words if word not in str(error)] == [], error
        assert error.exit_code == 2
        assert not list((tmp_path / "cache").glob("*"))
    assert len(load(data_dir=tmp_path, **settings).labels_N) == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data_version": "v3.0"}, ["data_version='v3.0'", "its tags: v1.0, v2.0"]),
        ({"dataset": "pets/picture"}, ["'pets/picture'", "at v1.0 (commit ", "there are: in git, pets"]),
        ({"dataset": "mnist"}, ["'mnist'", "leave data_version empty"]),
        ({"dataset": "untracked"}, ["neither DVC nor git tracks it", "dvc add"]),
        ({"dataset": "in git"}, ["in git has images of 0 class(es)", "'notes/a.txt' (not a PNG"]),
        ({"dataset": "s3://bucket/x"}, ["expected a path inside the DVC repository"]),
        ({"dataset": "pets/../../x"}, ["expected a path inside the DVC repository"]),
        ({"data_version": ""}, ["without data_version"]),
        ({"data_repo": ""}, ["the project's folder is none here", "data_repo="]),
        ({"data_repo": "nowhere"}, ["data_repo='nowhere' is no git repository"]),
        ({"data_repo": "file:///nowhere"}, ["data_repo='file:///nowhere' is no git repository"]),
        ({"data_repo": "https://me:secret@example.org/x.git"}, ["parameters are logged"]),
    ],
    ids=lambda value: " ".join(value.values()) or "empty" if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_said_in_one_line(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: list[str]
) -> None:
    (repository.folder / "untracked").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    usual = {"dataset": "pets/images", "data_version": "v1.0", "data_repo": str(repository.folder)}
    error = refusal(data_dir=tmp_path / "data", **{**usual, **settings})
    assert [word for word in words if word not in str(error)] == [], error
    assert error.exit_code == 2
    assert "secret" not in str(error)


def test_wrong_keys_and_servers_that_are_away(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"dataset": "pets/images", "data_dir": tmp_path, "data_version": "v1.0", "data_repo": repository.address}
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        error = refusal(**settings)
        assert "does not let these credentials read" in str(error)
        assert error.exit_code == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    error = refusal(**settings)
    assert "cannot be reached" in str(error)
    assert error.exit_code == 1
    error = refusal(**{**settings, "data_repo": f"http://127.0.0.1:{free_port()}/data.git"})
    assert "cannot clone" in str(error)
    assert error.exit_code == 1


def test_two_processes_at_once_without_git(repository: Repository, tmp_path: Path) -> None:
    """One downloads, the other waits and finds the work done. Neither has a program on its PATH, git least of all."""
    program = (
        "import sys; from pathlib import Path; from data_loader.dataset import load; "
        "print(load('pets/images', data_dir=Path(sys.argv[1]), data_version='v2.0', data_repo=sys.argv[2]).digest)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), repository.address]
    environment = {**os.environ, "PATH": str(tmp_path / "nothing"), "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    expected = load(str(repository.folder.parent / "plain" / "v2.0"), data_dir=tmp_path).digest
    assert [told.strip() for told, _ in ended] == [expected, expected]
    assert len(left_behind(tmp_path)) == 60


def test_dvc_is_not_imported_without_a_version() -> None:
    program = "import sys, data_loader.dataset; sys.exit(bool({'dvc', 'boto3', 'scmrepo'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_walk_through_two_versions(
    s3: S3Server, tracking_server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/data-versions.md, block by block, in a copy of the project with a git history of its own."""
    project, bucket = tmp_path / "image-classifier", s3.new_bucket()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("data_loader", "models", "monitoring", "utils"):
        shutil.copytree(ROOT / name, project / name, ignore=ignore)
    for name in ("MLproject", "conda.yaml", ".gitignore", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, project / name)
    run(project, "git init -qb main", "git add .", "git commit -qm project")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    client = MlflowClient(tracking_server.uri)

    def runs() -> list[Any]:
        return client.search_runs(["0"], order_by=["start_time ASC"])

    document = (ROOT / "docs" / "data-versions.md").read_text()
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```$", document, re.DOTALL | re.MULTILINE):
        if language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=project, check=True)
        elif "AWS_ACCESS_KEY_ID" not in block:  # the environment has this server's
            block = block.replace("s3://datasets", f"s3://{bucket}")
            if "RUN_ID" in block:
                block = block.replace("RUN_ID", runs()[1].info.run_id)
            run(project, *block.splitlines())

    _, old, new, evaluated = runs()
    assert [run.info.status for run in runs()] == ["FINISHED"] * 4
    assert [run.data.tags["data_version"] for run in runs()] == ["v1.0", "v1.0", "v2.0", "v2.0"]
    assert old.data.params["data_version"] == "v1.0"
    digests = [run.data.tags["data_digest"] for run in runs()]
    assert digests[0] == digests[1] != digests[2] == digests[3]
    images = [sum(int(run.data.params[f"{split}_images"]) for split in ("train", "val", "test")) for run in (old, new)]
    assert images == [200, 300]
    differ = {name for name in old.data.params if old.data.params[name] != new.data.params[name]}
    assert {"data_version", "data_commit", "data_digest", "train_images"} <= differ
    assert differ <= {"data_version", "data_commit", "data_digest", "train_images", "val_images", "test_images"}
    assert {run.info.run_id for run in client.search_runs(["0"], "tags.data_version = 'v2.0'")} == {
        new.info.run_id,
        evaluated.info.run_id,
    }
    assert "images-v1.0" in old.info.run_name

    # What an evaluation of the old model finds by itself: the commit it was trained on, though its tag has moved on.
    run(project, "git tag -f v1.0 v2.0")
    run(project, f"mlflow run --env-manager local . -e evaluate -P model_uri=runs:/{old.info.run_id}/model")
    assert runs()[-1].data.tags["data_digest"] == digests[0]
