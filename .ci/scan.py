"""Look up the packages of every lock, and of the images where trivy is installed, among the known security holes.

Run it as `make scan`; ARGS go on to pip-audit: `make scan ARGS="-s osv"` asks another service. Exit code 0: every
package of the locks was looked up, and no hole is known. 1: holes, one a line. 2: something could not be looked up,
which is not the same as clean.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted([*ROOT.glob("requirements*.lock"), *ROOT.glob("*/requirements*.lock")])
CLEAN, HOLES, UNKNOWN = 0, 1, 2


def scan_lock(lock: Path, options: list[str]) -> int:
    """Ask pip-audit about one lock; nothing is installed or resolved for it."""
    name = lock.relative_to(ROOT)
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--requirement", str(lock)]
    command += ["--format", "json", "--progress-spinner", "off", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"not scanned: {name}: {(done.stderr.splitlines() or ['pip-audit said nothing'])[-1][:300]}")
        return UNKNOWN
    holes = [(package, hole) for package in packages for hole in package.get("vulns", [])]
    for package, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "no release"
        print(f"{name}: {package['name']} {package['version']}: {hole['id']}, mended in {mended}")
    if skipped := [package for package in packages if "skip_reason" in package]:
        print(f"not scanned: {name}: {len(skipped)} of {len(packages)} packages, {skipped[0]['skip_reason'][:200]}")
    elif not holes:
        print(f"{name}: {len(packages)} packages, no hole is known")
    return HOLES if holes else UNKNOWN if skipped else CLEAN


def images() -> list[str]:
    """The images of the Compose file, as it names them without other settings."""
    return re.findall(r"^ +image: \$\{\w+:-(\S+)\}$", (ROOT / "services/compose.yaml").read_text(), re.MULTILINE)


def scan_image(image: str) -> int:
    """Let trivy look for holes that an update mends."""
    command = ["trivy", "image", "--quiet", "--ignore-unfixed", "--severity", "HIGH,CRITICAL", "--exit-code", "10"]
    code = subprocess.run([*command, image]).returncode
    if code not in (0, 10):
        print(f"not scanned: {image}: trivy ended with exit code {code}")
    return {0: CLEAN, 10: HOLES}.get(code, UNKNOWN)


def main() -> None:
    codes = [scan_lock(lock, sys.argv[1:]) for lock in LOCKS]
    if shutil.which("trivy"):
        codes += [scan_image(image) for image in images()]
    else:
        print(f"not scanned: the systems in the images {', '.join(images())}: there is no trivy here")
    sys.exit(HOLES if HOLES in codes else max(codes))


if __name__ == "__main__":
    main()
