"""Files, folders and hub data sets, read row by row into records; a row that cannot be read stays in, with its problem.

Invalid UTF-8 becomes lone surrogates, which the validation in `data.py` then finds by column.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from tpo_lib.folders import is_path, no_such_path


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        row: its number in the table, counted from 0.
        column: the column at fault, "*" where it is the row as a whole.
        problem: what is wrong with it.
        fix: what to do about it.

    Example:
        >>> print(BadRow(17, "chosen", "is empty", "write a response or remove the row"))
        row 17, column 'chosen': is empty; write a response or remove the row
    """

    row: int
    column: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column!r}: {self.problem}; {self.fix}"


class BadRowsError(ValueError):
    """Rows that cannot be used, the first ten spelled out; `rows` holds all of them."""

    def __init__(self, rows: list[BadRow], name: str):
        self.rows = rows
        lines = [f"{len(rows)} of the rows of {name} cannot be used (rows count from 0):", *map(str, rows[:10])]
        if len(rows) > 10:
            lines.append(f"... and {len(rows) - 10} more")
        super().__init__("\n  ".join([*lines, "Repair them, or leave them out with --on-bad-rows skip."]))


class Bad(Exception):
    """What is wrong with the row at hand, raised with (column, problem, fix) where its number is not known yet."""

    def at(self, row: int, place: str = "") -> BadRow:
        column, problem, fix = self.args
        return BadRow(row, column, problem + place, fix)


@dataclass(frozen=True)
class Record:
    """What was read of one row: its values, or the problem that kept it from being read."""

    place: str  # e.g. " (pairs.jsonl, line 18)"
    values: dict[str, Any]
    problem: str = ""


def _read_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield _parse_json(line, f" ({path.name}, line {number})")


def _parse_json(line: bytes, place: str) -> Record:
    try:
        values = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return Record(place, {}, f"not valid JSON: {error}")
    return _object_record(values, place)


def _object_record(values: Any, place: str) -> Record:
    if isinstance(values, dict):
        return Record(place, values)
    return Record(place, {}, f"a JSON object is expected, this is a {type(values).__name__}")


def _read_json(path: Path) -> Iterator[Record]:
    """A .json file is one array of objects, or JSON lines under another name."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        rows = json.loads(content.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; repair it, or write one object a line (.jsonl)") from error
    for number, values in enumerate(rows, start=1):
        yield _object_record(values, f" ({path.name}, entry {number})")


def _read_csv(path: Path) -> Iterator[Record]:
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long transcripts
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            while True:
                place = f" ({path.name}, from line {reader.line_num + 1})"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Record(place, {}, f"not valid CSV: {error}")
                    continue
                if len(fields) > len(header):
                    yield Record(place, {}, f"{len(fields)} fields under a header of {len(header)}")
                elif fields:
                    yield Record(place, dict(zip(header, fields, strict=False)))
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    yield from _read_table(Dataset(pyarrow.parquet.read_table(path)), path.name)


def _read_table(table: Dataset, name: str) -> Iterator[Record]:
    for start in range(0, len(table), 1000):
        rows = range(start, min(start + 1000, len(table)))
        try:
            yield from [Record(f" ({name})", values) for values in table.select(rows)]
        except UnicodeDecodeError:  # one bad string spoils its whole batch: look at each value
            for row in rows:
                yield Record(f" ({name})", {column: _cell(table, row, column) for column in table.column_names})


def _cell(table: Dataset, row: int, column: str) -> Any:
    try:
        return table.select_columns(column)[row][column]
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "surrogateescape")


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_NOT_DATA = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "MANIFEST.json",
    "report.json",
}


def read_records(name_or_path: str | Path, split: str) -> Iterator[Record]:
    path, name = Path(name_or_path), str(name_or_path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read_table(_saved_table(path, split), path.name)
        return (record for file in _files_of_split(path, split) for record in _READERS[file.suffix](file))
    if path.suffix in _READERS or is_path(name):
        if not path.exists():
            raise no_such_path("the data set", name)
        if path.suffix not in _READERS:
            raise ValueError(
                f"{name}: files of pairs end in {', '.join(_READERS)}, this one in {path.suffix!r}; convert it"
            )
        return _READERS[path.suffix](path)
    return _read_table(_hub_table(name, split), name)


def _saved_table(path: Path, split: str) -> Dataset:
    table = load_from_disk(str(path))
    if isinstance(table, DatasetDict):
        if split not in table:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(table)}: name one with split=")
        return table[split]
    return table


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Files named after the split; for "train", files named after no split will do as well."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in _READERS and p.name not in _NOT_DATA)
    named = [p for p in files if p.stem == split or p.stem.startswith((f"{split}-", f"{split}."))]
    if not named and split == "train":
        other = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
        named = [p for p in files if not other.match(p.stem)]
    if not named:
        found = ", ".join(str(p.relative_to(folder)) for p in files[:8]) or "no such file"
        raise FileNotFoundError(
            f"{folder}: no {'/'.join(_READERS)} file for split {split!r} (found: {found}); name another split"
        )
    return named


def _hub_table(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else FileNotFoundError
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise kind(
            f"the data set {name!r} (split {split!r}) is not a local file or folder and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}). Check the name and the network, pass a local .jsonl, .csv or .parquet file "
            "with the columns prompt, chosen, rejected, or use --preset pocket, which needs no download."
        ) from error
