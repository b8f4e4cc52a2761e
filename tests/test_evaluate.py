"""`evaluate.py` and `export.py` on a trained digits model, and that model in an environment without this repository."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn import metrics
from sklearn.datasets import load_digits
from tracking_server import copy_database

import evaluate
import export
import train
from data_loader import DataError
from data_loader.dataset import load
from models.checkpoint import load_network
from utils import RunFailed, UsageError, registry
from utils.artifacts import log_onnx_model

# MLflow's own models warn on import of mlflow.pyfunc.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """A run that trained digits for three epochs, registered as `digits`; the working folder is its project."""
    folder = tmp_path_factory.mktemp("trained")
    copy_database(empty_database, folder, str(folder / "mlruns" / "0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        train.main(train.Settings(epochs=3, device="cpu", precision="fp32", register_as="digits"))
        yield mlflow.MlflowClient().search_runs(["0"])[0].info.run_id


def last_run(entry_point: str) -> Any:
    return mlflow.MlflowClient().search_runs(["0"], f"tags.entry_point = '{entry_point}'", max_results=1)[0]


def artifacts(run: Any, folder: str) -> set[str]:
    return {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id, folder)}


def text(run: Any, path: str) -> str:
    return str(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{path}"))


def model_file(run_id: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model")) / "model.onnx"


def predictions(run_id: str, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels, from ONNX Runtime and torch alone."""
    data = load("digits", data_dir=Path("data"))
    rows = data.rows[split]
    session = onnxruntime.InferenceSession(model_file(run_id), providers=["CPUExecutionProvider"])
    logits_NK = session.run(None, {"images": data.images_NHWC[rows]})[0]
    return torch.softmax(torch.from_numpy(logits_NK).double(), 1).numpy(), data.labels_N[rows]


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluate_tells_what_scikit_learn_computes(trained: str, split: str) -> None:
    evaluate.main(evaluate.Settings(model_uri=f"runs:/{trained}/model", split=split, batch_size=100))
    run = last_run("evaluate")
    shares_NK, labels_N = predictions(trained, split)
    guesses_N = shares_NK.argmax(axis=1)
    assert run.data.metrics[f"{split}/accuracy"] == metrics.accuracy_score(labels_N, guesses_N)
    assert run.data.metrics[f"{split}/macro_f1"] == pytest.approx(
        metrics.f1_score(labels_N, guesses_N, average="macro")
    )
    assert run.data.metrics[f"{split}/log_loss"] == pytest.approx(metrics.log_loss(labels_N, shares_NK), rel=1e-4)
    assert 0 < run.data.metrics[f"{split}/calibration_error"] < 0.5
    table = list(csv.DictReader(io.StringIO(text(run, "tables/per_class.csv"))))
    recall_K = metrics.recall_score(labels_N, guesses_N, average=None)
    assert [row["class"] for row in table] == list("0123456789")
    np.testing.assert_allclose([float(row["recall"]) for row in table], recall_K)
    assert artifacts(run, "pictures") == {
        f"pictures/{name}.png" for name in ("confusion_matrix", "reliability", "worst_mistakes")
    }
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.tags[0].value) == ("digits", split)
    assert run.info.status == "FINISHED"


def test_the_gate_fails_the_run_after_everything_was_logged(trained: str) -> None:
    with pytest.raises(RunFailed, match=r"accuracy 0\.\d+ on test is below min_accuracy=1\.0; run \w{32}"):
        evaluate.main(evaluate.Settings(model_uri="models:/digits/1", min_accuracy=1.0))
    run = last_run("evaluate")
    assert run.info.status == "FAILED"
    assert {"test/accuracy", "test/calibration_error"} <= run.data.metrics.keys()
    assert "pictures/confusion_matrix.png" in artifacts(run, "pictures")


def test_two_models_are_compared_on_the_same_images(trained: str) -> None:
    train.main(train.Settings(epochs=1, device="cpu", precision="fp32", seed=1))
    worse = last_run("main").info.run_id
    evaluate.main(evaluate.Settings(model_uri=f"runs:/{trained}/model", baseline_uri=f"runs:/{worse}/model"))
    found = json.loads(text(last_run("evaluate"), "tables/comparison.json"))
    better_NK, labels_N = predictions(trained)
    worse_NK, _ = predictions(worse)
    right_N, worse_right_N = better_NK.argmax(axis=1) == labels_N, worse_NK.argmax(axis=1) == labels_N
    assert found["only_this_right"] == sum(right_N > worse_right_N)
    assert found["only_baseline_right"] == sum(right_N < worse_right_N)
    assert found["accuracy_difference"] == pytest.approx(right_N.mean() - worse_right_N.mean())
    assert 0 < found["mcnemar_p"] < 0.05
    assert last_run("evaluate").data.metrics["baseline/accuracy"] == worse_right_N.mean()


