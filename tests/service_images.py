"""Stand-ins for the images of services/compose.yaml that cannot be pulled: the real programs of this machine with the
conventions of the published images, under their names.

Nothing is downloaded: a program comes along with the libraries that it is linked with, as the dynamic linker finds them
here, and the Dockerfiles in stand_ins/ begin from nothing, or from the base image. An image that was pulled is left as
it is.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import docker.errors

FOLDER = Path(__file__).resolve().parent / "stand_ins"
LABEL = "stand-in"
SHELL = "sh bash cat chmod chown dirname env id ln ls mkdir printf rm sed setpriv sleep uname"
MARIADB = "mariadbd mariadb mariadb-dump mariadb-install-db my_print_defaults resolveip"
POSTGRESQL = "postgres initdb pg_ctl pg_isready createdb dropdb psql pg_dump pg_restore"
PROGRAMS = {
    "postgresql": f"{SHELL} {POSTGRESQL}",
    "mariadb": f"{SHELL} {MARIADB} basename hostname",
    "s3": f"{SHELL} curl weed",
    "proxy": "sh cat caddy",
    "prometheus": "sh chmod chown cp mkdir wget prometheus",
    "alertmanager": "sh chmod chown ln mkdir wget prometheus-alertmanager",
    "pushgateway": "sh chmod chown mkdir wget prometheus-pushgateway",
    "node-exporter": "sh wget prometheus-node-exporter",
    "triton": "curl",
}
CANNOT_BE_MADE = {"grafana"}  # no package of Debian's
FOLDERS = {
    "postgresql": [
        "/usr/lib/postgresql/15/lib",
        "/usr/share/postgresql/15",
        "/usr/lib/locale/C.utf8",
        "/usr/share/zoneinfo",
    ],
    "mariadb": ["/usr/share/mysql"],
    "alertmanager": ["/usr/share/prometheus/alertmanager"],
    "triton": [
        f"{sys.prefix}/triton",
        *(f"{sysconfig.get_path('purelib')}/{name}" for name in ("numpy", "numpy.libs", "onnxruntime")),
    ],
}
LEFT_OUT = {"llvmjit.so"}  # and with it 100 MB of a compiler
LINKS = {name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")}


def make_stand_in(engine: Any, service: str, tag: str) -> None:
    """Make the image for a service of compose.yaml, unless one was pulled."""
    try:
        if LABEL not in (engine.inspect_image(tag)["Config"].get("Labels") or {}):
            return
    except docker.errors.ImageNotFound:
        pass
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for path in (FOLDER / service).iterdir():
            tar.add(path, path.name)
        files = file_system(service)
        entry = tarfile.TarInfo("files.tar")
        entry.size = len(files)
        tar.addfile(entry, io.BytesIO(files))
    context.seek(0)
    said = list(engine.build(fileobj=context, custom_context=True, tag=tag, labels={LABEL: ""}, rm=True, decode=True))
    assert "error" not in said[-1], said[-1]["error"]


def file_system(service: str) -> bytes:
    """A tar archive of a service's programs, of what they are linked with, and of the folders that they read."""
    paths = {Path(find(name)) for name in PROGRAMS[service].split()}
    for folder in FOLDERS.get(service, ()):
        paths |= {path for path in Path(folder).rglob("*") if path.is_file() and path.name not in LEFT_OUT}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as tar:
        for name, target in LINKS.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for path in sorted(paths | libraries(paths)):
            tar.add(path, place(path))
        tar.addfile(tarfile.TarInfo("etc/group"))
        tar.addfile(tarfile.TarInfo("etc/passwd"))
    return buffer.getvalue()


def find(name: str) -> str:
    """A program of this machine, or of the environment that the tests run in; without it the test is skipped."""
    from conftest import missing

    places = [str(Path(sys.executable).parent), "/usr/lib/postgresql/15/bin", os.environ["PATH"], "/usr/sbin", "/sbin"]
    return shutil.which(name, path=os.pathsep.join(places)) or missing(f"there is no {name} to make an image of")


def place(path: Path) -> str:
    """Where a file goes: where it lies, with /lib and the like in /usr; from the environment to /usr/bin or /opt."""
    if path.is_relative_to(sys.prefix):
        inside = path.relative_to(sys.prefix)
        return f"{'usr' if inside.parts[0] == 'bin' else 'opt'}/{inside}"
    return str(path).lstrip("/") if path.parts[1] == "usr" else f"usr{path}"


def libraries(paths: Iterable[Path]) -> set[Path]:
    """All that the programs and libraries among `paths` are linked with."""
    linked = [path for path in paths if path.read_bytes()[:4] == b"\x7fELF"]
    listed = subprocess.run(["ldd", *linked], capture_output=True, text=True).stdout
    return {Path(os.path.normpath(found)) for found in re.findall(r"(?:=> |^\s+)(/.+) \(0x", listed, re.MULTILINE)}
