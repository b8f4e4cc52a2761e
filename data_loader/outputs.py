"""Predictions as a table, Parquet or CSV, here or on S3. Nobody sees a half-written one under its name."""

import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from data_loader import DataError

SUFFIXES = (".parquet", ".csv")

ROWS_PER_GROUP = 16_384
"""Rows in each part of a Parquet file: what is held in memory until it is packed and written."""


class Table(Protocol):
    """What a prediction writes into; `rows` are the values of the columns, None where there is none."""

    def write(self, rows: Sequence[Sequence[Any]]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def open_table(address: str, columns: dict[str, type]) -> Iterator[Table]:
    """A table that gets its name (or is uploaded) when the block ends well, and vanishes when it does not.

    address: a path or s3://bucket/key, ending in .parquet or .csv. columns: {name: str or float}. Raises
    DataError where it cannot be written.
    """
    if not address.endswith(SUFFIXES):
        raise DataError(f"output {address!r} is no table; its name must end in {' or '.join(SUFFIXES)}")
    remote = address.startswith("s3://")
    with tempfile.TemporaryDirectory() as scratch:
        temporary = Path(scratch) / "table" if remote else _beside(Path(address))
        try:
            table = (_Parquet if address.endswith(".parquet") else _Csv)(temporary, columns)
            try:
                yield table
            finally:
                table.close()
            if remote:
                _upload(temporary, address)
            else:
                temporary.replace(address)
        except OSError as error:
            raise DataError(f"output {address!r} cannot be written: {error.strerror or error}") from None
        finally:
            temporary.unlink(missing_ok=True)


class _Csv:
    def __init__(self, path: Path, columns: dict[str, type]):
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(columns)

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self._writer.writerows(rows)

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path, columns: dict[str, type]):
        import pyarrow
        import pyarrow.parquet

        types = {str: pyarrow.string(), float: pyarrow.float32()}
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._table = pyarrow.table
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[Sequence[Any]] = []

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self._rows += rows
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            values = zip(*self._rows, strict=True)
            self._writer.write_table(
                self._table(dict(zip(self._schema.names, map(list, values), strict=True)), schema=self._schema)
            )
            self._rows = []


def _beside(path: Path) -> Path:
    """A name in the same folder, for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output {str(path)!r} cannot be written: {error.strerror}") from None
    if path.is_dir():
        raise DataError(f"output {str(path)!r} is a folder; give the name of a file in it")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _upload(path: Path, address: str) -> None:
    from data_loader import s3

    bucket, key = s3.split_uri(address)
    with s3.one_line_errors(address, "write"):
        s3.make_client().upload_file(str(path), bucket, key)
