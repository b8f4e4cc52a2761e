"""Backups: everything is lost and comes back, a damaged backup is refused, an older schema is upgraded."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric, Param
from services_stack import Place

pytestmark = pytest.mark.slow
NAMES = ["实验 一号", "Эксперимент", "🚀"]
READER = ("natalia", "a-password-of-a-reader")


@pytest.fixture(scope="module")
def seeded(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A server with something of everything on it."""
    done = place.run("local.py", "start")
    assert done.returncode == 0, done.stderr
    client = place.client()
    weights = tmp_path_factory.mktemp("weights") / "weights.bin"
    weights.write_bytes(bytes(range(256)) * 40_000)  # 10 MB: S3 takes it in parts
    for name in NAMES:
        experiment = client.create_experiment(name)
        run = client.create_run(experiment, run_name=f"{name} run", tags={"метка": "값"})
        losses = [Metric("loss", 1 / (step + 1), 1000 + step, step) for step in range(100)]
        client.log_batch(run.info.run_id, losses, [Param("learning rate", "значение 🚀")])
        client.log_dict(run.info.run_id, {"name": name}, "a folder/отчёт 1.json")
        client.set_terminated(run.info.run_id)
    client.log_artifact(run.info.run_id, str(weights))
    client.create_registered_model("модель", tags={"owner": "team"})
    client.create_model_version("модель", client.get_run(run.info.run_id).info.artifact_uri, run.info.run_id)
    client.set_registered_model_alias("модель", "champion", "1")
    made = place.ask("POST", "2.0/mlflow/users/create", json=dict(zip(("username", "password"), READER, strict=True)))
    assert made.status_code == 200, made.text
    return place


def everything(place: Place, folder: Path) -> dict[str, Any]:
    """All that is on the server, as its clients read it."""
    client = place.client()
    found: dict[str, Any] = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            target = folder / run.info.run_id
            target.mkdir(parents=True)
            downloaded = Path(client.download_artifacts(run.info.run_id, "", str(target)))
            files = {p.relative_to(downloaded).as_posix(): p.read_bytes() for p in downloaded.rglob("*") if p.is_file()}
            history = [dict(metric) for metric in client.get_metric_history(run.info.run_id, "loss")]
            found[f"{experiment.name} {run.info.run_id}"] = {**run.to_dictionary(), "history": history, "files": files}
    found["models"] = [dict(model) for model in client.search_registered_models()]
    found["versions"] = [dict(version) for version in client.search_model_versions()]
    found["users"] = place.ask("GET", "2.0/mlflow/users/list").json()
    found["reader"] = place.ask("GET", "2.0/mlflow/experiments/search?max_results=9", auth=READER).json()
    return found


def newest_backup(place: Place) -> Path:
    return max((place.services / "backups").iterdir())


def test_everything_is_lost_and_comes_back(seeded: Place, tmp_path: Path) -> None:
    before = everything(seeded, tmp_path / "before")
    assert len(before) == len(NAMES) + 4
    assert "users" in before["users"]
    assert "experiments" in before["reader"]
    done = seeded.run("backup.py", "backup")
    assert done.returncode == 0, done.stderr
    backup = newest_backup(seeded)
    assert backup.stat().st_mode & 0o777 == 0o700

    password = seeded.password
    seeded.run("local.py", "stop")
    shutil.rmtree(seeded.services / "data")
    (seeded.services / ".env").unlink()  # a new machine has secrets of its own
    assert seeded.run("local.py", "start").returncode == 0
    assert [found.name for found in seeded.client().search_experiments()] == ["Default"]
    done = seeded.run("backup.py", "restore", str(backup))
    assert done.returncode == 0, done.stderr
    # Users are back too, the administrator with the password of before.
    assert seeded.ask("GET", "2.0/mlflow/users/list").status_code == 401
    seeded.known_password = password
    assert everything(seeded, tmp_path / "after") == before


def test_a_restore_asks_before_it_overwrites(seeded: Place, tmp_path: Path) -> None:
    before = everything(seeded, tmp_path / "before")
    assert seeded.run("backup.py", "backup").returncode == 0
    backup = newest_backup(seeded)
    client = seeded.client()
    run_id = client.create_run("0").info.run_id
    client.log_text(run_id, "made after the backup", "late.txt")

    done = seeded.run("backup.py", "restore", str(backup))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the server is in use" in done.stderr
    assert client.get_run(run_id)

    done = seeded.run("backup.py", "restore", str(backup), FORCE="1")
    assert done.returncode == 0, done.stderr
    assert everything(seeded, tmp_path / "after") == before


