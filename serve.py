"""Serve a model over HTTP: model, decoder, service. ONNX Runtime, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.routing import Router

    from serving.model import ServedModel

UNREGISTERED_NAME, ONLY_VERSION = "classifier", "1"
"""What a model that is in no registry is called."""


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


def main(settings: Settings) -> None:
    """Settings, model, service until it is stopped."""
    import os
    from functools import partial
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from serving.server import serve
    from utils.artifacts import PATIENCE

    for name, value in PATIENCE.items():  # a server that is away is told of after seconds, and asked again later
        os.environ.setdefault(name, value)
    source = Source(settings.model_uri)
    with TemporaryDirectory() as folder:
        version = source.latest()
        path = source.fetch(version, Path(folder))
        source.ready(version, path)  # a model that does not load is told here, in one line
        print(f"serving {source.name}, version {version}, on http://{settings.host}:{settings.port}", flush=True)
        serve(
            partial(application, settings, version, path),
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            drain_s=settings.timeout_s,
        )


def application(settings: Settings, version: str, path: Path) -> Router:
    """The ASGI application of one worker, which starts with the model that is at `path` already."""
    import os

    from data_loader.images import decode_image
    from serving import app
    from serving.http import Limits

    source = Source(settings.model_uri)
    options = app.Options(
        max_batch=settings.max_batch,
        max_delay_us=settings.max_delay_us,
        max_queue=settings.max_queue,
        threads=settings.threads,
        poll_s=settings.poll_s,
        limits=Limits(settings.max_body_mb * 2**20, settings.timeout_s, os.environ.get("SERVING_TOKEN", "")),
    )
    return app.application(source.ready(version, path), decode_image, options, source if source.alias else None)


class Source:
    """The versions behind a `model_uri`: one, or what an alias points to at the time."""

    def __init__(self, model_uri: str) -> None:
        self.model_uri = model_uri
        self.name, self.alias, self._version = UNREGISTERED_NAME, "", ONLY_VERSION
        registered = model_uri.removeprefix("models:/")
        if registered != model_uri and "@" in registered:
            self.name, _, self.alias = registered.rpartition("@")
        elif registered != model_uri and "/" in registered:
            self.name, _, self._version = registered.rpartition("/")

    def latest(self) -> str:
        """The version to serve now."""
        if not self.alias:
            return self._version
        from mlflow import MlflowClient

        from utils import RunFailed, UsageError
        from utils.outbox import FINAL_CODES

        try:
            return str(MlflowClient().get_model_version_by_alias(self.name, self.alias).version)
        except Exception as error:  # of MLflow, requests, the database
            kind = UsageError if getattr(error, "error_code", "") in FINAL_CODES else RunFailed
            raise kind(f"cannot look up '{self.model_uri}': {str(error).splitlines()[0]}") from error

    def fetch(self, version: str, folder: Path) -> Path:
        """The ONNX file of a version, in `folder` if it had to be downloaded."""
        from utils.artifacts import fetch_model

        return fetch_model(f"models:/{self.name}/{version}" if self.alias else self.model_uri, folder).path

    def load(self, version: str) -> ServedModel:
        """A version, fetched and ready."""
        from pathlib import Path
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            return self.ready(version, self.fetch(version, Path(folder)))

    def ready(self, version: str, path: Path) -> ServedModel:
        """The model at `path`, loaded; every prediction runs in the one thread that asks for it."""
        from models.onnx_model import OnnxClassifier
        from serving.model import ServedModel

        classifier = OnnxClassifier(path, threads=1)
        return ServedModel(self.name, version, classifier.classes, classifier.image_shape, classifier.logits).checked()


if __name__ == "__main__":
    launch(main, Settings)
