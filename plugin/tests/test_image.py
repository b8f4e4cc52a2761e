"""The environment image: what it is made of, and when it is built, pulled and pushed."""

import io
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker.errors
import mlflow
import pytest

from engine import Daemon, serve_registry
from mlproject_backends import ConfigError, JobError, Unreachable
from mlproject_backends import engine as engine_module
from mlproject_backends.config import Config
from mlproject_backends.image import environment_image, image_context

DOCKERFILE = """\
FROM scratch
# COPY commented.txt /
COPY requirements.lock \\
    # between two lines
    extra/*.txt /environment/
COPY --chown=1000 ["with space.txt", "/"]
ADD data /data/
ARG WHICH=a
COPY $WHICH.cfg /chosen.cfg
"""
FILES = [
    "requirements.lock",
    "train.py",
    "commented.txt",
    "with space.txt",
    "extra/one.txt",
    "extra/.two.txt",
    "extra/three.md",
    "data/deep/er/table.csv",
    "data/secret.key",
    "data/deep/public.key",
    "a.cfg",
    "b.cfg",
]
COPIED = {
    "Dockerfile",
    "requirements.lock",
    "with space.txt",
    "extra/one.txt",
    "extra/.two.txt",
    "data/deep/er/table.csv",
    "data/deep/public.key",
    "a.cfg",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a Dockerfile that copies some of its files."""
    folder = tmp_path / "Shapes & Co"
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of {uuid4()}")
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / ".dockerignore").write_text("# keys\n**/*.key\n!data/deep/public.key\n")
    return folder


@pytest.fixture
def python_project(tmp_path: Path) -> Path:
    """A project that has no Dockerfile but a python_env.yaml, to be written."""
    folder = tmp_path / "python-project"
    folder.mkdir()
    return folder


def context(folder: Path, **build_args: str) -> Any:
    return image_context(folder, None, "python_env", build_args)


def digest(folder: Path, **build_args: str) -> str:
    return str(context(folder, **build_args).digest)


# What it is made of


def test_the_context_is_what_the_dockerfile_copies(project: Path) -> None:
    assert set(context(project).files) == COPIED
    assert set(context(project, WHICH="b").files) == COPIED - {"a.cfg"} | {"b.cfg"}


def test_the_hash_changes_with_each_file_of_the_image_and_with_no_other(project: Path) -> None:
    before = digest(project)
    for name in [*FILES, "Dockerfile"]:
        path = project / name
        text = path.read_text()
        path.write_text(f"{text}\n# changed")
        assert (digest(project) != before) == (name in COPIED), name
        path.write_text(text)
        os.utime(path, (0, 0))
    (project / "new.py").touch()
    assert digest(project) == before
    (project / "data" / "new.csv").touch()
    assert digest(project) != before
    (project / "data" / "new.csv").unlink()
    (project / "requirements.lock").chmod(0o755)
    assert digest(project) != before


def test_the_hash_changes_with_build_arguments(project: Path) -> None:
    assert digest(project, DEVICE="cpu") != digest(project, DEVICE="cuda") != digest(project)


def test_equal_projects_have_equal_archives(project: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", project, tmp_path / "copy"], check=True)
    assert context(project).archive() == context(tmp_path / "copy").archive()


@pytest.mark.parametrize(
    ("line", "copied"),
    [
        ("COPY . /", {*FILES, "Dockerfile", ".dockerignore"} - {"data/secret.key"}),
        ("copy --from=builder a.cfg /", set()),
        ("COPY --chmod=644 --chown=1:1 ./a.cfg b.cfg /", {"a.cfg", "b.cfg"}),
        ("ADD https://files.example/a.cfg /", set()),
        ("COPY [ab].cfg /", {"a.cfg", "b.cfg"}),
        ("COPY /extra/../data/deep/er /", {"data/deep/er/table.csv"}),
    ],
)
def test_forms_of_copy(project: Path, line: str, copied: set[str]) -> None:
    (project / "Dockerfile").write_text(f"FROM scratch\n{line}\n")
    assert set(context(project).files) == copied | {"Dockerfile"}


@pytest.mark.parametrize("source", ["absent.txt", "data/secret.key", "../outside.txt", "$UNSET"])
def test_copying_what_is_not_there_is_refused(project: Path, source: str) -> None:
    (project.parent / "outside.txt").touch()
    (project / "Dockerfile").write_text(f"FROM scratch\nCOPY {source} /\n")
    with pytest.raises(ConfigError) as refusal:
        context(project)
    expected = f"the Dockerfile copies '{source}', and the project has no such file outside .dockerignore"
    assert refusal.value.message == expected


def test_a_link_that_leads_out_of_the_project_is_refused(project: Path) -> None:
    (project / "a.cfg").unlink()
    (project / "a.cfg").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="leads out of the project"):
        context(project)


@pytest.mark.slow
def test_the_engine_makes_the_same_image_of_it_as_of_the_whole_folder(project: Path, engine: Any) -> None:
    whole = f"mlproject-tests/whole:{uuid4().hex}"
    events = list(engine.build(path=str(project), tag=whole, rm=True, decode=True))
    assert not [event for event in events if "error" in event]
    ours = environment_image(project, None, "python_env", Config("docker"), print, push=False)
    assert files_of(engine, ours) == files_of(engine, whole)
    for image in (whole, ours):
        engine.remove_image(image)


def files_of(engine: Any, image: str) -> dict[str, tuple[int, int, bytes]]:
    """Mode, owner and content of each file that COPY and ADD have made."""
    container = engine.create_container(image, "none")["Id"]
    exported = io.BytesIO(b"".join(engine.export(container)))
    engine.remove_container(container)
    with tarfile.open(fileobj=exported) as tar:
        contents = {member: tar.extractfile(member) for member in tar if member.isfile()}
        return {member.name: (member.mode, member.uid, file.read()) for member, file in contents.items() if file}


# The default Dockerfile


def test_a_python_env_becomes_requirements(python_project: Path) -> None:
    (python_project / "locks").mkdir()
    (python_project / "requirements.txt").write_text("-c locks/constraints.txt\nscikit-learn\n")
    (python_project / "locks" / "constraints.txt").write_text("numpy<3\n")
    env_file = python_project / "python_env.yaml"
    env_file.write_text(
        "python: 3.12.4\nbuild_dependencies: [pip==26.3]\ndependencies: [-r requirements.txt, six==1.17]"
    )
    made = image_context(python_project, env_file, "python_env", {})
    assert made.build_args == {"BASE": "python:3.12-slim-bookworm"}
    texts = {name: content.decode() for name, (_, content) in made.files.items()}
    assert texts.pop("Dockerfile").startswith("#")
    lines = texts.pop("mlproject-requirements.txt").splitlines()
    assert lines[:3] == ["-r requirements.txt", "six==1.17", f"mlflow-skinny=={mlflow.__version__}"]
    assert texts == {
        "mlproject-build.txt": "pip==26.3",
        "requirements.txt": "-c locks/constraints.txt\nscikit-learn\n",
        "locks/constraints.txt": "numpy<3\n",
    }


def test_a_conda_env_becomes_requirements_without_condas_own_packages(
    python_project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mlflow"), "propagate", True)
    env_file = python_project / "conda.yaml"
    env_file.write_text("dependencies: [python=3.10.2, pip, cudatoolkit=12, {pip: ['MLflow_Skinny[x]>=3', six]}]")
    made = image_context(python_project, env_file, "conda_env", {"BASE": "my/base"})
    assert made.build_args == {"BASE": "my/base"}
    assert made.files["mlproject-requirements.txt"][1] == b"MLflow_Skinny[x]>=3\nsix"
    assert "cudatoolkit=12" in caplog.text


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("dependencies: [-r absent.txt]", "requirements refer to absent.txt"),
        ("python: [", "cannot be read as a python_env"),
        ("pythons: 3", "cannot be read as a python_env"),
        ("python: three", "asks for Python 'three'; allowed: a version such as 3.11"),
    ],
)
def test_an_env_file_that_cannot_work_is_refused(python_project: Path, text: str, refusal: str) -> None:
    env_file = python_project / "python_env.yaml"
    env_file.write_text(text)
    with pytest.raises(ConfigError, match=refusal) as error:
        image_context(python_project, env_file, "python_env", {})
    assert "\n" not in error.value.message


@pytest.mark.slow
def test_the_default_image_suits_any_user(engine: Any, job_image: str) -> None:
    program = """
import getpass, mlflow, os, pathlib, tempfile
print(mlflow.__version__, os.getuid())
for folder in ('~', '/cache', '/tmp'):
    tempfile.NamedTemporaryFile(dir=pathlib.Path(folder).expanduser())
"""
    for user in ("", "4321:4321"):
        container = engine.create_container(job_image, ["python", "-c", program], user=user)["Id"]
        engine.start(container)
        assert engine.wait(container)["StatusCode"] == 0
        assert engine.logs(container).decode().split() == [mlflow.__version__, user.split(":")[0] or "1000"]
        engine.remove_container(container)


# Building, pulling, pushing


@dataclass
class Project:
    """A folder with a Dockerfile that builds at once, and what is told about its image."""

    folder: Path
    told: list[str] = field(default_factory=list)

    def image(self, push: bool = False, **config: Any) -> str:
        self.told.clear()
        return environment_image(self.folder, None, "python_env", Config("docker", **config), self.told.append, push)

    @property
    def done(self) -> list[str]:
        """The first word of each thing that was done: building, pulling, pushing."""
        return list(dict.fromkeys(sentence.split()[0].rstrip(":") for sentence in self.told))


@pytest.fixture
def small(tmp_path: Path, engine: Any) -> Iterator[Project]:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "MLproject").write_text("name: Größe & Co.\n")
    (folder / "lock").write_text(str(uuid4()))
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY lock /\n")
    yield Project(folder)
    for image in engine.images(filters={"label": "mlproject.environment"}):
        names = [*(image["RepoTags"] or ()), *(image["RepoDigests"] or ())]
        if any("/gr-e-co:" in name or "/team/small" in name for name in names):
            engine.remove_image(image["Id"], force=True)


def test_an_image_is_built_once(small: Project, engine: Any) -> None:
    image = small.image()
    assert image.startswith("mlproject-env/gr-e-co:")
    assert small.told[:2] == [f"building the environment image {image}", "building: step 1/3 (FROM scratch)"]
    assert small.image() == image
    assert small.told == []
    (small.folder / "train.py").touch()
    assert small.image() == image
    assert small.told == []
    assert small.image(build_image=True) == image
    assert small.done == ["building"]
    (small.folder / "lock").write_text("changed")
    assert small.image() != image


@pytest.mark.slow
def test_a_registry_is_asked_before_building(small: Project, engine: Any, registry: str) -> None:
    uri = f"{registry}/team/small"
    image = small.image(push=True, repository_uri=uri)
    assert image.startswith(f"{uri}:")
    assert small.done == ["building", "pushing"]
    assert small.image(push=True, repository_uri=uri) == image
    assert small.done == []
    engine.remove_image(image)
    small.image(push=True, repository_uri=uri)
    assert small.done == []
    with pytest.raises(docker.errors.ImageNotFound):
        engine.inspect_image(image)
    small.image(repository_uri=uri)
    assert small.done == ["pulling"]
    engine.inspect_image(image)
    small.image(push=True, repository_uri=uri, build_image=True)
    assert small.done == ["building", "pushing"]


@pytest.mark.slow
def test_a_registry_that_does_not_answer_stops_only_a_push(small: Project) -> None:
    with pytest.raises(JobError, match=r"refused to ask the registry for 127\.0\.0\.1:9/team/small:") as error:
        small.image(push=True, repository_uri="127.0.0.1:9/team/small")
    assert "\n" not in str(error.value)
    small.image(repository_uri="127.0.0.1:9/team/small")
    assert "going on without it" in small.told[0]
    assert small.done[-1] == "building"


# ada with the password of-this-test, as htpasswd writes her
HTPASSWD = "ada:$2b$05$abcdefghijklmnopqrstuudhs.Xjv0oyAcMzJ3HXuv8bN5.FMqNhi\n"


@pytest.mark.slow
def test_a_registry_that_wants_a_login(small: Project, engine: Any, tmp_path: Path) -> None:
    (tmp_path / "users").write_text(HTPASSWD)
    with serve_registry(tmp_path, f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/users}}}}\n") as address:
        uri = f"{address}/team/small"
        with pytest.raises(JobError, match=r"no basic auth credentials; log in to the registry \(docker login\)$"):
            small.image(push=True, repository_uri=uri)
        login = {"username": "ada", "password": "wrong", "registry": address}
        with pytest.raises(JobError, match=r"refused the login to the registry: .*401 Unauthorized") as error:
            small.image(push=True, repository_uri=uri, docker_auth=login)
        assert "wrong" not in str(error.value)
        small.image(push=True, repository_uri=uri, docker_auth={**login, "password": "of-this-test"})
        assert small.done == ["building", "pushing"]


def test_an_image_that_is_named_needs_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_project: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    assert Project(python_project).image(push=True, image="my/image") == "my/image"
    with pytest.raises(Unreachable, match="no Docker engine answers"):
        Project(python_project).image()


def test_kubernetes_needs_a_registry(python_project: Path) -> None:
    with pytest.raises(ConfigError, match=r"set 'repository-uri' .* or 'image'"):
        Project(python_project).image(push=True)


def test_a_build_that_fails_says_where_and_why(small: Project, base_image: str) -> None:
    (small.folder / "Dockerfile").write_text(
        f"FROM {base_image}\nRUN echo first && echo 'ERROR: no such thing' >&2 && echo last && exit 3\n"
    )
    with pytest.raises(JobError) as error:
        small.image()
    step = "step 2/3 (RUN echo first && echo 'ERROR: no such thing' >&2 && echo last && exit 3)"
    expected = f"the environment image could not be built: {step}: exit code 3; ERROR: no such thing"
    assert str(error.value) == expected
    (small.folder / "Dockerfile").write_text("FROM scratch\nNONSENSE\n")
    with pytest.raises(JobError, match="unknown instruction: NONSENSE"):
        small.image()


@pytest.mark.slow
def test_a_full_disk_is_one_line(small: Project, private_engine: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second engine whose images lie on a disk of 32 MB."""
    tiny = private_engine.another("tiny")
    data = tiny.folder / "data"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", data], check=True)
    try:
        tiny.start()
        monkeypatch.setenv("DOCKER_HOST", tiny.host)
        (small.folder / "lock").write_bytes(os.urandom(40_000_000))
        with pytest.raises(JobError) as error:
            small.image()
        assert str(error.value).startswith("the disk of the Docker engine is full; ")
    finally:
        tiny.stop()


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    told: list[str] = []
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    events = [{"stream": "Step 2/3 : RUN pip install six\n"}, {"stream": "Collecting six\n"}]
    engine_module._follow_build(events, told.append)
    assert told == []
    assert "building: 2/3 |" in terminal.getvalue()
    assert "Collecting six" in terminal.getvalue()
