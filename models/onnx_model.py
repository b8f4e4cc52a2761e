"""Prediction with an exported network: ONNX Runtime and NumPy, no torch."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock

import numpy as np
import onnxruntime

from models import ModelError, scores

INPUT, OUTPUT, EMBEDDINGS = "images", "logits", "embeddings"

CACHE_BYTES = 2 * 1024 * 1024
"""Second-level cache of one core of a current server processor."""

FEATURES_PER_PIXEL = 64
"""Bytes of the first feature map for each byte of pixels: 16 channels of float32."""


class OnnxClassifier:
    """A network with its class names, ready to predict.

    Every core takes a slice of the images through the whole network by itself. In one call for all images,
    ONNX Runtime's own threads would wait for each other at every layer and push the result of each layer
    through main memory (benchmarks/predict_throughput.py has the numbers).
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    data_digest: str

    def __init__(self, model: Path | bytes, threads: int = 0):
        """Load `model`, a file of models.onnx_export or its bytes; `threads=0` uses every core allowed."""
        self._model, self._session = model, _open(model)
        self._detailed: tuple[onnxruntime.InferenceSession, int] | None = None
        """A session that gives embeddings too, and how long they are; once someone has asked."""
        self._opening = Lock()
        self._threads = threads or _cores()
        self._pool = ThreadPoolExecutor(self._threads)
        facts = self._session.get_modelmeta().custom_metadata_map
        try:
            self.classes = tuple(json.loads(facts["classes"]))
            height, width, channels = json.loads(facts["image_shape"])
        except (KeyError, ValueError):
            raise ModelError(
                f"{_name(model)} does not say its classes and image shape; give a model exported by this project"
            ) from None
        self.image_shape = (height, width, channels)
        self.data_digest = facts.get("data_digest", "")
        # A slice's feature maps fit the cache; where the weights do not, the maps may be as large as they,
        # so that each reading of the weights from memory serves many images.
        work_bytes = max(CACHE_BYTES, len(model) if isinstance(model, bytes) else model.stat().st_size)
        self._slice = max(1, work_bytes // (FEATURES_PER_PIXEL * height * width * channels))

    def logits(self, images_NHWC: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, C] -> float32 [N, K]; any N, also 0."""
        logits_NK = np.empty((len(images_NHWC), len(self.classes)), np.float32)
        self._run(self._session, images_NHWC, [OUTPUT], [logits_NK])
        return logits_NK

    def outputs(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, C] -> logits [N, K] and embeddings [N, E], both float32, from one run; any N, also 0.

        The embedding of an image is what the last linear layer sees of it. The first call reads the model file again.
        """
        with self._opening:
            if self._detailed is None:
                session = _open(_with_embeddings(self._model), [OUTPUT, EMBEDDINGS])
                nothing_NHWC = np.zeros((1, *self.image_shape), np.uint8)
                self._detailed = session, session.run([EMBEDDINGS], {INPUT: nothing_NHWC})[0].shape[1]
        session, length = self._detailed
        logits_NK = np.empty((len(images_NHWC), len(self.classes)), np.float32)
        embeddings_NE = np.empty((len(images_NHWC), length), np.float32)
        self._run(session, images_NHWC, [OUTPUT, EMBEDDINGS], [logits_NK, embeddings_NE])
        return logits_NK, embeddings_NE

    def _run(
        self, session: onnxruntime.InferenceSession, images_NHWC: np.ndarray, names: list[str], into: list[np.ndarray]
    ) -> None:
        """The outputs `names`, each into an array of its own."""
        if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            received = ", ".join(map(str, images_NHWC.shape))
            raise ModelError(f"the model takes uint8 images [N, {expected}], received {images_NHWC.dtype} [{received}]")
        images = len(images_NHWC)
        step = max(1, min(self._slice, -(-images // self._threads)))
        starts = range(0, images, step)
        remaining = iter(starts)

        def run_slices() -> None:
            """All threads draw from what remains; when one fails, nothing remains for the others."""
            try:
                for start in remaining:
                    rows = slice(start, start + step)
                    for whole, part in zip(into, session.run(names, {INPUT: images_NHWC[rows]}), strict=True):
                        whole[rows] = part
            except BaseException:
                deque(remaining, maxlen=0)
                raise

        helpers = [self._pool.submit(run_slices) for _ in range(min(self._threads, len(starts)) - 1)]
        try:
            run_slices()
        finally:
            # A helper that has not started is behind another call's and has nothing left to do.
            started = [helper for helper in helpers if not helper.cancel()]
            wait(started)
        for helper in started:
            helper.result()

    def logits_of(self, images_NHWC: np.ndarray, rows_N: np.ndarray, batch_size: int = 1024) -> np.ndarray:
        """logits_NK of some rows of a memory map, read batch by batch; a terminal shows how far it is."""
        return np.concatenate([self.logits(images_NHWC[rows]) for _, rows in _batches(rows_N, batch_size)])

    def outputs_of(
        self, images_NHWC: np.ndarray, rows_N: np.ndarray, chosen_M: np.ndarray, batch_size: int = 1024
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `logits_of`, and embeddings_ME of the images at rows_N[chosen_M]; `chosen_M` is in ascending order."""
        logits, embeddings = [], []
        for start, rows in _batches(rows_N, batch_size):
            logits_BK, embeddings_BE = self.outputs(images_NHWC[rows])
            first, end = np.searchsorted(chosen_M, (start, start + len(rows)))
            logits.append(logits_BK)
            embeddings.append(embeddings_BE[chosen_M[first:end] - start])
        return np.concatenate(logits), np.concatenate(embeddings)

    def probabilities(self, images_NHWC: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, C] -> float64 [N, K]; every row sums to one."""
        return scores.probabilities(self.logits(images_NHWC))


def _batches(rows_N: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Where each batch starts, and its rows; a terminal shows how far it is."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(rows_N), batch_size), unit="batch", desc="predicting", disable=None, leave=False):
        yield start, rows_N[start : start + batch_size]


def _cores() -> int:
    """Cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(model: Path | bytes, outputs: Sequence[str] = (OUTPUT,)) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # Calls run side by side; see OnnxClassifier.
    options.log_severity_level = 3
    if isinstance(model, Path) and not model.is_file():
        raise ModelError(f"there is no model file {model}")
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class.
        raise ModelError(f"{_name(model)} is not a readable ONNX model: {str(error).splitlines()[0]}") from error
    ends = [end.name for end in (*session.get_inputs(), *session.get_outputs())]
    if ends != [INPUT, *outputs]:
        raise ModelError(
            f"{_name(model)} has the inputs and outputs {', '.join(ends)}; expected {', '.join([INPUT, *outputs])}: "
            "give a model exported by this project"
        )
    return session


def _with_embeddings(model: Path | bytes) -> bytes:
    """The model with one output more: what its last linear layer takes, whatever that is called in the graph.

    From the logits back, through the rounding of an int8 network, the first matrix product is that layer.
    """
    import onnx  # 0.1 s, which plain predictions do not need

    described = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    makers = {name: node for node in described.graph.node for name in node.output}
    node = makers[OUTPUT]
    while node.op_type not in ("Gemm", "MatMul"):
        if node.input[0] not in makers:
            raise ModelError(f"{_name(model)} does not end with a linear layer; give a model exported by this project")
        node = makers[node.input[0]]
    described.graph.node.append(onnx.helper.make_node("Identity", [node.input[0]], [EMBEDDINGS]))
    described.graph.output.append(onnx.helper.make_tensor_value_info(EMBEDDINGS, onnx.TensorProto.FLOAT, None))
    return bytes(described.SerializeToString())


def _name(model: Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else str(model)
