"""Our epoch on MNIST with tracking to a real server, checkpoints and progress, against the bare compute loop.

The bare loop has the same network, batches, augmentation, precision and validation pass, all images in memory, and logs
nothing. Both sides are processes of their own; the time between their "epoch" lines counts, so that start-up does not.
They take turns of a quarter of a second, each standing still in the other's: a shared machine changes its speed within
seconds by more than what is measured here. The median of the epochs' ratios counts. Goal: at most 1.05.

Needs MNIST_ROOT, a folder with MNIST in torchvision's layout (MNIST/raw).
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from time_to_accuracy import ROOT, unpacked_mnist

sys.path.insert(0, str(ROOT / "tests"))

EPOCHS, BATCH_SIZE, LEARNING_RATE, TURN_S, START_S = 10, 256, 0.01, 0.25, 120


class Side:
    """A training in a process of its own that moves only in its turns, and stands still after its last epoch."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        self.ends_s: list[float] = []
        """When each epoch ended, in seconds of the side's own turns."""
        self._moved_s = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-u", *command],
            # As utils.runtime.launch sets it, which the bare loop does not pass through.
            env={**os.environ, "GOMP_SPINCOUNT": "3000", **environment},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def move(self, seconds: float, epochs: int = EPOCHS) -> bool:
        """Go on for so long, at most to the end of so many epochs; gives whether these are done."""
        assert self._process.stdout is not None
        start = time.perf_counter()
        end = start + seconds
        self._process.send_signal(signal.SIGCONT)
        while len(self.ends_s) < epochs and self._writes_within(end - time.perf_counter()):
            written = os.read(self._process.stdout.fileno(), 2**16)
            if not written:
                raise SystemExit(f"error: {self._process.args} failed")
            if b"epoch" in written:
                self.ends_s.append(self._moved_s + time.perf_counter() - start)
        self._process.send_signal(signal.SIGSTOP)
        self._moved_s += time.perf_counter() - start
        return len(self.ends_s) >= epochs

    def _writes_within(self, seconds: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], max(0, seconds))[0])

    def epochs_s(self) -> list[float]:
        """Seconds of each epoch after the first."""
        return [end - begin for begin, end in pairwise(self.ends_s)]


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
    from utils.compute import Compute, keep_freed_memory, make_deterministic

    make_deterministic()
    keep_freed_memory()
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
            with Side(train, folder, MLFLOW_TRACKING_URI=server.uri) as ours, Side(bare, folder) as other:
                for side in (ours, other):
                    side.move(START_S, epochs=1)
                while not ours.move(TURN_S) | other.move(TURN_S):
                    pass
                ours.move(START_S)
                other.move(START_S)
        finally:
            server.stop()
    pairs = list(zip(ours.epochs_s(), other.epochs_s(), strict=True))
    for number, (ours_s, other_s) in enumerate(pairs, start=2):
        print(f"epoch {number}: ours {ours_s:.2f} s, other {other_s:.2f} s")
    ours_s, other_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ours / other for ours, other in pairs)
    print(f"ratio: {ratio:.2f} (ours {ours_s:.2f} s an epoch, other {other_s:.2f} s an epoch)")


if __name__ == "__main__":
    main()
