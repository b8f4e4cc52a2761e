"""Test errors on MNIST after labelling what monitoring/recommend.py chooses, against labelling images chosen at random.

Both sides start with the same 500 labelled images and the same network; five times each side chooses 200 more of the
training images, whose labels are then looked up, and trains a new network on all it has, by the same recipe. The
official test images only judge. As in service, a choice sees probabilities, embeddings and distances to a reference,
here the images labelled so far; it never sees a label. Three seeds draw the first images, the random ones and
the weights. The ranking was chosen with other seeds, judged on training images.

Goal: fewer errors for every seed. Needs MNIST_ROOT, a folder with MNIST in torchvision's layout (MNIST/raw). Takes
about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from time_to_accuracy import ROOT, unpacked_mnist

SEEDS, START, ROUNDS, EACH = (0, 1, 2), 500, 5, 200
EPOCHS, BATCH_SIZE, LEARNING_RATE = 20, 50, 0.01

# As utils.runtime.launch sets it, which these trainings do not pass through; before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

Choose = Callable[[Any, Any, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def trained(data: Any, rows: np.ndarray, seed: int) -> Any:
    """A small CNN, trained on some rows with the default recipe at a batch size that suits so few."""
    import torch

    from data_loader.augment import augment
    from data_loader.batches import channel_statistics, steps_per_epoch, training_batches
    from models.networks import build
    from models.optimisation import learning_rate_at, make_optimizer
    from models.training import train_step

    torch.manual_seed(seed)
    statistics = channel_statistics(data.images_NHWC, rows)
    network = build("cnn", data.images_NHWC.shape[1:], len(data.classes), *statistics)
    optimizer = make_optimizer("adamw", network, 0.01)
    steps = range(EPOCHS * steps_per_epoch(len(rows), BATCH_SIZE))
    batches = training_batches(data.images_NHWC, data.labels_N, rows, batch_size=BATCH_SIZE, seed=seed, steps=steps)
    for step, batch in enumerate(batches):
        train_step(
            network,
            optimizer,
            augment(torch.from_numpy(batch.images_NHWC), "shift", seed=seed, step=step),
            torch.from_numpy(batch.labels_N),
            learning_rate=learning_rate_at(step, len(steps), "onecycle", LEARNING_RATE),
            label_smoothing=0.0,
            precision="fp32",
            seed=(seed, step, 0),
        )
    return network.eval()


def outputs(network: Any, data: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """probabilities_NK and embeddings_NE (what the last linear layer gets) of some rows."""
    import torch

    normalise, (*features, last) = network[0], network[1]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(rows), 1000):
            values = normalise(torch.from_numpy(data.images_NHWC[rows[start : start + 1000]]))
            for layer in features:
                values = layer(values)
            parts.append((torch.softmax(last(values), dim=1), values))
    probabilities, embeddings = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
    return probabilities, embeddings


def recommended(
    network: Any, data: Any, labelled: np.ndarray, pool: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """What recommend_labels would choose."""
    from monitoring.distance import Distances
    from monitoring.recommend import recommend

    distances = Distances(outputs(network, data, labelled)[1])
    probabilities_NK, embeddings_NE = outputs(network, data, pool)
    choices = recommend(
        probabilities_NK,
        embeddings_NE,
        EACH,
        distances_N=distances.to(embeddings_NE),
        threshold=distances.threshold,
    )
    return pool[[choice.row for choice in choices]]


def at_random(
    network: Any, data: Any, labelled: np.ndarray, pool: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """The other side."""
    return random.choice(pool, EACH, replace=False)


def accuracies(data: Any, seed: int, choose: Choose, rounds: int) -> list[float]:
    """On the test images: at the start and after each round."""
    random = np.random.default_rng(seed)
    everything, test = np.sort(np.concatenate([data.rows["train"], data.rows["val"]])), data.rows["test"]
    labelled, found = random.choice(everything, START, replace=False), []
    for _ in range(rounds + 1):
        network = trained(data, labelled, seed)
        predicted_N = outputs(network, data, test)[0].argmax(axis=1)
        found.append(float((predicted_N == data.labels_N[test]).mean()))
        if len(found) <= rounds:
            pool = np.setdiff1d(everything, labelled)
            labelled = np.concatenate([labelled, choose(network, data, labelled, pool, random)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from data_loader.dataset import load
    from utils.compute import make_deterministic

    make_deterministic()
    ours, other = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = load("mnist", data_dir=unpacked_mnist(Path(folder)))
        print("labels" + "".join(f"{START + number * EACH:>8}" for number in range(arguments.rounds + 1)), flush=True)
        for seed in arguments.seeds:
            for name, choose, results in (("ours", recommended, ours), ("other", at_random, other)):
                results.append(accuracies(data, seed, choose, arguments.rounds))
                print(f"seed {seed}, {name:<5}" + "".join(f"  {value:.4f}" for value in results[-1]), flush=True)
    ours_SR, other_SR = np.array(ours), np.array(other)
    points_S = 100 * (ours_SR - other_SR)[:, -1]
    by_round = " ".join(f"{points:+.2f}" for points in 100 * (ours_SR - other_SR).mean(axis=0)[1:])
    print(f"points of accuracy more by round, mean of the seeds: {by_round}")
    print(f"points more after the last round: {points_S.mean():.2f} (by seed {' '.join(f'{p:.2f}' for p in points_S)})")
    ours_error, other_error = 1 - ours_SR[:, -1].mean(), 1 - other_SR[:, -1].mean()
    print(f"ratio: {other_error / ours_error:.2f} (ours {ours_error:.2%} wrong, other {other_error:.2%})")
    if points_S.min() <= 0:
        sys.exit("error: random choice was as good for a seed")


if __name__ == "__main__":
    main()
