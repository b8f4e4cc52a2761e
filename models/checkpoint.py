"""Checkpoints and trained networks on disk: tensors and plain values only, so that loading runs no code.

Written to a temporary name, flushed, renamed: a file under its final name is whole.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from models import ModelError
from models.networks import build


@dataclass(frozen=True)
class NetworkSpec:
    """What it takes to build the same network again."""

    network: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    dataset: str
    data_digest: str

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        return build(self.network, self.image_shape, len(self.classes), self.mean_C, self.std_C)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts and containers of them) to `path` in one step; ModelError if it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            _write(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ModelError(
            f"cannot write the checkpoint {path}: {error.strerror}; free some space and run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(state: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # What stops the writing, Ctrl-C or a full disk, is hidden by torch's failure to end its archive after that.
        raise error.__context__ or error from None


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU, without running any code that the file may carry."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"cannot read {path} as a checkpoint ({type(error).__name__}): it is missing, cut short or something else; "
            "give a file that training wrote"
        ) from error
    if not isinstance(state, dict) or "spec" not in state:
        raise ModelError(f"{path} is not a checkpoint of this project; give a file written by its training")
    return state


def spec_state(spec: NetworkSpec) -> dict[str, Any]:
    """The spec as plain values for `save`."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(spec).items()}


def spec_of(state: dict[str, Any]) -> NetworkSpec:
    """The spec inside a loaded checkpoint."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in state["spec"].items()
    }
    return NetworkSpec(**fields)


def save_network(path: Path, network: nn.Module, spec: NetworkSpec) -> None:
    """Write a trained network (no optimiser) to `path`."""
    save(path, {"spec": spec_state(spec), "weights": network.state_dict()})


def load_network(path: Path) -> tuple[nn.Module, NetworkSpec]:
    """A trained network in evaluation mode and its spec, from `save_network`'s file."""
    state = load(path)
    spec = spec_of(state)
    network = spec.build()
    network.load_state_dict(state["weights"])
    return network.eval(), spec


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """One digest over names, types, shapes and bits of all weights: equal exactly when two networks are the same."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
