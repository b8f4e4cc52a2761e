"""A real S3 server for tests: Ceph's radosgw on 127.0.0.1, data in memory. It checks signatures, as doubles do not."""

import os
import shutil
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from local_ports import free_port

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
CONFIG = """[global]
fsid={cluster}
mon_host=[v2:127.0.0.1:{monitor}/0]
ms_bind_msgr1=false
public_addr=127.0.0.1
cluster_addr=127.0.0.1
keyring={folder}/keyring
run_dir={folder}
admin_socket=
log_file={folder}/$name.log
mon_cluster_log_file={folder}/cluster.log
mon_data={folder}/mon
osd_data={folder}/osd
rgw_data={folder}/rgw
osd_objectstore=memstore
osd_pool_default_size=1
osd_pool_default_pg_num=1
osd_pool_default_pg_autoscale_mode=off
osd_crush_chooseleaf_type=0
mon_allow_pool_size_one=true
mon_max_pg_per_osd=1000
mon_data_avail_crit=1
rgw_frontends=beast endpoint=127.0.0.1:{gateway}
rgw_run_sync_thread=false
"""
SETUP = """set -eu; key="ceph-authtool {folder}/keyring"
$key -C -g -n mon. --cap mon 'allow *'; $key -g -n client.admin --cap mon 'allow *' --cap osd 'allow *'
$key -g -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
$key -g -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
monmaptool --create --fsid {cluster} --addv a '[v2:127.0.0.1:{monitor}]' {folder}/map
ceph-mon -i a --mkfs --monmap {folder}/map
"""


@dataclass(frozen=True)
class ObjectStorage:
    endpoint: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        names = "MLFLOW_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
        return dict(zip(names, (self.endpoint, self.access_key, self.secret_key), strict=True))

    def client(self) -> Any:
        return boto3.client("s3", "us-east-1", None, True, None, self.endpoint, self.access_key, self.secret_key)


@pytest.fixture(scope="session")
def object_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorage]:
    """The server with a bucket named `runs`."""
    from conftest import missing

    if absent := [program for program in PROGRAMS if not shutil.which(program)]:
        missing(f"no S3 server: {', '.join(absent)} not installed (apt-get install ceph-mon ceph-osd radosgw)")
    with ExitStack() as at_end:
        storage = _start(tmp_path_factory.mktemp("storage"), at_end)
        storage.client().create_bucket(Bucket="runs")
        yield storage


def _start(folder: Path, at_end: ExitStack) -> ObjectStorage:
    names = {"folder": folder, "cluster": uuid.uuid4(), "monitor": free_port(), "gateway": free_port()}
    (folder / "ceph.conf").write_text(CONFIG.format(**names))
    environment = {**os.environ, "CEPH_CONF": f"{folder}/ceph.conf"}

    def do(command: str) -> None:
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def serve(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as output:
            process = subprocess.Popen([*command, "-f"], env=environment, stdout=output, stderr=output)
        at_end.callback(process.wait)
        at_end.callback(process.kill)

    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    do(SETUP.format(**names))
    serve("ceph-mon", "-i", "a")
    osd = uuid.uuid4()
    do(f"ceph osd new {osd} && ceph-osd -i 0 --mkfs --osd-uuid {osd}")
    serve("ceph-osd", "-i", "0")
    serve("radosgw", "-n", "client.rgw")
    storage = ObjectStorage(f"http://127.0.0.1:{names['gateway']}", "an-access-key", "a-secret-of-storage")
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(storage.endpoint, timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)
    keys = f"--access-key {storage.access_key} --secret-key {storage.secret_key}"
    do(f"radosgw-admin -n client.rgw user create --uid test --display-name test {keys}")
    return storage