def test_a_damaged_backup_is_refused_before_anything_is_touched(seeded: Place, tmp_path: Path) -> None:
    backup = newest_backup(seeded)
    damaged, halved = tmp_path / "damaged", tmp_path / "halved"
    shutil.copytree(backup, damaged)
    with (damaged / "artifacts.tar").open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"?")
    shutil.copytree(backup, halved)
    (halved / "mlflow_auth.sql.gz").unlink()
    for folder, reason in (
        (damaged, "artifacts.tar is not as it was written"),
        (halved, "lacks mlflow_auth.sql.gz"),
        (tmp_path, "is no complete backup"),
    ):
        done = seeded.run("backup.py", "restore", str(folder), FORCE="1")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert reason in done.stderr
    assert seeded.client().search_experiments()


def test_one_backup_restore_or_upgrade_at_a_time(place: Place) -> None:
    with (place.services / ".backup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (["backup"], ["restore", "a-folder"], ["upgrade"]):
            done = place.run("backup.py", *words)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert "another backup, restore or upgrade is at work here; wait until it has ended" in done.stderr
    assert "is at work" not in place.run("backup.py", "restore", "a-folder").stderr


MAKE_OLDER = """
import os, sqlalchemy
from alembic import command
from alembic.script import ScriptDirectory
from mlflow.server.auth.db import utils as auth
from mlflow.store.db import utils as tracking

def older(config, steps):
    scripts = ScriptDirectory.from_config(config)
    return [script.revision for script in scripts.walk_revisions()][steps]

engine = sqlalchemy.create_engine(os.environ["URI"])
config = tracking._get_alembic_config(os.environ["URI"])
with engine.begin() as connection:
    connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
tracking.InitialBase.metadata.create_all(engine)
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, older(config, 12))
    for statement in os.environ["ROWS"].split(";"):
        connection.execute(sqlalchemy.text(statement))
engine = sqlalchemy.create_engine(os.environ["URI"] + "_auth")
with engine.begin() as connection:
    connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
auth.migrate(engine, older(auth._get_alembic_config(os.environ["URI"] + "_auth"), 2))
"""
ROWS = """
INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES
    (0, 'Default', 'mlflow-artifacts:/0', 'active'), (7, 'of before', 'mlflow-artifacts:/7', 'active');
INSERT INTO runs
    (run_uuid, name, experiment_id, status, start_time, lifecycle_stage, artifact_uri, source_type, user_id) VALUES
    ('0123456789abcdef0123456789abcdef', 'old run', 7, 'FINISHED', 1, 'active', 'mlflow-artifacts:/7/a', 'LOCAL', 'x');
INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES
    ('loss', 0.25, 1, '0123456789abcdef0123456789abcdef', 3, false);
INSERT INTO latest_metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES
    ('loss', 0.25, 1, '0123456789abcdef0123456789abcdef', 3, false)
"""


def test_an_older_schema_is_refused_and_upgraded(seeded: Place, tmp_path: Path) -> None:
    uri = (
        f"postgresql+psycopg2://mlflow:{seeded.setting('DATABASE_PASSWORD')}@127.0.0.1:{seeded.ports['DATABASE_PORT']}"
    )
    environment = {**os.environ, "URI": f"{uri}/mlflow", "ROWS": ROWS}
    assert seeded.run("local.py", "start").returncode == 0
    done = subprocess.run([sys.executable, "-c", MAKE_OLDER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seeded.run("local.py", "stop")

    done = seeded.run("local.py", "start")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "older MLflow; run: make upgrade (on Kubernetes: docs/operations.md)" in done.stderr
    assert not seeded.processes()

    done = seeded.run("backup.py", "upgrade")
    assert done.returncode == 0, done.stderr
    seeded.known_password = ""  # there was no user, so the administrator is made anew
    run = seeded.client().get_run("0123456789abcdef0123456789abcdef")
    assert (run.info.run_name, run.data.metrics) == ("old run", {"loss": 0.25})
    assert newest_backup(seeded).joinpath("mlflow.sql.gz").exists()
