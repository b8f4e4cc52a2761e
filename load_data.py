"""Fetch a data set, check it, decode it once, and record what it is."""

from __future__ import annotations

from dataclasses import dataclass

from utils.runtime import launch
from utils.settings import setting


@dataclass(frozen=True)
class Settings:
    """Make a data set ready for training and log what is in it."""

    dataset: str = setting(
        "digits",
        "digits, mnist, fashion_mnist, cifar10, a folder of class folders, an .npz, s3://bucket/prefix",
    )
    data_version: str = setting("", "tag, branch or commit in DVC's repository, where dataset is then a path")
    data_repo: str = setting("", "that repository: a folder or a git address; empty: the project's own")
    data_dir: str = setting("data", "folder for downloads and decoded images")
    image_size: int = setting(0, "pixels a side; 0 keeps the images' own size", minimum=0)
    on_error: str = setting("fail", "what a bad file does", choices=("fail", "skip"))
    seed: int = setting(0, "chooses the images in the sample grid", minimum=0)


def main(settings: Settings) -> None:
    from data_loader.dataset import load_asked
    from data_loader.pictures import class_histogram, sample_grid
    from utils import tracking

    about = ("load_data", settings.dataset, settings.data_version)
    with tracking.start_run(settings, entry_point="load_data", about=about) as run:
        dataset = load_asked(settings, settings.image_size)
        run.params({"data_digest": dataset.digest, **dataset.version})
        run.dataset(
            **dataset.identity(),
            context="training",
            profile={"images": dataset.manifest["images"], "classes": len(dataset.classes)},
        )
        counts = {f"data/{split}_images": float(len(rows)) for split, rows in dataset.rows.items()}
        bad = dataset.manifest["bad"]
        run.metrics({**counts, "data/classes": float(len(dataset.classes)), "data/bad_files": float(len(bad))})
        run.json(dataset.manifest, "manifest.json")
        run.picture(class_histogram(dataset), "pictures/class_histogram.png")
        run.picture(sample_grid(dataset, settings.seed), "pictures/samples.png")
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in dataset.rows.items())
        found = f"{len(dataset.labels_N):,} images ({sizes}) of {len(dataset.classes)} classes"
        run.describe(f"**{dataset.name}**: {found}; {len(bad)} bad files left out. Digest `{dataset.digest}`.")

    height, width, channels = dataset.images_NHWC.shape[1:]
    print(f"{dataset.name}: {found}")
    print(f"  image   {height}x{width}x{channels} uint8")
    print(f"  digest  {dataset.digest}")
    for name, value in dataset.version.items():
        print(f"  {name.removeprefix('data_'):<7} {value}")
    for entry in bad[:10]:
        print(f"  left out: {entry['path']!r}: {entry['reason']}")
    if len(bad) > 10:
        print(f"  left out: {len(bad) - 10} more, all in manifest.json")


if __name__ == "__main__":
    launch(main, Settings, imports=("mlflow",))
