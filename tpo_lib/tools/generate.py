"""`generate`: a model's answers to a file of questions, in the file that a judge's tool reads.

Batches are cut before anything is sampled, and each has a seed of its own, so that an answer does not depend on what was
answered before: batches are kept in OUTPUT.partial as they are done, and a run that goes on writes what one without a break
would have. How answers were made stands beside them in OUTPUT.settings.json; neither name ends as the files that tools look for.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from tpo_lib import sampling
from tpo_lib.files import chat, store
from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.files.tokens import prompt_token_ids
from tpo_lib.models import check_sequences, choose_device, fingerprint, tokenizer_content
from tpo_lib.runs.prompts import stream
from tpo_lib.tools.answers import FORMATS, MT_BENCH, OTHER, Item, as_text, messages, read_questions

PLAIN = "the tokenizer has no chat template: the model writes on from each question as it stands, as with --plain"


@dataclass(frozen=True)
class Settings:
    """How answers are sampled.

    Attributes:
        temperature: of all answers, or None: MT-Bench's, by category.
        plain: questions as they stand, without the chat template; turns are parted by a blank line.
    """

    max_new_tokens: int
    temperature: float | None
    top_p: float
    seed: int
    batch_size: int
    plain: bool

    def temperature_of(self, question: Item) -> float:
        """Of a question's answers."""
        return MT_BENCH.get(question.more.get("category"), OTHER) if self.temperature is None else self.temperature


@dataclass
class Reply:
    """What a model said to a question, turn by turn; `cut` where a turn came to max_new_tokens before it ended."""

    said: list[str] = field(default_factory=list)
    cut: bool = False


def command(options) -> None:
    """Answer the questions of a file with a model, or go on with it; `options` are the flags."""
    output, form = Path(options.output), FORMATS[options.format]
    if output.suffix != form.suffix:
        raise ValueError(f"--output {output} must end in {form.suffix}, as {options.format} has it")
    questions, device = read_questions(options.questions, options.format), choose_device(options.device)
    tokenizer = load_tokenizer(options.model)
    plain = options.plain or not tokenizer.chat_template
    if plain and not options.plain:
        print(PLAIN, file=sys.stderr)
    temperature = form.temperature if options.temperature is None else options.temperature
    settings = Settings(
        options.max_new_tokens, temperature, options.top_p, options.seed, options.batch_size, plain=plain
    )
    model = load_model(options.model, dtype=getattr(torch, options.dtype), device=device)
    facts = {"format": options.format, "name": options.name or output.stem, **asdict(settings), "dtype": options.dtype}
    facts |= {"device": device.type, "questions": store.content_key([asdict(question) for question in questions])}
    facts |= {"weights": fingerprint(model), "tokenizer": store.content_key(tokenizer_content(tokenizer))}
    facts |= {"chat template": None if plain else tokenizer.chat_template}
    facts |= {"temperature": MT_BENCH | {"others": OTHER}} if temperature is None else {}
    with store.alone(output):
        if not _is_done(output, facts):
            _write(output, model, tokenizer, questions, settings, facts, options.model)
        _beside(output, "partial").unlink(missing_ok=True)


def _write(output: Path, model, tokenizer, questions, settings: Settings, facts: dict, name: str) -> None:
    """Answer what is not answered yet, and write the file."""
    began, replies = _answered(output, model, tokenizer, questions, settings, facts)
    form, keep = FORMATS[facts["format"]], facts["format"] == "jsonl"
    # without white space around them, as FastChat and AlpacaEval have it; a plain continuation keeps its own
    texts = [[text if keep else text.strip() for text in reply.said] for reply in replies]

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [form.row(each, said, facts["name"], began, tokens) for each, said in zip(questions, texts, strict=True)]
    text = as_text(rows, facts["format"])
    cut, empty = sum(reply.cut for reply in replies), sum(not "".join(said).strip() for said in texts)
    told = {"model": str(name), "began": began, "answers": len(rows), "cut": cut, "empty": empty}
    store.write_json(_beside(output, "settings.json"), facts | told | {"file": store.content_key(text)}, indent=1)
    store.write_file(output, text)  # last: a file that is there is done
    print(f"{len(rows)} answers in {output}; {cut} were cut at {settings.max_new_tokens} tokens, {empty} are empty")


def _beside(output: Path, word: str) -> Path:
    return output.with_name(f"{output.name}.{word}")


def _is_done(output: Path, facts: dict) -> bool:
    """Whether the file is there; raises where it is another's, or was altered."""
    side = _beside(output, "settings.json")
    if not output.exists():
        return False
    if not side.exists():
        raise FileExistsError(f"{output} is there, and no {side.name} says how it was made; name another --output")
    known = store.read_json(side, "remove it and the answers, or name another --output")
    _check_same(known, facts, output)
    if known["file"] != store.content_key(output.read_text(encoding="utf-8")):
        raise FileExistsError(f"{output} was altered since it was written; move it away or name another --output")
    print(f"{output} is there already, by the same model and settings")
    return True


