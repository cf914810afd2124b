"""Layouts of preference data: rows as data sets have them in, rows of prompt, chosen and rejected out.

A row that cannot be brought into that form is named by its number and column. What a table holds besides is named too.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tpo_lib.files import chat, spans
from tpo_lib.files.chat import Notes, short, text_or_messages
from tpo_lib.files.formats import Bad, BadRow, Record
from tpo_lib.files.spool import Spool

PROMPTS = ("prompt", "instruction", "question", "text")  # the first one that a table has is its prompt
RESPONSES = ("completion", "response", "output", "answer", "chosen")  # beside a prompt, for SFT
WHOLE = ("messages", "conversations", *RESPONSES, "text")  # prompt and response in one, for SFT
BEFORE = ("system", "history")  # what stands before the prompt
SCORES = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}  # our name: the hub's other spelling
COMPLETE = ("chosen_complete", "rejected_complete")
SAMPLED = ("chosen_ids", "rejected_ids", "tokenizer")  # what a sampled pair was sampled as; all three or none
WANTED = {*PROMPTS, "input", "rejected", *WHOLE, *BEFORE, *chat.COLUMNS}
WANTED |= {*SCORES, *SCORES.values(), *COMPLETE, *SAMPLED, *spans.COLUMNS}
ASSISTANT = "\n\nAssistant:"  # ends the prompt of a transcript in the layout of Anthropic/hh-rlhf
LAYOUTS = (
    "prompt, chosen, rejected (text or lists of {role, content} messages); instruction, chosen, rejected; text, chosen, "
    "rejected; conversations, chosen, rejected as in ShareGPT; or chosen, rejected alone, as message lists with the same "
    f"first messages or as transcripts {ASSISTANT!r} splits"
)
SFT_LAYOUTS = (
    f"prompt and {', '.join(RESPONSES[:-1])} or chosen; instruction, input, output; messages or conversations, whose last "
    "turn is the response; or text alone"
)


@dataclass(frozen=True)
class Layout:
    """Which columns hold what; prompt is None where it is part of the responses, rejected None where there is none."""

    prompt: str | None = None
    chosen: str = "chosen"
    rejected: str | None = None


def _find_layout(columns: list[str], name: str, *, paired: bool) -> Layout:
    """The layout of a table; ValueError where it is none that is known, or has no rejected side although one is needed."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((column for column in names if column in columns), None)

    prompt, response, whole = map(first, (PROMPTS, RESPONSES, WHOLE))
    if {"chosen", "rejected"} <= set(columns):
        return Layout(prompt or first(("conversations",)), rejected="rejected")
    found = ", ".join(columns) or "none at all"
    if paired:
        raise ValueError(
            f"{name}: columns chosen and rejected are needed, found: {found}. Accepted layouts: {LAYOUTS}. Without a rejected "
            "side --loss-type sft can be trained"
        )
    if whole is None:
        raise ValueError(f"{name}: found the columns {found}. Layouts accepted for sft: {SFT_LAYOUTS}; {LAYOUTS}")
    return Layout(prompt, response) if prompt and response else Layout(None, whole)


def read_rows(records: Iterable[Record], name: str, *, paired: bool) -> tuple[Spool, list[BadRow]]:
    """Bring every record into the one layout, and list those that cannot be; few of either are in memory at a time."""
    kept, columns, before, filled = _survey(records)
    readable = bool(columns) or not kept  # else no row could be read, and the rows say why
    layout = _find_layout(columns, name, paired=paired) if readable else Layout(rejected="rejected")
    rows, good, notes = Spool(), Spool(), Notes()
    repeats: Counter[bool | None] = Counter()
    bad: list[BadRow] = []
    named = {"prompt": layout.prompt or "prompt", "chosen": layout.chosen}

    def blame(problem: Bad, number: int, place: str) -> None:
        column, *more = problem.args
        bad.append(Bad(named.get(column, column), *more).at(number, place))

    for number, record in enumerate(kept):
        try:
            row = _row(record, layout, columns, before and layout.prompt is not None, notes)
        except Bad as problem:
            blame(problem, number, record.place)
        else:
            rows.append((number, record.place, row))
            repeats[_repeats(row)] += 1
    del kept  # its file with it
    strip, first = _strips(repeats, columns, layout.rejected is not None, name), None
    for number, place, row in rows:
        first = first or row
        try:
            _check_responses(_stripped(row) if strip else row, first, notes)
            good.append(row)
        except Bad as problem:
            blame(problem, number, place)
    held = [c for c in columns if c not in WANTED or c in filled]
    unused = [c for c in held if c not in notes.used] if rows else []
    if unused or notes.unused:
        print(f"{name}: not used: {', '.join([*unused, *notes.unused])}", file=sys.stderr)
    for note, count in notes.counts.items():
        print(f"{name}: {note} ({count:,} times)", file=sys.stderr)
    return good, sorted(bad, key=lambda bad_row: bad_row.row)


