"""Our epoch on MNIST with tracking to a real server, checkpoints and progress, against the bare compute loop.

The bare loop has the same network, batches, augmentation, precision and validation pass, all images in memory, and logs
nothing. Both sides are processes of their own; the time between their "epoch" lines counts, so that start-up does not.
Pairs in turn, medians. Goal: at most 1.05.

Needs MNIST_ROOT, a folder with MNIST in torchvision's layout (MNIST/raw).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from time_to_accuracy import ROOT, unpacked_mnist

sys.path.insert(0, str(ROOT / "tests"))

EPOCHS, BATCH_SIZE, LEARNING_RATE, PAIRS = 3, 256, 0.01, 3


def epoch_s(command: list[str], **environment: str) -> float:
    """Seconds an epoch takes: from a process's first "epoch" line to its last."""
    process = subprocess.Popen(
        [sys.executable, "-u", *command],
        # As utils.runtime.launch sets it, which the bare loop does not pass through.
        env={**os.environ, "GOMP_SPINCOUNT": "3000", **environment},
        cwd=environment["FOLDER"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    times = [time.perf_counter() for line in process.stdout if line.startswith("epoch")]
    if process.wait() or len(times) != EPOCHS:
        raise SystemExit(f"error: {' '.join(command)} failed")
    return (times[-1] - times[0]) / (EPOCHS - 1)


def bare_loop(data_dir: str) -> None:
    """The other side: nothing but compute."""
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT))
    from data_loader.augment import augment
    from data_loader.batches import channel_statistics, evaluation_batches, steps_per_epoch, training_batches
    from data_loader.dataset import load
    from models.networks import build
    from models.optimisation import learning_rate_at, make_optimizer
    from models.training import predict_logits, train_step
    from utils.compute import Compute, make_deterministic

    make_deterministic()
    compute = Compute.pick("auto", "auto")
    data = load("mnist", data_dir=Path(data_dir))
    images_NHWC, train_rows = np.array(data.images_NHWC), data.rows["train"]
    height, width, channels = images_NHWC.shape[1:]
    torch.manual_seed(0)
    statistics_C = channel_statistics(images_NHWC, train_rows)
    network = build("cnn", (height, width, channels), len(data.classes), *statistics_C).to(compute.device)
    optimizer = make_optimizer("adamw", network, 0.01)
    epoch_steps = steps_per_epoch(len(train_rows), BATCH_SIZE)
    steps = range(EPOCHS * epoch_steps)
    batches = training_batches(images_NHWC, data.labels_N, train_rows, batch_size=BATCH_SIZE, seed=0, steps=steps)
    for step, batch in enumerate(batches):
        train_step(
            network,
            optimizer,
            augment(torch.from_numpy(batch.images_NHWC).to(compute.device), "shift", seed=0, step=step),
            torch.from_numpy(batch.labels_N).to(compute.device),
            learning_rate=learning_rate_at(step, len(steps), "onecycle", LEARNING_RATE),
            label_smoothing=0.0,
            precision=compute.precision,
            seed=(0, step, 0),
        )
        if (step + 1) % epoch_steps == 0:
            validation = evaluation_batches(images_NHWC, data.labels_N, data.rows["val"], 1024)
            predict_logits(network, validation, len(data.classes), compute.device, compute.precision)
            print("epoch", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bare", metavar="DATA_DIR", help="be the other side")
    arguments = parser.parse_args()
    if arguments.bare:
        bare_loop(arguments.bare)
        return
    from tracking_server import TrackingServer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = unpacked_mnist(folder)
        server = TrackingServer(folder)
        server.start()
        try:
            train = [str(ROOT / "train.py"), "--dataset=mnist", f"--data_dir={data_dir}", f"--epochs={EPOCHS}"]
            train += [f"--batch_size={BATCH_SIZE}", f"--learning_rate={LEARNING_RATE}"]
            bare = [str(Path(__file__).resolve()), "--bare", str(data_dir)]
            pairs = []
            for number in range(PAIRS):
                ours = epoch_s(train, FOLDER=name, MLFLOW_TRACKING_URI=server.uri)
                other = epoch_s(bare, FOLDER=name)
                print(f"pair {number + 1}: ours {ours:.2f} s an epoch, other {other:.2f} s", flush=True)
                pairs.append((ours, other))
        finally:
            server.stop()
    ours_s, other_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ours / other for ours, other in pairs)
    print(f"ratio: {ratio:.2f} (ours {ours_s:.2f} s an epoch, other {other_s:.2f} s an epoch)")


if __name__ == "__main__":
    main()
