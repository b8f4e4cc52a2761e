"""The network that a training ends with, as the two files that it leaves: a checkpoint and an ONNX model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from models.checkpoint import save_network, weights_sha256
from models.onnx_export import to_onnx
from models.training import TrainingState


def write_finished(network: nn.Module, state: TrainingState, checkpoint: Path, onnx_file: Path) -> dict[str, str]:
    """Give `network` its best weights and write both files; gives the digests of its weights and of its data."""
    network.load_state_dict(state.best_weights or network.state_dict())
    spec = state.spec
    save_network(checkpoint, network, spec)
    to_onnx(network, spec.image_shape, spec.classes, onnx_file, data_digest=spec.data_digest)
    return {"weights_sha256": weights_sha256(network.state_dict()), "data_digest": spec.data_digest}