def _check_same(known: dict, facts: dict, output: Path) -> None:
    changed = [name for name, value in json.loads(json.dumps(facts)).items() if known.get(name) != value]
    if changed:
        fix = f"name another --output, or remove {output.name} and {output.name}.*"
        raise RuntimeError(f"{output} was begun with another {' and another '.join(changed)}; {fix}")


def _answered(output, model, tokenizer, questions, settings: Settings, facts: dict) -> tuple[float, list[Reply]]:
    """When the work was begun, and a reply to every question; of batches that are done, the replies that were kept."""
    planned, texts = batches(model, tokenizer, questions, settings)
    journal = _beside(output, "partial")
    # behind the last newline stands what a kill left of a batch
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    head, *done = map(json.loads, lines or [json.dumps({"facts": facts, "began": time.time()})])
    _check_same(head["facts"], facts, output)
    kept = {each["batch"]: [Reply(**reply) for reply in each["replies"]] for each in done}
    store.write_file(journal, "".join(f"{json.dumps(line)}\n" for line in (head, *done)))
    before = sum(map(len, kept.values()))
    if before:
        print(f"{output}: {before} of {len(questions)} questions are answered already", file=sys.stderr)
    with open(journal, "a") as file, tqdm(total=len(questions), initial=before, desc="answers", smoothing=0) as bar:
        for number in (number for number in range(len(planned)) if number not in kept):
            own, first = ([each[i] for i in planned[number]] for each in (questions, texts))
            seed = stream(settings.seed, f"batch {number}")
            kept[number] = converse(model, tokenizer, own, first, settings, seed)
            file.write(json.dumps({"batch": number, "replies": list(map(asdict, kept[number]))}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(own))
    by_row = {i: reply for number, rows in enumerate(planned) for i, reply in zip(rows, kept[number], strict=True)}
    return head["began"], [by_row[i] for i in range(len(questions))]


def batches(model, tokenizer, questions: Sequence[Item], settings: Settings) -> tuple[list[list[int]], list[str]]:
    """Rows of questions that are answered together: of one temperature and of like lengths, the longest first.

    Returns:
        They, and what the model reads of every question's first turn.

    Raises:
        ValueError: a question and the answers to its turns have no room in the model; it is named.
    """
    asked = [(each.asked[:1], []) for each in questions]
    asked += [(each.asked, ["."] * (len(each.asked) - 1)) for each in questions]  # whole, but for the answers
    texts = _written(tokenizer, [*questions, *questions], asked, plain=settings.plain)
    ids = prompt_token_ids(tokenizer, texts[len(questions) :])
    for question, row in zip(questions, ids, strict=True):
        name = chat.short(question.id)
        if not row:
            raise ValueError(f"question {name} has no tokens, so nothing predicts its answer; give it text")
        check_sequences(model, [(f"question {name}", row)], room=settings.max_new_tokens * len(question.asked))
    temperatures = [settings.temperature_of(question) for question in questions]
    # the longest first: what does not fit into memory shows at once
    order = sorted(range(len(questions)), key=lambda i: (temperatures[i], -len(ids[i]), i))
    groups = [list(rows) for _, rows in itertools.groupby(order, key=lambda i: temperatures[i])]
    size = settings.batch_size
    planned = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    return planned, texts[: len(questions)]


def converse(
    model, tokenizer, questions: Sequence[Item], texts: list[str], settings: Settings, seed: int
) -> list[Reply]:
    """Answer questions of one temperature together, turn by turn: a turn is answered in sight of the answers before it.

    `texts` are what the model reads of their first turns.
    """
    replies = [Reply() for _ in questions]
    rows = range(len(questions))
    for turn in itertools.count():
        drawn = sampling.generate(
            model,
            tokenizer,
            texts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature_of(questions[0]),
            top_p=settings.top_p,
            seed=stream(seed, f"turn {turn}"),
            batch_size=settings.batch_size,
        )
        for i, (completion,) in zip(rows, drawn, strict=True):
            replies[i].said.append(completion.text if settings.plain else completion.text.strip())
            replies[i].cut |= not completion.complete
        rows = [i for i in rows if len(questions[i].asked) > turn + 1]
        if not rows:
            return replies
        asked = [(questions[i].asked[: turn + 2], replies[i].said) for i in rows]
        texts = _written(tokenizer, [questions[i] for i in rows], asked, plain=settings.plain)


def _written(tokenizer, questions: Sequence[Item], asked: Sequence[tuple], *, plain: bool) -> list[str]:
    """Conversations that a turn of the user's ends, as text that the model's answer follows."""
    if plain:
        pairs = (itertools.zip_longest(turns, said, fillvalue="") for turns, said in asked)
        return ["\n\n".join(question + answer for question, answer in each) for each in pairs]
    texts, bad = chat.render(Dataset.from_dict({"prompt": [messages(*each) for each in asked]}), tokenizer)
    for row, problem in bad.items():
        raise ValueError(f"question {chat.short(questions[row].id)}: {problem.args[1]}; {problem.args[2]}")
    return texts["prompt"]
