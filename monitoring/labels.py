"""What a person gets to fill in: a folder with images and a table of them, as CSV that spreadsheets read and write.

Written as UTF-8 with a byte order mark, which Excel needs; read with commas, semicolons or tabs, as UTF-8 or UTF-16.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import normalize

import numpy as np

from monitoring import MonitoringError
from monitoring.prediction_log import Window
from monitoring.recommend import FAR, Choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, GRID, IMAGES = "labels.csv", "grid.png", "images"
"""What lies in the folder."""

MOST_IN_GRID = 200
"""Images in the picture: twenty lines of ten."""

NAMED_IN_ERRORS = 3

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that a spreadsheet would compute; such text is written with an apostrophe before it."""


@dataclass(frozen=True)
class Row:
    """An image to label, as it stands in the table."""

    id: str
    """Of the prediction, in the log."""
    file: str
    """The image, relative to the table."""
    suggested: str
    """The class that the model would give it."""
    confidence: str
    """Probability of that class."""
    why: str
    """Why it was chosen, in words."""
    label: str
    """The class that it has; for the labeller to fill in."""
    sha256: str
    """Of the file, by which a changed one is noticed."""


@dataclass(frozen=True)
class Labelled:
    """An image that got a label."""

    id: str
    file: str
    label: str
    content: bytes
    """Of the file."""


COLUMNS = tuple(field.name for field in fields(Row))
NEEDED = ("file", "label", "sha256")


def table_rows(
    window: Window, rows_M: np.ndarray, choices: Sequence[Choice], distances_M: np.ndarray, threshold: float
) -> list[Row]:
    """A row for each choice, whose `row` is a position in `rows_M`, which are positions in the window."""
    rows = []
    for number, choice in enumerate(choices, 1):
        row = int(rows_M[choice.row])
        first, second = window.probabilities_NK[row].argsort()[::-1][:2].tolist()
        shares = [f"{window.classes[place]} {window.probabilities_NK[row, place]:.0%}" for place in (first, second)]
        why = f"uncertain: {' or '.join(shares)}"
        if choice.why == FAR:
            why = f"far from the reference: distance {distances_M[choice.row]:.3g}, usual up to {threshold:.3g}"
        suggested, confidence = window.classes[window.predicted_N[row]], f"{window.confidence_N[row]:.4f}"
        rows.append(Row(window.ids[row], f"{IMAGES}/{number:04}.png", suggested, confidence, why, "", ""))
    return rows


def captions(rows: Sequence[Row]) -> list[str]:
    """What stands above the images of the picture, which are the first MOST_IN_GRID."""
    return [f"{number}: {row.suggested}" for number, row in enumerate(rows[:MOST_IN_GRID], 1)]


def write_folder(output: Path, rows: Sequence[Row], contents: Sequence[bytes], figure: Figure) -> None:
    """Write the images, the table of them with their SHA-256, and a picture of all: the folder gets its name last."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        (temporary / IMAGES).mkdir(parents=True)
        for row, content in zip(rows, contents, strict=True):
            (temporary / row.file).write_bytes(content)
        marks = [hashlib.sha256(content).hexdigest() for content in contents]
        write_rows(temporary / TABLE, [replace(row, sha256=mark) for row, mark in zip(rows, marks, strict=True)])
        figure.savefig(temporary / GRID)
        temporary.rename(output)
    except OSError as error:
        reason = error.strerror or error
        raise MonitoringError(f"output '{output}' cannot be written: {reason}; give another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a table."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([_escaped(cell) for cell in astuple(row)] for row in rows)


def read_labels(path: Path, classes: Sequence[str], *, new_classes: bool = False) -> tuple[list[Labelled], int]:
    """The images that got a label, in the order of the table, and how many rows got none.

    Labels are those in `classes`, or any with `new_classes`. Refuses, with the names of the first few, labels that are
    no class, images that are missing or have changed since the table was written, and an image in two rows.
    """
    found: list[Labelled] = []
    lines: dict[str, int] = {}
    problems: list[str] = []
    empty = strange = 0
    for line, cells in _cells(path):
        file, sha256 = _unescaped(cells["file"]), cells["sha256"].strip().lower()
        row = f"line {line}, {_short(file)!r}: "
        if not cells["label"].strip():
            empty += 1
            continue
        content = _content(path.parent, file)
        if isinstance(content, str):
            problems.append(row + content)
        elif hashlib.sha256(content).hexdigest() != sha256:
            problems.append(f"{row}the image is not the one that was to be labelled (its SHA-256 differs)")
        elif sha256 in lines:
            problems.append(f"{row}the image is in line {lines[sha256]} already; leave one of them")
        else:
            lines[sha256] = line
            label = _label(cells["label"].strip(), classes)
            if label in classes or new_classes:
                found.append(Labelled(_unescaped(cells.get("id", "")), file, label, content))
            else:
                close = difflib.get_close_matches(label, classes, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                problems.append(f"{row}the label {_short(label)!r} is no class{hint}")
                strange += 1
    if problems:
        more = f" and {len(problems) - NAMED_IN_ERRORS} more" if len(problems) > NAMED_IN_ERRORS else ""
        if strange:
            more += f"; the classes are {', '.join(classes)}, and new_classes=true allows others"
        raise MonitoringError(f"{path}: {'; '.join(problems[:NAMED_IN_ERRORS])}{more}; nothing was written")
    if not found:
        raise MonitoringError(f"{path} has no row with a label; fill in the column `label`")
    return found, empty


def _content(folder: Path, file: str) -> bytes | str:
    """The content of a file in the folder, or in words why there is none."""
    image = folder / file
    try:
        if not file or not image.resolve().is_relative_to(folder.resolve()):
            return "names no image beside the table"
        return image.read_bytes() if image.exists() else "the image is missing"
    except (OSError, ValueError, RuntimeError) as error:  # names with a null byte, links in a circle
        return f"the image cannot be read ({getattr(error, 'strerror', None) or error})"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"


def _cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of each row that is not blank; refuses what is no such table."""
    lines = csv.reader(io.StringIO(text := _text(path), newline=""), delimiter=_delimiter(text), strict=True)
    try:
        names = [name.strip() for name in next(lines, [])]
        missing = [name for name in NEEDED if name not in names]
        if missing or len(set(names)) < len(names):
            received, expected = _short(", ".join(names)) or "(none)", ", ".join(COLUMNS)
            raise MonitoringError(f"{path} has the columns {received}; expected {expected}, each once")
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise MonitoringError(f"{path}, line {lines.line_num}: {len(cells)} cells; expected {len(names)}")
            yield lines.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise MonitoringError(f"{path}, line {lines.line_num}: no CSV ({error})") from None


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise MonitoringError(f"labels '{path}' cannot be read: {reason}; give the filled table") from None
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise MonitoringError(f"{path} is not UTF-8; save it as 'CSV UTF-8'") from None


def _delimiter(text: str) -> str:
    """What stands between the names in the first line."""
    first = text.splitlines()[0] if text else ""
    return max(",;\t", key=first.count)


def _label(text: str, classes: Sequence[str]) -> str:
    """The class that is meant: as written, without the apostrophe, or the same text in other code points."""
    if text in classes:
        return text
    text = _unescaped(text)
    same = [name for name in classes if normalize("NFC", name) == normalize("NFC", text)]
    return text if text in classes or len(same) != 1 else same[0]


def _escaped(text: str) -> str:
    return f"'{text}" if text.startswith((*FORMULA, "'")) else text


def _unescaped(text: str) -> str:
    return text[1:] if text.startswith("'") and text[1:].startswith((*FORMULA, "'")) else text
