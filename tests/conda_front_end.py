"""A conda-shaped front end over py-rattler for tests: it answers what MLflow asks of conda and nothing else.

This is not conda. It shares conda's package format, channels, solver problem, environment layout and these
commands:

    conda --help
    conda env list --json
    conda env create -n NAME --file conda.yaml
    conda remove --yes --name NAME --all
    conda activate NAME                         (a shell function, from etc/profile.d/conda.sh)

CONDA_ENVS_PATH, CONDA_PKGS_DIRS and CONDA_CHANNEL_ALIAS mean what they mean to conda.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ACTIVATE = """\
conda() {
    if [ "$1" != activate ] || [ ! -d "$CONDA_ENVS_PATH/$2/conda-meta" ]; then
        echo "conda front end: no such command or environment: $*" >&2
        return 1
    fi
    export CONDA_PREFIX="$CONDA_ENVS_PATH/$2" CONDA_DEFAULT_ENV="$2"
    export PATH="$CONDA_PREFIX/bin:$PATH"
}
"""


def make_home(home: Path) -> None:
    """Lay out `home` like a conda installation, as far as MLFLOW_CONDA_HOME needs it."""
    command = home / "bin/conda"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n')
    command.chmod(0o755)
    profile = home / "etc/profile.d/conda.sh"
    profile.parent.mkdir(parents=True)
    profile.write_text(ACTIVATE)


async def solve_and_install(channels: list[str], specs: list[str], prefix: Path) -> None:
    """Put what `specs` ask of `channels` into `prefix`: py-rattler's solver and installer."""
    from rattler import Channel, ChannelConfig, VirtualPackage, install, solve

    config = ChannelConfig(channel_alias=os.environ["CONDA_CHANNEL_ALIAS"].rstrip("/") + "/")
    records = await solve(
        sources=[Channel(name, config) for name in channels],
        specs=specs,
        virtual_packages=VirtualPackage.detect(),
    )
    await install(records, target_prefix=prefix, cache_dir=Path(os.environ["CONDA_PKGS_DIRS"]), show_progress=False)


def create(prefix: Path, specification: Path) -> None:
    """Make the environment that a conda.yaml describes; its own pip installs the pip section."""
    import yaml

    wanted: dict[str, Any] = yaml.safe_load(specification.read_text())
    specs = [item for item in wanted["dependencies"] if isinstance(item, str)]
    asyncio.run(solve_and_install(wanted["channels"], specs, prefix))
    for item in wanted["dependencies"]:
        if isinstance(item, dict):
            with tempfile.NamedTemporaryFile("w", suffix=".requirements.txt") as requirements:
                requirements.write("\n".join(item["pip"]))
                requirements.flush()
                command = [str(prefix / "bin/python"), "-m", "pip", "install", "-U", "-r", requirements.name]
                subprocess.run([*command, "--exists-action=b"], cwd=specification.parent, check=True)


def main(arguments: list[str]) -> None:
    environments = Path(os.environ["CONDA_ENVS_PATH"])
    match arguments:
        case ["--help"]:
            print(__doc__)
        case ["env", "list", "--json"]:
            print(json.dumps({"envs": [str(path.parent) for path in environments.glob("*/conda-meta")]}))
        case ["env", "create", "-n", name, "--file", file]:
            create(environments / name, Path(file).resolve())
        case ["remove", "--yes", "--name", name, "--all"]:
            shutil.rmtree(environments / name)
        case _:
            sys.exit(f"conda front end: {arguments} is no command of this stand-in")


if __name__ == "__main__":
    main(sys.argv[1:])
