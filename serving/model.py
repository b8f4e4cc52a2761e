"""The model that is served, and the change to another version while requests come in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

log = logging.getLogger("uvicorn.error")

Logits = Callable[[np.ndarray], np.ndarray]
"""uint8 images_NHWC -> float32 logits_NK, from any thread."""


Outputs = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""The same with the embeddings: uint8 images_NHWC -> float32 logits_NK, embeddings_NE."""


class Distances(Protocol):
    """How far embeddings are from those that the model was tested on."""

    threshold: float
    """Above it an image is far."""

    def to(self, embeddings_NE: np.ndarray) -> np.ndarray:
        """float32 distances_N."""


@dataclass(frozen=True)
class ServedModel:
    """One version of a classifier, ready to predict."""

    name: str
    version: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    logits: Logits
    outputs: Outputs | None = None
    """Asked instead of `logits` where there is a prediction log."""
    distances: Distances | None = None
    """None where no reference is known."""

    def predict(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """logits_NK and embeddings_NE, the latter of length 0 where nobody asks for them."""
        if self.outputs:
            return self.outputs(images_NHWC)
        return self.logits(images_NHWC), np.empty((len(images_NHWC), 0), np.float32)

    def checked(self) -> ServedModel:
        """The model itself, after a first prediction that also warms it up; ValueError if that is no prediction."""
        logits_NK, embeddings_NE = self.predict(np.zeros((1, *self.image_shape), np.uint8))
        if self.distances:
            self.distances.to(embeddings_NE)
        if logits_NK.shape != (1, len(self.classes)) or not np.isfinite(logits_NK).all():
            raise ValueError(f"version {self.version} of {self.name} gives no finite logit for each of its classes")
        return self


class ModelSource(Protocol):
    """Where versions come from. Both methods block, and raise what explains itself in one line."""

    def latest(self) -> str:
        """The version that is to be served now."""

    def load(self, version: str) -> ServedModel:
        """That version, ready."""


def probabilities(logits_NK: np.ndarray) -> np.ndarray:
    """Softmax over the classes, in float64."""
    shares_NK = np.exp(logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True))
    return np.asarray(shares_NK / shares_NK.sum(axis=1, keepdims=True))


async def follow(
    source: ModelSource,
    current: Callable[[], ServedModel],
    change: Callable[[ServedModel], None],
    failed: Callable[[], None],
    every_s: float,
) -> None:
    """Look every `every_s` seconds which version is to be served; `change` to it once it is loaded and has predicted.

    Until then, and when that fails, the present one goes on serving; `failed` is called. A version that is bad by
    itself (ValueError, or an error with an `exit_code` of 2) is not tried again.
    """
    refused = ""
    while True:
        version = ""
        try:
            version = await asyncio.to_thread(source.latest)
            if version not in (current().version, refused):
                change((await asyncio.to_thread(source.load, version)).checked())
                log.info("now serving version %s", version)
        except Exception as error:
            failed()
            if version and (isinstance(error, ValueError) or getattr(error, "exit_code", 0) == 2):
                refused = version
            what = f"version {version} does not load" if version else "cannot look up the version to serve"
            log.warning("%s: %s; version %s goes on", what, error, current().version)
        await asyncio.sleep(every_s)
