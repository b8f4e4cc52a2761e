"""Downloads: torchvision's own classes against a web server on 127.0.0.1 with archives of the real formats,
remade small.

Each case runs in a process of its own that points torchvision's addresses and checksums at the server: the
boundary between this project and the world.
"""

import gzip
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port

# Every case starts processes that import torch.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TRAIN, TEST = 300, 20

PROGRAM = """
import json, sys
from pathlib import Path
import torchvision.datasets as tv
import data_loader.sources as sources
from data_loader.dataset import load
name, data_dir, url, sums = sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
if name == "cifar10":
    tv.CIFAR10.url, tv.CIFAR10.tgz_md5 = url + tv.CIFAR10.filename, sums[tv.CIFAR10.filename]
    for part in tv.CIFAR10.train_list + tv.CIFAR10.test_list:
        part[1] = sums[part[0]]
    tv.CIFAR10.meta["md5"] = sums["batches.meta"]
else:
    cls = tv.MNIST if name == "mnist" else tv.FashionMNIST
    cls.mirrors = [url]
    cls.resources = [(file, sums[file]) for file, _ in cls.resources]
    if name == "mnist":
        sources.PUBLISHED_MD5.update({file: sums[file] for file in sources.PUBLISHED_MD5})
try:
    dataset = load(name, data_dir=data_dir)
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(2)
rows = {split: len(rows) for split, rows in dataset.rows.items()}
print(json.dumps([dataset.digest, dataset.images_NHWC.shape, dataset.classes, rows]))
"""


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass
class Archive:
    """Files to serve, and the sums of them and of what they hold."""

    files: dict[str, bytes]
    sums: dict[str, str]
    images_NHWC: np.ndarray
    requests: list[str] = field(default_factory=list)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def idx_archive() -> Archive:
    random = np.random.default_rng(0)
    images_NHW = random.integers(0, 256, (TRAIN + TEST, 28, 28), dtype=np.uint8)
    labels_N = np.arange(TRAIN + TEST) % 10
    raw = {
        "train-images-idx3-ubyte": idx(images_NHW[:TRAIN]),
        "train-labels-idx1-ubyte": idx(labels_N[:TRAIN]),
        "t10k-images-idx3-ubyte": idx(images_NHW[TRAIN:]),
        "t10k-labels-idx1-ubyte": idx(labels_N[TRAIN:]),
    }
    packed = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in raw.items()}
    sums = {name: md5(data) for name, data in {**raw, **packed}.items()}
    return Archive(packed, sums, images_NHW[..., None])


