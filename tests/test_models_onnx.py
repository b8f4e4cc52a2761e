"""Exported networks against torch, ONNX Runtime used directly, and Triton's own schema."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ModelError
from models.export_check import agreement, program_form
from models.networks import build
from models.onnx_export import to_onnx
from models.onnx_model import OnnxClassifier
from models.quantise import to_int8
from models.torch_export import to_program
from models.triton import to_repository

CLASSES = ("a cat", 'ein "Hund"', "鳥", "\U0001f600")
REPOSITORY = Path(__file__).parents[1]


def network(name="cnn", shape=(12, 12, 1)):
    """A network with statistics that differ from those of a fresh one."""
    torch.manual_seed(0)
    made = build(name, shape, len(CLASSES), [90.0] * shape[2], [60.0] * shape[2])
    with torch.no_grad():
        for _ in range(3):
            made(torch.randint(0, 256, (16, *shape), dtype=torch.uint8))
    return made.eval()


def pixels(shape, count=70):
    return np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(network(), (12, 12, 1), CLASSES, path, data_digest="d" * 64)
    return path


@pytest.mark.parametrize(
    ("name", "shape"), [("cnn", (12, 12, 1)), ("cnn", (9, 14, 3)), ("alexnet", (32, 32, 3)), ("resnet18", (16, 16, 1))]
)
def test_onnx_agrees_with_torch_for_every_batch(name, shape, tmp_path):
    torch_network, path = network(name, shape), tmp_path / "model.onnx"
    to_onnx(torch_network, shape, CLASSES, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (1, 2, 33):
        images_NHWC = pixels(shape, images)
        with torch.no_grad():
            expected_NK = torch_network(torch.from_numpy(images_NHWC)).numpy()
        for logits_NK in (session.run(None, {"images": images_NHWC})[0], OnnxClassifier(path).logits(images_NHWC)):
            np.testing.assert_allclose(logits_NK, expected_NK, atol=1e-4)
            np.testing.assert_array_equal(logits_NK.argmax(axis=1), expected_NK.argmax(axis=1))


def test_the_file_says_all_that_prediction_needs(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "classes": json.dumps(CLASSES, ensure_ascii=False),
        "image_shape": "[12, 12, 1]",
        "data_digest": "d" * 64,
    }
    classifier = OnnxClassifier(exported.read_bytes())
    assert (classifier.classes, classifier.image_shape) == (CLASSES, (12, 12, 1))
    assert classifier.data_digest == "d" * 64


def test_same_weights_give_the_same_bytes_in_any_process_and_no_path_is_inside(exported, tmp_path):
    script = (
        "import sys; sys.path[:0] = ['.', 'tests']; from pathlib import Path; from test_models_onnx import *; "
        f"to_onnx(network(), (12, 12, 1), CLASSES, Path({str(tmp_path / 'again.onnx')!r}), data_digest='d' * 64)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
    again = (tmp_path / "again.onnx").read_bytes()
    assert hashlib.sha256(again).hexdigest() == hashlib.sha256(exported.read_bytes()).hexdigest()
    assert str(REPOSITORY).encode() not in again
    assert str(tmp_path).encode() not in again


def test_export_leaves_the_network_alone(tmp_path):
    torch_network = network().train()
    before = {key: value.clone() for key, value in torch_network.state_dict().items()}
    to_onnx(torch_network, (12, 12, 1), CLASSES, tmp_path / "model.onnx")
    assert torch_network.training
    assert all(torch.equal(value, before[key]) for key, value in torch_network.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@given(images=st.integers(0, 400), threads=st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_slices_and_threads_do_not_change_the_answer(exported, images, threads):
    images_NHWC = pixels((12, 12, 1), images)
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    expected_NK = session.run(None, {"images": images_NHWC})[0] if images else np.empty((0, len(CLASSES)))
    classifier = OnnxClassifier(exported, threads)
    np.testing.assert_allclose(classifier.logits(images_NHWC), expected_NK, atol=1e-5)
    shares_NK = classifier.probabilities(images_NHWC)
    np.testing.assert_allclose(shares_NK, torch.softmax(torch.from_numpy(expected_NK).double(), 1), atol=1e-6)


def test_calls_of_several_threads_do_not_meet(exported):
    classifier = OnnxClassifier(exported, threads=3)
    inputs = [np.random.default_rng(seed).integers(0, 256, (1000, 12, 12, 1), np.uint8) for seed in range(6)]
    expected = [OnnxClassifier(exported, threads=1).logits(images_NHWC) for images_NHWC in inputs]
    with ThreadPoolExecutor(len(inputs)) as callers:
        for logits_NK, expected_NK in zip(callers.map(classifier.logits, inputs), expected, strict=True):
            np.testing.assert_allclose(logits_NK, expected_NK, atol=1e-5)


class OnABadDisk(np.ndarray):
    """Images that either the calling thread or its helpers cannot read, and the others only slowly."""

    caller_fails: ClassVar[bool]
    read: ClassVar[list[int]] = []
    being_read: ClassVar[set[int]] = set()

    def __getitem__(self, rows):
        self.read.append(rows.start)
        if (threading.current_thread() is threading.main_thread()) == self.caller_fails:
            time.sleep(0.05)  # the others begin
            raise OSError("a row is lost")
        self.being_read.add(rows.start)
        time.sleep(0.2)
        self.being_read.remove(rows.start)
        return super().__getitem__(rows)


@pytest.mark.parametrize(("threads", "caller_fails"), [(1, True), (4, True), (4, False)])
def test_an_error_in_one_thread_ends_the_call(exported, threads, caller_fails, monkeypatch):
    images_NHWC, classifier = pixels((12, 12, 1), 100_000), OnnxClassifier(exported, threads)
    monkeypatch.setattr(OnABadDisk, "caller_fails", caller_fails, raising=False)
    OnABadDisk.read.clear()
    with pytest.raises(OSError, match="a row is lost"):
        classifier.logits(images_NHWC.view(OnABadDisk))
    assert not OnABadDisk.being_read
    assert max(OnABadDisk.read) < len(images_NHWC) // 2
    assert len(classifier.logits(images_NHWC[:10])) == 10


@pytest.mark.parametrize(
    ("name", "shape"), [("cnn", (12, 12, 1)), ("cnn", (28, 30, 3)), ("alexnet", (32, 32, 3)), ("resnet18", (16, 16, 1))]
)
@pytest.mark.parametrize("form", ["file", "bytes", "int8"])
def test_embeddings_are_what_torchs_last_layer_takes(name, shape, form, tmp_path):
    torch_network, path = network(name, shape), tmp_path / "model.onnx"
    to_onnx(torch_network, shape, CLASSES, path)
    if form == "int8":
        to_int8(path, pixels(shape, 300)[-100:], tmp_path / "int8.onnx")
        path = tmp_path / "int8.onnx"
    last = [layer for layer in torch_network.modules() if isinstance(layer, torch.nn.Linear)][-1]
    seen = []
    last.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].detach().numpy()))
    images_NHWC = pixels(shape, 33)
    with torch.no_grad():
        torch_network(torch.from_numpy(images_NHWC))
    classifier = OnnxClassifier(path.read_bytes() if form == "bytes" else path, threads=3)
    logits_NK, embeddings_NE = classifier.outputs(images_NHWC)
    assert (embeddings_NE.dtype, embeddings_NE.shape) == (np.float32, seen[0].shape)
    np.testing.assert_array_equal(logits_NK, classifier.logits(images_NHWC))
    # The last layer, done by hand on them, gives the logits; in int8 its weights and results are rounded.
    by_hand_NK = embeddings_NE @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    if form == "int8":
        assert np.corrcoef(embeddings_NE.ravel(), seen[0].ravel())[0, 1] > 0.98
        assert np.abs(by_hand_NK - logits_NK).mean() < 0.05 * logits_NK.std()
    else:
        np.testing.assert_allclose(embeddings_NE, seen[0], atol=1e-4)
        np.testing.assert_allclose(by_hand_NK, logits_NK, atol=1e-4)
    for few in (0, 1):
        assert [part.shape for part in classifier.outputs(images_NHWC[:few])] == [(few, 4), (few, seen[0].shape[1])]


def test_rows_of_a_memory_map_give_all_logits_and_the_embeddings_of_the_chosen(exported, tmp_path):
    images_NHWC, rows_N, chosen_M = pixels((12, 12, 1), 40), np.arange(39, 4, -1), np.array([0, 6, 7, 20, 34])
    classifier = OnnxClassifier(exported)
    logits_NK, embeddings_NE = classifier.outputs(images_NHWC[rows_N])
    found_NK, found_ME = classifier.outputs_of(images_NHWC, rows_N, chosen_M, batch_size=7)
    np.testing.assert_array_equal(found_NK, logits_NK)
    np.testing.assert_array_equal(found_ME, embeddings_NE[chosen_M])


def test_only_who_asks_for_embeddings_pays_for_them(exported, tmp_path):
    script = (
        "import sys, numpy; from models.onnx_model import OnnxClassifier; "
        f"classifier = OnnxClassifier(__import__('pathlib').Path({str(exported)!r})); "
        "classifier.logits(numpy.zeros((1, 12, 12, 1), 'uint8')); assert 'onnx' not in sys.modules; "
        "classifier.outputs(numpy.zeros((1, 12, 12, 1), 'uint8')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
    model = onnx.load(exported)
    model.graph.node.append(onnx.helper.make_node("Relu", ["images as numbers"], ["logits"]))
    model.graph.node.append(onnx.helper.make_node("Cast", ["images"], ["images as numbers"], to=1))
    del model.graph.node[:-2]
    model.graph.node.reverse()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    headless = OnnxClassifier(model.SerializeToString())
    with pytest.raises(ModelError, match="does not end with a linear layer"):
        headless.outputs(pixels((12, 12, 1), 1))


@pytest.mark.parametrize(
    ("images_NHWC", "received"),
    [
        (np.zeros((2, 12, 12, 3), np.uint8), "uint8 [2, 12, 12, 3]"),
        (np.zeros((2, 12, 12, 1), np.float32), "float32 [2, 12, 12, 1]"),
        (np.zeros((12, 12), np.uint8), "uint8 [12, 12]"),
    ],
)
def test_wrong_images_are_one_line(exported, images_NHWC, received):
    with pytest.raises(ModelError) as error:
        OnnxClassifier(exported).logits(images_NHWC)
    assert str(error.value) == f"the model takes uint8 images [N, 12, 12, 1], received {received}"


def test_wrong_files_are_one_line(exported, tmp_path):
    broken, foreign, silent = (tmp_path / name for name in ("broken.onnx", "foreign.onnx", "silent.onnx"))
    broken.write_bytes(exported.read_bytes()[:500])
    model = onnx.load(exported)
    del model.metadata_props[:]
    onnx.save(model, silent)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), foreign)
    for path, said in (
        (tmp_path / "none.onnx", "there is no model file"),
        (broken, "is not a readable ONNX model"),
        (foreign, "inputs and outputs x, y; expected images, logits"),
        (silent, "does not say its classes"),
    ):
        with pytest.raises(ModelError) as error:
            OnnxClassifier(path)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_int8_is_smaller_close_and_reproducible(tmp_path, caplog):
    shape = (12, 12, 1)
    images_NHWC = pixels(shape, 300)
    to_onnx(network(), shape, CLASSES, tmp_path / "model.onnx", data_digest="x")
    for name in ("int8.onnx", "again.onnx"):
        to_int8(tmp_path / "model.onnx", images_NHWC[:100], tmp_path / name)
    assert (tmp_path / "int8.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * (tmp_path / "model.onnx").stat().st_size
    weights = [w for w in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(w.dims) == 4]
    assert weights
    assert all(weight.data_type == onnx.TensorProto.INT8 for weight in weights)
    original, small = OnnxClassifier(tmp_path / "model.onnx"), OnnxClassifier(tmp_path / "int8.onnx")
    assert (small.classes, small.image_shape) == (original.classes, original.image_shape)
    spread = original.logits(images_NHWC).std()
    assert np.abs(small.logits(images_NHWC) - original.logits(images_NHWC)).mean() < 0.1 * spread
    assert not caplog.records
    with pytest.raises(ModelError, match="received none"):
        to_int8(tmp_path / "model.onnx", images_NHWC[:0], tmp_path / "none.onnx")


@pytest.mark.parametrize("shape", [(12, 12, 1), (9, 14, 3)])
def test_the_torch_program_loads_back_and_agrees_for_every_batch(shape, tmp_path):
    torch_network, path = network("cnn", shape), tmp_path / "model.pt2"
    to_program(torch_network, shape, CLASSES, path)
    extra = {"classes.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert tuple(json.loads(extra["classes.json"])) == CLASSES
    for images in (1, 2, 33):
        images_NHWC = torch.from_numpy(pixels(shape, images))
        with torch.no_grad():
            torch.testing.assert_close(program(images_NHWC), torch_network(images_NHWC))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_agreement_sees_another_network(exported, tmp_path):
    images_NHWC, rows = pixels((12, 12, 1), 300), np.arange(0, 300, 2)
    to_program(network(), (12, 12, 1), CLASSES, tmp_path / "model.pt2")
    forms = {"onnx": OnnxClassifier(exported).logits, "program": program_form(tmp_path / "model.pt2")}
    assert all(each.holds and each.images == 150 for each in agreement(network(), forms, images_NHWC, rows).values())
    other = network()
    with torch.no_grad():
        other[1][-1].bias += 0.001
    found = agreement(other, forms, images_NHWC, rows)["onnx"]
    assert not found.holds
    assert found.largest_difference == pytest.approx(0.001, rel=0.01)


def model_config():
    """Triton's own message type; its module is loaded by path because the package around it wants gRPC."""
    package = importlib.util.find_spec("tritonclient").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("model_config_pb2", f"{package}/grpc/model_config_pb2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_triton_repository_parses_under_tritons_schema(exported, tmp_path):
    folder = to_repository(exported, "classifier", tmp_path / "repository")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "repository/classifier/1/model.onnx",
        "repository/classifier/config.pbtxt",
        "repository/classifier/labels.txt",
    ]
    schema = model_config()
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend) == (folder.name, "onnxruntime")
    assert config.max_batch_size > 1
    assert config.HasField("dynamic_batching")
    assert len(config.instance_group) == 1
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
    for listed, actual in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        found = [(end.name, schema.DataType.Name(end.data_type), list(end.dims)) for end in listed]
        assert found == [(end.name, kinds[end.type], end.shape[1:]) for end in actual]
    labels = (folder / config.output[0].label_filename).read_text("utf-8").splitlines()
    assert tuple(labels) == CLASSES
