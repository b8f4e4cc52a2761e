"""Data in a bucket, against a real S3 server."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ports import free_port
from s3_server import S3Server

from data_loader import DataError
from data_loader.dataset import load
from data_loader.s3 import split_uri

CLASSES = ('it\'s a "cat"', "Ünïcode 漢字", "plus+and space")


def png(seed: int) -> bytes:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def objects(per_class: int = 20) -> dict[str, bytes]:
    return {
        f"{name}/image {number}?#%.png": png(100 * label + number)
        for label, name in enumerate(CLASSES)
        for number in range(per_class)
    }


def upload(s3: S3Server, bucket: str, prefix: str, files: dict[str, bytes]) -> None:
    client = s3.client()
    for key, data in files.items():
        client.put_object(Bucket=bucket, Key=prefix + key, Body=data)


def mirror_times(data_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (data_dir / "s3").rglob("*.png")}


def test_a_prefix_is_the_same_data_set_as_the_folder(s3: S3Server, tmp_path: Path) -> None:
    bucket, files = s3.new_bucket(), objects()
    upload(s3, bucket, "some/where/", files)
    upload(s3, bucket, "some/where", {"-else/x/y.png": b"not below the prefix"})
    for name, data in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)

    remote = load(f"s3://{bucket}/some/where", data_dir=tmp_path / "data")
    local = load(str(tmp_path / "folder"), data_dir=tmp_path / "data")

    assert remote.digest == local.digest
    assert remote.classes == tuple(sorted(CLASSES))
    assert np.array_equal(remote.images_NHWC, local.images_NHWC)
    assert remote.source == f"s3://{bucket}/some/where"
    assert remote.name == "where"


def test_only_what_changed_is_downloaded_and_what_was_deleted_goes(s3: S3Server, tmp_path: Path) -> None:
    bucket, files = s3.new_bucket(), objects()
    upload(s3, bucket, "set/", files)
    first = load(f"s3://{bucket}/set/", data_dir=tmp_path)
    before = mirror_times(tmp_path)
    assert load(f"s3://{bucket}/set/", data_dir=tmp_path).digest == first.digest
    assert mirror_times(tmp_path) == before

    changed, gone = sorted(files)[0], sorted(files)[1]
    upload(s3, bucket, "set/", {changed: png(9999), f"{CLASSES[0]}/new.png": png(10000)})
    s3.client().delete_object(Bucket=bucket, Key=f"set/{gone}")
    second = load(f"s3://{bucket}/set", data_dir=tmp_path)

    assert {entry["path"] for entry in second.manifest["files"]} == files.keys() - {gone} | {f"{CLASSES[0]}/new.png"}
    sums = [{entry["path"]: entry["sha256"] for entry in each.manifest["files"]} for each in (first, second)]
    assert {path for path in sums[0].keys() & sums[1].keys() if sums[0][path] != sums[1][path]} == {changed}


def test_an_unchanged_object_is_not_downloaded_again_even_if_others_are(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    upload(
        s3,
        bucket,
        "",
        {f"{name}/{n}.png": png(100 * label + n) for label, name in enumerate("ab") for n in range(30)},
    )
    load(f"s3://{bucket}", data_dir=tmp_path)
    before = {path: path.stat().st_ino for path in (tmp_path / "s3").rglob("*.png")}
    upload(s3, bucket, "", {"a/extra.png": png(777)})
    load(f"s3://{bucket}", data_dir=tmp_path)
    after = {path: path.stat().st_ino for path in (tmp_path / "s3").rglob("*.png")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1


def test_a_damaged_mirror_is_repaired(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    upload(s3, bucket, "", objects())
    first = load(f"s3://{bucket}", data_dir=tmp_path)
    shutil.rmtree(tmp_path / "cache")
    victim = next((tmp_path / "s3").rglob("*.png"))
    victim.write_bytes(b"")
    assert load(f"s3://{bucket}", data_dir=tmp_path).digest == first.digest


def test_an_npz_object(s3: S3Server, tmp_path: Path) -> None:
    bucket, buffer = s3.new_bucket(), io.BytesIO()
    images_NHW = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    np.savez(buffer, images=images_NHW, labels=np.arange(60) % 3)
    upload(s3, bucket, "deep/", {"some set.npz": buffer.getvalue(), "some set.npz.backup": b"?"})
    dataset = load(f"s3://{bucket}/deep/some set.npz", data_dir=tmp_path)
    assert np.array_equal(dataset.images_NHWC[..., 0], images_NHW)
    assert dataset.name == "some set"


def test_a_multipart_object(s3: S3Server, tmp_path: Path) -> None:
    """Its ETag is no MD5 of the content, so only its size can be checked."""
    from boto3.s3.transfer import TransferConfig

    bucket, path = s3.new_bucket(), tmp_path / "big.npz"
    images_NHWC = np.random.default_rng(0).integers(0, 256, (60, 256, 256, 3), dtype=np.uint8)
    np.savez(path, images=images_NHWC, labels=np.arange(60) % 3)
    parts = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    s3.client().upload_file(str(path), bucket, "big.npz", Config=parts)
    assert "-" in s3.client().head_object(Bucket=bucket, Key="big.npz")["ETag"]
    assert np.array_equal(load(f"s3://{bucket}/big.npz", data_dir=tmp_path / "data").images_NHWC, images_NHWC)


def test_unsafe_keys_are_named_and_never_written(s3: S3Server, tmp_path: Path) -> None:
    bucket, unsafe = (
        s3.new_bucket(),
        ("../../outside.png", "a/../../b.png", "/absolute.png", "a//b.png", "a/./c.png"),
    )
    too_long = f"a/{'x' * 300}.png"
    upload(s3, bucket, "set/", {**objects(), **{key: png(5) for key in (*unsafe, too_long)}})
    data_dir = tmp_path / "below" / "data"
    with pytest.raises(DataError, match=r"6 bad file\(s\)"):
        load(f"s3://{bucket}/set", data_dir=data_dir)
    dataset = load(f"s3://{bucket}/set", data_dir=data_dir, on_error="skip")
    assert {entry["path"] for entry in dataset.manifest["bad"]} == {*unsafe, too_long}
    assert dataset.classes == tuple(sorted(CLASSES))
    assert [path.name for path in tmp_path.iterdir()] == ["below"]
    assert not Path("/absolute.png").exists()


def test_a_key_that_is_also_a_folder_is_named(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    upload(s3, bucket, "", {**objects(), CLASSES[0]: b"a file where a folder has to be"})
    dataset = load(f"s3://{bucket}", data_dir=tmp_path, on_error="skip")
    assert [(entry["path"], entry["reason"]) for entry in dataset.manifest["bad"]] == [
        (CLASSES[0], "object key that is also the folder of others")
    ]


def test_a_file_that_becomes_a_folder(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    upload(s3, bucket, "", {**objects(), "new": b"x"})
    assert load(f"s3://{bucket}", data_dir=tmp_path).classes == tuple(sorted(CLASSES))
    s3.client().delete_object(Bucket=bucket, Key="new")
    upload(s3, bucket, "", {f"new/{n}.png": png(n) for n in range(5)})
    assert "new" in load(f"s3://{bucket}", data_dir=tmp_path).classes


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_said_in_one_line(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load("s3://no-such-bucket-anywhere/x", data_dir=tmp_path)
    assert "no such bucket" in one_line(error)
    bucket = s3.new_bucket()
    for prefix in ("", "nowhere", "nowhere.npz"):
        with pytest.raises(DataError) as error:
            load(f"s3://{bucket}/{prefix}", data_dir=tmp_path)
        assert "holds no objects" in one_line(error)


def test_wrong_keys_are_said_in_one_line(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.new_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError) as error:
        load(f"s3://{bucket}", data_dir=tmp_path)
    assert "the secret key is wrong" in one_line(error)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    with pytest.raises(DataError) as error:
        load(f"s3://{bucket}", data_dir=tmp_path)
    assert "does not know this access key" in one_line(error)


def test_no_credentials_and_no_server_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError) as error:
        load("s3://bucket/x", data_dir=tmp_path)
    assert "credentials" in one_line(error)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(DataError) as error:
        load("s3://bucket/x", data_dir=tmp_path)
    assert "Could not connect" in one_line(error)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "no address")
    with pytest.raises(DataError) as error:
        load("s3://bucket/x", data_dir=tmp_path)
    assert "is no endpoint" in one_line(error)


def test_an_object_that_arrives_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lists one ETag and sends other bytes: the boundary where only a stand-in can lie."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Liar(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listing = "list-type" in self.path
            body = (
                b"<ListBucketResult><Contents><Key>a/x.png</Key><Size>4</Size>"
                b'<ETag>"098f6bcd4621d373cade4e832627b4f6"</ETag></Contents></ListBucketResult>'
                if listing
                else b"Test"  # the ETag is the MD5 of "test"
            )
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/xml")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        with pytest.raises(DataError, match="arrived damaged"):
            load("s3://bucket", data_dir=tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://user@bucket/x", "s3://bucket:80/x", "s4://bucket/x"])
def test_addresses_that_are_none(uri: str) -> None:
    with pytest.raises(DataError, match="s3://bucket/prefix"):
        split_uri(uri)


def test_addresses_with_special_characters() -> None:
    assert split_uri("s3://bucket/a b/c?d#e%20/") == ("bucket", "a b/c?d#e%20")
    assert split_uri("s3://bucket") == ("bucket", "")
