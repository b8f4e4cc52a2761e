"""FLOPs, bytes and fused layers of the ONNX graph: by hand, against torch's own counter, and timed by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from models import layer_times, pictures
from models.networks import NETWORKS, build
from models.onnx_export import to_onnx
from models.roofline import Layer, Roof, layers

SHAPE, CLASSES = (32, 32, 3), tuple("0123456789")


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def graph(nodes: list[onnx.NodeProto], shape: list[int | str], *weights: onnx.TensorProto) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["batch", *["?"] * (len(shape) - 1)]),
    ]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(weights))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_convolution_by_hand() -> None:
    """2 images of 3x8x8, 5 filters of 3x3x3 with stride 2 and padding 1: 5x4x4 outputs of 27 products each."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    conv, pool = layers(graph(nodes, ["batch", 3, 8, 8], weight("w", 5, 3, 3, 3), weight("b", 5)), 2)
    assert (conv.operations, conv.flops) == ("Conv+Relu", 2 * (2 * 5 * 4 * 4) * 27 + 2 * 5 * 4 * 4)
    assert conv.bytes == 4 * (2 * 3 * 8 * 8 + 5 * 3 * 3 * 3 + 5 + 2 * 5 * 4 * 4)  # what lies between them is not moved
    assert (pool.operations, pool.flops) == ("MaxPool", 4 * (2 * 5 * 2 * 2))
    assert pool.bytes == 4 * (2 * 5 * 4 * 4 + 2 * 5 * 2 * 2)


def test_a_grouped_convolution_by_hand() -> None:
    """4 channels in 2 groups: each output takes 2 x 1 x 1 products."""
    node = helper.make_node("Conv", ["x", "w"], ["c"], "conv", group=2)
    (conv,) = layers(graph([node], ["batch", 4, 5, 5], weight("w", 6, 2, 1, 1)), 3)
    assert conv.flops == 2 * (3 * 6 * 5 * 5) * 2


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_by_hand(transposed: bool) -> None:
    """[7, 20] times [20, 11], and 11 sums."""
    shape = (11, 20) if transposed else (20, 11)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=int(transposed))
    (gemm,) = layers(graph([node], ["batch", 20], weight("w", *shape), weight("b", 11)), 7)
    assert gemm.flops == 2 * 7 * 20 * 11
    assert gemm.bytes == 4 * (7 * 20 + 20 * 11 + 11 + 7 * 11)
    assert gemm.intensity == gemm.flops / gemm.bytes


def test_what_joins_a_layer_and_what_does_not() -> None:
    """A residual sum ends the layer of the convolution before it, and reads the other term from memory."""
    nodes = [
        helper.make_node("Identity", ["w"], ["again"], "name"),
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "again"], ["b"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "x"], ["s"], "sum"),
        helper.make_node("Relu", ["s"], ["y"], "relu"),
    ]
    model = graph(nodes, ["batch", 2, 6, 6], weight("w", 2, 2, 3, 3))
    before = model.SerializeToString()
    first, second = layers(model, 1)
    assert model.SerializeToString() == before
    assert (first.operations, second.operations) == ("Conv", "Conv+Add+Relu")
    image_bytes = 4 * 2 * 6 * 6
    assert second.bytes == 3 * image_bytes + 4 * 2 * 2 * 3 * 3
    with pytest.raises(ValueError, match="the operations of Erf"):
        layers(graph([helper.make_node("Erf", ["x"], ["y"], "erf")], ["batch", 2]), 1)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    made = build(request.param, SHAPE, len(CLASSES), [120.0] * 3, [70.0] * 3).eval()
    path = tmp_path_factory.mktemp("roofline") / f"{request.param}.onnx"
    to_onnx(made, SHAPE, CLASSES, path)
    return made, path


def test_products_and_convolutions_are_those_that_torch_counts(network: tuple[torch.nn.Module, Path]) -> None:
    module, path = network
    images_NHWC = torch.zeros(5, *SHAPE, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images_NHWC)
    found = layers(onnx.load(path), 5)
    counted = counter.get_total_flops()
    heavy = [layer for layer in found if layer.operations.startswith(("Conv", "Gemm"))]
    # What joins a convolution, and is no product, is a small part; without it the two counts are equal.
    joined = sum(layer.flops for layer in heavy) - counted
    assert 0 <= joined < 0.02 * counted
    sizes = outputs(onnx.load(path), 5)
    assert len(heavy) == len(sizes)
    assert joined == sum(
        layer.operations.count("+") * size for layer in heavy for name, size in sizes.items() if name in layer.nodes
    )


def outputs(model: onnx.ModelProto, batch: int) -> dict[str, int]:
    """How many elements every convolution and product gives, by the name of its output: asked of ONNX Runtime."""
    names = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(names, {"images": np.zeros((batch, *SHAPE), np.uint8)})
    return {name: value.size for name, value in zip(names, values, strict=True)}


def test_every_layer_gets_its_time(network: tuple[torch.nn.Module, Path]) -> None:
    """ONNX Runtime's own names of what it fused and laid out anew lead back to the layers."""
    _, path = network
    found = layers(onnx.load(path), 4)
    seconds, others_s = layer_times.measure_layers(path, found, np.zeros((4, *SHAPE), np.uint8))
    assert len(seconds) == len(found)
    assert all(second > 0 for second, layer in zip(seconds, found, strict=True) if layer.flops > 1000)
    assert others_s < 0.2 * sum(seconds)  # changes of layout, and no layer that lost its name
    most = max(range(len(found)), key=lambda number: found[number].flops)
    assert found[most].operations.startswith("Conv")


@pytest.mark.parametrize("network", ["cnn"], indirect=True)
def test_the_study_says_what_memory_binds(network: tuple[torch.nn.Module, Path]) -> None:
    _, path = network
    found = layer_times.study(path, np.zeros((3, *SHAPE), np.uint8))
    assert found.facts["ridge_flops_per_byte"] == pytest.approx(found.roof.flops_per_s / found.roof.bytes_per_s)
    for row, layer in zip(found.table, layers(onnx.load(path), layer_times.BATCH), strict=True):
        assert (row["flops"], row["bytes"]) == (layer.flops, layer.bytes)
        assert row["bound_by"] == ("memory" if layer.flops < layer.bytes * found.roof.ridge else "arithmetic")
        assert row["gflops_per_s"] == pytest.approx(layer.flops / (1e3 * float(row["microseconds"])), rel=0.1, abs=0.01)
    by = {str(row["operations"]): row["bound_by"] for row in found.table}
    assert (by["Transpose"], by["Sub"]) == ("memory", "memory")
    assert f"of {len(found.table)} layers" in found.sentence
    figure = pictures.roofline(found.table, found.roof.flops_per_s, found.roof.bytes_per_s)
    left, right = figure.axes
    assert len(right.patches) == len(found.table)
    assert len(left.lines) == 2 + sum(row["flops"] > 0 for row in found.table)


def test_the_roof() -> None:
    roof = Roof(flops_per_s=100.0, bytes_per_s=10.0)
    light, heavy = (Layer("n", "Conv", frozenset(), flops, 20) for flops in (100, 1000))
    assert (roof.ridge, light.intensity, heavy.intensity) == (10, 5, 50)
    assert (roof.binds_by_memory(light), roof.binds_by_memory(heavy)) == (True, False)
    assert (roof.least_s(light), roof.least_s(heavy)) == (2, 10)
    assert Layer("n", "Flatten", frozenset(), 0, 0).intensity == 0
