"""Compare what the model met in service with the images it was tested on: reference, window, tests, report, gauges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from data_loader.store import Store
    from monitoring.prediction_log import Window
    from monitoring.reference import Reference
    from monitoring.report import Report
    from utils.tracking import Run

MOST_STRANGEST = 40
"""Images in the picture of the strangest ones: four lines of ten."""


@dataclass(frozen=True)
class Settings:
    """Compare a window of the prediction log with the reference of the model: has the world changed?"""

    log: str = setting(REQUIRED, "prediction log, as serve writes it: a folder or s3://bucket/prefix")
    model_uri: str = setting(
        "", "model whose reference it is: models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID/model"
    )
    reference: str = setting("", "in the place of model_uri: a reference.parquet")
    version: str = setting("", "version whose predictions are compared; empty: the one of model_uri")
    hours: float = setting(24.0, "length of the window; it ends at until", minimum=0.001)
    since: str = setting("", "begin of the window in the place of hours, such as 2026-03-14T12:00 (UTC)")
    until: str = setting("", "end of the window; empty: now")
    min_images: int = setting(100, "fewer images than this are refused", minimum=50)
    false_alarm_rate: float = setting(
        0.01, "largest share of windows without drift that may be called drifted", minimum=0.001, maximum=0.05
    )
    fail_on_drift: bool = setting(False, "end with exit code 1 when drift is found")
    push_gateway: str = setting("", "Prometheus Pushgateway for the gauges, host:port or an http address")


def main(settings: Settings) -> None:
    """Settings, reference, window, comparison, report, gauges."""
    from data_loader.store import open_store
    from monitoring import gauges
    from monitoring.drift import compare
    from monitoring.prediction_log import read_feedback
    from monitoring.report import Report
    from monitoring.window import choose, span
    from utils import RunFailed, UsageError
    from utils.tracking import start_run

    if "@" in settings.push_gateway:  # it becomes a parameter of the run, for all to read
        raise UsageError(
            "push_gateway: received an address with a user or password, allowed: host:port or http://host:port"
        )
    when = span(settings.hours, settings.since, settings.until)
    store = open_store(settings.log)
    origin, reference, model, version = fetch_reference(settings)
    window = choose(store, settings.log, when, model=model, version=version, least=settings.min_images)
    drift = compare(reference, window, false_alarm_rate=settings.false_alarm_rate)
    report = Report(drift, window.models[0], window.versions[0], when, origin, reference, read_feedback(store, window))
    with start_run(settings, "monitor", about=("monitor", f"{report.model}-v{report.version}")) as run:
        log(run, report, window, store)
        if settings.push_gateway:
            gauges.push(settings.push_gateway, report.model, drift)
        print(f"{report.sentence}; run {run.id}", flush=True)
        if drift.drifted and settings.fail_on_drift:
            raise RunFailed(f"{report.verdict} (fail_on_drift=true); run {run.id} has the report")


def fetch_reference(settings: Settings) -> tuple[str, Reference, str, str]:
    """Where the reference is from, the reference, name and version of the model: "" for those that are not known."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from monitoring.reference import REFERENCE, read_reference
    from utils import UsageError, registry
    from utils.artifacts import fetch_run_file, model_run

    if bool(settings.model_uri) == bool(settings.reference):
        raise UsageError("give model_uri=, whose run holds the reference, or reference=, its file")
    if settings.reference:
        return settings.reference, read_reference(Path(settings.reference)), "", settings.version
    model, version, uri = "", settings.version, settings.model_uri
    if uri.startswith("models:/"):
        served = registry.candidate(uri)
        model, version = served.name, version or served.version
        uri = f"models:/{model}/{version}"
    run_id = model_run(uri)
    with TemporaryDirectory() as folder:
        try:
            file = fetch_run_file(run_id, REFERENCE, Path(folder))
        except UsageError as error:
            raise UsageError(
                f"no reference: {error}; train the model anew, which leaves one, or give reference="
            ) from None
        return f"run {run_id}", read_reference(file), model, version


def log(run: Run, report: Report, window: Window, store: Store) -> None:
    """Numbers, pictures, page and description on the run."""
    from dataclasses import replace

    from monitoring import pictures

    figures = pictures.figures(report.reference, window) | strangest(report.reference, window, store)
    files = {name: pictures.png(figure) for name, figure in figures.items()}
    for name, content in files.items():
        (run.folder / f"{name}.png").write_bytes(content)
        run.artifact(run.folder / f"{name}.png", "pictures")
    run.text(replace(report, pictures=files).html(), "monitoring/report.html")
    run.json(report.data(), "monitoring/report.json")
    since, until = report.span.words
    run.params({"reference_from": report.origin, "window_since": since, "window_until": until})
    drifted = ", ".join(report.drift.drifted_parts) or "none"
    run.tags({"model_name": report.model, "model_version": report.version, "drift": drifted})
    run.metrics(report.metrics())
    run.describe(report.markdown())


def strangest(reference: Reference, window: Window, store: Store) -> dict[str, Figure]:
    """A picture of the kept images that are farthest from the reference, equal ones once; none where none was kept."""
    from data_loader.kept import KeptImages
    from data_loader.pictures import image_grid
    from monitoring.distance import Distances

    kept = KeptImages(store, window.images, None)
    distances = Distances(reference.embeddings_NE)
    distances_N = distances.to(window.embeddings_NE[kept.rows]) / max(distances.threshold, 1e-9)
    places: dict[bytes, int] = {}
    for place in (-distances_N).argsort(kind="stable").tolist():  # what is no number comes last
        if len(places) < MOST_STRANGEST and (identity := kept.identity(place)) is not None:
            places.setdefault(identity, place)
    chosen = list(places.values())
    captions = [f"{window.classes[window.predicted_N[kept.rows[place]]]} {distances_N[place]:.1f}" for place in chosen]
    return {"strangest": image_grid(kept.pictures(chosen), captions)} if chosen else {}


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
