"""`predict.py` as its users see it: tables, errors, memory; against ONNX Runtime and Pillow used directly."""

import csv
import io
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from s3_server import S3Server

import predict
from data_loader import DataError, Unreachable
from data_loader.inputs import Batch, read_batches
from data_loader.outputs import open_table
from models import ModelError
from models.networks import build
from models.onnx_export import to_onnx
from utils import RunFailed, UsageError
from utils.artifacts import log_onnx_model

ROOT = Path(__file__).resolve().parent.parent
SHAPE, CLASSES = (10, 8, 1), ("Äpfel", 'say "no"', "漢字")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    torch.manual_seed(0)
    to_onnx(build("cnn", SHAPE, len(CLASSES), [120.0], [70.0]), SHAPE, CLASSES, path)
    return path


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


def png(image_HWC: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC[:, :, 0]).save(buffer, form)
    return buffer.getvalue()


def expected_shares(model: Path, images_NHWC: np.ndarray) -> np.ndarray:
    """Probabilities from ONNX Runtime and torch alone."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.softmax(torch.from_numpy(session.run(None, {"images": images_NHWC})[0]).double(), 1).numpy()


def run(model: Path | str, source: Path | str, output: Path | str, **others: object) -> None:
    predict.main(predict.Settings(model_uri=str(model), input=str(source), output=str(output), **others))  # type: ignore[arg-type]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


NAMES = ("b.png", "a/ü  ö.png", 'a/漢字/it\'s a "cat", 100%.PNG', "a/漢字/e\u0301.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good images, three bad ones, and files that are no images."""
    root = tmp_path / "some images"
    for name, image_HWC in zip(NAMES, images(len(NAMES)), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(image_HWC))
    (root / "a" / "cut.png").write_bytes(png(images(1)[0])[:60])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.bmp").write_text("no pixels")
    (root / "README.txt").write_text("not an image by name")
    (root / ".hidden.png").write_bytes(b"")
    (root / "loop").symlink_to(root)
    (root / "itself").symlink_to("itself")
    (root / "nothing.png").symlink_to(root / "gone")
    return root


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_good_images_are_predicted_and_bad_ones_listed(
    model: Path, folder: Path, tmp_path: Path, suffix: str, top_k: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"table{suffix}"
    run(model, folder, output, top_k=top_k, batch_size=3)
    if suffix == ".csv":
        table = [{key: value or None for key, value in row.items()} for row in rows(output)]
    else:
        table = pyarrow.parquet.read_table(output).to_pylist()
    by_name = {row["image"]: row for row in table}
    bad = {"a/cut.png": "corrupt or truncated", "empty.jpg": "empty file", "text.bmp": "not a PNG"}
    bad["nothing.png"] = "No such file"
    assert by_name.keys() == {*NAMES, *bad}
    assert len(table) == len(by_name)
    columns = ["image", "class", "probability"]
    for rank in range(2, top_k + 1):
        columns += [f"class_{rank}", f"probability_{rank}"]
    assert list(table[0]) == [*columns, "error"]
    shares_NK = expected_shares(model, images(len(NAMES)))
    for name, shares_K in zip(NAMES, shares_NK, strict=True):
        ranking = np.argsort(-shares_K)[:top_k]
        row = by_name[name]
        assert [row[key] for key in columns[1::2]] == [CLASSES[label] for label in ranking]
        np.testing.assert_allclose([float(row[key]) for key in columns[2::2]], shares_K[ranking], atol=2e-6)
        assert row["error"] is None
    for name, reason in bad.items():
        assert reason in by_name[name]["error"]
        assert by_name[name]["class"] is None
    said = capsys.readouterr().out
    assert "4 images predicted, 4 bad" in said
    assert "bad image empty.jpg: empty file" in said


def test_every_kind_of_input_gives_the_same_answer(model: Path, tmp_path: Path) -> None:
    images_NHWC = images(5)
    (tmp_path / "images").mkdir()
    for number, image_HWC in enumerate(images_NHWC):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(image_HWC))
    np.savez(tmp_path / "named.npz", images=images_NHWC, labels=np.arange(5))
    np.savez_compressed(tmp_path / "only.npz", images_NHWC[..., 0])
    labels = expected_shares(model, images_NHWC).argmax(axis=1)
    expected = [CLASSES[label] for label in labels]
    for source, names in (
        (tmp_path / "images", [f"{number}.png" for number in range(5)]),
        ("images/*.png", [f"images/{number}.png" for number in range(5)]),
        (f"{tmp_path}/*/?.png", [f"{tmp_path}/images/{number}.png" for number in range(5)]),
        (tmp_path / "images" / "3.png", ["3.png"]),
        (tmp_path / "named.npz", list("01234")),
        (tmp_path / "only.npz", list("01234")),
    ):
        run(model, source, tmp_path / "table.csv", batch_size=2)
        table = rows(tmp_path / "table.csv")
        assert [row["image"] for row in table] == names
        assert [row["class"] for row in table] == (expected if len(names) == 5 else expected[3:4])


