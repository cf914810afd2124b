"""Long tables: encoded in parts, side by side and on disk, they are what `encode_pairs` makes; and no part is made twice."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny
from apart import apart

from tpo_lib.data import encode_pairs
from tpo_lib.fast import encode
from tpo_lib.fast.encode import encode_table
from tpo_lib.files import encoding
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.pairs import pairs_table

ROWS = 60
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def seven_rows_a_part(monkeypatch):
    monkeypatch.setattr(encode, "PART", 7)
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def said(role, content):
    return {"role": role, "content": content}


def text(i: int) -> dict:
    return {"prompt": f"the film {i % 5}", "chosen": f" was good{'!' * (i % 11)}", "rejected": f" was bad {i}"}


def message(i: int) -> dict:
    more = {"reasoning_content": "hm"} if i == 40 else {}
    answer = {"chosen": [said("assistant", f"Yes {i}") | more], "rejected": [said("assistant", "No")]}
    return {"prompt": [said("user", f"Is it {i % 4}?")], **answer, "tools": '[{"name": "f"}]' if i == 9 else None}


def sampled(i: int, name: str = "") -> dict:
    ids = {"chosen_ids": [5 + i % 7, 6], "rejected_ids": [7], "tokenizer": name} if i % 3 else {}
    row = {"chosen_complete": bool(i % 2), "rejected_complete": i % 4 > 0}
    return text(i) | row | {"chosen_ids": None, "rejected_ids": None, "tokenizer": None} | ids


def hurt(i: int) -> dict:
    bad = {
        5: {"prompt": "the film " * 30},
        23: {"rejected": text(i)["chosen"]},
        41: {"chosen": "<|endoftext|>"},
        42: {"chosen": " good" * 60},
    }
    return text(i) | bad.get(i, {})


def bare(i: int) -> dict:
    return {side: words for side, words in text(i).items() if side != "rejected"}


MADE = {"text": text, "messages": message, "sampled": sampled, "bad rows": hurt, "for SFT": bare}


def table_of(kind: str, rows: int = ROWS):
    return pairs_table([MADE[kind](i) for i in range(rows)])


def encoded(table, tokenizer, folder: Path, **settings):
    settings = {"max_length": 64, "on_bad_rows": "skip", "progress": False} | settings
    return encode_table(table, tokenizer, cache_dir=folder, **settings)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", MADE)
def test_a_table_in_parts_is_encoded_as_at_once(tmp_path, monkeypatch, capsys, tokenizer, kind, workers):
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda _: set(range(workers)), raising=False)
    monkeypatch.setattr(encode, "PART", 25 if kind == "messages" else 7)  # every part begins a process for its template
    table = table_of(kind)
    expected, report = encode_pairs(table, tokenizer, max_length=64, on_bad_rows="skip")
    told = capsys.readouterr().err
    assert ("tools, reasoning_content" in told) == (kind == "messages")
    pairs, also = encoded(table, tokenizer, tmp_path)
    assert list(pairs) == expected
    assert (pairs[3], pairs[-1], pairs[5:50:9]) == (expected[3], expected[-1], expected[5:50:9])
    assert also == report
    assert capsys.readouterr().err.startswith(told)
    assert pairs.rows.tolist() == [pair.row for pair in expected]
    assert pairs.lengths.tolist() == [pair.length for pair in expected]
    assert pairs.sizes.tolist() == [pair.size for pair in expected]
    assert type(pairs[0].row) is type(pairs[0].prompt_ids[0]) is int


def test_a_shuffled_selection_is_encoded_in_its_order(tmp_path, tokenizer):
    table = table_of("text").shuffle(seed=0).select(range(10, 50))
    expected, _ = encode_pairs(table, tokenizer, max_length=64)
    assert list(encoded(table, tokenizer, tmp_path)[0]) == expected


def test_bad_rows_are_named_by_their_place_in_the_whole_table(tmp_path, tokenizer):
    table = table_of("bad rows")
    with pytest.raises(BadRowsError) as at_once:
        encode_pairs(table, tokenizer, max_length=64)
    with pytest.raises(BadRowsError) as in_parts:
        encoded(table, tokenizer, tmp_path, on_bad_rows="error")
    assert in_parts.value.rows == at_once.value.rows
    assert [bad.row for bad in in_parts.value.rows] == [5, 23, 41]
    assert str(in_parts.value) == str(at_once.value)
    for change, problem in (({"max_length": 1}, "max_length 1 leaves"), ({"on_bad_rows": "no"}, "on_bad_rows must be")):
        with pytest.raises(ValueError, match=problem):
            encoded(table, tokenizer, tmp_path, **change)


def test_a_template_that_stops_is_told_with_its_row(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(encode, "PART", 25)
    stops = "{% if messages[0]['content'] == 'Is it 2?' %}{{ 'x' * 10 ** 10 }}{% endif %}"
    tokenizer.chat_template = stops + TEMPLATE
    rows = [message(4 * i + 2 * (i == 33)) for i in range(ROWS)]
    with pytest.raises(ValueError, match="the chat template was stopped at row 33"):
        encoded(pairs_table(rows), tokenizer, tmp_path)


# ---- kept on disk


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("encoded-*"))


def test_what_is_there_is_not_encoded_again(tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda _: {0}, raising=False)
    first, report = encoded(table_of("bad rows"), tokenizer, tmp_path)
    assert f"9 parts of encoded pairs, 0.0 MB, are kept in {tmp_path}" in capsys.readouterr().err
    assert len(parts(tmp_path)) == 9
    made, whole = [], encoding.encode_rows
    monkeypatch.setattr(
        encode.encoding, "encode_rows", lambda *a, first, **b: made.append(first) or whole(*a, first=first, **b)
    )
    again, same = encoded(table_of("bad rows"), tokenizer, tmp_path)
    assert (list(again), same, made) == (list(first), report, [])
    longer, _ = encoded(table_of("bad rows", ROWS + 3), tokenizer, tmp_path)  # the last part alone is another
    assert (len(longer), made) == (len(first) + 3, [56])
    damaged = parts(tmp_path)[2] / "ids.arrow"
    damaged.unlink()  # what is mapped stays as it is
    damaged.write_bytes(b"damaged")
    assert list(encoded(table_of("bad rows"), tokenizer, tmp_path)[0]) == list(first)
    assert len(made) == 2
    assert "cannot be used and is built anew" in capsys.readouterr().err
    encoded(table_of("bad rows"), tokenizer, tmp_path, max_length=63)
    assert len(made) == 11


def test_short_tables_leave_no_file(tmp_path, tokenizer):
    pairs, _ = encoded(table_of("text", 7), tokenizer, tmp_path)
    assert isinstance(pairs, list)
    assert parts(tmp_path) == []


def test_without_a_folder_they_are_kept_in_the_cache_of_the_library(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TPO_CACHE", str(tmp_path))
    encode_table(table_of("text"), tokenizer, max_length=64, progress=False)
    assert len(parts(tmp_path / "encoded")) == 9


def test_a_disk_without_room_says_what_to_do(tmp_path, monkeypatch, tokenizer):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, "save", full)
    with pytest.raises(
        OSError, match=r"cannot take the encoded pairs \(.*No space.*another --cache-dir \(or set TPO_CACHE"
    ):
        encoded(table_of("text"), tokenizer, tmp_path)
    assert parts(tmp_path) == []


def test_the_bar_counts_rows(tmp_path, capsys, tokenizer):
    encoded(table_of("text"), tokenizer, tmp_path, progress=True)
    told = capsys.readouterr().err
    assert "encoding: 100%" in told
    assert "60.0/60.0" in told


def killed(folder: Path) -> None:
    encode.PART, encode.os.sched_getaffinity = 7, lambda _: {0, 1}
    whole, parent = encode.encoding.encode_rows, os.getpid()

    def kills(*args, first, **more):
        if first >= 35:
            (folder / "workers").open("a").write(f"{os.getpid()}\n")
            os.kill(parent, signal.SIGKILL)
            time.sleep(60)
        return whole(*args, first=first, **more)

    encode.encoding.encode_rows = kills
    encoded(table_of("text"), tiny.tokenizer(folder / "tokenizer"), folder)


def test_a_killed_encoding_goes_on_where_it_was_and_leaves_no_process(tmp_path, monkeypatch, capsys):
    status, told = apart(killed, tmp_path)
    assert status == -signal.SIGKILL, told
    done = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert len(done) >= 4
    workers = [int(line) for line in (tmp_path / "workers").read_text().split()]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() and "Z" not in state(worker) for worker in workers):
        assert time.monotonic() < deadline, f"workers {workers} go on without their parent"
        time.sleep(0.05)
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer")
    pairs, _ = encoded(table_of("text"), tokenizer, tmp_path)
    assert list(pairs) == encode_pairs(table_of("text"), tokenizer, max_length=64)[0]
    assert {path: path.stat().st_mtime_ns for path in done} == done


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def dies(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere parts are made in this process")
def test_a_killed_worker_is_an_error_that_says_so(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(encode.encoding, "encode_rows", dies)
    with pytest.raises(
        RuntimeError, match=r"a process that encodes pairs was killed \(is there memory for 2\?\).*begin again"
    ):
        encoded(table_of("text"), tokenizer, tmp_path)


def test_a_report_is_as_json_has_it(tmp_path, tokenizer):
    encoded(table_of("bad rows"), tokenizer, tmp_path)
    reports = [json.loads((path / "report.json").read_text()) for path in parts(tmp_path)]
    assert sum(each["counts"]["kept"] for each in reports) == ROWS - 3
    assert {row for each in reports for row, *_ in each["skipped"]} <= set(range(7))  # of the part


# ---- memory

LONG = 30_000  # rows


def peak() -> int:
    """The most memory that this process has had, in kB; not getrusage, whose peak is the parent's where that was larger."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def begun(folder: Path) -> None:
    from tpo_lib.config import TrainConfig
    from tpo_lib.fast.table import rows_of
    from tpo_lib.files.pairs import load_pairs
    from tpo_lib.files.store import rows_key
    from tpo_lib.models import check_pairs
    from tpo_lib.runs.run import _prompts
    from tpo_lib.train import updates

    encode.os.sched_getaffinity = lambda _: {0, 1}  # workers have their own memory, of a part each
    model, tokenizer = tiny.llama(vocab=300), tiny.tokenizer(folder / "tokenizer")
    encoded(table_of("text", 8), tokenizer, folder)
    before = peak()
    table, _ = load_pairs(folder / "p.jsonl")
    pairs, _ = encoded(table, tokenizer, folder)
    check_pairs(model, pairs)
    config = TrainConfig(batch_size=16, group_prompts=True)
    assert len(next(updates(config, pairs, 16, 0, 100))) == 16
    assert len(rows_key(rows_of(pairs))) == 64
    assert len(_prompts(pairs)) == LONG
    (folder / "told").write_text(f"{len(pairs)} {peak() - before}")


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux' /proc")
def test_a_long_table_takes_next_to_no_memory_until_the_first_update(tmp_path):
    with open(tmp_path / "p.jsonl", "w") as file:
        for i in range(LONG):
            row = {
                "prompt": f"Film {i}: the",
                "chosen": f" plot {i} is good" * 5,
                "rejected": f" acting {i} is bad" * 5,
            }
            file.write(json.dumps(row) + "\n")
    status, told = apart(begun, tmp_path)
    assert status == 0, told
    pairs, more = map(int, (tmp_path / "told").read_text().split())
    assert pairs == LONG
    assert more < 2 * LONG  # kB; of lists it were fourteen a row
