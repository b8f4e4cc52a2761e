"""The table that a person fills in: as spreadsheets write it, with odd names, and each way in which it can be wrong."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from monitoring import MonitoringError
from monitoring.labels import COLUMNS, Row, read_labels, write_folder, write_rows

CLASSES = ("3", "5", "=cmd|' /C calc'!A0", "Äpfel; 'süß', \"sauer\"")


def row(number: int, **others: str) -> Row:
    return replace(
        Row(f"{number:032x}-1", f"images/{number:04}.png", "3", "0.5100", "uncertain: 3 51%", "", ""), **others
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a labeller gets: four images, whose content need not be one here."""
    output = tmp_path / "to label"
    write_folder(output, [row(number) for number in range(1, 5)], [b"one", b"two", b"three", b"four"], Figure())
    return output


Change = Callable[[list[dict[str, str]]], Any]


def fill(folder: Path, labels: dict[int, str], change: Change = lambda rows: None) -> Path:
    """Write labels into lines of the table (the first image is in line 2) and save it as csv does by itself."""
    path = folder / "labels.csv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for line, label in labels.items():
        rows[line - 2]["label"] = label
    change(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_folder_is_whole_and_the_table_says_what_is_in_it(folder: Path) -> None:
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        "0001.png", "0002.png", "0003.png", "0004.png", "grid.png", "labels.csv",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["to label"]
    content = (folder / "labels.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfid,file,suggested,confidence,why,label,sha256\r\n")
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert [row["sha256"] for row in rows] == [
        hashlib.sha256(x).hexdigest() for x in (b"one", b"two", b"three", b"four")
    ]
    assert {row["label"] for row in rows} == {""}


def test_labelled_rows_are_read_and_empty_ones_counted(folder: Path) -> None:
    found, empty = read_labels(fill(folder, {2: "5", 4: " 3 ", 5: "  "}), CLASSES)
    assert [(each.file, each.label, each.content) for each in found] == [
        ("images/0001.png", "5", b"one"),
        ("images/0003.png", "3", b"three"),
    ]
    assert empty == 2


@pytest.mark.parametrize(
    ("delimiter", "encoding", "end"),
    [
        (";", "utf-8-sig", "\r\n"),
        (";", "utf-8", "\n"),
        (",", "utf-8-sig", "\r\n"),
        ("\t", "utf-16", "\r\n"),
        (",", "utf-8", "\r"),
    ],
)
def test_what_spreadsheets_write_is_read(folder: Path, delimiter: str, encoding: str, end: str) -> None:
    """Also with all cells quoted, a column more, in another order, and empty lines at the end."""
    path = fill(folder, {2: CLASSES[3], 3: "5"})
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"), newline="")))
    text = io.StringIO(newline="")
    names = ["label", "remarks", *(name for name in COLUMNS if name not in ("label", "id"))]
    writer = csv.DictWriter(text, names, "", "ignore", delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes((text.getvalue() + end + delimiter * (len(names) - 1) + end).encode(encoding))
    found, empty = read_labels(path, CLASSES)
    assert [each.label for each in found] == [CLASSES[3], "5"]
    assert empty == 2


def swap_files(rows: list[dict[str, str]]) -> None:
    rows[0]["file"], rows[1]["file"] = rows[1]["file"], rows[0]["file"]


REFUSED: list[tuple[dict[int, str], Change, str]] = [
    ({2: "6"}, lambda rows: None, r"line 2, 'images/0001.png': the label '6' is no class; the classes are 3, 5, "),
    ({2: "Äpfel"}, lambda rows: None, "'Äpfel' is no class.*new_classes=true allows others"),
    ({2: "3"}, lambda rows: rows.append(dict(rows[0])), "line 6, 'images/0001.png': the image is in line 2 already"),
    ({2: "3"}, lambda rows: rows.append(rows[0] | {"label": "5"}), "line 6, .* is in line 2 already"),
    ({2: "3", 3: "5"}, swap_files, "line 2, 'images/0002.png': .* not the one that was to be labelled"),
    ({3: "3"}, lambda rows: rows[1].update(sha256=""), "line 3, .* not the one that was to be labelled"),
    ({3: "3"}, lambda rows: rows[1].update(file="images/9.png"), "line 3, 'images/9.png': the image is missing"),
    ({3: "3"}, lambda rows: rows[1].update(file=""), "line 3, '': names no image beside the table"),
    ({3: "3"}, lambda rows: rows[1].update(file="../secret.png"), "'../secret.png': names no image beside the table"),
    ({3: "3"}, lambda rows: rows[1].update(file="/etc/passwd"), "'/etc/passwd': names no image beside the table"),
    ({3: "3"}, lambda rows: rows[1].update(file="images"), "'images': the image cannot be read .Is a directory"),
    ({3: "3"}, lambda rows: rows[1].update(file="x" * 9999), "xx…': the image cannot be read .File name too long"),
    ({}, lambda rows: None, "has no row with a label; fill in the column `label`"),
    ({2: "3"}, lambda rows: [row.pop("sha256") for row in rows], "columns id, file, .*; expected id, file, suggested"),
    (dict.fromkeys((2, 3, 4, 5), "x"), lambda rows: None, "line 2.*line 3.*line 4.* and 1 more"),
]


@pytest.mark.parametrize(("labels", "change", "told"), REFUSED)
def test_what_is_wrong_is_named_in_one_line(folder: Path, labels: dict[int, str], change: Change, told: str) -> None:
    (folder.parent / "secret.png").write_bytes(b"secret")
    with pytest.raises(MonitoringError, match=told) as error:
        read_labels(fill(folder, labels, change), CLASSES)
    assert "\n" not in str(error.value)


def test_changed_and_missing_images_are_named(folder: Path) -> None:
    path = fill(folder, {2: "3", 3: "3", 4: "3"})
    (folder / "images/0001.png").write_bytes(b"edited")
    (folder / "images/0002.png").unlink()
    with pytest.raises(MonitoringError) as error:
        read_labels(path, CLASSES)
    assert "line 2, 'images/0001.png': the image is not the one" in str(error.value)
    assert "line 3, 'images/0002.png': the image is missing" in str(error.value)
    assert "line 4" not in str(error.value)
    fill(folder, {2: "", 3: ""})
    assert len(read_labels(path, CLASSES)[0]) == 1, "rows without a label are not looked at"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"has the columns \(none\)"),
        (b"a;b\r\n1;2\r\n", "has the columns a, b; expected id, file"),
        (b"file,label,label,sha256\n", "each once"),
        (b"file,label,sha256\nx,3\n", "line 2: 2 cells; expected 3"),
        (b'file,label,sha256\n"x,3,4\n', "line 2: no CSV"),
        (b'file,label,sha256\n"x"y,3,4\n', "line 2: no CSV"),
        ("file,label,sha256\nx,süß,4\n".encode("cp1252"), "is not UTF-8; save it as 'CSV UTF-8'"),
        (b"\xff\xfea", "is not UTF-8"),
        (b"PK\x03\x04 a workbook \xff", "is not UTF-8; save it as"),
    ],
)
def test_what_is_no_such_table_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(MonitoringError, match=told):
        read_labels(path, CLASSES)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no.csv", tmp_path):
        with pytest.raises(MonitoringError, match=r"cannot be read: .*; give the filled table"):
            read_labels(path, CLASSES)


