"""The data room: what it makes of folders and arrays, and what it says about bad ones."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_loader import DataError
from data_loader.dataset import Dataset, load

ROOT = Path(__file__).resolve().parent.parent


def random_image(seed: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, image_HWC: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC).save(path)


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 20, **image: int) -> Path:
    """A folder of class folders with `count` PNGs each."""
    for label, name in enumerate(classes):
        for number in range(count):
            save(root / name / f"{number}.png", random_image(1000 * label + number, **image))
    return root


def splits_by_path(dataset: Dataset) -> dict[str, str]:
    return {entry["path"]: entry["split"] for entry in dataset.manifest["files"]}


def refusal(dataset: Path | str, data_dir: Path, **more: str) -> str:
    """The one line with which load refuses a data set."""
    with pytest.raises(DataError) as error:
        load(str(dataset), data_dir=data_dir, **more)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


# ---- built-in sets


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits, original = load("digits", data_dir=tmp_path), load_digits()
    assert digits.images_NHWC.shape == (1797, 8, 8, 1)
    assert np.array_equal(np.round(digits.images_NHWC[..., 0] / 255 * 16), original.images)
    assert digits.images_NHWC.max() == 255
    assert np.array_equal(digits.labels_N, original.target)
    assert digits.classes == tuple("0123456789")


def test_every_image_is_in_exactly_one_split_and_shares_are_as_promised(tmp_path: Path) -> None:
    digits = load("digits", data_dir=tmp_path)
    every = np.concatenate(list(digits.rows.values()))
    assert np.array_equal(np.sort(every), np.arange(1797))
    for split, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        spread = (share * (1 - share) / 1797) ** 0.5
        assert abs(len(digits.rows[split]) / 1797 - share) < 4 * spread
        counts = np.bincount(digits.labels_N[digits.rows[split]])
        assert digits.manifest["counts"][split] == {str(label): count for label, count in enumerate(counts)}


def test_the_split_is_the_documented_function_of_the_pixels(tmp_path: Path) -> None:
    digits = load("digits", data_dir=tmp_path)
    for row in range(0, 1797, 50):
        value = int(hashlib.sha256(digits.images_NHWC[row].tobytes()).hexdigest()[:16], 16) / 16**16
        expected = "test" if value < 0.2 else "val" if value < 0.3 else "train"
        assert row in digits.rows[expected]


def test_a_warm_start_imports_nothing_heavy(tmp_path: Path) -> None:
    load("digits", data_dir=tmp_path)
    program = (
        "import sys, pathlib; from data_loader.dataset import load;"
        "d = load('digits', data_dir=pathlib.Path(sys.argv[1])); d.images_NHWC.sum();"
        "print([m for m in ('torch', 'torchvision', 'sklearn', 'PIL', 'boto3', 'mlflow', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_mnist_keeps_its_official_test_set(mnist_data_dir: Path) -> None:
    mnist = load("mnist", data_dir=mnist_data_dir)
    raw = mnist_data_dir / "torchvision" / "MNIST" / "raw"
    assert mnist.images_NHWC.shape == (70000, 28, 28, 1)
    assert mnist.rows["test"].tolist() == list(range(60000, 70000))
    assert abs(len(mnist.rows["val"]) - 6000) < 4 * 74  # binomial: sqrt(60000 * 0.1 * 0.9)
    pixels = (raw / "train-images-idx3-ubyte").read_bytes()[16:] + (raw / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert hashlib.sha256(mnist.images_NHWC.tobytes()).digest() == hashlib.sha256(pixels).digest()
    labels = (raw / "train-labels-idx1-ubyte").read_bytes()[8:] + (raw / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    assert mnist.labels_N.astype(np.uint8).tobytes() == labels


# ---- folders


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", ("cat", "dog", "eel"))
    pets = load(str(folder), data_dir=tmp_path / "data")
    assert (pets.name, pets.source, pets.classes) == ("pets", str(folder), ("cat", "dog", "eel"))
    assert pets.images_NHWC.shape == (60, 6, 5, 3)
    for row, entry in enumerate(pets.manifest["files"]):
        data = (folder / entry["path"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["bytes"] == len(data)
        assert entry["class"] == entry["path"].split("/")[0] == pets.classes[pets.labels_N[row]]
        assert row in pets.rows[entry["split"]]
        assert np.array_equal(pets.images_NHWC[row], np.asarray(Image.open(folder / entry["path"])))


def test_the_images_are_a_read_only_memory_map(tmp_path: Path) -> None:
    pets = load(str(make_folder(tmp_path / "pets")), data_dir=tmp_path / "data")
    assert isinstance(pets.images_NHWC, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        pets.images_NHWC[0] = 0


def test_the_next_start_reads_no_image_file(tmp_path: Path) -> None:
    """Same names, sizes and times, but other bytes: only a start that reads them would notice."""
    folder = make_folder(tmp_path / "pets")
    first = load(str(folder), data_dir=tmp_path / "data")
    for path in folder.rglob("*.png"):
        before = path.stat()
        path.write_bytes(b"\0" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load(str(folder), data_dir=tmp_path / "data")
    assert second.digest == first.digest
    assert np.array_equal(second.images_NHWC, first.images_NHWC)


def test_another_image_size_is_another_cache_of_the_same_digest(tmp_path: Path) -> None:
    folder, data_dir = make_folder(tmp_path / "pets"), tmp_path / "data"
    own, small = load(str(folder), data_dir=data_dir), load(str(folder), data_dir=data_dir, image_size=4)
    assert small.images_NHWC.shape == (40, 4, 4, 3)
    assert small.manifest["image_shape"] == [4, 4, 3]
    assert small.digest == own.digest
    assert splits_by_path(small) == splits_by_path(own)
    assert np.array_equal(load(str(folder), data_dir=data_dir).images_NHWC, own.images_NHWC)
    assert len(list((data_dir / "cache").iterdir())) == 2


def test_images_of_several_sizes_become_64x64_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "pets")
    save(folder / "cat" / "large.png", random_image(7, height=80, width=90))
    pets = load(str(folder), data_dir=tmp_path / "data")
    assert pets.images_NHWC.shape[1:] == (64, 64, 3)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "64x64" in said[0]


def test_grey_images_have_one_channel_and_mixed_ones_three(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "grey", channels=1)
    assert load(str(folder), data_dir=tmp_path / "data").images_NHWC.shape[3] == 1
    save(folder / "cat" / "colour.png", random_image(7))
    assert load(str(folder), data_dir=tmp_path / "data").images_NHWC.shape[3] == 3


@pytest.mark.parametrize("val_name", ["val", "valid", "validation", "Val"])
def test_split_folders_are_kept(tmp_path: Path, val_name: str) -> None:
    for split in ("train", val_name, "test"):
        make_folder(tmp_path / "pets" / split, count=4)
    pets = load(str(tmp_path / "pets"), data_dir=tmp_path / "data")
    assert pets.classes == ("cat", "dog")
    names = {"train": "train", val_name: "val", "test": "test"}
    assert all(names[path.split("/")[0]] == split for path, split in splits_by_path(pets).items())
    assert [len(pets.rows[split]) for split in ("train", "val", "test")] == [8, 8, 8]


def test_without_a_val_folder_a_tenth_of_train_is_taken(tmp_path: Path) -> None:
    make_folder(tmp_path / "pets" / "train", count=150)
    make_folder(tmp_path / "pets" / "test", count=3)
    pets = load(str(tmp_path / "pets"), data_dir=tmp_path / "data")
    for entry in pets.manifest["files"]:
        if entry["path"].startswith("test/"):
            assert entry["split"] == "test"
        else:
            assert entry["split"] == ("val" if int(entry["sha256"][:16], 16) / 16**16 < 0.1 else "train")
    assert 10 <= len(pets.rows["val"]) <= 50


def test_split_folders_beside_others_are_refused(tmp_path: Path) -> None:
    for name in ("train", "test", "extra"):
        make_folder(tmp_path / "pets" / name, count=2)
    assert "extra" in refusal(tmp_path / "pets", tmp_path / "data")


def test_an_empty_split_says_what_to_do(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", count=1)
    message = refusal(folder, tmp_path / "data")
    assert "split" in message
    assert "is empty" in message
    assert "train/, val/ and test/" in message


@given(first=st.integers(0, 10**6), extra=st.sets(st.integers(0, 10**6), max_size=12), again=st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adding_images_moves_no_old_one(
    tmp_path_factory: pytest.TempPathFactory, first: int, extra: set[int], again: bool
) -> None:
    tmp_path = tmp_path_factory.mktemp("stable")
    folder = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog")):
        for number in range(60):
            save(folder / name / f"{number}.png", random_image(first + 1000 * label + number, 2, 2))
    before = load(str(folder), data_dir=tmp_path / "data")
    for seed in extra:
        save(folder / "a new class" / f"{seed}.png", random_image(seed, 2, 2))
    if again:  # a copy under another name must stand in the same split
        (folder / "dog" / "0 copy.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    after = load(str(folder), data_dir=tmp_path / "data")
    assert splits_by_path(before).items() <= splits_by_path(after).items()
    assert (before.digest == after.digest) == (not extra and not again)
    by_content: dict[str, set[str]] = {}
    for entry in after.manifest["files"]:
        by_content.setdefault(entry["sha256"], set()).add(entry["split"])
    assert all(len(splits) == 1 for splits in by_content.values())


FILE_NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40
).filter(lambda name: not name.startswith(".") and len(name.encode()) < 200)


@given(names=st.sets(FILE_NAMES, min_size=2, max_size=4), file_name=FILE_NAMES)
@settings(max_examples=25, deadline=None)
def test_any_names_will_do(tmp_path_factory: pytest.TempPathFactory, names: set[str], file_name: str) -> None:
    names = {f"{name}_" for name in names}  # none is Thumbs.db or train
    tmp_path = tmp_path_factory.mktemp("names")
    for label, name in enumerate(sorted(names)):
        for number in range(25):
            save(tmp_path / "f" / name / "x.png", random_image(1000 * label + number, 2, 2))
            (tmp_path / "f" / name / "x.png").rename(tmp_path / "f" / name / f"{file_name}{number}")
    dataset = load(str(tmp_path / "f"), data_dir=tmp_path / "data")
    assert set(dataset.classes) == names
    assert {entry["path"] for entry in dataset.manifest["files"]} == {
        f"{name}/{file_name}{number}" for name in names for number in range(25)
    }
    again = load(str(tmp_path / "f"), data_dir=tmp_path / "data")
    assert again.digest == dataset.digest
    json.dumps(again.manifest)


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    (folder / "cat").rename(folder / os.fsdecode(b"caf\xe9"))
    pets = load(str(folder), data_dir=tmp_path / "data")
    assert os.fsencode(pets.classes[0]) == b"caf\xe9"
    assert load(str(folder), data_dir=tmp_path / "data").digest == pets.digest


def test_renaming_or_regrouping_changes_the_digest_and_touching_does_not(tmp_path: Path) -> None:
    folder, data_dir = make_folder(tmp_path / "pets"), tmp_path / "data"
    first = load(str(folder), data_dir=data_dir).digest
    (folder / "cat" / "0.png").touch()
    assert load(str(folder), data_dir=data_dir).digest == first
    (folder / "cat" / "0.png").rename(folder / "cat" / "zero.png")
    second = load(str(folder), data_dir=data_dir).digest
    (folder / "cat" / "zero.png").rename(folder / "dog" / "zero.png")
    assert len({first, second, load(str(folder), data_dir=data_dir).digest}) == 3


def test_the_digest_does_not_depend_on_the_place(tmp_path: Path) -> None:
    here, there = make_folder(tmp_path / "here"), make_folder(tmp_path / "there" / "deep")
    digests = {load(str(path), data_dir=tmp_path / path.name / "data").digest for path in (there,)}
    assert digests == {load(str(here), data_dir=tmp_path / "data").digest}


# ---- bad files


def spoil(folder: Path) -> dict[str, str]:
    """Put one of every kind of bad file into a folder of pets: {path: words of the reason}."""
    good = (folder / "cat" / "0.png").read_bytes()
    Image.fromarray(random_image(1, 60, 60)).save(folder / "cat" / "whole.jpg")
    jpeg = (folder / "cat" / "whole.jpg").read_bytes()
    (folder / "cat" / "whole.jpg").unlink()
    (folder / "cat" / "empty.png").touch()
    (folder / "cat" / "cut short.png").write_bytes(good[: len(good) // 2])
    (folder / "cat" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "cat" / 'it\'s "text".png').write_text("hello")
    (folder / "dog" / "flipped.png").write_bytes(good[:50] + bytes([good[50] ^ 255]) + good[51:])
    Image.fromarray(random_image(1)).save(folder / "dog" / "old.gif")
    (folder / "dog" / "nowhere.png").symlink_to(folder / "absent.png")
    (folder / "dog" / "itself.png").symlink_to(folder / "dog" / "itself.png")
    (folder / "dog" / "up").symlink_to(folder)
    (folder / "eel").mkdir()
    os.mkfifo(folder / "dog" / "pipe.png")
    save(folder / "stray.png", random_image(3))
    return {
        "cat/empty.png": "empty file",
        "cat/cut short.png": "corrupt or truncated",
        "cat/cut.jpg": "corrupt or truncated",
        'cat/it\'s "text".png': "not a PNG, JPEG, BMP or WebP image",
        "dog/flipped.png": "corrupt",
        "dog/old.gif": "not a PNG, JPEG, BMP or WebP image",
        "dog/up": "symlink loop",
        "dog/nowhere.png": "No such file",
        "dog/itself.png": "symbolic links",
        "dog/pipe.png": "not a regular file",
        "eel": "class folder without images",
        "stray.png": "outside the class folders",
    }


def test_bad_files_are_named_or_left_out(tmp_path: Path) -> None:
    folder, clean = make_folder(tmp_path / "pets"), make_folder(tmp_path / "clean")
    expected = spoil(folder)
    (folder / "cat" / ".DS_Store").write_bytes(b"hidden")
    (folder / "README.txt").write_text("not data")
    message = refusal(folder, tmp_path / "data")
    assert "bad file(s)" in message
    assert "'cat/cut short.png'" in message
    assert "on_error=skip" in message

    pets = load(str(folder), data_dir=tmp_path / "data", on_error="skip", image_size=6)
    reasons = {entry["path"]: entry["reason"] for entry in pets.manifest["bad"]}
    assert reasons.keys() == expected.keys()
    for path, words in expected.items():
        assert words in reasons[path]
    assert pets.classes == ("cat", "dog")
    assert set(splits_by_path(load(str(clean), data_dir=tmp_path / "data"))) <= set(splits_by_path(pets))
    # What was found to be bad is remembered: the answer is the same without reading a file.
    assert refusal(folder, tmp_path / "data") == message


def test_a_symlink_loop_ends(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    (folder / "cat" / "loop").symlink_to(folder / "cat")
    pets = load(str(folder), data_dir=tmp_path / "data", on_error="skip")
    assert [(entry["path"], entry["reason"]) for entry in pets.manifest["bad"]] == [("cat/loop", "symlink loop")]
    assert len(pets.labels_N) == 40


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    elsewhere, folder = make_folder(tmp_path / "elsewhere"), tmp_path / "pets"
    folder.mkdir()
    (folder / "cat").symlink_to(elsewhere / "cat")
    (folder / "dog").mkdir()
    for path in (elsewhere / "dog").iterdir():
        (folder / "dog" / path.name).symlink_to(path)
    assert load(str(folder), data_dir=tmp_path).digest == load(str(elsewhere), data_dir=tmp_path).digest


def test_a_decompression_bomb_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    Image.new("1", (20_000, 20_000)).save(folder / "cat" / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(folder / "cat" / "half a bomb.png")
    pets = load(str(folder), data_dir=tmp_path / "data", on_error="skip", image_size=8)
    assert ["decompression bomb" in entry["reason"] for entry in pets.manifest["bad"]] == [True, True]


def test_a_class_with_bad_files_only_is_dropped(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    (folder / "ant").mkdir()
    (folder / "ant" / "a.png").write_text("no image")
    pets = load(str(folder), data_dir=tmp_path / "data", on_error="skip")
    assert pets.classes == ("cat", "dog")
    assert sorted(set(pets.labels_N.tolist())) == [0, 1]


def test_one_class_and_no_class_are_refused(tmp_path: Path) -> None:
    message = refusal(make_folder(tmp_path / "one", ("cat",)), tmp_path / "data")
    assert "['cat']" in message
    assert "at least 2" in message
    save(tmp_path / "flat" / "a.png", random_image(1))
    assert "FOLDER/CLASS/IMAGE" in refusal(tmp_path / "flat", tmp_path / "data")
    (tmp_path / "nothing").mkdir()
    assert "FOLDER/CLASS/IMAGE" in refusal(tmp_path / "nothing", tmp_path / "data")


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    for dataset in ("mnits", "", str(tmp_path / "absent"), __file__):
        message = refusal(dataset, tmp_path / "data")
        assert "digits, mnist, fashion_mnist, cifar10" in message
    with pytest.raises(DataError, match="allowed: fail, skip"):
        load("digits", data_dir=tmp_path, on_error="ignore")
    with pytest.raises(DataError, match="image_size"):
        load("digits", data_dir=tmp_path, image_size=-1)


def test_a_data_dir_in_the_data_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    assert "data_dir" in refusal(folder, folder)
    assert "data_dir" in refusal(folder, folder / "data")
    assert sorted(path.name for path in folder.iterdir()) == ["cat", "dog"]


def test_a_data_dir_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "data_dir" in refusal("digits", tmp_path / "file" / "data")


# ---- the cache


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    folder, data_dir = make_folder(tmp_path / "pets"), tmp_path / "data"
    expected = np.array(load(str(folder), data_dir=data_dir).images_NHWC)
    images = next((data_dir / "cache").glob("*/images.npy"))
    os.truncate(images, images.stat().st_size // 2)
    assert np.array_equal(load(str(folder), data_dir=data_dir).images_NHWC, expected)
    next((data_dir / "manifests").iterdir()).write_text('{"stamp": ')
    assert np.array_equal(load(str(folder), data_dir=data_dir).images_NHWC, expected)


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    folder, partial = make_folder(tmp_path / "pets"), tmp_path / "data" / "cache" / ".partial"
    partial.mkdir(parents=True)
    (partial / "images.npy").write_bytes(b"half")
    load(str(folder), data_dir=tmp_path / "data")
    assert not partial.exists()


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """250 MiB of pixels, from a folder and from an .npz, in a process that may take only
    160 MiB for itself.
    """
    side, count = 1024, 84
    for number in range(count):
        path = tmp_path / "big" / f"class {number % 2}" / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (number, 0, 0)).save(path)
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (count, side, side, 3))
    images[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    images.flush()
    np.savez_compressed(tmp_path / "big.npz", images=images, labels=np.arange(count) % 2)
    del images
    program = (
        "import resource, sys, pathlib; import numpy, PIL.Image, tqdm, filelock; import data_loader.dataset as d;"
        "import data_loader.images;"
        "used = int(open('/proc/self/status').read().split('VmData:')[1].split()[0]) * 1024;"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 160 * 2**20, used + 160 * 2**20));"
        "print(*[d.load(a, data_dir=pathlib.Path(sys.argv[1])).images_NHWC.nbytes for a in sys.argv[2:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "data", tmp_path / "big", tmp_path / "big.npz"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(side * side * 3 * count)] * 2, done.stderr


def test_two_at_once_do_the_work_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", count=60)
    program = (
        "import sys, pathlib; from data_loader.dataset import load;"
        "print(load(sys.argv[1], data_dir=pathlib.Path(sys.argv[2])).digest)"
    )
    command = [sys.executable, "-c", program, folder, tmp_path / "data"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(digests) == 1
    assert len(list((tmp_path / "data" / "cache").iterdir())) == 1


def test_a_second_one_waits_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    folder, data_dir = make_folder(tmp_path / "pets"), tmp_path / "data"
    data_dir.mkdir()
    lock = FileLock(data_dir / ".lock", thread_local=False)
    lock.acquire()
    results: list[Dataset] = []
    thread = threading.Thread(target=lambda: results.append(load(str(folder), data_dir=data_dir)))
    thread.start()
    thread.join(1.0)
    assert not results
    lock.release()
    thread.join(60)
    assert len(results) == 1
    assert "waiting for another process" in capsys.readouterr().err


# ---- pictures


def test_pictures_of_awkward_names(tmp_path: Path) -> None:
    from data_loader.pictures import class_histogram, sample_grid

    pets = load(str(make_folder(tmp_path / "pe$t$s", ("$a_{$", "b\tc", "d" * 80))), data_dir=tmp_path / "data")
    for figure in (class_histogram(pets), sample_grid(pets, seed=0)):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert Image.open(buffer).width > 100
    heights = sum(bar.get_height() for bar in class_histogram(pets).axes[0].patches)
    assert heights == len(pets.labels_N)


def test_the_grid_shows_the_pixels(tmp_path: Path) -> None:
    from data_loader.pictures import image_grid

    images_NHWC = np.stack([random_image(seed) for seed in range(13)])
    (axes,) = image_grid(images_NHWC, [str(seed) for seed in range(13)]).axes
    shown = np.asarray(axes.images[0].get_array())
    windows = np.lib.stride_tricks.sliding_window_view(shown, (6, 5, 3))
    for image_HWC in images_NHWC:
        assert (windows == image_HWC).all(axis=(-1, -2, -3)).any()
    assert [text.get_text() for text in axes.texts] == [str(seed) for seed in range(13)]
