"""spool.py: tables that lie on disk are the tables that were in memory, and leave nothing behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tpo_lib.files import spool
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.pairs import load_pairs, pairs_table


def said(role, content):
    return {"role": role, "content": content}


def texts(i: int) -> dict:
    return {"prompt": f"Film {i % 7}:", "chosen": f" good {i}", "rejected": f" bad {i}", "chosen_score": i / 2}


def repeating(i: int) -> dict:
    row = {"prompt": f"Film {i}", "chosen": f"Film {i} is good", "rejected": f"Film {i} is bad"}
    return row | ({"chosen": "A film"} if i == 13 else {})


def messages(i: int) -> dict:
    more = {"reasoning_content": "so"} if i == 17 else {}
    row = {"prompt": [said("user", f"Hi {i}")], "chosen": [said("assistant", "A") | more]}
    return row | {"rejected": [said("assistant", "B")], "extra": i}


def alpaca(i: int) -> dict:
    return {"instruction": f"Do {i}", "input": "", "chosen": f"a{i}", "rejected": f"b{i}", "system": "Be" * (i == 19)}


def sampled(i: int) -> dict:
    ids = {"chosen_ids": [i, 1], "rejected_ids": [i], "tokenizer": "t"} if i % 2 else {}
    return texts(i) | {"chosen_ids": None, "rejected_ids": None, "tokenizer": None} | ids


def broken(i: int) -> dict:
    bad = {3: {"chosen": ""}, 8: {"rejected": f" good {i}"}, 11: {"prompt": None}, 15: {"chosen": [said("user", "x")]}}
    return texts(i) | bad.get(i, {}) | ({"late": "column"} if i == 20 else {})


def written(path: Path, make) -> Path:
    path.write_text("".join(json.dumps(make(i)) + "\n" for i in range(23)) + "{\n")
    return path


@pytest.mark.parametrize("make", [texts, repeating, messages, alpaca, sampled, broken])
def test_a_table_on_disk_is_the_one_in_memory(tmp_path, monkeypatch, capsys, make):
    path = written(tmp_path / "p.jsonl", make)
    table, bad = load_pairs(path, on_bad_rows="skip")
    told = capsys.readouterr().err
    with pytest.raises(BadRowsError) as error:
        load_pairs(path)
    capsys.readouterr()
    monkeypatch.setattr(spool, "CHUNK", 4)
    again, also_bad = load_pairs(path, on_bad_rows="skip")
    assert again.data.num_rows == len(table) > 4 * 4
    assert again.features == table.features
    assert again.to_list() == table.to_list()
    assert also_bad == bad != []
    assert capsys.readouterr().err == told
    with pytest.raises(BadRowsError) as same:
        load_pairs(path)
    assert str(same.value) == str(error.value)


def test_a_table_on_disk_is_shuffled_cut_and_saved_like_any_other(tmp_path, monkeypatch):
    rows = [texts(i) for i in range(23)]
    plain = pairs_table(rows)
    monkeypatch.setattr(spool, "CHUNK", 4)
    table = pairs_table(spool.Spool(rows))
    for each in (lambda t: t.shuffle(seed=1), lambda t: t.select(range(3, 20)), lambda t: t.remove_columns("rejected")):
        assert each(table).to_list() == each(plain).to_list()
    assert list(table["prompt"]) == list(plain["prompt"])


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(spool, "CHUNK", 4)
    rows = spool.Spool(texts(i) for i in range(23))
    table = pairs_table(rows)
    assert list(tmp_path.iterdir()) == []
    assert list(rows) == table.to_list() == [texts(i) for i in range(23)]


def test_rows_are_read_in_order_and_again_while_they_are_read(monkeypatch):
    monkeypatch.setattr(spool, "CHUNK", 3)
    rows = spool.Spool(range(8))
    assert [(a, b) for a in rows for b in rows] == [(a, b) for a in range(8) for b in range(8)]
    assert len(rows) == 8
    assert not spool.Spool()


def test_what_is_too_deep_to_be_written_stays_in_memory(monkeypatch):
    monkeypatch.setattr(spool, "CHUNK", 1)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    first, second = spool.Spool([deep, "x"])
    assert first is deep
    assert second == "x"
    while deep:  # by hand: so deep a list cannot be freed at once everywhere
        deep = deep.pop()


def test_a_disk_without_room_says_where_it_is(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "CHUNK", 2)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    with pytest.raises(
        OSError, match=r"cannot take the table \(.*No space left.*\); free some room there, or set TMPDIR"
    ):
        spool.Spool(range(9))
