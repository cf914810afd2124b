"""Numbers of a response's tokens as data: rewards that guide TGDPO, and weights, by the token or by spans of characters.

A cell of a column such as chosen_token_rewards is a list of numbers, one a token, or of spans {start, end, value}: characters
start, ..., end - 1 of the response (of messages: of the last one's content), whatever the tokenizer. A token's number is the mean
over its characters, those of no span having the default. An empty span at the end is the token that ends the response.
"""

from __future__ import annotations

from datasets import Value

from tpo_lib.files import chat
from tpo_lib.files.formats import Bad

DEFAULTS = {"token_rewards": 0.0, "token_weights": 1.0}  # kind -> the number of a token that the data does not speak of
COLUMNS = tuple(f"{side}_{kind}" for kind in DEFAULTS for side in ("chosen", "rejected"))
FEATURE = [{"start": Value("int64"), "end": Value("int64"), "value": Value("float64")}]  # without start: of a token
FIX = "write a number a token, or spans {start, end, value} in characters of the response, in order and without overlap"
MOST = 3.4e38  # numbers are float32

Span = dict[str, float]


def read(value, column: str) -> list[Span] | None:
    """What a cell holds, as spans or, where they have no start, numbers a token; None where it is empty; else raises Bad."""
    if isinstance(value, str):
        value = chat.parsed(value, column, "is", FIX) if value.strip() else None
    if value is None or (isinstance(value, list) and not value):
        return None
    if not isinstance(value, list):
        raise Bad(column, f"is not a list but {chat.short(value)}", FIX)
    found = [item if isinstance(item, dict) else {"value": item} for item in value]
    end = 0
    for place, span in enumerate(found):
        number, whole = span.get("value"), span.get("start") is not None
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MOST:
            raise Bad(column, f"item {place} has no finite number but {chat.short(number)} (float32 is read)", FIX)
        if not whole and any(span[key] is not None for key in span if key != "value"):
            raise Bad(column, f"item {place} has a value and no start: {chat.short(span)}", FIX)
        if whole != (found[0].get("start") is not None):
            raise Bad(column, f"item {place} is {'a span' if whole else 'a number'} and the first is not", FIX)
        if whole:
            start, stop = span["start"], span.get("end")
            if not (type(start) is int and type(stop) is int and end <= start <= stop):
                raise Bad(
                    column,
                    f"item {place} goes from {chat.short(start)} to {chat.short(stop)}, not in whole numbers from {end} on",
                    FIX,
                )
            end = stop
    return [{"start": span.get("start"), "end": span.get("end"), "value": float(span["value"])} for span in found]


def moved(found: list[Span] | None, by: int) -> list[Span] | None:
    """Spans of a text of which the first `by` characters were taken away; what spoke of these alone is left out."""
    if not found or not by or found[0]["start"] is None:
        return found
    kept = [span for span in found if span["end"] > by or (span["start"] == span["end"] >= by)]
    return [span | {"start": max(0, span["start"] - by), "end": span["end"] - by} for span in kept] or None
