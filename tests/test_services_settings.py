"""The tracking server's settings: random secrets at the first start, and one line for every value that cannot work."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SERVICES = Path(__file__).resolve().parent.parent / "services"
SECRETS = {
    *("ADMIN_PASSWORD", "DATABASE_PASSWORD", "FLASK_SECRET_KEY", "GRAFANA_PASSWORD"),
    *("S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_ADMIN_ACCESS_KEY", "S3_ADMIN_SECRET_KEY"),
}
LOAD = "import settings; settings.run(lambda: print(*sorted(settings.load().items()), sep='\\n'))"


class Place:
    """A folder with nothing but the settings in it."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / ".env"
        for name in ("settings.py", ".env.example"):
            shutil.copy(SERVICES / name, folder)

    def load(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Load them as a script does, with these variables and no others; isolated from site-packages."""
        command = [sys.executable, "-S", "-c", LOAD]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def values(self) -> dict[str, str]:
        lines = [line for line in self.file.read_text().splitlines() if line and not line.startswith("#")]
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def change(self, name: str, value: str) -> None:
        self.file.write_text(re.sub(rf"^{name}=.*$", f"{name}={value}", self.file.read_text(), flags=re.MULTILINE))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_first_start_makes_random_secrets(place: Place) -> None:
    done = place.load()
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(place.file.stat().st_mode) == 0o600
    first = place.values()
    assert all(re.fullmatch("[0-9a-f]{20,}", first[name]) for name in SECRETS)
    assert len({first[name] for name in SECRETS}) == len(SECRETS)
    assert {name for name, value in first.items() if value != Place.values(example(place))[name]} == SECRETS

    assert place.load().returncode == 0
    assert place.values() == first
    place.file.unlink()
    place.load()
    assert not {place.values()[name] for name in SECRETS} & {first[name] for name in SECRETS}
    assert sorted(path.name for path in place.folder.iterdir() if path.suffix != ".py" and path.is_file()) == [
        ".env",
        ".env.example",
    ]


def example(place: Place) -> Place:
    shown = Place(place.folder)
    shown.file = place.folder / ".env.example"
    return shown


def test_the_example_holds_every_setting_with_a_comment_and_no_secret(place: Place) -> None:
    values = example(place).values()
    assert {name for name, value in values.items() if not value} >= SECRETS
    known = subprocess.run(
        [sys.executable, "-c", "import settings; print(*settings.KNOWN)"],
        cwd=place.folder,
        capture_output=True,
        text=True,
    )
    assert set(known.stdout.split()) == set(values)
    # Each paragraph begins with what its settings are for.
    for paragraph in (place.folder / ".env.example").read_text().strip().split("\n\n"):
        assert paragraph.startswith("# "), paragraph


def test_the_environment_goes_before_the_file_and_into_a_new_one(place: Place) -> None:
    assert "('MLFLOW_PORT', '5001')" in place.load(MLFLOW_PORT="5001").stdout
    assert place.values()["MLFLOW_PORT"] == "5001"
    assert "('MLFLOW_PORT', '5002')" in place.load(MLFLOW_PORT="5002").stdout
    assert place.values()["MLFLOW_PORT"] == "5001"


def test_keys_of_a_store_of_yours_are_not_invented(place: Place) -> None:
    endpoint = {"S3_ENDPOINT_URL": "http://minio:9000"}
    refused = place.load(**endpoint)
    assert refused.returncode == 2
    assert "S3_ACCESS_KEY is empty; give it the keys of the store" in refused.stderr
    assert not place.file.exists()
    keys = {"S3_ACCESS_KEY": "ABCDEFGHIJ", "S3_SECRET_KEY": "a/key+of=the-store"}
    assert place.load(**endpoint, **keys).returncode == 0
    assert {**endpoint, **keys}.items() <= place.values().items()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ADMIN_PASSWORD", "", "ADMIN_PASSWORD is empty; give it a random value"),
        ("ADMIN_PASSWORD", "password1234", "too easy to guess"),
        ("DATABASE_PASSWORD", "mlflow", "too easy to guess"),
        ("DATABASE_PASSWORD", "changeme-changeme", "too easy to guess"),
        ("FLASK_SECRET_KEY", "a9f7c", "too easy to guess"),
        ("S3_SECRET_KEY", "minioadmin", "too easy to guess"),
        ("ADMIN_PASSWORD", "two words of a password", "ADMIN_PASSWORD has a space"),
        ("DATABASE_PASSWORD", "it's-a-long-password", "DATABASE_PASSWORD has a space, a quote"),
        ("MLFLOW_PORT", "70000", "MLFLOW_PORT is '70000'; it has to be a port from 1 to 65535"),
        ("DATABASE", "sqlite", "DATABASE is 'sqlite'; it has to be postgresql or mariadb"),
        ("AUTH", "off", "AUTH is 'off'; it has to be basic or none"),
        ("ARTIFACTS", "Proxied", "it has to be proxied or direct"),
        ("WORKERS", "0", "WORKERS is '0'"),
        ("S3_ENDPOINT_URL", "minio:9000", "it has to be http(s)://HOST[:PORT]"),
        ("S3_BUCKET", "My_Bucket", "S3_BUCKET is 'My_Bucket'"),
        ("S3_PREFIX", "/artifacts/", "S3_PREFIX is '/artifacts/'"),
        ("CORS_ALLOWED_ORIGINS", "dashboard.example.org", "http(s)://HOST[:PORT]"),
        ("MONITORING", "on", "MONITORING is 'on'; it has to be off, prometheus, or grafana"),
        ("GRAFANA_PASSWORD", "admin", "too easy to guess"),
        ("SERVING_TARGETS", "http://127.0.0.1:8080", "HOST:PORT, or several with commas between them"),
        ("ALERT_WEBHOOK_URL", "hooks.example.org/secret", "ALERT_WEBHOOK_URL cannot be that; it has to be http(s)://"),
        ("RETENTION_DAYS", "0", "RETENTION_DAYS is '0'"),
    ],
)
def test_a_value_that_cannot_work_is_one_line(place: Place, name: str, value: str, reason: str) -> None:
    place.load()
    place.change(name, value)
    done = place.load()
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert reason in done.stderr
    if (name in SECRETS or name == "ALERT_WEBHOOK_URL") and value:
        assert value not in done.stderr


def test_a_file_from_before_there_was_a_grafana_is_taken(place: Place) -> None:
    place.load()
    lines = place.file.read_text().splitlines(keepends=True)
    place.file.write_text("".join(line for line in lines if not line.startswith("GRAFANA_PASSWORD=")))
    assert place.load().returncode == 0
    refused = place.load(MONITORING="grafana")
    assert refused.returncode == 2
    assert "GRAFANA_PASSWORD is empty; give it a random value" in refused.stderr


def test_a_mistyped_name_is_told_with_the_nearest(place: Place) -> None:
    place.load()
    with place.file.open("a") as file:
        file.write("ALOWED_HOSTS=mlflow.example.org\n")
    done = place.load()
    assert done.returncode == 2
    assert "'ALOWED_HOSTS' is no setting; did you mean ALLOWED_HOSTS?" in done.stderr


def test_a_file_that_others_can_read_is_refused(place: Place) -> None:
    place.load()
    place.file.chmod(0o644)
    done = place.load()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "others can read it; run: chmod 600" in done.stderr


def test_git_leaves_secrets_and_data_alone() -> None:
    for name in (".env", ".backup.lock", "data/postgresql", "backups/1/mlflow.sql.gz"):
        command = ["git", "-C", str(SERVICES), "check-ignore", "--quiet", "--no-index", name]
        assert subprocess.run(command).returncode in (0, 128), name  # 128: this copy is no clone
