"""The S3 policies of services/: each is enough for its work, done by the program it is for, and for nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "services"))
POLICIES = ROOT / "services" / "s3-policies"
PREFIX = "team/mlflow"
RUN = f"{PREFIX}/1/run/artifacts"
ABOVE_MULTIPART = 9 * 2**20  # boto3 sends files above 8 MiB in parts
OUTSIDE = ["team/mlflow2/secret", "team/other/secret", "secret"]
INSIDE = f"{RUN}/kept.txt"


def policy(name: str, bucket: str, prefix: str = PREFIX) -> str:
    """The policy as someone fills it in."""
    return (POLICIES / f"{name}.json").read_text().replace("BUCKET", bucket).replace("PREFIX", prefix)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of which the team has one prefix, with neighbours."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3_server.endpoint)
    name = s3_server.new_bucket()
    for key in [*OUTSIDE, INSIDE]:
        s3_server.client().put_object(Bucket=name, Key=key, Body=key.encode())
    return name


def store(user: S3Server, bucket: str) -> Any:
    """MLflow's artifact store of one run, as `user` has it."""
    return S3ArtifactRepository(
        f"s3://{bucket}/{RUN}", access_key_id=user.access_key, secret_access_key=user.secret_key
    )


def keys(server: S3Server, bucket: str) -> set[str]:
    return {entry["Key"] for entry in server.client().list_objects_v2(Bucket=bucket).get("Contents", [])}


def read_all(artifacts: Any, folder: Path) -> dict[str, bytes]:
    """List and download all artifacts."""
    listed = [entry.path for entry in artifacts.list_artifacts()]
    folder.mkdir()
    downloaded = Path(artifacts.download_artifacts("", str(folder)))
    found = {p.relative_to(downloaded).as_posix(): p.read_bytes() for p in downloaded.rglob("*") if p.is_file()}
    assert {path.split("/")[0] for path in found} == set(listed)
    return found


