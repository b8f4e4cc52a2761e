"""Reading the prediction log: which rows a window holds, feedback, logs that cannot be read; in a folder and on S3."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prediction_logs import NOON, SCHEMA, some_rows, write_feedback, write_log
from s3_server import S3Server
from scipy import stats

from data_loader import DataError
from data_loader.store import open_store
from monitoring import MonitoringError
from monitoring.prediction_log import Window, read_feedback, read_window
from monitoring.window import recent

HOUR = timedelta(hours=1)


def window(log: Path | str, since: datetime = NOON, until: datetime = NOON + HOUR, **others: str) -> Window:
    return read_window(open_store(str(log)), since, until, **others)


def test_a_window_holds_the_rows_of_its_time_in_order_from_every_file(tmp_path: Path) -> None:
    rows = some_rows(30, step_s=60)
    for part in (rows[20:], rows[:10], rows[10:20]):
        write_log(tmp_path, part)
    found = window(tmp_path, NOON + 5 * timedelta(minutes=1), NOON + 25 * timedelta(minutes=1))
    assert list(found.ids) == [row["id"] for row in rows[5:25]], "since is in the window, until is not"
    assert found.classes == ("a", "b")
    assert [found.classes[place] for place in found.predicted_N] == [row["class"] for row in rows[5:25]]
    statistics = [[row[name] for name in ("brightness", "contrast", "sharpness", "clipped")] for row in rows[5:25]]
    np.testing.assert_allclose(found.statistics_NS, statistics, rtol=1e-6)
    np.testing.assert_allclose(found.embeddings_NE, [row["embedding"] for row in rows[5:25]], rtol=1e-6)
    np.testing.assert_allclose(found.probabilities_NK, [row["probabilities"] for row in rows[5:25]], rtol=1e-6)
    np.testing.assert_allclose(found.confidence_N, [row["confidence"] for row in rows[5:25]], rtol=1e-6)
    assert found.times_N[0].item() == rows[5]["time"].replace(tzinfo=None)


def test_rows_of_the_wrong_day_in_a_file_are_found(tmp_path: Path) -> None:
    """A file begun before midnight may be written after it."""
    midnight = datetime(2026, 3, 15, tzinfo=UTC)
    rows = some_rows(4, start=midnight - timedelta(seconds=2))
    write_log(tmp_path, rows)
    assert list(window(tmp_path, midnight, midnight + HOUR).ids) == [rows[2]["id"], rows[3]["id"]]
    assert list(window(tmp_path, midnight - HOUR, midnight).ids) == [rows[0]["id"], rows[1]["id"]]


def test_files_of_other_days_are_not_opened(tmp_path: Path) -> None:
    write_log(tmp_path, some_rows(3))
    broken = tmp_path / "predictions" / "day=2026-01-01" / "x.parquet"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no Parquet")
    (broken.parent.parent / "day=2026-03-14" / ".half.parquet").write_bytes(b"still being written")
    assert len(window(tmp_path)) == 3


def test_models_and_versions_are_told_apart(tmp_path: Path) -> None:
    write_log(tmp_path, some_rows(3, version="1"))
    write_log(tmp_path, some_rows(4, version="2"))
    write_log(tmp_path, some_rows(5, model="other"))
    everything = window(tmp_path)
    assert (len(everything), everything.models, everything.versions) == (12, ("digits", "other"), ("1", "2"))
    assert len(window(tmp_path, model="digits", version="2")) == 4
    assert len(window(tmp_path, model="digits", version="3")) == 0


def test_rows_with_an_image_can_be_had_alone(tmp_path: Path) -> None:
    rows = some_rows(5)
    for number in (1, 4):
        rows[number] |= {"image": f"images/day=2026-03-14/{number}.png", "kept": "sampled"}
    write_log(tmp_path, rows)
    found = read_window(open_store(str(tmp_path)), NOON, NOON + HOUR, with_image=True)
    assert found.ids == (rows[1]["id"], rows[4]["id"])
    assert found.images == (rows[1]["image"], rows[4]["image"])


def test_of_a_long_window_all_that_is_known_of_some_rows_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a retraining looks at: an even choice of the rows, and those with an image or a label."""
    monkeypatch.setattr("monitoring.window.MOST_ROWS", 100)
    now = datetime.now(UTC)
    rows = some_rows(1000, start=now - HOUR)
    for number in range(0, 1000, 50):
        rows[number] |= {"image": f"images/{number}.png", "kept": "uncertain"}
    write_log(tmp_path, rows)
    told = range(0, 1000, 125)
    write_feedback(tmp_path, [{"id": rows[row]["id"], "time": now, "label": "a", "value": None} for row in told])
    window, known, feedback = recent(open_store(str(tmp_path)), 2.0, model="digits", version="1")
    assert (window.counted(), 50 <= len(window) <= 100) == (1000, True)
    assert known.ids == tuple(rows[row]["id"] for row in range(1000) if row % 50 == 0 or row in told)
    assert [known.ids[row] for row in feedback.rows_F] == [rows[row]["id"] for row in told]


