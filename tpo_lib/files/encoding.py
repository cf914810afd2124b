"""From the rows of a table to token ids: what `data.encode_pairs` makes pairs of, and `fast.encode` Arrow columns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from datasets import Dataset, Value

from tpo_lib.files import chat, tokens
from tpo_lib.files.formats import Bad, BadRow, check_on_bad_rows


@dataclass(frozen=True)
class Encoded:
    """The rows of a table as ids, (row, prompt, response or two), cut to max_length; and what became of the others."""

    rows: list[tuple]
    skipped: list[BadRow]
    truncated: int  # responses
    counts: dict[str, int]  # of rows, by the names of `data.NOTES`


def check(tokenizer, max_length: int, on_bad_rows: str) -> None:
    """Raise ValueError where nothing could be encoded so."""
    check_on_bad_rows(on_bad_rows)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so responses could not end; set tokenizer.eos_token")
    if max_length < 2:
        raise ValueError(f"max_length {max_length} leaves no room for a prompt and a response; raise it to at least 2")


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector would look through all lists of ids again and again: half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collector()
def encode_rows(
    pairs: Dataset, tokenizer, max_length: int, *, first: int = 0, tell: Callable = chat.tell_unused
) -> Encoded:
    """Tokenize a table, or the part of one that begins with its row `first`; see `data.encode_pairs`.

    `tell` is called with what chat.render does not use.
    """
    as_text, eos = isinstance(pairs.features["prompt"], Value), tokenizer.eos_token_id
    texts, unrendered = (pairs, {}) if as_text else chat.render(pairs, tokenizer, first=first, tell=tell)
    encoded, counts = _whole_rows(pairs, texts, tokenizer, max_length)
    kept, skipped, truncated = [], [], 0
    for row, (prompt, *responses) in enumerate(encoded):
        if not prompt and len(responses) == 1:  # raw text without BOS: its first token is predicted by nothing
            prompt, responses = responses[0][:1], [responses[0][1:]]
        room = max_length - len(prompt)
        try:
            if row in unrendered:
                raise unrendered[row]
            tokens.check_ids(prompt, responses, max_length, eos)
        except Bad as problem:
            skipped.append(problem.at(first + row))
            continue
        kept.append((first + row, prompt, *(ids[:room] for ids in responses)))
        truncated += sum(len(ids) > room for ids in responses)
    return Encoded(kept, skipped, truncated, counts)


def _whole_rows(
    pairs: Dataset, texts, tokenizer, max_length: int
) -> tuple[list[tuple[list[int], ...]], dict[str, int]]:
    """The ids of every row's prompt and responses, whole, and the counts of the report."""
    plain_texts = texts is pairs  # no template wrote them
    lead = tokens.leading_ids(tokenizer) if plain_texts else []
    encode = partial(tokens.token_ids, tokenizer, lead=lead, most=max_length)
    heads = texts["prompt"][:]
    prompts = encode(heads)
    encoded, reencoded = tokens.sampled_ids(pairs, texts, prompts, tokenizer)
    rows = [row for row in range(len(pairs)) if row not in encoded]
    special, eos, end = tokens.special_texts(tokenizer), tokenizer.eos_token, [tokenizer.eos_token_id]
    found: dict[str, set[int]] = {"straddling": set(), "special": set(), "repeated_eos": set()}
    sides = []
    for column in [column for column in ("chosen", "rejected") if column in pairs.column_names]:
        complete = tokens.complete(pairs, column)
        bodies = [tokens.without_eos(text, eos) for text in texts[column][:]]
        said = bodies if plain_texts else [tokens.without_eos(chat.words(each), eos) for each in pairs[column][:]]
        found["repeated_eos"] |= {row for row in rows if bodies[row][1] > 1}
        holds = {row for row in rows if special.search(said[row][0])}
        found["special"] |= holds
        plain = {i for i, row in enumerate(rows) if row in holds and plain_texts and not special.search(heads[row])}
        # As one text, so that the text is kept: alone, a response would get the space that many tokenizers put before a
        # text, and none of the tokens that begin within the prompt (the space that ends it, say).
        wholes = encode([heads[row] + bodies[row][0] for row in rows], plain=plain)
        sides.append([ids + end * complete[row] for row, ids in zip(rows, wholes, strict=True)])
    for row, *both in zip(rows, *sides, strict=True):
        # A token that straddles the boundary counts as the response's, in both alike, since both share one prompt.
        start = tokens.common_start(prompts[row], *both)
        found["straddling"] |= {row} if start < len(prompts[row]) else set()
        encoded[row] = prompts[row][:start], *(ids[start:] for ids in both)
    counts = {name: len(rows) for name, rows in found.items()} | {"reencoded": reencoded}
    return [encoded[row] for row in range(len(pairs))], counts
