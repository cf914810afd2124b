"""Encoded pairs in Arrow columns, memory-mapped: a Sequence[EncodedPair] that takes next to no memory, however long it is.

A pair is made when it is asked for. What would be asked of all of them (lengths, rows, which have one prompt) is one array each.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyarrow

from tpo_lib.data import EncodedPair

LIBC = ctypes.CDLL(None)
OFTEN = 256  # pairs asked for, until memory is given back: with what the system reads around them they take 60 MB
IDS = pyarrow.list_(pyarrow.int32())
DIGEST = pyarrow.binary(16)  # equal digests, equal ids
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),  # of the table, counted from the part's first
        *((name, IDS) for name in COLUMNS),
        ("highest", pyarrow.int32()),  # token id
        ("prompt", DIGEST),
        ("chosen", DIGEST),  # with its prompt
        ("rejected", DIGEST),  # of a row without one, as of an empty one
    ]
)


def rows_of(pairs: Iterable[EncodedPair]) -> Iterator[tuple]:
    """Pairs as JSON has them."""
    return map(attrgetter("row", *COLUMNS), pairs)


def columns_of(rows: Sequence[tuple], first: int = 0) -> pyarrow.RecordBatch:
    """A part of a table: (row, prompt, chosen) or (row, prompt, chosen, rejected), of the rows from `first` on."""
    rows = [(row, prompt, chosen, rejected[0] if rejected else []) for row, prompt, chosen, *rejected in rows]
    numbers, *ids = zip(*rows, strict=True) if rows else ((),) * 4
    arrays = [pyarrow.array(side, IDS) for side in ids]
    sides = [_Side(array) for array in arrays]
    highest = [max((max(side) for side in row[1:] if side), default=-1) for row in rows]
    digests = [[], [], []]
    for i in range(len(rows)):
        prompt = blake2b(sides[0].bytes(i), digest_size=DIGEST.byte_width)
        digests[0].append(prompt.digest())
        for k in (1, 2):
            whole = blake2b(digests[0][-1], digest_size=DIGEST.byte_width)
            whole.update(sides[k].bytes(i))
            digests[k].append(whole.digest())
    numbers = pyarrow.array([row - first for row in numbers], pyarrow.int64())
    marks = [pyarrow.array(each, DIGEST) for each in digests]
    return pyarrow.record_batch([numbers, *arrays, pyarrow.array(highest, pyarrow.int32()), *marks], schema=SCHEMA)


class _Side:
    """A list column as two arrays: where rows begin and end, and the ids."""

    def __init__(self, array: pyarrow.ListArray) -> None:
        self.offsets = array.offsets.to_numpy()
        self.ids = array.values.to_numpy()

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    def bytes(self, i: int) -> memoryview:
        return memoryview(self[i]).cast("B") if self.offsets[i] < self.offsets[i + 1] else memoryview(b"")

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class EncodedTable(Sequence[EncodedPair]):
    """Pairs in the order of their rows.

    Example:
        >>> table = EncodedTable.of([EncodedPair(4, [1], [2, 3], [4]), EncodedPair(9, [1], [5], [])])
        >>> table[1], table.lengths.tolist(), table.prompts.tolist()
        (EncodedPair(row=9, prompt_ids=[1], chosen_ids=[5], rejected_ids=[]), [3, 2], [0, 0])
    """

    def __init__(
        self, parts: Iterable[pyarrow.RecordBatch], firsts: Iterable[int], files: Iterable[pyarrow.Buffer | None]
    ) -> None:
        """Parts, the number of the row that each begins with, and the mapped file that each lies in, if any."""
        held = [each for each in zip(parts, firsts, files, strict=True) if each[0].num_rows]
        self._parts, self._firsts, self._files = ([each[k] for each in held] for k in range(3))
        self._ends = list(accumulate(part.num_rows for part in self._parts))
        self._sides = [[_Side(part.column(name)) for name in COLUMNS] for part in self._parts]
        self._asked = 0

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> EncodedTable:
        """The same pairs as a table, in memory where they are a list."""
        if isinstance(pairs, cls):
            return pairs
        return cls([columns_of([*rows_of(pairs)])], [0], [None])

    @classmethod
    def open(cls, paths: Iterable[Path], firsts: Iterable[int]) -> EncodedTable:
        """Map the files that `save` wrote."""
        files = [_mapped(path) for path in paths]
        return cls([pyarrow.ipc.open_file(file).get_batch(0) for file in files], firsts, files)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int | slice) -> EncodedPair | list[EncodedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        self._asked += 1
        if self._asked % OFTEN == 0:
            self._forget(*self._files)
        return self._pair(*self._place(index % len(self)))

    def __iter__(self) -> Iterator[EncodedPair]:
        for k, part in enumerate(self._parts):
            yield from (self._pair(k, i) for i in range(part.num_rows))
            self._forget(self._files[k])

    def _place(self, index: int) -> tuple[int, int]:
        """The part of a pair, and its place there."""
        k = bisect_right(self._ends, index)
        return k, index - (self._ends[k] - self._parts[k].num_rows)

    def _pair(self, k: int, i: int) -> EncodedPair:
        row = self._firsts[k] + self._parts[k].column("row")[i].as_py()
        return EncodedPair(row, *(side[i].tolist() for side in self._sides[k]))

    def _forget(self, *files: pyarrow.Buffer | None) -> None:
        """Give back the memory of what was read of mapped files; it stays in the system's cache, and is read from there."""
        for file in filter(None, files if hasattr(LIBC, "madvise") else ()):
            LIBC.madvise(ctypes.c_void_p(file.address), ctypes.c_size_t(file.size), mmap.MADV_DONTNEED)

    def distinct_prompts(self) -> Iterator[np.ndarray]:
        """The ids of the different prompts, as they come."""
        for index in np.sort(np.unique(self.prompts, return_index=True)[1]).tolist():
            k, i = self._place(index)
            yield self._sides[k][0][i]

    @cached_property
    def rows(self) -> np.ndarray:
        """(n,) the row of every pair."""
        return self._all(
            [part.column("row").to_numpy() + first for part, first in zip(self._parts, self._firsts, strict=True)]
        )

    @cached_property
    def side_lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) each: tokens of prompts, of chosen and of rejected responses."""
        return tuple(self._all([sides[k].lengths for sides in self._sides]) for k in range(len(COLUMNS)))

    @property
    def lengths(self) -> np.ndarray:
        """(n,) as `EncodedPair.length`."""
        prompts, chosen, rejected = self.side_lengths
        return prompts + np.maximum(chosen, rejected)

    @property
    def sizes(self) -> np.ndarray:
        """(n,) as `EncodedPair.size`."""
        return self.lengths * (1 + (self.side_lengths[-1] > 0))

    @cached_property
    def prompts(self) -> np.ndarray:
        """(n,) a number for the prompt of every pair, the same for the same one."""
        return np.unique(self.digests("prompt"), return_inverse=True)[1]

    def digests(self, name: str) -> np.ndarray:
        """(n,) the digest of every "prompt", or of every "chosen" or "rejected" with its prompt."""
        kind = np.dtype(f"V{DIGEST.byte_width}")
        marks = [np.frombuffer(part.column(name).buffers()[1], kind, part.num_rows) for part in self._parts]
        return np.concatenate(marks) if marks else np.empty(0, kind)

    def beyond(self, tokens: float, vocabulary: int) -> list[EncodedPair]:
        """The first pair that is longer than so many tokens, or has an id that is not below `vocabulary`, if there is one."""
        highest = self._all([part.column("highest").to_numpy() for part in self._parts])
        return [self[int(i)] for i in np.flatnonzero((self.lengths > tokens) | (highest >= vocabulary))[:1]]

    def _all(self, arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)


@dataclass(frozen=True)
class Sequences:
    """The different sequences of a table, numbered as they come, as pairs without a rejected side."""

    table: EncodedTable
    places: np.ndarray  # (n, 2) number of every pair's two sequences, -1 where there is none
    first: (
        np.ndarray
    )  # (k,) 2 i of a chosen, 2 i + 1 of a rejected sequence, that of pair i being the first of its kind
    responses: np.ndarray  # (k,) tokens
    lengths: np.ndarray  # (k,) tokens, prompt included

    @classmethod
    def of(cls, table: EncodedTable) -> Sequences:
        marks = np.stack([table.digests("chosen"), table.digests("rejected")], 1).ravel()  # (2n,)
        prompts, *sides = table.side_lengths  # (n,) each
        sizes = np.stack(sides, 1).ravel()
        there = np.flatnonzero(sizes)
        _, first, same = np.unique(marks[there], return_index=True, return_inverse=True)
        order = np.argsort(first)
        number, places = np.empty_like(order), np.full(len(marks), -1)
        number[order] = np.arange(len(order))
        places[there], first = number[same], there[first[order]]
        return cls(table, places.reshape(-1, 2), first, sizes[first], sizes[first] + prompts[first // 2])

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, number: int) -> EncodedPair:
        i, rejected = divmod(int(self.first[number]), 2)
        pair = self.table[i]
        return EncodedPair(number, pair.prompt_ids, pair.rejected_ids if rejected else pair.chosen_ids)

    def chunks(self, most: int) -> Iterator[np.ndarray]:
        """Numbers, sorted by length and cut as `token_budget` does, which needs all pairs in memory."""
        order, start = np.argsort(self.lengths, kind="stable"), 0
        for end in range(1, 1 + len(order)):
            if end == len(order) or self.lengths[order[end]] * (end + 1 - start) > most:
                yield order[start:end]
                start = end


def _mapped(path: Path) -> pyarrow.Buffer:
    with pyarrow.memory_map(str(path)) as file:  # of a closed file what is mapped stays, and there may be thousands
        return file.read_buffer()


def save(part: pyarrow.RecordBatch, path: Path) -> None:
    """Write a part of a table, for `EncodedTable.open`."""
    with pyarrow.ipc.new_file(str(path), part.schema) as file:
        file.write_batch(part)
