"""layouts.py and chat.py: conversations as data sets store them, nothing dropped in silence, templates kept within bounds."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path

import pytest
from test_data import CHATML, EOS, GOOD, said, table_of, tiny_tokenizer, write_jsonl

from tpo_lib import data
from tpo_lib.files import chat
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.pairs import load_pairs, pairs_table

ASK = [said("user", "Hi")]
A, B = [said("assistant", "A")], [said("assistant", "B")]
MESSAGES = {"prompt": ASK, "chosen": A, "rejected": B}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look", "parameters": {"at": "text"}}}]
FULL = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if documents %}({{ documents | tojson }}){% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{% if m.reasoning_content %}~{{ m.reasoning_content }}~{% endif %}"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def load(tmp_path, *rows, **more):
    return load_pairs(write_jsonl(tmp_path / "p.jsonl", rows), **more)[0].to_list()


def decoded(rows, template, **more):
    tokenizer = tiny_tokenizer(chat_template=template)
    pairs, report = data.encode_pairs(pairs_table(rows), tokenizer, max_length=400, **more)
    return [
        [tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)] for pair in pairs
    ], report


# ---- conversations that are not what they seem

START = [said("user", "Hi"), said("assistant", "Yes?"), said("user", "How?")]
CONVERSATIONS = {
    "a text prompt that is nearly the question of whole conversations": (
        {"prompt": "Hi\n", "chosen": ASK + A, "rejected": ASK + B},
        "prompt",
        "is none of the user's turns that both responses begin with",
    ),
    "a rejected side without its answer": (
        {"chosen": [said("system", "s"), *ASK, *A], "rejected": [said("system", "s"), *ASK]},
        "rejected",
        "ends with a turn of 'user'",
    ),
    "the same without a shared turn": ({"chosen": ASK + A, "rejected": ASK}, "rejected", "ends with a turn of 'user'"),
    "responses that repeat the prompt behind a system turn": (
        {"prompt": ASK, "chosen": [said("system", "s"), *ASK, *A], "rejected": [said("system", "s"), *ASK, *B]},
        "chosen",
        "begins with a turn of 'system'",
    ),
    "one side alone repeats the prompt": (
        {"prompt": ASK, "chosen": A, "rejected": ASK + B},
        "rejected",
        "begins with a turn of 'user'",
    ),
    "responses that end with the user": (
        {"prompt": ASK, "chosen": A + ASK, "rejected": B + ASK},
        "chosen",
        "ends with a turn of 'user'",
    ),
    "questions that differ at the end": (
        {"chosen": [*START, *A], "rejected": [*START[:2], said("user", "Why?"), *B]},
        "chosen",
        "begins with a turn of 'user'",
    ),
    "questions that differ in the middle": (
        {"prompt": ASK, "chosen": A + START[2:] + A, "rejected": B + ASK + A},
        "rejected",
        "others say in it what they do not say in chosen",
    ),
    "a question that one side alone has": (
        {"prompt": ASK, "chosen": A + START[2:] + A, "rejected": B},
        "rejected",
        "others say in it what they do not say in chosen",
    ),
    "a message without content": (
        {"prompt": ASK, "chosen": [{"role": "assistant", "content": None}], "rejected": B},
        "chosen",
        "holds a message without content",
    ),
    "a system column that contradicts the prompt": (
        {"prompt": [said("system", "t"), *ASK], "chosen": A, "rejected": B, "system": "s"},
        "system",
        "says something else than the system turn of the prompt",
    ),
    "a call that is none": (
        {"prompt": ASK, "chosen": [said("assistant", "") | {"tool_calls": [{"f": 1}]}], "rejected": B},
        "chosen",
        "where a tool call is expected",
    ),
    "tools that are none": (MESSAGES | {"tools": "a, b"}, "tools", "is not valid JSON"),
    "half a list of messages": (
        {"prompt": ASK, "chosen": '[{"role": "assistant", "content": "A"', "rejected": B},
        "chosen",
        "looks like messages, but is neither JSON nor a Python literal",
    ),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_conversations_that_do_not_fit_are_bad_rows(tmp_path, kind):
    row, column, problem = CONVERSATIONS[kind]
    path = write_jsonl(tmp_path / "p.jsonl", [MESSAGES, row])
    if "prompt" not in row:
        path = write_jsonl(tmp_path / "p.jsonl", [{"chosen": ASK + A, "rejected": ASK + B}, row])
    table, (bad,) = load_pairs(path, on_bad_rows="skip")
    assert table.to_list()[0]["prompt"] == ASK
    assert (bad.row, bad.column) == (1, column)
    assert problem in bad.problem
    assert bad.fix


def test_turns_inside_responses_are_kept_and_said(tmp_path, capsys):
    row = {"prompt": ASK, "chosen": A + START[2:] + A, "rejected": B + START[2:] + B}
    assert load(tmp_path, row) == [row]
    assert "turns of users or tools inside a response are scored as parts of it (1 times)" in capsys.readouterr().err


# ---- columns


def test_system_and_history_stand_before_the_prompt_as_in_alpaca(tmp_path, capsys):
    row = {"instruction": "Q", "input": "more", "chosen": "A", "rejected": "B", "system": "S", "history": [["q", "a"]]}
    plain = {"instruction": "P", "chosen": "A", "rejected": "B", "system": "", "history": []}
    first, second = load(tmp_path, row, plain)
    assert first["prompt"] == [said("system", "S"), said("user", "q"), said("assistant", "a"), said("user", "Q\nmore")]
    assert (first["chosen"], first["rejected"]) == (A, B)
    assert second["prompt"] == [said("user", "P")]
    assert load(tmp_path, plain) == [{"prompt": "P", "chosen": "A", "rejected": "B"}]
    assert capsys.readouterr().err == ""


def test_system_stands_beside_any_prompt(tmp_path):
    assert load(tmp_path, GOOD | {"system": "S"})[0]["prompt"] == [said("system", "S"), said("user", "The film")]
    assert load(tmp_path, MESSAGES | {"system": "S"})[0]["prompt"] == [said("system", "S"), *ASK]
    both = MESSAGES | {"prompt": [said("system", "S"), *ASK], "system": "S"}
    assert load(tmp_path, both)[0]["prompt"] == both["prompt"]
    implicit = {"chosen": ASK + A, "rejected": ASK + B, "system": "S"}
    assert load(tmp_path, implicit)[0] == {"prompt": [said("system", "S"), *ASK], "chosen": A, "rejected": B}


def test_sharegpt_with_a_call(tmp_path):
    def turn(who, value):
        return {"from": who, "value": value}

    call = '{"name": "look", "arguments": {"at": "x"}}'
    row = {
        "conversations": [turn("human", "Hi"), turn("function_call", call), turn("observation", "seen")],
        "chosen": turn("gpt", "A"),
        "rejected": turn("gpt", "B"),
        "system": "S",
        "tools": json.dumps(TOOLS),
    }
    (loaded,) = load(tmp_path, row)
    calls = json.dumps([json.loads(call)])
    assert [(m["role"], m["content"], m["tool_calls"]) for m in loaded["prompt"]] == [
        ("system", "S", None),
        ("user", "Hi", None),
        ("assistant", "", calls),
        ("tool", "seen", None),
    ]
    assert json.loads(loaded["tools"]) == TOOLS
    assert [m["content"] for m in loaded["chosen"] + loaded["rejected"]] == ["A", "B"]


def test_every_column_and_key_that_is_not_used_is_named_once(tmp_path, capsys):
    row = GOOD | {"id": 3, "tools": TOOLS, "source": "x", "documents": []}
    load(tmp_path, row, row)
    assert capsys.readouterr().err == f"{tmp_path / 'p.jsonl'}: not used: id, tools, source\n"
    row = {"prompt": ASK, "chosen": [said("assistant", "A") | {"weight": 1}], "rejected": B, "messages": ASK}
    load(tmp_path, row)
    assert capsys.readouterr().err == f"{tmp_path / 'p.jsonl'}: not used: messages, chosen[].weight\n"


def test_calls_thinking_tools_and_documents_reach_the_template(tmp_path, capsys):
    called = [said("assistant", "") | {"tool_calls": [CALL]}]
    other = [said("assistant", "") | {"tool_calls": [{"name": "look", "arguments": '{"at": "y"}'}]}]
    row = {"prompt": ASK, "chosen": called, "rejected": other, "tools": TOOLS, "documents": [{"title": "T"}]}
    thought = {"prompt": ASK, "chosen": [said("assistant", "A") | {"thinking": "hm"}], "rejected": A, "tools": None}
    rows = load(tmp_path, row, thought)
    template = FULL.replace("c.function.name", "(c.function or c).name").replace(
        "c.function.arg", "(c.function or c).arg"
    )
    (first, second), _ = decoded(rows, template)
    assert first[0] == f'[{json.dumps(TOOLS)}]([{{"title": "T"}}])<user>Hi{EOS}<assistant>'
    assert first[1:] == [f'!look{{"at": "x"}}{EOS}', f'!look{{"at": "y"}}{EOS}']
    assert second == [f"<user>Hi{EOS}<assistant>", f"~hm~A{EOS}", f"A{EOS}"]
    assert "not used" not in capsys.readouterr().err
    _, report = decoded(rows, CHATML, on_bad_rows="skip")
    assert "not used, for the chat template does not read it: tools, documents, reasoning_content, tool_calls" in (
        capsys.readouterr().err
    )
    assert "has the same tokens as chosen" in report.skipped[-1].problem


def test_what_a_template_reads_survives_the_files(tmp_path):
    called = [said("assistant", "") | {"tool_calls": [CALL, CALL | {"function": {"name": "go", "arguments": {}}}]}]
    row = MESSAGES | {"chosen": called, "tools": TOOLS}
    table, _ = load_pairs(write_jsonl(tmp_path / "p.jsonl", [row, MESSAGES]))
    table.to_parquet(str(tmp_path / "p.parquet"))
    again = load_pairs(write_jsonl(tmp_path / "q.jsonl", table.to_list()))[0]
    assert table.to_list() == again.to_list() == load_pairs(tmp_path / "p.parquet")[0].to_list()
    assert json.loads(table[0]["chosen"][0]["tool_calls"])[1]["function"] == {"name": "go", "arguments": {}}


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_stored_as_strings_are_recognised_and_said(tmp_path, capsys, write):
    path = tmp_path / "p.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        weighed = [{"weight": 1, "note": "x, y"} | message for message in ASK + B]  # the role need not come first
        writer.writerow({"prompt": "Hi", "chosen": write(ASK + A), "rejected": write(weighed)})
    assert load_pairs(path)[0].to_list() == [MESSAGES]
    kind = "JSON" if write is json.dumps else "Python"
    assert f"column 'chosen': strings that hold messages in {kind} were read as these (1 times)" in (
        capsys.readouterr().err
    )


def test_json_that_is_no_message_is_text(tmp_path):
    for rejected in ('{"content": ', '[{"id": 1, "value": ', '{"id": 1, "role": "king"}'):
        row = {"prompt": "As JSON", "chosen": '{"content": "A"}', "rejected": rejected}
        assert load(tmp_path, row) == [row]


# ---- data for sft


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "P", "completion": " R"}, "P", " R"),
        ({"prompt": "P", "response": " R"}, "P", " R"),
        ({"prompt": ASK, "completion": A}, ASK, A),
        ({"instruction": "I", "input": "x", "output": "R"}, "I\nx", "R"),
        ({"messages": START + A}, START, A),
        ({"prompt": "Hi", "prompt_id": 1, "messages": ASK + A}, ASK, A),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A"}], "system": "S"}, None, A),
        ({"text": "Raw text"}, "", "Raw text"),
        ({"prompt": "P", "chosen": " R"}, "P", " R"),
    ],
)
def test_sft_needs_no_rejected_side(tmp_path, row, prompt, response):
    prompt = [said("system", "S"), *ASK] if prompt is None else prompt
    assert load(tmp_path, row, paired=False) == [{"prompt": prompt, "chosen": response}]
    with pytest.raises(ValueError, match=r"chosen and rejected are needed, found: .* --loss-type sft can be trained"):
        load(tmp_path, row)


def test_sft_takes_pairs_as_pairs_and_names_what_it_lacks(tmp_path):
    assert load(tmp_path, GOOD, paired=False) == [GOOD]
    with pytest.raises(
        ValueError, match=r"found the columns question\. Layouts accepted for sft: prompt and completion"
    ):
        load(tmp_path, {"question": "q"}, paired=False)
    with pytest.raises(BadRowsError, match="column 'messages': ends with a turn of 'user'"):
        load(tmp_path, {"messages": ASK}, paired=False)
    with pytest.raises(BadRowsError, match="column 'completion': is empty"):
        load(tmp_path, {"prompt": "p", "completion": ""}, paired=False)


@pytest.mark.parametrize("bos", [True, False])
def test_rows_for_sft_are_encoded_without_a_rejected_side(bos):
    tokenizer = tiny_tokenizer(bos=bos)
    (pair,), report = data.encode_pairs(table_of({"prompt": "", "chosen": "Raw"}), tokenizer, max_length=9)
    ids = [*([0] * bos), *tokenizer("Raw", add_special_tokens=False)["input_ids"], 0]
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (ids[:1], ids[1:], [])
    assert report.kept == 1


# ---- templates


def test_templates_are_rendered_as_transformers_does():
    tokenizer = tiny_tokenizer(chat_template="{{ bos_token }}" + FULL)
    rows = [MESSAGES, MESSAGES | {"prompt": [said("system", "{{ 1 }} \u2028 Zoë"), *ASK]}]
    texts, bad = chat.render(pairs_table(rows), tokenizer)
    assert not bad
    for i, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
        assert (texts["prompt"][i], prompt + texts["chosen"][i]) == (prompt, whole)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(10 ** 6) | list }}", "OverflowError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_templates_that_fail_make_bad_rows(template, problem):
    _, report = decoded([MESSAGES], template, on_bad_rows="skip")
    (bad,) = report.skipped
    assert f"the chat template refuses it: {problem}" in bad.problem


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ (messages | length + 9) ** (10 ** 9) }}",
    ],
)
def test_templates_that_take_too_much_are_stopped_on_any_thread(template, monkeypatch, tmp_path):
    worker = Path(chat.__file__).with_name("chat_worker.py").read_text()
    assert "SECONDS = 10.0" in worker
    (tmp_path / "chat_worker.py").write_text(worker.replace("SECONDS = 10.0", "SECONDS = 3.0"))
    monkeypatch.setattr(chat, "__file__", str(tmp_path / "chat.py"))
    once = CHATML + "{% if messages[0]['content'] != 'Hi' %}"
    tokenizer = tiny_tokenizer(chat_template=once + template + "{% endif %}")
    table = pairs_table([MESSAGES, MESSAGES | {"prompt": [said("user", "go")]}, MESSAGES])
    told = []

    def run():
        with pytest.raises(
            ValueError, match="was stopped at row 1: it takes more time or memory than a template should"
        ):
            chat.render(table, tokenizer)
        told.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert told
