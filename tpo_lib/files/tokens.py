"""Texts to token ids and back, whatever the tokenizer: which special tokens lead a text, end it, or stand in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

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
    """Token ids of texts, led by `lead`.

    Args:
        most: what follows the first `most` tokens may be missing: of a book, a page is tokenized to keep a page.
        plain: numbers of the texts whose special tokens are text like any other.
    """
    short = [text if most is None else text[: 16 * (most + SPARE)] for text in texts]
    rows = tokenizer(short, add_special_tokens=False)["input_ids"] if short else []
    for i, text in enumerate(texts):
        split = True if i in plain else None  # None: as the tokenizer is set
        again = partial(tokenizer, add_special_tokens=False, split_special_tokens=split)
        if split:
            rows[i] = again(short[i])["input_ids"]
        if len(short[i]) < len(text) and len(rows[i]) < most + SPARE:  # its tokens are longer than 16
            rows[i] = again(text)["input_ids"]
    return [row if row[: len(lead)] == lead else lead + row for row in rows]


def response_texts(tokenizer, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[str]:
    """What responses add to the text of their prompts, special tokens left out.

    A response is decoded behind its prompt: alone, sentencepiece would drop the space before its first word.
    """
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not prompts:
        return []
    whole = decode([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    heads, alone = decode(list(prompts)), decode(list(responses))
    return [w[len(h) :] if w.startswith(h) else a for h, w, a in zip(heads, whole, alone, strict=True)]


def vocabulary_name(tokenizer) -> str:
    """What names a vocabulary: equal names, equal meaning of every token id."""
    return content_key(sorted(tokenizer.get_vocab().items()))[:16]


def special_texts(tokenizer) -> re.Pattern:
    """What matches the text of any special token."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(added | set(tokenizer.all_special_tokens)))))


def without_eos(text: str, eos: str) -> tuple[str, int]:
    """Remove the EOS that end a text already (and the newline that templates put after it); also how many there were."""
    ends = re.match(rf"(?:\s*{re.escape(eos[::-1])})*", text[::-1])[0]  # read from behind
    return text[: len(text) - len(ends)], ends.count(eos[::-1])
