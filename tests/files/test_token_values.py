"""Numbers of tokens as data: read from every layout, kept when written, and laid on the tokens of any tokenizer."""

from __future__ import annotations

import itertools
import json
import random
import time

import pytest
import tiny

from tpo_lib.data import encode_pairs
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.load import POCKET, load_tokenizer
from tpo_lib.files.pairs import load_pairs, save_pairs, table_of
from tpo_lib.files.token_values import aligned, by_token

SAID = " a fine film — é😀 ok."
SPANS = [{"start": 3, "end": 7, "value": 1.0}, {"start": 15, "end": 17, "value": 2.0}]
END = [{"start": len(SAID), "end": len(SAID), "value": 5.0}]
PAIR = {"prompt": "It was", "chosen": SAID, "rejected": " dull"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(POCKET)


def numbers(rows, tokenizer, kind="token_rewards", max_length=64):
    """(piece, number) of every token, of the chosen and the rejected response of every row."""
    table = table_of(rows, "rows")
    pairs, _ = encode_pairs(table, tokenizer, max_length=max_length)
    found, bare = aligned(table, pairs, tokenizer, kind, max_length=max_length)
    ids = [(pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    pieces = [[[tokenizer.decode([i]) for i in side] for side in sides] for sides in ids]
    return [
        [list(zip(*both, strict=True)) for both in zip(*row, strict=True)] for row in zip(pieces, found, strict=True)
    ], bare


def test_spans_are_laid_on_tokens_by_characters(tokenizer):
    ((chosen, rejected),), bare = numbers([PAIR | {"chosen_token_rewards": SPANS + END}], tokenizer)
    said = dict(chosen)
    assert said[" fine"] == pytest.approx(4 / 5)  # its space is of no span
    assert said["."] == said[" a"] == 0.0
    assert said["é"] == 2.0
    assert [value for piece, value in chosen if piece == "�"][-4:] == [2.0] * 4  # all bytes of a character
    assert chosen[-1] == ("<|endoftext|>", 5.0)
    assert {value for _, value in rejected} == {0.0}
    assert bare == 1


def test_weights_are_1_where_nothing_is_said(tokenizer):
    given = {"chosen_token_weights": [{"start": 3, "end": 7, "value": 0.0}], "rejected_token_weights": None}
    ((chosen, rejected),), _ = numbers([PAIR | given], tokenizer, "token_weights")
    assert dict(chosen)[" fine"] == pytest.approx(1 / 5)
    assert {value for _, value in rejected} == {1.0}


def test_numbers_by_the_token(tokenizer):
    ((_, rejected),), _ = numbers([PAIR | {"rejected_token_rewards": [0.5, 0.25]}], tokenizer)
    assert rejected == [(" dull", 0.5), ("<|endoftext|>", 0.25)]
    ((_, rejected),), _ = numbers([PAIR | {"rejected_token_rewards": "[0.5]"}], tokenizer)  # as a CSV holds it
    assert rejected == [(" dull", 0.5), ("<|endoftext|>", 0.0)]
    many = list(range(20))
    ((chosen, _),), _ = numbers([PAIR | {"chosen_token_rewards": many}], tokenizer, max_length=8)
    assert [value for _, value in chosen] == many[: len(chosen)]  # the response was cut
    with pytest.raises(BadRowsError, match=r"row 0, column 'chosen_token_rewards': has 20 numbers for 1\d tokens"):
        numbers([PAIR | {"chosen_token_rewards": many}], tokenizer)


def test_another_tokenizer_gives_the_same_characters_the_same_numbers(tokenizer, tmp_path):
    other = tiny.tokenizer(tmp_path)
    row = {"prompt": "It was", "chosen": " a fine film", "rejected": " dull", "chosen_token_rewards": SPANS[:1]}

    def area(tokenizer) -> float:
        ((chosen, _),), _ = numbers([row], tokenizer)
        return sum(value * len(piece) for piece, value in chosen[:-1])

    assert area(other) == pytest.approx(area(tokenizer)) == pytest.approx(4.0)


def test_sampled_tokens_that_no_text_is_encoded_as(tokenizer):
    """Split otherwise than the tokenizer would: characters are found by what the tokens say."""
    table = table_of([PAIR | {"chosen_token_rewards": SPANS[:1]}], "rows")
    (pair,), _ = encode_pairs(table, tokenizer, max_length=64)
    letters = [i for letter in " a fine film" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    rest = tokenizer(" — é😀 ok.", add_special_tokens=False)["input_ids"]
    own = type(pair)(0, pair.prompt_ids, [*letters, *rest, tokenizer.eos_token_id], pair.rejected_ids)
    ((chosen, _),), _ = aligned(table, [own], tokenizer, "token_rewards", max_length=64)
    assert chosen[:12].tolist() == [0.0] * 3 + [1.0] * 4 + [0.0] * 5
    assert not any(chosen[12:])


def test_messages_count_from_the_content_of_the_last():
    tokenizer = load_tokenizer(POCKET)
    said = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    tokenizer.chat_template = said + "{% if add_generation_prompt %}<assistant>{% endif %}"
    row = {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": SAID}],
        "rejected": [{"role": "assistant", "content": "dull"}],
        "chosen_token_rewards": SPANS[:1],
    }
    ((chosen, _),), _ = numbers([row], tokenizer)
    said = [(piece, value) for piece, value in chosen if value]
    assert [piece for piece, _ in said] == [" fine"]
    assert said[0][1] == pytest.approx(4 / 5)


def test_an_answer_that_the_template_says_too_is_found_where_it_stands():
    tokenizer = load_tokenizer(POCKET)
    said = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end of {{ m.role }}>\n{% endfor %}"
    tokenizer.chat_template = said + "{% if add_generation_prompt %}<assistant>{% endif %}"
    row = {"prompt": [{"role": "user", "content": "How?"}], "rejected": [{"role": "assistant", "content": "dull"}]}
    for answer in ("end", " of", "film, the end"):
        spans = [{"start": 0, "end": len(answer), "value": 1.0}]
        row |= {"chosen": [{"role": "assistant", "content": answer}], "chosen_token_rewards": spans}
        ((chosen, _),), _ = numbers([row], tokenizer)
        marked = [value for _, value in chosen]
        assert marked[0] == 1.0
        assert marked == sorted(marked, reverse=True)  # what the template writes behind it has none
        assert sum(value * len(piece) for piece, value in chosen) == pytest.approx(len(answer))


def test_files_keep_them_and_prompts_that_are_taken_off_move_them(tmp_path, tokenizer):
    rows = [PAIR | {"chosen_token_rewards": SPANS, "rejected_token_rewards": [0.5, 0.25], "chosen_token_weights": None}]
    for suffix in ("jsonl", "parquet"):
        path = tmp_path / f"pairs.{suffix}"
        save_pairs(table_of(rows, "rows"), path)
        again, _ = load_pairs(path)
        assert again.to_list() == table_of(rows, "rows").to_list()
    whole = {"prompt": "It was", "chosen": "It was fine.", "rejected": "It was dull."}
    whole |= {"chosen_token_rewards": [{"start": 0, "end": 6, "value": 9.0}, {"start": 7, "end": 11, "value": 1.0}]}
    (tmp_path / "whole.jsonl").write_text(json.dumps(whole) + "\n")
    table, _ = load_pairs(tmp_path / "whole.jsonl")
    assert table[0]["chosen_token_rewards"] == [{"start": 1, "end": 5, "value": 1.0}]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ({"start": 0, "end": 2, "value": 1.0}, "is not a list but"),
        ([0.1, "high"], "item 1 has no finite number but 'high'"),
        ([0.1, float("nan")], "item 1 has no finite number but nan"),
        ([True], "item 0 has no finite number but True"),
        (
            [{"start": 0, "end": 3, "value": 1.0}, {"start": 2, "end": 4, "value": 1.0}],
            "item 1 goes from 2 to 4, not in whole numbers from 3 on",
        ),
        ([{"start": 3, "end": 2, "value": 1.0}], "item 0 goes from 3 to 2"),
        ([{"start": -1, "end": 2, "value": 1.0}], "item 0 goes from -1 to 2"),
        ([0.1, {"start": 0, "end": 3, "value": 1.0}], "item 1 is a span and the first is not"),
        ([{"start": 0.0, "end": 2.0, "value": 1.0}], "item 0 goes from 0.0 to 2.0, not in whole numbers from 0 on"),
        ([{"end": 2, "value": 1.0}], "item 0 has a value and no start: {'end': 2, 'value': 1.0}"),
        ([{"begin": 0, "end": 2, "value": 1.0}], "item 0 has a value and no start"),
        ([10**400], "item 0 has no finite number but 1000"),
        ([1e39], "item 0 has no finite number but 1e+39 (float32 is read)"),
        (0, "is not a list but 0"),
        (False, "is not a list but False"),
        ("[1, 2", "is not valid JSON"),
    ],
)
def test_cells_that_are_none_are_named(cell, words):
    with pytest.raises(BadRowsError) as caught:
        table_of([PAIR | {"chosen_token_rewards": cell}], "rows")
    assert f"row 0, column 'chosen_token_rewards': {words}" in str(caught.value)


def test_a_span_behind_the_response_is_named(tokenizer):
    with pytest.raises(
        BadRowsError, match=r"span that ends at 99, behind the 5 characters.*\n.*leave their cells empty"
    ):
        numbers([PAIR | {"rejected_token_rewards": [{"start": 0, "end": 99, "value": 1.0}]}], tokenizer)


def test_means_are_those_of_all_spans_and_take_no_time_of_long_responses():
    draw = random.Random(0)
    for _ in range(200):
        length, spans, at = draw.randint(1, 40), [], 0
        while (start := at + draw.randint(0, 3)) < length:
            at = min(length, start + draw.randint(1, 5))
            spans.append({"start": start, "end": at, "value": draw.random()})
        characters = [next((s["value"] for s in spans if s["start"] <= i < s["end"]), 0.5) for i in range(length)]
        ends = sorted(draw.sample(range(1, length + 1), draw.randint(1, length)))
        expected = [sum(characters[a:b]) / (b - a) for a, b in itertools.pairwise([0, *ends])]
        assert by_token(spans, ends, default=0.5, length=length, cut=False) == pytest.approx(expected)
    many = [{"start": i, "end": i + 1, "value": 1.0} for i in range(20_000)]
    began = time.process_time()
    by_token(many, range(1, 20_001), default=0.0, length=20_000, cut=False)
    assert time.process_time() - began < 5  # of every span for every token it were minutes


def test_the_token_that_ends_a_text_has_no_characters():
    assert by_token(END, [3, len(SAID), len(SAID)], default=0.0, length=len(SAID), cut=False) == [0.0, 0.0, 5.0]
