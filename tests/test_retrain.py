"""Looking after a champion, with real trainings: when it moves, when it stays, what is left behind, one at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoints
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from prediction_logs import log_rows, write_feedback, write_log
from sklearn.datasets import load_digits
from test_readme import check_mlflow_run
from tracking_server import TrackingServer, copy_database

import retrain
import train
from data_loader.dataset import load
from monitoring.rules import Rules
from utils import RunFailed, UsageError, registry
from utils.settings import parse
from utils.turn import Taken, Turns

ROOT = Path(__file__).resolve().parent.parent
FILES = ("MLproject", "conda.yaml", "train.py", "retrain.py")
SILENT = {"drift_score": 0, "new_labels": 0, "accuracy": 0, "age_days": 0}
SMALL, ALL = 300, 1797


def project_folder(folder: Path, **rules: dict[str, float]) -> Path:
    """A working folder with the project's scripts, digits in two sizes, and files of rules that else say nothing."""
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).symlink_to(ROOT / name)
    digits = load_digits()
    for size in (SMALL, ALL):
        images_NHW = (digits.images[:size] * 15.9).astype(np.uint8)
        np.savez(folder / f"{size}.npz", images=images_NHW, labels=digits.target[:size])
    for name, changes in {"retraining": {}, **rules}.items():
        limits = SILENT | {key: value for key, value in changes.items() if key in Rules.__dataclass_fields__}
        lines = [*limits.items(), ("[training]\n#", ""), *((k, v) for k, v in changes.items() if k not in limits)]
        (folder / f"{name}.toml").write_text("".join(f"{key} = {value}\n" for key, value in lines))
    return folder


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """A project and its tracking store, which is the working folder of the tests here."""
    folder = project_folder(
        tmp_path_factory.mktemp("team") / "project",
        labels={"new_labels": 1000, "margin": 0.01},
        age={"age_days": 1e-9, "epochs": 1, "learning_rate": 0.0},
        broken={"epochs": 0},
        used={"drift_score": 1.0, "accuracy": 0.9, "feedback": 50},
    )
    copy_database(empty_database, folder, str(folder / "mlruns" / "0"))
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    patch.setenv("PATH", os.environ["PATH"])
    yield folder
    mlflow.end_run()
    patch.undo()


def make_champion(name: str, dataset: str, epochs: int = 1) -> str:
    """Train and make the version a champion; gives its run."""
    settings = train.Settings(dataset=dataset, epochs=epochs, device="cpu", precision="fp32", register_as=name)
    train.main(settings)
    client = MlflowClient()
    version = client.get_model_version_by_alias(name, "challenger")
    client.set_registered_model_alias(name, "champion", version.version)
    return str(version.run_id)


def until(reached: Callable[[], bool]) -> None:
    """Wait for something that takes a process or two to start."""
    deadline = time.monotonic() + 180
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def steady(team: Path) -> str:
    """The run of a champion called steady, which no test moves."""
    return make_champion("steady", f"{SMALL}.npz")


def champion_of(name: str) -> str:
    return str(MlflowClient().get_registered_model(name).aliases["champion"])


def last_look() -> Run:
    return MlflowClient().search_runs(["0"], "tags.entry_point = 'retrain'", max_results=1)[0]


