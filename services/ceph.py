"""Ceph's S3 gateway on this machine, with its data on disk: one monitor, one OSD (BlueStore on a file), one gateway.

Needs Debian's ceph-mon, ceph-osd and radosgw. All of it listens on 127.0.0.1. One disk keeps one copy of the data: the
backup is the second one.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

from process import run_to_end
from settings import Refused

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "apt-get install ceph-mon ceph-osd radosgw"
TIMEOUT_S = 120
LEAST_SPACE = 4 * 2**30
# What each daemon may do.
CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    "client.rgw": {"mon": "allow rw", "osd": "allow rwx"},
}
# In the order of their start; each stays in the foreground.
DAEMONS = {
    "ceph-mon": ("ceph-mon", "-f", "-i", "a"),
    "ceph-osd": ("ceph-osd", "-f", "-i", "0"),
    "radosgw": ("radosgw", "-f", "-n", "client.rgw"),
}


def absent() -> list[str]:
    """The programs that are not installed."""
    return [program for program in PROGRAMS if not shutil.which(program)]


class Ceph:
    """A cluster in a folder. `make` it once; then each start configures it and runs the daemons, in their order."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "ceph.conf"
        self.environment = {**os.environ, "CEPH_CONF": str(self.config)}

    def configure(self, port: int) -> None:
        """Write the configuration: the folder may have moved, and the gateway's port is a setting."""
        about = json.loads((self.folder / "cluster.json").read_text())
        settings = {
            "fsid": about["cluster"],
            "mon_host": f"[v2:127.0.0.1:{about['monitor_port']}/0]",
            "ms_bind_msgr1": "false",
            "public_addr": "127.0.0.1",
            "cluster_addr": "127.0.0.1",
            "keyring": self.folder / "keyring",
            "run_dir": self.folder,
            "crash_dir": self.folder,
            "admin_socket": "",
            "log_file": "",  # standard error, of which the caller keeps a log
            "mon_data": self.folder / "mon",
            "osd_data": self.folder / "osd",
            "rgw_data": self.folder / "rgw",
            "osd_objectstore": "bluestore",
            "bluestore_block_size": about["bytes"],
            "osd_memory_target": 2**30,
            # One disk, so one copy, and nobody to wait for.
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
        self.config.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))

    def make(self) -> None:
        """Make the cluster's files, in a folder of which nothing is there yet."""
        free = shutil.disk_usage(self.folder.parent).free
        if free < LEAST_SPACE:
            raise Refused(f"{self.folder.parent} has {free / 2**30:.1f} GB left; the S3 server needs 4 GB or more", 1)
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir(parents=True)
        # The OSD's file is sparse: it takes what is stored in it, and never the last of the disk.
        about = {"cluster": str(uuid.uuid4()), "monitor_port": _free_port(), "bytes": free * 8 // 10 // 2**20 * 2**20}
        (self.folder / "cluster.json").write_text(json.dumps(about))
        self.configure(port=0)
        keyring, monitors, osd = self.folder / "keyring", self.folder / "monmap", str(uuid.uuid4())
        self._do("ceph-authtool", keyring, "--create-keyring")
        for who, rights in CAPABILITIES.items():
            words = [word for kind, right in rights.items() for word in ("--cap", kind, right)]
            self._do("ceph-authtool", keyring, "--gen-key", "--name", who, *words)
        address = f"[v2:127.0.0.1:{about['monitor_port']}]"
        self._do("monmaptool", "--create", "--fsid", about["cluster"], "--addv", "a", address, monitors)
        self._do("ceph-mon", "-f", "-i", "a", "--mkfs", "--monmap", monitors, "--keyring", keyring)
        monitor = subprocess.Popen(
            DAEMONS["ceph-mon"], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._do("ceph", "osd", "new", osd)
            # -f: without it, a child of its own would do the work, and outlive a Ctrl-C.
            self._do("ceph-osd", "-f", "-i", "0", "--mkfs", "--osd-uuid", osd)
        finally:
            monitor.terminate()
            monitor.wait()

    def set_user(self, name: str, access_key: str, secret_key: str, admin: bool = False) -> None:
        """Make a user of the gateway, or give it these keys in place of its old ones; they travel by standard input."""
        key = f"user:{name}"
        try:
            user = json.loads(self._admin("metadata", "get", key))
        except Refused:
            buckets = [] if admin else ["--max-buckets=-1"]
            self._admin("user", "create", "--uid", name, "--display-name", name, *buckets)
            user = json.loads(self._admin("metadata", "get", key))
        user["data"]["keys"] = [{"user": name, "access_key": access_key, "secret_key": secret_key}]
        if admin:
            user["data"]["caps"] = [{"type": "user-policy", "perm": "*"}]
            user["data"]["admin"] = 1  # else it could not read what others wrote into its own bucket
        self._admin("metadata", "put", key, text=json.dumps(user))

    def _admin(self, *words: str, text: str | None = None) -> str:
        return self._do("radosgw-admin", "--name", "client.rgw", *words, text=text)

    def _do(self, *command: Any, text: str | None = None) -> str:
        words = [str(word) for word in command]
        try:
            done = run_to_end(words, text=text, timeout_s=TIMEOUT_S, env=self.environment)
        except subprocess.TimeoutExpired:
            raise Refused(f"{words[0]} did not end in {TIMEOUT_S} s; the S3 server does not work here", 1) from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Refused(f"{words[0]} {words[1]} failed: {said[-1]}", 1)
        return done.stdout


def _free_port() -> int:
    """Below what the system gives to outgoing connections (32768 and up): the cluster keeps it, stopped or not."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
