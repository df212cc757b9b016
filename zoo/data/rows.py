"""Rows of data files. Everything but Parquet is read with the standard library, and an error names file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from zoo.errors import FileFormatError, InputError, UnavailableError

NEEDS_DATASETS = "pip install 'gpt-zoo[datasets]'"
"""What to do when the extra is missing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, and ``file:line``."""

    values: Mapping[str, Any]
    origin: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON, JSONL, CSV, TSV, text or Parquet file. A text file is one row with the column ``text``.

    Raises:
        InputError: the file is missing, or of a kind that is not read.
        FileFormatError: it is empty or damaged; the message has the line.
        UnavailableError: a Parquet file, and the extra ``datasets`` is not installed.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is of no kind that zoo reads.", fix=f"It reads {', '.join(READERS)}.")
    empty = True
    for row in reader(path):
        empty = False
        yield row
    if empty:
        raise FileFormatError(f"{path} is empty.", fix="It should have one example in each row.")


def open_text(path: Path) -> TextIO:
    """A text file, UTF-8 with or without a byte order mark.

    Raises:
        InputError: it can not be opened.
    """
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise InputError(f"can not read {path}: {error.strerror}.") from None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1; ends of lines are as they are.

    Raises:
        InputError: it can not be opened.
        FileFormatError: a line is not UTF-8.
    """
    with open_text(path) as file:
        try:
            yield from enumerate(file, 1)
        except UnicodeDecodeError as error:
            not_utf8(path, error)


def not_utf8(path: Path, error: UnicodeDecodeError) -> NoReturn:
    """Raise what a user can act upon. A decoder works in blocks, so the line has to be looked for."""
    line = 1
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as found:
                line, error = number, found
                break
    raise FileFormatError(
        f"{path}:{line} is not UTF-8: byte 0x{error.object[error.start]:02x}.", fix="Convert the file to UTF-8."
    ) from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in lines_of(path):
        if line.strip():
            origin = f"{path}:{number}"
            try:
                values = json.loads(line.rstrip("\r\n"))
            except ValueError as error:
                raise _malformed(origin, error) from None
            yield Row(_an_object(values, origin), origin)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or objects one after the other: many a .json file is JSON lines."""
    text = "".join(line for _, line in lines_of(path))
    decoder, place, line = json.JSONDecoder(), 0, 1

    def skip(characters: str) -> None:
        nonlocal place, line
        start = place
        while place < len(text) and text[place] in characters:
            place += 1
        line += text.count("\n", start, place)

    skip(" \t\r\n")
    in_list = text[place : place + 1] == "["
    place += in_list
    while True:
        skip(" \t\r\n")
        if place == len(text) or (in_list and text[place] == "]"):
            break
        try:
            values, end = decoder.raw_decode(text, place)
        except ValueError as error:
            raise _malformed(str(path), error, has_line=False) from None
        origin = f"{path}:{line}"
        line, place = line + text.count("\n", place, end), end
        yield Row(_an_object(values, origin), origin)
        skip(" \t\r\n")
        if in_list and text[place : place + 1] not in (",", "]"):
            raise FileFormatError(f"{path}:{line} is not valid JSON: a comma or the end of the list is missing.")
        place += in_list and text[place] == ","
    if in_list and text[place : place + 1] != "]":
        raise FileFormatError(f"{path}:{line} is not valid JSON: the list has no end.")


def _malformed(origin: str, error: ValueError, *, has_line: bool = True) -> FileFormatError:
    if isinstance(error, json.JSONDecodeError):
        where = origin if has_line else f"{origin}:{error.lineno}"
        return FileFormatError(f"{where} is not valid JSON: {error.msg.lower()} (column {error.colno}).")
    return FileFormatError(f"{origin} is not valid JSON: {error}.")


def _an_object(values: Any, origin: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise FileFormatError(
            f"{origin} holds a {type(values).__name__}, not an object.", fix='A row is an object: {"prompt": ...}.'
        )
    return values


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line for _, line in lines_of(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise FileFormatError(f"{path}:{first} is not valid CSV: {error}.") from None
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise FileFormatError(f"{path}:{first}: two columns have the same name: {', '.join(header)}.")
            continue
        if len(fields) != len(header):
            raise FileFormatError(
                f"{path}:{first} has {len(fields)} fields, and the first line names {len(header)} columns.",
                fix="Put fields that hold the delimiter or line ends into double quotes.",
            )
        yield Row(dict(zip(header, fields, strict=True)), f"{path}:{first}")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, "\t")


def _read_text(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in lines_of(path))
    if text.strip():
        yield Row({"text": text}, f"{path}:1")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError:
        what = f"{path} is a Parquet file, which the extra 'datasets' reads."
        raise UnavailableError(what, fix=NEEDS_DATASETS) from None
    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"can not read {path}: No such file or directory.") from None
    except (ArrowInvalid, OSError) as error:
        raise FileFormatError(f"{path} is no valid Parquet file: {' '.join(str(error).split())}.") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
"""By suffix."""
