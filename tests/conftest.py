"""Fixtures that several test files share."""

import gzip
import os
import signal
from pathlib import Path
from typing import NoReturn

import pytest

pytest_plugins = ["advisories", "s3_server", "service", "services_stack", "tracking_server"]


def pytest_configure() -> None:
    """What a shell without job control starts in the background ignores Ctrl-C, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(reason: str) -> NoReturn:
    """Skip a test for want of something on this machine; with REQUIRE_ALL=1 that is a failure."""
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(f"REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def mnist_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir in which MNIST lies unpacked, from the copy that MNIST_ROOT names (torchvision's layout)."""
    root = os.environ.get("MNIST_ROOT")
    if not root:
        pytest.skip("MNIST_ROOT names no copy of MNIST")
    packed = sorted((Path(root) / "MNIST" / "raw").glob("*ubyte*"))
    if len({path.stem if path.suffix == ".gz" else path.name for path in packed}) != 4:
        missing(f"MNIST_ROOT={root} holds no MNIST/raw with four IDX files")
    data_dir = tmp_path_factory.mktemp("mnist")
    raw = data_dir / "torchvision" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in packed:
        data = path.read_bytes()
        (raw / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(data) if path.suffix == ".gz" else data)
    return data_dir


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: what is broken shows before the end-to-end runs start."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
