"""pairs.py, formats.py: every layout loads to one table, from every kind of file, and every bad row is named."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from apart import apart
from test_data import GOOD, MESSAGES, said, write_jsonl

from tpo_lib.files import formats
from tpo_lib.files.formats import BadRow, BadRowsError
from tpo_lib.files.pairs import load_pairs

# ---- layouts


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_table(tmp_path, suffix):
    rows = [GOOD, {"prompt": "Zoë\nsaid", "chosen": ' "yes", twice', "rejected": " no"}]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(GOOD))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_jsonl(path, rows)
    table, bad = load_pairs(path)
    assert table.to_list() == rows
    assert bad == []


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n  \n" + json.dumps(GOOD).encode())
    assert load_pairs(path)[0].to_list() == [GOOD, GOOD]


def test_json_lines_in_a_json_file(tmp_path):
    assert load_pairs(write_jsonl(tmp_path / "pairs.json", [GOOD]))[0].to_list() == [GOOD]


def test_long_csv_fields_are_read_and_the_csv_module_is_left_alone(tmp_path):
    before = csv.field_size_limit(1000)
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\np," + "x" * 200_000 + ",y\n")
    assert len(load_pairs(path)[0][0]["chosen"]) == 200_000
    assert csv.field_size_limit(before) == 1000


def test_folder_of_files_keeps_the_splits_apart(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", [GOOD])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", [GOOD | {"prompt": "Second"}])
    write_jsonl(tmp_path / "test.jsonl", [GOOD | {"prompt": "Held out"}])
    assert load_pairs(tmp_path)[0]["prompt"] == ["The film", "Second"]
    assert load_pairs(tmp_path, split="test")[0]["prompt"] == ["Held out"]
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train: name one with --split"):
        load_pairs(tmp_path, split="dev")


def test_folder_with_unnamed_files_is_train_without_the_test_file(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [GOOD])
    write_jsonl(tmp_path / "test_prefs.jsonl", [GOOD | {"prompt": "Held out"}])
    assert load_pairs(tmp_path)[0]["prompt"] == ["The film"]


def test_folders_of_save_to_disk(tmp_path):
    table = datasets.Dataset.from_list([GOOD])
    table.save_to_disk(str(tmp_path / "table"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    assert load_pairs(tmp_path / "table")[0].to_list() == [GOOD]
    assert load_pairs(tmp_path / "splits", split="test")[0].to_list() == [GOOD]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        load_pairs(tmp_path / "splits", split="dev")


def test_messages_with_a_prompt_column(tmp_path):
    row = {
        "prompt": [said("user", "Hi")],
        "chosen": [said("assistant", "Hello")],
        "rejected": [said("assistant", "Go")],
    }
    assert load_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))[0].to_list() == [row]


def test_implicit_prompt_in_messages_as_in_ultrafeedback_binarized(tmp_path):
    start = [said("system", "Be kind"), said("user", "Hi")]
    row = {
        "chosen": [*start, said("assistant", "Hello")],
        "rejected": [*start, said("assistant", "Go")],
        "score_chosen": 8.5,
        "score_rejected": 2,
    }
    (loaded,) = load_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))[0].to_list()
    assert loaded["prompt"] == start
    assert (loaded["chosen"], loaded["rejected"]) == ([said("assistant", "Hello")], [said("assistant", "Go")])
    assert (loaded["chosen_score"], loaded["rejected_score"]) == (8.5, 2.0)


def test_text_prompt_repeated_as_first_message_is_not_doubled(tmp_path):
    row = {"prompt": "Hi", "chosen": [said("user", "Hi"), said("assistant", "A")]}
    row["rejected"] = [said("user", "Hi"), said("assistant", "B")]
    (loaded,) = load_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))[0].to_list()
    assert loaded["prompt"] == [said("user", "Hi")]
    assert loaded["chosen"] == [said("assistant", "A")]


def test_text_prompt_with_response_messages_becomes_a_user_message(tmp_path):
    row = {"prompt": "Hi", "chosen": [said("assistant", "A")], "rejected": [said("assistant", "B")]}
    (loaded,) = load_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))[0].to_list()
    assert loaded["prompt"] == [said("user", "Hi")]


def test_implicit_prompt_in_transcripts_as_in_hh_rlhf(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?\n\nAssistant:"
    row = {"chosen": start + " Like so.", "rejected": start + " Like that."}
    (loaded,) = load_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))[0].to_list()
    assert loaded == {"prompt": start, "chosen": " Like so.", "rejected": " Like that."}


def test_transcripts_that_part_early_split_at_the_last_shared_turn(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": start + " A\n\nHuman: x\n\nAssistant: B", "rejected": start + " C\n\nHuman: y\n\nAssistant: D"}
    (loaded,) = load_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))[0].to_list()
    assert loaded["prompt"] == start


def test_instruction_column_as_in_the_mk1111_sets(tmp_path):
    row = {"instruction": "Write a haiku", "input": "about rain", "chosen": "Rain", "rejected": "Sun"}
    (loaded,) = load_pairs(
        write_jsonl(
            tmp_path / "p.jsonl",
            [row],
        )
    )[0].to_list()
    assert loaded == {"prompt": "Write a haiku\nabout rain", "chosen": "Rain", "rejected": "Sun"}
    del row["input"]
    assert load_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))[0]["prompt"] == ["Write a haiku"]


def test_repeated_prefix_is_removed_once_and_announced_once(tmp_path, capsys):
    rows = [
        {"text": "I saw", "chosen": "I saw joy", "rejected": "I saw I saw"},
        {"text": "So", "chosen": "So good", "rejected": "So so"},
    ]
    loaded = load_pairs(write_jsonl(tmp_path / "p.jsonl", rows))[0].to_list()
    assert loaded[0] == {"prompt": "I saw", "chosen": " joy", "rejected": " I saw"}
    assert loaded[1]["rejected"] == " so"
    assert capsys.readouterr().err.count("it was removed from those of 2 rows") == 1


def test_prefix_repeated_in_nearly_all_rows_makes_the_others_bad(tmp_path):
    rows = [{"text": "I", "chosen": "I a", "rejected": "I b"}] * 19 + [{"text": "I", "chosen": "I a", "rejected": "b"}]
    table, (bad,) = load_pairs(write_jsonl(tmp_path / "p.jsonl", rows), on_bad_rows="skip")
    assert table["chosen"] == [" a"] * 19
    assert (bad.row, bad.column) == (19, "chosen")
    assert "does not repeat its prompt" in bad.problem
    assert "repair or remove the row" in bad.fix


def test_prefix_repeated_by_chance_is_left(tmp_path, capsys):
    rows = [{"text": "I", "chosen": "I a", "rejected": "I b"}] * 2 + [{"text": "I", "chosen": "a", "rejected": "b"}]
    assert load_pairs(write_jsonl(tmp_path / "p.jsonl", rows))[0]["chosen"] == ["I a", "I a", "a"]
    assert capsys.readouterr().err == ""


def test_scores_and_flags_from_csv_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        "prompt,chosen,rejected,chosen_score,rejected_score,chosen_complete\np,a,b,0.75,,False\nq,a,b,1,0,\n"
    )
    table, _ = load_pairs(path)
    assert table["chosen_score"] == [0.75, 1.0]
    assert table["rejected_score"] == [None, 0.0]
    assert table["chosen_complete"] == [False, True]


# ---- bad rows

BAD_ROWS = {
    "missing": (GOOD, {"prompt": "p", "chosen": "a"}, "rejected", "is missing", "fill it in or remove"),
    "null": (GOOD, GOOD | {"prompt": None}, "prompt", "is missing", "fill it in or remove"),
    "empty": (GOOD, GOOD | {"rejected": " \n"}, "rejected", "is empty", "write a response or remove"),
    "identical": (GOOD, GOOD | {"rejected": GOOD["chosen"]}, "rejected", "is identical to chosen", "remove the row"),
    "number": (GOOD, GOOD | {"chosen": 3.5}, "chosen", "is not text but float 3.5", "store it as a string"),
    "surrogate": (
        GOOD,
        GOOD | {"chosen": "a\ud800"},
        "chosen",
        "invalid UTF-8 at character 1",
        "save the text as UTF-8",
    ),
    "not a message": (MESSAGES, MESSAGES | {"chosen": ["A"]}, "chosen", "a message is expected", 'write {"role": ...'),
    "image": (
        MESSAGES,
        MESSAGES | {"chosen": [said("assistant", [{"type": "image"}])]},
        "chosen",
        "is not text but list",
        "store it as a string",
    ),
    "no messages": (MESSAGES, MESSAGES | {"chosen": []}, "chosen", "is empty", "write a response"),
    "ends with another user": (
        MESSAGES,
        MESSAGES | {"chosen": [*MESSAGES["chosen"], said("User", "and?")]},
        "chosen",
        "ends with a turn of 'User', not of the assistant",
        "add the assistant's turn",
    ),
    "begins with a tool": (
        MESSAGES,
        MESSAGES | {"chosen": [said("ipython", "4"), *MESSAGES["chosen"]]},
        "chosen",
        "begins with a turn of 'ipython', not of the assistant",
        "and then the assistant answer",
    ),
    "mixed responses": (
        GOOD,
        GOOD | {"rejected": [said("assistant", "B")]},
        "rejected",
        "one response is text",
        "same form",
    ),
    "mixed rows": (GOOD, MESSAGES, "prompt", "text and messages are mixed", "in the form of the first"),
    "score": (
        GOOD | {"chosen_score": 1},
        GOOD | {"chosen_score": "high"},
        "chosen_score",
        "not a finite number but 'high'",
        "number",
    ),
    "infinite": (
        GOOD | {"score_chosen": 1},
        GOOD | {"score_chosen": 1e999},
        "score_chosen",
        "not a finite number",
        "number",
    ),
    "flag": (
        GOOD,
        GOOD | {"chosen_complete": "maybe"},
        "chosen_complete",
        "neither true nor false",
        "write true or false",
    ),
    "ids": (
        GOOD | {"chosen_ids": [1], "rejected_ids": None, "tokenizer": "x"},
        GOOD | {"chosen_ids": [1, -2], "rejected_ids": [1], "tokenizer": "x"},
        "chosen_ids",
        "is not a list of token ids but [1, -2]",
        "leave it empty",
    ),
    "transcript": (
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        {"chosen": "a", "rejected": "b"},
        "chosen",
        "share no '\\n\\nAssistant:'",
        "add a prompt column",
    ),
    "identical messages": (
        {
            "chosen": [said("user", "x"), said("assistant", "a")],
            "rejected": [said("user", "x"), said("assistant", "b")],
        },
        {
            "chosen": [said("user", "x"), said("assistant", "a")],
            "rejected": [said("user", "x"), said("assistant", "a")],
        },
        "rejected",
        "is identical to chosen",
        "remove the row",
    ),
    "no shared message": (
        {
            "chosen": [said("user", "x"), said("assistant", "a")],
            "rejected": [said("user", "x"), said("assistant", "b")],
        },
        {
            "chosen": [said("user", "x"), said("assistant", "a")],
            "rejected": [said("user", "y"), said("assistant", "b")],
        },
        "chosen",
        "share no first message",
        "add a prompt column",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_by_row_and_column_with_the_fix(tmp_path, kind):
    good, broken, column, problem, fix = BAD_ROWS[kind]
    path = write_jsonl(tmp_path / "p.jsonl", [good, good, broken, good])
    with pytest.raises(BadRowsError) as raised:
        load_pairs(path)
    table, listed = load_pairs(path, on_bad_rows="skip")
    assert raised.value.rows == listed
    assert len(table) == 3
    (bad,) = listed
    assert (bad.row, bad.column) == (2, column)
    assert problem in bad.problem
    assert "(p.jsonl, line 3)" in bad.problem
    assert fix in bad.fix
    assert f"row 2, column {column!r}: {bad.problem}; {bad.fix}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "column", "problem"),
    [
        (
            "p.jsonl",
            b'{"prompt": "p", "chosen": "a\xff", "rejected": "b"}',
            "chosen",
            "invalid UTF-8 at character 1 (p.jsonl, line 2)",
        ),
        ("p.jsonl", b'{"prompt": "p", "chosen": "a"', "*", "not valid JSON"),
        ("p.jsonl", b'["p", "a", "b"]', "*", "a JSON object is expected, this is a list"),
        ("p.csv", b"p,a,b\xff", "rejected", "invalid UTF-8 at character 1 (p.csv, from line 3)"),
        ("p.csv", b"p,a,b,c", "*", "4 fields under a header of 3"),
        ("p.csv", b"p,a", "rejected", "is missing"),
        ("p.csv", b'p,"a"x,b', "*", "not valid CSV"),
    ],
)
def test_broken_bytes_are_named_by_row(tmp_path, name, content, column, problem):
    good = json.dumps(GOOD).encode() if name.endswith("jsonl") else b"prompt,chosen,rejected\np,a,b"
    path = tmp_path / name
    path.write_bytes(good + b"\n" + content + b"\n" + good.splitlines()[-1] + b"\n")
    table, (bad,) = load_pairs(path, on_bad_rows="skip")
    assert len(table) == 2
    assert (bad.row, bad.column) == (1, column)
    assert problem in bad.problem
    assert bad.fix


def test_invalid_utf8_in_parquet_is_named_by_row_and_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"a", b"a\xff", b"a"], type=pyarrow.binary()).view(pyarrow.string())
    columns = {"prompt": ["p", "q", "r"], "chosen": raw, "rejected": ["b", "b", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    table, (bad,) = load_pairs(tmp_path / "p.parquet", on_bad_rows="skip")
    assert table["prompt"] == ["p", "r"]
    assert (bad.row, bad.column) == (1, "chosen")
    assert "invalid UTF-8 at character 1" in bad.problem


def test_many_bad_rows_are_counted_and_the_first_ten_listed(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD, *[GOOD | {"chosen": ""}] * 13])
    with pytest.raises(BadRowsError) as raised:
        load_pairs(path)
    text = str(raised.value)
    assert text.startswith("13 of the rows of")
    assert "row 10," in text
    assert "row 11," not in text
    assert "and 3 more" in text
    assert "--on-bad-rows skip" in text


@pytest.mark.parametrize("content", ['{"prompt": 1', json.dumps(GOOD | {"chosen": ""})])
def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(tmp_path, content):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(BadRowsError, match="row 0"):
        load_pairs(tmp_path / "p.jsonl", on_bad_rows="skip")


def test_unknown_layout_lists_what_was_found_and_what_is_accepted(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "q", "good": "a", "bad": "b"}])
    with pytest.raises(ValueError, match=r"found: question, good, bad\. Accepted layouts: prompt, chosen, rejected"):
        load_pairs(path)
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "a"}])
    with pytest.raises(ValueError, match="columns chosen and rejected are needed, found: prompt, chosen"):
        load_pairs(path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="found: none at all"):
        load_pairs(tmp_path / "empty.jsonl")


def test_wrong_names_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data set '.*nowhere.jsonl' does not exist: there is no"):
        load_pairs(tmp_path / "nowhere.jsonl")
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(ValueError, match=r"this one in '\.txt'; convert it"):
        load_pairs(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="on_bad_rows must be"):
        load_pairs(tmp_path / "p.txt", on_bad_rows="ignore")


def test_splits_are_told_by_files_and_by_folders(tmp_path, capsys):
    for name in ("data/train_prefs-00000-of-00001", "data/test_prefs-00000-of-00001", "gen-00000-of-00001", "dev/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [GOOD | {"prompt": name}])
    for split, name in (("train_prefs", "data/train_prefs"), ("gen", "gen"), ("dev", "dev/x")):
        assert load_pairs(tmp_path, split=split)[0]["prompt"][0].startswith(name)
    with pytest.raises(ValueError, match="no split 'train'; it has test_prefs, train_prefs, dev, gen: name one with"):
        load_pairs(tmp_path)
    (tmp_path / "train").mkdir()
    write_jsonl(tmp_path / "train/a.jsonl", [GOOD])
    write_jsonl(tmp_path / "extra.jsonl", [GOOD])
    assert len(load_pairs(tmp_path)[0]) == 1
    assert "not read, since it is of no split: extra.jsonl" in capsys.readouterr().err


def test_a_single_file_or_table_has_no_splits(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", [GOOD])
    for more, problem in (({"split": "test"}, "no splits"), ({"config": "a"}, "no configurations")):
        with pytest.raises(ValueError, match=f"is a single file, which has {problem}"):
            load_pairs(path, **more)
    datasets.Dataset.from_list([GOOD]).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(ValueError, match="is a single table, which has no splits"):
        load_pairs(tmp_path / "table", split="test")


def test_configurations_are_those_of_the_readme_or_subfolders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [GOOD | {"prompt": name}])
        write_jsonl(tmp_path / name / "test.jsonl", [GOOD | {"prompt": f"{name} held out"}])
    assert load_pairs(tmp_path, config="b", split="test")[0]["prompt"] == ["b held out"]
    with pytest.raises(ValueError, match="no configuration 'c'; it has a, b: name one with --config"):
        load_pairs(tmp_path, config="c")
    card = "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: fit\n    path: a/*.jsonl\n"
    (tmp_path / "README.md").write_text(card + "- config_name: two\n  data_files: b/train.jsonl\n---\n# Pairs\n")
    assert load_pairs(tmp_path, config="one", split="fit")[0]["prompt"] == ["a held out", "a"]
    assert load_pairs(tmp_path, config="two")[0]["prompt"] == ["b"]
    with pytest.raises(ValueError, match="has the configurations one, two: name one with --config"):
        load_pairs(tmp_path)
    with pytest.raises(ValueError, match="no split 'train'; it has fit"):
        load_pairs(tmp_path, config="one")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_dict.json", b'{"split'),
        ("dataset_dict.json", b"[]"),
        ("train/state.json", None),
        ("train/state.json", b"{}"),
        ("train/state.json", b"\xff"),
        ("train/data-00000-of-00001.arrow", b"123"),
        ("train/data-00000-of-00001.arrow", None),
    ],
)
def test_a_damaged_folder_of_save_to_disk_is_named(tmp_path, name, content):
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / name).unlink() if content is None else (tmp_path / "saved" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/saved.*: not as save_to_disk writes it .*; save it again"):
        load_pairs(tmp_path / "saved")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ("gone.jsonl", r"its README.md declares files for 'train' that are not there"),
        ("/absolute.jsonl", r"README.md: its configurations cannot be read: .*; pass a file instead"),
    ],
)
def test_a_readme_that_declares_what_is_not_there_is_refused(tmp_path, files, sentence):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {files}\n---\n")
    with pytest.raises((OSError, ValueError), match=sentence):
        load_pairs(tmp_path)


def test_hub_names_go_to_load_dataset_with_split_and_configuration(monkeypatch):
    asked = []

    def fake(*name, split):
        asked.append((*name, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(formats, "load_dataset", fake)
    assert load_pairs("org/pairs", split="train_prefs")[0].to_list() == [GOOD]
    assert load_pairs("org/pairs", config="small")[0].to_list() == [GOOD]
    assert asked == [("org/pairs", None, "train_prefs"), ("org/pairs", "small", "train")]


@pytest.mark.parametrize(
    ("more", "lists"),
    [({"config": "a", "split": "dev"}, "['train', 'test']"), ({"config": "c"}, "['a', 'b']"), ({}, "['a', 'b']")],
)
def test_a_wrong_split_or_configuration_of_the_hub_lists_what_there_is(tmp_path, monkeypatch, more, lists):
    card = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: x.jsonl\n  - split: test\n    path: x.jsonl\n"
        for name in "ab"
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    write_jsonl(tmp_path / "x.jsonl", [GOOD])

    def fake(name, *more, split):
        return datasets.load_dataset(str(tmp_path), *more, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(formats, "load_dataset", fake)
    with pytest.raises(ValueError, match="the data set 'org/pairs' cannot be read") as raised:
        load_pairs("org/pairs", **more)
    assert lists in str(raised.value)
    assert "\n" not in str(raised.value)
    assert load_pairs("org/pairs", config="a", split="test")[0].to_list() == [GOOD]


def with_unknown_feature(table):
    """The table, its column `extra` declared of a type that `datasets` does not know."""
    features = {name: {"dtype": "string", "_type": "Value"} for name in table.column_names}
    features["extra"] = {"_type": "Hologram"}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_a_column_of_an_unknown_type_is_no_hindrance(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = with_unknown_feature(pyarrow.Table.from_pylist([GOOD | {"extra": "x"}]))
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="Hologram"):
        datasets.Dataset(table)
    assert load_pairs(tmp_path / "p.parquet")[0].to_list() == [GOOD]
    datasets.Dataset.from_list([GOOD | {"extra": "x"}]).save_to_disk(str(tmp_path / "saved"))
    with pyarrow.ipc.new_stream(tmp_path / "saved/data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    assert load_pairs(tmp_path / "saved")[0].to_list() == [GOOD]


def test_keys_that_arrow_invents_are_left_out(tmp_path):
    rows = [MESSAGES | {"chosen": [said("assistant", "A") | {"only": "here"}]}, MESSAGES]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p.parquet"))
    records = list(formats.read_records(tmp_path / "p.parquet", wanted={"chosen"}))
    assert [record.values["chosen"] for record in records] == [row["chosen"] for row in rows]
    assert records[0].values["prompt"] is None


# ---- input that is built to hurt


def test_a_table_that_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD] * 5)
    monkeypatch.setattr(formats, "MAX_TABLE", 4000)
    with pytest.raises(
        ValueError, match=r"p.jsonl, up to row 3: more than .* GiB, more than is read at once; split it"
    ):
        load_pairs(path)


def test_long_lines_are_refused_before_they_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE", 1000)
    for path in (write_jsonl(tmp_path / "p.jsonl", [GOOD, GOOD | {"chosen": "x" * 2000}]), tmp_path / "p.csv"):
        if path.suffix == ".csv":
            path.write_text("prompt,chosen,rejected\np," + "x" * 2000 + ",y\n")
        with pytest.raises(ValueError, match=f"{path}, line 2: longer than 1,000 characters; shorten or remove it"):
            load_pairs(path)


def read_and_tell_the_peak(path: Path) -> None:
    formats.MAX_TABLE = 2**28
    try:
        [None for record in formats.read_records(path, wanted={"prompt", "chosen", "rejected"})]
    except ValueError as error:
        print(error, file=sys.stderr)
    # not getrusage: its peak is the parent's where that was larger
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux' /proc")
@pytest.mark.parametrize("nested", [False, True])
def test_parquet_that_unpacks_to_gigabytes_is_refused_in_little_memory(tmp_path, nested):
    import pyarrow
    import pyarrow.parquet

    value = "x" * 2**20  # as a dictionary: a megabyte in the file's metadata, three gigabytes in its rows
    index = pyarrow.array([0] * 3000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array([value]))
    if nested:
        message = pyarrow.StructArray.from_arrays([column, column], ["role", "content"])
        column = pyarrow.ListArray.from_arrays(range(3001), message)
    path = tmp_path / "p.parquet"
    table = pyarrow.table({"prompt": column, "chosen": column, "rejected": column})
    pyarrow.parquet.write_table(table, path, store_schema=False)  # else it would say that it is a dictionary
    status, told = apart(read_and_tell_the_peak, path)
    assert status == 0, told
    problem, peak = told.splitlines()
    assert "more than 0.25 GiB" in problem
    assert int(peak) < 2**20  # KiB
    assert path.stat().st_size < 2**20


def test_parquet_that_is_large_by_its_own_account_is_not_read(tmp_path, monkeypatch):
    datasets.Dataset.from_list([GOOD] * 50).to_parquet(str(tmp_path / "p.parquet"))
    monkeypatch.setattr(formats, "MAX_TABLE", 100)
    with pytest.raises(ValueError, match=r"p.parquet: more than .* GiB, more than is read at once"):
        load_pairs(tmp_path / "p.parquet")
    (tmp_path / "q.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"q.parquet: not valid parquet"):
        load_pairs(tmp_path / "q.parquet")


def test_deep_json_is_a_bad_row_or_file(tmp_path):
    deep = "[" * 200_000 + "]" * 200_000
    (tmp_path / "p.jsonl").write_text(json.dumps(GOOD) + '\n{"prompt": ' + deep + "}\n")
    _, (bad,) = load_pairs(tmp_path / "p.jsonl", on_bad_rows="skip")
    assert (bad.row, bad.column) == (1, "*")
    assert "not valid JSON" in bad.problem
    (tmp_path / "p.json").write_text(deep)
    with pytest.raises(ValueError, match=r"p.json: not valid JSON"):
        load_pairs(tmp_path / "p.json")


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,chosen\np,a,b,c\n")
    with pytest.raises(ValueError, match="two columns of the header prompt, chosen, rejected, chosen have one name"):
        load_pairs(tmp_path / "p.csv")


def test_without_a_network_the_message_names_the_alternative(tmp_path):
    code = "from tpo_lib.files.pairs import load_pairs; load_pairs('Anthropic/hh-rlhf')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: the data set 'Anthropic/hh-rlhf' (split 'train') is not a local file")
    assert "pass a local .jsonl" in last
    assert "--preset pocket" in last


def test_bad_row_reads_as_a_sentence():
    assert str(BadRow(17, "chosen", "is empty", "remove it")) == "row 17, column 'chosen': is empty; remove it"
