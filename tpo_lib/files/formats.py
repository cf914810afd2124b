"""Files, folders and hub data sets, read row by row into records; a row that cannot be read stays in, with its problem.

Invalid UTF-8 becomes lone surrogates, which `chat.check_text` then finds by column. Columns that are not wanted keep their
names, with None for every value. Rows come one by one; only a .json file that is one array is in memory as a whole.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from tpo_lib.files.folders import is_path, no_such_path

MAX_LINE = 2**26  # bytes in a line of a file, 64 MiB
MAX_JSON = 2**31  # bytes of a file that is one JSON array, 2 GiB
MAX_TABLE = 2**34  # characters in a table, 16 GiB: about what it takes on disk until it is encoded
ROW = 1000  # what a row counts beside its characters, so that empty ones are no way around
BOM = b"\xef\xbb\xbf"
OnBadRows = Literal["error", "skip"]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number, counted from 0, and its column, "*" where it is the row as a whole.
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

    def __init__(
        self, rows: list[BadRow], name: str, fix: str = "Repair them, or leave them out with --on-bad-rows skip."
    ):
        self.rows = rows
        lines = [f"{len(rows)} of the rows of {name} cannot be used (rows count from 0):", *map(str, rows[:10])]
        if len(rows) > 10:
            lines.append(f"... and {len(rows) - 10} more")
        super().__init__("\n  ".join([*lines, fix]))


def check_on_bad_rows(on_bad_rows: str) -> None:
    if on_bad_rows not in ("error", "skip"):
        raise ValueError(f'on_bad_rows must be "error" or "skip", got {on_bad_rows!r}')


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


def _lines(file, path: Path) -> Iterator:
    """The lines of an open file, none of them longer than memory should take."""
    empty = file.read(0)  # text or bytes
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), empty), start=1):
        if len(line) > MAX_LINE:
            raise ValueError(f"{path}, line {number}: longer than {MAX_LINE:,} characters; shorten or remove it")
        yield line


def _json(content: bytes) -> Any:
    return json.loads(content.removeprefix(BOM).decode("utf-8", "surrogateescape"))


def _read_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            place = f" ({path.name}, line {number})"
            try:
                if line.removeprefix(BOM).strip():
                    yield _object_record(_json(line), place)
            except (ValueError, RecursionError) as error:
                yield Record(place, {}, f"not valid JSON: {error}")


def _object_record(values: Any, place: str) -> Record:
    if isinstance(values, dict):
        return Record(place, values)
    return Record(place, {}, f"a JSON object is expected, this is a {type(values).__name__}")


def _read_json(path: Path) -> Iterator[Record]:
    """A .json file is one array of objects, or JSON lines under another name."""
    with open(path, "rb") as file:
        start = file.read(1000).removeprefix(BOM).lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(path)
        return
    _check_size(path.stat().st_size, path, MAX_JSON)
    try:
        rows = _json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}; repair it, or write one object a line (.jsonl)") from error
    for number, values in enumerate(rows, start=1):
        yield _object_record(values, f" ({path.name}, entry {number})")


def _read_csv(path: Path) -> Iterator[Record]:
    limit = csv.field_size_limit(MAX_LINE)  # the default of 128 KiB refuses long transcripts
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(_lines(file, path), strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: two columns of the header {', '.join(header)} have one name; rename one")
            while True:
                place = f" ({path.name}, from line {reader.line_num + 1})"
                try:
                    if (fields := next(reader, None)) is None:
                        return
                    if len(fields) > len(header):
                        yield Record(place, {}, f"{len(fields)} fields under a header of {len(header)}")
                    elif fields:
                        yield Record(place, dict(zip(header, fields, strict=False)))
                except csv.Error as error:
                    yield Record(place, {}, f"not valid CSV: {error}")
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, wanted: Collection[str]) -> Iterator[Record]:
    """Without `datasets`, which must know the type of every column; texts stay dictionaries, as small as they are stored."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            meta, names = file.metadata, file.schema_arrow.names
        leaves = [i for i in range(meta.num_columns) if meta.schema.column(i).path.split(".")[0] in wanted]
        groups = map(meta.row_group, range(meta.num_row_groups))
        _check_size(sum(group.column(i).total_uncompressed_size for group in groups for i in leaves), path)
        columns = [meta.schema.column(i) for i in leaves]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            batches = file.iter_batches(1000, columns=[name for name in names if name in wanted])
            yield from _read_batches(batches, names, path.name)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not valid parquet: {error}") from error


