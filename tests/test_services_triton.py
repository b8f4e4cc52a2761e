"""Triton's part of compose.yaml, as Compose itself understands it; its image is nothing that the tests could pull."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from service import write_model

from conftest import missing
from models.triton import to_repository

SERVICES = Path(__file__).resolve().parent.parent / "services"
sys.path.append(str(SERVICES))
compose, settings = (importlib.import_module(name) for name in ("compose", "settings"))

SECRET = dict.fromkeys(settings.SECRETS, "0123456789abcdef")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "triton"
    to_repository(write_model(folder.parent / "model.onnx"), "classifier", folder)
    return folder


def values(**changed: str) -> dict[str, str]:
    """The settings of a first start, with changes."""
    return {**settings.parse(settings.EXAMPLE), **SECRET, **changed}


def rendered(**changed: str) -> dict[str, Any]:
    """All services as Compose would start them."""
    if not shutil.which("docker-compose"):
        missing("there is no docker-compose")
    done = subprocess.run(
        ["docker-compose", "--project-directory", str(SERVICES), "--file", str(SERVICES / "compose.yaml"), "config"],
        env={"PATH": os.environ["PATH"], **compose.environment(values(**changed))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout)["services"])


def test_triton_serves_the_repository_on_loopback_and_cannot_write_it(repository: Path) -> None:
    triton = rendered(TRITON_MODELS=str(repository), TRITON_GRPC_PORT="18001", TRITON_MEMORY="2g")["triton"]
    assert re.fullmatch(r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3", triton["image"])
    ports = {tuple(re.fullmatch(r"([\d.]+):(\d+):(\d+)(?:/tcp)?", port).groups()) for port in triton["ports"]}  # type: ignore[union-attr]
    assert ports == {("127.0.0.1", "8000", "8000"), ("127.0.0.1", "18001", "8001"), ("127.0.0.1", "8002", "8002")}
    assert triton["volumes"] == [f"{repository}:/models:ro"]
    assert "--model-repository=/models" in triton["command"]
    assert triton["mem_limit"] == "2g"
    assert triton["healthcheck"]["test"][-1] == "http://127.0.0.1:8000/v2/health/ready"
    assert (triton["cap_drop"], triton["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    assert triton["restart"] == "unless-stopped"
    assert "environment" not in triton  # it gets to know no secret of the others


def test_another_image_and_no_triton_at_all(repository: Path) -> None:
    image = "registry.example.org/tritonserver:26.10-py3"
    assert rendered(TRITON_MODELS=str(repository), TRITON_IMAGE=image)["triton"]["image"] == image
    assert "triton" in compose.profiles(values(TRITON_MODELS=str(repository)))
    assert "triton" not in compose.profiles(values())


def test_people_are_told_where_it_is(repository: Path) -> None:
    said = compose.welcome(values(TRITON_MODELS=str(repository)))
    assert "Triton is up: http://127.0.0.1:8000, and by gRPC 127.0.0.1:8001" in said
    assert "Triton" not in compose.welcome(values())


@pytest.mark.parametrize("name", ["TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT"])
def test_a_port_that_is_taken_is_named_by_its_setting(repository: Path, name: str) -> None:
    given = values(TRITON_MODELS=str(repository), **{name: "18999"})
    stack = compose.Stack(["docker-compose"], given)
    refused = stack._failure("up", "Bind for 127.0.0.1:18999 failed: port is already allocated")
    assert f"set {name} in" in str(refused)


def test_a_folder_without_models_is_refused(tmp_path: Path, repository: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", repository / "classifier"):
        with pytest.raises(
            settings.Refused, match=r"where no folder has a config\.pbtxt; give the triton/ of an export"
        ):
            compose.environment(values(TRITON_MODELS=str(folder)))
    for name, value in (("TRITON_MODELS", "exported/triton"), ("TRITON_MEMORY", "4"), ("TRITON_HTTP_PORT", "0")):
        with pytest.raises(settings.Refused, match=f"{name} is '{value}'"):
            settings.check(values(**{name: value}), settings.KNOWN)
