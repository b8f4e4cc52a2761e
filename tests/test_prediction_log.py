"""The prediction log of one worker: rows, kept images, and places that are away, full or in the way."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_data_statistics import by_hand
from test_serving_limits import until

from conftest import missing
from data_loader.images import encode_png
from data_loader.statistics import STATISTICS, image_statistics
from data_loader.store import FolderStore
from serving import prediction_log, spool
from serving.feedback import Feedback
from serving.ids import new_ids, predicted_class
from serving.metrics import Metrics
from serving.model import ServedModel
from serving.prediction_log import Answered, Place, PredictionLog, Rules
from serving.room import Room

SHAPE, CLASSES = (6, 5, 3), ("a", "Ünï", "漢")
TEXT, FLOAT, FLOATS = pa.string(), pa.float32(), pa.list_(pa.float32())
TIME = pa.timestamp("us", tz="UTC")
PREDICTIONS = pa.schema(
    {
        "id": TEXT,
        "time": TIME,
        "model": TEXT,
        "version": TEXT,
        "brightness": FLOAT,
        "contrast": FLOAT,
        "sharpness": FLOAT,
        "clipped": FLOAT,
        "embedding": FLOATS,
        "class": TEXT,
        "confidence": FLOAT,
        "probabilities": FLOATS,
        "latency_ms": FLOAT,
        "image": TEXT,
        "kept": TEXT,
    }
)
NOON = datetime(2026, 3, 4, 12, tzinfo=UTC).timestamp()
Put = Callable[[Path, str], None]


class FirstNumber:
    """Far is what has a first number beyond 2 or -2."""

    threshold = 2.0

    def to(self, embeddings_NE: np.ndarray) -> np.ndarray:
        return np.abs(embeddings_NE[:, 0])


def model(version: str = "1", classes: tuple[str, ...] = CLASSES, distances: FirstNumber | None = None) -> ServedModel:
    return ServedModel("m", version, classes, SHAPE, lambda images_NHWC: images_NHWC, distances=distances)


MODEL = model()


def answered(count: int, seed: int = 0, of: ServedModel = MODEL, scale: float = 1) -> Answered:
    """A request with `count` random images, logits and embeddings; `scale` makes the model surer."""
    random = np.random.default_rng(seed)
    logits_NK = (scale * random.normal(size=(count, len(of.classes)))).astype(np.float32)
    return Answered(
        ids=new_ids(logits_NK.argmax(axis=1)),
        time_s=NOON,
        latency_ms=seed + 0.5,
        model=of,
        images_NHWC=random.integers(0, 256, (count, *SHAPE), dtype=np.uint8),
        logits_NK=logits_NK,
        embeddings_NE=random.normal(size=(count, 4)).astype(np.float32),
    )


def open_log(
    folder: Path, rules: Rules | None = None, *, put: Put | None = None, most_bytes: int = 2**20
) -> PredictionLog:
    """The log of a worker, in a folder; `most_bytes` of images."""
    store = FolderStore(folder)
    store.spool.mkdir(parents=True, exist_ok=True)
    room = Room(store.spool, most_bytes)
    room.set(store.size("images"))
    place = Place(store.spool, put or store.put, image_statistics, STATISTICS, encode_png, room.take)
    return PredictionLog(place, rules or Rules(keep_images=False), Metrics())


def rows(folder: Path, table: str = "predictions") -> list[dict[str, Any]]:
    """All rows in all files."""
    return [row for path in sorted((folder / table).glob("day=*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def value(log: PredictionLog, name: str, **labels: str) -> float:
    """A sample of the log's metrics."""
    return log._metrics._registry.get_sample_value(name, labels) or 0


def unsent(folder: Path) -> list[str]:
    return sorted(path.name for path in FolderStore(folder).spool.iterdir() if not path.name.startswith("."))


