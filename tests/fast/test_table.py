"""table.py: a table of pairs in columns is the list of them, for the loop, a run's folder and the caches alike."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import astuple, fields, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from tpo_lib import data, models
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.fast import FastPath, frozen
from tpo_lib.fast.table import COLUMNS, EncodedTable, Sequences, columns_of, rows_of, save
from tpo_lib.files.store import content_key, rows_key
from tpo_lib.models import ResponseReader
from tpo_lib.runs import run
from tpo_lib.train import fit as plain_fit
from tpo_lib.train import updates


def many(prompts: int = 400) -> list[EncodedPair]:
    """Pairs of shared prompts and responses, with gaps in their rows, as a table with rows left out has them."""
    return [replace(pair, row=2 * pair.row + pair.row // 7) for pair in tiny.of_prompts(prompts)]


def saved(pairs: list[EncodedPair], folder: Path, part: int = 100) -> EncodedTable:
    """The pairs in files, as `encode_table` leaves them."""
    parts = [pairs[i : i + part] for i in range(0, len(pairs), part)]
    for i, each in enumerate(parts):
        save(columns_of([*rows_of(each)], each[0].row), folder / f"{i}.arrow")
    return EncodedTable.open([folder / f"{i}.arrow" for i in range(len(parts))], [each[0].row for each in parts])


def rss_of(lines) -> list[str]:
    """The line that says what is resident of the mapping whose description goes on in `lines`."""
    return [next(line for line in lines if line.startswith("Rss:"))]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    pairs = many()
    return pairs, saved(pairs, tmp_path_factory.mktemp("table"))


def test_a_table_holds_the_pairs_of_its_list(both):
    pairs, table = both
    assert len(table) == len(pairs) == 2400
    assert list(table) == list(EncodedTable.of(pairs)) == pairs
    assert (table[7], table[-1], table[95:2399:101]) == (pairs[7], pairs[-1], pairs[95:2399:101])
    assert EncodedTable.of(table) is table
    assert type(table[0].row) is type(table[0].prompt_ids[0]) is int
    with pytest.raises(IndexError, match="pair 2400 of 2400"):
        table[2400]
    empty = EncodedTable.of([])
    assert (len(empty), list(empty), empty.lengths.tolist(), empty.prompts.tolist()) == (0, [], [], [])


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux' /proc")
def test_the_files_of_a_table_are_mapped_and_not_held_open(tmp_path):
    table = saved(tiny.pairs(40), tmp_path, part=4)
    held = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.exists()]
    assert not [name for name in held if name.startswith(str(tmp_path))]
    assert str(tmp_path / "0.arrow") in Path("/proc/self/maps").read_text()
    for file in tmp_path.iterdir():
        file.unlink()
    assert list(table) == tiny.pairs(40)


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux' /proc")
def test_what_was_read_of_a_table_is_given_back(tmp_path):
    pairs = [replace(pair, chosen_ids=pair.chosen_ids * 400) for pair in tiny.pairs(900)]
    table = saved(pairs, tmp_path, part=300)

    def resident() -> int:
        """kB of the table's files."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(int(line.split()[1]) for name in lines if str(tmp_path) in name for line in rss_of(lines))

    whole = sum(file.stat().st_size for file in tmp_path.iterdir()) / 1024
    read = [table[i] for i in range(0, 900, 4)]
    assert resident() > whole / 10
    assert read == pairs[::4]
    assert list(table) == pairs
    assert resident() < whole / 10
    assert [table[i] for i in range(0, 900, 3)] == pairs[::3]  # more than OFTEN
    assert resident() < whole / 2


def test_every_field_of_a_pair_is_a_column():
    assert [field.name for field in fields(EncodedPair)] == ["row", *COLUMNS]


