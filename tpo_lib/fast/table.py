"""Encoded pairs in Arrow columns, memory-mapped: a Sequence[EncodedPair] that takes next to no memory, however long it is.

A pair is made when it is asked for. What would be asked of all of them (lengths, rows, which have one prompt) is one array each.
"""

from __future__ import annotations

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

    def __init__(self, parts: Iterable[pyarrow.RecordBatch], firsts: Iterable[int]) -> None:
        """Parts, and the number of the row that each begins with."""
        held = [(part, first) for part, first in zip(parts, firsts, strict=True) if part.num_rows]
        self._parts, self._firsts = [part for part, _ in held], [first for _, first in held]
        self._ends = list(accumulate(part.num_rows for part in self._parts))
        self._sides = [[_Side(part.column(name)) for name in COLUMNS] for part in self._parts]

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> EncodedTable:
        """The same pairs as a table, in memory where they are a list."""
        if isinstance(pairs, cls):
            return pairs
        return cls([columns_of([*rows_of(pairs)])], [0])

    @classmethod
    def open(cls, paths: Iterable[Path], firsts: Iterable[int]) -> EncodedTable:
        """Map the files that `save` wrote."""
        return cls(map(_mapped, paths), firsts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int | slice) -> EncodedPair | list[EncodedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        k = bisect_right(self._ends, index)
        i = index - (self._ends[k] - self._parts[k].num_rows)
        row = self._firsts[k] + self._parts[k].column("row")[i].as_py()
        return EncodedPair(row, *(side[i].tolist() for side in self._sides[k]))

    def __iter__(self) -> Iterator[EncodedPair]:
        return (self[i] for i in range(len(self)))

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


def _mapped(path: Path) -> pyarrow.RecordBatch:
    with pyarrow.memory_map(str(path)) as file:  # of a closed file what is mapped stays, and there may be thousands
        return pyarrow.ipc.open_file(file).get_batch(0)


def save(part: pyarrow.RecordBatch, path: Path) -> None:
    """Write a part of a table, for `EncodedTable.open`."""
    with pyarrow.ipc.new_file(str(path), part.schema) as file:
        file.write_batch(part)
