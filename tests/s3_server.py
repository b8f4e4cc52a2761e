"""A real S3 server for tests: Ceph's radosgw on 127.0.0.1, with its data in memory and its files in a
temporary folder.

One monitor, one memory-backed OSD and one gateway, each started in the foreground as a child of the tests
and stopped by its process id. Needs Debian's ceph-mon, ceph-osd and radosgw. radosgw checks signatures, as
test doubles do not.
"""

import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
START_TIMEOUT_S = 60
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"


@dataclass(frozen=True)
class S3Server:
    """The server as one of its users sees it; first the one that owns the buckets and says what others may do."""

    endpoint: str
    config: Path
    """Ceph's configuration file."""
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    def environment(self) -> dict[str, str]:
        """What a program needs to reach the server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self, service: str = "s3") -> Any:
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def new_user(self, policy: str) -> "S3Server":
        """The server as a new user sees it, who owns no bucket and may do what the IAM policy (JSON) allows."""
        name, secret = f"user-{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
        keys = ("--access-key", name, "--secret-key", secret)
        admin(self.config, "user", "create", "--uid", name, "--display-name", name, "--max-buckets=-1", *keys)
        self.client("iam").put_user_policy(UserName=name, PolicyName="test", PolicyDocument=policy)
        return replace(self, access_key=name, secret_key=secret)

    def remove_keys(self) -> None:
        """Take this user's keys away, as when they have been rotated."""
        admin(self.config, "key", "rm", "--key-type", "s3", "--access-key", self.access_key)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server, started once for all tests."""
    from conftest import missing

    if absent := [program for program in PROGRAMS if not shutil.which(program)]:
        missing(f"no S3 server: {', '.join(absent)} not installed (apt-get install ceph-mon ceph-osd radosgw)")
    with ExitStack() as at_end:
        yield start(tmp_path_factory.mktemp("ceph"), at_end)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's environment pointing at it."""
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


def start(folder: Path, at_end: ExitStack) -> S3Server:
    """Start the three daemons in `folder`; at_end stops them, the last started first."""
    port, first_port = free_port(), free_port()
    keyring, config, monitor_map = folder / "keyring", folder / "ceph.conf", folder / "monmap"
    cluster, osd = str(uuid.uuid4()), str(uuid.uuid4())
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    settings = {
        "fsid": cluster,
        "mon_host": f"[v2:127.0.0.1:{first_port}/0]",
        "ms_bind_msgr1": "false",
        "public_addr": "127.0.0.1",
        "cluster_addr": "127.0.0.1",
        "keyring": keyring,
        "run_dir": folder,
        "admin_socket": "",
        "crash_dir": folder,
        "log_file": folder / "$name.log",
        "mon_cluster_log_file": folder / "cluster.log",
        "mon_data": folder / "mon",
        "osd_data": folder / "osd",
        "rgw_data": folder / "rgw",
        # Data in memory, one copy of it, and no waiting for a quorum of others.
        "osd_objectstore": "memstore",
        "memstore_device_bytes": "2G",
        "osd_pool_default_size": 1,
        "osd_pool_default_pg_num": 1,
        "osd_pool_default_pg_autoscale_mode": "off",
        "osd_crush_chooseleaf_type": 0,
        "mon_allow_pool_size_one": "true",
        "mon_max_pg_per_osd": 1000,
        "mon_data_avail_crit": 1,
        "paxos_propose_interval": 0.05,
        "paxos_min_wait": 0.01,
        "rgw_frontends": f"beast endpoint=127.0.0.1:{port}",
        "rgw_run_sync_thread": "false",
    }
    config.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    environment = {**os.environ, "CEPH_CONF": str(config)}

    def do(*command: object) -> None:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def serve(*command: object) -> None:
        with (folder / f"{command[0]}.out").open("wb") as output:
            words = [*map(str, command), "-f"]
            process = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
        at_end.callback(process.wait)
        at_end.callback(process.kill)  # nothing is worth a slow shutdown: the data is in memory

    may = {
        "mon.": ("mon", "allow *"),
        "client.admin": ("mon", "allow *", "osd", "allow *"),
        "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
        "client.rgw": ("mon", "allow rw", "osd", "allow rwx"),
    }
    for number, (who, what) in enumerate(may.items()):
        caps = [word for kind, grant in zip(what[::2], what[1::2], strict=True) for word in ("--cap", kind, grant)]
        do("ceph-authtool", keyring, *(["-C"] if number == 0 else []), "-g", "-n", who, *caps)
    do(
        "monmaptool",
        "--create",
        "--fsid",
        cluster,
        "--addv",
        "a",
        f"[v2:127.0.0.1:{first_port}]",
        monitor_map,
    )
    do("ceph-mon", "-i", "a", "--mkfs", "--monmap", monitor_map, "--keyring", keyring)
    serve("ceph-mon", "-i", "a")
    do("ceph", "osd", "new", osd)
    do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    serve("ceph-osd", "-i", "0")
    serve("radosgw", "-n", "client.rgw")
    endpoint = f"http://127.0.0.1:{port}"
    wait_for(endpoint, folder)
    keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
    admin(config, "user", "create", "--uid", "test", "--display-name", "test", *keys)
    admin(config, "caps", "add", "--uid", "test", "--caps", "user-policy=*")
    return S3Server(endpoint, config)


def admin(config: Path, *words: str) -> None:
    """A command to the server's administration."""
    command = ["radosgw-admin", "--conf", str(config), "--name", "client.rgw", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def wait_for(url: str, folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.out"))
                raise AssertionError(f"the S3 server did not start ({error})\n{logs}") from error
            time.sleep(0.05)
