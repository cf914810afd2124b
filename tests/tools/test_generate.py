"""`generate`: files exactly as the judges' tools read them, turns that see the answers before, and going on after a kill."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
from transformers import AutoTokenizer

from tpo_lib import sampling
from tpo_lib.cli import main
from tpo_lib.tools import answers, generate

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
QUESTIONS = {
    "alpaca-eval": [
        {"instruction": f"Is it {word}?", "dataset": "koala", "output": "x"} for word in ("good", "bad", "é")
    ],
    "arena-hard": [
        {"uid": "a1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Is it good?"},
        {"uid": "b2", "category": "arena-hard-v0.1", "cluster": "Films", "prompt": "Is it\nbad?"},
    ],
    "mt-bench": [
        {"question_id": 81, "category": "writing", "turns": ["Is it good?", "Why?"]},
        {"question_id": 82, "category": "math", "turns": ["Is it bad?", "Why so?"]},
        {"question_id": 83, "category": "stem", "turns": ["Is it fine?", "And the plot?"]},
    ],
    "jsonl": [{"prompt": f"the film {i} is"} for i in range(5)],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny chat model."""
    folder = tiny.checkpoint_folder(tmp_path_factory.mktemp("chat"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, name: str, rows=None):
    rows = rows or QUESTIONS[name]
    lines = json.dumps(rows) if name == "alpaca-eval" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines)
    return path


def run(folder, name: str, model: str, *more, output: str = "tiny", rows=None):
    questions = write(folder / ("q" + (".json" if name == "alpaca-eval" else ".jsonl")), name, rows)
    written = folder / f"{output}{answers.FORMATS[name].suffix}"
    flags = ["--questions", str(questions), "--format", name, "--output", str(written), "--device", "cpu"]
    main(["generate", "--model", model, "--max-new-tokens", "6", *flags, *more])
    return written


def rows_of(path) -> list[dict]:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def refused(capsys, *call) -> str:
    with pytest.raises(SystemExit):
        run(*call)
    return capsys.readouterr().err


# ---- the files


def test_alpaca_eval(tmp_path, model):
    path = run(tmp_path, "alpaca-eval", model, "--plain", "--name", "mine")
    rows = rows_of(path)
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in QUESTIONS["alpaca-eval"]]
    assert all(set(row) == {"dataset", "instruction", "output", "generator"} for row in rows)
    assert {row["generator"] for row in rows} == {"mine"}
    assert all(row["output"] != "x" and row["output"] == row["output"].strip() for row in rows)
    read = pd.read_json(path)  # as the tool does
    assert read["output"].tolist() == [row["output"] for row in rows]


def test_arena_hard(tmp_path, model, capsys):
    path = run(tmp_path, "arena-hard", model, "--plain")
    rows = rows_of(path)
    for row, question in zip(rows, QUESTIONS["arena-hard"], strict=True):
        assert list(row) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
        assert (row["uid"], row["model"]) == (question["uid"], "tiny")  # the file's name, by which the tool finds it
        user, assistant = row["messages"]
        assert user == {"role": "user", "content": question["prompt"]}
        assert (assistant["role"], list(assistant["content"])) == ("assistant", ["answer"])
        # style control takes the first entry as the length and adds up the others
        assert list(row["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
        assert all(isinstance(v, int) or isinstance(sum(v.values()), int) for v in row["metadata"].values())
    own, text = AutoTokenizer.from_pretrained(model), rows[0]["messages"][-1]["content"]["answer"]
    assert rows[0]["metadata"]["token_len"] == len(own(text).input_ids) - 1  # but for BOS
    assert pd.read_json(path, lines=True).set_index("uid")["metadata"].to_dict()["a1"] == rows[0]["metadata"]
    assert "not used: category, subcategory, cluster" in capsys.readouterr().err


def test_mt_bench_answers_the_second_question_in_sight_of_the_first_answer(tmp_path, model, monkeypatch):
    calls = []

    def spy(*args, **settings):
        calls.append((args[2], settings["temperature"], drawn := sampling_generate(*args, **settings)))
        return drawn

    sampling_generate = sampling.generate
    monkeypatch.setattr(sampling, "generate", spy)
    rows = rows_of(run(tmp_path, "mt-bench", model, rows=QUESTIONS["mt-bench"][:2]))
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 2
    assert [row["question_id"] for row in rows] == [81, 82]
    tokenizer, seen = AutoTokenizer.from_pretrained(model), {text: t for texts, t, _ in calls for text in texts}
    for row, question, temperature in zip(rows, QUESTIONS["mt-bench"][:2], (0.7, 0.0), strict=True):
        (choice,) = row["choices"]
        assert choice["index"] == 0
        chat = [{"role": "user", "content": question["turns"][0]}, {"role": "assistant", "content": choice["turns"][0]}]
        chat += [{"role": "user", "content": question["turns"][1]}]
        for turns in (chat[:1], chat):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert seen.pop(text) == temperature  # by category, as FastChat samples
    assert not seen
    # what ended an answer, and every other special token, is no part of it
    assert all(tokenizer.eos_token not in turn for row in rows for turn in row["choices"][0]["turns"])


def test_without_a_template_turns_are_parted_by_blank_lines(tmp_path, model, monkeypatch):
    seen, real = [], sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda *args, **more: seen.append(args[2]) or real(*args, **more))
    row = rows_of(run(tmp_path, "mt-bench", model, "--plain", rows=QUESTIONS["mt-bench"][:1]))[0]
    first = row["choices"][0]["turns"][0]
    assert seen[0] == ["Is it good?"]
    assert seen[1][0].startswith("Is it good?")
    assert seen[1][0].endswith("\n\nWhy?")
    assert seen[1][0].removeprefix("Is it good?").removesuffix("\n\nWhy?").strip() == first


def test_jsonl_keeps_a_continuation_as_it_is(tmp_path, model):
    rows = rows_of(run(tmp_path, "jsonl", model, "--plain", "--temperature", "0"))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in QUESTIONS["jsonl"]]
    own, loaded = AutoTokenizer.from_pretrained(model), generate.load_model(model)
    for row in rows:  # greedy: whatever the batch, what the model writes alone
        (alone,) = sampling.generate(loaded, own, [row["prompt"]], max_new_tokens=6, temperature=0, seed=0)
        assert row["response"] == alone[0].text


