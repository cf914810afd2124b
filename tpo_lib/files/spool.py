"""Rows too many for memory, in temporary files that have no name: nothing of them is left behind, whatever ends the process."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

import pyarrow

CHUNK = 2000  # rows that are in memory at a time


class Spool:
    """A list to be filled once and read in order, as often as need be; all but its last CHUNK items lie on disk.

    Example:
        >>> rows = Spool(range(5000))
        >>> len(rows), sum(rows)
        (5000, 12497500)
    """

    def __init__(self, items: Iterable = ()) -> None:
        self._file: IO[bytes] | None = None
        self._chunks: list[tuple[int, int] | list] = []  # each full one, or its place and size in the file
        self._last: list = []
        for item in items:
            self.append(item)

    def append(self, item: Any) -> None:
        if len(self._last) == CHUNK:
            self._chunks.append(self._put(self._last))
            self._last = []
        self._last.append(item)

    def __len__(self) -> int:
        return CHUNK * len(self._chunks) + len(self._last)

    def __iter__(self) -> Iterator:
        for chunk in [*self._chunks, self._last]:
            yield from self._get(*chunk) if isinstance(chunk, tuple) else chunk

    def _put(self, chunk: list) -> tuple[int, int] | list:
        try:
            content = pickle.dumps(chunk)  # by nobody else's hand: the file has no name
        except RecursionError:  # nested as deeply as JSON can be, and deeper than pickle goes
            return chunk
        with _room():
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(content)
        return place, len(content)

    def _get(self, place: int, size: int) -> list:
        self._file.seek(place)
        return pickle.loads(self._file.read(size))


def chunks(rows: Iterable, size: int) -> Iterator[list]:
    """Cut rows into lists of `size`, the last one shorter."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def mapped(tables: Iterable[pyarrow.Table]) -> pyarrow.Table:
    """Tables of one schema as one, memory-mapped from a file that is gone once nothing refers to it."""
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with _room():
            writer = None
            for table in tables:
                writer = writer or pyarrow.ipc.new_stream(file, table.schema)
                writer.write_table(table)
            writer.close()
            file.flush()
        return pyarrow.ipc.open_stream(pyarrow.memory_map(file.name)).read_all()


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = tempfile.gettempdir()
        raise OSError(f"{where} cannot take the table ({error}); free some room there, or set TMPDIR") from error