def _survey(records: Iterable[Record]) -> tuple[Spool, list[str], bool, set[str]]:
    """All records; their columns; whether any has a system message or a history; and the columns that are not always empty."""
    kept, filled = Spool(), set()
    columns: dict[str, None] = {}  # keeps their order
    before = False
    for record in records:
        kept.append(record)
        columns |= dict.fromkeys(record.values)
        filled |= {column for column, value in record.values.items() if value}
        before = before or any(record.values.get(column) not in (None, "", [], "[]") for column in BEFORE)
    return kept, list(columns), before, filled


def _row(record: Record, layout: Layout, columns: list[str], before: bool, notes: Notes) -> dict[str, Any]:
    if record.problem:
        raise Bad("*", record.problem, "write one complete record a row, or remove it")
    values = record.values
    sides = {"chosen": text_or_messages(values, layout.chosen, notes)}
    if layout.rejected:
        sides["rejected"] = text_or_messages(values, layout.rejected, notes)
        if isinstance(sides["chosen"], str) != isinstance(sides["rejected"], str):
            raise Bad("rejected", "one response is text, the other a list of messages", "store both in the same form")
    prompt = None if layout.prompt is None else text_or_messages(values, layout.prompt, notes)
    if layout.prompt == "instruction" and values.get("input"):
        if not isinstance(prompt, str):
            raise Bad("input", "stands beside an instruction of messages", "add it to these, or remove it")
        prompt = f"{prompt}\n{text_or_messages(values, 'input', notes)}"  # as LLaMA-Factory joins the two
    row = (_split_text if isinstance(sides["chosen"], str) else _split_messages)(prompt, sides)
    if before or isinstance(row["prompt"], list):
        row = _as_messages(row, _turns_before(values, notes))
        for column in chat.COLUMNS:
            if column in columns:
                notes.used.add(column)
                given = values.get(column)
                row[column] = json.dumps(chat.objects(given, column), ensure_ascii=False) if given else None
    numbers = _numbers(values, columns, sides) | _spans(values, columns, sides, row)
    notes.used |= numbers.keys() | {SCORES.get(column) for column in numbers}
    return row | numbers


_Sides = dict[str, Any]  # "chosen" and, except for SFT, "rejected": texts, or message lists


def _numbers(values: dict[str, Any], columns: list[str], sides: _Sides) -> dict[str, Any]:
    """Scores, flags and sampled ids of the sides that there are."""
    row: dict[str, Any] = {}
    for side in sides:
        score, complete = f"{side}_score", f"{side}_complete"
        if score in columns or SCORES[score] in columns:
            given = values.get(score, values.get(SCORES[score]))
            row[score] = _score(given, score if score in columns else SCORES[score])
        if complete in columns:
            row[complete] = _flag(values.get(complete), complete)
    if "rejected" in sides and set(SAMPLED) <= set(columns):
        *ids, name = (values.get(column) for column in SAMPLED)
        row |= zip(SAMPLED, (*map(_token_ids, ids, SAMPLED), name if isinstance(name, str) else None), strict=False)
    return row


