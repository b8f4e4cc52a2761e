"""Run a split through a prediction server, ours or Triton: accuracy, throughput, latencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime import launch
from utils.settings import setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from data_loader.dataset import Dataset
    from serving.load import Measured
    from serving.remote import RemoteModel
    from utils.tracking import Run


@dataclass(frozen=True)
class Settings:
    """Measure a prediction server on a split; it is shown the environment variable SERVING_TOKEN, if there is one."""

    url: str = setting("127.0.0.1:8080", "HOST:PORT of the server; https://HOST:PORT for TLS")
    protocol: str = setting("http", "Open Inference Protocol over", choices=("http", "grpc"))
    model_name: str = setting("classifier", "name of the model on the server")
    model_version: str = setting("", "its version; empty: the one that the server chooses")
    dataset: str = setting("digits", "data set, as for training: with the model's classes in the model's order")
    data_version: str = setting("", "as for training")
    data_repo: str = setting("", "as for training")
    data_dir: str = setting("data", "folder for downloads and decoded images")
    on_error: str = setting("fail", "what a bad image file does", choices=("fail", "skip"))
    split: str = setting("test", "images to send", choices=("train", "val", "test"))
    batch_size: int = setting(1, "images in a request", minimum=1)
    concurrency: int = setting(8, "connections, each with one request under way", minimum=1, maximum=1024)
    passes: int = setting(1, "times that the split is sent", minimum=1)
    timeout_s: float = setting(30.0, "seconds until a request is given up", minimum=0.001)


def main(settings: Settings) -> None:
    """Server, model, data, requests, report."""
    import os
    from contextlib import contextmanager

    from serving.load import measure
    from serving.remote import Remote
    from utils.progress import Progress
    from utils.tracking import start_run

    def connection() -> Remote:
        return Remote(settings.url, settings.protocol, os.environ.get("SERVING_TOKEN", ""), settings.timeout_s)

    with connection() as remote:
        model = remote.model(settings.model_name, settings.model_version)
    about = ("client", model.name, settings.protocol)
    with start_run(settings, "client", about=about) as run:
        data = load_data(settings, model)
        batches = [
            data.rows[settings.split][start : start + settings.batch_size]
            for start in range(0, len(data.rows[settings.split]), settings.batch_size)
        ]
        images = [data.images_NHWC[rows] for rows in batches]  # read before the clock starts

        @contextmanager
        def connect() -> Iterator[Callable[[int], tuple[np.ndarray, str]]]:
            with connection() as remote:
                yield lambda number: remote.infer(model, images[number % len(images)])

        requests = settings.passes * len(batches)
        with Progress(requests, unit="request") as progress:
            measured = measure(connect, requests, settings.concurrency, progress.advance)
        report(run, settings, data, batches, measured)


def load_data(settings: Settings, model: RemoteModel) -> Dataset:
    """The data set, in the size that the model takes; UsageError where it has other images or classes."""
    from data_loader.dataset import load_asked
    from utils import UsageError

    height, width, _ = model.image_shape
    data = load_asked(settings, image_size=height if height == width else 0)
    where = f"the model '{model.name}' at {settings.url}"
    if data.images_NHWC.shape[1:] != model.image_shape:
        raise UsageError(
            f"dataset '{data.name}' has images {data.images_NHWC.shape[1:]}, {where} takes {model.image_shape} "
            "(height, width, channels); give a data set of that shape"
        )
    if len(data.classes) != model.classes:
        raise UsageError(
            f"dataset '{data.name}' has {len(data.classes)} classes, {where} has {model.classes}; give the data set "
            "that it was trained on"
        )
    if not len(data.rows[settings.split]):
        raise UsageError(f"dataset '{data.name}' has no image in the split '{settings.split}'")
    return data


def report(
    run: Run, settings: Settings, data: Dataset, batches: list[np.ndarray], measured: Measured[tuple[np.ndarray, str]]
) -> None:
    """Accuracy, throughput and latencies on the screen and on the run; every request in a table."""
    import numpy as np

    from serving.load import latency_picture

    labels_N = data.labels_N[np.concatenate(batches * settings.passes)]
    guesses_N = np.concatenate([logits_NK.argmax(axis=1) for logits_NK, _ in measured.answers])
    versions = sorted({version for _, version in measured.answers})
    accuracy, requests_per_s = float((guesses_N == labels_N).mean()), measured.requests_per_s
    images_per_s, percentiles = len(labels_N) / measured.seconds, measured.percentiles_ms()
    times = ", ".join(f"{name.removesuffix('_ms')} {value:.2f} ms" for name, value in percentiles.items())
    lines = [
        f"{settings.split} accuracy {accuracy:.4f} on {len(labels_N):,} images, version {', '.join(versions)} of "
        f"{settings.model_name} at {settings.url} ({settings.protocol})",
        f"{requests_per_s:,.1f} requests/s of {settings.batch_size} images, {images_per_s:,.1f} images/s over "
        f"{settings.concurrency} connections; {times}",
    ]
    print("\n".join(lines))
    run.describe("\n\n".join(lines))
    profile = {"images": len(data.rows[settings.split])}
    run.dataset(**data.identity(), context=settings.split, profile=profile)
    run.tags({"served_version": ", ".join(versions)})
    run.metrics({f"{settings.split}/accuracy": accuracy, "requests_per_s": requests_per_s})
    run.metrics({"images_per_s": images_per_s, **{f"latency_{name}": value for name, value in percentiles.items()}})
    pairs = zip(measured.started_s.tolist(), measured.latencies_s.tolist(), strict=True)
    run.table([{"started_s": start, "latency_ms": 1e3 * latency} for start, latency in pairs], "tables/requests.csv")
    run.picture(latency_picture(measured), "pictures/latencies.png")


if __name__ == "__main__":
    launch(main, Settings)
