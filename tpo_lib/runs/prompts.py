"""Where prompts come from: what the model itself writes, IMDb's reviews, or a file; held out, none that training has seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpo_lib.runs.run import RunRecord, shared_prompts
from tpo_lib.sampling import imdb_prompts, sample_prompts

ROUNDS = 20  # of drawing held-out prompts anew where training has seen them


@dataclass(frozen=True)
class Prompts:
    """Prompts, and in words where they come from.

    Attributes:
        texts: distinct.
        words: for the head of an output.
        shared: how many of them training has seen (equal to one of its prompts, a beginning, or a continuation); None
            where that is not known.
    """

    texts: list[str]
    words: str
    shared: int | None = None


def stream(seed: int, tag: str) -> int:
    """A seed of its own for everything that shall not share its random numbers with `seed`, nor with any seed near it."""
    return int.from_bytes(hashlib.sha256(f"{tag} {seed}".encode()).digest()[:7], "big")


def training_prompts(
    source: str, count: int | None, model, tokenizer, *, seed: int, imdb: str | None = None
) -> Prompts:
    """Prompts to make training pairs from.

    Args:
        source: "model" (sampled from it), "imdb" (beginnings of the training reviews), or a file, see `read_prompts`.
        count: how many; None takes 512, of a file all.
        imdb: as in `pocket.load_imdb`.

    Raises:
        OSError, ValueError: the source cannot be read, or has fewer prompts.
    """
    draw, words = _source(source, model, tokenizer, imdb, "train")
    texts = draw(count or (512 if source in ("model", "imdb") else None), seed)
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
    if source not in ("model", "imdb"):
        texts = draw(count, seed)
        shared = None if seen is None else len(shared_prompts(seen, texts))
        return Prompts(texts, f"{len(texts)} {words}, {overlap(shared)}", shared)
    count, found, anew = count or 192, {}, 0
    for number in range(ROUNDS if seen else 1):
        fresh = [text for text in draw(count, stream(seed, f"held-out prompts {number}")) if text not in found]
        shared = set(shared_prompts(seen or (), fresh))
        anew += len(shared)
        found |= dict.fromkeys(text for i, text in enumerate(fresh) if i not in shared)
        if len(found) >= count:
            break
    if len(found) < count:
        raise ValueError(
            f"only {len(found)} of {count} held-out prompts were found that training has not seen: ask for fewer "
            "(--num-prompts), or bring your own (--prompts FILE)"
        )
    replaced = f" ({anew} others were drawn anew)" if anew else ""
    shared = None if seen is None else 0
    return Prompts(list(found)[:count], f"{count} {words}, {overlap(shared)}{replaced}", shared)


def recorded_prompts(record: RunRecord | None, tokenizer) -> list[str] | None:
    """The training prompts of a run as text; None where there is no record of them."""
    ids = record and record.prompts()
    return None if ids is None else tokenizer.batch_decode(ids, skip_special_tokens=True)


def read_prompts(path: str | Path) -> tuple[list[str], str]:
    """The distinct prompts of a file, and in words what was read and left out.

    Args:
        path: .jsonl with a text `prompt` in every line; any other file is text with a prompt a line.

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
    given = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    texts = [_prompt(path, *row) for row in given] if path.suffix == ".jsonl" else [line for _, line in given]
    if not texts:
        raise ValueError(f"{path} has no prompts; write one a line, or .jsonl with a `prompt`")
    distinct = list(dict.fromkeys(texts))
    repeated = f" ({len(texts) - len(distinct)} repeated ones left out)" if len(texts) > len(distinct) else ""
    return distinct, f"from {path}{repeated}"


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{path}, line {number} has no text under "prompt": {line[:80]!r}')
    return text


def _source(name: str, model, tokenizer, imdb: str | None, split: str):
    """How to draw (count, seed) -> prompts, and in words where from."""
    if name == "model":
        return lambda count, seed: sample_prompts(
            model, tokenizer, count, seed=seed
        ), f"sampled from {_start(tokenizer)}"
    if name == "imdb":
        from tpo_data.pocket import load_imdb

        texts = load_imdb(imdb)[split]["text"]
        lengths = {"min_tokens": 2, "max_tokens": 8}
        return (
            lambda count, seed: imdb_prompts(texts, tokenizer, count, **lengths, seed=seed),
            f"beginnings of IMDb's {split} reviews",
        )
    texts, words = read_prompts(name)

    def first(count: int | None, seed: int) -> list[str]:
        if count and count > len(texts):
            raise ValueError(f"--num-prompts {count}: {name} has {len(texts)} distinct prompts")
        return texts[:count]

    return first, words


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
    if shared is None:
        return "not compared with training prompts, of which there is no record"
    return f"{shared} of them seen in training"
