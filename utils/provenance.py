"""Where a run came from, in words for people: its venue, its name, and the commands that make it again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.runtime import without_passwords
from utils.settings import as_params, as_text

LONGEST_NAME = 120
LONGEST_LINE = 100
CONTAINERS = ("docker", "kubernetes")
SIDE_EFFECTS = ("register_as", "promote")
"""Settings that change the model registry: a run that is made again leaves it alone."""

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))  # Docker's and Podman's


def venue(tags: Mapping[str, str]) -> str:
    """Where this process runs: kubernetes, docker, conda, uv, virtualenv, or local for any other Python.

    `tags` are those of its run. One that `mlflow run` started on this machine is named after its environment even where
    the machine is a container itself, such as one for development.
    """
    started_here = "mlflow.project.entryPoint" in tags and tags.get("mlflow.project.env") != "docker"
    if not started_here:
        # The kubelet sets the variable in every container, also where no service account is mounted.
        if "KUBERNETES_SERVICE_HOST" in os.environ or _SERVICE_ACCOUNT.exists():
            return "kubernetes"
        if any(mark.exists() for mark in _CONTAINER_MARKS):
            return tags.get("mlproject.backend", "docker")
    return _environment(Path(sys.prefix))


def _environment(prefix: Path) -> str:
    """Which tool made the Python environment."""
    if (prefix / "conda-meta").is_dir():
        return "conda"
    cfg = prefix / "pyvenv.cfg"
    lines = cfg.read_text("utf-8").splitlines() if cfg.is_file() else []
    tools = {line.partition("=")[0].strip() for line in lines}
    if "uv" in tools:
        return "uv"
    # MLflow's own for --env-manager virtualenv, which it makes with `python -m venv`, has this name.
    made_by_mlflow = re.fullmatch("mlflow-[0-9a-f]{40}", prefix.name)
    return "virtualenv" if "virtualenv" in tools or made_by_mlflow else "local"


def image(tags: Mapping[str, str]) -> str:
    """The environment image of a run in a container, as its launcher (the plugin, MLflow's docker_env) named it."""
    return tags.get("mlproject.image") or tags.get("mlflow.docker.image.uri", "")


def run_name(present: str, about: Sequence[str], venue: str) -> str:
    """What the run is about and its venue (`digits-cnn-docker`), unless somebody chose the present name."""
    if present and not is_random(present):
        return present
    return "-".join([*(short(each) for each in about if each), venue])[:LONGEST_NAME]


def is_random(name: str) -> bool:
    """Whether MLflow made the name up (such as bold-ant-512)."""
    from mlflow.utils import name_utils

    predicate, _, rest = name.partition("-")
    noun, _, number = rest.rpartition("-")
    return predicate in _words(name_utils, "PREDICATES") and noun in _words(name_utils, "NOUNS") and number.isdecimal()


@functools.cache
def _words(module: Any, kind: str) -> frozenset[str]:
    """MLflow's own lists; where a release has none, every name counts as chosen."""
    return frozenset(word.lower() for word in getattr(module, f"_GENERATOR_{kind}", ()))


def short(address: str) -> str:
    """The telling part of a data set's or model's address: `photos`, `digits@champion`, `digits-v3`, `1f0e2d3c`."""
    scheme, _, rest = address.partition(":/")
    if scheme == "runs":
        return rest.lstrip("/")[:8]
    if scheme == "models":
        return rest.lstrip("/").replace("/", "-v")
    return without_passwords(address).rstrip("/").split("/")[-1].removesuffix(".npz") or address


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a description needs to know of a run besides its result."""

    settings: Any
    entry_point: str
    venue: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    """Those on the run before this process joined it: of `mlflow run`, or of an attempt before this one."""

    def command(self) -> str:
        """The command of this process."""
        script = Path(inspect.getfile(type(self.settings))).name
        flags = sys.argv[1:]
        if Path(sys.argv[0]).name != script:  # called by other code
            flags = [f"--{name}={value}" for name, value in as_params(self.settings).items()]
        return _shell([*self._launcher(), script, *flags])

    def reproduction(self) -> str:
        """Shell lines that make the same run again in a clone of the repository."""
        lines = []
        if commit := self.tags.get("git_commit"):
            lines.append(f"git checkout {commit}")
        changed = self._changed()
        if self._launcher() != ["python"]:  # `mlflow run` starts one process a machine
            script = Path(inspect.getfile(type(self.settings))).name
            words = [*self._launcher(), script, *(f"--{name}={value}" for name, value in changed.items())]
        else:
            words = ["mlflow", "run", *self._where(), "."]
            words += ["-e", self.entry_point] if self.entry_point != "main" else []
            words += [word for name, value in changed.items() for word in ("-P", f"{name}={value}")]
        return "\n".join([*lines, _shell(words)])

    def markdown(self, result: str) -> str:
        """The run's description."""
        repository = without_passwords(self.tags.get("mlflow.source.git.repoURL", ""))
        where = f"a clone of {repository}" if ":" in repository else "a clone"  # and not a folder of one machine
        parts = [result, f"**Reproduce** in {where}", _fenced(self.reproduction()), *self._reservations()]
        parts += ["**Made by**", _fenced(self.command())]
        return "\n\n".join(filter(None, parts))

    def _launcher(self) -> list[str]:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        if processes == "1" or self.venue in CONTAINERS:
            return ["python"]
        return ["torchrun", "--nproc-per-node", processes]

    def _where(self) -> list[str]:
        if self.venue == "kubernetes":
            return ["--backend", "kubernetes", "--backend-config", "kubernetes_config.json"]
        return ["--backend", "docker"] if self.venue == "docker" else ["--env-manager", self.venue]

    def _changed(self) -> dict[str, str]:
        """The settings that are not their defaults, but for those with side effects."""
        fields = dataclasses.fields(self.settings)
        changed = {field.name: getattr(self.settings, field.name) for field in fields}
        return {
            field.name: as_text(changed[field.name])
            for field in fields
            if changed[field.name] != field.default and field.name not in SIDE_EFFECTS
        }

    def _reservations(self) -> list[str]:
        """What keeps the second command from making the very same run."""
        found = []
        if self.tags.get("git_dirty") == "true":
            found.append("The files differed from that commit (`git_dirty`).")
        before = {
            name: self.params[name]
            for name, value in as_params(self.settings).items()
            if name in self.params and not _equal(self.params[name], value)
        }
        if before:
            listed = ", ".join(f"{name}={value}" for name, value in before.items())
            found.append(f"The run was begun with other settings ({without_passwords(listed)}) and went on with these.")
        return found


def _equal(logged: str, value: str) -> bool:
    """Whether two spellings say the same: 1e-3 and 0.001, True and true; MLflow logs texts as a shell quotes them."""
    if {logged.lower(), value.lower()} in ({"true"}, {"false"}):
        return True
    try:
        return float(logged) == float(value)
    except ValueError:
        return logged in (value, shlex.quote(value))


def _shell(words: Sequence[str]) -> str:
    """A command without passwords, on lines short enough not to widen MLflow's page."""
    lines = [""]
    for word in (shlex.quote(without_passwords(word)) for word in words):
        if len(lines[-1]) + len(word) > LONGEST_LINE:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _fenced(code: str) -> str:
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{code}\n{fence}"