def test_columns_are_the_attributes_of_the_pairs(both):
    pairs, table = both
    for name in ("row", "length", "size"):
        expected = [getattr(pair, name) for pair in pairs]
        assert data.column(table, name).tolist() == data.column(pairs, name).tolist() == expected
    numbers = {tuple(pair.prompt_ids): int(number) for pair, number in zip(pairs, table.prompts, strict=True)}
    assert len(numbers) == len(set(numbers.values())) > 300
    assert [numbers[tuple(pair.prompt_ids)] for pair in pairs] == table.prompts.tolist()
    bare = [replace(pair, rejected_ids=[]) if i in (3, 9) else pair for i, pair in enumerate(pairs[:20])]
    for rows in (bare, EncodedTable.of(bare)):
        assert data.bare_rows(rows).tolist() == [bare[3].row, bare[9].row]
        with pytest.raises(ValueError, match=rf"lacks \(2 of 20 rows do\)|row {bare[3].row} of pairs"):
            plain_fit(CONFIG, tiny.llama(), tiny.llama(), rows, progress=False)


def test_digests_tell_a_sequence_from_one_that_is_cut_elsewhere():
    cut = [([5, 6], [7, 8], [9]), ([5], [6, 7, 8], [9]), ([5, 6], [9], [7, 8])]
    table = EncodedTable.of([EncodedPair(i, *ids) for i, ids in enumerate(cut)])
    prompt, chosen, rejected = map(table.digests, ("prompt", "chosen", "rejected"))
    assert len(np.unique(np.concatenate([chosen, rejected]))) == 4
    assert (chosen[0], rejected[0]) == (rejected[2], chosen[2])
    assert prompt[0] == prompt[2] != prompt[1]


def test_what_a_model_cannot_read_is_named_as_in_a_list():
    model = tiny.llama()
    model.config.max_position_embeddings = 16
    pairs = [EncodedPair(i, [0, 1], [5 + i, 3], [4]) for i in range(6)]
    for change in ({"chosen_ids": [1] * 15}, {"rejected_ids": [2, tiny.VOCAB + 3]}, {"prompt_ids": [tiny.VOCAB]}):
        broken = [*pairs[:4], replace(pairs[4], **change), replace(pairs[5], chosen_ids=[1] * 99)]
        with pytest.raises(ValueError, match="row 4") as listed:
            models.check_pairs(model, pairs, broken)
        with pytest.raises(ValueError, match="row 4") as tabled:
            models.check_pairs(model, EncodedTable.of(pairs), EncodedTable.of(broken))
        assert str(tabled.value) == str(listed.value)
    models.check_pairs(model, EncodedTable.of(pairs))


# ---- the order of batches, as it was made of lists