def test_a_row_says_all_of_an_answer(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    requests = [answered(count, seed, scale=3) for seed, count in enumerate((1, 3, 2))]
    for request in requests:
        log.add(request)
    log.close()
    (path,) = (tmp_path / "predictions").glob("day=*/*")
    assert path.parent.name == "day=2026-03-04"
    table = pq.read_table(path, partitioning=None)
    assert table.schema.remove_metadata().equals(PREDICTIONS)
    assert json.loads(table.schema.metadata[b"classes"]) == list(CLASSES)
    found = iter(table.to_pylist())
    for request in requests:
        shares_NK = torch.softmax(torch.from_numpy(request.logits_NK).double(), 1).numpy()
        for place, prediction_id in enumerate(request.ids):
            row = next(found)
            assert (row["id"], row["model"], row["version"], row["image"], row["kept"]) == (
                prediction_id,
                "m",
                "1",
                "",
                "",
            )
            assert (row["time"].timestamp(), row["latency_ms"]) == (NOON, request.latency_ms)
            statistics = [row[name] for name in ("brightness", "contrast", "sharpness", "clipped")]
            np.testing.assert_allclose(statistics, by_hand(request.images_NHWC[place]), rtol=1e-4, atol=1e-4)
            assert row["embedding"] == request.embeddings_NE[place].tolist()
            np.testing.assert_allclose(row["probabilities"], shares_NK[place], atol=1e-6)
            label = int(shares_NK[place].argmax())
            assert (row["class"], predicted_class(row["id"])) == (CLASSES[label], label)
            assert row["confidence"] == pytest.approx(shares_NK[place].max(), abs=1e-6)
    assert next(found, None) is None
    pixels = np.concatenate([request.images_NHWC.reshape(-1) for request in requests])
    assert value(log, "serving_image_statistic_total", statistic="brightness") == pytest.approx(6 * pixels.mean())
    assert (value(log, "serving_measured_images_total"), value(log, "serving_compared_images_total")) == (6, 0)
    assert value(log, "serving_log_rows_total", table="predictions") == 6
    assert value(log, "serving_log_waiting_rows") == value(log, "serving_log_unsent_files") == 0
    assert unsent(tmp_path) == []


def test_feedback_has_a_table_of_its_own(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    (prediction_id,) = new_ids(np.array([2]))
    log.add_feedback([Feedback(prediction_id, "漢", 2.5, True), Feedback(prediction_id, "a", None, False)], NOON)
    log.close()
    (path,) = (tmp_path / "feedback").glob("day=2026-03-04/*")
    table = pq.read_table(path, partitioning=None)
    assert table.schema.equals(pa.schema({"id": TEXT, "time": TIME, "label": TEXT, "value": pa.float64()}))
    assert [(row["id"], row["label"], row["value"]) for row in table.to_pylist()] == [
        (prediction_id, "漢", 2.5),
        (prediction_id, "a", None),
    ]
    assert not (tmp_path / "predictions").exists()


def test_models_share_no_file_and_no_file_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_log, "FILE_ROWS", 10)
    log = open_log(tmp_path)
    first, second = model(), model("2", ("x", "y"))
    requests = [answered(3, seed, of=first if seed % 3 else second) for seed in range(40)]
    for request in requests:
        log.add(request)
    log.close()
    sizes, seen = [], {}
    for path in (tmp_path / "predictions").glob("day=*/*"):
        table = pq.read_table(path, partitioning=None)
        sizes.append(len(table))
        (version,) = set(table["version"].to_pylist())
        assert json.loads(table.schema.metadata[b"classes"]) == list({"1": first, "2": second}[version].classes)
        seen |= dict.fromkeys(table["id"].to_pylist(), version)
    assert max(sizes) < 10 + 3
    assert seen == {each: request.model.version for request in requests for each in request.ids}


def test_images_are_kept_by_the_first_rule_that_wants_them(tmp_path: Path) -> None:
    log = open_log(tmp_path, Rules(share=0.25, below=0.7))
    request = answered(1000, of=model(distances=FirstNumber()), scale=3)
    request.embeddings_NE *= 2
    log.add(request)
    log.close()
    confidences_N = torch.softmax(torch.from_numpy(request.logits_NK).double(), 1).max(dim=1).values.numpy()
    far_N = np.abs(request.embeddings_NE[:, 0]) > 2
    counts = dict.fromkeys(("", "sampled", "uncertain", "far"), 0)
    for place, row in enumerate(rows(tmp_path)):
        counts[row["kept"]] += 1
        if row["kept"] != "sampled":
            expected = "uncertain" if confidences_N[place] < 0.7 else "far" if far_N[place] else ""
            assert row["kept"] == expected
        assert row["image"] == (f"images/day=2026-03-04/{row['id']}.png" if row["kept"] else "")
        if row["kept"]:
            with Image.open(tmp_path / row["image"]) as image:
                assert image.format == "PNG"
                np.testing.assert_array_equal(np.asarray(image), request.images_NHWC[place])
    assert abs(counts["sampled"] - 250) < 5 * np.sqrt(1000 * 0.25 * 0.75)
    assert min(counts.values()) > 10
    for rule in ("sampled", "uncertain", "far"):
        assert value(log, "serving_kept_images_total", rule=rule) == counts[rule]
    assert value(log, "serving_kept_image_bytes_total") == FolderStore(tmp_path).size("images")
    assert value(log, "serving_far_images_total") == far_N.sum()
    assert value(log, "serving_compared_images_total") == 1000
    distances = np.abs(request.embeddings_NE[:, 0]).sum() / 2
    assert value(log, "serving_reference_distance_total") == pytest.approx(distances, rel=1e-4)


def test_with_keep_images_false_no_pixel_is_written(tmp_path: Path) -> None:
    log = open_log(tmp_path, Rules(keep_images=False, share=1, below=1))
    request = answered(50, of=model(distances=FirstNumber()))
    log.add(request)
    log.close()
    assert {(row["image"], row["kept"]) for row in rows(tmp_path)} == {("", "")}
    assert not list(tmp_path.rglob("*.png"))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(image.tobytes() in written for image in request.images_NHWC)


def test_all_workers_together_keep_no_more_than_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_bytes = len(encode_png(answered(1).images_NHWC[0]))
    limit = 100 * image_bytes
    earlier = tmp_path / "images" / "day=2026-03-03"
    earlier.mkdir(parents=True)
    (earlier / "kept.png").write_bytes(bytes(20 * image_bytes))
    logs = [open_log(tmp_path, Rules(share=1), most_bytes=limit) for _ in range(3)]
    for seed, log in enumerate(logs):
        log.add(answered(60, seed))
    for closing in [threading.Thread(target=log.close) for log in logs]:
        closing.start()
    until(lambda: not any(log._thread.is_alive() for log in logs))
    until(lambda: not unsent(tmp_path))
    kept = FolderStore(tmp_path).size("images")
    assert limit - 2 * image_bytes < kept <= limit
    found = rows(tmp_path)
    assert len(found) == 180
    assert sum(row["kept"] == "sampled" for row in found) == len(list(tmp_path.rglob("*.png"))) - 1
    assert 1 <= caplog.text.count("keep_mb is used up") <= 3


def test_an_image_that_finds_room_again_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While there is none, images are not even encoded."""
    monkeypatch.setattr(prediction_log, "FILE_AGE_S", 0.02)
    monkeypatch.setattr(prediction_log, "ASK_AGAIN_S", 0.05)
    log = open_log(tmp_path, Rules(share=1), most_bytes=0)
    room, encoded = Room(tmp_path / ".unsent", 10**6), []
    place = log._place
    log._place = replace(place, encode=lambda image_HWC: encoded.append(1) or place.encode(image_HWC))
    log.add(answered(1000))
    until(lambda: len(rows(tmp_path)) == 1000)
    assert len(encoded) < 100
    log._place = replace(place, room=room.take)
    log.add(answered(3, seed=1))
    until(lambda: len(rows(tmp_path)) == 1003)
    until(lambda: log._room_again_s < time.monotonic())
    log.add(answered(4, seed=2))
    log.close()
    assert 4 <= len(list(tmp_path.rglob("*.png"))) <= 7
    assert caplog.text.count("keep_mb is used up") == 1


def test_room_that_someone_makes_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.room.EVERY_S", 0.02)
    old, rooms = tmp_path / "old.png", [Room(tmp_path, 1000) for _ in range(2)]
    assert not rooms[0].take(1), "nobody has looked yet"
    old.write_bytes(bytes(900))
    rooms[0].watch(lambda: sum(path.stat().st_size for path in tmp_path.glob("*.png")))
    assert rooms[0].take(60)
    assert not rooms[1].take(950)
    old.unlink()
    until(lambda: rooms[1].take(950))


def test_what_cannot_be_measured_at_the_start_is_told(tmp_path: Path) -> None:
    def measure() -> int:
        raise PermissionError("not yours")

    with pytest.raises(PermissionError, match="not yours"):
        Room(tmp_path, 1000).watch(measure)
    assert not Room(tmp_path, 1000).take(1)


class Away:
    """A store that is away until it is back."""

    def __init__(self, folder: Path) -> None:
        self.away, self.attempts, self._store = True, 0, FolderStore(folder)

    def put(self, path: Path, name: str) -> None:
        self.attempts += 1
        if self.away:
            raise ConnectionError("nobody\nthere")
        self._store.put(path, name)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A log that writes and tries again at once."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(prediction_log, "FILE_AGE_S", 0.02)
    monkeypatch.setattr(spool, "PAUSES_S", (0.02, 0.05))


@pytest.mark.usefixtures("hurried")
def test_a_store_that_is_away_gets_everything_when_it_is_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away = Away(tmp_path)
    log = open_log(tmp_path, Rules(share=0.5), put=away.put)
    requests = [answered(10, seed) for seed in range(10)]
    for request in requests[:5]:
        log.add(request)
    until(lambda: away.attempts > 5 and value(log, "serving_log_waiting_rows") == 0)
    assert value(log, "serving_log_unsent_files") == len(unsent(tmp_path)) > 0
    assert value(log, "serving_log_failures_total") > 2
    assert rows(tmp_path) == []
    away.away = False
    for request in requests[5:]:
        log.add(request)
    until(lambda: len(rows(tmp_path)) == 100)
    log.close()
    assert sorted(row["id"] for row in rows(tmp_path)) == sorted(each for request in requests for each in request.ids)
    assert {row["image"] for row in rows(tmp_path)} - {""} == set(FolderStore(tmp_path).names("images"))
    assert caplog.text.count("nobody there; files wait in") == 1
    assert caplog.text.count("everything is at its place again") == 1
    assert unsent(tmp_path) == []
    assert value(log, "serving_log_dropped_rows_total", table="predictions") == 0


@pytest.mark.usefixtures("hurried")
def test_what_a_stop_leaves_on_the_disk_the_next_start_brings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away = Away(tmp_path)
    first = open_log(tmp_path, Rules(share=1), put=away.put)
    request = answered(10)
    first.add(request)
    first.close()
    assert f"11 files stay in {FolderStore(tmp_path).spool}" in caplog.text
    assert rows(tmp_path) == []
    half = FolderStore(tmp_path).spool / "predictions+day=2026-03-04+x.parquet.tmp"
    half.write_bytes(b"of a process that was killed")
    away.away = False
    second = open_log(tmp_path, put=away.put)
    until(lambda: len(unsent(tmp_path)) == 1)
    second.close()
    assert [row["id"] for row in rows(tmp_path)] == request.ids
    assert len(list((tmp_path / "images").rglob("*.png"))) == 10


def test_a_start_takes_no_harm_from_a_file_that_another_worker_brings(tmp_path: Path) -> None:
    """It was listed and is gone: here a link that leads nowhere."""
    folder = FolderStore(tmp_path).spool
    folder.mkdir(parents=True)
    (folder / "predictions+day=2026-03-04+gone.parquet").symlink_to("gone")
    (folder / "predictions+day=2026-03-04+there.parquet").write_bytes(b"x")
    brought: list[str] = []
    spool.Spool(folder, lambda path, name: brought.append(name), lambda files: None, lambda: None).close()
    assert brought == ["predictions/day=2026-03-04/there.parquet"]


def test_a_stop_while_the_store_is_away_brings_tables_before_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come back for a moment only."""
    monkeypatch.setattr(prediction_log, "FILE_AGE_S", 0.02)
    monkeypatch.setattr(spool, "PAUSES_S", (60,))
    away, order = Away(tmp_path), []

    def put(path: Path, name: str) -> None:
        order.append(name)
        away.put(path, name)

    log = open_log(tmp_path, Rules(share=1), put=put)
    log.add(answered(100))
    until(lambda: value(log, "serving_log_failures_total") == 1 and len(unsent(tmp_path)) == 101)
    assert all(name.startswith("images/") for name in order)
    order.clear()
    log.close()
    assert any(name.startswith("predictions/") for name in order[: spool.AT_ONCE])


@pytest.mark.usefixtures("hurried")
def test_too_much_on_the_disk_is_dropped_counted_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "MOST_BYTES", 20_000)
    log = open_log(tmp_path, put=Away(tmp_path).put)
    for seed in range(40):
        log.add(answered(10, seed))
        until(lambda: value(log, "serving_log_waiting_rows") == 0)
        log.observe()

    def counted() -> list[float]:
        return [value(log, f"serving_log_{name}_total", table="predictions") for name in ("rows", "dropped_rows")]

    until(lambda: sum(counted()) == 400)
    assert min(counted()) >= 10
    assert sum(path.stat().st_size for path in FolderStore(tmp_path).spool.iterdir()) < 20_000 + 10_000
    assert caplog.text.count("rows are lost") == 1
    log.close()


