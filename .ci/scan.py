"""Look up the packages of every lock and of our images among the known security holes, and their systems with trivy.

Run it as `make scan`; ARGS go on to pip-audit: `make scan ARGS="-s osv"` asks another service. Exit code 0: every
package was looked up, and no hole is known. 1: holes, one a line. 2: something could not be looked up, which is not the
same as clean. Where Docker or trivy is missing that is said, and what needs it is left out.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted([*ROOT.glob("requirements*.lock"), *ROOT.glob("*/requirements*.lock")])
CLEAN, HOLES, UNKNOWN = 0, 1, 2
OURS = ("image-classifier", "mlflow-tracking-server")
"""What the images that are built here are called, behind the registry and before anything else."""


def scan_packages(name: str, pins: Path, options: list[str]) -> int:
    """Ask pip-audit about a file of pins, called `name`; nothing is installed or resolved for it."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--requirement", str(pins)]
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


def scan_image(image: str, options: list[str]) -> int:
    """Ask pip-audit about the Python packages that are in an image."""
    listing = ["docker", "run", "--rm", "--network=none", "--entrypoint=python", image]
    done = subprocess.run([*listing, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True)
    if done.returncode:
        print(f"not scanned: {image}: {(done.stderr.splitlines() or ['docker said nothing'])[-1][:300]}")
        return UNKNOWN
    with TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text(done.stdout)
        return scan_packages(image, pins, options)


def our_images() -> list[str] | None:
    """Those on this machine; None where Docker does not answer."""
    try:
        listing = ["docker", "image", "ls", "--format={{.Repository}}:{{.Tag}}"]
        found = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return [image for image in found if image.split("/")[-1].startswith(OURS) and not image.endswith(":<none>")]


def images() -> list[str]:
    """The images of the Compose file, as it names them without other settings."""
    return re.findall(r"^ +image: \$\{\w+:-(\S+)\}$", (ROOT / "services/compose.yaml").read_text(), re.MULTILINE)


def scan_system(image: str) -> int:
    """Let trivy look for holes that an update mends."""
    command = ["trivy", "image", "--quiet", "--ignore-unfixed", "--severity", "HIGH,CRITICAL", "--exit-code", "10"]
    code = subprocess.run([*command, image]).returncode
    if code not in (0, 10):
        print(f"not scanned: {image}: trivy ended with exit code {code}")
    return {0: CLEAN, 10: HOLES}.get(code, UNKNOWN)


def main() -> None:
    options = sys.argv[1:]
    codes = [scan_packages(str(lock.relative_to(ROOT)), lock, options) for lock in LOCKS]
    ours = our_images()
    if ours is None:
        print("not scanned: the packages in our images: Docker does not answer")
    else:
        codes += [scan_image(image, options) for image in ours]
    if shutil.which("trivy"):
        codes += [scan_system(image) for image in images()]
    else:
        print(f"not scanned: the systems in the images {', '.join(images())}: there is no trivy here")
    sys.exit(HOLES if HOLES in codes else max(codes))


if __name__ == "__main__":
    main()
