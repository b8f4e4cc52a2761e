"""What `pip install ./plugin` installs."""

import subprocess
import sys
import zipfile
from pathlib import Path

PLUGIN = Path(__file__).resolve().parents[1]


def test_the_wheel_holds_all_that_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(PLUGIN)], check=True, stderr=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("mlproject_backends-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (points,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    package = PLUGIN / "src" / "mlproject_backends"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {path.relative_to(PLUGIN / "src").as_posix() for path in files}
    assert "Dockerfile.default" in {Path(name).name for name in names}
    for line in ("docker = ", "mlproject-kubernetes = ", "mlproject = mlproject_backends.cli:main"):
        assert line in points