def test_more_than_the_memory_may_hold_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = answered(10)
    monkeypatch.setattr(prediction_log, "MOST_WAITING_BYTES", 5 * request.bytes)
    log = open_log(tmp_path)
    for _ in range(20):  # nothing is taken away yet: a file is not full, and five seconds are not over
        log.add(request)
    log.close()
    assert value(log, "serving_log_dropped_rows_total", table="predictions") == 140
    assert len(rows(tmp_path)) == 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        missing("no right to mount a disk of memory (mount -t tmpfs)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path


@pytest.mark.usefixtures("hurried")
def test_rows_wait_for_room_on_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(small_disk, Rules(share=0.5))
    filler = fill(small_disk)
    requests = [answered(10, seed) for seed in range(5)]
    for request in requests:
        log.add(request)
    until(lambda: value(log, "serving_log_failures_total") > 10)
    until(lambda: value(log, "serving_log_waiting_rows") == 50)
    assert caplog.text.count("No space left on device") == 1
    filler.unlink()
    until(lambda: len(rows(small_disk)) == 50)
    log.close()
    assert caplog.text.count("this machine's disk takes files again") == 1
    assert sorted(row["id"] for row in rows(small_disk)) == sorted(each for r in requests for each in r.ids)
    assert unsent(small_disk) == []


@pytest.mark.usefixtures("hurried")
def test_tables_that_find_no_room_are_dropped_the_oldest_first(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_log, "MOST_UNWRITTEN_BYTES", 10_000)
    log = open_log(small_disk)
    fill(small_disk)
    for seed in range(20):
        log.add(answered(10, seed))
        until(lambda seed=seed: log._taken_rows == 10 * seed + 10)
    waiting = value(log, "serving_log_waiting_rows")
    dropped = value(log, "serving_log_dropped_rows_total", table="predictions")
    assert waiting + dropped == 200
    assert min(waiting, dropped) >= 10
    log.close()
    assert value(log, "serving_log_dropped_rows_total", table="predictions") == 200


def test_ids_are_random_uuids_with_their_class() -> None:
    ids = new_ids(np.arange(300))
    assert len({each[:32] for each in ids}) == 300
    for label, each in enumerate(ids):
        assert uuid.UUID(each[:32]).version == 4
        assert uuid.UUID(each[:32]).variant == uuid.RFC_4122
        assert predicted_class(each) == label
    bits = np.array([[int(digit, 16) >> bit & 1 for digit in each[:32] for bit in range(4)] for each in ids]).mean(
        axis=0
    )
    assert (((bits > 0.3) & (bits < 0.7)) | np.isin(np.arange(128) // 4, (12, 16))).all()
    for wrong in ("", ids[0][:32], ids[0].upper().replace("-", "x"), ids[0] + " ", "x" + ids[0], ids[0][:33] + "01"):
        assert predicted_class(wrong) is None


def test_a_file_of_the_log_is_whole_or_not_there(tmp_path: Path) -> None:
    """A reader that looks at it all the time never meets half a table."""
    log, stopped, wrong = open_log(tmp_path), threading.Event(), []

    def read() -> None:
        while not stopped.is_set():
            for path in (tmp_path / "predictions").glob("day=*/*"):
                try:
                    pq.read_table(io.BytesIO(path.read_bytes()))
                except Exception as error:
                    wrong.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    for seed in range(30):
        log.add(answered(100, seed))
    log.close()
    stopped.set()
    reading.join()
    assert wrong == []
    assert len(rows(tmp_path)) == 3000
