"""Optimisers, and learning-rate schedules as plain functions of the step: there is no scheduler state to save."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

# OneCycle as torch.optim.lr_scheduler.OneCycleLR has it by default (Smith and Topin, 2017, in its cosine form).
ONECYCLE_WARMUP = 0.3
ONECYCLE_START = 1 / 25
ONECYCLE_END = 1 / 25 / 1e4
# Step decay: a tenth at half and again at three quarters of training (He et al., 2015, section 4.2).
STEP_DROPS = (0.5, 0.75)


def make_optimizer(name: str, network: nn.Module, weight_decay: float) -> Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9; biases and normalisation layers are not decayed."""
    return (AdamW if name == "adamw" else SGD)(network, weight_decay)


@dataclass
class Group:
    """Parameters with one weight decay, and what the optimiser remembers of each."""

    parameters: list[Tensor]
    weight_decay: float
    moments: list[list[Tensor]]


class Optimizer(ABC):
    """Moves the parameters of a network down their gradients.

    The arithmetic is torch.optim's, by its functions. Its classes are not used because their first step imports torch's
    compiler, which is never called here and takes as long to import as the rest of torch.
    """

    def __init__(self, network: nn.Module, weight_decay: float):
        weights = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
        pairs = ((weights, weight_decay), (others, 0.0))
        self._groups = [Group([*parameters], decay, self._moments(parameters)) for parameters, decay in pairs]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take one step; every parameter must have a gradient, and has none afterwards."""
        for group in self._groups:
            gradients = [parameter.grad for parameter in group.parameters if parameter.grad is not None]
            self._update(group, gradients, learning_rate)
            for parameter in group.parameters:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on, as tensors in lists."""
        return {"moments": [group.moments for group in self._groups]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave for the same network."""
        for group, saved_moments in zip(self._groups, state["moments"], strict=True):
            for moment, saved in zip(group.moments, saved_moments, strict=True):
                for tensor, value in zip(moment, saved, strict=True):
                    tensor.copy_(value)

    @staticmethod
    @abstractmethod
    def _moments(parameters: list[nn.Parameter]) -> list[list[Tensor]]:
        """What is remembered before the first step."""

    @staticmethod
    @abstractmethod
    def _update(group: Group, gradients: list[Tensor], learning_rate: float) -> None:
        """Change parameters and moments in place."""


class AdamW(Optimizer):
    """Loshchilov and Hutter, 2019, with torch's default decay of the moments."""

    @staticmethod
    def _moments(parameters: list[nn.Parameter]) -> list[list[Tensor]]:
        means, squares = ([torch.zeros_like(parameter.detach()) for parameter in parameters] for _ in range(2))
        return [means, squares, [torch.zeros((), device=parameter.device) for parameter in parameters]]

    @staticmethod
    def _update(group: Group, gradients: list[Tensor], learning_rate: float) -> None:
        means, squares, steps = group.moments
        adamw(
            group.parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=group.weight_decay,
            eps=1e-8,
            maximize=False,
        )


class SGD(Optimizer):
    """Stochastic gradient descent with Nesterov's momentum of 0.9."""

    @staticmethod
    def _moments(parameters: list[nn.Parameter]) -> list[list[Tensor]]:
        return [[torch.zeros_like(parameter.detach()) for parameter in parameters]]

    @staticmethod
    def _update(group: Group, gradients: list[Tensor], learning_rate: float) -> None:
        (velocities,) = group.moments
        sgd(
            group.parameters,
            gradients,
            [*velocities],
            fused=True,
            weight_decay=group.weight_decay,
            momentum=0.9,
            lr=learning_rate,
            dampening=0.0,
            nesterov=True,
            maximize=False,
        )


def learning_rate_at(step: int, total_steps: int, scheduler: str, peak: float) -> float:
    """The learning rate of optimiser step `step` (from 0) of `total_steps`."""
    if scheduler == "none":
        return peak
    if scheduler == "cosine":
        return _cosine(peak, 0.0, step / total_steps)
    if scheduler == "step":
        return peak * float(0.1 ** sum(step >= drop * total_steps for drop in STEP_DROPS))
    warmup_end = ONECYCLE_WARMUP * total_steps - 1
    if step <= warmup_end:
        return _cosine(peak * ONECYCLE_START, peak, step / warmup_end)
    return _cosine(peak, peak * ONECYCLE_END, (step - warmup_end) / max(1.0, total_steps - 1 - warmup_end))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