def cifar_archive() -> Archive:
    random = np.random.default_rng(1)
    images_NCHW = random.integers(0, 256, (320, 3, 32, 32), dtype=np.uint8)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    bounds = [0, 60, 120, 180, 240, 300, 320]
    raw: dict[str, bytes] = {}
    for name, start, stop in zip(names, bounds[:-1], bounds[1:], strict=True):
        rows = images_NCHW[start:stop].reshape(stop - start, -1)
        raw[name] = pickle.dumps({"data": rows, "labels": [number % 10 for number in range(start, stop)]})
    raw["batches.meta"] = pickle.dumps({"label_names": [f"thing {number}" for number in range(10)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in raw.items():
            about = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    packed = {"cifar-10-python.tar.gz": buffer.getvalue()}
    sums = {name: md5(data) for name, data in {**raw, **packed}.items()}
    return Archive(packed, sums, images_NCHW.transpose(0, 2, 3, 1))


ARCHIVES = {"mnist": idx_archive, "fashion_mnist": idx_archive, "cifar10": cifar_archive}


@dataclass(frozen=True)
class Web:
    """The server with one data set's archive; download starts a process that loads it."""

    name: str
    archive: Archive
    url: str

    def start(self, data_dir: Path, url: str | None = None) -> "subprocess.Popen[str]":
        arguments = [self.name, data_dir, url or self.url, json.dumps(self.archive.sums)]
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )

    def download(self, data_dir: Path, url: str | None = None) -> tuple[int, str]:
        process = self.start(data_dir, url)
        output, errors = process.communicate(timeout=300)
        assert "Traceback" not in errors, errors
        return process.returncode, output


@pytest.fixture(params=["mnist", "fashion_mnist", "cifar10"])
def web(request: pytest.FixtureRequest) -> Iterator[Web]:
    yield from serve(request.param)


@pytest.fixture
def mnist_web() -> Iterator[Web]:
    yield from serve("mnist")


@pytest.fixture
def cifar10_web() -> Iterator[Web]:
    yield from serve("cifar10")


def serve(name: str) -> Iterator[Web]:
    archive = ARCHIVES[name]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = self.path.lstrip("/")
            archive.requests.append(file)
            data = archive.files.get(file)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Web(name, archive, f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def temporary(data_dir: Path) -> list[Path]:
    return list(data_dir.rglob("*.partial*"))


def test_a_set_is_downloaded_once(web: Web, tmp_path: Path) -> None:
    code, output = web.download(tmp_path)
    assert code == 0, output
    _, shape, classes, rows = json.loads(output)
    assert tuple(shape) == web.archive.images_NHWC.shape
    images = next((tmp_path / "cache").glob("*/images.npy"))
    assert np.array_equal(np.load(images), web.archive.images_NHWC)
    assert len(classes) == 10
    assert rows["test"] == TEST
    assert rows["train"] + rows["val"] == TRAIN
    assert rows["val"] > 0
    assert temporary(tmp_path) == []
    web.archive.requests.clear()
    assert web.download(tmp_path, "http://127.0.0.1:1/")[1] == output
    assert web.archive.requests == []


def test_two_at_once_download_once(mnist_web: Web, tmp_path: Path) -> None:
    both = [mnist_web.start(tmp_path) for _ in range(2)]
    outputs = {process.communicate(timeout=300)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(outputs) == 1
    fetched = [name for name in mnist_web.archive.requests if name.endswith(".gz")]
    # torchvision asks for every address twice: once to follow redirects, once for the data.
    assert sorted(fetched) == sorted([*mnist_web.archive.files] * 2)


def test_a_damaged_download_is_refused_and_leaves_nothing(cifar10_web: Web, tmp_path: Path) -> None:
    name = sorted(cifar10_web.archive.files)[0]
    data = cifar10_web.archive.files[name]
    cifar10_web.archive.files[name] = data[: len(data) // 2]
    code, output = cifar10_web.download(tmp_path)
    assert code == 2
    assert output.startswith("DataError cannot download cifar10")
    assert output.count("\n") == 1
    assert temporary(tmp_path) == []
    assert not list(tmp_path.rglob("*batch*"))
    cifar10_web.archive.files[name] = data
    assert cifar10_web.download(tmp_path)[0] == 0


def test_no_network_is_one_clear_line(mnist_web: Web, tmp_path: Path) -> None:
    code, output = mnist_web.download(tmp_path, f"http://127.0.0.1:{free_port()}/")
    assert code == 2
    assert output.count("\n") == 1
    assert "connect to the network, or put the unpacked files there" in output
    assert str(tmp_path / "torchvision") in output
    assert temporary(tmp_path) == []


def test_files_that_are_there_and_whole_are_used_and_damaged_ones_replaced(mnist_web: Web, tmp_path: Path) -> None:
    raw = tmp_path / "torchvision" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in mnist_web.archive.files.items():
        (raw / name.removesuffix(".gz")).write_bytes(gzip.decompress(data))
    assert mnist_web.download(tmp_path)[0] == 0
    assert mnist_web.archive.requests == []
    victim = raw / "train-images-idx3-ubyte"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    code, output = mnist_web.download(tmp_path, f"http://127.0.0.1:{free_port()}/")
    assert code == 2
    assert "train-images-idx3-ubyte has another checksum than the published one" in output
    assert mnist_web.download(tmp_path)[0] == 0
    assert victim.read_bytes() == whole
