import pytest

from mlproject_backends import ConfigError
from mlproject_backends.config import DOCKER, KUBERNETES, Config
from mlproject_backends.environment import is_loopback, is_secret, job_environment

SERVER = "http://tracking.example.org:5000"


def test_what_the_run_and_its_stores_need_travels_and_nothing_else() -> None:
    here = {
        "MLFLOW_TRACKING_PASSWORD": "pw",
        "MLFLOW_S3_ENDPOINT_URL": "http://s3.example.org",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "the server's own",
        "MLFLOW_CONDA_HOME": "/opt/conda",
        "AWS_SESSION_TOKEN": "token",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_PROFILE": "mine",
        "PATH": "/bin",
        "HF_TOKEN": "not named",
    }
    found = job_environment(Config(DOCKER), SERVER, "mlflow-artifacts:/0", here)
    assert found.env == {
        "MLFLOW_TRACKING_URI": SERVER,
        "MLFLOW_S3_ENDPOINT_URL": "http://s3.example.org",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "PYTHONUNBUFFERED": "1",
    }
    assert found.secrets == {"MLFLOW_TRACKING_PASSWORD": "pw", "AWS_SESSION_TOKEN": "token"}
    assert found.mounts == ()


def test_a_variable_from_a_kubernetes_secret_does_not_travel_by_itself() -> None:
    config = Config(KUBERNETES, env_from_secret={"AWS_SECRET_ACCESS_KEY": "s3/secret"})
    found = job_environment(config, SERVER, "s3://bucket/0", {"AWS_SECRET_ACCESS_KEY": "x", "AWS_ACCESS_KEY_ID": "y"})
    assert found.secrets == {"AWS_ACCESS_KEY_ID": "y"}


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("HF_TOKEN", "x", True),
        ("DB_PASSWORD", "x", True),
        ("MLFLOW_TRACKING_URI", "https://user:pw@host/path", True),
        ("MLFLOW_TRACKING_URI", "https://host:5000/path@x", False),
        ("MLFLOW_S3_ENDPOINT_URL", "http://host:9000", False),
        ("EPOCHS", "3", False),
    ],
)
def test_secrets_are_known_by_name_or_by_a_password_in_an_address(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


@pytest.mark.parametrize(
    ("uri", "loopback"),
    [
        ("http://localhost:5000", True),
        ("http://127.0.0.1", True),
        ("http://127.1.2.3:80", True),
        ("http://[::1]:5000", True),
        ("http://10.0.0.1:5000", False),
        ("https://tracking.example.org", False),
        ("postgresql://user:pw@localhost/mlflow", True),
        ("databricks", False),
    ],
)
def test_loopback_addresses(uri: str, loopback: bool) -> None:
    assert is_loopback(uri) is loopback


@pytest.mark.parametrize(
    ("uri", "artifacts", "message"),
    [
        ("sqlite:////home/me/mlflow.db", "/home/me/mlruns/0", "tracking store or its artifacts in /home/me"),
        (SERVER, "file:///srv/artifacts", "in /srv/artifacts on this machine"),
        ("http://localhost:5000", "mlflow-artifacts:/0", "http://localhost:5000, which only this machine can"),
    ],
)
def test_a_store_that_no_pod_can_reach_is_refused_with_advice(uri: str, artifacts: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        job_environment(Config(KUBERNETES), uri, artifacts, {})
    assert "KUBE_MLFLOW_TRACKING_URI" in refusal.value.message


def test_another_address_of_the_server_may_be_named() -> None:
    local = "http://localhost:5000"
    by_variable = job_environment(
        Config(KUBERNETES), local, "s3://b/0", {"KUBE_MLFLOW_TRACKING_URI": "http://10.0.0.5"}
    )
    assert by_variable.env["MLFLOW_TRACKING_URI"] == "http://10.0.0.5"
    by_key = job_environment(Config(DOCKER, tracking_uri="http://10.0.0.6"), local, "mlflow-artifacts:/0", {})
    assert by_key.env["MLFLOW_TRACKING_URI"] == "http://10.0.0.6"


@pytest.mark.parametrize(
    ("uri", "artifacts", "mounts"),
    [
        ("databricks", "dbfs:/databricks/mlflow-tracking/0", ()),
        ("sqlite:////home/me/mlflow.db", "/home/me/mlruns/0", ("/home/me",)),
        ("sqlite:////db/mlflow.db", "file:///other/a%20b", ("/db", "/other/a b")),
        ("file:///runs", "file:///runs/0", ("/runs",)),
        ("postgresql://user:pw@db/mlflow", "/artifacts", ("/artifacts",)),
    ],
)
def test_local_stores_are_mounted(uri: str, artifacts: str, mounts: tuple[str, ...]) -> None:
    assert job_environment(Config(DOCKER), uri, artifacts, {}).mounts == mounts