@pytest.mark.parametrize(("name", "key", "said"), [("alpaca-eval", "output", "x"), ("jsonl", "response", "  x\n")])
def test_white_space_around_an_answer_goes_but_a_continuation_keeps_its_own(
    tmp_path, model, monkeypatch, name, key, said
):
    drawn = sampling.Completion("  x\n", (5,), None)
    monkeypatch.setattr(sampling, "generate", lambda model, tokenizer, prompts, **more: [[drawn] for _ in prompts])
    assert {row[key] for row in rows_of(run(tmp_path, name, model, "--plain"))} == {said}


def test_the_tools_own_code_reads_them(tmp_path, model):
    """Where the tools are installed beside the library; both ask for far more than reading takes."""
    utils = pytest.importorskip("alpaca_eval.utils", exc_type=ImportError)
    path = run(tmp_path, "alpaca-eval", model, "--plain")
    frame = utils.load_or_convert_to_dataframe(path)
    assert utils.get_generator_name(None, frame) == "tiny"
    assert frame["output"].tolist() == [row["output"] for row in rows_of(path)]
    common = pytest.importorskip("fastchat.llm_judge.common", exc_type=ImportError)
    path = run(tmp_path, "mt-bench", model, "--plain")
    found = common.load_model_answers(str(tmp_path))["tiny"]
    common.check_data(QUESTIONS["mt-bench"], {"tiny": found}, {}, ["tiny"], {})


def test_markdown_is_counted_outside_of_code():
    text = "# One\n## Two\n####### no\n#no\n```py\n# code\n- code\n```\n1. a\n  22. b\n- c\n* d\n+ e\n-no\n"
    text += "**f** __g__ **h\n** i __j__"
    assert answers.markdown(text) == {
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 1, "__": 2},
    }


GOOD_ROWS = {name: (answers.FORMATS[name].ask(rows[0]), ["one", "two"]) for name, rows in QUESTIONS.items()}


@pytest.mark.parametrize("name", answers.FORMATS)
@pytest.mark.parametrize("broken", ["more", "less", "type"])
def test_a_row_that_its_tool_would_not_read_is_not_written(name, broken):
    item, said = GOOD_ROWS[name]
    row = answers.FORMATS[name].row(item, said, "tiny", 1.0, len)
    answers.as_text([row], name)
    key = list(row)[-1]
    bad = {"more": row | {"seed": 1}, "less": {k: v for k, v in row.items() if k != key}, "type": row | {key: True}}
    with pytest.raises(
        ValueError, match=f"not as {name} reads it: row 1, column '{'seed' if broken == 'more' else key}'"
    ):
        answers.as_text([row, bad[broken]], name)


def test_a_schema_looks_into_lists_and_objects():
    item, said = GOOD_ROWS["arena-hard"]
    row = answers.FORMATS["arena-hard"].row(item, said, "tiny", 1.0, len)
    row["metadata"]["bold_count"]["**"] = True
    with pytest.raises(ValueError, match=r"column 'metadata.bold_count.\*\*': is not int but bool True"):
        answers.as_text([row], "arena-hard")
    row["messages"] = row["messages"][:1]
    with pytest.raises(ValueError, match="column 'messages': is not a list of 2"):
        answers.as_text([row], "arena-hard")


# ---- going on


def stop_after(monkeypatch, count: int) -> list[int]:
    """Let `generate` be interrupted in its batch number `count`; the list says how many it began."""
    real, begun = generate.converse, []

    def converse(*args, **more):
        begun.append(1)
        if len(begun) > count:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(generate, "converse", converse)
    return begun


