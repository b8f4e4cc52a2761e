"""The service as one ASGI application: routes, and what each does between its protocol and the batcher."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from serving import RequestError, feedback, inference_protocol, scoring_protocol
from serving.batching import Batcher
from serving.http import JSON, Endpoint, Limits, Shortcuts, header
from serving.ids import new_ids
from serving.images import Decoder, Upload, read_uploads
from serving.metrics import Metrics, forget_dead_workers
from serving.model import ModelSource, ServedModel, follow, probabilities
from serving.page import CONTENT_SECURITY_POLICY, PAGE
from serving.prediction_log import Answered, Place, PredictionLog, Rules

DECODING_THREADS = 2
"""Image files decoded at a time in each worker: one may take as much memory as 90 million pixels."""


@dataclass(frozen=True)
class Options:
    """How requests are batched and limited."""

    max_batch: int = 64
    max_delay_us: int = 100
    max_queue: int = 1024
    threads: int = 1
    """Threads that predict, of this worker."""
    poll_s: float = 0
    """Seconds between two looks for another version; 0: the first one stays."""
    limits: Limits = field(default_factory=Limits)
    rules: Rules = field(default_factory=Rules)
    """Which images the prediction log keeps."""


class Service:
    """The state of one worker: the model that is served now, the batcher, the counters."""

    def __init__(self, model: ServedModel, decode: Decoder, options: Options, place: Place | None) -> None:
        self.model = model
        self.metrics = Metrics()
        self._decode, self._options, self._place = decode, options, place
        self._batcher: Batcher
        self._decoders: ThreadPoolExecutor
        self._log: PredictionLog | None = None

    @contextlib.asynccontextmanager
    async def running(self, source: ModelSource | None) -> AsyncIterator[None]:
        """Ready for requests within the block; follows `source` to other versions."""
        o = self._options
        self._batcher = Batcher(
            max_batch=o.max_batch,
            max_delay_us=o.max_delay_us,
            max_queue=o.max_queue,
            threads=o.threads,
            observe=self.metrics.batch,
        )
        self._decoders = ThreadPoolExecutor(DECODING_THREADS, "decode")
        forget_dead_workers()
        if self._place:
            self._log = PredictionLog(self._place, o.rules, self.metrics)
        # What is loaded stays. Looking through it for garbage took 82 ms, in which nobody is answered.
        gc.collect()
        gc.freeze()
        self.metrics.serves(self.model)
        self.metrics.limit.set(o.max_queue)
        following = None
        if source and o.poll_s:
            failed = self.metrics.failed_changes.inc
            following = asyncio.create_task(follow(source, lambda: self.model, self._change, failed, o.poll_s))
        yield
        if following:
            following.cancel()
        self._batcher.close()
        self._decoders.shutdown()
        if self._log:
            self._log.close()

    def _change(self, model: ServedModel) -> None:
        """From here on new requests get `model`; those under way keep the one they were read for."""
        self.metrics.serves(model, self.model)
        self.model = model

    async def _predict(
        self, model: ServedModel, images_NHWC: np.ndarray, started_s: float, name_all: bool = False
    ) -> tuple[np.ndarray, list[str]]:
        """logits_NK, and the ids of the predictions where they are logged or the answer is to have them in any case."""
        try:
            logits_NK, embeddings_NE = await self._batcher.predict(model, images_NHWC)
        finally:
            self.metrics.waiting.set(self._batcher.images)
        ids = new_ids(logits_NK.argmax(axis=1)) if self._log or name_all else []
        if self._log:
            latency_ms = (time.perf_counter() - started_s) * 1e3
            self._log.add(Answered(ids, time.time(), latency_ms, model, images_NHWC, logits_NK, embeddings_NE))
        return logits_NK, ids

    # The protocols.

    async def infer(self, request: Request, body: bytes) -> Response:
        """Open Inference Protocol v2."""
        started_s, model = time.perf_counter(), self._named(request)
        length = header(request.scope, inference_protocol.JSON_LENGTH.encode()).decode("latin-1")
        inference = inference_protocol.parse(body, length, model)
        logits_NK, ids = await self._predict(model, inference.images_NHWC, started_s)
        content, json_bytes = inference_protocol.render(model, inference, logits_NK, ids)
        if json_bytes is None:
            return Response(content, media_type=JSON)
        headers = {inference_protocol.JSON_LENGTH: str(json_bytes)}
        return Response(content, headers=headers, media_type="application/octet-stream")

    async def invocations(self, request: Request, body: bytes) -> Response:
        """MLflow's scoring protocol."""
        started_s, model = time.perf_counter(), self.model
        images_NHWC = scoring_protocol.parse(body, header(request.scope, b"content-type").decode("latin-1"), model)
        return Response(scoring_protocol.render(*await self._predict(model, images_NHWC, started_s)), media_type=JSON)

    async def predict_files(self, request: Request, body: bytes) -> Response:
        """Image files -> their classes; a file that cannot be read has its reason instead."""
        started_s, model, loop = time.perf_counter(), self.model, asyncio.get_running_loop()
        uploads = await read_uploads(request, body)
        images = await asyncio.gather(
            *[loop.run_in_executor(self._decoders, self._decoded, upload, model) for upload in uploads]
        )
        good = [image for image in images if isinstance(image, np.ndarray)]
        self.metrics.bad_inputs.labels("predict").inc(len(images) - len(good))
        predicted: Iterator[tuple[str, list[float]]] = iter(())
        if good:
            logits_NK, ids = await self._predict(model, np.stack(good), started_s, name_all=True)
            predicted = iter(zip(ids, probabilities(logits_NK).tolist(), strict=True))
        rows = [
            {"file": upload.name, **({"error": image} if isinstance(image, str) else _ranking(model, *next(predicted)))}
            for upload, image in zip(uploads, images, strict=True)
        ]
        return _json({"model": model.name, "version": model.version, "predictions": rows}, 200 if good else 400)

    async def feedback(self, request: Request, body: bytes) -> Response:
        """The true classes of earlier predictions, and what these were worth."""
        entries = feedback.parse(body, self.model.classes)
        for entry in entries:
            self.metrics.feedback(entry.label, entry.correct, entry.value)
        if self._log:
            self._log.add_feedback(entries, time.time())
        return _json({"accepted": len(entries)})

    def _decoded(self, upload: Upload, model: ServedModel) -> np.ndarray | str:
        """Pixels, or why there are none."""
        try:
            return self._decode(upload.data, *model.image_shape)
        except Exception as error:
            if not hasattr(error, "exit_code"):  # not meant for people: a bug
                raise
            return str(error)

    # What the service says of itself.

    async def live(self, request: Request, body: bytes) -> Response:
        """The process answers; a worker starts to listen once its model is loaded."""
        return Response(b"\n" if request.url.path in ("/ping", "/health") else b"", media_type=JSON)

    async def mlflow_version(self, request: Request, body: bytes) -> Response:
        """The version of MLflow that the model's environment holds."""
        return Response(version("mlflow"), media_type=JSON)

    async def server_metadata(self, request: Request, body: bytes) -> Response:
        """Name and extensions of the server."""
        return _json(inference_protocol.SERVER)

    async def model_ready(self, request: Request, body: bytes) -> Response:
        """Whether the named model (and version) is the one that is served."""
        self._named(request)
        return Response()

    async def model_metadata(self, request: Request, body: bytes) -> Response:
        """Inputs and outputs."""
        return _json(inference_protocol.metadata(self._named(request)))

    async def model_config(self, request: Request, body: bytes) -> Response:
        """The same as a Triton configuration."""
        return _json(inference_protocol.config(self._named(request), self._options.max_batch))

    async def exposition(self, request: Request, body: bytes) -> Response:
        """Prometheus' text format."""
        if self._log:
            self._log.observe()
        return Response(self.metrics.exposition(self._batcher.images), media_type=CONTENT_TYPE_LATEST)

    async def page(self, request: Request, body: bytes) -> Response:
        """The page on which a person draws or drops an image."""
        headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff"}
        return Response(PAGE, headers=headers, media_type="text/html")

    async def nowhere(self, request: Request, body: bytes) -> Response:
        """Every other path."""
        raise RequestError("there is nothing here; look at /, /predict, /invocations, /v2, /feedback and /metrics", 404)

    def _named(self, request: Request) -> ServedModel:
        model, wanted = self.model, request.path_params
        if wanted["model"] != model.name or wanted.get("version", model.version) != model.version:
            raise RequestError(f"there is no such model; this service has '{model.name}', version {model.version}", 404)
        return model


