"""A stand-in for NVIDIA Triton Inference Server, whose image the tests cannot pull; in its metadata it says what it is.

It serves the model repository that `export` writes, over gRPC with the service classes of tritonclient, and reads what
it needs from config.pbtxt with Triton's own message type. ONNX Runtime predicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

NAME = "stand-in for Triton"
TYPES = {"TYPE_UINT8": ("UINT8", np.uint8), "TYPE_FP32": ("FP32", np.float32)}


class Model:
    """One folder of a model repository."""

    def __init__(self, folder: Path) -> None:
        self.config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())
        assert self.config.backend == "onnxruntime"
        self.versions = sorted((path.name for path in folder.iterdir() if re.fullmatch(r"\d+", path.name)), key=int)
        self.sessions = {
            version: onnxruntime.InferenceSession(folder / version / "model.onnx", providers=["CPUExecutionProvider"])
            for version in self.versions
        }

    def end(self, end: Any) -> dict[str, Any]:
        """An input or output in the words of the metadata; a model that batches has the batch as its first side."""
        datatype, _ = TYPES[model_config_pb2.DataType.Name(end.data_type)]
        return {"name": end.name, "datatype": datatype, "shape": [-1, *end.dims]}


class TritonStandIn(service_pb2_grpc.GRPCInferenceServiceServicer):
    """As much of Triton as a client of an image classifier meets."""

    def __init__(self, repository: Path, token: str = "") -> None:
        """With a `token` calls have to show it, as a proxy before Triton asks for it."""
        self.models = {folder.name: Model(folder) for folder in repository.iterdir()}
        self.token = token
        self.batches: list[int] = []

    def _model(self, name: str, version: str, context: grpc.ServicerContext) -> tuple[Model, str]:
        if self.token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        model = self.models.get(name)
        if model is None or (version and version not in model.versions):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' version '{version}'")
        return model, version or model.versions[-1]

    def ServerMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ServerMetadataResponse(name=NAME)

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        model, _ = self._model(request.name, request.version, context)
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        return service_pb2.ModelMetadataResponse(
            name=request.name,
            versions=model.versions,
            platform=NAME,
            inputs=[tensor(**model.end(end)) for end in model.config.input],
            outputs=[tensor(**model.end(end)) for end in model.config.output],
        )

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        model, version = self._model(request.model_name, request.model_version, context)
        (taken,), (given,) = model.config.input, model.config.output
        (tensor,), (raw,) = request.inputs, request.raw_input_contents
        images, *sides = tensor.shape
        if (tensor.name, tensor.datatype, sides) != (taken.name, "UINT8", list(taken.dims)):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected shape for input '{taken.name}'")
        if images > model.config.max_batch_size:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"batch-size must be <= {model.config.max_batch_size}")
        self.batches.append(images)
        images_NHWC = np.frombuffer(raw, np.uint8).reshape(tensor.shape)
        (logits_NK,) = model.sessions[version].run([given.name], {taken.name: images_NHWC})
        output = service_pb2.ModelInferResponse.InferOutputTensor(
            name=given.name, datatype="FP32", shape=logits_NK.shape
        )
        return service_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=version,
            outputs=[output],
            raw_output_contents=[logits_NK.tobytes()],
        )


@contextmanager
def serving(stand_in: TritonStandIn) -> Iterator[str]:
    """The address at which it answers within the block."""
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(stand_in, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()
