"""A pyenv-shaped command for tests: it knows one Python, the running one, and has it already.

MLflow's `--env-manager virtualenv` asks pyenv for the newest release of the line that conda.yaml names. The
real pyenv would download and build it; this one answers with the release that runs the tests, so that
MLflow's own code makes the environment without a compiler.
"""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path


def make_root(root: Path) -> None:
    """Write root/bin/pyenv and root/versions/X.Y.Z/bin/python; the caller sets PATH and PYENV_ROOT."""
    version = platform.python_version()
    write_script(
        root / "bin/pyenv",
        f"""\
case "$*" in
    "install --list") echo "  {version}" ;;
    "install --skip-existing {version}") ;;
    root) echo {shlex.quote(str(root))} ;;
    *) echo "pyenv stand-in: $* is not known here" >&2; exit 1 ;;
esac
""",
    )
    write_script(root / f"versions/{version}/bin/python", f'exec {shlex.quote(sys._base_executable)} "$@"\n')


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)
