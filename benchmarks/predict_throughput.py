"""Images a second of our prediction against mlflow.pyfunc and against ONNX Runtime, on the same model and images.

    python benchmarks/predict_throughput.py

One process, pairs measured in turns, medians. Three comparisons:

- arrays, mlflow.pyfunc: `predict` on the whole array in one call, as its documentation shows it, against
  `OnnxClassifier.logits` on the same array;
- arrays, ONNX Runtime: a session with its default threads fed batches of 256, against the same;
- PNG files, mlflow.pyfunc: decode one file after the other with Pillow, stack, `predict`, against our stream.

The last line is the first comparison. Both sides end in the same kernels of ONNX Runtime, so what can be won on
arrays is the waiting of threads for each other and the traffic of whole-array feature maps through memory. Decoding a
small PNG is nine tenths Python inside Pillow, one thread at a time: threads win there only where files are large.
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
IMAGES, FILES, REPEATS, BATCH = 10_000, 4_000, 9, 256
PYFUNC_GOAL, ONNX_RUNTIME_GOAL = 5.0, 0.85


def main() -> None:
    """Make a model and images, run the three comparisons, print the ratios."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images_NHWC = np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE), np.uint8)
        model, pyfunc_model = make_model(folder)
        ours = OnnxClassifier(model)
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])

        def session_batches() -> None:
            for start in range(0, IMAGES, BATCH):
                session.run(None, {"images": images_NHWC[start : start + BATCH]})

        pyfunc = compare(lambda: ours.logits(images_NHWC), lambda: pyfunc_model.predict(images_NHWC), IMAGES)
        runtime = compare(lambda: ours.logits(images_NHWC), session_batches, IMAGES)
        write_files(images_NHWC[:FILES], folder / "images")

        def our_files() -> None:
            for batch in read_batches(str(folder / "images"), SHAPE, BATCH):
                ours.logits(batch.images_NHWC)

        def pyfunc_files() -> None:
            files = sorted((folder / "images").glob("*.png"))
            pixels = [np.asarray(Image.open(file))[:, :, None] for file in files]
            pyfunc_model.predict(np.stack(pixels))

        png = compare(our_files, pyfunc_files, FILES)
    show("arrays, against ONNX Runtime", runtime, f"goal {ONNX_RUNTIME_GOAL}")
    show("PNG files, against mlflow.pyfunc", png, f"goal {PYFUNC_GOAL}")
    show("arrays, against mlflow.pyfunc", pyfunc, f"goal {PYFUNC_GOAL}")
    print(f"ratio: {pyfunc[0] / pyfunc[1]:.2f} (ours {pyfunc[0]:.0f} images/s, other {pyfunc[1]:.0f} images/s)")


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


def compare(ours: Callable[[], object], other: Callable[[], object], images: int) -> tuple[float, float]:
    """Images a second of both, measured in turns after a warm-up; medians."""
    ours(), other()
    seconds: dict[Callable[[], object], list[float]] = {ours: [], other: []}
    for _ in range(REPEATS):
        for side in (ours, other):
            started = time.perf_counter()
            side()
            seconds[side].append(time.perf_counter() - started)
    return images / statistics.median(seconds[ours]), images / statistics.median(seconds[other])


def show(what: str, rates: tuple[float, float], goal: str) -> None:
    """One comparison as a line."""
    print(f"{what}: {rates[0] / rates[1]:.2f} (ours {rates[0]:.0f} images/s, other {rates[1]:.0f} images/s; {goal})")


if __name__ == "__main__":
    main()