def aliases(name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in mlflow.MlflowClient().get_registered_model(name).aliases.items()}


@pytest.fixture(scope="module")
def three(trained: str) -> str:
    """A registered model `three`: a good version, a bad one, and one as good as the first."""
    for epochs, seed in ((3, 0), (1, 1), (3, 0)):
        settings = train.Settings(epochs=epochs, seed=seed, device="cpu", precision="fp32", register_as="three")
        train.main(settings)
    return "three"


def test_promotion_moves_champion_to_what_is_not_worse(three: str) -> None:
    client = mlflow.MlflowClient()
    assert aliases(three) == {"challenger": "3"}

    def promote(version: str, **settings: Any) -> None:
        evaluate.main(evaluate.Settings(model_uri=f"models:/{three}/{version}", promote=True, **settings))

    with pytest.raises(RunFailed, match=r"below min_accuracy=1\.0; champion stays unset; run \w{32} has the details$"):
        promote("2", min_accuracy=1.0)
    promote("2", min_accuracy=0.1)  # there is no champion: the gate alone decides
    assert aliases(three) == {"challenger": "3", "champion": "2"}
    promote("1")
    assert aliases(three)["champion"] == "1"
    run = last_run("evaluate")
    assert run.data.tags["promoted"] == "models:/three/1"
    tags = client.get_model_version(three, "1").tags
    assert tags["promoted_by_run"] == run.info.run_id
    assert (tags["promoted_over"], tags["promoted_by"]) == ("2", run.data.tags["mlflow.user"])
    assert float(tags["promoted_for_test/accuracy"]) == pytest.approx(run.data.metrics["test/accuracy"], abs=1e-4)
    assert json.loads(text(run, "tables/comparison.json"))["baseline_uri"] == "models:/three/2"

    better, worse = (
        f"{metrics.accuracy_score(labels_N, shares_NK.argmax(axis=1)):.4f}"
        for version in "12"
        for shares_NK, labels_N in [predictions(str(client.get_model_version(three, version).run_id))]
    )
    said = (
        rf"accuracy {worse} on test is below the {better} of models:/three/1; champion stays models:/three/1; run \w+"
    )
    with pytest.raises(RunFailed, match=said):
        promote("2")
    assert last_run("evaluate").info.status == "FAILED"
    assert "promoted" not in last_run("evaluate").data.tags
    with pytest.raises(RunFailed, match=r"is below min_accuracy=1\.0 and below the .* of runs:"):
        promote("2", min_accuracy=1.0, baseline_uri=f"runs:/{client.get_model_version(three, '1').run_id}/model")
    assert aliases(three) == {"challenger": "3", "champion": "1"}
    evaluate.main(evaluate.Settings(model_uri=f"models:/{three}@challenger", promote=True))  # a tie: the later one
    assert aliases(three) == {"challenger": "3", "champion": "3"}
    promote("2", baseline_uri=f"models:/{three}/2")  # whoever names a baseline is asked about no other
    assert aliases(three) == {"challenger": "3", "champion": "2"}


def test_only_a_registered_version_can_be_promoted(trained: str) -> None:
    before = aliases("digits")
    for uri in (f"runs:/{trained}/model", str(model_file(trained)), "models:/m-0123456789abcdef", "models:/digits"):
        with pytest.raises(UsageError, match=f"promote: '{uri}' is no registered version; give models:/NAME/VERSION"):
            evaluate.main(evaluate.Settings(model_uri=uri, promote=True))
    with pytest.raises(UsageError, match=r"does not exist|not found"):
        evaluate.main(evaluate.Settings(model_uri="models:/digits@best", promote=True))
    assert aliases("digits") == before


def test_a_champion_that_moved_meanwhile_stays(three: str) -> None:
    client = mlflow.MlflowClient()
    asked = registry.candidate(f"models:/{three}/1")
    run = client.create_run("0").info.run_id
    with pytest.raises(RunFailed, match=f"run {run} is not on the tracking server as a whole"):
        registry.promote(asked, run, {"test/accuracy": 1.0})
    client.set_registered_model_alias(three, "champion", "1")
    asked = registry.candidate(f"models:/{three}/3")
    client.set_registered_model_alias(three, "champion", "2")
    with pytest.raises(RunFailed, match="moved from version 1 to 2 during the evaluation; evaluate again"):
        registry.promote(asked, run, {})
    assert aliases(three)["champion"] == "2"


