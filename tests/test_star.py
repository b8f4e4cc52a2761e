"""Who may import whom (docs/architecture.md): a room knows no other room and no script."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"data_loader", "models", "utils", "serving", "monitoring"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
LIGHT = sys.stdlib_module_names | {"utils"}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """First part of the name of every module that `nodes` import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("room", sorted(room for room in ROOMS if (ROOT / room).is_dir()))
def test_a_room_imports_no_other_room_and_no_script(room: str) -> None:
    forbidden = (ROOMS - {room}) | SCRIPTS | {"plugin", "mlproject_backends", "tests", "benchmarks"}
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in (ROOT / room).rglob("*.py")
        if (names := imported(ast.walk(parse(path))) & forbidden)
    }
    assert wrong == {}


def test_models_know_neither_mlflow_nor_the_command_line() -> None:
    wrong = {p.name for p in (ROOT / "models").rglob("*.py") if imported(ast.walk(parse(p))) & {"mlflow", "argparse"}}
    assert wrong == set()


def test_the_plugin_knows_nothing_of_the_project() -> None:
    sources = sorted((ROOT / "plugin/src").rglob("*.py"))
    assert sources
    wrong = {path.name for path in sources if imported(ast.walk(parse(path))) & (ROOMS | SCRIPTS)}
    assert wrong == set()


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_imports_only_light_modules_before_main(script: str) -> None:
    """`--help` has to answer at once: everything heavy is imported inside functions."""
    top_level = imported(iter(parse(ROOT / f"{script}.py").body))
    assert top_level <= LIGHT, f"{script}.py: {top_level - LIGHT}"