def _read_batches(batches: Iterable, names: list[str], place: str) -> Iterator[Record]:
    for batch in batches:
        columns = {name: batch.column(name) for name in batch.schema.names}
        for row in range(batch.num_rows):
            yield Record(f" ({place})", dict.fromkeys(names) | {name: _cell(c[row]) for name, c in columns.items()})


def _cell(scalar) -> Any:
    try:
        return _without_none(scalar.as_py())
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "surrogateescape")


def _without_none(value: Any) -> Any:
    """Arrow gives all objects of a column the same keys, with None for what an object did not have: leave these out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _check_size(size: int, name: str | Path, most: int | None = None) -> None:
    most = most or MAX_TABLE
    if size > most:
        raise ValueError(f"{name}: more than {most / 2**30:.3g} GiB, more than is read at once; split it")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
_NOT_DATA = re.compile(r"(dataset_infos?|dataset_dict|state|MANIFEST|report)\.json")


def read_records(
    name_or_path: str | Path, *, split: str | None = None, config: str | None = None, wanted: Collection[str]
) -> Iterator[Record]:
    """The rows of a file, a folder or a hub data set, with the values of the columns that are wanted.

    Arguments and errors are those of `pairs.load_pairs`; more than memory should take is a ValueError too.
    """
    size = 0
    for row, record in enumerate(_open(name_or_path, split, config, wanted)):
        values = {column: value if column in wanted else None for column, value in record.values.items()}
        size += ROW + _characters(values)
        _check_size(size, f"{name_or_path}, up to row {row}")
        yield Record(record.place, values, record.problem)


def _characters(value: Any) -> int:
    total, stack = 0, [value]  # no recursion: nobody knows how deep it is
    while stack:
        item = stack.pop()
        total += len(item) if isinstance(item, str) else 1
        stack += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return total


def _open(name_or_path: str | Path, split: str | None, config: str | None, wanted: Collection[str]) -> Iterator[Record]:
    path, name = Path(name_or_path), str(name_or_path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read_saved(path, split, config)
        return (record for file in _files_of_split(path, split, config) for record in _read_file(file, wanted))
    if path.suffix in _READERS or is_path(name):
        if not path.exists():
            raise no_such_path("the data set", name)
        if split or config:
            raise ValueError(f"{name} is a single file, which has no {'split' if split else 'configuration'}s")
        return _read_file(path, wanted)
    table = _hub_table(name, split or "train", config)
    chosen = table.select_columns([column for column in table.column_names if column in wanted])
    return _read_batches(chosen.with_format("arrow").iter(1000), table.column_names, name)


def _read_file(path: Path, wanted: Collection[str]) -> Iterator[Record]:
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path}: rows are read from {', '.join(_READERS)} files, this one in {path.suffix!r}; convert it"
        )
    return _read_parquet(path, wanted) if path.suffix == ".parquet" else _READERS[path.suffix](path)


def _read_saved(path: Path, split: str | None, config: str | None) -> Iterator[Record]:
    """A folder of `save_to_disk`: Arrow streams, read as such, since `datasets` must know the type of every column."""
    try:
        if config:
            raise ValueError(f"{path} was written by save_to_disk and has no configurations; leave --config out")
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            path /= _pick(split or "train", splits, path, "split")
        elif split:
            raise ValueError(f"{path} is a single table, which has no splits; leave --split out")
        state = json.loads((path / "state.json").read_text())
        if state.get("_indices_data_files"):
            raise ValueError(f"{path} holds a selection of rows beside its table; save flatten_indices() of it")
        for entry in state["_data_files"]:
            with pyarrow.memory_map(str(path / entry["filename"])) as file, pyarrow.ipc.open_stream(file) as stream:
                yield from _read_batches(stream, stream.schema.names, path.name)
    except (pyarrow.ArrowException, OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError,
            LookupError, TypeError, AttributeError) as error:  # fmt: skip
        raise ValueError(f"{path}: not as save_to_disk writes it ({error!r}); save it again") from error


def _pick(name: str, names: Iterable[str], where: str | Path, what: str) -> str:
    if name in names:
        return name
    found = ", ".join(names) or "none"
    raise ValueError(f"{where} has no {what} {name!r}; it has {found}: name one with --{what.removesuffix('uration')}")


_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-\w+)?")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|evaluation|eval)(_[a-z]\w*)?(?![a-z])", re.IGNORECASE)


def _files_of_split(folder: Path, split: str | None, config: str | None) -> list[Path]:
    """Files of a split, told by their names or folders; for "train", files named after no split will do as well."""
    splits = _declared_splits(folder, config)
    if splits is None:
        if config:
            folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
            folder /= _pick(config, folders, folder, "configuration")
        splits = {}
        for path in sorted(p for p in folder.rglob("*") if p.suffix in _READERS and not _NOT_DATA.fullmatch(p.name)):
            splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
        if not splits:
            raise FileNotFoundError(f"{folder} holds no file that ends in {', '.join(_READERS)}")
        unnamed = splits.pop(None, [])
        if unnamed and splits.setdefault("train", unnamed) is not unnamed:
            names = ", ".join(str(path.relative_to(folder)) for path in unnamed)
            print(f"{folder}: not read, since it is of no split: {names}", file=sys.stderr)
    files = splits[_pick(split or "train", splits, folder, "split")]
    if not files:
        raise FileNotFoundError(f"{folder}: its README.md declares files for {split or 'train'!r} that are not there")
    return files


def _split_of(path: Path) -> str | None:
    for part in (path.stem, *reversed(path.parent.parts)):
        if found := _SPLIT.match(part):
            return found[0]
    shard = _SHARD.fullmatch(path.stem)
    return shard and shard[1]


def _declared_splits(folder: Path, config: str | None) -> dict[str, list[Path]] | None:
    """The files of every split of a configuration, as the head of the folder's README declares them, if it does."""
    import yaml

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        entries = (yaml.safe_load(head[1]) or {}).get("configs", []) if head else []
        found = {entry["config_name"]: entry for entry in entries if entry.get("data_files")}
        if not found:
            return None
        first = next((name for name, entry in found.items() if entry.get("default")), min(found, key="default".__ne__))
        if config is None and len(found) > 1 and not (found[first].get("default") or first == "default"):
            raise ValueError(f"{folder} has the configurations {', '.join(found)}: name one with --config")
        files = found[_pick(config or first, found, folder, "configuration")]["data_files"]
        files = files if isinstance(files, list) and isinstance(files[0], dict) else [{"split": "train", "path": files}]
        given = ((entry["split"], entry["path"]) for entry in files)
        patterns = {split: [path] if isinstance(path, str) else path for split, path in given}
        return {split: sorted({p for one in many for p in folder.glob(one)}) for split, many in patterns.items()}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{card}: its configurations cannot be read: {error!r}; pass a file instead") from error


def _hub_table(name: str, split: str, config: str | None) -> Dataset:
    try:
        return load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else FileNotFoundError
        reason = str(error).partition("\n")[0][:200]
        raise kind(
            f"the data set {name!r} (split {split!r}) is not a local file or folder and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}). Check the name and the network, pass a local .jsonl, .csv or .parquet file "
            "with the columns prompt, chosen, rejected, or use --preset pocket, which needs no download."
        ) from error
    except (ValueError, DatasetGenerationError) as error:  # these list the splits or configurations that there are
        reason = " ".join(f"{error.__cause__ or error}".split())[:500]
        raise ValueError(
            f"the data set {name!r} cannot be read: {reason} (name a split with --split, a configuration with --config, or "
            "download its files and pass their folder)"
        ) from error
