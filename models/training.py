"""One optimiser step, the logits of a split, and the state that a training run can go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from models import ModelError, TrainingDiverged
from models.checkpoint import NetworkSpec, load, save, spec_of, spec_state
from models.optimisation import Optimizer, make_optimizer

T = TypeVar("T")


def train_step(
    network: nn.Module,
    optimizer: Optimizer,
    images_NHWC: Tensor,
    labels_N: Tensor,
    *,
    learning_rate: float,
    label_smoothing: float,
    precision: str,
    seed: tuple[int, int, int],
) -> Tensor:
    """One step of gradient descent; gives [loss, share of right answers] on the batch, still on its device.

    `seed` (the training's seed, the step, the process) makes dropout draw the same masks when the step is taken again.
    """
    _seed_dropout(int(np.random.SeedSequence(seed).generate_state(1)[0]), images_NHWC.device)
    with torch.autocast(images_NHWC.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits_NK = network(images_NHWC)
    loss = nn.functional.cross_entropy(logits_NK.float(), labels_N, label_smoothing=label_smoothing)
    loss.backward()
    optimizer.step(learning_rate)
    with torch.no_grad():
        return torch.stack([loss.detach(), (logits_NK.argmax(1) == labels_N).float().mean()])


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout draws from.

    On a CPU not by torch.manual_seed: while no GPU is in use, that keeps each call and its stack for the GPU to come.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@torch.inference_mode()
def predict_logits(
    network: nn.Module, batches: Iterable[Any], classes: int, device: torch.device, precision: str
) -> Tensor:
    """The logits_NK (float32, on the CPU) of all batches in order; leaves the network in training mode."""
    network.eval()
    logits = [torch.empty(0, classes)]
    for batch in batches:
        images_NHWC = torch.from_numpy(batch.images_NHWC).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits.append(network(images_NHWC).float().cpu())
    network.train()
    return torch.cat(logits)


@dataclass
class TrainingState:
    """Everything that a resumed training needs to end with the very bits of an uninterrupted one.

    There is no generator state in it: batches, augmentation and dropout are functions of the seed and the step.
    """

    spec: NetworkSpec
    recipe: dict[str, Any]
    """Settings that have to be the same when training goes on."""
    step: int = 0
    """Optimiser steps done."""
    epoch_results: list[list[float]] = field(default_factory=list)
    """[loss, accuracy] of each step so far in the present epoch."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row of metrics a finished epoch."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the epoch with the lowest validation loss; kept only for early stopping."""

    def finish_epoch(self, validation: dict[str, float], learning_rate: float, network: nn.Module | None) -> None:
        """Add the epoch to the history; keep the weights of `network`, if given, when its loss is the lowest yet."""
        losses, accuracies = zip(*self.epoch_results, strict=True)
        self.history.append(
            {
                "epoch": len(self.history) + 1,
                "train/loss": sum(losses) / len(losses),
                "train/accuracy": sum(accuracies) / len(accuracies),
                **validation,
                "learning_rate": learning_rate,
            }
        )
        self.epoch_results = []
        if network is not None and self._epochs_without_progress() == 0:
            self.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}

    def describe_epoch(self, epochs: int) -> str:
        """The last epoch, of `epochs`, in a line."""
        row = self.history[-1]
        return (
            f"epoch {row['epoch']:>3}/{epochs}  loss {row['train/loss']:.4f}  accuracy {row['train/accuracy']:.4f}  "
            f"val loss {row['val/loss']:.4f}  val accuracy {row['val/accuracy']:.4f}"
        )

    def steps_left(self, total_steps: int, patience: int) -> range:
        """The steps that are to be done still; none where the training stopped early."""
        return range(self.step, self.step if self.stopped_early(patience) else total_steps)

    def stopped_early(self, patience: int) -> bool:
        """Whether the best epoch lies `patience` epochs back (0: for ever)."""
        return 0 < patience <= self._epochs_without_progress()

    def _epochs_without_progress(self) -> int:
        """Epochs since the one with the lowest validation loss."""
        losses = [row["val/loss"] for row in self.history]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def save(self, path: Path, network: nn.Module, optimizer: Optimizer) -> None:
        """Write the state with the weights and the optimiser's moments, whole or not at all."""
        state = {
            "spec": spec_state(self.spec),
            "recipe": self.recipe,
            "step": self.step,
            "epoch_results": self.epoch_results,
            "history": self.history,
            "best_weights": self.best_weights,
            "weights": network.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        save(path, state)

    def restore(self, path: Path, network: nn.Module, optimizer: Optimizer) -> None:
        """Go on from what `save` wrote; ModelError if it belongs to another training."""
        state = load(path)
        if "optimizer" not in state:
            raise ModelError(f"{path.name} holds a finished network, not a training to go on from; give latest.pt")
        theirs = {**spec_state(spec_of(state)), **state["recipe"]}
        ours = {**spec_state(self.spec), **self.recipe}
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ModelError(
                    f"cannot resume: the checkpoint was made with {name} {_short(theirs.get(name))}, received "
                    f"{_short(value)}; give the same {', '.join(self.recipe)} and data, or start a new run"
                )
        network.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.epoch_results = state["epoch_results"]
        self.history = state["history"]
        self.best_weights = state["best_weights"]


def begin(
    spec: NetworkSpec, recipe: dict[str, Any], weight_decay: float, device: torch.device
) -> tuple[nn.Module, Optimizer, TrainingState]:
    """A network with the fresh weights of the recipe's `seed`, its `optimizer`, and the state before the first step."""
    torch.manual_seed(recipe["seed"])
    network = spec.build().to(device)
    return network, make_optimizer(recipe["optimizer"], network, weight_decay), TrainingState(spec, recipe)


class Window:
    """The optimiser steps since the last point of the training charts: what they gave and how long they took."""

    def __init__(self) -> None:
        self._results: list[Tensor] = []
        self._rates: list[float] = []
        self._images = 0
        self._start = self._waited_s = 0.0

    def time(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches on, measuring the wait for each."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if not self._results:
                self._start = asked
            self._waited_s += time.perf_counter() - asked
            yield batch

    def add(self, result: Tensor, learning_rate: float, images: int) -> None:
        """Take up what `train_step` gave for a global batch of `images`."""
        self._results.append(result)
        self._rates.append(learning_rate)
        self._images += images

    def close(self, state: TrainingState, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The steps' metrics, which also go into the state's present epoch; then begin anew.

        `mean` averages over the processes that share the batches. TrainingDiverged if a loss is not a number.
        """
        results = mean(torch.stack(self._results)).tolist()
        seconds = time.perf_counter() - self._start
        for position, (loss, _) in enumerate(results):
            if not math.isfinite(loss):
                raise TrainingDiverged(loss, state.step - len(results) + position + 1, self._rates[position])
        state.epoch_results += results
        metrics = {
            "train/loss": sum(loss for loss, _ in results) / len(results),
            "train/accuracy": sum(accuracy for _, accuracy in results) / len(results),
            "train/learning_rate": self._rates[-1],
            "train/images_per_s": self._images / seconds,
            "train/seconds_to_data": self._waited_s,
        }
        self.__init__()  # type: ignore[misc]
        return metrics


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