def test_new_classes_and_hints(folder: Path) -> None:
    path = fill(folder, {2: "Birnen", 3: "-1"})
    found, _ = read_labels(path, CLASSES, new_classes=True)
    assert [each.label for each in found] == ["Birnen", "-1"]
    with pytest.raises(MonitoringError, match=r"'birne' is no class \(did you mean 'Birne'\?\)"):
        read_labels(fill(folder, {2: "birne", 3: ""}), ("Birne", "Apfel"))


def test_the_same_letters_in_other_code_points_are_the_same_class(folder: Path) -> None:
    found, _ = read_labels(fill(folder, {2: "A\u0308pfel"}), ("\u00c4pfel", "5"))
    assert [each.label for each in found] == ["\u00c4pfel"]


def test_no_cell_is_a_formula(folder: Path) -> None:
    rows = [row(1, suggested=name, id=name) for name in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "a=1")]
    write_rows(folder / "labels.csv", rows)
    with (folder / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert "a=1" in cells and "'=1+1" in cells and "''=1" in cells


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda text: text == text.strip()
)


@given(classes=st.lists(names, min_size=1, max_size=5, unique=True), data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_class_can_be_copied_from_the_column_of_suggestions(
    tmp_path_factory: pytest.TempPathFactory, classes: list[str], data: st.DataObject
) -> None:
    """A spreadsheet gives back the cell as it was written, or, typed by hand, without the apostrophe."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "x.png").write_bytes(b"x")
    wanted = data.draw(st.sampled_from(classes))
    entry = row(1, file="x.png", suggested=wanted, sha256=hashlib.sha256(b"x").hexdigest())
    write_rows(folder / "labels.csv", [entry])
    with (folder / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        header, cells = csv.reader(file)
    for typed in (cells[2], wanted):
        with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, [*cells[:5], typed, cells[6]]])
        found, _ = read_labels(folder / "labels.csv", classes)
        exact = [wanted] if typed not in classes else [typed]
        assert [each.label for each in found] == exact
        assert astuple(entry)[2] == wanted


cell = st.one_of(
    names, st.sampled_from(["", "x.png", "3", "5", '"', "\0", ";", "../x.png", "=1", hashlib.sha256(b"x").hexdigest()])
)


@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(st.lists(cell, min_size=3, max_size=4), max_size=4).map(
            lambda rows: "\r\n".join(["file,label,sha256", *map(",".join, rows)]).encode()
        ),
    )
)
@settings(deadline=None, max_examples=200)
def test_whatever_is_in_the_file_it_is_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any table"
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(b"x")
    (folder / "labels.csv").write_bytes(content)
    try:
        found, empty = read_labels(folder / "labels.csv", CLASSES)
    except MonitoringError as error:
        assert "\n" not in str(error)
    else:
        assert empty >= 0
        assert [(each.content, each.label in CLASSES) for each in found] == [(b"x", True)], "one image, one label"
