"""Decoding, splits and .npz files of the data room."""

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_loader import DataError
from data_loader.dataset import load
from data_loader.images import decode_image, encode_png
from data_loader.inputs import read_batches
from data_loader.splits import split_of


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values_HWC: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, written from the specification: Pillow cannot write one in colour."""
    height, width, channels = values_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values_HWC)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(lines))
        + png_chunk(b"IEND", b"")
    )


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from((1, 3))),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_an_encoded_image_is_decoded_to_the_same_values(shape: tuple[int, int, int], seed: int) -> None:
    image_HWC = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    data = encode_png(image_HWC)
    np.testing.assert_array_equal(decode_image(data, *shape), image_HWC)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L" if shape[2] == 1 else "RGB", shape[1::-1])


MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
FORMATS = ("PNG", "BMP", "WEBP", "JPEG")


@given(
    mode=st.sampled_from(MODES),
    form=st.sampled_from(FORMATS),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    target=st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from((1, 3))),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_mode_size_and_format_is_decoded(
    mode: str, form: str, size: tuple[int, int], target: tuple[int, int, int], seed: int
) -> None:
    rgba = np.random.default_rng(seed).integers(0, 256, (size[0], size[1], 4), dtype=np.uint8)
    image = Image.fromarray(rgba).convert("RGB" if mode == "P" else mode).convert(mode)
    if form == "JPEG" and mode in ("LA", "P", "RGBA"):
        image = image.convert("RGB")
    if form == "BMP" and mode == "LA":
        image = image.convert("L")
    decoded_HWC = decode_image(encode(image, form), *target)
    assert decoded_HWC.shape == target
    assert decoded_HWC.dtype == np.uint8


@given(seed=st.integers(0, 2**32 - 1), form=st.sampled_from(("PNG", "BMP")))
@settings(max_examples=30, deadline=None)
def test_lossless_formats_come_back_exactly(seed: int, form: str) -> None:
    rgb_HWC = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode(Image.fromarray(rgb_HWC), form), 7, 9, 3), rgb_HWC)
    grey_HW = rgb_HWC[:, :, 0]
    assert np.array_equal(decode_image(encode(Image.fromarray(grey_HW), form), 7, 9, 1)[:, :, 0], grey_HW)
    as_rgb = decode_image(encode(Image.fromarray(grey_HW), form), 7, 9, 3)
    assert np.array_equal(as_rgb, np.stack([grey_HW] * 3, axis=2))


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_lies_over_white(channels: int) -> None:
    rgba_HWC = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    if channels == 1:
        rgba_HWC[:, :, 1] = rgba_HWC[:, :, 2] = rgba_HWC[:, :, 0]
    alpha_HW1 = rgba_HWC[:, :, 3:] / 255
    expected = rgba_HWC[:, :, :3] * alpha_HW1 + 255 * (1 - alpha_HW1)
    decoded = decode_image(encode(Image.fromarray(rgba_HWC)), 16, 16, channels)
    assert np.abs(decoded - expected[:, :, :channels]).max() <= 1


def test_a_transparent_palette_entry_lies_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, transparency=0), 1, 2, 3)
    assert decoded.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.arange(0, 65536, 97, dtype=np.uint16)[: 26 * 26].reshape(26, 26, 1)
    grey = decode_image(png16(values), 26, 26, 1)
    assert np.array_equal(grey, np.round(values / 257).astype(np.uint8))
    colour = decode_image(png16(np.repeat(values, 3, axis=2)), 26, 26, 3)
    assert np.abs(colour.astype(int) - values / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    """The tag says where the first row and column of the stored pixels lie in the upright picture (EXIF
    2.32, 4.6.4).
    """
    upright = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),  # the camera was turned: a viewer has to turn it back clockwise
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(decode_image(data, 4, 6, 1)[:, :, 0], upright)
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(20):  # other bytes after the end of the PNG make another file of the same picture
            (tmp_path / "set" / label / f"{number}.png").write_bytes(data + f"{label}{number}".encode())
    shape = load(str(tmp_path / "set"), data_dir=tmp_path / "data").images_NHWC.shape
    assert shape[1:] == (4, 6, 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_does_not_matter() -> None:
    data = encode(Image.new("RGB", (8, 8), (200, 10, 10)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode_image(data, 8, 8, 3).shape == (8, 8, 3)


def test_a_large_jpeg_is_shrunk_faithfully() -> None:
    """The fast path through a smaller decoding stays close to decoding it whole and averaging blocks."""
    y, x = np.mgrid[0:512, 0:512]
    smooth = np.stack([128 + 100 * np.sin(x / 60), 128 + 100 * np.cos(y / 50), (x + y) / 4], axis=2)
    data = encode(Image.fromarray(smooth.astype(np.uint8)), "JPEG", quality=95)
    blocks = smooth.reshape(32, 16, 32, 16, 3).mean(axis=(1, 3))
    assert np.abs(decode_image(data, 32, 32, 3)[1:-1, 1:-1] - blocks[1:-1, 1:-1]).max() < 8


@given(data=st.binary(max_size=200), seed=st.integers(0, 2**32 - 1), form=st.sampled_from(FORMATS))
@settings(max_examples=200, deadline=None)
def test_damage_is_a_data_error_or_an_image(data: bytes, seed: int, form: str) -> None:
    """No bytes make the decoder raise anything else."""
    random = np.random.default_rng(seed)
    whole = bytearray(encode(Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)), form))
    position = int(random.integers(len(whole)))
    whole[position : position + len(data)] = data
    for damaged in (data, bytes(whole), bytes(whole[:position])):
        try:
            assert decode_image(damaged, 5, 5, 3).shape == (5, 5, 3)
        except DataError as error:
            assert "\n" not in str(error)


# ---- splits


@given(st.binary(min_size=32, max_size=32), st.sampled_from((None, "train")))
def test_splits_follow_the_first_eight_bytes(sha256: bytes, given_split: str | None) -> None:
    value = int(sha256.hex()[:16], 16) / 16**16
    alone = "test" if value < 0.2 else "val" if value < 0.2 + 0.1 else "train"
    assert split_of(sha256, given_split, set()) == alone
    assert split_of(sha256, given_split, {"test"}) == ("val" if value < 0.1 else "train")
    assert split_of(sha256, given_split, {"val"}) == ("test" if value < 0.2 else "train")
    assert split_of(sha256, given_split, {"val", "test"}) == "train"
    assert split_of(sha256, "val", set()) == "val"
    assert split_of(sha256, "test", set()) == "test"


# ---- .npz files


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@given(
    count=st.integers(60, 90),
    shape=st.sampled_from([(3, 4), (3, 4, 1), (5, 2, 3)]),
    compress=st.booleans(),
    named=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_images_and_labels(
    tmp_path_factory: pytest.TempPathFactory, count: int, shape: tuple[int, ...], compress: bool, named: bool
) -> None:
    tmp_path = tmp_path_factory.mktemp("npz")
    images, labels = pixels(count, *shape), np.arange(count, dtype=np.uint8) % 3
    classes = {"classes": np.array(["c", "a", "b"])} if named else {}
    (np.savez_compressed if compress else np.savez)(tmp_path / "x.npz", images=images, labels=labels, **classes)
    dataset = load(str(tmp_path / "x.npz"), data_dir=tmp_path / "data")
    assert np.array_equal(dataset.images_NHWC, images.reshape(count, shape[0], shape[1], -1))
    assert [dataset.classes[label] for label in dataset.labels_N] == [("cab" if named else "012")[n] for n in labels]
    for row in range(count):
        value = int(hashlib.sha256(images[row].tobytes()).hexdigest()[:16], 16) / 16**16
        assert row in dataset.rows["test" if value < 0.2 else "val" if value < 0.3 else "train"]


def test_labels_may_be_text_or_have_gaps(tmp_path: Path) -> None:
    images, labels = pixels(60, 2, 2), np.arange(60) % 2
    text = npz(tmp_path / "text.npz", images=images, labels=np.array(["x y", "b"])[labels])
    assert load(text, data_dir=tmp_path).classes == ("b", "x y")
    gaps = npz(tmp_path / "gaps.npz", images=images, labels=np.array([[-3], [70]])[labels])
    dataset = load(gaps, data_dir=tmp_path)
    assert dataset.classes == ("-3", "70")
    assert np.array_equal(dataset.labels_N, labels)


@pytest.mark.parametrize("with_val", [True, False])
def test_official_parts(tmp_path: Path, with_val: bool) -> None:
    arrays = {"x_train": pixels(80, 4, 4), "y_train": np.arange(80) % 2}
    arrays |= {"x_test": pixels(10, 4, 4, seed=1), "y_test": np.arange(10) % 2}
    if with_val:
        arrays |= {"x_val": pixels(6, 4, 4, seed=2), "y_val": np.arange(6) % 2}
    dataset = load(npz(tmp_path / "keras.npz", **arrays), data_dir=tmp_path)
    assert np.array_equal(dataset.images_NHWC[dataset.rows["test"]][..., 0], arrays["x_test"])
    if with_val:
        assert np.array_equal(dataset.images_NHWC[dataset.rows["val"]][..., 0], arrays["x_val"])
        assert np.array_equal(dataset.images_NHWC[dataset.rows["train"]][..., 0], arrays["x_train"])
    else:
        assert 0 < len(dataset.rows["val"]) < 25
        assert len(dataset.rows["val"]) + len(dataset.rows["train"]) == 80


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    classes = np.array(["a", "ghost", "b"])
    path = npz(tmp_path / "x.npz", images=pixels(60, 2, 2), labels=np.arange(60) % 2 * 2, classes=classes)
    with pytest.raises(DataError, match="'ghost' has no images"):
        load(path, data_dir=tmp_path)
    dataset = load(path, data_dir=tmp_path, on_error="skip")
    assert dataset.classes == ("a", "b")
    assert set(dataset.labels_N.tolist()) == {0, 1}


def test_another_image_size(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", images=pixels(60, 8, 8), labels=np.arange(60) % 2)
    own, small = load(path, data_dir=tmp_path), load(path, data_dir=tmp_path, image_size=4)
    assert small.images_NHWC.shape == (60, 4, 4, 1)
    assert small.digest == own.digest
    assert all(np.array_equal(small.rows[split], own.rows[split]) for split in own.rows)
    expected = np.asarray(Image.fromarray(own.images_NHWC[7, :, :, 0]).resize((4, 4), Image.Resampling.BILINEAR))
    assert np.array_equal(small.images_NHWC[7, :, :, 0], expected)


GOOD: dict[str, Any] = {"images": pixels(60, 4, 4), "labels": np.arange(60) % 2}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": GOOD["images"]}, "holds the arrays ['images']"),
        ({**GOOD, "images": GOOD["images"].astype(np.float32)}, "images is float32 [60, 4, 4]; expected uint8"),
        ({**GOOD, "images": pixels(60, 4)}, "images is uint8 [60, 4]"),
        ({**GOOD, "images": pixels(60, 4, 4, 2)}, "C 1 or 3"),
        ({**GOOD, "images": np.asfortranarray(GOOD["images"])}, "Fortran order"),
        ({**GOOD, "labels": np.arange(59) % 2}, "60 images but 59 labels"),
        ({**GOOD, "labels": np.eye(60)}, "labels is float64 [60, 60]"),
        ({**GOOD, "labels": np.zeros(60, dtype=int)}, "at least 2 classes"),
        ({**GOOD, "classes": np.array(["a"])}, "with 1 classes the labels must be 0 to 0"),
        ({**GOOD, "classes": np.array(["a", "a"])}, "expected different texts"),
        ({**GOOD, "labels": np.array([{}] * 60)}, "cannot be read as an .npz file"),
        ({**GOOD, "images": np.array([{}] * 60)}, "images is object"),
        ({"images": pixels(0, 4, 4), "labels": np.arange(0)}, "N > 0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        load(npz(tmp_path / "x.npz", **arrays), data_dir=tmp_path / "data")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    whole = Path(npz(tmp_path / "whole.npz", **GOOD)).read_bytes()
    cut, flipped, text = tmp_path / "cut.npz", tmp_path / "flipped.npz", tmp_path / "text.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    flipped.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    text.write_text("hello")
    for path in (cut, flipped, text):
        with pytest.raises(DataError, match=r"cannot be read as an \.npz file"):
            load(str(path), data_dir=tmp_path / "data")


def test_a_damaged_archive_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    """One bit of the whole is wrong; where it matters to nobody, as in a date, the archive is read."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=pixels(60, 4, 4), labels=np.arange(60) % 2)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), len(whole) // 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        for read in (
            lambda: load(str(path), data_dir=tmp_path / f"data {place}"),  # noqa: B023 - called at once
            lambda: list(read_batches(str(path), (4, 4, 1), 8)),
        ):
            try:
                read()
            except DataError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 150
