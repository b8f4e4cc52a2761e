"""Serve a model over HTTP: model, decoder, service. ONNX Runtime, no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from utils.model_versions import Fetched, ModelVersions
from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from starlette.routing import Router

    from serving.model import ServedModel
    from serving.prediction_log import Place


@dataclass(frozen=True)
class Settings:
    """Serve a model over HTTP; a token in the environment variable SERVING_TOKEN is then asked of every client."""

    model_uri: str = setting(
        REQUIRED, "models:/NAME@ALIAS (followed when it moves), models:/NAME/VERSION, runs:/RUN_ID/model or a path"
    )
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = setting(8080, "port to listen on", minimum=1, maximum=65535)
    workers: int = setting(1, "processes that serve", minimum=1)
    threads: int = setting(1, "threads that predict in each process", minimum=1)
    max_batch: int = setting(64, "most images that go through the network together", minimum=1)
    max_delay_us: int = setting(100, "microseconds that a request waits for others to share a batch", minimum=0)
    max_queue: int = setting(1024, "images that may wait; more requests get 503", minimum=1)
    max_body_mb: int = setting(16, "largest request in MiB", minimum=1)
    timeout_s: float = setting(
        30.0, "seconds until a request is given up, and that a stop waits for requests", minimum=0.001
    )
    poll_s: float = setting(10.0, "seconds between two looks at where an alias points", minimum=0.1)
    log: str = setting("", "prediction log: a folder or s3://bucket/prefix; empty: none")
    keep_images: bool = setting(True, "whether the log may keep images; false: none")
    keep_share: float = setting(0.01, "share of the images that is kept by chance", minimum=0, maximum=1)
    keep_below: float = setting(0.6, "keep images predicted with less confidence than this", minimum=0, maximum=1)
    keep_mb: int = setting(1024, "most MiB of kept images in the log", minimum=0)


def main(settings: Settings) -> None:
    """Settings, model, service until it is stopped."""
    from serving.server import serve
    from utils.artifacts import PATIENCE
    from utils.tracking import introduce_run

    for name, value in PATIENCE.items():  # a server that is away is told of after seconds, and asked again later
        os.environ.setdefault(name, value)
    source = Source(settings)
    with TemporaryDirectory() as folder:
        log_place(settings, begins=True)
        version = source.latest()
        fetched = source.fetch(version, Path(folder))
        source.ready(version, fetched)  # a model that does not load is told here, in one line
        introduce_run(settings, "serve", about=("serve", settings.model_uri), tags={"model_version": version})
        print(f"serving {source.name}, version {version}, on http://{settings.host}:{settings.port}", flush=True)
        serve(
            partial(application, settings, version, fetched),
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            drain_s=settings.timeout_s,
        )


def application(settings: Settings, version: str, fetched: Fetched) -> Router:
    """The ASGI application of one worker, which starts with the model that is fetched already."""
    from data_loader.images import decode_image
    from serving import app
    from serving.http import Limits
    from serving.prediction_log import Rules

    source = Source(settings)
    options = app.Options(
        max_batch=settings.max_batch,
        max_delay_us=settings.max_delay_us,
        max_queue=settings.max_queue,
        threads=settings.threads,
        poll_s=settings.poll_s,
        limits=Limits(settings.max_body_mb * 2**20, settings.timeout_s, os.environ.get("SERVING_TOKEN", "")),
        rules=Rules(settings.keep_images, settings.keep_share, settings.keep_below),
    )
    model = source.ready(version, fetched)
    return app.application(model, decode_image, options, source if source.alias else None, log_place(settings))


def log_place(settings: Settings, *, begins: bool = False) -> Place | None:
    """Where the log lies and how images are described and written there; None without a log.

    Who `begins` the log sees that it can be written, and how much room its images leave.
    """
    if not settings.log:
        return None
    from data_loader.images import encode_png
    from data_loader.statistics import STATISTICS, image_statistics
    from data_loader.store import check_store, store_to_write
    from serving.prediction_log import IMAGES, Place
    from serving.room import Room

    store = store_to_write(settings.log)
    room = Room(store.spool, settings.keep_mb * 2**20)
    if begins:
        check_store(store, settings.log)
        if settings.keep_images:
            room.watch(partial(store.size, IMAGES))
    return Place(store.spool, store.put, image_statistics, STATISTICS, encode_png, room.take)


class Source(ModelVersions):
    """The versions behind the setting `model_uri`, ready to serve."""

    def __init__(self, settings: Settings) -> None:
        """Logged predictions need more of a model: its embeddings, and the reference that training left."""
        from monitoring.reference import REFERENCE

        self.logged = bool(settings.log)
        reference = REFERENCE if self.logged else ""
        without = "no reference, so no image is told to be far from it"
        super().__init__(settings.model_uri, beside=reference, without=without)

    def load(self, version: str) -> ServedModel:
        """A version, fetched and ready."""
        from pathlib import Path
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            return self.ready(version, self.fetch(version, Path(folder)))

    def ready(self, version: str, fetched: Fetched) -> ServedModel:
        """A fetched model, loaded; every prediction runs in the one thread that asks for it."""
        from models.onnx_model import OnnxClassifier
        from monitoring.distance import read_distances
        from serving.model import ServedModel

        classifier = OnnxClassifier(fetched.model, threads=1)
        return ServedModel(
            self.name,
            version,
            classifier.classes,
            classifier.image_shape,
            classifier.logits,
            classifier.outputs if self.logged else None,
            read_distances(fetched.beside) if fetched.beside else None,
        ).checked()


if __name__ == "__main__":
    launch(main, Settings)
