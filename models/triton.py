"""A model repository for NVIDIA Triton Inference Server: a model's folder, configuration and versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from models.onnx_model import INPUT, OUTPUT, OnnxClassifier

MAX_BATCH = 256
MAX_QUEUE_DELAY_US = 500
"""How long a request waits for others to share a batch: short beside the network, long beside an image."""


def to_repository(source: Path, name: str, repository: Path) -> Path:
    """Put the ONNX file `source` into `repository` as version 1 of the model `name`; returns its folder."""
    classifier = OnnxClassifier(source)
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(source, folder / "1" / "model.onnx")
    (folder / "labels.txt").write_text("".join(f"{_line(label)}\n" for label in classifier.classes), "utf-8")
    (folder / "config.pbtxt").write_text(config(name, classifier.image_shape, len(classifier.classes)), "utf-8")
    return folder


def config(name: str, image_shape: tuple[int, int, int], classes: int) -> str:
    """`config.pbtxt` in the schema of Triton's model_config.proto; KIND_AUTO takes a GPU if there is one."""
    dims = ", ".join(map(str, image_shape))
    return f"""\
name: {json.dumps(name)}
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [
  {{ name: "{INPUT}", data_type: TYPE_UINT8, dims: [ {dims} ] }}
]
output [
  {{ name: "{OUTPUT}", data_type: TYPE_FP32, dims: [ {classes} ], label_filename: "labels.txt" }}
]
dynamic_batching {{ max_queue_delay_microseconds: {MAX_QUEUE_DELAY_US} }}
instance_group [
  {{ count: 1, kind: KIND_AUTO }}
]
"""


def _line(label: str) -> str:
    """A class name on one line: labels.txt has one a line."""
    return " ".join(label.split()) or label
