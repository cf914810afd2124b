"""Preference pairs on their way to the model: tokenize, truncate, collate, batch.

    Dataset (`files.pairs.load_pairs`) --encode_pairs--> [EncodedPair] --bucketed_batches, collate--> PairBatch

Nothing disappears silently: a row that cannot be used is named by its row (counted from 0) and column together with the fix,
and a response that is cut is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset

from tpo_lib.files import encoding
from tpo_lib.files.formats import BadRow, BadRowsError, OnBadRows
from tpo_lib.types import IGNORE, PAD, PairBatch


@dataclass(frozen=True)
class EncodedPair:
    """One tokenized pair, of row `row` of the table. Without `rejected_ids` it has no rejected side: a row for SFT."""

    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences, prompt included."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def size(self) -> int:
        """Tokens of its sequences, two or, without a rejected side, one, when both are padded to its length."""
        return self.length * (1 + bool(self.rejected_ids))


NOTES = {  # field of EncodingReport: what its number of rows says
    "reencoded": "encoded from their text: the ids beside it are another tokenizer's, or say another text",
    "straddling": "where a token straddles the end of the prompt; it counts as the response's",
    "special": "that hold the text of a special token in a response",
    "repeated_eos": "with several EOS at the end of a response; one was kept",
}


@dataclass(frozen=True)
class EncodingReport:
    """What became of a table: pairs kept, responses cut at max_length, rows left out, and what NOTES says of the others."""

    kept: int
    truncated: int
    skipped: list[BadRow]
    reencoded: int = 0
    straddling: int = 0
    special: int = 0
    repeated_eos: int = 0

    def __str__(self) -> str:
        first = f" (the first: {self.skipped[0]})" if self.skipped else ""
        counts = f"{self.kept:,} pairs kept, {self.truncated:,} responses cut to max_length"
        notes = "".join(f"; {count:,} rows {said}" for name, said in NOTES.items() if (count := getattr(self, name)))
        return f"{counts}, {len(self.skipped):,} rows skipped{first}{notes}"


def encode_pairs(
    pairs: Dataset, tokenizer, *, max_length: int, on_bad_rows: OnBadRows = "error"
) -> tuple[list[EncodedPair], EncodingReport]:
    """Tokenize pairs: special tokens that lead a text, the prompt, the response, and one EOS where that ends by itself.

    A response with `*_complete` False does not end by itself; without that column every response does. A text that begins with
    BOS gets no second one; messages go through the tokenizer's chat template, whose special tokens replace the tokenizer's. The
    text of any other special token, "</s>" say, is that token where the prompt holds such tokens too or came from a chat
    template; else it is text like any other (except for a Unigram model, which knows no other reading of it).

    A pair that was sampled (columns chosen_ids, rejected_ids, tokenizer) is trained as the tokens that were sampled, since its
    text would often be encoded otherwise; a table of another tokenizer's is encoded anew.

    Args:
        pairs: columns as from `load_pairs`; without the column rejected, rows for SFT.
        max_length: most tokens of prompt + response; responses are cut at their end.
        on_bad_rows: "error" raises on rows that cannot be used, "skip" leaves them out.

    Returns:
        The pairs, and the report, which counts all of these cases.

    Raises:
        BadRowsError: a prompt leaves no room, a response has no token, or two responses have the same ones.
        ValueError: the tokenizer has no EOS, or no chat template although the pairs are messages.
    """
    encoding.check(tokenizer, max_length, on_bad_rows)
    found = encoding.encode_rows(pairs, tokenizer, max_length)
    if found.skipped and on_bad_rows == "error":
        raise BadRowsError(found.skipped, "the table")
    report = EncodingReport(len(found.rows), found.truncated, found.skipped, **found.counts)
    return [EncodedPair(*row) for row in found.rows], report


# ---- batching


def column(pairs: Sequence[EncodedPair], name: str) -> np.ndarray:
    """(n,) the row, length or size of every pair; a table (`fast.table`) knows them without making its pairs."""
    known = getattr(pairs, f"{name}s", None)
    return np.array([getattr(pair, name) for pair in pairs], np.int64) if known is None else known


def bare_rows(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """The rows of the pairs without a rejected side."""
    return column(pairs, "row")[column(pairs, "size") == column(pairs, "length")]  # of one sequence alone


def prompt_numbers(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """(n,) a number for the prompt of every pair, the same for the same one."""
    known, seen = getattr(pairs, "prompts", None), {}
    numbers = (seen.setdefault(tuple(pair.prompt_ids), len(seen)) for pair in pairs)
    return np.fromiter(numbers, np.int64) if known is None else known


def collate(pairs: Sequence[EncodedPair], pad_token_id: int = PAD) -> PairBatch:
    """Pad B pairs on the right to one PairBatch of N = 2B sequences, chosen first; without rejected sides N = B.

    Raises:
        ValueError: there is no pair, or some have a rejected side and some do not.

    Example:
        >>> collate([EncodedPair(0, [5], [6, 7], [8])], pad_token_id=0).labels.tolist()
        [[-100, 6, 7], [-100, 8, -100]]
    """
    if not pairs:
        raise ValueError("collate needs at least one pair, got none")
    bare = sum(not pair.rejected_ids for pair in pairs)
    if 0 < bare < len(pairs):
        raise ValueError(f"{bare} of {len(pairs)} pairs have no rejected side; batch them apart")
    sides = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    sides += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs if not bare]
    shape = (len(sides), max(pair.length for pair in pairs))  # (N, T)
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORE)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for i, (prompt, response) in enumerate(sides):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        labels[i, start:end] = input_ids[i, start:end]
        attention_mask[i, :end] = 1
    return PairBatch(input_ids, attention_mask, labels, torch.tensor([pair.row for pair in pairs]))


def bucketed_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, prompts: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut n rows into full batches of similar length, in an order that depends on seed and epoch alone.

    With `prompts`, the number of every row's, those of a prompt follow each other: but at the end of a batch, they share it.

    Raises:
        ValueError: there are fewer rows than batch_size, or batch_size is not positive.

    Example:
        >>> [sorted(batch) for batch in bucketed_batches([9, 1, 8, 2], 2, seed=0, epoch=0)]
        [[0, 2], [1, 3]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if len(lengths) < batch_size:
        raise ValueError(f"{len(lengths)} pairs do not fill one batch of {batch_size}; lower batch_size or add pairs")
    generator = np.random.default_rng([seed, epoch])
    order, lengths = generator.permutation(len(lengths)), np.asarray(lengths)  # (n,) each
    if prompts is not None:
        prompts = np.asarray(prompts)
        longest, first = np.zeros(1 + prompts.max(), int), np.full(1 + prompts.max(), len(order))
        np.maximum.at(longest, prompts, lengths)
        np.minimum.at(first, prompts[order], np.arange(len(order)))
        order, lengths = order[np.argsort(first[prompts[order]], kind="stable")], longest[prompts]
    # n mod batch_size rows are left out before the sorting, which would always leave out the longest
    order = order[: len(order) // batch_size * batch_size]
    # sorted within 50 batches: alike lengths, and still another order every epoch
    order = order[np.lexsort((lengths[order], np.arange(len(order)) // (50 * batch_size)))]
    batches = order.reshape(-1, batch_size)
    return batches[generator.permutation(len(batches))].tolist()


def token_budget(pairs: Sequence[EncodedPair], max_tokens: int) -> list[list[EncodedPair]]:
    """Sort pairs by length and cut them into batches of at most `max_tokens` tokens, padding included.

    A batch of B pairs takes 2 B T tokens, T the length of its longest sequence (B T without rejected sides).

    Raises:
        ValueError: a single pair takes more; the message names its row.

    Example:
        >>> pair = lambda row, length: EncodedPair(row, [0], [1] * (length - 1), [2])
        >>> [[p.row for p in batch] for batch in token_budget([pair(0, 9), pair(1, 2), pair(2, 3)], 18)]
        [[1, 2], [0]]
    """
    batches: list[list[EncodedPair]] = []
    for pair in sorted(pairs, key=lambda pair: pair.length):
        if pair.size > max_tokens:
            taken = f"the pair of row {pair.row} takes {pair.size} tokens, more than max_tokens {max_tokens}"
            raise ValueError(f"{taken}; raise it, or lower max_length")
        if not batches or pair.size * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(pair)
    return batches


def padding(batch: PairBatch) -> tuple[torch.Tensor, int]:
    """How many of a batch's positions are padding, and how many positions there are."""
    return (1 - batch.attention_mask).sum(), batch.attention_mask.numel()
