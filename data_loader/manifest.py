"""The manifest: what the data is, file by file, and one digest for the whole.

It is kept in the data directory beside a stamp of the raw files (names, sizes, times), so that a later
start can tell without reading them that nothing has changed.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_loader import DataError
from data_loader.splits import SPLITS

NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class Contents:
    """What a source read. files: {"path", "bytes", "sha256", "class", "split"}, for each file that can be
    used; bad: {"path", "bytes", "sha256", "class", "reason"}. labels_N are positions in classes, splits_N
    in SPLITS.
    """

    classes: tuple[str, ...]
    labels_N: np.ndarray
    splits_N: np.ndarray
    files: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    natural_shape: tuple[int, int, int]  # (H, W, C) for image_size=0


def make(name: str, source: str, contents: Contents) -> dict[str, Any]:
    """The manifest as a JSON-able dict. Raises DataError if a split is empty or there are fewer than two
    classes.
    """
    counts = {
        split: {
            cls: int(count)
            for cls, count in zip(
                contents.classes,
                np.bincount(contents.labels_N[contents.splits_N == code], minlength=len(contents.classes)),
                strict=True,
            )
        }
        for code, split in enumerate(SPLITS)
    }
    if len(contents.classes) < 2:
        raise DataError(
            f"{source} has images of {len(contents.classes)} class(es) {list(contents.classes)}"
            f"{_reasons(contents.bad)}; at least 2 classes are needed: one folder of images for each"
        )
    totals = {split: sum(by_class.values()) for split, by_class in counts.items()}
    for split, total in totals.items():
        if total == 0:
            found = ", ".join(f"{count} {each}" for each, count in totals.items())
            raise DataError(
                f"the {split} split of {source} is empty (images: {found}); add images, or sort them into"
                " train/, val/ and test/ folders yourself"
            )
    return {
        "name": name,
        "source": source,
        "digest": digest(contents),
        "classes": list(contents.classes),
        "images": totals,
        "counts": counts,
        "files": contents.files,
        "bad": contents.bad,
    }


def digest(contents: Contents) -> str:
    """SHA-256 over one line a file (path, SHA-256, class, split) in order of path, and over the row splits.

    Each line is JSON, so no name can forge a line; bad files do not count.
    """
    lines = sorted(json.dumps([f["path"], f["sha256"], f["class"], f["split"]]) for f in contents.files)
    splits_sha256 = hashlib.sha256(contents.splits_N.astype(np.uint8).tobytes()).hexdigest()
    lines.append(json.dumps(["classes", list(contents.classes), "splits", splits_sha256]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stamp(rows: Iterable[Sequence[object]]) -> str:
    """One short text that changes when any row (name, size, time...) does."""
    text = hashlib.sha256()
    for row in rows:
        text.update(json.dumps(row).encode() + b"\n")
    return text.hexdigest()


def stamp_files(paths: Iterable[Path]) -> str | None:
    """The stamp of these files' names, sizes and times, or None if one is not there."""
    try:
        found = [(path.name, path.stat()) for path in paths]
    except OSError:
        return None
    return stamp((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def refuse_bad(manifest: dict[str, Any]) -> None:
    """Raise DataError that names the first bad files and how many there are, if there are any."""
    if bad := manifest["bad"]:
        raise DataError(
            f"{len(bad)} bad file(s) in {manifest['source']}{_reasons(bad)}; repair or remove them,"
            " or leave them out with on_error=skip"
        )


def _reasons(bad: list[dict[str, Any]]) -> str:
    if not bad:
        return ""
    named = ", ".join(f"{entry['path']!r} ({entry['reason']})" for entry in bad[:NAMED_IN_ERRORS])
    more = f" and {len(bad) - NAMED_IN_ERRORS} more" if len(bad) > NAMED_IN_ERRORS else ""
    return f": {named}{more}"


def save(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record))
    partial.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    except (OSError, ValueError):
        return None
