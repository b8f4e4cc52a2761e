"""Remake the requirements locks, conda.yaml and, where conda works, conda-lock.yml.

Run it as `make lock`. Pins that still fit are kept, so a second run changes nothing; for the newest releases:
`make lock ARGS=--upgrade`. All is made in a temporary folder and moved into place at the end: a failure, for
example no network, changes no file. Exit code 1 when nothing could be locked.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"
PLATFORMS = ("linux-64", "osx-arm64")
CONDA_LOCK = "conda-lock==4.0.3"


def compile_lock(folder: Path, source: str, arguments: list[str]) -> None:
    """Turn folder/source.in, and more inputs among `arguments`, into folder/source.lock.

    It is one list for all platforms and Pythons from 3.11 on.
    """
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--fork-strategy", "fewest"]
    command += ["--python-version", PYTHON, "--generate-hashes"]
    command += ["--no-emit-index-url", "--no-annotate", "--no-header"]
    command += ["--output-file", f"{source}.lock", f"{source}.in", *arguments]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def pins(lock: str) -> list[str]:
    """The `name==version ; marker` part of each requirement in a lock file's text, without its hashes."""
    lines = [line.removesuffix("\\").strip() for line in lock.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "--hash"))]


def conda_yaml(lock: str) -> str:
    """The conda.yaml that asks for the pins of `lock`; pip itself comes from conda in the same version."""
    locked = pins(lock)
    pip = next(pin for pin in locked if pin.startswith("pip=="))
    return "\n".join(
        [
            "# Written by `make lock` from requirements.lock.",
            "name: image-classifier",
            "channels:",
            "  - conda-forge",
            "dependencies:",
            f"  - python={PYTHON}",
            f"  - {pip.replace('==', '=')}",
            "  - pip:",
            *(f"      - {pin}" for pin in locked),
            "",
        ]
    )


def conda_lock(folder: Path) -> str | None:
    """Write folder/conda-lock.yml from folder/conda.yaml; the reason in one line where that cannot be."""
    conda = os.environ.get("CONDA_EXE") or shutil.which("conda") or shutil.which("micromamba")
    if not conda:
        return "there is no conda executable here"
    command = ["uv", "tool", "run", "--from", CONDA_LOCK, "conda-lock", "lock", "--conda", conda]
    command += ["--check-input-hash", "--file", "conda.yaml", "--lockfile", "conda-lock.yml"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 4):  # 4: conda.yaml is the one that was locked last time
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        return f"conda-lock failed ({' '.join(last)})"
    return None


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".lock-") as name:
        folder = Path(name)
        for where in ("", "services", "tests"):
            (folder / where).mkdir(exist_ok=True)
            for path in [*(ROOT / where).glob("requirements*.in"), *(ROOT / where).glob("*.lock")]:
                shutil.copy(path, folder / where)
        for path in ROOT.glob("conda-lock.yml"):
            shutil.copy(path, folder)
        try:
            compile_lock(folder, "requirements", arguments)
            compile_lock(folder / "services", "requirements", arguments)
            also = ["services/requirements.in", str(ROOT / "plugin/pyproject.toml")]
            compile_lock(folder, "requirements-dev", [*also, *arguments])
            compile_lock(folder / "tests", "requirements", ["--no-deps", *arguments])
        except subprocess.CalledProcessError:  # uv has said why
            print("error: the locks could not be made, and no file was changed", file=sys.stderr)
            return 1
        (folder / "conda.yaml").write_text(conda_yaml((folder / "requirements.lock").read_text()))
        if reason := conda_lock(folder):
            print(f"conda-lock.yml was not remade: {reason}")
            (folder / "conda-lock.yml").unlink(missing_ok=True)
        for made in sorted([*folder.rglob("*.lock"), *folder.glob("conda*.y*ml")]):
            target = ROOT / made.relative_to(folder)
            # An untouched file keeps its time, so that `make` does not remake the environment for nothing.
            if not target.exists() or not filecmp.cmp(made, target, shallow=False):
                made.replace(target)
                print(f"wrote {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
