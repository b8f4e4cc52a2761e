"""A trained network as a `torch.export` program: runs in torch without this repository's code."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn


def to_program(network: nn.Module, image_shape: tuple[int, int, int], classes: tuple[str, ...], path: Path) -> None:
    """Write `network` to `path` (.pt2): uint8 [batch, H, W, C] -> float32 [batch, K], any batch from 1.

    The file also carries `classes.json`; read both with `torch.export.load(path, extra_files=...)`.
    """
    still = copy.deepcopy(network).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    example = torch.zeros(2, *image_shape, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(still, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    temporary = path.with_name(f".{path.name}")  # torch insists on the suffix .pt2
    torch.export.save(program, temporary, extra_files={"classes.json": json.dumps(classes)})
    temporary.replace(path)
