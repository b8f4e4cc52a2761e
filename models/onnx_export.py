"""A trained network as one ONNX file that carries its class names: nothing else is needed to predict with it.

torch has two exporters. Measured with torch 2.15 on two cores, small CNN: the one built on TorchScript takes
0.1 s; the one built on torch.export takes 3-7 s and writes stack traces with paths of this machine into the
file. Both give the same graph, so the first is used.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

OPSET = 17
"""Understood by ONNX Runtime >= 1.12 and Triton >= 22.08; has every operator our networks use."""

INPUT, OUTPUT = "images", "logits"


def to_onnx(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    classes: tuple[str, ...],
    path: Path,
    *,
    data_digest: str = "",
) -> None:
    """Write `network` to `path`: input `images` uint8 [batch, H, W, C], output `logits` float32 [batch, K].

    The same weights give the same bytes. The network itself is left as it is, on its device and in its mode.
    """
    still = copy.deepcopy(network).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            still,
            (torch.zeros(2, *image_shape, dtype=torch.uint8),),
            str(temporary),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
    model = onnx.load(temporary)
    describe(model, image_shape, classes, data_digest)
    onnx.checker.check_model(model, full_check=True)
    temporary.write_bytes(model.SerializeToString(deterministic=True))
    temporary.replace(path)


def describe(
    model: onnx.ModelProto, image_shape: tuple[int, int, int], classes: tuple[str, ...], data_digest: str
) -> None:
    """Put what a reader of the logits must know into the file's metadata."""
    del model.metadata_props[:]
    facts = {
        "classes": json.dumps(classes, ensure_ascii=False),
        "data_digest": data_digest,
        "image_shape": json.dumps(image_shape),
    }
    onnx.helper.set_model_props(model, facts)