def _spans(values: dict[str, Any], columns: list[str], sides: _Sides, row: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the responses' tokens; spans of a text that began with its prompt count from where its response begins."""
    found = {}
    for side, said in sides.items():
        head = len(said) - len(row[side]) if isinstance(said, str) and isinstance(row[side], str) else 0
        for column in [f"{side}_{kind}" for kind in spans.DEFAULTS if f"{side}_{kind}" in columns]:
            found[column] = spans.moved(spans.read(values.get(column), column), head)
    return found


def _split_text(prompt: str | list[chat.Message] | None, sides: _Sides) -> dict[str, Any]:
    if isinstance(prompt, list):
        return {"prompt": prompt} | {side: [_said("assistant", text)] for side, text in sides.items()}
    if prompt is not None or "rejected" not in sides:
        return {"prompt": prompt or "", **sides}
    chosen, rejected = sides["chosen"], sides["rejected"]
    end = chosen.rfind(ASSISTANT)
    while end >= 0 and not rejected.startswith(chosen[: end + len(ASSISTANT)]):
        end = chosen.rfind(ASSISTANT, 0, end)
    if end < 0:
        problem = f"there is no prompt column, and the two responses share no {ASSISTANT!r} that would end a prompt"
        raise Bad("chosen", problem, "add a prompt column or remove the row")
    end += len(ASSISTANT)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _split_messages(prompt: str | list[chat.Message] | None, sides: _Sides) -> dict[str, Any]:
    chats = list(sides.values())
    chat.check_turn(sides, -1, "ends", "add the assistant's turn or remove the row")
    shared = 0
    while shared < min(map(len, chats)) - 1 and all(chats[0][shared] == side[shared] for side in chats):
        shared += 1
    if isinstance(prompt, list):
        start = len(prompt) if all(side[: len(prompt)] == prompt for side in chats) else 0
    elif prompt is not None and _said("user", prompt) not in chats[0][:shared]:
        if any(side[0]["role"] not in chat.ASSISTANT for side in chats if side):
            problem = "is none of the user's turns that both responses begin with"
            raise Bad("prompt", problem, "write it as it stands there, or leave it out of the responses")
        prompt, start = [_said("user", prompt)], 0
    else:
        prompt, start = chats[0][:shared], shared
        if not prompt:
            problem = "there is no prompt column, and chosen and rejected share no first message"
            problem = problem if "rejected" in sides else "there is no turn before the response"
            raise Bad("chosen", problem, "add a prompt column or remove the row")
    return {"prompt": prompt} | {side: turns[start:] for side, turns in sides.items()}


def _said(role: str, content: str) -> chat.Message:
    return {"role": role, "content": content}


def _turns_before(values: dict[str, Any], notes: Notes) -> list[chat.Message]:
    """The system message and the earlier turns, which Alpaca's layout keeps in columns of their own."""
    notes.used |= set(BEFORE)
    system, history = values.get("system"), values.get("history") or []
    turns = [_said("system", chat.check_text(system, "system"))] if system else []
    if isinstance(history, str):
        history = chat.parsed(history, "history", "is", "write a list of [user, assistant] turns")
    for turn in history if isinstance(history, list) else [history]:
        if isinstance(turn, list) and len(turn) == 2:
            turns += map(_said, ("user", "assistant"), (chat.check_text(text, "history") for text in turn))
        else:
            turns += text_or_messages({"history": [turn]}, "history", notes)
    return turns


def _as_messages(row: dict[str, Any], before: list[chat.Message]) -> dict[str, Any]:
    """A row with its texts as messages, behind what stands before its prompt."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = {column: [_said(roles[column], x)] if isinstance(x, str) else x for column, x in row.items()}
    first = row["prompt"][:1]
    if before and first and first[0]["role"] == "system":
        if first != before[:1]:
            raise Bad("system", "says something else than the system turn of the prompt", "keep one of the two")
        before = before[1:]
    return row | {"prompt": before + row["prompt"]}


def _score(value: Any, column: str) -> float | None:
    if value in (None, ""):
        return None
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(number := float(value)):
            return number
    raise Bad(column, f"is not a finite number but {short(value)}", "store the score as a number or leave it out")


def _flag(value: Any, column: str) -> bool:
    said = str(value).lower()
    if said not in ("true", "1", "", "none", "false", "0"):
        raise Bad(column, f"is neither true nor false but {short(value)}", "write true or false")
    return said not in ("false", "0")


def _token_ids(value: Any, column: str) -> list[int] | None:
    if isinstance(value, str) and re.fullmatch(r"\[[\d,\s]*\]", value):  # so a CSV file holds a list
        value = [int(token) for token in re.findall(r"\d+", value)]
    if value and not (isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)):
        raise Bad(column, f"is not a list of token ids but {short(value)}", "leave it empty: the text is encoded then")
    return value or None


def _strips(repeats: Counter[bool | None], columns: list[str], paired: bool, name: str) -> bool:
    """Whether 90% of the responses repeat their prompts, as in the insub sets: then what follows is kept."""
    continued = any(column in columns for column in COMPLETE[: 1 + paired])  # as `save_pairs` writes them
    if repeats[True] < max(1, 0.9 * (repeats[True] + repeats[False])) or continued:
        return False
    print(f"{name}: responses repeat their prompt; it was removed from those of {repeats[True]} rows", file=sys.stderr)
    return True


def _repeats(row: dict[str, Any]) -> bool | None:
    """Whether the responses of a row repeat its prompt; None where there is no text to tell it by."""
    prompt, said = row["prompt"], [row[side] for side in ("chosen", "rejected") if side in row]
    if not (isinstance(prompt, str) and prompt and all(said)):
        return None
    return all(text.startswith(prompt) for text in said)


def _stripped(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the prompt that its responses repeat, changed in place."""
    repeats = _repeats(row)
    if repeats is False:
        raise Bad("chosen", "a response does not repeat its prompt as the others here do", "repair or remove the row")
    sides = [side for side in ("chosen", "rejected") if repeats and side in row]
    row |= {side: row[side].removeprefix(row["prompt"]) for side in sides}
    if sides:
        row |= {column: spans.moved(row[column], len(row["prompt"])) for column in spans.COLUMNS if column in row}
    return row


def _check_responses(row: dict[str, Any], first: dict[str, Any], notes: Notes) -> None:
    if isinstance(row["prompt"], list) != isinstance(first["prompt"], list):
        raise Bad("prompt", "text and messages are mixed in one table", "store all rows in the form of the first one")
    sides = {side: row[side] for side in ("chosen", "rejected") if side in row}
    for column, value in sides.items():
        said = [value] if isinstance(value, str) else [m[key] for m in value for key in m if key != "role"]
        if not "".join(said).strip():
            raise Bad(column, "is empty", "write a response or remove the row")
    if isinstance(row["prompt"], list):
        chat.check_turns(sides, notes)
    if row["chosen"] == row.get("rejected"):
        raise Bad("rejected", "is identical to chosen", "remove the row: it states no preference")
