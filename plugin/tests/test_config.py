import re
from dataclasses import fields
from pathlib import Path

import pytest

from mlproject_backends import ConfigError
from mlproject_backends.config import DOCKER, KUBERNETES, KUBERNETES_ONLY, Config, declared_resources, parse, size
from mlproject_backends.job import Resources

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_key_arrives() -> None:
    config = parse(
        KUBERNETES,
        {
            "kube-context": "prod",
            "repository-uri": "registry.example.org/team/env",
            "env": ["HF_HOME"],
            "env-from-secret": {"AWS_SECRET_ACCESS_KEY": "s3/secret-key"},
            "nodes": 4,
            "memory": "8Gi",
            "cpu": "500m",
            "detach": True,
            "SYNCHRONOUS": False,
            "DOCKER_ARGS": {"memory": "2g", "gpus": "1"},
            "build_image": True,
        },
    )
    assert config == Config(
        KUBERNETES,
        kube_context="prod",
        repository_uri="registry.example.org/team/env",
        env={"HF_HOME": None},
        env_from_secret={"AWS_SECRET_ACCESS_KEY": "s3/secret-key"},
        nodes=4,
        cpu=0.5,
        detach=True,
        memory=2 * 2**30,  # -A wins
        gpu=1,
        build_image=True,
    )


@pytest.mark.parametrize(
    ("backend", "received", "message"),
    [
        (DOCKER, {"imag": "x"}, r"unknown key 'imag' .*did you mean 'image'\?.*allowed: image, build-image"),
        (DOCKER, {"nodes": 2}, "unknown key 'nodes' in the docker backend's configuration"),
        (KUBERNETES, {"nodes": 0}, "'nodes' is 0; allowed: a whole number of at least 1"),
        (KUBERNETES, {"nodes": True}, "'nodes' is True"),
        (KUBERNETES, {"detach": "yes"}, "'detach' is 'yes'; allowed: true or false"),
        (KUBERNETES, {"memory": "lots"}, "'memory' is 'lots'; allowed: a size such as 512Mi"),
        (KUBERNETES, {"memory": "0Gi"}, "'memory' is '0Gi'"),
        (KUBERNETES, {"cpu": "two"}, "'cpu' is 'two'; allowed: a number of cores"),
        (KUBERNETES, {"env": "PATH"}, "'env' is 'PATH'; allowed: a list of variable names"),
        (KUBERNETES, {"env": {"A": 1}}, "'env' is"),
        (KUBERNETES, {"env-from-secret": {"A": "secret"}}, "allowed: SECRET/KEY"),
        (KUBERNETES, {"image": ""}, "'image' is ''; allowed: a text"),
        (DOCKER, {"DOCKER_ARGS": {"privileged": True}}, "unknown argument -A privileged; allowed: cpu, memory"),
    ],
)
def test_bad_input_gets_one_line(backend: str, received: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse(backend, received)
    assert "\n" not in refusal.value.message
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), (4096, 4096), ("1Ki", 1024), ("1.5Gi", 3 * 2**29), ("2G", 2 * 10**9), ("512m", 2**29), ("4g", 2**32)],
)
def test_sizes_are_read_as_kubernetes_and_docker_write_them(text: object, number: int) -> None:
    assert size(text, "memory") == number


def test_the_configuration_goes_before_what_the_mlproject_declares() -> None:
    declared = declared_resources("main", {"cpu": 2, "memory": "4Gi", "shm": "1Gi"})
    assert declared == Resources(cpu=2, memory_bytes=2**32, shm_bytes=2**30)
    assert Config(DOCKER, memory=2**20, gpu=1).resources(declared) == Resources(2, 2**20, 1, 2**30)
    assert declared_resources("main", None) == Resources()


def test_unknown_resources_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown key 'ram' in the resources of entry point 'main'; allowed: cpu"):
        declared_resources("main", {"ram": 1})


def test_the_readme_has_every_key_and_no_other() -> None:
    documented = re.findall(r"^\| `([a-z-]+)` \|", README.read_text(), re.MULTILINE)
    keys = {field.name.replace("_", "-") for field in fields(Config)} - {"backend", "docker-auth"}
    assert sorted(documented) == sorted(keys)
    kubernetes_only = re.findall(r"^\| `([a-z-]+)` \| Kubernetes \|", README.read_text(), re.MULTILINE)
    assert sorted(kubernetes_only) == sorted(name.replace("_", "-") for name in KUBERNETES_ONLY)