def test_a_version_says_what_it_is_and_is_registered_once(trained: str) -> None:
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("digits", "challenger")
    run = client.get_run(trained)
    for key in ("weights_sha256", "data_digest"):
        assert version.tags[key] == run.data.tags[key]
    assert (version.tags["dataset"], version.tags["network"]) == ("digits", "cnn")
    assert f"Test accuracy {run.data.metrics['test/accuracy']:.4f}" in str(version.description)
    assert "`champion`: the version to use" in str(client.get_registered_model("digits").description)
    facts = {"run_id": trained, "model_uri": str(version.source), "description": "again", "tags": {}}
    assert registry.register(client, "digits", **facts) == str(version.version)  # type: ignore[arg-type]
    assert len(client.search_model_versions("name = 'digits'")) == 1


def other_digits(path: Path, **arrays: np.ndarray) -> str:
    digits = load_digits()
    kept = {"images": (digits.images * 15).astype(np.uint8), "labels": digits.target}
    np.savez(path, **{**kept, **arrays})
    return str(path)


def test_models_and_data_that_do_not_match_are_one_line(trained: str, tmp_path: Path) -> None:
    uri = f"runs:/{trained}/model"
    names = np.array([f"digit {number}" for number in range(10)])
    colour = np.random.default_rng(0).integers(0, 256, (1797, 8, 8, 3), np.uint8)
    cases = [
        ({"dataset": other_digits(tmp_path / "names.npz", classes=names)}, DataError, "the model knows 10 classes"),
        (
            {"dataset": other_digits(tmp_path / "colour.npz", images=colour)},
            DataError,
            r"images \(8, 8, 3\), the model",
        ),
        ({"model_uri": str(model_file(trained))}, UsageError, "does not tell what it was trained on; give dataset="),
        ({"model_uri": "models:/digits/9"}, UsageError, "does not exist"),
        ({"baseline_uri": "models:/nothing@best"}, UsageError, "nothing@best"),
    ]
    for changes, kind, said in cases:
        for entry in (evaluate, export):
            if entry is export and ("baseline_uri" in changes or changes.get("model_uri", "").startswith("/")):
                continue
            with pytest.raises(kind, match=said) as raised:
                entry.main(entry.Settings(**{"model_uri": uri, **changes}))
            assert "\n" not in str(raised.value)


def test_export_writes_forms_that_agree_with_torch(trained: str, tmp_path: Path) -> None:
    output = tmp_path / "a folder" / "exported"
    output.parent.mkdir()
    export.main(export.Settings(model_uri="models:/digits/1", output=str(output)))
    run = last_run("export")
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    triton = {f"triton/classifier/{name}" for name in ("1/model.onnx", "config.pbtxt", "labels.txt")}
    assert files == {"model.onnx", "model.int8.onnx", "model.pt2", "report.md", *triton}
    assert artifacts(run, "export") == {
        "export/model.onnx", "export/model.int8.onnx", "export/model.pt2", "export/report.md", "export/triton",
    }  # fmt: skip
    # The logged model and the export come from the same weights, so they are the same bytes.
    assert (output / "model.onnx").read_bytes() == model_file(trained).read_bytes()

    checkpoint = mlflow.artifacts.download_artifacts(run_id=trained, artifact_path="checkpoints/model.pt")
    network, _ = load_network(Path(checkpoint))
    data = load("digits", data_dir=Path("data"))
    images_NHWC, labels_N = (values[data.rows["test"]] for values in (data.images_NHWC, data.labels_N))
    with torch.no_grad():
        expected_NK = network(torch.from_numpy(images_NHWC)).numpy()
        program_NK = torch.export.load(output / "model.pt2").module()(torch.from_numpy(images_NHWC)).numpy()
    received = {"float32": output / "model.onnx", "int8": output / "model.int8.onnx"}
    logits = {
        name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images_NHWC})[
            0
        ]
        for name, path in received.items()
    }
    for logits_NK in (logits["float32"], program_NK):
        np.testing.assert_allclose(logits_NK, expected_NK, atol=1e-4)
        np.testing.assert_array_equal(logits_NK.argmax(axis=1), expected_NK.argmax(axis=1))
    for name, path in received.items():
        assert run.data.metrics[f"export/{name}_bytes"] == path.stat().st_size
        expected = metrics.accuracy_score(labels_N, logits[name].argmax(axis=1))
        assert run.data.metrics[f"export/{name}_accuracy"] == pytest.approx(expected)
        assert run.data.metrics[f"export/{name}_images_per_s"] > 0
    assert run.data.metrics["export/int8_accuracy"] > run.data.metrics["export/float32_accuracy"] - 0.02
    assert [line.split(" | ")[0] for line in (output / "report.md").read_text().splitlines()[2:]] == [
        "| float32",
        "| int8",
    ]
    with pytest.raises(UsageError, match="exists; give a new folder"):
        export.main(export.Settings(model_uri="models:/digits/1", output=str(output)))


