"""A backend "onnxruntime" for Triton, in Python: in place of Triton's own, which the tests cannot have.

Triton runs it for every model whose configuration names this backend. Arrays cross over by DLPack, because
Triton's own conversion is compiled for NumPy 1.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """One instance of a model; name and methods are those that Triton calls."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        (taken,), (given,) = config["input"], config["output"]
        self.input, self.output = taken["name"], given["name"]
        path = Path(args["model_repository"]) / args["model_version"] / config["default_model_filename"]
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """The requests that Triton put together, as one batch through ONNX Runtime."""
        inputs = [triton.get_input_tensor_by_name(request, self.input) for request in requests]
        images = [np.from_dlpack(tensor) for tensor in inputs]
        (logits_NK,) = self.session.run([self.output], {self.input: np.concatenate(images)})
        parts = np.split(logits_NK, np.cumsum([len(each) for each in images])[:-1])
        return [triton.InferenceResponse([triton.Tensor.from_dlpack(self.output, part)]) for part in parts]
