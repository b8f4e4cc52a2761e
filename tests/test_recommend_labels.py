"""`recommend_labels` as its users see it: a folder to label, a new version of the data, one line for every refusal."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from prediction_logs import log_rows, write_log
from s3_server import S3Server
from service import PredictionService, png
from sklearn.datasets import load_digits

import recommend_labels
import train
from data_loader import DataError
from data_loader.dataset import load
from monitoring import MonitoringError
from utils import UsageError

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("Äpfel", "=Birnen", "'Q\"")


def run(capsys: pytest.CaptureFixture[str], output: Path | str, **settings: Any) -> str:
    """Call the entry point in this process; what it printed."""
    recommend_labels.main(recommend_labels.Settings(output=str(output), **settings))
    return capsys.readouterr().out


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 1), np.uint8)


def a_log(folder: Path, count: int = 60, age_hours: float = 1.0, **others: str) -> Path:
    """A log with `count` rows, of which every second one has an image, 0.png the least certain and so on."""
    random = np.random.default_rng(0)
    sure_N = np.arange(count)
    logits_NK = np.stack([sure_N * 0.1, 0 * sure_N, 0 * sure_N - 3], axis=1)
    embeddings_NE = random.standard_normal((count, 5)).astype(np.float32)
    rows = log_rows(
        random.random((count, 4)),
        embeddings_NE,
        logits_NK,
        CLASSES,
        start=datetime.now(UTC) - timedelta(hours=age_hours),
        **others,  # type: ignore[arg-type]
    )
    day = f"images/day={rows[0]['time'].date()}"
    (folder / day).mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        if number % 2 == 0:
            row |= {"image": f"{day}/{row['id']}.png", "kept": "uncertain"}
            (folder / row["image"]).write_bytes(png(pixels(number)[:, :, 0]))
    write_log(folder, rows, CLASSES)
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(folder: Path, labels: Sequence[str]) -> Path:
    """Fill the first rows in and save the table as a German Excel does."""
    rows = table(folder)
    for row, label in zip(rows, labels, strict=False):
        row["label"] = label
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=";", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "labels.csv").write_bytes(text.getvalue().encode("utf-8-sig"))
    return folder / "labels.csv"


def artifacts(run: mlflow.entities.Run, path: str = "") -> set[str]:
    found = mlflow.MlflowClient().list_artifacts(run.info.run_id, path)
    return {file.path for file in found if not file.is_dir} | {
        name for folder in found if folder.is_dir for name in artifacts(run, folder.path)
    }


def newest_run() -> mlflow.entities.Run:
    return mlflow.MlflowClient().search_runs(["0"], max_results=1)[0]


def test_the_folder_for_the_labeller(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "to label", log=str(a_log(project / "log")), count=7)
    assert "7 images to label, 0 of them far from the reference; " in said
    assert "kept 30 images of that time, 30 are still there" in said
    assert "fill in the column 'label' of to label/labels.csv" in said
    rows = table(project / "to label")
    assert len(rows) == 7 and {row["label"] for row in rows} == {""}
    logged = {path.read_bytes() for path in (project / "log").rglob("*.png")}
    for number, row in enumerate(rows, 1):
        content = (project / "to label" / row["file"]).read_bytes()
        assert row["file"] == f"images/{number:04}.png" and content in logged
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert [path.read_bytes() for path in (project / "log").rglob(f"{row['id']}.png")] == [content]
        assert re.fullmatch(r"uncertain: (Äpfel|=Birnen) \d+% or (Äpfel|=Birnen) \d+%", row["why"])
        assert row["suggested"] in ("Äpfel", "'=Birnen") and float(row["confidence"]) < 0.9
    with Image.open(project / "to label" / "grid.png") as grid:
        assert grid.width > 100
    found = newest_run()
    assert artifacts(found) == {
        "labels/grid.png",
        "labels/labels.csv",
        *(f"labels/images/{number:04}.png" for number in range(1, 8)),
    }
    assert found.data.metrics == {"kept_images": 30, "present_images": 30, "chosen": 7, "chosen_far": 0}
    assert found.data.tags["entry_point"] == "recommend_labels"


def test_the_same_log_on_s3_gives_the_same_folder(
    project: Path, capsys: pytest.CaptureFixture[str], s3: S3Server
) -> None:
    log, bucket = a_log(project / "log"), s3.new_bucket()
    for path in log.rglob("*.*"):
        s3.client().upload_file(str(path), bucket, f"live/{path.relative_to(log)}")
    run(capsys, "here", log=str(log), count=9)
    run(capsys, "there", log=f"s3://{bucket}/live", count=9)
    assert table(project / "here") == table(project / "there")


def test_images_that_went_or_broke_are_passed_over(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = a_log(project / "log", count=20)
    gone, broken, *others = sorted(log.rglob("*.png"))
    gone.unlink()
    broken.write_bytes(b"no image")
    assert "kept 10 images of that time, 9 are still there (1 unreadable)" in run(capsys, "to-label", log=str(log))
    assert {row["id"] for row in table(project / "to-label")} == {path.stem for path in others}


def test_the_hours_bound_the_window(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = a_log(a_log(project / "log", age_hours=30), count=10, age_hours=1)
    assert "kept 5 images" in run(capsys, "a", log=str(log), hours=24.0)
    assert "kept 35 images" in run(capsys, "b", log=str(log), hours=31.0)
    assert "kept 35 images" in run(capsys, "c", log=str(log), hours=0.0)
    with pytest.raises(UsageError, match=r"nothing to label: .* kept 0 images of that time, 0 are"):
        run(capsys, "d", log=str(log), hours=0.5)
    assert not (project / "d").exists()


def test_versions_are_not_mixed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = a_log(a_log(project / "log", version="1"), version="2")
    mixed = r"models digits and the versions 1, 2, which cannot be compared; give model_uri="
    with pytest.raises(MonitoringError, match=mixed):
        run(capsys, "a", log=str(log))


def test_what_the_data_set_holds_is_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = a_log(project / "log", count=40)
    folder = project / "data set"
    for number in range(300):  # the first 20 are images of the log
        path = folder / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels(number if number < 20 else 1000 + number)[:, :, 0]))
    said = run(capsys, "to-label", log=str(log), dataset=str(folder), count=100)
    assert "20 are still there (10 in the data set already)" in said
    assert len(table(project / "to-label")) == 10
    version = project / "v2"
    said = run(capsys, version, labels=str(fill(project / "to-label", ["=Birnen"] * 4)), dataset=str(folder))
    assert "4 images more than " in said and "6 rows without a label" in said
    again = run(capsys, "more", log=str(log), dataset=str(version), count=100)
    assert "(14 in the data set already)" in again and len(table(project / "more")) == 6


def test_the_version_trains_and_old_images_keep_their_splits(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = a_log(project / "log", count=40)
    run(capsys, "to-label", log=str(log), count=20)
    labels = fill(project / "to-label", ["7", "", "3", *["1"] * 17])
    said = run(capsys, project / "digits v2", labels=str(labels), dataset="digits")
    before, after = (load(name, data_dir=Path("data")) for name in ("digits", "digits v2"))
    assert "19 images more than sklearn.datasets.load_digits (" in said and "; 1 rows without a label" in said
    assert f"data digest {after.digest}" in said and after.digest != before.digest
    for split, rows in before.rows.items():
        old = sorted((int(before.labels_N[row]), before.images_NHWC[row].tobytes()) for row in rows)
        now = [(int(after.labels_N[row]), after.images_NHWC[row].tobytes()) for row in after.rows[split]]
        assert set(old) <= set(now) and len(now) >= len(old)
    assert len(after.labels_N) == len(before.labels_N) + 19
    found = newest_run()
    assert found.data.tags["data_digest"] == after.digest and found.data.tags["extends_digest"] == before.digest
    assert found.data.metrics == {"added_images": 19, "known_images": 0, "rows_without_label": 1}
    assert artifacts(found) == {"labels/labels.csv"}
    train.main(train.Settings(dataset="digits v2", epochs=1, device="cpu"))
    assert newest_run().data.params["data_digest"] == after.digest


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "give log= to choose images to label, or labels= and dataset= to make a new version"),
        ({"log": "log", "labels": "x.csv"}, "give log= to choose images"),
        ({"labels": "x.csv"}, "labels= needs dataset=, the data set to extend"),
        ({"labels": "x.csv", "dataset": "digits"}, r"labels 'x.csv' cannot be read: No such file or directory"),
        ({"labels": "x.csv", "dataset": "nowhere"}, "dataset='nowhere' does not exist; allowed: digits"),
        ({"log": "nowhere"}, "'nowhere' is no folder; give an existing folder or s3://"),
        ({"log": "log", "output": "s3://bucket/x"}, "output 's3://bucket/x' is no folder of this machine"),
        ({"log": "log", "output": "log"}, "output 'log' exists; give a new folder"),
        ({"log": "log", "output": "a file/x"}, "output 'a file/x' cannot be written: Not a directory"),
        ({"log": "log", "model_uri": "models:/none@champion"}, "'models:/none@champion' does not exist"),
        ({"log": "log", "model_uri": "some/model.onnx"}, "names no run of training; give runs:/RUN_ID/model"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    project: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, str], told: str
) -> None:
    a_log(project / "log", count=4)
    (project / "a file").write_text("")
    with pytest.raises((UsageError, DataError, MonitoringError), match=told) as error:
        run(capsys, **({"output": "new"} | settings))
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert {path.name for path in project.iterdir()} <= {"log", "a file", "data", "outputs", "mlflow.db", "mlruns"}


def test_a_bad_table_leaves_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "to-label", log=str(a_log(project / "log")), count=5)
    labels = str(fill(project / "to-label", ["7", "seven"]))
    with pytest.raises(MonitoringError, match=r"line 3, 'images/0002.png': the label 'seven' is no class; the"):
        run(capsys, "v2", labels=labels, dataset="digits")
    assert not list(project.glob("*v2*"))
    said = run(capsys, "v2", labels=labels, dataset="digits", new_classes=True)
    assert "2 images more" in said
    assert load("v2", data_dir=Path("data")).classes == (*"0123456789", "seven")


def walk(project: Path) -> list[dict[str, str]]:
    """The parameters of the first five commands of docs/labelling.md, with their files in the folder `project`."""
    text = (ROOT / "docs" / "labelling.md").read_text()
    commands = [
        shlex.split(line) for line in re.findall(r"^mlflow run --env-manager local \. (.*)$", text, re.MULTILINE)
    ]
    given = [dict(word.split("=", 1) for word in words if "=" in word) for words in commands[:5]]
    files = {"served", "to-label", "to-label/labels.csv", "digits-v2"}
    return [{name: str(project / text) if text in files else text for name, text in each.items()} for each in given]


@pytest.mark.slow
def test_from_the_service_to_a_model_that_knows_more(project: Path) -> None:
    """The walk of docs/labelling.md on digits, half of those that are sent inverted."""
    first, served, chosen, added, second = walk(project)
    train.main(train.Settings(**first, epochs=4, device="cpu"))
    digits = load_digits()
    images_NHW = (digits.images * 15.9).astype(np.uint8)
    seen_NHW, truth = np.concatenate([images_NHW[:100], 255 - images_NHW[100:200]]), digits.target[:200]
    service = PredictionService(served["model_uri"], project, f"--log={served['log']}", "--keep_share=1")
    try:
        service.wait()
        for image_HW in seen_NHW:
            status, answer, _ = service.ask("POST", "/predict", png(image_HW))
            assert status == 200, answer
        assert service.stop() == 0
    finally:
        service.kill()

    def mlflow_run(parameters: dict[str, str]) -> str:
        command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", str(ROOT), "-e", "recommend_labels"]
        for name, value in {**parameters, "data_dir": project / "data"}.items():
            command += ["-P", f"{name}={value}"]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = mlflow_run(chosen)
    assert "40 images to label, " in said and "kept 200 images of that time, 200 are still there" in said
    rows = table(project / "to-label")
    kinds = {row["why"].split()[0] for row in rows}
    assert kinds == {"uncertain:", "far"}, "the inverted ones are far from the reference that training left"
    number_of = {image_HW.tobytes(): number for number, image_HW in enumerate(seen_NHW)}
    numbers = [number_of[np.asarray(Image.open(project / "to-label" / row["file"])).tobytes()] for row in rows]
    assert len(set(numbers)) == 40
    assert sum(number >= 100 for number in numbers) > 20, "more of what is new than of what is known"
    fill(project / "to-label", [str(truth[number]) for number in numbers])
    said = mlflow_run(added)
    digest = re.search(r"data digest (\w{64})", said)
    assert digest and "40 images more" in said
    train.main(train.Settings(**second, epochs=4, device="cpu"))
    assert newest_run().data.params["data_digest"] == digest[1]
    labels_of = {image_HW.tobytes(): label for image_HW, label in zip(seen_NHW, truth.tolist(), strict=True)}
    version = load(second["dataset"], data_dir=project / "data")
    new = [row for row, image_HWC in enumerate(version.images_NHWC) if image_HWC.tobytes() in labels_of]
    assert len(new) >= 40
    assert all(version.labels_N[row] == labels_of[version.images_NHWC[row].tobytes()] for row in new)


@pytest.mark.slow
def test_a_version_for_dvc(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The DVC commands of docs/labelling.md, with a folder in place of the bucket."""
    author = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def shell(*commands: str) -> None:
        for command in commands:
            environment = {**os.environ, **author, "PATH": programs, "DVC_NO_ANALYTICS": "1"}
            done = subprocess.run(["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    for number in range(100):
        path = project / "images" / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels(1000 + number)[:, :, 0]))
    shell("git init -qb main", "dvc init -q", "dvc remote add -q -d store ../bucket", "dvc add -q images")
    shell("git add images.dvc .gitignore .dvc", "git commit -qm 2", "git tag v2.0", "dvc push -q")
    run(capsys, "to-label", log=str(a_log(project / "log")), count=12)
    labels = fill(project / "to-label", ["Äpfel", *["'=Birnen"] * 9])
    document = (ROOT / "docs" / "labelling.md").read_text()
    recommend, *commands, _ = re.findall(r"## Data that DVC.*?```sh\n(.*?)```", document, re.DOTALL)[0].splitlines()
    parameters = dict(word.split("=", 1) for word in shlex.split(recommend) if "=" in word)
    assert project / parameters["labels"] == project / labels
    said = run(capsys, **parameters)
    shell(*commands)
    versions = [load("images", data_dir=Path("data"), data_version=tag, data_repo=".") for tag in ("v2.0", "v3.0")]
    old, new = ({file["path"]: file for file in version.manifest["files"]} for version in versions)
    assert old.items() <= new.items() and len(new) == len(old) + 10
    assert f"data digest {versions[1].digest}" in said
