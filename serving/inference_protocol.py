"""Open Inference Protocol v2 (https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol) with
the binary tensor extension of Triton: requests -> images, logits -> responses. Pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from serving import RequestError
from serving.model import ServedModel
from serving.tensors import images_of_flat_list, images_of_lists, json_object

INPUT, OUTPUT = "images", "logits"
PLATFORM = "onnxruntime_onnx"
SERVER = {"name": "image-classifier", "version": "2", "extensions": ["binary_tensor_data", "model_configuration"]}
JSON_LENGTH = "inference-header-content-length"
"""Header with the number of bytes of JSON before the binary tensors, in requests and in responses."""


@dataclass(slots=True)
class Inference:
    """What a request asks for."""

    images_NHWC: np.ndarray
    id: str | None
    binary: bool
    """Whether the logits are to be sent as raw little-endian float32 after the JSON."""


def metadata(model: ServedModel) -> dict[str, Any]:
    """Name, versions, inputs and outputs of the model."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *model.image_shape]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(model.classes)]}],
    }


def config(model: ServedModel, max_batch: int) -> dict[str, Any]:
    """The same in the words of Triton's model configuration."""
    return {
        "name": model.name,
        "platform": PLATFORM,
        "max_batch_size": max_batch,
        "input": [{"name": INPUT, "data_type": "TYPE_UINT8", "dims": list(model.image_shape)}],
        "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [len(model.classes)]}],
    }


def parse(body: bytes, json_length: str, model: ServedModel) -> Inference:
    """Read an inference request; `json_length` is the header of that name, or empty."""
    text, binary = _split(body, json_length)
    message = json_object(text)
    request_id = message.get("id")
    if not isinstance(request_id, str | None):
        raise RequestError("id: expected a string")
    inputs = message.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(f"inputs: expected a list of one tensor, '{INPUT}'")
    return Inference(_images(inputs[0], binary, model), request_id, _wants_binary(message))


def render(model: ServedModel, request: Inference, logits_NK: np.ndarray, ids: list[str]) -> tuple[bytes, int | None]:
    """The response's body, and how much of it is JSON where the logits follow as raw bytes.

    The protocol's parameters are single values, so the ids of the predictions are one text with commas.
    """
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": logits_NK.shape}
    message: dict[str, Any] = {"model_name": model.name, "model_version": model.version, "outputs": [output]}
    if request.id is not None:
        message["id"] = request.id
    if ids:
        message["parameters"] = {"ids": ",".join(ids)}
    if request.binary:
        raw = logits_NK.astype("<f4", copy=False).tobytes()
        output["parameters"] = {"binary_data_size": len(raw)}
        text = orjson.dumps(message)
        return text + raw, len(text)
    output["data"] = np.ascontiguousarray(logits_NK).reshape(-1)
    return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY), None


def _split(body: bytes, json_length: str) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if not json_length:
        return view, view[:0]
    # Python refuses to read numbers of thousands of digits.
    number = json_length.isascii() and json_length.isdecimal() and len(json_length) <= 20
    if not (number and int(json_length) <= len(body)):
        raise RequestError(f"Inference-Header-Content-Length: expected at most {len(body)}, the length of the body")
    length = int(json_length)
    return view[:length], view[length:]


def _images(tensor: dict[str, Any], binary: memoryview, model: ServedModel) -> np.ndarray:
    """The pixels of the one input, from the JSON or from the bytes after it."""
    if tensor.get("name") != INPUT or tensor.get("datatype") != "UINT8":
        raise RequestError(f"inputs: expected the tensor '{INPUT}' of datatype UINT8")
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 4
        or tuple(shape[1:]) != model.image_shape
        or type(shape[0]) is not int
        or shape[0] < 1
    ):
        sizes = ", ".join(map(str, model.image_shape))
        raise RequestError(f"inputs: expected '{INPUT}' in the shape [n, {sizes}] with n at least 1")
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        expected = shape[0] * model.image_shape[0] * model.image_shape[1] * model.image_shape[2]
        if size != expected or len(binary) != expected:
            raise RequestError(f"inputs: expected binary_data_size {expected} and as many bytes after the JSON")
        return np.frombuffer(binary, np.uint8).reshape(shape)
    data = tensor.get("data")
    if not isinstance(data, list):
        raise RequestError("inputs: expected data, or parameters.binary_data_size and the bytes after the JSON")
    if data and isinstance(data[0], list):
        images_NHWC = images_of_lists(data, model.image_shape, "inputs: data")
        if len(images_NHWC) != shape[0]:
            raise RequestError(f"inputs: shape says {shape[0]} images, data holds {len(images_NHWC)}")
        return images_NHWC
    return images_of_flat_list(data, shape[0], model.image_shape, "inputs: data")


def _wants_binary(message: dict[str, Any]) -> bool:
    """Whether the request asks for binary output: of the output by name, else of all."""
    outputs = message.get("outputs")
    if not outputs:
        parameters = message.get("parameters")
        return isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    if (
        not isinstance(outputs, list)
        or len(outputs) != 1
        or not isinstance(outputs[0], dict)
        or outputs[0].get("name") != OUTPUT
    ):
        raise RequestError(f"outputs: expected '{OUTPUT}', the only one there is")
    parameters = outputs[0].get("parameters")
    if not isinstance(parameters, dict):
        return False
    if parameters.get("classification"):
        raise RequestError("outputs: classification is not offered; the logits are in the order of the classes")
    return parameters.get("binary_data") is True