def application(
    model: ServedModel,
    decode: Decoder,
    options: Options,
    source: ModelSource | None = None,
    place: Place | None = None,
) -> Router:
    """The ASGI application that serves `model`, and later versions from `source`, and logs to `place`."""
    service = Service(model, decode, options, place)

    def route(path: str, handler: Callable[..., Any], name: str, method: str = "GET", **others: Any) -> Route:
        endpoint = Endpoint(name, handler, options.limits, service.metrics, **others)
        return Route(path, endpoint, methods=[method], name=name)

    mlflow_error = scoring_protocol.render_error
    routes = [route("/invocations", service.invocations, "invocations", "POST", error_body=mlflow_error)]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            route(f"{prefix}/infer", service.infer, "infer", "POST"),
            route(f"{prefix}/ready", service.model_ready, "model"),
            route(f"{prefix}/config", service.model_config, "model"),
            route(prefix, service.model_metadata, "model"),
        ]
    routes += [
        route("/predict", service.predict_files, "predict", "POST"),
        route("/feedback", service.feedback, "feedback", "POST"),
        route("/", service.page, "page", public=True),
        route("/metrics", service.exposition, "metrics"),
        route("/version", service.mlflow_version, "health", public=True),
        route("/v2", service.server_metadata, "health", public=True),
        *[
            route(path, service.live, "health", public=True)
            for path in ("/v2/health/live", "/v2/health/ready", "/ping", "/health")
        ],
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Router) -> AsyncIterator[None]:
        async with service.running(source):
            yield

    nowhere = Endpoint("other", service.nowhere, options.limits, service.metrics, public=True)
    # Most requests go to one path. To find it among the patterns took a twentieth of such a request.
    infer = next(one for one in routes if one.name == "infer")
    shortcuts = {("POST", f"/v2/models/{model.name}/infer"): (infer.app, {"model": model.name})}
    return Shortcuts(shortcuts, routes, redirect_slashes=False, default=nowhere, lifespan=lifespan)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type=JSON)


def _ranking(model: ServedModel, prediction_id: str, shares_K: list[float]) -> dict[str, Any]:
    """The id, and the classes with their probabilities, the most probable first."""
    pairs = sorted(zip(model.classes, shares_K, strict=True), key=lambda pair: -pair[1])
    ranking = [{"class": name, "probability": share} for name, share in pairs]
    return {"id": prediction_id, **ranking[0], "ranking": ranking}
