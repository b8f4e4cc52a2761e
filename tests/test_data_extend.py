"""A new version of a data set: what was there is untouched, what is new is there, and a refusal leaves nothing."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loader import DataError
from data_loader.dataset import Dataset, load
from data_loader.extend import NewImage, Version, extend


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def picture(seed: int, *shape: int) -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 256, shape or (6, 5, 3), np.uint8))


def new(count: int, class_name: str = "cat", *shape: int) -> list[NewImage]:
    return [NewImage(f"images/{seed}.png", class_name, picture(10_000 + seed, *shape)) for seed in range(count)]


def make_folder(root: Path, above: tuple[str, ...] = ("",), classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Forty images of each class in each folder above, and a licence."""
    seed = 0
    for folder in above:
        for class_name in classes:
            (root / folder / class_name).mkdir(parents=True)
            for number in range(40):
                seed += 1
                (root / folder / class_name / f"{number}.png").write_bytes(picture(seed))
    (root / "LICENCE.txt").write_text("free")
    return root


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def splits(data: Dataset) -> dict[str, str]:
    return {entry["path"]: entry["split"] for entry in data.manifest["files"]}


def opened(source: Path | str, tmp_path: Path) -> Dataset:
    return load(str(source), data_dir=tmp_path / "data")


@pytest.mark.parametrize("above", [("",), ("train", "test"), ("Train", "Valid", "Test")])
def test_a_folder_keeps_its_files_and_their_splits(tmp_path: Path, above: tuple[str, ...]) -> None:
    root = make_folder(tmp_path / "pets", above)
    before, content = opened(root, tmp_path), files(root)
    version = extend(before, new(30), tmp_path / "pets v2")
    after = opened(tmp_path / "pets v2", tmp_path)
    assert files(root) == content
    now = files(tmp_path / "pets v2")
    assert now.items() >= content.items()
    added = now.keys() - content.keys()
    assert {now[name] for name in added} == {image.content for image in new(30)}
    below = {"": "cat/", "train": "train/cat/", "Train": "Train/cat/"}[above[0]]
    assert all(name == f"{below}{hashlib.sha256(now[name]).hexdigest()[:32]}.png" for name in added)
    assert splits(after).items() >= splits(before).items()
    assert version.digest == after.digest != before.digest
    assert version.added == {split: sum(splits(after)[name] == split for name in added) for split in after.rows}
    assert (version.added["test"] == 0) == (len(above) > 1), "an official test set is closed"
    assert version.images == {split: len(rows) for split, rows in after.rows.items()}
    assert after.classes == ("cat", "dog")


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def array_set(kind: str, tmp_path: Path) -> str:
    random = np.random.default_rng(0)
    grey, colour = random.integers(0, 256, (200, 6, 5), np.uint8), random.integers(0, 256, (200, 6, 5, 3), np.uint8)
    labels = np.arange(200) % 2
    if kind == "own splits":
        return str(npz(tmp_path / "a.npz", images=grey, labels=labels))
    halves = {"x_train": colour[:150], "y_train": labels[:150], "x_test": colour[150:], "y_test": labels[150:]}
    return str(npz(tmp_path / "b.npz", **halves)) if kind == "official" else "digits"


@pytest.mark.parametrize("kind", ["own splits", "official", "digits"])
def test_arrays_become_files_with_the_same_pixels_in_the_same_splits(tmp_path: Path, kind: str) -> None:
    before = opened(array_set(kind, tmp_path), tmp_path)
    height, width, channels = before.images_NHWC.shape[1:]
    images = new(60, before.classes[1], *((height, width) if channels == 1 else (height, width, 3)))
    version = extend(before, images, tmp_path / "v2")
    after = opened(tmp_path / "v2", tmp_path)
    assert after.images_NHWC.shape[1:] == before.images_NHWC.shape[1:] and after.classes == before.classes
    for split, rows in before.rows.items():
        # Files come in the order of their names: split, class, row.
        were = sorted((int(before.labels_N[row]), int(row), before.images_NHWC[row].tobytes()) for row in rows)
        known = {pixels for _, _, pixels in were}
        are = [
            (int(after.labels_N[row]), after.images_NHWC[row].tobytes())
            for row in after.rows[split]
            if after.images_NHWC[row].tobytes() in known
        ]
        assert are == [(label, pixels) for label, _, pixels in were]
    assert sum(version.added.values()) == 60
    assert version.digest == after.digest
    for name in splits(after):
        pixels = np.asarray(Image.open(tmp_path / "v2" / name))
        value = int(hashlib.sha256(pixels.tobytes()).hexdigest()[:16], 16) / 16**16
        expected = {"official": "train" if value >= 0.1 else "val"}.get(
            kind, "test" if value < 0.2 else "val" if value < 0.3 else "train"
        )
        assert splits(after)[name] == expected or (kind == "official" and name.startswith("test/"))
    assert (version.added["test"] == 0) == (kind == "official")