@pytest.mark.parametrize("name", ["alpaca-eval", "jsonl"])
def test_a_killed_run_goes_on_to_the_same_file(tmp_path, model, monkeypatch, name):
    at = SimpleNamespace(now=5.0)
    monkeypatch.setattr(generate, "time", SimpleNamespace(time=lambda: at.now))
    flags = ("--plain", "--batch-size", "2", "--temperature", "1")
    whole = run(tmp_path, name, model, *flags, "--name", "m")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, name, model, *flags, "--name", "m", output="killed")
        assert stopped.value.code == 130
    killed = whole.with_stem("killed")
    assert not killed.exists()
    journal = killed.with_name(f"{killed.name}.partial")
    assert len(journal.read_text().splitlines()) == 2  # what it was begun with, and one batch
    with open(journal, "a") as file:
        file.write('{"batch": 1, "repl')  # torn in the middle of a line
    at.now = 9.0
    with monkeypatch.context() as patch:
        begun = stop_after(patch, 99)
        run(tmp_path, name, model, *flags, "--name", "m", output="killed")
    assert len(begun) == (2 if name == "jsonl" else 1)  # of three and two batches
    assert killed.read_bytes() == whole.read_bytes()
    assert not journal.exists()
    settings = json.loads(killed.with_name(f"{killed.name}.settings.json").read_text())
    assert (settings["began"], settings["temperature"], settings["batch_size"]) == (5.0, 1.0, 2)


def test_the_time_stamp_is_when_the_work_was_begun(tmp_path, model, monkeypatch):
    monkeypatch.setattr(generate, "time", SimpleNamespace(time=lambda: 5.0))
    assert {row["tstamp"] for row in rows_of(run(tmp_path, "arena-hard", model, "--plain"))} == {5.0}


def test_a_finished_file_is_left_alone_and_other_settings_do_not_mix(tmp_path, model, monkeypatch, capsys):
    path = run(tmp_path, "jsonl", model, "--plain")
    before = path.stat().st_mtime_ns
    begun = stop_after(monkeypatch, 0)
    run(tmp_path, "jsonl", model, "--plain")
    assert "is there already" in capsys.readouterr().out
    assert (path.stat().st_mtime_ns, begun) == (before, [])
    said = refused(capsys, tmp_path, "jsonl", model, "--plain", "--temperature", "0.5", "--seed", "1")
    assert "was begun with another temperature and another seed; name another --output" in said
    with open(path, "a") as file:
        file.write("\n")
    assert "was altered since it was written" in refused(capsys, tmp_path, "jsonl", model, "--plain")
    path.with_name(f"{path.name}.settings.json").unlink()
    assert "says how it was made" in refused(capsys, tmp_path, "jsonl", model, "--plain")


def test_an_interrupted_file_does_not_mix_other_settings_in(tmp_path, model, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        refused(capsys, tmp_path, "jsonl", model, "--plain", "--batch-size", "2")
    said = refused(capsys, tmp_path, "jsonl", model, "--plain", "--batch-size", "3")
    assert "was begun with another batch_size" in said


# ---- refusals


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        (
            "alpaca-eval",
            [{"instruction": "a", "input": "b"}],
            "column 'input': holds text that the model would not see",
        ),
        (
            "arena-hard",
            [{"uid": "a"}],
            "row 0, column 'prompt': is missing (q.jsonl, line 1); an object has uid, prompt",
        ),
        ("arena-hard", [{"uid": "a", "prompt": "b"}] * 2, "row 1, column 'uid': 'a' stands in an earlier row too"),
        ("mt-bench", [{"question_id": "81", "turns": ["a"]}], "column 'question_id': is not int but str '81'"),
        ("mt-bench", [{"question_id": 81, "turns": []}], "column 'turns': is not a list of one or more"),
        ("jsonl", [{"prompt": "a " * 200}], "tokens and 6 to be sampled, but the model has 128 positions"),
    ],
)
def test_bad_questions_are_named(tmp_path, model, capsys, name, rows, words):
    with pytest.raises(SystemExit):
        run(tmp_path, name, model, "--plain", rows=rows)
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_every_turn_has_to_fit_before_the_first_is_sampled(tmp_path, model, monkeypatch, capsys):
    begun = stop_after(monkeypatch, 0)
    with pytest.raises(SystemExit):
        run(tmp_path, "mt-bench", model, "--plain", "--max-new-tokens", "62")
    assert "124 to be sampled" in capsys.readouterr().err
    assert begun == []


def test_a_file_with_the_wrong_ending_is_refused(tmp_path, model, capsys):
    questions = str(write(tmp_path / "q.json", "alpaca-eval"))
    flags = ["--questions", questions, "--format", "alpaca-eval", "--output", str(tmp_path / "a.jsonl")]
    with pytest.raises(SystemExit):
        main(["generate", "--model", model, *flags])
    assert "must end in .json" in capsys.readouterr().err
