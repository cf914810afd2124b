"""`judge`: the win rate of A's answers over B's by any reward model, classifier or function of texts; nothing leaves the machine.

The judge scores each answer alone, so that, unlike a language model that is shown both, it cannot prefer the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset

from tpo_lib.files import chat, store
from tpo_lib.files.tokens import leading_ids
from tpo_lib.intervals import RESAMPLES
from tpo_lib.models import choose_device
from tpo_lib.rewards import scores_of
from tpo_lib.runs import own
from tpo_lib.tools.answers import Item, messages, read_answers, read_questions
from tpo_lib.tools.winrate import win_rates

NAMED = 5  # questions that are spelled out


class Turn(NamedTuple):
    """Two answers to a turn of a question, A's and B's; `asked` are the user's words up to it, `before` the earlier answers."""

    id: str | int
    turn: int
    asked: tuple[str, ...]
    before: tuple[tuple[str, ...], tuple[str, ...]]
    answers: tuple[str, str]


def command(options) -> None:
    """Judge the answers of two files and print the win rates; `options` are the flags."""
    device = choose_device(options.device)
    judges = {name: own.scorer(name, device) for name in options.by}
    (form, a), (other, b) = read_answers(options.answers), read_answers(options.baseline)
    if form != other:
        raise ValueError(
            f"{options.answers} is of {form}, {options.baseline} of {other}: nothing joins their questions"
        )
    if options.questions and form != "mt-bench":
        raise ValueError(f"--questions has no effect with {form}, whose answers repeat them; leave it out")
    asked = {each.id: each.asked for each in read_questions(options.questions, form)} if options.questions else {}
    turns, alone = joined(a, b, asked)
    print(f"A  {options.answers}\nB  {options.baseline}\n{len({turn.id for turn in turns})} questions are in both")
    for side, ids in alone.items():
        if ids:
            few = ", ".join(map(chat.short, ids[:NAMED])) + ", ..." * (len(ids) > NAMED)
            print(f"left out: {len(ids)} that {side} alone answers: {few}")
    means = [sum(len(turn.answers[side]) for turn in turns) / len(turns) for side in (0, 1)]
    longer = sum(len(turn.answers[0]) > len(turn.answers[1]) for turn in turns) / len(turns)
    print(f"characters of an answer: A {means[0]:.0f}, B {means[1]:.0f}; A's is the longer in {longer:.1%}")
    found = {name: judged(scorer, turns, form, options.tie_margin, options.seed) for name, scorer in judges.items()}
    for name, result in found.items():
        print(f"\n{name}: {result['wins']} wins, {result['losses']} losses, {result['ties']} ties")
        for kind in ("raw", "length_controlled"):
            spans = [f"{level} [{m['low']:.1%}, {m['high']:.1%}]" for level, m in result[kind].items()]
            print(f"  {kind.replace('_', ' '):18s}{result[kind]['95%']['mean']:6.1%}  {'  '.join(spans)}")
    if options.output:
        facts = {"answers": [str(options.answers), str(options.baseline)], "format": form, "alone": alone}
        facts |= {"mean_characters": means, "longer": longer, "resamples": RESAMPLES, "judges": found}
        store.write_json(options.output, facts, indent=1)


def joined(a: dict[str | int, Item], b: dict, asked: dict) -> tuple[list[Turn], dict[str, list]]:
    """Every turn that both sides answered, in the order of A, and by side the questions that the other lacks.

    Raises:
        ValueError: they share no question, or one differs in its text or its number of turns; it is named.
    """
    turns = []
    for key in (key for key in a if key in b):
        one, two = a[key], b[key]
        if one.asked != two.asked or len(one.said) != len(two.said):
            raise ValueError(
                f"question {chat.short(key)} is not the same in both files: its text, or its number of turns"
            )
        words = one.asked or asked.get(key, ())
        for turn, answers in enumerate(zip(one.said, two.said, strict=True)):
            turns.append(Turn(key, turn + 1, words[: turn + 1], (one.said[:turn], two.said[:turn]), answers))
    if not turns:
        raise ValueError("the two files have no question in common: were they made from the same one?")
    return turns, {"A": [key for key in a if key not in b], "B": [key for key in b if key not in a]}


def texts_for(scorer, turns: Sequence[Turn], side: int, form: str) -> list[str]:
    """What a scorer reads of A's (side 0) or B's (1) answers: these alone, or by its scope the conversations that they end.

    A scorer with a chat template reads a conversation as that writes it; any other reads its turns, parted by blank lines (of
    the format jsonl, whose responses may be continuations, by nothing).
    """
    answers = [turn.answers[side] for turn in turns]
    if getattr(scorer, "scope", "response") == "response":
        return answers
    if lone := next((turn for turn in turns if len(turn.asked) < turn.turn), None):
        place = f"turn {lone.turn} of question {chat.short(lone.id)}"
        raise ValueError(
            f"{scorer.name} reads questions too, and {place} stands neither in the answers nor in --questions: name --questions "
            "FILE, the one that was answered"
        )
    tokenizer = getattr(scorer, "tokenizer", None)
    if not getattr(tokenizer, "chat_template", None):
        spoken = [messages(turn.asked, (*turn.before[side], text)) for turn, text in zip(turns, answers, strict=True)]
        return [("" if form == "jsonl" else "\n\n").join(m["content"] for m in each) for each in spoken]
    table = {"prompt": [messages(turn.asked, turn.before[side]) for turn in turns]}
    table["chosen"] = [[{"role": "assistant", "content": text}] for text in answers]
    texts, bad = chat.render(Dataset.from_dict(table), tokenizer)
    for row, problem in bad.items():
        raise ValueError(f"question {chat.short(turns[row].id)}: {problem.args[1]}; {problem.args[2]}")
    own_bos = tokenizer.bos_token if leading_ids(tokenizer) else ""  # it writes one once more
    return [
        (before + text).removeprefix(own_bos) for before, text in zip(texts["prompt"], texts["chosen"], strict=True)
    ]


def judged(scorer, turns: Sequence[Turn], form: str, tie_margin: float, seed: int) -> dict:
    """What a judge finds, as the file of the results has it: counts, rates with their intervals, and every score."""
    a, b = (scores_of(scorer, texts_for(scorer, turns, side, form)).double().tolist() for side in (0, 1))
    margins = [x - y for x, y in zip(a, b, strict=True)]
    preference = [0.5 if abs(margin) <= tie_margin else float(margin > 0) for margin in margins]
    lengths = [[len(text) for text in turn.answers] for turn in turns]
    rates, phi = win_rates(preference, [x - y for x, y in lengths], [turn.id for turn in turns], seed=seed)
    counts = {"wins": preference.count(1.0), "losses": preference.count(0.0), "ties": preference.count(0.5)}
    rated = {kind: {f"{level:.0%}": m.as_dict() for level, m in levels.items()} for kind, levels in rates.items()}
    facts = {"judge": scorer.name, "scope": getattr(scorer, "scope", "response"), "fingerprint": scorer.fingerprint}
    facts |= {"tie_margin": tie_margin, "seed": seed, **counts, **rated, "length_coefficient": phi}
    keys = ("id", "turn", "scores", "characters")
    rows = zip((t.id for t in turns), (t.turn for t in turns), zip(a, b, strict=True), lengths, strict=True)
    return facts | {"rows": [dict(zip(keys, row, strict=True)) for row in rows]}
