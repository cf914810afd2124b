"""Questions and answers in the files of AlpacaEval 2, Arena-Hard (v2.0, v0.1) and MT-Bench, and as plain JSON lines.

A judge's tool joins files by the keys that `Format` names and adds up whatever else it finds (Arena-Hard every entry of
`metadata`, in its order), so nothing is written but what it reads: settings stand in a file of their own, see `generate`.
Read in alpaca_eval 0.6.6, arena-hard-auto of June 2025 and FastChat 0.2.36.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpo_lib.files.chat import check_text, short
from tpo_lib.files.formats import Bad, read_records
from tpo_lib.files.store import content_key

# Temperatures of MT-Bench's categories, as FastChat samples them; OTHER of all others.
MT_BENCH = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
MT_BENCH |= {"stem": 0.1, "humanities": 0.1}
OTHER = 0.7
HEADERS = ("h1", "h2", "h3", "h4", "h5", "h6")


@dataclass(frozen=True)
class Item:
    """A question of one or more turns, or the answer to one."""

    id: str | int  # what a question and its answers are joined by
    asked: tuple[str, ...]  # what the user says; empty where a file of answers does not repeat it
    said: tuple[str, ...] = ()  # the answer of every turn; empty of a question
    more: dict[str, Any] = field(default_factory=dict)  # of the question's row besides: dataset, category


@dataclass(frozen=True)
class Format:
    """How a tool keeps questions and answers.

    A schema is a type, [schema] for a list, (schema, ...) for a list of just these, or {key: schema}, where a key that ends
    with "?" may be missing and `...` stands for any others; the first key of a row joins questions and answers.
    """

    suffix: str  # of a file of answers; .json is one array
    question: dict  # schema of a question's row
    answer: dict  # ... of an answer's, as it is written
    read: dict  # ... and what is read of anybody's
    temperature: float | None  # that answers are sampled at where nothing else is said; None: by category
    ask: Callable[[dict], Item]  # what a question's row says
    tell: Callable[[dict], Item]  # ... and an answer's
    row: Callable[
        ..., dict
    ]  # (question, answers, model's name, time stamp, counter of a text's tokens) -> answer's row


def _alpaca_question(row: dict) -> Item:
    if row.get("input"):
        raise Bad("input", "holds text that the model would not see", "put it into the instruction")
    return Item(row["instruction"], (row["instruction"],), more={key: row[key] for key in row.keys() & {"dataset"}})


def _arena_answer(row: dict) -> Item:
    *before, last = row["messages"]
    check(last["content"], {"answer": str, ...: None}, "messages[-1].content")
    asked = [message["content"] for message in before if message["role"] == "user"]
    return Item(row["uid"], tuple(check_text(text, "messages") for text in asked), (last["content"]["answer"],))


def _arena_row(item: Item, said: Sequence[str], name: str, stamp: float, tokens: Callable[[str], int]) -> dict:
    messages = [{"role": "user", "content": item.asked[0]}, {"role": "assistant", "content": {"answer": said[0]}}]
    row = {"uid": item.id, "ans_id": _own_id(item, said, name), "model": name, "messages": messages, "tstamp": stamp}
    return row | {"metadata": {"token_len": tokens(said[0])} | markdown(said[0])}


def _mt_row(item: Item, said: Sequence[str], name: str, stamp: float, tokens: Callable[[str], int]) -> dict:
    row = {"question_id": item.id, "answer_id": _own_id(item, said, name), "model_id": name}
    return row | {"choices": [{"index": 0, "turns": list(said)}], "tstamp": stamp}


def _own_id(item: Item, said: Sequence[str], name: str) -> str:
    return content_key([name, item.id, list(said)])[:22]  # as long as theirs, which are random


FORMATS = {
    "alpaca-eval": Format(
        suffix=".json",
        question={"instruction": str, "dataset?": str, "input?": str},
        answer={"dataset?": str, "instruction": str, "output": str, "generator": str},
        read={"instruction": str, "output": str},
        temperature=0.7,  # of most models on its leaderboard
        ask=_alpaca_question,
        tell=lambda row: Item(row["instruction"], (row["instruction"],), (row["output"],)),
        row=lambda item, said, name, *_: item.more | {"instruction": item.id, "output": said[0], "generator": name},
    ),
    "arena-hard": Format(
        suffix=".jsonl",
        question={"uid": str, "prompt": str},
        answer={"uid": str, "ans_id": str, "model": str, "tstamp": float}
        | {"messages": ({"role": str, "content": str}, {"role": str, "content": {"answer": str}})}
        | {
            "metadata": {"token_len": int, "header_count": dict.fromkeys(HEADERS, int)}
            | {"list_count": {"ordered": int, "unordered": int}, "bold_count": {"**": int, "__": int}}
        },
        read={"uid": str, "messages": [{"role": str, "content": None, ...: None}]},
        temperature=0.0,  # of most models in its configuration
        ask=lambda row: Item(row["uid"], (row["prompt"],)),
        tell=_arena_answer,
        row=_arena_row,
    ),
    "mt-bench": Format(
        suffix=".jsonl",
        question={"question_id": int, "turns": [str], "category?": str},
        answer={"question_id": int, "answer_id": str, "model_id": str, "tstamp": float}
        | {"choices": ({"index": int, "turns": [str]},)},
        read={"question_id": int, "choices": [{"turns": [str], ...: None}]},
        temperature=None,
        ask=lambda row: Item(row["question_id"], tuple(row["turns"]), more={"category": row.get("category")}),
        tell=lambda row: Item(row["question_id"], (), tuple(row["choices"][0]["turns"])),
        row=_mt_row,
    ),
    "jsonl": Format(
        suffix=".jsonl",
        question={"prompt": str},
        answer={"prompt": str, "response": str, "generator": str},
        read={"prompt": str, "response": str},
        temperature=1.0,
        ask=lambda row: Item(row["prompt"], (row["prompt"],)),
        tell=lambda row: Item(row["prompt"], (row["prompt"],), (row["response"],)),
        row=lambda item, said, name, *_: {"prompt": item.id, "response": said[0], "generator": name},
    ),
}


def markdown(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold words outside of code blocks, as Arena-Hard's style control counts them.

    Example:
        >>> markdown("# a\\n- **b**")["list_count"]
        {'ordered': 0, 'unordered': 1}
    """
    for block in re.findall("```([^`]*)```", text):
        text = text.replace(block, "")  # wherever the same stands again: so does the tool

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {name: count(rf"^{'#' * level}\s") for level, name in enumerate(HEADERS, 1)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def check(value: Any, schema: Any, column: str) -> None:
    """Raise Bad, which names the place, where a value is not as a schema has it; None takes anything."""
    if isinstance(schema, dict):
        _check_keys(value, schema, column)
    elif isinstance(schema, list | tuple):
        if not isinstance(value, list) or not value or (isinstance(schema, tuple) and len(value) != len(schema)):
            many = len(schema) if isinstance(schema, tuple) else "one or more"
            raise Bad(column, f"is not a list of {many} but {short(value)}", "write one")
        for i, each in enumerate(value):
            check(each, schema[i if isinstance(schema, tuple) else 0], f"{column}[{i}]")
    elif schema is str:
        check_text(value, column)
    elif schema is not None and type(value) is not schema:  # True is no number here
        raise Bad(column, f"is not {schema.__name__} but {type(value).__name__} {short(value)}", "write one")


def _check_keys(value: Any, schema: dict, column: str) -> None:
    if not isinstance(value, dict):
        raise Bad(column, f"is no object but {short(value)}", "write one")
    known = {key.removesuffix("?"): each for key, each in schema.items() if key is not ...}
    for key in (key for key in schema if key is not ... and not key.endswith("?")):
        if value.get(key) is None:
            raise Bad(f"{column}.{key}".removeprefix("."), "is missing", f"an object has {', '.join(known)}")
    for key, each in value.items():
        if key in known:
            check(each, known[key], f"{column}.{key}".removeprefix("."))
        elif ... not in schema:
            raise Bad(f"{column}.{key}".removeprefix("."), "is not known", f"an object has {', '.join(known)}")


def messages(asked: Sequence[str], said: Sequence[str]) -> list[dict[str, str]]:
    """The turns of user and assistant, one after the other; the last one of the user's may have no answer."""
    turns = []
    for question, answer in itertools.zip_longest(asked, said):
        turns.append({"role": "user", "content": question})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
    return turns


def read_questions(path: str | Path, name: str) -> list[Item]:
    """The questions of a file, in their order; columns that are not read are named on stderr.

    Raises:
        OSError: there is no such file.
        ValueError: a row is no question of this format (it is named), two have the same key, or there is none.
    """
    form = FORMATS[name]
    columns = [key.removesuffix("?") for key in form.question]
    items, unused = _read(path, columns, form.question, form.ask)
    if unused:
        print(f"{path}: not used: {', '.join(unused)}", file=sys.stderr)
    return list(items.values())


def read_answers(path: str | Path) -> tuple[str, dict[str | int, Item]]:
    """What format a file of answers has, and the answers by their key; errors as in `read_questions`."""
    first = next(iter(read_records(path, wanted=())), None)
    held = first.values.keys() if first else set()
    name = next((name for name, form in FORMATS.items() if form.read.keys() <= held), None)
    if name is None:
        known = "; ".join(f"{', '.join(form.read)} ({name})" for name, form in FORMATS.items())
        raise ValueError(
            f"{path} holds no answers that are known: it has {', '.join(held) or 'no rows'}, and not {known}"
        )
    form = FORMATS[name]
    return name, _read(path, list(form.read), form.read, form.tell)[0]


def _read(path: str | Path, columns: list[str], schema: dict, make: Callable[[dict], Item]) -> tuple[dict, list]:
    found: dict[str | int, Item] = {}
    unused: dict[str, None] = {}
    for number, record in enumerate(read_records(path, wanted=columns)):
        row = {name: value for name, value in record.values.items() if value is not None}
        try:
            if record.problem:
                raise Bad("*", record.problem, "repair it")
            check(row, schema, "")
            item = make(row)
            if item.id in found:
                raise Bad(
                    columns[0],
                    f"{short(item.id)} stands in an earlier row too",
                    "keep one of them: answers are joined by it",
                )
        except Bad as problem:
            raise ValueError(f"{path}, {problem.at(number, record.place)}") from None
        found[item.id] = item
        unused |= dict.fromkeys(name for name in record.values if name not in columns)
    if not found:
        raise ValueError(f"{path} has no rows; name a file with some")
    return found, list(unused)


def as_text(rows: Iterable[dict], name: str) -> str:
    """Rows of answers as the text of their file, once every one is found to be as its tool reads it."""
    rows, form = list(rows), FORMATS[name]
    for number, row in enumerate(rows):
        try:
            check(row, form.answer, "")
        except Bad as problem:
            raise ValueError(f"what would be written is not as {name} reads it: {problem.at(number)}") from None
    if form.suffix == ".json":
        return json.dumps(rows, indent=2) + "\n"
    return "".join(json.dumps(row) + "\n" for row in rows)  # ASCII: the tools open files in the system's encoding
