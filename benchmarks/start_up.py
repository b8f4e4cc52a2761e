"""What it costs to begin: CPU seconds of `--help`, and seconds from `mlflow run` to the first training step.

The other side of the first is an interpreter that does nothing; goal: `python train.py --help` and
`python predict.py --help` under 0.3 s of CPU. The other side of the second is an entry point that only prints, through
the same `mlflow run`: the difference is what importing torch, opening the run and loading the data cost.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 5
TRIVIAL = "name: trivial\nentry_points:\n  main:\n    command: python -u -c 'print(\"epoch\")'\n"


# Python keeps what it compiles, as it does unless told otherwise; the first run of each script is not measured.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def cpu_s(*arguments: str) -> float:
    """CPU seconds of a Python process and its children, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_line_s(project: Path, folder: Path, *parameters: str) -> float:
    """Seconds from starting `mlflow run` to the first line that begins with "epoch"."""
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", str(project), *parameters]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            seconds = time.perf_counter() - start
            process.communicate()
            return seconds
    raise SystemExit(f"error: {' '.join(command)} printed no line that begins with 'epoch'")


def main() -> None:
    nothing = [cpu_s("-c", "pass") for _ in range(PAIRS)]
    for script in ("train.py", "predict.py"):
        cpu_s(script, "--help")
        ours = statistics.median(cpu_s(script, "--help") for _ in range(PAIRS))
        print(f"{script} --help: {ours:.3f} s of CPU, an empty interpreter {statistics.median(nothing):.3f} s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trivial").mkdir()
        (folder / "trivial" / "MLproject").write_text(TRIVIAL)
        data = f"data_dir={folder}/data"
        # With one step an epoch, the epoch's line comes right after the first step.
        one_step = ("-P", data, "-P", "epochs=1", "-P", "batch_size=100000")
        first_line_s(ROOT, folder, *one_step)  # makes the database and the data cache as well
        pairs = [
            (first_line_s(ROOT, folder, *one_step), first_line_s(folder / "trivial", folder)) for _ in range(PAIRS)
        ]
    ours_s, other_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ours / other for ours, other in pairs)
    print("mlflow run to the first training step, against an entry point that only prints")
    print(f"ratio: {ratio:.2f} (ours {ours_s:.1f} s, other {other_s:.1f} s)")


if __name__ == "__main__":
    main()