def trainings_of(run: Run) -> list[Run]:
    return list(MlflowClient().search_runs(["0"], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"))


def right_share(run_id: str, dataset: str) -> float:
    """Accuracy on the test split, by ONNX Runtime and NumPy alone."""
    model = Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model")) / "model.onnx"
    data = load(dataset, data_dir=Path("data"))
    rows = data.rows["test"]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    guesses_N = session.run(None, {"images": data.images_NHWC[rows]})[0].argmax(axis=1)
    return float((guesses_N == data.labels_N[rows]).mean())


def test_a_better_model_becomes_champion_and_says_where_it_comes_from(team: Path) -> None:
    first = make_champion("better", f"{SMALL}.npz", epochs=2)
    retrain.main(retrain.Settings(name="better", dataset=f"{ALL}.npz", rules="labels.toml"))
    look, client = last_look(), MlflowClient()
    assert champion_of("better") == "2"
    tags, metrics = look.data.tags, look.data.metrics
    assert (look.info.status, tags["decision"], tags["rules"]) == ("FINISHED", "yes", "new labels")
    assert metrics["champion/new_labels"] == ALL - SMALL
    (used,) = look.inputs.dataset_inputs
    assert used.dataset.name == str(ALL) and tags["data_digest"] == load(f"{ALL}.npz", data_dir=Path("data")).digest
    new = client.get_model_version("better", "2")
    (training,) = trainings_of(look)
    assert tags["training_run"] == new.run_id == training.info.run_id
    assert training.data.tags["retrain_run"] == new.tags["retrain_run"] == new.tags["promoted_by_run"]
    assert new.tags["promoted_by_run"] == look.info.run_id
    params, was = training.data.params, client.get_run(first).data.params
    assert [params[key] for key in ("epochs", "network", "device")] == ["2", was["network"], "cpu"]
    assert params["dataset"] == f"{ALL}.npz"
    # The accuracies are those of both models on the test split of the new version.
    assert metrics["test/accuracy"] == right_share(str(new.run_id), f"{ALL}.npz")
    assert metrics["champion/test_accuracy"] == right_share(first, f"{ALL}.npz")
    assert metrics["test/accuracy"] >= metrics["champion/test_accuracy"] + 0.01
    said = tags["mlflow.note.content"]
    assert f"| new labels | yes | {ALL - SMALL} new labelled images; 1000 are enough |" in said
    assert "version 2 is champion: 0 labelled images of the window are fewer than 50, so the held-out images" in said


def write_used(log: Path, team: Path, name: str, run_id: str) -> None:
    """A log of the champion that saw inverted digits: 600 rows, feedback for 60 of them, of which 30 are right."""
    from data_loader.statistics import image_statistics
    from models.onnx_model import OnnxClassifier

    model = Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model")) / "model.onnx"
    images_NHWC = 255 - load(f"{ALL}.npz", data_dir=team / "data").images_NHWC[:600]
    logits_NK, embeddings_NE = OnnxClassifier(model).outputs(images_NHWC)
    classes, start = list("0123456789"), datetime.now(UTC) - timedelta(hours=1)
    rows = log_rows(image_statistics(images_NHWC), embeddings_NE, logits_NK, classes, start=start, model=name)
    write_log(log, rows, classes)
    labels = [row["class"] if place % 2 else str((int(row["class"]) + 1) % 10) for place, row in enumerate(rows[:60])]
    said = zip(rows, labels, strict=False)
    write_feedback(
        log, [{"id": row["id"], "time": datetime.now(UTC), "label": label, "value": None} for row, label in said]
    )


def test_a_worse_model_leaves_the_champion_which_then_rests(team: Path, tmp_path: Path) -> None:
    run_id = make_champion("worse", f"{SMALL}.npz", epochs=2)
    retrain.main(retrain.Settings(name="worse", rules="age.toml"))  # trains with a learning rate of nought
    look = last_look()
    assert champion_of("worse") == "1"
    assert (look.info.status, look.data.tags["rules"], look.data.tags["new_version"]) == ("FINISHED", "age", "2")
    assert look.data.tags["outcome"].startswith("champion stays: 0 labelled images of the window are fewer than 50")
    assert "is less than the margin 0.005" in look.data.tags["outcome"]
    assert look.data.metrics["test/accuracy"] < look.data.metrics["champion/test_accuracy"]
    assert look.data.metrics["comparison/test_accuracy_difference"] < 0

    # The next look finds drift and bad feedback in the log, and does not train again so soon.
    write_used(tmp_path / "log", team, "worse", run_id)
    retrain.main(retrain.Settings(name="worse", rules="used.toml", log=str(tmp_path / "log")))
    again = last_look()
    assert again.info.run_id != look.info.run_id
    tags, metrics = again.data.tags, again.data.metrics
    assert (again.info.status, tags["decision"], tags["rules"]) == ("FINISHED", "no", "drift, accuracy")
    assert "in vain 0.0 hours ago and rests for 24 |" not in tags["mlflow.note.content"]
    assert "it was retrained in vain 0.0 hours ago and rests for 24" in tags["mlflow.note.content"]
    assert (metrics["champion/window_images"], metrics["champion/feedback"]) == (600, 60)
    assert metrics["champion/accuracy"] == 0.5
    assert metrics["champion/drift_feature_score"] > 1
    assert trainings_of(again) == []


def test_no_leaves_a_run_and_touches_nothing(steady: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = MlflowClient().search_model_versions("name = 'steady'")
    retrain.main(retrain.Settings(name="steady"))
    look = last_look()
    tags = look.data.tags
    assert (look.info.status, tags["decision"], tags["rules"]) == ("FINISHED", "no", "none")
    assert (tags["outcome"], tags["model_name"], tags["model_version"]) == ("not needed", "steady", "1")
    assert look.info.run_name.startswith("retrain-steady-")
    assert "**Retrain version 1 of steady: no**, no rule speaks for it." in tags["mlflow.note.content"]
    assert tags["mlflow.note.content"].count("| no |") == 5
    assert 0 <= look.data.metrics["champion/age_days"] < 0.01
    assert "retrain version 1 of steady: no, no rule speaks for it\noutcome: not needed\n" in capsys.readouterr().out
    assert MlflowClient().search_model_versions("name = 'steady'") == before
    assert trainings_of(look) == []


def change_after_a_look(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Between what retrain loads and what its training loads something happens to the data."""
    look = retrain.look

    def look_then_change(*arguments: Any) -> Any:
        present = look(*arguments)
        change()
        return present

    monkeypatch.setattr(retrain, "look", look_then_change)


def test_a_training_that_fails_leaves_the_champion_and_a_run_that_says_why(
    steady: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("gone.npz").write_bytes(Path(f"{ALL}.npz").read_bytes())
    change_after_a_look(monkeypatch, lambda: Path("gone.npz").unlink(missing_ok=True))
    failed = r"main did not end well: Run \(ID '\w{32}'\) failed: dataset='gone\.npz' does not exist"
    with pytest.raises(RunFailed, match=f"^{failed}"):
        retrain.main(retrain.Settings(name="steady", dataset="gone.npz", force=True))
    look = last_look()
    (training,) = trainings_of(look)
    assert (look.info.status, training.info.status, champion_of("steady")) == ("FAILED", "FAILED", "1")
    assert re.match(failed, look.data.tags["reason"])
    assert look.data.tags["outcome"] == f"failed, champion stays: {look.data.tags['reason']}"
    assert f"**Outcome**: {look.data.tags['outcome']}." in look.data.tags["mlflow.note.content"]

    # One that is refused before it has a run of its own to write to; both may be tried again at once.
    with pytest.raises(RunFailed, match=r"^main did not end well: Run \(ID '\w{32}'\) failed$"):
        retrain.main(retrain.Settings(name="steady", rules="broken.toml", force=True))
    assert champion_of("steady") == "1"
    assert Turns(steady).hours_since_last() is None


def test_bad_input_is_one_line_and_trains_nothing(
    steady: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(retrain.Settings, ["--name=steady", "--backend=slurm"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: backend: received 'slurm', allowed: local, docker, kubernetes\n"

    (tmp_path / "list.json").write_text("[]")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "nobody"}, "'models:/nobody@champion' does not exist"),
        ({"rules": "nothing.toml"}, "rules 'nothing.toml' cannot be read: No such file"),
        ({"backend_config": "nothing.json"}, "backend_config 'nothing.json' cannot be read"),
        ({"backend_config": str(tmp_path / "list.json")}, r"holds \[\]; give a JSON object"),
        ({"log": "nowhere"}, "'nowhere' is no folder"),
        ({"dataset": "digits", "data_version": "v9"}, "data_version needs a git repository"),
        # The plugin itself refuses what it does not know, before any job.
        ({"backend": "docker", "backend_config": '{"imag": "x"}', "force": True}, "imag"),
        ({"backend": "kubernetes", "backend_config": '{"imag": "x"}', "force": True}, "imag"),
    ]
    for changes, told in cases:
        with pytest.raises(Exception, match=told) as raised:
            retrain.main(retrain.Settings(**{"name": "steady", **changes}))
        assert raised.value.exit_code == 2, changes  # type: ignore[attr-defined]
        assert "\n" not in str(raised.value)
    assert champion_of("steady") == "1"
    assert trainings_of(last_look()) == []

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: EntryPoints(()))
    for backend in ("docker", "kubernetes"):
        told = f"backend={backend} needs the plugin in the Python that retrains: pip install ./plugin"
        with pytest.raises(UsageError, match=told):
            retrain.main(retrain.Settings(name="steady", backend=backend))


def test_data_that_changed_under_the_training_promote_nothing(steady: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = np.load(f"{ALL}.npz")

    def write(count: int) -> None:
        np.savez("moving.npz", images=digits["images"][:count], labels=digits["labels"][:count])

    write(400)
    change_after_a_look(monkeypatch, lambda: write(500))
    with pytest.raises(RunFailed, match="was trained on other data than there is here to compare on"):
        retrain.main(retrain.Settings(name="steady", dataset="moving.npz", rules="age.toml"))
    assert champion_of("steady") == "1"


@pytest.mark.slow
def test_of_two_at_once_one_trains_and_who_dies_or_stops_makes_room(
    tracking_server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project_folder(tmp_path / "project", long={"epochs": 10_000})
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    champion_run = make_champion("shared", f"{SMALL}.npz")
    client, started = MlflowClient(), []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "retrain.py", "--name=shared", "--force=true", "--rules=long.toml"]
        with (folder / f"{len(started)}.log").open("wb") as log:
            started.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    def leave(process: subprocess.Popen[bytes]) -> str:
        code, output = process.wait(120), (folder / f"{started.index(process)}.log").read_text()
        assert code == 0, output
        return output

    def turns() -> dict[str, str]:
        return {k: v for k, v in client.get_run(champion_run).data.params.items() if k.startswith("retraining_")}

    def is_training(run_id: str) -> bool:
        below = f"tags.`mlflow.parentRunId` = '{run_id}'"
        return any("train/loss" in run.data.metrics for run in client.search_runs(["0"], below))

    try:
        both = [start(), start()]
        until(lambda: any(process.poll() is not None for process in both))
        winner, loser = sorted(both, key=lambda process: process.poll() is not None)
        assert "outcome: left it to another retrain: run" in leave(loser)
        owner = turns()["retraining_1"]
        assert turns() == {"retraining_1": owner}
        until(lambda: is_training(owner))
        assert client.get_run(owner).data.tags["outcome"] == "under way"

        # Killed without a word, its run stays RUNNING: at first another leaves, after a long silence it takes over.
        os.killpg(winner.pid, signal.SIGKILL)
        winner.wait()
        assert f"left it to another retrain: run {owner} is at work, seen" in leave(start())
        client.set_tag(owner, "alive_at", f"{time.time() - 601:.0f}")
        heir = start()
        until(lambda: len(turns()) == 2)
        taken = turns()["retraining_2"]
        assert taken != owner
        with pytest.raises(RunFailed, match=f"run {taken} took over, because this one gave no sign of life"):
            Turns(champion_run).check(owner)

        # Asked to stop, it stops its training too and ends its run, which makes room at once.
        until(lambda: is_training(taken))
        heir.send_signal(signal.SIGTERM)
        assert heir.wait(60) == 130
        assert client.get_run(taken).info.status == "KILLED"
        assert client.get_run(taken).data.tags["outcome"] == "stopped"
        (training,) = client.search_runs(["0"], f"tags.`mlflow.parentRunId` = '{taken}'")
        assert training.info.status in ("FAILED", "KILLED")  # MLflow says the first of what it cancels
        assert "stopped after step" in (folder / "3.log").read_text()
        ours = client.create_run("0").info.run_id
        with Turns(champion_run).take(ours), pytest.raises(Taken, match=f"run {ours} is at work"):
            Turns(champion_run).take("another").__enter__()
        assert champion_of("shared") == "1"
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_the_cron_job_of_the_documentation_is_legal_and_restricted() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/retraining.md").read_text(), re.DOTALL | re.MULTILINE)
    job = yaml.safe_load(block)
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["apiVersion"], job["kind"], pod["restartPolicy"]) == ("batch/v1", "CronJob", "Never")
    # What the restricted Pod Security Standard asks for.
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    program, run, *words = container["command"] + container["args"]
    assert (program, run) == ("mlflow", "run")
    check_mlflow_run(words)


def test_a_turn_is_given_once_however_many_ask(project: Path) -> None:
    """Twenty threads at once, several times over: exactly one gets each turn."""
    from concurrent.futures import ThreadPoolExecutor

    client = MlflowClient()
    champion_run = client.create_run("0").info.run_id
    for turn in (1, 2, 3):
        runs = [client.create_run("0").info.run_id for _ in range(20)]

        def ask(run_id: str) -> bool:
            try:
                with Turns(champion_run).take(run_id):
                    return True
            except Taken:
                return False

        with ThreadPoolExecutor(20) as pool:
            got = list(pool.map(ask, runs))
        (winner,) = [run_id for run_id, won in zip(runs, got, strict=True) if won]
        assert Turns(champion_run).last() == (turn, winner)
        client.set_terminated(winner)
    assert registry.CHAMPION == "champion"