@pytest.mark.parametrize("name", ["server", "client"])
def test_who_writes_can_log_list_and_download(name: str, bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    artifacts = store(s3_server.new_user(policy(name, bucket)), bucket)
    big, folder = tmp_path / "big.bin", tmp_path / "folder"
    big.write_bytes(os.urandom(ABOVE_MULTIPART))
    folder.mkdir()
    (folder / "заметка 😀.txt").write_text("text")
    artifacts.log_artifact(str(big), "model")
    artifacts.log_artifacts(str(folder), "notes")
    assert read_all(artifacts, tmp_path / "down") == {
        "kept.txt": INSIDE.encode(),
        "model/big.bin": big.read_bytes(),
        "notes/заметка 😀.txt": b"text",
    }


def test_the_server_signs_parts_for_its_clients_and_deletes(bucket: str, s3_server: S3Server) -> None:
    artifacts = store(s3_server.new_user(policy("server", bucket)), bucket)
    upload = artifacts.create_multipart_upload("big.bin", num_parts=1)
    assert requests.put(upload.credentials[0].url, data=b"part", timeout=30).ok
    artifacts.abort_multipart_upload("big.bin", upload.upload_id)
    artifacts.delete_artifacts("kept.txt")
    assert keys(s3_server, bucket) == set(OUTSIDE)


def test_a_reader_lists_and_downloads(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    artifacts = store(s3_server.new_user(policy("reader", bucket)), bucket)
    assert read_all(artifacts, tmp_path / "down") == {"kept.txt": INSIDE.encode()}


def refused(call: Callable[..., Any], **request: Any) -> bool:
    """Whether the server says no, to the whole request or to every object of it."""
    try:
        answer = call(**request)
    except ClientError as error:
        return error.response["Error"]["Code"] in ("AccessDenied", "403")
    return bool(answer.get("Errors")) and not answer.get("Deleted")


@pytest.mark.parametrize("name", ["server", "client", "reader"])
def test_nothing_outside_the_prefix(name: str, bucket: str, s3_server: S3Server) -> None:
    user = s3_server.new_user(policy(name, bucket))
    s3, before = user.client(), keys(s3_server, bucket)
    for key in OUTSIDE:
        folder = key.removesuffix("secret")
        assert refused(s3.get_object, Bucket=bucket, Key=key)
        assert refused(s3.head_object, Bucket=bucket, Key=key)
        assert refused(s3.list_objects_v2, Bucket=bucket, Prefix=folder)
        assert refused(s3.put_object, Bucket=bucket, Key=key, Body=b"changed")
        assert refused(s3.create_multipart_upload, Bucket=bucket, Key=key)
        assert refused(s3.delete_object, Bucket=bucket, Key=key)
        source = {"Bucket": bucket, "Key": key}
        assert refused(s3.copy_object, Bucket=bucket, Key=f"{RUN}/copy", CopySource=source)
    assert refused(s3.delete_objects, Bucket=bucket, Delete={"Objects": [{"Key": key} for key in OUTSIDE]})
    assert refused(s3.list_objects_v2, Bucket=bucket)
    assert refused(s3.list_objects_v2, Bucket=bucket, Prefix=PREFIX)  # would show team/mlflow2
    assert keys(s3_server, bucket) == before


@pytest.mark.parametrize("name", ["server", "client", "reader", "dvc", "backup"])
def test_nobody_gives_rights_away_or_removes_the_bucket(name: str, bucket: str, s3_server: S3Server) -> None:
    s3 = s3_server.new_user(policy(name, bucket)).client()
    assert refused(s3.put_object_acl, Bucket=bucket, Key=INSIDE, ACL="public-read")
    assert refused(s3.put_bucket_policy, Bucket=bucket, Policy=policy("server", bucket))
    assert refused(s3.delete_bucket, Bucket=bucket)
    assert refused(s3.create_bucket, Bucket=f"{bucket}-own")


@pytest.mark.parametrize("name", ["client", "reader", "dvc"])
def test_only_the_server_deletes(name: str, bucket: str, s3_server: S3Server) -> None:
    s3 = s3_server.new_user(policy(name, bucket)).client()
    assert refused(s3.delete_object, Bucket=bucket, Key=INSIDE)
    assert refused(s3.delete_objects, Bucket=bucket, Delete={"Objects": [{"Key": INSIDE}]})
    assert INSIDE in keys(s3_server, bucket)


def test_a_reader_does_not_write(bucket: str, s3_server: S3Server) -> None:
    s3 = s3_server.new_user(policy("reader", bucket)).client()
    assert refused(s3.put_object, Bucket=bucket, Key=INSIDE, Body=b"changed")
    assert refused(s3.create_multipart_upload, Bucket=bucket, Key=INSIDE)


def test_dvc_has_a_bucket_of_its_own(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    own = s3_server.new_bucket()
    user = s3_server.new_user(policy("dvc", own))
    environment = {**os.environ, **user.environment(), "DVC_NO_ANALYTICS": "1"}

    def dvc(*words: str) -> None:
        command = [sys.executable, "-m", "dvc", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    folder = tmp_path / "repository"
    folder.mkdir()
    data = folder / "data.bin"
    data.write_bytes(content := os.urandom(ABOVE_MULTIPART))
    dvc("init", "--quiet", "--no-scm")
    dvc("remote", "add", "--default", "team", f"s3://{own}/dvc")
    dvc("remote", "modify", "team", "endpointurl", user.endpoint)
    dvc("add", "--quiet", data.name)
    dvc("push")
    data.unlink()
    (cached,) = [path for path in (folder / ".dvc/cache/files").rglob("*") if path.is_file()]
    cached.unlink()
    dvc("pull")
    assert data.read_bytes() == content
    assert refused(user.client().get_object, Bucket=bucket, Key=INSIDE)
    assert refused(user.client().list_objects_v2, Bucket=bucket)
    assert refused(user.client().put_object, Bucket=bucket, Key=INSIDE, Body=b"changed")


def test_a_backup_and_a_restore(bucket: str, s3_server: S3Server) -> None:
    user = s3_server.new_user(policy("backup", bucket))
    owner, s3 = s3_server.client(), user.client()
    settings = {"S3_ENDPOINT_URL": user.endpoint, "S3_REGION": "us-east-1", "S3_BUCKET": bucket, "S3_PREFIX": PREFIX}
    environment = {**os.environ, **settings, "S3_ACCESS_KEY": user.access_key, "S3_SECRET_KEY": user.secret_key}

    def artifacts(command: str, given: bytes = b"") -> bytes:
        script = [sys.executable, str(ROOT / "services/artifacts.py"), command]
        return subprocess.run(script, env=environment, input=given, capture_output=True, check=True).stdout

    big = os.urandom(ABOVE_MULTIPART)
    owner.put_object(Bucket=bucket, Key=f"{RUN}/big.bin", Body=big)
    saved = artifacts("save")
    owner.delete_object(Bucket=bucket, Key=f"{RUN}/big.bin")
    owner.put_object(Bucket=bucket, Key=f"{RUN}/later", Body=b"")
    artifacts("load", saved)
    assert keys(s3_server, bucket) == {*OUTSIDE, INSIDE, f"{RUN}/big.bin"}
    assert s3.get_object(Bucket=bucket, Key=f"{RUN}/big.bin")["Body"].read() == big  # who wrote it owns it on Ceph
    # An artifact that goes during a backup is known not to be there, where other policies say "forbidden".
    with pytest.raises(ClientError) as gone:
        s3.head_object(Bucket=bucket, Key=f"{RUN}/later")
    assert gone.value.response["Error"]["Code"] == "404"
    for key in OUTSIDE:
        assert refused(s3.get_object, Bucket=bucket, Key=key)
        assert refused(s3.put_object, Bucket=bucket, Key=key, Body=b"changed")
        assert refused(s3.delete_object, Bucket=bucket, Key=key)


def test_a_bucket_is_made_where_there_is_none_and_the_keys_may(bucket: str, s3_server: S3Server) -> None:
    """The server's least keys may not ask for the bucket itself; who asks with wrong ones is told which to correct."""
    import local
    from artifacts import Bucket
    from settings import Refused

    def values(user: S3Server, name: str) -> dict[str, str]:
        where = {"S3_ENDPOINT_URL": user.endpoint, "S3_REGION": "us-east-1", "S3_BUCKET": name, "S3_PREFIX": PREFIX}
        return {**where, "S3_ACCESS_KEY": user.access_key, "S3_SECRET_KEY": user.secret_key}

    user = s3_server.new_user(policy("server", bucket))
    Bucket(values(user, bucket)).make()
    with pytest.raises(Refused, match=r"correct S3_ENDPOINT_URL, S3_BUCKET or S3_ADMIN_ACCESS_KEY"):
        local.make_bucket(values(user, f"{bucket}-absent"), user.endpoint)
    Bucket(values(s3_server, f"{bucket}-new")).make()
    s3_server.client().head_bucket(Bucket=f"{bucket}-new")

    script = [sys.executable, str(ROOT / "services/artifacts.py"), "count"]
    environment = {**os.environ, **values(user, bucket), "S3_SECRET_KEY": "of-another-store"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "S3_ADMIN_ACCESS_KEY and S3_ADMIN_SECRET_KEY in services/.env have to be this store's" in done.stderr


@pytest.mark.parametrize(
    ("endpoint", "region", "told"),
    [
        ("https://s3.eu-central-1.amazonaws.com", "eu-central-1", {"LocationConstraint": "eu-central-1"}),
        ("https://s3.amazonaws.com", "us-east-1", None),
        ("http://minio:9000", "eu-central-1", None),
    ],
)
def test_only_aws_is_told_where_a_bucket_is_to_be(endpoint: str, region: str, told: dict[str, str] | None) -> None:
    from artifacts import Bucket

    keys = {"S3_ACCESS_KEY": "a-key", "S3_SECRET_KEY": "a-secret"}
    store = Bucket({"S3_ENDPOINT_URL": endpoint, "S3_REGION": region, "S3_BUCKET": "new", "S3_PREFIX": PREFIX, **keys})
    with Stubber(store.client) as network:
        network.add_client_error("head_bucket", "404", http_status_code=404)
        more = {"CreateBucketConfiguration": told} if told else {}
        network.add_response("create_bucket", {}, {"Bucket": "new", **more})
        store.make()
        network.assert_no_pending_responses()