def test_the_report_lists_the_layers_of_the_exported_file(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    export.main(export.Settings(model_uri="models:/digits/1", report=True))
    run = last_run("export")
    assert "pictures/roofline.png" in artifacts(run, "pictures")
    rows = list(csv.DictReader(io.StringIO(text(run, "tables/layers.csv"))))
    logged = mlflow.load_table("tables/layers.json", run_ids=[run.info.run_id])
    assert logged["flops"].tolist() == [int(row["flops"]) for row in rows]
    # The last layer, by hand: a batch of 16 times a matrix, with its bias; read and written once, in float32.
    graph = onnx.load(model_file(trained)).graph
    ((classes, side),) = [tuple(weight.dims) for weight in graph.initializer if weight.name == graph.node[-1].input[1]]
    assert (int(rows[-1]["flops"]), rows[-1]["operations"]) == (2 * 16 * side * classes, "Gemm")
    assert int(rows[-1]["bytes"]) == 4 * (16 * side + side * classes + classes + 16 * classes)
    ridge = run.data.metrics["roofline/ridge_flops_per_byte"]
    for row in rows:
        assert row["bound_by"] == ("memory" if int(row["flops"]) / int(row["bytes"]) < ridge else "arithmetic")
    assert f"of {len(rows)} layers" in capsys.readouterr().out


def test_export_needs_the_run_that_trained_the_model(trained: str) -> None:
    bare = mlflow.MlflowClient().create_run("0").info.run_id
    log_onnx_model(bare, model_file(trained), np.zeros((1, 8, 8, 1), np.uint8))
    with pytest.raises(UsageError, match=r"checkpoints/model\.pt' does not exist"):
        export.main(export.Settings(model_uri=f"runs:/{bare}/model"))
    with pytest.raises(UsageError, match="names no run of training"):
        export.main(export.Settings(model_uri=str(model_file(trained))))


def test_the_logged_model_loads_where_this_repository_is_not(trained: str, tmp_path: Path) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(f"runs:/{trained}/model", dst_path=str(tmp_path)))
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".onnx", ".json", ".yaml", ".txt", ""}
    assert not any(b"\x80\x04\x95" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    wanted = (folder / "requirements.txt").read_text().split()
    assert {re.split("==", line)[0] for line in wanted} == {"mlflow", "numpy", "onnx", "onnxruntime"}
    script = (
        "import json, sys, mlflow, numpy as np\n"
        f"model = mlflow.pyfunc.load_model({str(folder)!r})\n"
        f"example = model.metadata.load_input_example({str(folder)!r})['images']\n"
        "signature = [(spec.name, str(spec.type), list(spec.shape)) for spec in model.metadata.signature.inputs]\n"
        "images = np.arange(128).reshape(2, 8, 8, 1).astype(np.uint8)\n"
        "ours = [n for n in ('data_loader', 'models', 'utils', 'train') if n in sys.modules]\n"
        "logits = model.predict(images)['logits'].tolist()\n"
        "print(json.dumps([example.shape, str(example.dtype), signature, logits, ours]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shape, kind, signature, logits, ours = json.loads(done.stdout.splitlines()[-1])
    assert (shape, kind, ours) == ([1, 8, 8, 1], "uint8", [])
    assert signature == [["images", "uint8", [-1, 8, 8, 1]]]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images_NHWC = np.arange(128).reshape(2, 8, 8, 1).astype(np.uint8)
    np.testing.assert_allclose(logits, session.run(None, {"images": images_NHWC})[0], rtol=1e-4, atol=1e-5)