def test_arrays_of_another_size_or_colour_are_fitted_as_files_are(model: Path, tmp_path: Path) -> None:
    colour_NHWC = np.random.default_rng(0).integers(0, 256, (3, 17, 23, 3), np.uint8)
    np.savez(tmp_path / "colour.npz", images=colour_NHWC)
    (tmp_path / "colour").mkdir()
    for number, image_HWC in enumerate(colour_NHWC):
        Image.fromarray(image_HWC).save(tmp_path / "colour" / f"{number}.png")
    (from_arrays,) = read_batches(str(tmp_path / "colour.npz"), SHAPE, 8)
    (from_files,) = read_batches(str(tmp_path / "colour"), SHAPE, 8)
    np.testing.assert_array_equal(from_arrays.images_NHWC, from_files.images_NHWC)


@given(count=st.integers(1, 60), batch_size=st.integers(1, 40), threads=st.integers(1, 4))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_hold_every_image_once_and_in_order(tmp_path: Path, count: int, batch_size: int, threads: int) -> None:
    root = tmp_path / f"{count}"
    root.mkdir(exist_ok=True)
    for number, image_HWC in enumerate(images(count)):  # those that are decoded together, and others among them
        (root / f"{number:03}.png").write_bytes(png(image_HWC, "BMP" if number % 3 == 1 else "PNG"))
    batches = list(read_batches(str(root), SHAPE, batch_size, threads))
    assert [len(batch.names) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert [name for batch in batches for name in batch.names] == [f"{number:03}.png" for number in range(count)]
    np.testing.assert_array_equal(np.concatenate([batch.images_NHWC for batch in batches]), images(count))


def test_a_name_that_is_not_utf_8_is_written_with_its_bytes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/caf\xe9.png")).write_bytes(png(images(1)[0]))
    run(model, tmp_path / "images", tmp_path / "table.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "table.parquet")
    assert table["image"].to_pylist() == ["caf\\xe9.png"]


def test_on_error_fail_writes_nothing(model: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("an older table")
    with pytest.raises(DataError, match=r"cut\.png: corrupt .* nothing was written"):
        run(model, folder, tmp_path / "table.csv", on_error="fail")
    assert (tmp_path / "table.csv").read_text() == "an older table"
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))


def test_only_bad_images_fail_the_run_and_are_listed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    with pytest.raises(RunFailed, match="none of the 1 images"):
        run(model, tmp_path / "images", tmp_path / "table.csv")
    assert [row["image"] for row in rows(tmp_path / "table.csv")] == ["a.png"]


def test_a_half_written_table_is_never_seen(tmp_path: Path) -> None:
    for name in ("table.csv", "table.parquet"):
        with pytest.raises(KeyError), open_table(str(tmp_path / name), {"image": str}) as table:
            table.write([["a"]] * 20_000)
            assert not (tmp_path / name).exists()
            raise KeyError
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"top_k": 4}, UsageError, "top_k received 4, but the model has 3 classes; allowed: 1 to 3"),
        ({"source": "nowhere"}, DataError, "input 'nowhere' does not exist"),
        ({"source": "nowhere.npz"}, DataError, "input 'nowhere.npz' does not exist"),
        ({"source": "no*thing"}, DataError, "holds no image"),
        ({"source": "."}, DataError, "holds no image"),
        ({"source": "bad.npz"}, DataError, "cannot be read as an .npz file"),
        ({"source": "float.npz"}, DataError, "holds float64 [2, 3]; expected uint8"),
        ({"source": "two.npz"}, DataError, "holds the arrays a, b; expected one named images"),
        ({"source": "none.npz"}, DataError, "holds no image"),
        ({"output": "table.xls"}, DataError, "must end in .parquet or .csv"),
        ({"output": "."}, DataError, "must end in"),
        ({"output": "taken.csv"}, DataError, "is a folder"),
        ({"output": "float.npz/table.csv"}, DataError, "cannot be written"),
        ({"model_uri": "gone.onnx"}, UsageError, "model_uri 'gone.onnx' is no .onnx file"),
        ({"model_uri": "taken.csv"}, UsageError, "a folder without model.onnx"),
        ({"model_uri": "broken.onnx"}, ModelError, "not a readable ONNX model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], said: str
) -> None:
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 3)))
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 3)), b=np.zeros((2, 3)))
    np.savez(tmp_path / "none.npz", images=np.zeros((0, *SHAPE), np.uint8))
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    (tmp_path / "broken.onnx").write_bytes(b"no")
    (tmp_path / "taken.csv").mkdir()
    before = sorted(tmp_path.iterdir())
    given_values = {"model_uri": model, "source": "float.npz", "output": "table.csv", **changes}
    if "source" not in changes:
        np.savez(tmp_path / "good.npz", images=images(2))
        before = sorted(tmp_path.iterdir())
        given_values["source"] = "good.npz"
    with pytest.raises(error) as raised:
        run(given_values.pop("model_uri"), given_values.pop("source"), given_values.pop("output"), **given_values)  # type: ignore[arg-type]
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_cut_npz_is_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", images=images(5000))
    data = (tmp_path / "whole.npz").read_bytes()
    start = data.index(b"\x93NUMPY")
    # The archive's directory stays right while its pixels are overwritten: the checksum has to notice.
    (tmp_path / "damaged.npz").write_bytes(data[: start + 5000] + b"\0" * 1000 + data[start + 6000 :])
    with pytest.raises(DataError, match=r"cannot be read as an \.npz file"):
        list(read_batches(str(tmp_path / "damaged.npz"), SHAPE, 100))


