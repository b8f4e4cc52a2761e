"""What a network has to compute and to move, layer by layer, from its ONNX graph alone; and what that allows a machine.

A floating-point operation is a multiplication, an addition, or another result of an element; a convolution of which
every output takes n products counts 2 n for it, and its bias nothing (as torch.utils.flop_counter does). The bytes are
those that have to be moved where nothing is kept from one layer to the next: every input, weight and output once.

Roofline: Williams, Waterman, Patterson, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import shape_inference

ROUNDS = {"Add", "Sub", "Mul", "Div", "Relu", "Clip"}
MOVES = {"Transpose", "Cast", "Flatten", "Reshape", "Identity", "Concat", "Slice"}
JOINS = {"Relu", "Add", "Clip"}
"""Computed on an output of a convolution, normalisation or product before it leaves the registers."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """What runs in one go: an operation with those that ONNX Runtime computes along with it."""

    name: str
    """The name of its first node."""
    operations: str
    nodes: frozenset[str]
    """Its nodes and their outputs, by name."""
    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte moved."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Roof:
    """What a machine does at best, with the threads that the layers run in."""

    flops_per_s: float
    bytes_per_s: float

    @property
    def ridge(self) -> float:
        """The intensity above which memory is no limit."""
        return self.flops_per_s / self.bytes_per_s

    def binds_by_memory(self, layer: Layer) -> bool:
        return layer.intensity < self.ridge

    def least_s(self, layer: Layer) -> float:
        """No less time than this, where all data comes from memory."""
        return max(layer.flops / self.flops_per_s, layer.bytes / self.bytes_per_s)


def layers(model: onnx.ModelProto, batch: int) -> list[Layer]:
    """The layers of a network for `batch` images, in the order of the graph; `model` is left as it is."""
    model = _for_batch(model, batch)
    shapes, sizes = _tensors(model)
    weights = {weight.name for weight in model.graph.initializer}
    groups: list[list[onnx.NodeProto]] = []
    made_in: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if all(name in weights for name in node.input):  # a weight by another name
            weights |= set(node.output)
            continue
        before = made_in.get(node.input[0], [])
        if before and _joins(node, before):
            before.append(node)
            group = before
        else:
            group = [node]
            groups.append(group)
        made_in.update(dict.fromkeys(node.output, group))
    return [_layer(group, shapes, sizes) for group in groups]


def flops(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Floating-point operations of one node; ValueError for an operation that is not known."""
    out = prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        return 2 * out * prod(shapes[node.input[1]][1:])  # channels of the group, height and width of the kernel
    if node.op_type in ("Gemm", "MatMul"):
        first = shapes[node.input[0]]
        return 2 * out * (first[0] if _attribute(node, "transA") else first[-1])
    if node.op_type == "BatchNormalization":
        return 2 * out
    if node.op_type in ("MaxPool", "AveragePool"):
        return out * int(prod(_attribute(node, "kernel_shape")))
    if node.op_type == "GlobalAveragePool":
        return prod(shapes[node.input[0]])
    if node.op_type in ROUNDS:
        return out
    if node.op_type in MOVES:
        return 0
    raise ValueError(f"the operations of {node.op_type} ({node.name}) are not known")


def _joins(node: onnx.NodeProto, before: list[onnx.NodeProto]) -> bool:
    first = before[0].op_type
    if node.op_type == "BatchNormalization":
        return first == "Conv"
    return node.op_type in JOINS and first in ("Conv", "Gemm", "MatMul", "BatchNormalization")


def _layer(group: list[onnx.NodeProto], shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> Layer:
    inside = {name for node in group[:-1] for name in node.output}
    outside = {name for node in group for name in (*node.input, *group[-1].output) if name and name not in inside}
    return Layer(
        name=group[0].name.strip("/"),
        operations="+".join(node.op_type for node in group),
        nodes=frozenset(name for node in group for name in (node.name, *node.output)),
        flops=sum(flops(node, shapes) for node in group),
        bytes=sum(sizes[name] for name in outside),
    )


def _for_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy with the shapes of all tensors for that many images."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for end in (*copy.graph.input, *copy.graph.output):
        end.type.tensor_type.shape.dim[0].dim_value = batch
    return shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True)


def _tensors(model: onnx.ModelProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """Shape, and size in bytes, of every tensor by name."""
    shapes: dict[str, Shape] = {}
    types: dict[str, int] = {}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        tensor = value.type.tensor_type
        shapes[value.name] = tuple(side.dim_value for side in tensor.shape.dim)
        types[value.name] = tensor.elem_type
    for weight in model.graph.initializer:
        shapes[weight.name], types[weight.name] = tuple(weight.dims), weight.data_type
    sizes = {
        name: prod(shape) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(types[name])).itemsize
        for name, shape in shapes.items()
    }
    return shapes, sizes


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    """The value of an attribute, or None."""
    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), None)
