"""Where prompts come from: what the model itself writes, IMDb's reviews, or a file; held out, none that training has seen."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpo_lib.files.imdb import load_imdb
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.files.tokens import response_texts
from tpo_lib.models import check_sequences
from tpo_lib.runs.run import RunRecord, shared_prompts
from tpo_lib.sampling import Sampler, sample_ids, seeded

SOURCES = ("model", "pocket", "imdb")  # any other is a file
ROUNDS = 20  # of drawing held-out prompts anew where training has seen them


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts, and in words where they come from."""

    texts: list[str]
    words: str
    # how many training has seen (equal to one of its prompts, a beginning, or a continuation); None: not known
    shared: int | None = None


@dataclass(frozen=True)
class Recipe:
    """Settings of a set of preference pairs."""

    prompts: int
    min_tokens: int  # of a prompt
    max_tokens: int
    samples_per_prompt: int
    rule: str  # which pairs of samples, as `pairing.pairs_from_scores` has it


# The IMDb experiment of the DPO paper: 25,000 review prefixes of 2-8 tokens, 4 completions of each, all 6 pairs of them.
PAPER_RECIPE = Recipe(prompts=25_000, min_tokens=2, max_tokens=8, samples_per_prompt=4, rule="all")


def stream(seed: int, tag: str) -> int:
    """A seed of its own for what shall not share its random numbers with `seed`, nor with any seed near it."""
    return int.from_bytes(hashlib.sha256(f"{tag} {seed}".encode()).digest()[:7], "big")


def training_prompts(
    source: str, count: int | None, model, tokenizer, *, seed: int, imdb: str | None = None
) -> Prompts:
    """Prompts to make training pairs from; OSError or ValueError where the source cannot be read, or has fewer.

    Args:
        source: "model" (sampled from it), "pocket" (openings by the bundled model, in whole words), "imdb" (beginnings of the
            training reviews), or a file, see `read_prompts`.
        count: how many; None takes 512, of a file all.
        imdb: as in `files.imdb.load_imdb`.
    """
    draw, words = _source(source, model, tokenizer, imdb, "train")
    texts = draw(count or (512 if source in SOURCES else None), seed)
    return Prompts(texts, f"{len(texts)} {words}")


def held_out_prompts(
    source: str,
    count: int | None,
    model,
    tokenizer,
    *,
    seed: int,
    imdb: str | None = None,
    seen: Sequence[str] | None = None,
) -> Prompts:
    """Prompts to report on: from a random stream that no training draws from (IMDb: its test reviews).

    Those that training has seen all the same, since short prompts are few, are drawn anew. A file is taken as it is; its
    overlap is counted.

    Args:
        source, imdb: as in `training_prompts`.
        count: how many; None takes 192, of a file all.
        seen: the training prompts; None where they are not known.
    """
    draw, words = _source(source, model, tokenizer, imdb, "test")
    if source not in SOURCES:
        texts = draw(count, seed)
        shared = None if seen is None else len(shared_prompts(seen, texts))
        return Prompts(texts, f"{len(texts)} {words}, {overlap(shared)}", shared)
    count, found, anew = count or 192, {}, 0
    for number in range(ROUNDS if seen else 1):
        fresh = [text for text in draw(count, stream(seed, f"held-out prompts {number}")) if text not in found]
        known = set(shared_prompts(seen or (), fresh))
        anew += len(known)
        found |= dict.fromkeys(text for i, text in enumerate(fresh) if i not in known)
        if len(found) >= count:
            break
    else:
        few = f"only {len(found)} of {count} held-out prompts were found that training has not seen"
        raise ValueError(f"{few}: ask for fewer (--num-prompts), or bring your own (--prompts FILE)")
    shared, replaced = None if seen is None else 0, f" ({anew} others were drawn anew)" if anew else ""
    return Prompts(list(found)[:count], f"{count} {words}, {overlap(shared)}{replaced}", shared)


