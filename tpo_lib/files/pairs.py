"""Tables of preference pairs, whatever their layout: from a file, a folder or the hub, and into a file."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features, Value
from datasets.table import InMemoryTable

from tpo_lib.files import chat, spans, spool, store
from tpo_lib.files.formats import BadRow, BadRowsError, OnBadRows, Record, check_on_bad_rows, read_records
from tpo_lib.files.layouts import COMPLETE, SAMPLED, SCORES, WANTED, read_rows


def load_pairs(
    name_or_path: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    on_bad_rows: OnBadRows = "error",
    paired: bool = True,
) -> tuple[Dataset, list[BadRow]]:
    """Load preference pairs from a file, a folder or the hub, whatever their layout.

    Layouts: prompt/chosen/rejected as text or as {role, content} messages; instruction/chosen/rejected, with the columns
    input, system and history of Alpaca; text/chosen/rejected; conversations/chosen/rejected as in ShareGPT;
    chosen/rejected alone, where the prompt is what both begin with: the common first messages, or in transcripts
    everything up to the last shared "\\n\\nAssistant:". Where responses repeat their prompt, the repetition is removed. For SFT
    also a prompt with completion, response, output or answer; messages or conversations, whose last turn is the response; or
    text alone.

    Where a row has a system message or a history, the texts of all rows become messages. Messages may have tool_calls and
    reasoning_content, rows of messages tools and documents, for the chat template. What is done to a table that is not
    plain, and every column that is not used, is said on stderr.

    Args:
        name_or_path: .jsonl, .json, .csv or .parquet; a folder of such files or one of `Dataset.save_to_disk`; a hub name.
        split: which split of a hub data set or folder (None: "train"); a single file has none. Files of a folder tell it by
            their own or their folder's name (train_prefs-00000-of-00002.parquet, test/a.jsonl), or its README declares them.
        config: which configuration of a hub data set, or of a folder: those of its README, else its subfolders.
        on_bad_rows: "error" raises on rows that cannot be used, "skip" leaves them out.
        paired: a rejected side is needed; False for SFT (`losses.Objective.paired`), which is content with less.

    Returns:
        The table: prompt, chosen, rejected (all text, or all messages; no rejected where it has none), and where given tools,
        documents (JSON), chosen_score, rejected_score (float), chosen_complete, rejected_complete (bool: it ends by itself,
        was not cut), of sampled pairs chosen_ids, rejected_ids and tokenizer (what names their vocabulary), and numbers of
        tokens, see `spans`: chosen_token_rewards, rejected_token_rewards, chosen_token_weights, rejected_token_weights. And the
        rows left out.

    Raises:
        BadRowsError: rows cannot be used and on_bad_rows is "error", or there is no other row.
        FileNotFoundError, ConnectionError: there is no such file, or the hub cannot be reached.
        ValueError: no known layout, split or configuration (the message lists what there is), or an unknown file type.
    """
    check_on_bad_rows(on_bad_rows)
    records = read_records(name_or_path, split=split, config=config, wanted=WANTED)
    good, bad = read_rows(records, str(name_or_path), paired=paired)
    if bad and (on_bad_rows == "error" or not good):
        raise BadRowsError(bad, str(name_or_path))
    return pairs_table(good), bad


def table_of(rows: Iterable[Mapping[str, Any]], name: str) -> Dataset:
    """The table of pairs that are in memory, of any layout that `load_pairs` knows; BadRowsError where some cannot be used."""
    records = (Record(f" ({name}, row {i})", dict(row)) for i, row in enumerate(rows))
    good, bad = read_rows(records, name, paired=True)
    if bad:
        raise BadRowsError(bad, name)
    return pairs_table(good)


def pairs_table(rows: Collection[dict[str, Any]]) -> Dataset:
    """Make a table of rows that all have the same columns, as `load_pairs` returns it (also of none); a long one is on disk."""
    sides, said = ("prompt", "chosen", "rejected"), Value("string")
    first = next(iter(rows), None)
    if first and isinstance(first["prompt"], list):
        keys = dict.fromkeys(key for row in rows for side in sides for message in row.get(side, ()) for key in message)
        said = [dict.fromkeys({"role": None, "content": None} | keys, Value("string"))]
    kinds = (
        dict.fromkeys(sides, said) | dict.fromkeys(SCORES, Value("float64")) | dict.fromkeys(COMPLETE, Value("bool"))
    )
    columns = list(first or kinds)
    kinds |= dict(zip(SAMPLED, ([Value("int64")], [Value("int64")], Value("string")), strict=True))
    kinds |= dict.fromkeys(chat.COLUMNS, Value("string")) | dict.fromkeys(spans.COLUMNS, spans.FEATURE)
    features = Features({column: kinds[column] for column in columns})

    def part(chunk: Iterable[dict[str, Any]]) -> Dataset:
        return Dataset.from_dict({c: [row[c] for row in chunk] for c in columns}, features=features)

    if len(rows) <= spool.CHUNK:
        return part(list(rows))
    table = spool.mapped(part(chunk).data.table for chunk in spool.chunks(rows, spool.CHUNK))
    # with a name of its own: `datasets` would read all of it to make one
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features), fingerprint=uuid.uuid4().hex[:16])


def save_pairs(dataset: Dataset, path: str | Path) -> None:
    """Write a table of pairs as .jsonl or .parquet; `load_pairs` reads the same back.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: pairs are written as .jsonl or .parquet, not {path.suffix or 'without a suffix'!r}")
    if path.suffix == ".parquet":
        store.write_file(path, dataset.to_parquet)
    else:
        store.write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dataset))