def batches_of_lists(lengths, batch_size, *, seed, epoch, prompts=None) -> list[list[int]]:
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    if prompts is not None:
        longest = {prompt: length for length, prompt in sorted(zip(lengths, prompts, strict=True), key=lambda x: x[0])}
        first = {prompts[row]: place for place, row in reversed([*enumerate(order)])}
        order, lengths = sorted(order, key=lambda row: first[prompts[row]]), [longest[prompt] for prompt in prompts]
    order = order[: len(lengths) // batch_size * batch_size]
    batches, chunk = [], 50 * batch_size
    for start in range(0, len(order), chunk):
        rows = sorted(order[start : start + chunk], key=lambda row: lengths[row])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_batches_is_what_it_was(both, grouped):
    pairs, table = both
    names = [tuple(pair.prompt_ids) for pair in pairs] if grouped else None
    lengths = [pair.length for pair in pairs]
    config = TrainConfig(batch_size=16, epochs=3, group_prompts=grouped, seed=4)
    expected = [window for e in range(3) for window in batches_of_lists(lengths, 16, seed=4, epoch=e, prompts=names)]
    for rows in (pairs, table):
        assert list(updates(config, rows, 16, 0, len(expected))) == expected
        assert list(updates(config, rows, 16, 200, 300)) == expected[200:300]


# ---- keys, records and caches


def test_keys_of_rows_are_those_of_the_whole_list(both):
    pairs, table = both
    rows = [astuple(pair) for pair in pairs]
    assert rows_key(rows_of(table)) == rows_key(rows_of(pairs)) == content_key(rows)
    assert rows_key(rows_of(table), 3, "logps", {"b": Path("x"), "a": 1}) == content_key(
        [3, "logps", {"b": Path("x"), "a": 1}, rows]
    )
    assert rows_key([]) == content_key([])
    assert rows_key([], 1) == content_key([1, []])


def test_different_sequences_are_numbered_as_they_come(both):
    pairs, _ = both
    pairs = [replace(pair, rejected_ids=[]) if i % 5 == 0 else pair for i, pair in enumerate(pairs)]
    numbers, places = {}, []
    for pair in pairs:
        sides = tuple(pair.chosen_ids), tuple(pair.rejected_ids)
        places.append([numbers.setdefault((tuple(pair.prompt_ids), s), len(numbers)) if s else -1 for s in sides])
    expected = [EncodedPair(i, [*prompt], [*side]) for (prompt, side), i in numbers.items()]
    found = Sequences.of(EncodedTable.of(pairs))
    assert [found[i] for i in range(len(found))] == expected
    assert found.places.tolist() == places
    assert found.lengths.tolist() == [pair.length for pair in expected]
    assert found.responses.tolist() == [len(pair.chosen_ids) for pair in expected]
    for most in (60, 400):
        assert [chunk.tolist() for chunk in found.chunks(most)] == [
            [pair.row for pair in batch] for batch in data.token_budget(expected, most)
        ]


CONFIG = TrainConfig(lr=1e-3, batch_size=4, accumulation=2, warmup_steps=1, log_every=1, device="cpu", max_steps=3)


@pytest.mark.parametrize("how", [FastPath(), FastPath(cache_dir="caches")])
def test_a_run_on_a_table_is_the_run_on_its_list(tmp_path, how):
    made = []
    for name, rows in (("list", many(10)), ("table", saved(many(10), tmp_path, part=17))):
        folder = tmp_path / name
        fast = replace(how, cache_dir=how.cache_dir and str(folder / how.cache_dir))
        config = replace(CONFIG, loss_type="tdpo2", max_tokens=200, eval_every=2, output_dir=str(folder / "run"))
        held_out = tiny.pairs(5, seed=3)
        held_out = held_out if name == "list" else EncodedTable.of(held_out)
        result = run.fit(config, tiny.llama(), tiny.llama(seed=1), rows, eval_pairs=held_out, fast=fast, progress=False)
        start = json.loads((folder / "run/start/training.json").read_text())["start"]
        caches = {p.relative_to(folder): p.read_bytes() for p in folder.glob("caches/*/*")}
        record = run.read_run(folder / "run")
        made.append((result.metrics, start, caches, record.prompts(), result.policy.state_dict()))
    (metrics, start, caches, prompts, weights), (*same, tabled) = made
    assert same == [metrics, start, caches, prompts]
    assert all(torch.equal(weight, tabled[name]) for name, weight in weights.items())
    assert prompts == sorted(map(list, {tuple(pair.prompt_ids) for pair in many(10)}))
    assert start["training pairs"] == {"count": 60, "sha256": content_key([astuple(pair) for pair in many(10)])}
    assert start["training prompts"] == {"count": 10, "sha256": content_key(prompts)}
    assert bool(caches) == (how.cache_dir is not None)


def test_a_cache_of_a_table_says_what_the_model_does(tmp_path):
    pairs = many(6)
    reader = ResponseReader(tiny.llama())
    identity = frozen.identify(reader, "no")
    settings = {"kind": "logps", "folder": tmp_path, "name": "reference", "max_tokens": 64, "progress": False}
    cache = frozen.build_or_open(reader, identity, EncodedTable.of(pairs), **settings)
    spans = {pair.row: cache.spans[pair.row] for pair in pairs}
    assert cache.spans == spans
    assert len(cache.spans) == 36
    assert 1 not in cache.spans
    batch = data.collate([pairs[i] for i in (30, 2, 17)], 0)
    with torch.no_grad():
        expected = frozen._values(reader, "logps", torch.no_grad, batch)
    torch.testing.assert_close(cache.read(batch), expected, rtol=1e-6, atol=1e-6)
