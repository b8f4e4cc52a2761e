"""Images a second of our prediction against mlflow.pyfunc and against ONNX Runtime, on the same model and images.

    python benchmarks/predict_throughput.py

One process, pairs measured in turns, medians. The other sides:

- ONNX Runtime: a session with its default threads, fed the arrays in batches of 256 (goal: at least 0.85);
- mlflow.pyfunc, one image a call: the loop over files or arrays that people write first (goal: at least 5);
- mlflow.pyfunc, all in one call: the whole array at once, as far as memory goes. Both sides then run the same kernels
  on full batches, and no fivefold is to be had: it is printed so that nobody expects it.

The last line is that of arrays, one image a call.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
import onnxruntime
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_loader.inputs import read_batches
from models.networks import build
from models.onnx_export import to_onnx
from models.onnx_model import OnnxClassifier
from utils.artifacts import log_onnx_model

SHAPE, CLASSES = (28, 28, 1), tuple("0123456789")
IMAGES, FILES, BATCH = 10_000, 4_000, 256
LOOP = 1_000
"""Images of the loops that predict one at a time."""
REPEATS = 9
Side = tuple[Callable[[], object], int]
"""What to run, and how many images it predicts."""


def main() -> None:
    """Make a model and images, run the comparisons, print the ratios."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images_NHWC = np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE), np.uint8)
        model, pyfunc_model = make_model(folder)
        ours = OnnxClassifier(model)
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        write_files(images_NHWC[:FILES], folder / "images")
        files = sorted((folder / "images").glob("*.png"))

        def our_arrays() -> None:
            ours.logits(images_NHWC)

        def session_batches() -> None:
            for start in range(0, IMAGES, BATCH):
                session.run(None, {"images": images_NHWC[start : start + BATCH]})

        def pyfunc_arrays() -> None:
            pyfunc_model.predict(images_NHWC)

        def pyfunc_array_by_array() -> None:
            for image_HWC in images_NHWC[:LOOP]:
                pyfunc_model.predict(image_HWC[None])

        def our_files() -> None:
            for batch in read_batches(str(folder / "images"), SHAPE, BATCH):
                ours.logits(batch.images_NHWC)

        def pyfunc_files() -> None:
            pyfunc_model.predict(np.stack([np.asarray(Image.open(file))[:, :, None] for file in files]))

        def pyfunc_file_by_file() -> None:
            for file in files[:LOOP]:
                pyfunc_model.predict(np.asarray(Image.open(file))[None, :, :, None])

        arrays, pngs = (our_arrays, IMAGES), (our_files, FILES)
        show("arrays, against ONNX Runtime alone (goal 0.85)", compare(arrays, (session_batches, IMAGES)))
        show("arrays, against mlflow.pyfunc, all in one call", compare(arrays, (pyfunc_arrays, IMAGES)))
        show("PNG files, against mlflow.pyfunc, all in one call", compare(pngs, (pyfunc_files, FILES)))
        show("PNG files, against mlflow.pyfunc, one image a call (goal 5)", compare(pngs, (pyfunc_file_by_file, LOOP)))
        show("arrays, against mlflow.pyfunc, one image a call (goal 5)", compare(arrays, (pyfunc_array_by_array, LOOP)))


def make_model(folder: Path) -> tuple[Path, mlflow.pyfunc.PyFuncModel]:
    """The default network with random weights as an ONNX file, and the same file logged and loaded by MLflow."""
    torch.manual_seed(0)
    path = folder / "model.onnx"
    to_onnx(build("cnn", SHAPE, len(CLASSES), [33.0], [78.0]), SHAPE, CLASSES, path)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("benchmark", str(folder / "artifacts")))
    with mlflow.start_run() as run:
        uri = log_onnx_model(run.info.run_id, path, np.zeros((1, *SHAPE), np.uint8))
    return path, mlflow.pyfunc.load_model(uri)


def write_files(images_NHWC: np.ndarray, folder: Path) -> None:
    """The images as PNG files in `folder`."""
    folder.mkdir()
    for number, image_HWC in enumerate(images_NHWC):
        Image.fromarray(image_HWC[:, :, 0]).save(folder / f"{number:05}.png")


def compare(ours: Side, other: Side) -> tuple[float, float, float]:
    """Medians over REPEATS turns, after a warm-up: the ratio of a pair, and each side's images a second."""
    ours[0](), other[0]()
    pairs = [(images_per_s(ours), images_per_s(other)) for _ in range(REPEATS)]
    our_rates, other_rates = zip(*pairs, strict=True)
    ratio = statistics.median(our_rate / other_rate for our_rate, other_rate in pairs)
    return ratio, statistics.median(our_rates), statistics.median(other_rates)


def images_per_s(side: Side) -> float:
    """Images a second of one run."""
    run, images = side
    started = time.perf_counter()
    run()
    return images / (time.perf_counter() - started)


def show(what: str, result: tuple[float, float, float]) -> None:
    """One comparison."""
    ratio, ours, other = result
    print(f"{what}:\nratio: {ratio:.2f} (ours {ours:.0f} images/s, other {other:.0f} images/s)", flush=True)


if __name__ == "__main__":
    main()
