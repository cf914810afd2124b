"""Texts to token ids and back, whatever the tokenizer: which special tokens lead a text, end it, or stand in it.

What `data.encode_pairs` asks, so that the loss reads the tokens that were meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from datasets import Dataset

from tpo_lib.files.formats import Bad
from tpo_lib.files.layouts import SAMPLED
from tpo_lib.files.store import content_key

SPARE = 32  # tokens behind a cut that are not used: what stands behind the cut would have changed the last of them


def prompt_token_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize prompts with the special tokens that lead a text (BOS), once, and none that would end it."""
    return token_ids(tokenizer, texts, lead=leading_ids(tokenizer))


def leading_ids(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    whole, alone = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    return whole[: next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)]


def token_ids(
    tokenizer, texts: Sequence[str], *, lead: list[int], most: int | None = None, plain: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids of texts, led by `lead`; in the texts numbered in `plain`, special tokens are text like any other.

    What follows the first `most` tokens may be missing: of a book, a page is tokenized to keep a page.
    """
    short = [text if most is None else text[: 16 * (most + SPARE)] for text in texts]
    rows = tokenizer(short, add_special_tokens=False)["input_ids"] if short else []
    cut = {i for i, text in enumerate(texts) if len(short[i]) < len(text)}
    for i in sorted(cut | set(plain)):
        again = partial(tokenizer, add_special_tokens=False, split_special_tokens=True if i in plain else None)
        if i in plain:  # else, None: as the tokenizer is set
            rows[i] = again(short[i])["input_ids"]
        if i in cut and len(rows[i]) < most + SPARE:  # its tokens are longer than 16
            rows[i] = again(texts[i])["input_ids"]
    return [row if row[: len(lead)] == lead else lead + row for row in rows]


def response_texts(tokenizer, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[str]:
    """What responses add to the text of their prompts, special tokens left out."""
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not prompts:
        return []
    # behind their prompts: alone, sentencepiece would drop the space before their first word
    whole = decode([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    heads, alone = decode(list(prompts)), decode(list(responses))
    return [w[len(h) :] if w.startswith(h) else a for h, w, a in zip(heads, whole, alone, strict=True)]


def vocabulary_name(tokenizer) -> str:
    """What names a vocabulary: equal names, equal meaning of every token id."""
    return content_key(sorted(tokenizer.get_vocab().items()))[:16]


def token_method(scorer, name: str, tokenizer) -> Callable | None:
    """The method `name` of a scorer, which reads token ids, where it has one and its ids are this tokenizer's; else None."""
    method, own = getattr(scorer, name, None), getattr(scorer, "tokenizer", None)
    if method is None or own is None:  # a scorer of texts may call anything its tokenizer
        return None
    return method if vocabulary_name(own) == vocabulary_name(tokenizer) else None


def special_texts(tokenizer) -> re.Pattern:
    """What matches the text of any special token."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(added | set(tokenizer.all_special_tokens)))))


def without_eos(text: str, eos: str) -> tuple[str, int]:
    """Remove the EOS that end a text already (and the newline that templates put after it); also how many there were."""
    if eos not in text:
        return text, 0
    ends = re.match(rf"(?:\s*{re.escape(eos[::-1])})*", text[::-1])[0]  # read from behind
    return text[: len(text) - len(ends)], ends.count(eos[::-1])


def common_start(*rows: list[int]) -> int:
    """How many ids the rows begin with alike.

    Example:
        >>> common_start([1, 2], [1, 2, 3], [1, 4])
        1
    """
    shortest = min(rows, key=len)
    if all(row[: len(shortest)] == shortest for row in rows):  # nearly always, and fast
        return len(shortest)
    return next(i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)


def complete(pairs: Dataset, column: str) -> list[bool]:
    """Of every row, whether its response ends by itself."""
    flags = pairs[f"{column}_complete"][:] if f"{column}_complete" in pairs.column_names else [True] * len(pairs)
    return [flag is not False for flag in flags]


def sampled_ids(pairs: Dataset, texts, prompts: list[list[int]], tokenizer) -> tuple[dict[int, tuple], int]:
    """The ids (prompt, chosen, rejected) of sampled rows, where they can be trained; and in how many rows they cannot.

    They can where the vocabulary is the same, and they still say the text and the flag that stand beside them: whoever
    edits a text, or exchanges the two columns, means the text.
    """
    if not set(SAMPLED) <= set(pairs.column_names):
        return {}, 0
    chosen, rejected, names = (pairs[column][:] for column in SAMPLED)
    given = [row for row in range(len(pairs)) if chosen[row] or rejected[row]]
    mine = vocabulary_name(tokenizer)
    good = [row for row in given if names[row] == mine and chosen[row] and rejected[row]]
    for column, ids in (("chosen", chosen), ("rejected", rejected)):
        ends, text = complete(pairs, column), texts[column][:]
        spoken = [ids[row][:-1] if ends[row] else ids[row] for row in good]
        said = response_texts(tokenizer, [prompts[row] for row in good], spoken)
        as_said = [row for row, words in zip(good, said, strict=True) if words == text[row]]
        good = [row for row in as_said if ends[row] or ids[row][-1] != tokenizer.eos_token_id]
    return {row: (prompts[row], chosen[row], rejected[row]) for row in good}, len(given) - len(good)


def check_ids(prompt: list[int], responses: list[list[int]], max_length: int, eos: int) -> None:
    """Raise Bad where a prompt leaves no room, a response has no token, or two responses have the same ones."""
    room = max_length - len(prompt)
    if not prompt:
        raise Bad("prompt", "has no tokens of its own, so nothing predicts the response", "give it text or a BOS token")
    if room < 1:
        more = " or more" if len(prompt) > max_length + SPARE else ""  # it may have been cut
        problem = f"takes {len(prompt)} tokens{more}, which leaves a response no room within max_length {max_length}"
        raise Bad("prompt", problem, f"raise max_length above {len(prompt)} or shorten the prompt")
    for column, ids in zip(("chosen", "rejected"), responses, strict=False):
        if ids in ([], [eos]):
            raise Bad(column, "tokenizes to nothing", "write a response or remove the row")
    if len(responses) == 2 and responses[0][:room] == responses[1][:room]:
        cut = responses[0] != responses[1]
        problem = f"has the same first {room} tokens as chosen" if cut else "has the same tokens as chosen"
        raise Bad("rejected", problem, "raise max_length or remove the row" if cut else "remove the row")
