"""The networks. Each takes raw pixels `images_NHWC` (0-255) and gives `logits_NK`; its first layer normalises them.

Because normalisation is a layer with stored statistics, training, export, batch prediction and serving cannot disagree
about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import ModelError

NETWORKS = ("cnn", "alexnet", "resnet18")


def build(
    name: str,
    image_shape: tuple[int, int, int],
    classes: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
) -> nn.Module:
    """Make the network `name` for images of shape (height, width, channels).

    `mean_C` and `std_C` are the statistics of the training split's raw pixels, one number a channel (unit: 0-255).
    """
    height, width, channels = image_shape
    if min(height, width) < 2 or channels < 1 or classes < 2:
        raise ModelError(
            f"cannot build '{name}' for images {height}x{width}x{channels} and {classes} classes; "
            "allowed: at least 2x2 pixels, 1 channel and 2 classes"
        )
    if name == "cnn":
        body: nn.Module = _cnn(image_shape, classes)
    elif name == "alexnet":
        body = _alexnet(image_shape, classes)
    elif name == "resnet18":
        body = _resnet18(image_shape, classes)
    else:
        raise ModelError(f"unknown network '{name}'; allowed: {', '.join(NETWORKS)}")
    return nn.Sequential(Normalise(mean_C, std_C), body).to(memory_format=torch.channels_last)


class Normalise(nn.Module):
    """images_NHWC of raw pixels -> standardised images_NCHW as float32."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, mean_C: Sequence[float], std_C: Sequence[float]):
        super().__init__()
        self.register_buffer("mean_C", torch.tensor(mean_C, dtype=torch.float32))
        self.register_buffer("std_C", torch.tensor(std_C, dtype=torch.float32).clamp(min=1.0))

    def forward(self, images_NHWC: Tensor) -> Tensor:
        # Permuting channels-last memory costs nothing and leaves the layout that the convolutions are fastest on. It
        # comes first because ONNX Runtime is 50 times slower at arithmetic whose last axis is a single channel.
        images_NCHW = images_NHWC.permute(0, 3, 1, 2).float()
        return (images_NCHW - self.mean_C[:, None, None]) / self.std_C[:, None, None]


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the global batch.

    Under torch.distributed the statistics are averaged over all processes (each holds an equal share of the batch), so
    that N processes compute what one would. torch's SyncBatchNorm does this on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        values = input.float()
        mean_C = _average_over_processes(values.mean((0, 2, 3)))
        centred = values - mean_C[:, None, None]
        variance_C = _average_over_processes(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = values.numel() // values.shape[1] * dist.get_world_size()
            momentum = self.momentum or 0.0
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean_C, momentum)
            self.running_var.lerp_(variance_C * count / (count - 1), momentum)
            self.num_batches_tracked.add_(1)
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return (centred * scale_C[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class _ProcessAverage(torch.autograd.Function):
    """Mean over all processes; its gradient is the mean of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def _average_over_processes(value: Tensor) -> Tensor:
    return _ProcessAverage.apply(value)  # type: ignore[no-any-return]


def _conv_block(
    channels_in: int, channels_out: int, *, kernel: int = 3, stride: int = 1, pool: bool = False
) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; with `pool` at half the size.

    Pooling comes right after the convolution: it commutes with what follows, which then has a quarter of the work.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity(),
        BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def _with_head(
    features: nn.Sequential, image_shape: tuple[int, int, int], classes: int, dropout: float
) -> nn.Sequential:
    """Features, each filter's largest answers in a 2x2 grid, and a linear layer on them: for any image size."""
    height, width, channels = image_shape
    with torch.no_grad():
        maps, rows, columns = features.eval()(torch.zeros(1, channels, height, width)).shape[1:]
    features.train()
    # Two rows and columns of cells, rounded up; one where the map has only one. (ONNX has no adaptive pooling.)
    cell = (math.ceil(rows / 2), math.ceil(columns / 2))
    cells = math.ceil(rows / cell[0]) * math.ceil(columns / cell[1])
    head = (nn.MaxPool2d(cell, ceil_mode=True), nn.Flatten(), nn.Dropout(dropout), nn.Linear(maps * cells, classes))
    return nn.Sequential(features, *head)


def _cnn(image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Three convolutions: small and fast. Of images that are large enough the first one looks at every second pixel."""
    height, width, channels = image_shape
    large = min(height, width) >= 24
    features = nn.Sequential(
        _conv_block(channels, 16, kernel=5, stride=2) if large else _conv_block(channels, 16, pool=True),
        _conv_block(16, 32, pool=True),
        _conv_block(32, 64),
    )
    return _with_head(features, image_shape, classes, dropout=0.0)


def _alexnet(image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """AlexNet's five convolutions (Krizhevsky et al., 2012) with the kernels and strides usual for 32x32 images.

    Batch normalisation stands in for its local response normalisation, one linear layer for its three: after 256 maps
    of 2x2 there is nothing for 4096 units to do, and without them it learns at the same rates as the others.
    """
    height, width, channels = image_shape
    features = nn.Sequential(
        _conv_block(channels, 64, stride=2 if min(height, width) >= 24 else 1, pool=True),
        _conv_block(64, 192, pool=True),
        _conv_block(192, 384),
        _conv_block(384, 256),
        _conv_block(256, 256, pool=True),
    )
    return _with_head(features, image_shape, classes, dropout=0.5)


def _resnet18(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """torchvision's ResNet-18; up to 64 pixels with a 3x3 stem of stride 1, no first pooling (He et al., 2015, 4.2)."""
    from torchvision.models import resnet18

    height, width, channels = image_shape
    network = resnet18(num_classes=classes, norm_layer=BatchNorm2d)
    if max(height, width) <= 64:
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return network  # type: ignore[no-any-return]
