"""`judge`: files of every format joined by their questions, what a judge reads of them, and what is written down."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from tpo_lib.cli import main
from tpo_lib.rewards import ClassifierReward
from tpo_lib.tools import answers, judge

LENGTH = "def length(texts):\n    return [len(text) for text in texts]\n"
FULL = "def full(texts):\n    return [len(text) for text in texts]\n\n\nfull.scope = 'full'\n"
IDS = ("a", "b", "c", "d")


def row(name: str, key: str, *said: str) -> dict:
    """An answer as a tool has it."""
    return {
        "alpaca-eval": {"instruction": key, "output": said[0], "generator": "m"},
        "arena-hard": {
            "uid": key,
            "ans_id": "x",
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"content": f"ask {key}", "role": "user"},
                {"content": {"answer": said[0], "thought": "hm"}, "role": "assistant"},
            ],
            "tstamp": 1.5,  # of v0.1 there is no metadata
        },
        "mt-bench": {"question_id": ord(key[-1]), "choices": [{"index": 0, "turns": list(said)}], "model_id": "m"},
        "jsonl": {"prompt": key, "response": said[0]},
    }[name]


def file(path, name: str, said: dict[str, tuple[str, ...]]):
    rows = [row(name, key, *texts) for key, texts in said.items()]
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def run(folder, name: str, a: dict, b: dict, *more, code: str = LENGTH, by: str = "length") -> dict:
    (folder / "own.py").write_text(code)
    suffix = answers.FORMATS[name].suffix
    paths = [file(folder / f"{side}{suffix}", name, said) for side, said in (("A", a), ("B", b))]
    out = folder / "out.json"
    main(["judge", *paths, "--by", f"{folder}/own.py:{by}", "--output", str(out), "--device", "cpu", *more])
    return json.loads(out.read_text())


def only(result: dict) -> dict:
    (found,) = result["judges"].values()
    return found


A = {"a": ("xxxx", "x"), "b": ("x", "xx"), "c": ("xx", "xx"), "d": ("xxx", "x")}
B = {"a": ("xx", "x"), "b": ("xxx", "x"), "c": ("xx", "xx"), "d": ("x", "x")}


@pytest.mark.parametrize("name", answers.FORMATS)
def test_wins_losses_and_ties_of_every_format(tmp_path, capsys, name):
    result = run(tmp_path, name, A, dict(reversed(B.items())))  # joined by the question, not by the row
    found = only(result)
    turns = 2 if name == "mt-bench" else 1
    assert (found["wins"], found["losses"], found["ties"]) == ((3, 1, 4) if turns == 2 else (2, 1, 1))
    assert found["raw"]["95%"]["mean"] == pytest.approx(5 / 8)
    assert found["raw"]["95%"]["n"] == 4
    assert [each["scores"] for each in found["rows"] if each["turn"] == 1] == [[4, 2], [1, 3], [2, 2], [3, 1]]
    assert found["rows"][0]["characters"] == [4, 2]
    assert (found["scope"], len(found["fingerprint"])) == ("response", 64)
    assert result["format"] == name
    said = capsys.readouterr().out
    assert "4 questions are in both" in said
    assert "raw                62.5%  95% [" in said
    assert "length controlled  " in said


def test_questions_that_one_side_lacks_are_counted_and_named(tmp_path, capsys):
    result = run(tmp_path, "arena-hard", A, {key: B[key] for key in "bcd"} | {"e": ("x",)})
    assert result["alone"] == {"A": ["a"], "B": ["e"]}
    assert only(result)["losses"] == 1
    said = capsys.readouterr().out
    assert "left out: 1 that A alone answers: 'a'\nleft out: 1 that B alone answers: 'e'" in said


def test_a_margin_makes_ties(tmp_path):
    found = only(run(tmp_path, "jsonl", A | {"d": ("xxxx", "")}, B, "--tie-margin", "2"))
    assert (found["wins"], found["losses"], found["ties"], found["tie_margin"]) == (1, 0, 3, 2.0)


def test_a_judge_that_likes_length_alone_is_even_at_equal_length(tmp_path):
    draw = torch.Generator().manual_seed(0)
    longer = torch.randint(-20, 60, (300,), generator=draw).tolist()
    a, b = ({f"q{i}": ("x" * (100 + more * side),) for i, more in enumerate(longer)} for side in (1, 0))
    code = "import random\n\n\ndef noisy(texts):\n    draw = random.Random(len(''.join(texts)))\n"
    code += "    return [len(text) + draw.gauss(0, 40) for text in texts]\n"
    found = only(run(tmp_path, "alpaca-eval", a, b, code=code, by="noisy"))
    assert found["raw"]["95%"]["low"] > 0.55
    assert found["length_controlled"]["95%"]["low"] < 0.5 < found["length_controlled"]["95%"]["high"]
    assert found["length_coefficient"] > 0.5


# ---- what a judge reads


def turns_of(name: str, folder, asked=()) -> list:
    read = [answers.read_answers(file(folder / f"{i}.jsonl", name, {"a": ("one", "two")}))[1] for i in (0, 1)]
    return judge.joined(*read, dict(asked))[0]


class Full:
    """A judge of whole conversations."""

    name, scope, tokenizer = "full", "full", None


def test_a_judge_of_whole_texts_reads_the_question_before_the_answer(tmp_path):
    read = {name: judge.texts_for(Full, turns_of(name, tmp_path), 0, name) for name in ("arena-hard", "jsonl")}
    assert read == {
        "arena-hard": ["ask a\n\none"],
        "jsonl": ["aone"],
    }  # what continues a text stands directly behind it
    turns = turns_of("mt-bench", tmp_path, {97: ("first?", "second?")})
    assert judge.texts_for(Full, turns, 1, "mt-bench") == ["first?\n\none", "first?\n\none\n\nsecond?\n\ntwo"]
    for asked, turn in (((), 1), ([(97, ("first?",))], 2)):  # no --questions; of one turn less
        with pytest.raises(ValueError, match=f"turn {turn} of question 97 stands neither in .*: name --questions FILE"):
            judge.texts_for(Full, turns_of("mt-bench", tmp_path, asked), 0, "mt-bench")


def test_a_reward_model_reads_a_conversation_as_its_own_template_writes_it(tmp_path):
    folder = tiny.classifier(tmp_path / "rm", labels=("LABEL_0",), kind="Llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    scorer = ClassifierReward(folder)
    turns = turns_of("mt-bench", tmp_path, {97: ("first?", "second?")})
    # the tokenizer puts its BOS before a text by itself
    written = ["[user]first?[assistant]one", "[user]first?[assistant]one[user]second?[assistant]two"]
    assert judge.texts_for(scorer, turns, 0, "mt-bench") == written
    ids = scorer.tokenizer(written[0])["input_ids"]
    assert ids.count(scorer.tokenizer.bos_token_id) == 1


def test_mt_bench_with_its_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question_id": ord(i), "turns": ["Q1", "Q2"]}) + "\n" for i in IDS)
    )
    result = run(tmp_path, "mt-bench", A, B, "--questions", str(tmp_path / "q.jsonl"), code=FULL, by="full")
    assert only(result)["rows"][1]["scores"] == [len("Q1\n\nxxxx\n\nQ2\n\nx"), len("Q1\n\nxx\n\nQ2\n\nx")]


def test_several_judges(tmp_path, capsys):
    found = run(tmp_path, "jsonl", A, B, "--by", f"{tmp_path}/own.py:length", "data/pocket")["judges"]
    assert list(found) == [f"{tmp_path}/own.py:length", "data/pocket"]
    assert found["data/pocket"]["judge"] == "additive sentiment"
    assert "data/pocket: " in capsys.readouterr().out


# ---- refusals


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (("jsonl", A), ("arena-hard", A), "is of jsonl, "),
        (("jsonl", {"a": ("x",)}), ("jsonl", {"b": ("x",)}), "the two files have no question in common"),
        (("mt-bench", A), ("mt-bench", A | {"b": ("x",)}), "question 98 is not the same in both files"),
        (("jsonl", {"a": ("x",)}), ("jsonl", {"a": ("y",)}), "1 questions make no interval: two at least"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(tmp_path, capsys, a, b, words):
    (tmp_path / "own.py").write_text(LENGTH)
    paths = [file(tmp_path / f"{i}.jsonl", *given) for i, given in enumerate((a, b))]
    with pytest.raises(SystemExit):
        main(["judge", *paths, "--by", f"{tmp_path}/own.py:length"])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no answers that are known: it has no rows, and not"),
        ([{"text": "a"}], "holds no answers that are known: it has text, and not instruction, output (alpaca-eval); "),
        ([{"prompt": "a", "response": "b"}] * 2, "row 1, column 'prompt': 'a' stands in an earlier row too"),
        ([{"uid": "a", "messages": [{"role": "assistant", "content": "b"}]}], "'messages[-1].content': is no object"),
        ([{"question_id": 1, "choices": [{"turns": ["a", 2]}]}], "column 'choices[0].turns[1]': is not text but int 2"),
    ],
)
def test_files_that_are_no_answers_are_named(tmp_path, rows, words):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(ValueError, match=re.escape(words)):
        answers.read_answers(tmp_path / "a.jsonl")


def test_questions_beside_answers_that_repeat_them_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "jsonl", A, B, "--questions", str(tmp_path / "A.jsonl"))
    assert "--questions has no effect with jsonl" in capsys.readouterr().err
