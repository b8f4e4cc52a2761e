"""MLflow's scoring protocol, as `mlflow models serve` speaks it for a model with a tensor signature. Pure functions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import orjson

from serving import RequestError
from serving.inference_protocol import INPUT, OUTPUT
from serving.model import ServedModel
from serving.tensors import images_of_lists, images_of_text, json_object

CONTENT_TYPE = "application/json"

_PLAIN = re.compile(rb'\s*{\s*"(?:inputs|instances)"\s*:(.*)}\s*', re.DOTALL)
"""Nothing but one of the keys: what nearly everyone sends."""


def parse(body: bytes, content_type: str, model: ServedModel) -> np.ndarray:
    """uint8 images_NHWC of a request with `inputs` (all images of the tensor) or `instances` (image by image)."""
    if content_type.partition(";")[0].strip().lower() != CONTENT_TYPE:
        raise RequestError(f"expected Content-Type {CONTENT_TYPE}: the model takes a tensor, no table", 415)
    plain = _PLAIN.fullmatch(body)
    if plain and (images_NHWC := images_of_text(plain[1], model.image_shape)) is not None:
        return images_NHWC
    message = json_object(body)
    given = message.keys() - {"params"}
    if given not in ({"inputs"}, {"instances"}):
        raise RequestError("expected one of the keys inputs and instances: the model takes a tensor, no table")
    (key,) = given
    data: Any = message[key]
    if isinstance(data, dict):
        data = data.get(INPUT) if data.keys() == {INPUT} else None
    elif key == "instances" and isinstance(data, list) and all(isinstance(row, dict) for row in data):
        data = [row.get(INPUT) for row in data]
    return images_of_lists(data, model.image_shape, key)


def render(logits_NK: np.ndarray, ids: list[str]) -> bytes:
    """The response's body; MLflow's clients pass over the ids."""
    message: dict[str, Any] = {"predictions": {OUTPUT: logits_NK}}
    if ids:
        message["ids"] = ids
    return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)


def render_error(message: str) -> dict[str, str]:
    """A refusal as MLflow's clients read it."""
    return {"error_code": "BAD_REQUEST", "message": message}
