"""The run in MLflow: nothing logged twice, nothing lost, an outage survived or told. Real stores, a real server."""

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import onnxruntime
import pytest
from mlflow.entities import Metric
from PIL import Image
from tracking_server import TrackingServer

from models.checkpoint import load_network, weights_sha256
from utils import RunFailed, UsageError
from utils.settings import setting
from utils.tracking import start_run

Start = Callable[..., "subprocess.Popen[str]"]


@dataclasses.dataclass(frozen=True)
class Settings:
    learning_rate: float = setting(0.01, "")
    strict: bool = setting(True, "")


def history(client: mlflow.MlflowClient, run_id: str, key: str) -> list[Metric]:
    return sorted(client.get_metric_history(run_id, key), key=lambda metric: metric.step)


def test_a_run_of_its_own_gets_settings_metrics_files_and_an_end(project: Path) -> None:
    (project / "note.txt").write_text("first")
    with start_run(Settings(), "main") as run:
        for step in range(2500):
            run.metrics({"loss": 1 / (step + 1)}, step)
        run.artifact(project / "note.txt", "notes")
        (project / "new.txt").write_text("second")
        (project / "new.txt").replace(project / "note.txt")
        run.json({"ü": 1}, "facts.json")
        run.dataset(name="d", digest="5" * 64, source="s3://bucket/key", context="training", profile={"n": 1})
    client = mlflow.MlflowClient()
    logged = client.get_run(run.id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params == {"learning_rate": "0.01", "strict": "true"}
    assert logged.data.tags["entry_point"] == "main"
    assert [m.value for m in history(client, run.id, "loss")] == [1 / (step + 1) for step in range(2500)]
    assert mlflow.artifacts.load_text(f"runs:/{run.id}/notes/note.txt") == "first", "as it was when it was logged"
    assert mlflow.artifacts.load_dict(f"runs:/{run.id}/facts.json") == {"ü": 1}
    assert logged.inputs.dataset_inputs[0].dataset.digest == "5" * 32
    assert logged.data.tags["data_digest"] == "5" * 64
    assert not list((project / "outputs").iterdir()), "what was sent is not kept"


def test_a_parameter_that_mlflow_run_logged_is_left_in_its_spelling(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.log_param(run_id, "learning_rate", "1e-2")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with start_run(Settings(), "main") as run:
        run.params({"learning_rate": 0.01, "extra": 3})
        run.params({"extra": 3})
    assert run.id == run_id
    assert client.get_run(run_id).data.params == {"learning_rate": "1e-2", "strict": "true", "extra": "3"}


def test_a_failure_fails_the_run_and_keeps_what_was_logged(project: Path) -> None:
    with pytest.raises(ZeroDivisionError), start_run(Settings(), "main") as run:
        run.metrics({"loss": 2.0})
        _ = 1 / 0
    logged = mlflow.MlflowClient().get_run(run.id)
    assert (logged.info.status, logged.data.metrics["loss"]) == ("FAILED", 2.0)


def test_only_the_newest_of_a_series_waits_to_be_sent(project: Path) -> None:
    with start_run(Settings(), "main") as run:
        run.later(lambda client: time.sleep(2), {})
        time.sleep(1.2)  # the outbox is now busy with the slow call
        for number in range(5):
            (project / "latest.txt").write_text(str(number))
            run.artifact(project / "latest.txt", replaces="latest")
        unsent = list((run.folder / "sending").rglob("latest.txt"))
        assert [path.read_text() for path in unsent] == ["4"]
    assert mlflow.artifacts.load_text(f"runs:/{run.id}/latest.txt") == "4"


def test_a_process_that_does_not_lead_logs_nothing(project: Path) -> None:
    with start_run(Settings(), "main", enabled=False) as run, run.system_metrics():
        run.metrics({"loss": 1.0})
        run.params({"a": 1})
        run.text("x", "x.txt")
        run.flush()
    assert mlflow.search_runs(search_all_experiments=True).empty


def test_an_unknown_run_and_an_absent_server_are_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    with pytest.raises(UsageError, match="check MLFLOW_RUN_ID") as refusal, start_run(Settings(), "main"):
        pass
    assert "\n" not in str(refusal.value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RunFailed, match="start the server or set MLFLOW_TRACKING_URI"), start_run(Settings(), "main"):
        pass


def test_a_patience_that_is_no_number_is_refused_before_there_is_a_run(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKING_PATIENCE_S", "10 min")
    with pytest.raises(UsageError, match="TRACKING_PATIENCE_S is '10 min'"), start_run(Settings(), "main"):
        pass
    assert mlflow.search_runs(search_all_experiments=True).empty


def train(start: Start, server: TrackingServer, epochs: int, **environment: str) -> "subprocess.Popen[str]":
    """Training on digits, started; gives control back after its first epoch."""
    flags = (f"--epochs={epochs}", "--log_every=1", "--precision=fp32", "--device=cpu")
    process = start("train.py", *flags, MLFLOW_TRACKING_URI=server.uri, **environment)
    assert process.stdout is not None and process.stderr is not None
    while (line := process.stdout.readline()) and not line.startswith("epoch"):
        pass
    assert line, process.stderr.read()
    return process


@pytest.mark.slow
def test_a_server_that_is_down_for_a_minute_costs_nothing(tracking_server: TrackingServer, start: Start) -> None:
    epochs = 60
    process = train(start, tracking_server, epochs)
    tracking_server.stop()
    time.sleep(60)
    tracking_server.start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run_id = re.search(r"; run (\w{32})$", out, re.MULTILINE)[1]  # type: ignore[index]
    client = mlflow.MlflowClient(tracking_server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    steps = epochs * (int(run.data.params["train_images"]) // 128)
    assert [metric.step for metric in history(client, run_id, "train/loss")] == list(range(1, steps + 1))
    assert len(history(client, run_id, "val/accuracy")) == epochs
    assert {file.path for file in client.list_artifacts(run_id, "checkpoints")} == {
        "checkpoints/latest.pt",
        "checkpoints/model.pt",
    }


@pytest.mark.slow
def test_a_server_that_never_comes_back_ends_the_run_with_everything_on_disk(
    tracking_server: TrackingServer, start: Start, tmp_path: Path
) -> None:
    epochs = 10
    process = train(start, tracking_server, epochs, TRACKING_PATIENCE_S="3")
    tracking_server.stop()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "for 3 s the tracking server did not take" in told[0]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert str(folder) in told[0]
    assert "Traceback" not in err
    onnxruntime.InferenceSession(folder / "model.onnx")
    assert (folder / "latest.pt").stat().st_size > 0
    sent = mlflow.MlflowClient(tracking_server.database).get_metric_history(folder.name, "train/loss")
    unsent = [json.loads(line) for line in (folder / "unsent.jsonl").read_text().splitlines()]
    steps = {metric.step for metric in sent} | {row["step"] for row in unsent if row.get("metric") == "train/loss"}
    assert steps == set(range(1, max(steps) + 1)) and len(steps) % epochs == 0
    assert "unsent.jsonl" in told[0]
    tags = {row["tag"]: row["value"] for row in unsent if "tag" in row}
    network, _ = load_network(folder / "unsent" / "checkpoints" / "model.pt")
    assert tags["weights_sha256"] == weights_sha256(network.state_dict())
    assert {"model": "model.onnx"} in unsent
    assert {"status": "FINISHED"} in unsent
    for name in ("learning_curves", "confusion_matrix", "worst_mistakes"):
        with Image.open(folder / "unsent" / "pictures" / f"{name}.png") as picture:
            assert picture.width > 100
    assert not list((folder / "sending").iterdir())


def test_when_script_and_server_fail_both_are_told_and_everything_is_kept(
    tracking_server: TrackingServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    monkeypatch.setenv("TRACKING_PATIENCE_S", "1")
    (tmp_path / "note.txt").write_text("as it was")
    with pytest.raises(ZeroDivisionError), start_run(Settings(), "main") as run:
        run.flush()
        tracking_server.stop()
        run.params({"network": "cnn"})
        run.dataset(name="d", digest="5" * 64, source="s3://bucket/key", context="training", profile={"n": 1})
        run.json({"ü": 1}, "tables/facts.json")
        run.artifact(tmp_path / "note.txt", "notes")
        run.artifact(tmp_path / "note.txt")
        (tmp_path / "note.txt").unlink()
        _ = 1 / 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "for 1 s the tracking server did not take" in told[0]
    folder = tmp_path / "outputs" / run.id
    assert str(folder) in told[0]
    unsent = [json.loads(line) for line in (folder / "unsent.jsonl").read_text().splitlines()]
    assert unsent == [
        {"param": "network", "value": "cnn"},
        {
            "dataset": "d",
            "digest": "5" * 64,
            "source": {"uri": "s3://bucket/key"},
            "context": "training",
            "profile": {"n": 1},
        },
        {"tag": "data_digest", "value": "5" * 64},
        {"tag": "reason", "value": "division by zero"},
        {"status": "FAILED"},
    ]
    assert json.loads((folder / "unsent/tables/facts.json").read_text()) == {"ü": 1}
    for name in ("notes/note.txt", "note.txt"):
        assert (folder / "unsent" / name).read_text() == "as it was"
