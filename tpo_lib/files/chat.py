"""Conversations: how data sets store them, and how a tokenizer's chat template writes them out.

A message is {role, content} and, where given, the keys of MORE, all of them text (tool calls as JSON): Arrow would give
every call the arguments of all the others.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from tpo_lib.files.formats import Bad

MORE = ("reasoning_content", "tool_calls", "tool_call_id", "name")  # what templates may render of a message besides
COLUMNS = ("tools", "documents")  # ... and of a row
_ALIASES = {"reasoning_content": "thinking"}  # gpt-oss reads it by this name
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}  # ShareGPT's names
ASSISTANT = ("assistant", "model")  # the second is Gemma's; every other role is somebody else's
MAX_LITERAL = 2**20  # characters; Python's parser takes a hundred times as much memory
WRITE = "write a list of {role, content}"
# A string that begins with an object whose first key is a message's, or that tells a role behind other plain keys.
LIKE_MESSAGES = re.compile(
    r"\s*\[?\s*\{\s*(['\"](role|content|from|value)['\"]|['\"][^{}\[\]]{1,1000}?['\"](role|from)['\"])\s*:"
)

Message = dict[str, str]


@dataclass
class Notes:
    """What is said of a table once it is read: columns and keys that were used, keys that were not, and counts."""

    used: set[str] = field(default_factory=set)
    unused: dict[str, None] = field(default_factory=dict)  # a set that keeps its order
    counts: Counter[str] = field(default_factory=Counter)


def text_or_messages(values: dict[str, Any], column: str, notes: Notes) -> str | list[Message]:
    """A cell that holds a text, a list of messages, one message, or either of these as a string; else raises Bad."""
    value = values.get(column)
    notes.used.add(column)
    if value is None:
        raise Bad(column, "is missing", "fill it in or remove the row")
    if isinstance(value, str):
        value = check_text(value, column) if column == "text" else _stored(check_text(value, column), column, notes)
    if isinstance(value, dict):
        value = [value]
    return [_message(item, column, notes) for item in value] if isinstance(value, list) else check_text(value, column)


def check_text(value: Any, column: str) -> str:
    """The value, if it is a string of valid Unicode."""
    if not isinstance(value, str):
        raise Bad(column, f"is not text but {type(value).__name__} {short(value)}", "store it as a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Bad(column, f"invalid UTF-8 at character {error.start}", "save the text as UTF-8 or repair it") from error
    return value


def short(value: Any) -> str:
    """A value as a message may quote it."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def objects(value: Any, column: str) -> list[dict]:
    """A list of objects, or one of them, or either as a JSON string; else raises Bad."""
    if isinstance(value, str):
        value = parsed(value, column, "is", "repair it or leave it empty")
    value = [value] if isinstance(value, dict) else value
    if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise Bad(column, f"is not a list of objects but {short(value)}", "repair it or leave it empty")
    return value


def parsed(text: str, column: str, what: str, fix: str) -> Any:
    """What a JSON string holds; raises Bad where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Bad(column, f"{what} not valid JSON: {error}", fix) from error


def _is_message(value: Any) -> bool:
    forms = ({"role", "content"}, {"from", "value"}, {"role", "tool_calls"})
    return isinstance(value, dict) and any(form <= value.keys() for form in forms)


def _stored(text: str, column: str, notes: Notes) -> Any:
    """What a string holds: messages as JSON, or as Python writes them; else the string itself."""
    if not LIKE_MESSAGES.match(text):
        return text
    for kind, parse in (("JSON", json.loads), ("Python", ast.literal_eval)):
        try:
            found = parse(text if kind == "JSON" else text.strip()[:MAX_LITERAL])
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if found and all(map(_is_message, found if isinstance(found, list) else [found])):
            notes.counts[f"column {column!r}: strings that hold messages in {kind} were read as these"] += 1
            return found
        return text
    if text.lstrip().startswith("["):
        problem = f"looks like messages, but is neither JSON nor a Python literal of at most {MAX_LITERAL:,} characters"
        raise Bad(column, problem, WRITE)
    return text


def _message(value: Any, column: str, notes: Notes) -> Message:
    """One message, in whichever of the two forms, with the names and keys of ours."""
    if not _is_message(value):
        raise Bad(column, f"holds {short(value)} where a message is expected", 'write {"role": ..., "content": ...}')
    given = {key: item for key, item in value.items() if item not in (None, "", [])}
    role = check_text(given.pop("role", None) or given.pop("from", None), column)
    content = given.pop("content", None) or given.pop("value", None) or ""
    if role == "function_call":
        given["tool_calls"], content = content, ""
    if None in (value.get("content", ""), value.get("value", "")) and "tool_calls" not in given:
        raise Bad(column, f"holds a message without content: {short(value)}", "write its content or remove it")
    message = {"role": ROLES.get(role, role), "content": check_text(content, column)}
    for key in MORE:
        names = (key, "thinking", "reasoning") if key == "reasoning_content" else (key,)
        found = next((given.pop(name) for name in names if name in given), None)
        if found is not None:
            message[key] = check_text(_calls(found, column) if key == "tool_calls" else found, column)
    notes.unused |= dict.fromkeys(f"{column}[].{key}" for key in given)
    return message


def _calls(value: Any, column: str) -> str:
    """Tool calls as JSON, their arguments as objects: OpenAI's form has these as strings, templates would quote them."""
    calls = objects(value, column)
    for call in calls:
        function = call.get("function", call)
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise Bad(column, f"holds {short(call)} where a tool call is expected", "write {name, arguments}")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = parsed(function["arguments"], column, "a tool call's arguments are", "repair them")
    return json.dumps(calls, ensure_ascii=False)


