"""A conda channel on disk that offers two packages: the running Python and the pip beside it.

No conda channel is reachable from every machine that tests, so the packages are made here from what is
installed; they are real conda packages, indexed by py-rattler, and serve on this machine only (libraries stay
where they are).
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import io
import json
import platform
import sys
import sysconfig
import tarfile
from pathlib import Path

from rattler import Subdir
from rattler.index import index_fs

LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "EXTERNALLY-MANAGED"}
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


def make_channel(folder: Path) -> None:
    """Write the channel into `folder`, which becomes the last part of its address."""
    subdir = folder / str(Subdir.current())
    subdir.mkdir(parents=True)
    (folder / "noarch").mkdir()
    write_package(subdir, "python", platform.python_version(), [], python_files())
    pip = importlib.metadata.distribution("pip")
    files = {
        f"lib/{PYTHON}/site-packages/{file}": Path(str(pip.locate_file(file)))
        for file in pip.files or []
        if file.parts[0] != ".." and "__pycache__" not in file.parts
    }
    write_package(subdir, "pip", pip.version, [f"python {PYTHON.removeprefix('python')}.*"], files)
    asyncio.run(index_fs(folder, write_zst=False, write_shards=False))


def python_files() -> dict[str, Path]:
    """Path in the package -> file here: the interpreter, its library, the standard library; no packages."""
    program = Path(sys._base_executable).resolve()
    files = dict.fromkeys([f"bin/{PYTHON}", "bin/python3", "bin/python"], program)
    library = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("INSTSONAME")
    if library.suffix != ".a" and library.exists():
        files[f"lib/{library.name}"] = library
    standard = Path(sysconfig.get_path("stdlib"))
    for path in standard.rglob("*"):
        inside = path.relative_to(standard)
        if path.is_file() and not LEFT_OUT & set(inside.parts) and not inside.parts[0].startswith("config-"):
            files[f"lib/{PYTHON}/{inside}"] = path
    return files


def write_package(subdir: Path, name: str, version: str, depends: list[str], files: dict[str, Path]) -> None:
    """Write NAME-VERSION-0.tar.bz2: the files, and info/index.json and info/paths.json as conda has them."""
    index = {"name": name, "version": version, "build": "0", "build_number": 0, "depends": depends}
    paths = [
        {
            "_path": inside,
            "path_type": "hardlink",
            "sha256": sha256(path),
            "size_in_bytes": path.stat().st_size,
        }
        for inside, path in sorted(files.items())
    ]
    info = {
        "info/index.json": index | {"subdir": subdir.name, "arch": None, "platform": None, "timestamp": 0},
        "info/paths.json": {"paths": paths, "paths_version": 1},
    }
    with tarfile.open(subdir / f"{name}-{version}-0.tar.bz2", "w:bz2", compresslevel=1) as archive:
        for inside, content in info.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(inside)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for inside, path in sorted(files.items()):
            archive.add(path.resolve(), inside)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