def test_a_log_without_rows_in_the_window_gives_none(tmp_path: Path) -> None:
    write_log(tmp_path, some_rows(3))
    for empty in (window(tmp_path, NOON - HOUR, NOON), window(tmp_path, model="gone")):
        assert (len(empty), empty.classes, empty.ids) == (0, (), ())
    assert len(window(tmp_path / "predictions")) == 0, "a folder without the log's folders"
    with pytest.raises(DataError, match=r"gone' is no folder; give an existing folder or s3://"):
        window(tmp_path / "gone")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"embedding": [1.0]}, "embedding has rows of 1, 3 numbers; rows of several models[?] give the version"),
        ({"class": "c"}, "holds the class 'c', which is none of a, b"),
        ({"probabilities": [0.2, 0.3, 0.5]}, "probabilities has rows of 2, 3 numbers"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    rows = some_rows(3)
    write_log(tmp_path, [*rows[:2], rows[2] | change])
    with pytest.raises(MonitoringError, match=told):
        window(tmp_path)


def test_of_a_long_window_an_even_choice_is_held(tmp_path: Path) -> None:
    rows = some_rows(1000)
    for start in range(0, 1000, 100):
        write_log(tmp_path, rows[start : start + 100])
    store, until = open_store(str(tmp_path)), NOON + HOUR
    everything = read_window(store, NOON, until, most=1000)
    assert len(everything) == everything.total == everything.counted() == 1000
    some = read_window(store, NOON, until, most=300)
    assert (some.total, some.counted()) == (1000, 1000)
    assert 150 < len(some) <= 300
    assert [name for name in everything.ids if name in set(some.ids)] == list(some.ids), "in order of time"
    places = np.flatnonzero(np.isin(everything.ids, some.ids))
    assert stats.kstest(places, stats.uniform(0, 1000).cdf).pvalue > 0.001, "evenly spread"
    assert read_window(store, NOON, until, most=300).ids == some.ids


def test_a_name_does_not_lead_out_of_the_log(tmp_path: Path) -> None:
    """Names of images come out of the log's own files."""
    (tmp_path / "secret").write_text("x")
    (tmp_path / "log").mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(DataError, match="lies outside"):
            open_store(str(tmp_path / "log")).read(name)
    with pytest.raises(DataError, match="gone cannot be read: No such file"):
        open_store(str(tmp_path / "log")).read("gone")


def test_missing_numbers_are_nan_and_not_an_end(tmp_path: Path) -> None:
    rows = some_rows(3)
    rows[1] |= {"embedding": None, "brightness": None, "probabilities": None}
    write_log(tmp_path, rows)
    found = window(tmp_path)
    assert np.isnan(found.embeddings_NE).tolist() == [[row == 1] * 3 for row in range(3)]
    assert np.isnan(found.probabilities_NK).any(axis=1).tolist() == [False, True, False]
    assert np.isnan(found.statistics_NS).sum() == 1
    np.testing.assert_allclose(found.embeddings_NE[2], rows[2]["embedding"], rtol=1e-6)


def test_files_that_are_no_log_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_log(tmp_path, some_rows(3))
    name = path.relative_to(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(MonitoringError, match=rf"log file {name} cannot be read: .*; remove or repair it") as error:
        window(tmp_path)
    assert "\n" not in str(error.value)
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("prediction_logs.SCHEMA", SCHEMA.remove(SCHEMA.get_field_index("confidence")))
        path = write_log(tmp_path, some_rows(3))
    with pytest.raises(MonitoringError, match=r"has no column 'confidence'; its columns: id, time"):
        window(tmp_path)
    path.unlink()
    write_log(tmp_path, some_rows(3), classes=())
    with pytest.raises(MonitoringError, match="does not name its classes"):
        window(tmp_path)


def test_versions_with_other_classes_are_not_mixed(tmp_path: Path) -> None:
    write_log(tmp_path, some_rows(3))
    write_log(tmp_path, some_rows(3, ("a", "c"), version="2"), ("a", "c"))
    with pytest.raises(MonitoringError, match="name different classes; give the version to look at"):
        window(tmp_path)
    assert window(tmp_path, version="2").classes == ("a", "c")


def test_the_last_word_of_feedback_counts_and_only_for_the_window(tmp_path: Path) -> None:
    rows = some_rows(5)
    write_log(tmp_path, rows)
    later = NOON + timedelta(days=40)

    def said(row: int, label: str, value: float | None = None, hours: int = 0) -> dict[str, Any]:
        return {"id": rows[row]["id"], "time": later + hours * HOUR, "label": label, "value": value}

    write_feedback(tmp_path, [said(3, "b", 2.5, hours=2), said(1, "a")])
    write_feedback(tmp_path, [said(3, "a", None, hours=1), {**said(0, "a"), "id": "somebody else's"}])
    write_feedback(tmp_path, [said(4, "a class of the future", -1.0)])
    found = read_feedback(open_store(str(tmp_path)), window(tmp_path))
    assert found.rows_F.tolist() == [1, 3, 4]
    assert found.labels == ("a", "b", "a class of the future")
    assert found.right_F.tolist() == [rows[1]["class"] == "a", rows[3]["class"] == "b", False]
    np.testing.assert_array_equal(found.values_F, [np.nan, 2.5, -1.0])
    nothing = read_feedback(open_store(str(tmp_path)), window(tmp_path, NOON - HOUR, NOON))
    assert (len(nothing.rows_F), nothing.labels) == (0, ())


def test_the_same_log_is_read_from_s3(tmp_path: Path, s3: S3Server) -> None:
    rows = some_rows(6)
    write_log(tmp_path, rows)
    write_feedback(tmp_path, [{"id": rows[2]["id"], "time": NOON, "label": "a", "value": None}])
    bucket = s3.new_bucket()
    for path in tmp_path.rglob("*.parquet"):
        s3.client().upload_file(str(path), bucket, f"live/log/{path.relative_to(tmp_path)}")
    address = f"s3://{bucket}/live/log"
    there, here = window(address), window(tmp_path)
    assert there.ids == here.ids
    np.testing.assert_array_equal(there.embeddings_NE, here.embeddings_NE)
    assert read_feedback(open_store(address), there).rows_F.tolist() == [2]
    assert len(window(f"s3://{bucket}/live/lo")) == 0, "a prefix is a folder"
    with pytest.raises(DataError, match="no such bucket"):
        window(f"s3://{bucket}-gone/live")