def start(arguments: dict[str, object], code: str = "") -> "subprocess.CompletedProcess[str]":
    """predict.py in a process of its own; `code` runs after it."""
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    script = f"import runpy, sys; sys.argv[1:] = {flags!r}; sys.path.insert(0, {str(ROOT)!r})\n"
    script += f"runpy.run_path({str(ROOT / 'predict.py')!r}, run_name='__main__')\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_prediction_imports_no_torch_no_scikit_learn_and_for_a_path_no_mlflow(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=images(3))
    arguments = {"model_uri": model, "input": tmp_path / "images.npz", "output": tmp_path / "table.parquet"}
    done = start(arguments, "print('modules', *sys.modules)")
    assert done.returncode == 0, done.stderr
    imported = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()[1:]}
    assert "onnxruntime" in imported
    assert not imported & {"torch", "torchvision", "sklearn", "mlflow", "matplotlib", "scipy", "boto3", "onnx"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(model: Path, tmp_path: Path) -> None:
    """20,000 files and 200,000 rows (16 MB) need no more than 4 MiB above what 500 need."""
    image = png(images(1)[0])
    # Not getrusage: its maximum starts at what the parent had when it forked.
    peak = "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    peaks_kib = {}
    for files in (500, 20_000):
        root = tmp_path / f"{files}"
        for number in range(files):
            if number % 1000 == 0:
                (root / f"{number}").mkdir(parents=True)
            (root / f"{number - number % 1000}" / f"{number:06}.png").write_bytes(image)
        np.savez(tmp_path / f"{files}.npz", images=np.zeros((files * 10, *SHAPE), np.uint8))
        for source in (root, tmp_path / f"{files}.npz"):
            done = start({"model_uri": model, "input": source, "output": tmp_path / "table.csv", "threads": 2}, peak)
            assert done.returncode == 0, done.stderr
            peaks_kib[source.suffix, files] = int(done.stdout.splitlines()[-1])
    for kind in ("", ".npz"):
        assert peaks_kib[kind, 20_000] - peaks_kib[kind, 500] < 4096, peaks_kib


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")  # MLflow's own models, on import of mlflow.pyfunc
def test_a_prediction_with_a_logged_model_is_a_run(model: Path, folder: Path, project: Path) -> None:
    client = mlflow.MlflowClient()
    source = client.create_run("0").info.run_id
    mlflow.register_model(log_onnx_model(source, model, images(1)), "shapes")
    client.set_registered_model_alias("shapes", "champion", "1")
    for uri in (f"runs:/{source}/model", "models:/shapes/1", "models:/shapes@champion"):
        run(uri, folder, "table.csv", top_k=2)
        made = client.search_runs(["0"], "tags.entry_point = 'predict'", max_results=1)[0]
        assert made.data.params["model_uri"] == uri
        assert made.data.params["top_k"] == "2"
        assert (made.data.metrics["images"], made.data.metrics["bad_images"]) == (4, 4)
        assert made.data.tags["output"] == "table.csv"
        assert [file.path for file in client.list_artifacts(made.info.run_id, "predictions")] == [
            "predictions/table.csv"
        ]
    for uri, said in (
        ("models:/shapes@nobody", "alias nobody not found"),
        ("models:/shapes/7", "does not exist"),
        (f"runs:/{source}/other", "does not exist"),
        (f"runs:/{'0' * 32}/model", "does not exist"),
    ):
        with pytest.raises(UsageError, match=said) as raised:
            run(uri, folder, "table.csv")
        assert "\n" not in str(raised.value)


def test_an_unreachable_server_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    with pytest.raises(RunFailed, match=r"cannot reach http://127.0.0.1:9 to fetch 'runs:/1/model'") as raised:
        run("runs:/1/model", folder, "table.csv")
    assert "secret" not in str(raised.value)


def test_buckets_on_both_sides(model: Path, folder: Path, s3: S3Server, tmp_path: Path) -> None:
    bucket, client = s3.new_bucket(), s3.client()
    good = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.txt"]
    names = {path.relative_to(folder).as_posix(): path for path in good if "loop" not in path.parts}
    for name, path in names.items():
        client.put_object(Bucket=bucket, Key=f"in/{name}", Body=path.read_bytes())
    client.put_object(Bucket=bucket, Key="in-other/x.png", Body=b"not below the prefix")
    np.savez(tmp_path / "images.npz", images=images(4))
    client.upload_file(str(tmp_path / "images.npz"), bucket, "images.npz")
    run(model, f"s3://{bucket}/in", f"s3://{bucket}/out/table.csv")
    run(model, folder, "local.csv")
    client.download_file(bucket, "out/table.csv", "remote.csv")
    expected = [row for row in rows(Path("local.csv")) if row["image"] != "nothing.png"]
    by_name = {row["image"]: row for row in rows(Path("remote.csv"))}
    assert by_name == {row["image"]: row for row in expected}
    run(model, f"s3://{bucket}/images.npz", "table.csv")
    assert [row["image"] for row in rows(Path("table.csv"))] == list("0123")
    run(model, f"s3://{bucket}/in/b.png", "table.csv")
    assert [row["image"] for row in rows(Path("table.csv"))] == ["b.png"]
    for source, output, said in (
        (f"s3://{bucket}/empty", "table.csv", "holds no image"),
        ("s3://no-such-bucket/in", "table.csv", "NoSuchBucket"),
        (f"s3://{bucket}/gone.npz", "table.csv", "cannot read"),
        (f"s3://{bucket}/in", "s3://no-such-bucket/table.csv", "cannot write s3://no-such-bucket/table.csv"),
    ):
        with pytest.raises(DataError) as raised:
            run(model, source, output)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_store_that_goes_away_ends_it_and_its_images_are_not_called_bad(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(BaseHTTPRequestHandler):
        """Lists one image, and hangs up on who wants it."""

        def do_GET(self) -> None:
            if "list-type=2" in self.path:
                listing = b"<ListBucketResult><Contents><Key>in/a.png</Key><Size>9</Size></Contents></ListBucketResult>"
                self.send_response(200)
                self.send_header("Content-Length", str(len(listing)))
                self.end_headers()
                self.wfile.write(listing)
            else:
                self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gone)
    threading.Thread(target=server.serve_forever).start()
    environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in {**environment, "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(Unreachable, match=r"cannot read s3://bucket/in/a.png: .*; try again later"):
            run(model, "s3://bucket/in", tmp_path / "table.csv")
    finally:
        server.shutdown()
        server.server_close()
    assert not (tmp_path / "table.csv").exists()


def test_rows_follow_the_columns() -> None:
    assert list(predict.columns(2)) == ["image", "class", "probability", "class_2", "probability_2", "error"]
    assert Batch([], np.empty((0, *SHAPE), np.uint8), []).bad == []