def test_a_new_image_of_an_array_set_gets_its_size(tmp_path: Path) -> None:
    before = opened(array_set("own splits", tmp_path), tmp_path)
    extend(before, new(1, "0", 50, 60, 3), tmp_path / "v2")
    assert opened(tmp_path / "v2", tmp_path).images_NHWC.shape == (201, 6, 5, 1)


def test_a_new_size_in_a_folder_is_told(tmp_path: Path) -> None:
    before = opened(make_folder(tmp_path / "pets"), tmp_path)
    assert extend(before, new(1), tmp_path / "v2").image_shape == (6, 5, 3)
    assert extend(before, new(1, "cat", 9, 9, 3), tmp_path / "v3").image_shape == (64, 64, 3)


def test_what_the_data_set_has_already_is_not_added_again(tmp_path: Path) -> None:
    before = opened(make_folder(tmp_path / "pets"), tmp_path)
    again = NewImage("images/1.png", "cat", picture(1))
    in_another_file = NewImage("images/2.bmp", "cat", encoded(np.asarray(Image.open(io.BytesIO(picture(2)))), "BMP"))
    twice = [*new(1), *new(1)]
    version = extend(before, [again, in_another_file, *twice], tmp_path / "v2")
    assert (version.known, sum(version.added.values())) == (3, 1)
    with pytest.raises(DataError, match="holds all 2 labelled images already; there is nothing to add"):
        extend(before, [again, in_another_file], tmp_path / "v3")


def extended(tmp_path: Path, images: list[NewImage], output: str = "v2") -> Version:
    return extend(opened(make_folder(tmp_path / "pets"), tmp_path), images, tmp_path / output)


@pytest.mark.parametrize("name", ["Äpfel & Birnen", "=1+1", "'quoted' \"twice\"", "-rf", "a;b,c", "漢字", "con ", "%"])
def test_odd_names_of_new_classes_are_folders(tmp_path: Path, name: str) -> None:
    extended(tmp_path, new(2, name))
    assert set(opened(tmp_path / "v2", tmp_path).classes) == {"cat", "dog", name}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../dog", "a/b", "a\\b", ".hidden", "a\nb", "a\0b", "x" * 256, "train", "Test", "__MACOSX"]
)
def test_a_class_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, new(1, name), "which cannot name a class folder; choose another")


def refused(tmp_path: Path, images: list[NewImage], told: str, output: str = "v2") -> None:
    before = {path.name for path in tmp_path.iterdir()} | {"pets", "data"}
    with pytest.raises(DataError, match=told) as error:
        extended(tmp_path, images, output)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before and len(files(tmp_path / "pets")) == 81, (
        "nothing is left"
    )


def test_images_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    broken = NewImage("images/7.png", "cat", picture(1)[:60])
    refused(tmp_path, [*new(1), broken], r"'images/7.png' cannot be read: corrupt")


def test_one_image_under_two_classes_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path, [NewImage("images/7.png", "dog", picture(1))], "'images/7.png' got the label 'dog', but .* 'cat'")


def test_two_labels_for_the_same_pixels_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, [*new(1, "cat"), *new(1, "dog")], "another row has the same image as 'cat'; correct one of them")


def test_an_output_that_exists_or_lies_in_the_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    refused(tmp_path, new(1), "exists; give a new folder", "there")
    shutil.rmtree(tmp_path / "pets")
    (tmp_path / "link").symlink_to("nowhere")
    refused(tmp_path, new(1), "exists; give a new folder", "link")
    shutil.rmtree(tmp_path / "pets")
    refused(tmp_path, new(1), "lies in the data set itself", "pets/v2")


def test_classes_that_cannot_be_folders_stay_arrays(tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).integers(0, 256, (200, 6, 5), np.uint8), np.arange(200) % 2
    classes = np.array(["T-shirt/top", "Bag"])
    path = npz(tmp_path / "a.npz", images=images, labels=labels, classes=classes)
    with pytest.raises(DataError, match="has the class 'T-shirt/top', which cannot be a folder's name"):
        extend(opened(path, tmp_path), new(1, "Bag"), tmp_path / "v2")
    assert {item.name for item in tmp_path.iterdir()} == {"a.npz", "data"}


def test_data_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    before = opened(make_folder(tmp_path / "pets"), tmp_path)
    (tmp_path / "pets/cat/3.png").write_bytes(picture(999))
    with pytest.raises(DataError, match="changed while it was being copied; try again"):
        extend(before, new(1), tmp_path / "v2")
    assert {item.name for item in tmp_path.iterdir()} == {"pets", "data"}


def test_a_place_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    before = opened(make_folder(tmp_path / "pets"), tmp_path)
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        extend(before, new(1), tmp_path / "file" / "v2")


def test_links_in_the_data_become_files_of_the_version(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets")
    (tmp_path / "far.png").write_bytes(picture(500))
    (root / "cat/far.png").symlink_to(tmp_path / "far.png")
    extend(opened(root, tmp_path), new(1), tmp_path / "v2")
    copy = tmp_path / "v2/cat/far.png"
    assert copy.read_bytes() == picture(500) and not copy.is_symlink()
