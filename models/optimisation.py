"""Optimisers, and learning-rate schedules as plain functions of the step: there is no scheduler state to save."""

from __future__ import annotations

import math

import torch
from torch import nn

# OneCycle as torch.optim.lr_scheduler.OneCycleLR has it by default (Smith and Topin, 2017, in its cosine form).
ONECYCLE_WARMUP = 0.3
ONECYCLE_START = 1 / 25
ONECYCLE_END = 1 / 25 / 1e4
# Step decay: a tenth at half and again at three quarters of training (He et al., 2015, section 4.2).
STEP_DROPS = (0.5, 0.75)


def make_optimizer(name: str, network: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9; biases and normalisation layers are not decayed.

    The learning rate is set before every step from `learning_rate_at`.
    """
    weights = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=True)


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
