"""Long tables of pairs, encoded once: part by part on all cores, each part kept under a name that tells all that decides it.

A kill costs the parts that were in work. What is kept may be deleted at any time.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import tokenizers
import transformers
from datasets import Dataset
from tqdm.auto import tqdm

from tpo_lib.data import EncodedPair, EncodingReport, encode_pairs
from tpo_lib.fast.table import EncodedTable, columns_of, save
from tpo_lib.files import chat, encoding, spans, store
from tpo_lib.files.formats import BadRow, BadRowsError, OnBadRows
from tpo_lib.files.layouts import SCORES
from tpo_lib.models import tokenizer_content

FORMAT = 1  # raise it whenever the same table would give other files
PART = 5000  # rows, at most: a second of work
TOKENS = 2**20  # of a part, about: its worker takes some 150 MB
MOST_WORKERS = 16
UNREAD = (*SCORES, *spans.COLUMNS)  # columns that decide no id
IDS, REPORT = "ids.arrow", "report.json"


def encode_table(
    table: Dataset,
    tokenizer,
    *,
    max_length: int,
    on_bad_rows: OnBadRows = "error",
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[Sequence[EncodedPair], EncodingReport]:
    """`data.encode_pairs`, of a table that may be long: then the pairs are an EncodedTable on disk, and found there again.

    Args:
        cache_dir: where they are kept; None takes `store.cache_folder()`/encoded. Tables of at most PART rows are in memory.

    Raises:
        BadRowsError, ValueError: as `data.encode_pairs`.
        OSError: the disk has no room for them.
    """
    if len(table) <= PART:
        return encode_pairs(table, tokenizer, max_length=max_length, on_bad_rows=on_bad_rows)
    encoding.check(tokenizer, max_length, on_bad_rows)
    rows = max(1, min(PART, TOKENS // max_length))  # of a part
    folder = Path(cache_dir or store.cache_folder() / "encoded")
    job = _Job(
        table.remove_columns([c for c in UNREAD if c in table.column_names]), tokenizer, max_length, rows, folder
    )
    made: dict[int, tuple[Path, dict]] = {}
    with tqdm(total=len(table), desc="encoding", unit="row", unit_scale=True, disable=not progress) as bar:
        for first, part in _parts(job):
            made[first] = part
            bar.update(min(rows, len(table) - first))
    made = dict(sorted(made.items()))
    report, unused = _merged({first: report for first, (_, report) in made.items()})
    chat.tell_unused(unused)
    if report.skipped and on_bad_rows == "error":
        raise BadRowsError(report.skipped, "the table")
    size = sum((path / IDS).stat().st_size for path, _ in made.values())
    print(f"{len(made)} parts of encoded pairs, {size / 1e6:,.1f} MB, are kept in {folder}", file=sys.stderr)
    return EncodedTable.open([path / IDS for path, _ in made.values()], made), report


def _merged(reports: dict[int, dict]) -> tuple[EncodingReport, list[str]]:
    """One report of all parts, and what no template used."""
    counts: Counter[str] = Counter()
    for each in reports.values():
        counts.update(each["counts"])
    skipped = [BadRow(first + row, *said) for first, each in reports.items() for row, *said in each["skipped"]]
    unused = {key for each in reports.values() for key in each["unused"]}
    return EncodingReport(skipped=skipped, **counts), [key for key in (*chat.COLUMNS, *chat.MORE) if key in unused]


@dataclass(frozen=True)
class _Job:
    """A table to be encoded, in parts of so many rows."""

    table: Dataset
    tokenizer: object
    max_length: int
    rows: int
    folder: Path

    def part(self, first: int) -> tuple[Path, dict]:
        """The folder of the part that begins with row `first`, found or made, and its report."""
        rows = self.table.select(range(first, min(first + self.rows, len(self.table))))
        path = self.folder / f"encoded-{store.content_key([self.identity, rows.to_dict()])[:32]}"

        def write(to: Path) -> None:
            unused: list[str] = []
            found = encoding.encode_rows(rows, self.tokenizer, self.max_length, first=first, tell=unused.extend)
            save(columns_of(found.rows, first), to / IDS)
            skipped = [astuple(replace(bad, row=bad.row - first)) for bad in found.skipped]
            counts = found.counts | {"kept": len(found.rows), "truncated": found.truncated}
            (to / REPORT).write_text(json.dumps({"counts": counts, "skipped": skipped, "unused": unused}))

        def read(path: Path) -> tuple[Path, dict]:
            return path, json.loads((path / REPORT).read_text())

        def made() -> tuple[Path, dict]:
            try:
                store.write_atomically(path, write)
            except OSError as error:
                fix = "free some room, or choose another --cache-dir (or set TPO_CACHE)"
                raise OSError(f"{self.folder} cannot take the encoded pairs ({error}); {fix}") from error
            return read(path)

        return store.found_or_made(path, read, made)

    @cached_property
    def identity(self) -> str:
        """A digest of all that decides the ids, apart from the rows."""
        names = ("chat_template", "split_special_tokens")
        how = [tokenizer_content(self.tokenizer), *(getattr(self.tokenizer, name, None) for name in names)]
        return store.content_key([FORMAT, how, self.max_length, transformers.__version__, tokenizers.__version__])


def _parts(job: _Job) -> Iterator[tuple[int, tuple[Path, dict]]]:
    """Every part with its first row, as they get ready; forked workers share the table and the tokenizer's memory."""
    firsts = range(0, len(job.table), job.rows)
    assert job.identity  # once, before there are workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    workers = min(cores, len(firsts), MOST_WORKERS)
    if (
        workers == 1 or sys.platform != "linux"
    ):  # elsewhere a fork is not safe, and a new process would read it all anew
        yield from ((first, job.part(first)) for first in firsts)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(job,))
    try:
        futures = {pool.submit(_work, first): first for first in firsts}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process that encodes pairs was killed (is there memory for {workers}?); what was done is kept in {job.folder}: "
            "begin again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: _Job | None = None  # of a worker


def _begin(job: _Job) -> None:
    """Begin a worker: it leaves Ctrl-C to its parent, and ends with it, however that ends."""
    global _job
    _job = job
    gc.freeze()  # a collection would write to all that is shared, and so make it the worker's own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken, and its threads did not survive the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def wait_for_it() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait_for_it, daemon=True).start()


def _work(first: int) -> tuple[Path, dict]:
    return _job.part(first)
