"""A prediction server seen from outside: Open Inference Protocol v2 over HTTP or gRPC, spoken by tritonclient.

Our own service and Triton both answer. What the model takes and gives, and under which names, is asked of the server.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

ADDRESS = re.compile(r"(?:(https?)://)?((?:[\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5}))/?")
REFUSED = ("401", "403", "StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED")
ABSENT = ("404", "StatusCode.NOT_FOUND")
AWAY = ("StatusCode.UNAVAILABLE",)
LATE = ("499", "504", "StatusCode.DEADLINE_EXCEEDED")
WRONG = ("400", "413", "StatusCode.INVALID_ARGUMENT")


class RemoteError(Exception):
    """A server that does not do what it was asked for; one line. `exit_code` is 2 where the asking was wrong."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


@dataclass(frozen=True)
class RemoteModel:
    """What a server says of a classifier."""

    name: str
    version: str
    """The version that is asked for; empty: whichever the server chooses."""
    input: str
    output: str
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    classes: int


class Remote:
    """A connection to a server, for one thread."""

    def __init__(self, url: str, protocol: str, token: str = "", timeout_s: float = 30) -> None:
        """`url` is HOST:PORT, perhaps with http:// or https:// before it (for gRPC too: with TLS or without)."""
        self.url, self._protocol, self._token = url, protocol, token
        parts = ADDRESS.fullmatch(url)
        if not parts or int(parts[3]) > 65535:
            raise RemoteError(f"url is '{url}'; allowed: HOST:PORT, http://HOST:PORT and https://HOST:PORT", 2)
        scheme, address = parts[1], parts[2]
        self._api: Any = importlib.import_module(f"tritonclient.{protocol}")
        options: dict[str, Any] = {"ssl": scheme == "https"}
        self._each: dict[str, Any] = {"headers": {"authorization": f"Bearer {token}"} if token else None}
        if protocol == "http":
            options |= {"connection_timeout": timeout_s, "network_timeout": timeout_s}
            options["ssl_context_factory"] = importlib.import_module("gevent.ssl").create_default_context
        else:
            self._each["client_timeout"] = timeout_s
        self._client = self._api.InferenceServerClient(address, **options)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def model(self, name: str, version: str = "") -> RemoteModel:
        """What the server says of a model: one input of uint8 images, one output of logits."""
        try:
            as_json = {"as_json": True} if self._protocol == "grpc" else {}
            found = self._client.get_model_metadata(name, version, **self._each, **as_json)
        except Exception as error:
            self._explain(error, f"model '{name}'" + (f", version {version}" if version else ""))
        try:
            (taken,), (given,) = found["inputs"], found["outputs"]
            shape, logits_shape = [int(n) for n in taken["shape"]], [int(n) for n in given["shape"]]
            (_, height, width, channels), (_, classes) = shape, logits_shape
            types = taken["datatype"], given["datatype"]
        except (KeyError, TypeError, ValueError):
            types, shape = ("", ""), []
        if types != ("UINT8", "FP32") or min(shape[1:]) < 1:
            says = {end: found.get(end) for end in ("inputs", "outputs")} if isinstance(found, dict) else found
            raise RemoteError(
                f"model '{name}' at {self.url} is no image classifier of this project: it says {says}; needed: an "
                "input UINT8 [-1, height, width, channels] and an output FP32 [-1, classes]",
                2,
            )
        return RemoteModel(name, version, taken["name"], given["name"], (height, width, channels), classes)

    def infer(self, model: RemoteModel, images_NHWC: np.ndarray) -> tuple[np.ndarray, str]:
        """uint8 images -> float32 logits_NK, and the version that made them."""
        tensor = self._api.InferInput(model.input, list(images_NHWC.shape), "UINT8")
        tensor.set_data_from_numpy(images_NHWC)
        wanted = [self._api.InferRequestedOutput(model.output)]
        try:
            result = self._client.infer(model.name, [tensor], model.version, wanted, **self._each)
            said, logits_NK = result.get_response(), result.as_numpy(model.output)
        except Exception as error:
            self._explain(error, f"model '{model.name}'")
        if logits_NK is None or logits_NK.shape != (len(images_NHWC), model.classes):
            shape = "nothing" if logits_NK is None else f"{model.output} {list(logits_NK.shape)}"
            raise RemoteError(f"{self.url} answered {len(images_NHWC)} images of {model.classes} classes with {shape}")
        return logits_NK, str(said.get("model_version", "") if isinstance(said, dict) else said.model_version)

    def _explain(self, error: Exception, what: str) -> NoReturn:
        status = str(getattr(error, "status", lambda: None)())
        message = getattr(error, "message", lambda: str(error))() or type(error).__name__
        if isinstance(error, TimeoutError) or status in LATE:
            raise RemoteError(f"{self.url} did not answer in time: {message}") from error
        if isinstance(error, OSError) or status in AWAY:
            raise RemoteError(
                f"no server answers at {self.url} ({self._protocol}): {message}; start it, or check url and protocol"
            ) from error
        if status in REFUSED:
            given = "refuses the token in" if self._token else "asks for a token; put it into"
            raise RemoteError(f"{self.url} {given} the environment variable SERVING_TOKEN: {message}", 2) from error
        if status in ABSENT:
            raise RemoteError(
                f"{self.url} has no {what}: {message}; check model_name and model_version, and that this is the port "
                f"for {self._protocol}",
                2,
            ) from error
        if status == "None":
            raise RemoteError(
                f"what answers at {self.url} does not speak the Open Inference Protocol over {self._protocol}: "
                f"{message}; check url and protocol",
                2,
            ) from error
        code = 2 if status in WRONG else 1
        raise RemoteError(f"{self.url} refused a request for {what}: {message} ({status})", code) from error