def prompt_roots(texts: Sequence[str]) -> list[str]:
    """Of every text the shortest that it begins with (itself, or one of two characters or more); a whole set shares nothing with
    the others where their roots differ, in the sense of `run.shared_prompts`.

    Example:
        >>> prompt_roots(["The film is", "A plot", "The film", "The"])
        ['The', 'A plot', 'The', 'The']
    """
    roots, root = {}, ""
    for text in sorted(set(texts)):  # what begins with a root stands directly behind it
        root = root if len(root) > 1 and text.startswith(root) else text
        roots[text] = root
    return [roots[text] for text in texts]


def recorded_prompts(record: RunRecord | None, tokenizer) -> list[str] | None:
    """The training prompts of a run as text; None where there is no record of them."""
    ids = record and record.prompts()
    return None if ids is None else tokenizer.batch_decode(ids, skip_special_tokens=True)


def read_prompts(path: str | Path) -> tuple[list[str], str]:
    """The distinct prompts of a .jsonl with a text `prompt` in every line, or of a text with one a line; and what was left out.

    Raises:
        OSError: there is no such file.
        ValueError: it is no UTF-8, has no prompts, or a line has none (it is named).
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"--prompts {path}: neither `model`, nor `imdb`, nor a file that is there")
    try:
        lines = [line.removesuffix("\r") for line in path.read_text("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    read = _prompt if path.suffix == ".jsonl" else lambda place, line: line
    texts = [read(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise ValueError(f"{path} has no prompts; write one a line, or .jsonl with a `prompt`")
    distinct = list(dict.fromkeys(texts))
    repeated = f" ({len(texts) - len(distinct)} repeated ones left out)" if len(texts) > len(distinct) else ""
    return distinct, f"from {path}{repeated}"


def _prompt(place: str, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{place} has no text under "prompt": {line[:80]!r}')
    return text


def _source(name: str, model, tokenizer, imdb: str | None, split: str):
    """How to draw (count, seed) -> prompts, and in words where from."""
    texts, words = None, f"sampled from {_start(tokenizer)}"
    if name == "imdb":
        texts, words = load_imdb(imdb)[split]["text"], f"beginnings of IMDb's {split} reviews"
    elif name == "pocket":
        words = "openings that the bundled model writes"
    elif name != "model":
        texts, words = read_prompts(name)

    def draw(count: int | None, seed: int) -> list[str]:
        if name == "model":
            return sample_prompts(model, tokenizer, count, seed=seed)
        if name == "imdb":
            return imdb_prompts(texts, tokenizer, count, seed=seed)
        if name == "pocket":
            return pocket_openings(count, seed=seed, device=model.device)
        if count and count > len(texts):
            raise ValueError(f"--num-prompts {count}: {name} has {len(texts)} distinct prompts")
        return texts[:count]

    return draw, words


def pocket_openings(count: int, *, seed: int, device="cpu") -> list[str]:
    """Distinct beginnings of reviews by the bundled model, of two whole words or more, for models that read other tokens.

    Cut in the midst of a word, they would send a model that was not made for reviews into lists and code.
    """
    model, tokenizer = load_model(POCKET, device=device), load_tokenizer(POCKET)
    found: dict[str, None] = {}
    for number in range(ROUNDS):
        drawn = sample_prompts(model, tokenizer, count, min_tokens=4, max_tokens=10, seed=seed + number)
        whole = (
            text.strip().rsplit(maxsplit=1)[0] for text in drawn if len(text.split()) > 2
        )  # the last word may go on
        found |= dict.fromkeys(whole)
        if len(found) >= count:
            break
    return _shuffled(dict.fromkeys(itertools.islice(found, count)), count, random.Random(seed))


def _start(tokenizer) -> str:
    """What the model writes on from, and a warning where that is unlikely to begin a text."""
    if tokenizer.bos_token_id is None:
        why = f"its tokenizer has no BOS, so they begin after {tokenizer.eos_token!r}"
    elif tokenizer.chat_template:
        why = "it is a chat model, which seldom saw a text begin without its template"
    else:
        return "the model"
    return f"the model ({why}: look at them, they may be no beginnings of texts; --prompts FILE brings your own)"


def overlap(shared: int | None) -> str:
    """How many prompts training has seen, in words."""
    unknown = "not compared with training prompts, of which there is no record"
    return unknown if shared is None else f"{shared} of them seen in training"


# ---- from a model, from texts


def sample_prompts(
    model, tokenizer, count: int, *, min_tokens: int = 2, max_tokens: int = 8, seed: int, batch_size: int = 256
) -> list[str]:
    """Sample distinct prompts from the model itself: what it writes from BOS on, cut to a length drawn uniformly.

    Prompts that are blank, ended early, or do not tokenize back to the same ids are drawn anew, at the same length.

    Raises:
        ValueError: the lengths make no sense, the model has no such token or positions, or not that many distinct beginnings.
    """
    _check_lengths(count, min_tokens, max_tokens)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        fix = "set bos_token, or bring prompts (--prompts FILE)"
        raise ValueError(f"the tokenizer has neither a BOS nor an EOS token, so a text has no beginning; {fix}")
    check_sequences(model, [("the beginning of a text", [bos])], room=max_tokens)
    draw = random.Random(seed)
    missing = Counter(draw.randint(min_tokens, max_tokens) for _ in range(count))
    found: dict[str, None] = {}
    with seeded(seed, model.device):
        for _ in range(100):
            if not missing.total():
                break
            lengths = list(missing.elements())
            lengths *= math.ceil(batch_size / len(lengths))  # a batch costs the same full or not
            sampled = sample_ids(model, tokenizer, [[bos]] * len(lengths), Sampler(max(missing)), batch_size)
            rows = _cut([ids for ids, _ in sampled], lengths)
            for text, length in zip(_prompt_texts(rows, tokenizer), lengths, strict=True):
                if text is not None and text not in found and missing[length]:
                    found[text] = None
                    missing[length] -= 1
            missing = +missing  # forgets the lengths that are done
    return _shuffled(found, count, draw)


def imdb_prompts(
    texts: Iterable[str], tokenizer, count: int, *, min_tokens: int = 2, max_tokens: int = 8, seed: int
) -> list[str]:
    """Take distinct prompts from the beginnings of real texts, each cut to a length drawn uniformly.

    Raises:
        ValueError: the lengths make no sense, or the texts do not have that many distinct beginnings.
    """
    _check_lengths(count, min_tokens, max_tokens)
    draw = random.Random(seed)
    texts = list(texts)
    draw.shuffle(texts)
    found: dict[str, None] = {}
    for start in range(0, len(texts), 1000):
        heads = [text[: 64 * max_tokens] for text in texts[start : start + 1000]]
        lengths = [draw.randint(min_tokens, max_tokens) for _ in heads]
        encoded = tokenizer(heads, add_special_tokens=False)["input_ids"]
        whole = _prompt_texts(_cut(encoded, lengths), tokenizer)
        found |= dict.fromkeys(text for text in whole if text is not None)
        if len(found) >= count:
            break
    return _shuffled(dict.fromkeys(itertools.islice(found, count)), count, draw)


def _check_lengths(count: int, min_tokens: int, max_tokens: int) -> None:
    if count < 1 or not 1 <= min_tokens <= max_tokens:
        given = f"{count}, {min_tokens}, {max_tokens}"
        raise ValueError(f"count must be at least 1 and 1 <= min_tokens <= max_tokens, got {given}")


def _cut(rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Rows of ids cut to their lengths; empty where they ended before."""
    return [ids[:length] if len(ids) >= length else [] for ids, length in zip(rows, lengths, strict=True)]


def _prompt_texts(rows: list[list[int]], tokenizer) -> list[str | None]:
    """Decode rows of ids; None where the text is blank or broken, or would tokenize to other ids."""
    texts = response_texts(tokenizer, [[]] * len(rows), rows)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        text if ids == back and text.strip() and "\ufffd" not in text else None
        for ids, back, text in zip(rows, again, texts, strict=True)
    ]


def _shuffled(found: dict[str, None], count: int, draw: random.Random) -> list[str]:
    """All prompts in random order: the last ones found are mostly short, and callers split the list."""
    if len(found) < count:
        few = f"only {len(found)} of {count} distinct prompts were found"
        raise ValueError(f"{few}; ask for fewer, raise max_tokens, or give more texts")
    prompts = list(found)
    draw.shuffle(prompts)
    return prompts
