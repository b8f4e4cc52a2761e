"""Flags: typed, bounded, refused in one line; the MLproject and the dataclasses say the same."""

import dataclasses
import importlib
import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import load_data
import train
from utils.settings import REQUIRED, as_params, as_text, parse, setting

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "load_data": "load_data",
    "main": "train",
    "evaluate": "evaluate",
    "predict": "predict",
    "export": "export",
    "serve": "serve",
    "client": "client",
    "recommend_labels": "recommend_labels",
    "monitor": "monitor",
    "retrain": "retrain",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """An entry point."""

    source: str = setting(REQUIRED, "where from")
    epochs: int = setting(3, "passes", minimum=1, maximum=9)
    rate: float = setting(0.1, "rate", minimum=0)
    mode: str = setting("fast", "mode", choices=("fast", "slow"))
    strict: bool = setting(False, "be strict")


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the user is told; asserts that it is one line and that the exit code is 2."""
    with pytest.raises(SystemExit) as stop:
        parse(Example, ["--source=x", *flags])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_values_arrive_with_their_types() -> None:
    example = parse(Example, ["--source=a b", "--epochs", "4", "--rate=1e-3", "--mode=slow", "--strict=true"])
    assert example == Example(source="a b", epochs=4, rate=0.001, mode="slow", strict=True)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("false", False), ("TRUE", True)])
def test_false_is_false(text: str, value: bool) -> None:
    assert parse(Example, ["--source=x", f"--strict={text}"]).strict is value


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--epochs=ten", "epochs: expected a whole number, received 'ten'"),
        ("--epochs=2.5", "epochs: expected a whole number, received '2.5'"),
        ("--epochs=0", "received 0, allowed: at least 1 and at most 9"),
        ("--rate=-1", "received -1, allowed: at least 0"),
        ("--rate=nan", "rate: expected a number, received 'nan'"),
        ("--mode=quick", "mode: received 'quick', allowed: fast, slow"),
        ("--strict=yes", "strict: expected true or false, received 'yes'"),
        ("--epoch=3", "unknown parameter 'epoch' (did you mean 'epochs'?); allowed: source, epochs, rate"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(capsys: pytest.CaptureFixture[str], flag: str, told: str) -> None:
    assert told in refused(capsys, flag)


def test_a_required_parameter_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Example, [])
    assert stop.value.code == 2
    assert "source" in capsys.readouterr().err


@given(
    st.builds(
        Example,
        source=st.text(),
        epochs=st.integers(1, 9),
        rate=st.floats(0, 1e9),
        mode=st.sampled_from(["fast", "slow"]),
        strict=st.booleans(),
    )
)
def test_logged_parameters_parse_back_to_the_same_settings(example: Example) -> None:
    assert parse(Example, [f"--{name}={text}" for name, text in as_params(example).items()]) == example


@pytest.mark.parametrize("entry_point", SCRIPTS)
def test_mlproject_and_dataclass_agree(entry_point: str) -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    spec = project["entry_points"][entry_point]
    settings = importlib.import_module(SCRIPTS[entry_point]).Settings
    types = typing.get_type_hints(settings)
    expected = {}
    for field in dataclasses.fields(settings):
        kind = "float" if types[field.name] in (int, float) else "string"
        required = field.default is dataclasses.MISSING
        expected[field.name] = kind if required else (kind, as_text(field.default))
    received = {
        name: value if isinstance(value, str) else (value["type"], as_text(value["default"]))
        for name, value in spec["parameters"].items()
    }
    assert received == expected
    flags = [f"--{name}={{{name}}}" for name in expected]
    assert spec["command"].split() == ["python", f"{SCRIPTS[entry_point]}.py", *flags]


def test_the_project_has_exactly_these_entry_points() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert (project["name"], project["conda_env"]) == ("image-classifier", "conda.yaml")
    assert set(project["entry_points"]) == set(SCRIPTS)


def test_mlflow_passes_over_what_only_the_plugin_reads(project: Path) -> None:
    """Stock `mlflow run` takes an MLproject with our keys; the keys say something for every entry point."""
    import mlflow.projects

    spec = yaml.safe_load((ROOT / "MLproject").read_text())
    assert spec["cache"] == [load_data.Settings.data_dir] == [train.Settings.data_dir]
    for name, entry_point in spec["entry_points"].items():
        resources = entry_point["resources"]
        assert {"cpu", "memory"} <= set(resources) <= {"cpu", "memory", "shm", "gpu"}, name
        assert resources["cpu"] > 0
        for key in {"memory", "shm"} & set(resources):
            assert re.fullmatch(r"[1-9]\d*(Mi|Gi)", resources[key]), (name, key)
    mlproject = {**spec, "entry_points": {"main": {**spec["entry_points"]["main"], "command": "true"}}}
    del mlproject["conda_env"]
    (project / "MLproject").write_text(yaml.safe_dump(mlproject))
    assert mlflow.projects.run(".", env_manager="local").get_status() == "FINISHED"