def check_turn(sides: dict[str, list[Message]], place: int, verb: str, fix: str) -> None:
    """Raise Bad where a side's turn at `place` is not the assistant's."""
    for column, side in sides.items():
        if side and side[place]["role"] not in ASSISTANT:
            raise Bad(column, f"{verb} with a turn of {side[place]['role']!r}, not of the assistant", fix)


def check_turns(sides: dict[str, list[Message]], notes: Notes) -> None:
    """Raise Bad where a response does not begin with the assistant's turn, or what others say in the two responses differs."""
    check_turn(sides, 0, "begins", "let all sides begin with the same prompt, or none, and then the assistant answer")
    others = [[message for message in side if message["role"] not in ASSISTANT] for side in sides.values()]
    if others[0] != others[-1]:
        fix = "let both responses answer the same turns"
        raise Bad("rejected", "others say in it what they do not say in chosen", fix)
    if others[0]:
        notes.counts["turns of users or tools inside a response are scored as parts of it"] += 1


def words(response: str | list[Message]) -> str:
    """What a response says, text or messages."""
    return response if isinstance(response, str) else "\n".join(message["content"] or "" for message in response)


# ---- writing out


def tell_unused(keys: list[str]) -> None:
    """Say which columns and keys of messages the chat template does not read, if there are any."""
    if keys:
        print(f"not used, for the chat template does not read it: {', '.join(keys)}", file=sys.stderr)


def render(
    pairs: Dataset, tokenizer, *, first: int = 0, tell: Callable[[list[str]], object] = tell_unused
) -> tuple[dict[str, list[str]], dict[int, Bad]]:
    """Write messages out as text with the tokenizer's chat template; a response is what it adds to its prompt.

    Args:
        first: the row that `pairs` begin with, where they are a part of a table; keys of the result count from `pairs`' own.
        tell: called with the columns and keys of messages that the template does not read.

    Returns:
        Texts by column, empty where a row could not be written out, and what is wrong with these rows.

    Raises:
        ValueError: there is no template, or it takes too much time or memory.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the pairs are messages (as a system or history column makes them), but the tokenizer has no chat template; use "
            "an instruction-tuned model's tokenizer, set tokenizer.chat_template, or give the pairs as text"
        )
    sides = [column for column in ("chosen", "rejected") if column in pairs.column_names]
    context = [column for column in COLUMNS if column in pairs.column_names]
    jobs, held = [], Counter(dict.fromkeys(context, 1))
    for pair in pairs:
        more = {column: json.loads(pair[column]) for column in context if pair[column]}
        chats = [[_filled(message) for message in pair[column]] for column in ("prompt", *sides)]
        held.update(key for chat in chats for message in chat for key in message)
        jobs += [{"messages": chats[0], "add_generation_prompt": True, **more}]
        jobs += [{"messages": chats[0] + chat, **more} for chat in chats[1:]]
    words, answers = _run(tokenizer, jobs, per_row=1 + len(sides), first=first)
    tell([key for key in (*COLUMNS, *MORE) if key in held and not {key, _ALIASES.get(key)} & words])
    texts: dict[str, list[str]] = {column: [] for column in ("prompt", *sides)}
    bad: dict[int, Bad] = {}
    for row, written in enumerate(zip(*[iter(answers)] * (1 + len(sides)), strict=True)):
        try:
            parts = _parts(dict(zip(texts, written, strict=True)))
        except Bad as problem:
            bad[row], parts = problem, dict.fromkeys(texts, "")
        for column, text in parts.items():
            texts[column].append(text)
    return texts, bad


def _filled(message: dict[str, str | None]) -> dict[str, Any]:
    """A message as templates expect it."""
    found: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in found:
        found["tool_calls"] = json.loads(found["tool_calls"])
    return found | {_ALIASES[key]: found[key] for key in _ALIASES if key in found}


def _parts(written: dict[str, dict]) -> dict[str, str]:
    """Of the prompt and the whole conversations, the prompt and the responses."""
    for column, answer in written.items():
        if "error" in answer:
            raise Bad(column, f"the chat template refuses it: {answer['error']}", "repair the roles or remove the row")
        if not answer["text"].startswith(written["prompt"]["text"]):
            problem = "the chat template writes the prompt differently once this response follows it"
            raise Bad(column, problem, "use a template that only appends, or give the pairs as text")
    start = len(written["prompt"]["text"])
    return {column: answer["text"][start * (column != "prompt") :] for column, answer in written.items()}


def _run(tokenizer, jobs: list[dict], *, per_row: int, first: int) -> tuple[set[str], list[dict]]:
    """The words of the template, and for every job {"text"} or {"error"}."""
    templates = [tokenizer.get_chat_template(tools=tools) for tools in (None, [{}])]  # some have two
    lines = [{"templates": templates, "special": tokenizer.special_tokens_map}, *jobs]
    # a template is a program of somebody else's: it gets bounds on time and memory
    worker = [sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py"))]
    given = "".join(json.dumps(line, default=str) + "\n" for line in lines)
    done = subprocess.run(worker, input=given, capture_output=True, text=True, check=False)
    words, *answers = [json.loads(line) for line in done.stdout.split("\n")[:-1]] or [None]
    if words is None or len(answers) < len(jobs):
        errors = re.findall(r"^\w+Error: .*", done.stderr, re.MULTILINE)
        reason = errors[-1] if errors else "it takes more time or memory than a template should"
        row = first + len(answers) // per_row
        raise ValueError(f"the chat template was stopped at row {row}: {reason}; use another template")
    return set(words), answers
