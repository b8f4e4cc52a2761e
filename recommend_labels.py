"""Choose images of the prediction log to label; and make of the labels a new version of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from data_loader.store import Store
    from monitoring.distance import Distances
    from monitoring.prediction_log import Window
    from utils.tracking import Run


@dataclass(frozen=True)
class Settings:
    """Choose images to label (log=...), or make of the filled table a new version of a data set (labels=...)."""

    output: str = setting(REQUIRED, "new folder: for images and table, or for the new version")
    log: str = setting("", "prediction log to choose from: a folder or s3://bucket/prefix, as serve writes it")
    model_uri: str = setting(
        "", "with log: the model that is to improve, as in serve; empty: the only one there, without a reference"
    )
    count: int = setting(100, "with log: most images to choose", minimum=1)
    hours: float = setting(168.0, "with log: how far back to look; 0: all of it", minimum=0, maximum=876_000)
    labels: str = setting("", "the filled labels.csv, with its images beside it")
    dataset: str = setting("", "with labels: the data set to extend; with log: one whose images are left out")
    new_classes: bool = setting(False, "with labels: allow classes that the data set does not have")
    data_dir: str = setting("data", "folder for downloads and decoded images")


def main(settings: Settings) -> None:
    """One of the two."""
    from utils import UsageError
    from utils.tracking import start_run

    if bool(settings.log) == bool(settings.labels):
        raise UsageError("give log= to choose images to label, or labels= and dataset= to make a new version of them")
    if settings.labels and not settings.dataset:
        raise UsageError("labels= needs dataset=, the data set to extend")
    if settings.output.startswith("s3://"):
        raise UsageError(f"output '{settings.output}' is no folder of this machine; give one")
    if Path(settings.output).exists():
        raise UsageError(f"output '{settings.output}' exists; give a new folder")
    with start_run(settings, "recommend_labels", about=("labels", settings.log or settings.dataset)) as run:
        if settings.log:
            choose(settings, run)
        else:
            add_labels(settings, run)


def choose(settings: Settings, run: Run) -> None:
    """Log, kept images, choice, folder, report."""
    import numpy as np

    from data_loader.dataset import load
    from data_loader.kept import KeptImages
    from data_loader.pictures import image_grid
    from data_loader.store import open_store
    from monitoring.labels import MOST_IN_GRID, TABLE, captions, table_rows, write_folder
    from monitoring.recommend import FAR, recommend
    from utils import UsageError

    store, output = open_store(settings.log), Path(settings.output)
    distances = reference(settings)
    window = read_log(settings, store)
    data = load(settings.dataset, data_dir=Path(settings.data_dir)) if settings.dataset else None
    kept = KeptImages(store, window.images, data)
    seen = window.rows(kept.rows)
    threshold = distances.threshold if distances else 0.0
    distances_N = distances.to(seen.embeddings_NE) if distances and len(seen) else np.zeros(len(seen), np.float32)
    choices = recommend(
        seen.probabilities_NK,
        seen.embeddings_NE,
        settings.count,
        distances_N=distances_N,
        threshold=threshold,
        identity=kept.identity,
    )
    found = f"{settings.log} kept {len(window)} images of that time, {len(seen)} are still there"
    if left_out := kept.left_out():
        found += f" ({left_out})"
    if not choices:
        raise UsageError(f"nothing to label: {found}; look at hours and model_uri, and at keep_share of serve")
    rows, places = table_rows(window, kept.rows, choices, distances_N, threshold), [choice.row for choice in choices]
    figure = image_grid(kept.pictures(places[:MOST_IN_GRID]), captions(rows))
    write_folder(output, rows, [kept.content(place) for place in places], figure)
    for path in sorted(output.rglob("*.*")):
        run.artifact(path, str(Path("labels") / path.relative_to(output).parent))
    far = sum(choice.why == FAR for choice in choices)
    run.metrics({"kept_images": len(window), "present_images": len(seen), "chosen": len(rows), "chosen_far": far})
    told = f"{len(rows)} images to label, {far} of them far from the reference; {found}"
    run.describe(told)
    print(f"{told}\nfill in the column 'label' of {output / TABLE}")


def reference(settings: Settings) -> Distances | None:
    """Distances from what the model's training left as its reference; None, and a line, where there is none."""
    from monitoring.distance import read_distances
    from monitoring.reference import REFERENCE
    from utils.artifacts import find_run_file, model_run

    if not settings.model_uri:
        print("no model_uri, so no reference: uncertainty alone decides")
        return None
    run_id, without = model_run(settings.model_uri), "no reference, so uncertainty alone decides"
    with TemporaryDirectory() as folder:
        file = find_run_file(run_id, REFERENCE, Path(folder), without)
        return read_distances(file) if file else None


def read_log(settings: Settings, store: Store) -> Window:
    """The rows with an image of the hours asked for; of a registered model only those of its present version."""
    from monitoring.window import with_images
    from utils import registry

    if not settings.model_uri.startswith("models:/"):
        return with_images(store, settings.log, settings.hours)
    served = registry.candidate(settings.model_uri)
    return with_images(store, settings.log, settings.hours, model=served.name, version=served.version)


def add_labels(settings: Settings, run: Run) -> None:
    """Data set, table, new version, report."""
    from data_loader.dataset import load
    from data_loader.extend import NewImage, extend
    from monitoring.labels import read_labels

    data = load(settings.dataset, data_dir=Path(settings.data_dir))
    labelled, empty = read_labels(Path(settings.labels), data.classes, new_classes=settings.new_classes)
    new = [NewImage(each.file, each.label, each.content) for each in labelled]
    output = Path(settings.output)
    version = extend(data, new, output)
    profile = {f"{split}_images": count for split, count in version.images.items()}
    run.dataset(name=output.name, digest=version.digest, source=str(output), context="labelled", profile=profile)
    run.tags({"extends_digest": data.digest})
    run.artifact(Path(settings.labels), "labels")
    added = sum(version.added.values())
    run.metrics({"added_images": added, "known_images": version.known, "rows_without_label": empty})
    splits = ", ".join(f"{count} {split}" for split, count in version.added.items())
    told = f"{added} images more than {data.source} ({splits}); {empty} rows without a label"
    told += f", {version.known} images that it had already" if version.known else ""
    run.describe(f"`{output}`, {told}")
    print(f"{output}: {told}; data digest {version.digest}")
    if version.image_shape != data.images_NHWC.shape[1:]:
        print("the new images have another size than the old ones; give image_size= when you train")


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
