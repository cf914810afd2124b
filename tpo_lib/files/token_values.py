"""From numbers and spans of characters (`spans`) to a number for every token that a pair is encoded as, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, Value

from tpo_lib.files import chat, tokens
from tpo_lib.files.formats import Bad, BadRowsError
from tpo_lib.files.spans import DEFAULTS, FIX, Span

MARK = "what is said"  # a message whose end is looked for


def by_token(found: list[Span] | None, ends: Sequence[int], *, default: float, length: int, cut: bool) -> list[float]:
    """The numbers of a response's tokens.

    Args:
        ends: of every token, where its characters end in the response; the token that ends a text has none of its own.
        length: characters of the response.
        cut: the response was longer; then there may be more numbers than tokens.

    Raises:
        Bad: there is another number of numbers than of tokens, or a span ends behind the response.

    Example:
        >>> by_token([{"start": 0, "end": 4, "value": 1.0}], [2, 6, 6], default=0.0, length=6, cut=False)
        [1.0, 0.5, 0.0]
    """
    if not found:
        return [default] * len(ends)
    if found[0]["start"] is None:
        given = [span["value"] for span in found]
        if (
            len(given) == len(ends) - 1 and max(ends[:-1], default=0) >= length
        ):  # without one for the token that ends it
            given.append(default)
        if len(given) < len(ends) or (len(given) > len(ends) and not cut):
            raise Bad(
                "", f"has {len(given)} numbers for {len(ends)} tokens", "write one a token, or spans of characters"
            )
        return given[: len(ends)]
    if found[-1]["end"] > length:
        raise Bad(
            "", f"has a span that ends at {found[-1]['end']}, behind the {length} characters of the response", FIX
        )
    last = next((span["value"] for span in found if span["start"] == span["end"] == length), default)
    numbers, start, at = [], 0, 0
    for end in ends:
        if start >= length:
            numbers.append(last)
        elif end <= start:  # a further byte of a character has none of its own
            numbers.append(numbers[-1] if numbers else default)
        else:
            while at < len(found) and found[at]["end"] <= start:
                at += 1
            numbers.append(_mean(found, at, start, end, default))
        start = max(start, end)
    return numbers


def _mean(found: list[Span], at: int, start: int, end: int, default: float) -> float:
    """Over characters start, ..., end - 1, of which no span before number `at` has any."""
    total, rest = 0.0, end - start
    while at < len(found) and found[at]["start"] < end:
        share = max(0, min(end, found[at]["end"]) - max(start, found[at]["start"]))
        total, rest, at = total + share * found[at]["value"], rest - share, at + 1
    return (total + rest * default) / (end - start)


def aligned(
    pairs: Dataset, encoded: Sequence, tokenizer, kind: str, *, max_length: int, name: str = "the table"
) -> tuple[list[list[np.ndarray]], int]:
    """The numbers of a kind for every token of encoded pairs.

    Args:
        pairs: the table that `data.encode_pairs` made `encoded` of, with one of the kind's columns at least.
        kind: of DEFAULTS.
        max_length: as they were encoded.
        name: of the table, in errors.

    Returns:
        [chosen, rejected] of every pair, float32 arrays of a number a token; and how many responses have none in the table.

    Raises:
        BadRowsError: names the rows whose numbers do not belong to their response.
    """
    sides = [side for side in ("chosen", "rejected") if side in pairs.column_names]
    found, bad, bare = [], [], 0
    for pair, row, texts, tail in _written(pairs, encoded, tokenizer):
        numbers = []
        for side in sides:
            given, ids = row.get(f"{side}_{kind}"), getattr(pair, f"{side}_ids")
            bare += not given
            cut = len(pair.prompt_ids) + len(ids) == max_length
            try:
                place, length = _place(row[side], texts[side], tail)
                ends = _token_ends(tokenizer, texts["prompt"], texts[side], pair.prompt_ids, ids)
                ends = [max(0, end - place) for end in ends]
                laid = by_token(given, ends, default=DEFAULTS[kind], length=length, cut=cut)
                numbers.append(np.asarray(laid, dtype=np.float32))  # a fifth of a list's memory
            except Bad as problem:
                bad.append(Bad(f"{side}_{kind}", *problem.args[1:]).at(pair.row))
        found.append(numbers)
    if bad:
        raise BadRowsError(bad, name, "Repair them, or leave their cells empty.")
    return found, bare


def to_spans(
    pairs: Dataset, encoded: Sequence, tokenizer, side: str, numbers: Sequence[Sequence[float] | None]
) -> list[list[Span] | None]:
    """The way back: of every row the spans of the characters of its tokens, for any tokenizer; None where it has no numbers.

    Tokens that make one character have one span, with their mean; that of the token that ends a response is empty.
    """
    found: list[list[Span] | None] = [None] * len(pairs)
    for pair, row, texts, tail in _written(pairs, encoded, tokenizer):
        place, length = _place(row[side], texts[side], tail)
        ids = getattr(pair, f"{side}_ids")
        ends = _token_ends(tokenizer, texts["prompt"], texts[side], pair.prompt_ids, ids)
        found[pair.row] = _joined([max(0, end - place) for end in ends], numbers[pair.row], length)
    return found


def _written(pairs: Dataset, encoded: Sequence, tokenizer) -> Iterator[tuple]:
    """Every pair, its row, prompt and responses as they are written out, and what a template writes behind the last message."""
    texts, tail = _texts(pairs, tokenizer)
    for start in range(0, len(encoded), 1000):
        part = encoded[start : start + 1000]
        columns = pairs[[pair.row for pair in part]]  # one by one `datasets` takes longer than all else
        for i, pair in enumerate(part):
            row = {name: values[i] for name, values in columns.items()}
            said = row if texts is None else {name: column[pair.row] for name, column in texts.items()}
            yield pair, row, said, tail


def _joined(ends: Sequence[int], numbers: Sequence[float], length: int) -> list[Span]:
    parts: dict[tuple[int, int], list[float]] = {}
    start = 0
    for end, number in zip(ends, numbers, strict=True):
        if start >= length:
            parts[length, length] = [number]
        elif end > start:
            parts[start, min(end, length)] = [number]
        elif parts:
            parts[next(reversed(parts))].append(number)
        start = max(start, end)
    return [{"start": a, "end": b, "value": sum(values) / len(values)} for (a, b), values in parts.items()]


def _texts(pairs: Dataset, tokenizer):
    """Messages as they are written out, None of texts; and what the chat template writes behind the last of them."""
    if isinstance(pairs.features["prompt"], Value):
        return None, ""
    one = {"prompt": [[{"role": "user", "content": MARK}]], "chosen": [[{"role": "assistant", "content": MARK}]]}
    (written,) = chat.render(Dataset.from_dict(one), tokenizer)[0]["chosen"]
    return chat.render(pairs, tokenizer)[0], written.rpartition(MARK)[2]


def _place(said: str | list[chat.Message], written: str, tail: str) -> tuple[int, int]:
    """Where the text that spans speak of begins in a response as it is written out, and how long it is."""
    if isinstance(said, str):
        return 0, len(said)
    content = said[-1]["content"] or ""
    body = written.removesuffix(tail)  # it may hold the same words: <|im_end|> an answer "end"
    for text in (content, content.strip()):  # many templates strip it
        if body.endswith(text):
            return len(body) - len(text) - content.index(text), len(content)
    for text in (content, content.strip()):
        if (place := written.rfind(text)) >= 0:
            return place - content.index(text), len(content)
    raise Bad("", "speaks of a text that the chat template changes", "leave it empty, or give the pair as text")


def _token_ends(tokenizer, prompt: str, response: str, prompt_ids: list[int], ids: list[int]) -> list[int]:
    """Of every token of a response, where its characters end in it; the token that ends it has none."""
    if tokenizer.is_fast:
        told = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
        inner = told["input_ids"]
        lead = next(n for n in range(len(prompt_ids) + 1) if prompt_ids[n:] == inner[: len(prompt_ids) - n])  # BOS, say
        first = len(prompt_ids) - lead
        whole = inner[first : first + len(ids)]
        if whole == ids[: len(whole)] and len(ids) - len(whole) <= 1:
            ends = [end - len(prompt) for _, end in told["offset_mapping"][first : first + len(ids)]]
            return ends + [len(response)] * (len(ids) - len(whole))
    # sampled as other tokens than the text is encoded as
    heads = [ids[: n + 1] for n in range(len(ids))]
    return [len(text.rstrip("\ufffd")) for text in tokens.response_texts(tokenizer, [prompt_ids] * len(ids), heads)]
