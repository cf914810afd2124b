"""data.py: a pair is its text as tokens, every bad row is named, and batches hold what was put into them."""

from __future__ import annotations

import copy
import itertools
import json
from functools import partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tpo_lib import data
from tpo_lib.data import EncodedPair
from tpo_lib.files import tokens
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.pairs import pairs_table
from tpo_lib.stats import token_stats

EOS = "<|end|>"
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GOOD = {"prompt": "The film", "chosen": " was good", "rejected": " was bad"}


def tiny_tokenizer(*, bos: bool = True, trailing_eos: bool = False, chat_template: str | None = None):
    """One token a byte; token 0 is BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({EOS: 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens([EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos or trailing_eos:
        template = f"{EOS} $A" * bos + f"$A {EOS}" * (not bos)
        template = f"{EOS} $A {EOS}" if bos and trailing_eos else template
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(EOS, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(role, content):
    return {"role": role, "content": content}


MESSAGES = {"prompt": [said("user", "Hi")], "chosen": [said("assistant", "A")], "rejected": [said("assistant", "B")]}


# ---- encoding


def table_of(*rows):
    return pairs_table(list(rows))


def test_prompt_gets_bos_and_complete_responses_get_one_eos(tokenizer):
    rows = [
        GOOD | {"chosen_complete": True, "rejected_complete": False},
        {"prompt": "p", "chosen": f"a{EOS}", "rejected": "b", "chosen_complete": True, "rejected_complete": True},
    ]
    pairs, report = data.encode_pairs(table_of(*rows), tokenizer, max_length=64)
    assert tokenizer.decode(pairs[0].prompt_ids) == f"{EOS}The film"
    assert tokenizer.decode(pairs[0].chosen_ids) == f" was good{EOS}"
    assert tokenizer.decode(pairs[0].rejected_ids) == " was bad"
    assert tokenizer.decode(pairs[1].chosen_ids) == f"a{EOS}"
    assert str(report) == "2 pairs kept, 0 responses cut to max_length, 0 rows skipped"


def test_without_flags_every_response_is_complete(tokenizer):
    (pair,), _ = data.encode_pairs(table_of(GOOD), tokenizer, max_length=64)
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("bos", [False, True])
def test_a_tokenizer_that_ends_texts_does_not_end_the_prompt(bos):
    tokenizer = tiny_tokenizer(bos=bos, trailing_eos=True)
    (pair,), _ = data.encode_pairs(table_of(GOOD), tokenizer, max_length=64)
    assert tokenizer.decode(pair.prompt_ids) == EOS * bos + "The film"
    assert pair.chosen_ids.count(0) == 1


@pytest.mark.parametrize("plain", [(), (0,)])
def test_of_a_book_a_page_is_tokenized_also_where_it_holds_special_text(plain):
    tokenizer, read = tiny.tokenizer_of("llama2"), []

    def spy(text, **settings):
        read.append(len(text if isinstance(text, str) else text[0]))
        return tokenizer(text, **settings)

    text = "</s> " + "good film " * 1000
    (ids,) = tokens.token_ids(spy, [text], lead=[], most=8, plain=plain)
    whole = tokenizer(text, add_special_tokens=False, split_special_tokens=bool(plain))["input_ids"]
    assert ids[:8] == whole[:8]
    assert max(read) < 1000 < len(text)


@pytest.mark.parametrize("swap", [False, True])
def test_long_responses_are_cut_at_the_end_and_counted(tokenizer, swap):
    long, short = ("rejected", "chosen") if swap else ("chosen", "rejected")
    row = {"prompt": "The film", long: " was good", short: " was bad"}
    (pair,), report = data.encode_pairs(table_of(row), tokenizer, max_length=18)  # 9 prompt tokens; 10 and 9 with EOS
    assert tokenizer.decode(getattr(pair, f"{long}_ids")) == " was good"
    assert tokenizer.decode(getattr(pair, f"{short}_ids")) == f" was bad{EOS}"
    assert report.truncated == 1


@pytest.mark.parametrize(
    ("row", "max_length", "column", "problem", "fix"),
    [
        (
            GOOD | {"prompt": "x" * 20},
            21,
            "prompt",
            "takes 21 tokens, which leaves a response no room",
            "raise max_length above 21",
        ),
        (GOOD | {"chosen": EOS}, 64, "chosen", "tokenizes to nothing", "write a response"),
        (GOOD, 12, "rejected", "has the same first 3 tokens as chosen", "raise max_length"),
        (GOOD | {"rejected": " was good" + EOS}, 64, "rejected", "has the same tokens as chosen", "remove the row"),
    ],
)
def test_rows_that_cannot_be_encoded_are_named(tokenizer, row, max_length, column, problem, fix):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(BadRowsError, match=f"row 1, column '{column}': {problem}"):
        data.encode_pairs(table_of(good, row), tokenizer, max_length=max_length)
    pairs, report = data.encode_pairs(table_of(good, row, good), tokenizer, max_length=max_length, on_bad_rows="skip")
    assert [pair.row for pair in pairs] == [0, 2]
    (bad,) = report.skipped
    assert (bad.row, bad.column) == (1, column)
    assert problem in bad.problem
    assert fix in bad.fix
    assert "1 rows skipped (the first: row 1" in str(report)


def test_a_prompt_of_exactly_max_length_minus_one_leaves_room(tokenizer):
    (pair,), _ = data.encode_pairs(table_of({"prompt": "xx", "chosen": "a", "rejected": "b"}), tokenizer, max_length=4)
    assert len(pair.chosen_ids) == 1


def test_an_empty_prompt_needs_a_bos():
    row = GOOD | {"prompt": ""}
    (pair,), _ = data.encode_pairs(table_of(row), tiny_tokenizer(), max_length=64)
    assert pair.prompt_ids == [0]
    with pytest.raises(BadRowsError, match="row 0, column 'prompt': has no tokens"):
        data.encode_pairs(table_of(row), tiny_tokenizer(bos=False), max_length=64)


def test_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        data.encode_pairs(table_of(GOOD), tokenizer, max_length=64)


def test_messages_go_through_the_chat_template_with_one_eos():
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    row = MESSAGES | {"chosen_complete": True, "rejected_complete": False}
    (pair,), _ = data.encode_pairs(table_of(row), tokenizer, max_length=64)
    assert tokenizer.decode(pair.prompt_ids) == f"<user>Hi{EOS}\n<assistant>"  # no second BOS from the tokenizer
    assert tokenizer.decode(pair.chosen_ids) == f"A{EOS}"
    assert tokenizer.decode(pair.rejected_ids) == "B"


def test_messages_without_a_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no chat template; use an instruction-tuned"):
        data.encode_pairs(table_of(MESSAGES), tokenizer, max_length=64)


def test_messages_the_template_refuses_are_bad_rows():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('start with user') }}{% endif %}" + CHATML
    rows = [MESSAGES, MESSAGES | {"prompt": [said("system", "x")]}]
    tokenizer = tiny_tokenizer(chat_template=strict)
    pairs, report = data.encode_pairs(table_of(*rows), tokenizer, max_length=64, on_bad_rows="skip")
    assert [pair.row for pair in pairs] == [0]
    (bad,) = report.skipped
    assert (bad.row, bad.column) == (1, "prompt")
    assert "start with user" in bad.problem
    assert "repair the roles" in bad.fix


def test_a_template_that_rewrites_the_prompt_is_reported():
    rewriting = "{{ messages | length }}" + CHATML
    with pytest.raises(BadRowsError, match="column 'chosen': the chat template writes the prompt differently"):
        data.encode_pairs(table_of(MESSAGES), tiny_tokenizer(chat_template=rewriting), max_length=64)


# ---- tokenizers of every form

SPLITS = [
    ("a good film", " with a fine plot", " and fun"),  # the boundary is a token's
    ("a good film: ", "fine", "bad"),  # as after a chat template that ends in a space
    ("a good film: ", "fine", " with two spaces"),
    ("a go", "od film", "odd plot"),  # within a word
    ("the plot is ", "fine", "p"),
]


@pytest.mark.parametrize("form", tiny.FORMS)
@pytest.mark.parametrize(("prompt", "chosen", "rejected"), SPLITS)
def test_a_pair_is_its_text_tokenized_as_one(form, prompt, chosen, rejected):
    tokenizer = tiny.tokenizer_of(form)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    (pair,), report = data.encode_pairs(table_of(row), tokenizer, max_length=64)
    alone = tokenizer(prompt)["input_ids"]
    for text, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        assert pair.prompt_ids + ids == [*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id]
        if form != "wordpiece":  # keeps no spaces
            assert tokenizer.decode(pair.prompt_ids + ids[:-1], skip_special_tokens=True).lstrip() == prompt + text
    assert pair.prompt_ids == alone[: len(pair.prompt_ids)]
    assert report.straddling == (pair.prompt_ids != alone)
    assert ("1 rows where a token straddles" in str(report)) == (pair.prompt_ids != alone)


def test_a_token_that_straddles_the_boundary_counts_as_the_responses():
    tokenizer = tiny.tokenizer_of("byte")
    row = {"prompt": "a good film: ", "chosen": "fine", "rejected": "bad"}
    (pair,), _ = data.encode_pairs(table_of(row), tokenizer, max_length=64)
    assert tokenizer.convert_ids_to_tokens(pair.prompt_ids) == ["<s>", "a", "Ġgood", "Ġfilm", ":"]
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids) == ["Ġfine", "</s>"]
    batch = data.collate([pair], tokenizer.pad_token_id)
    model = tiny.llama(vocab=len(tokenizer))
    stats = token_stats(model(batch.input_ids).logits, batch.labels, model(batch.input_ids).logits)
    for response, logps in zip(("fine", "bad"), stats.logps.sum(-1), strict=True):
        ids = torch.tensor([[*tokenizer(f"a good film: {response}")["input_ids"], tokenizer.eos_token_id]])
        given = model(ids).logits[0].log_softmax(-1)
        by_hand = sum(given[t - 1, ids[0, t]] for t in range(5, ids.shape[1]))  # all that follows "film:"
        torch.testing.assert_close(logps, by_hand)


def test_a_boundary_within_the_only_token_of_a_prompt_is_a_bad_row():
    tokenizer = tiny_tokenizer(bos=False)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.model = models.BPE(tokenizer.get_vocab() | {"ab": 400}, [("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    with pytest.raises(BadRowsError, match="row 0, column 'prompt': has no tokens of its own"):
        data.encode_pairs(table_of({"prompt": "a", "chosen": "b", "rejected": "c"}), tokenizer, max_length=8)


@pytest.mark.parametrize("form", tiny.FORMS)
def test_a_template_that_ends_in_a_space_inserts_none(form):
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}: {% endif %}{% endfor %}"
    tokenizer = copy.deepcopy(tiny.tokenizer_of(form))
    tokenizer.chat_template = template
    row = {"prompt": [said("user", "a film")]} | {s: [said("assistant", s)] for s in ("chosen", "rejected")}
    (pair,), _ = data.encode_pairs(table_of(row), tokenizer, max_length=64)
    joint = tokenizer("a film: chosen", add_special_tokens=False)["input_ids"]
    assert pair.prompt_ids + pair.chosen_ids == [*joint, tokenizer.eos_token_id]


@pytest.mark.parametrize("form", tiny.FORMS)
def test_a_prompt_that_begins_with_bos_gets_no_second_one(form):
    tokenizer = tiny.tokenizer_of(form)
    row = {"prompt": "<s>a good film", "chosen": " fine", "rejected": " bad"}
    (pair,), _ = data.encode_pairs(table_of(row), tokenizer, max_length=64)
    assert pair.prompt_ids == tokens.prompt_token_ids(tokenizer, [row["prompt"]])[0]
    assert pair.prompt_ids == tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    assert pair.prompt_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("form", tiny.FORMS)
def test_special_tokens_in_a_response_are_text_unless_the_prompt_has_some(form):
    tokenizer, end = tiny.tokenizer_of(form), tiny.SPECIAL.index("</s>")
    rows = [{"prompt": p, "chosen": " fun</s>fine", "rejected": " bad"} for p in ("good", "<s>good", "good <unk>")]
    pairs, report = data.encode_pairs(table_of(*rows), tokenizer, max_length=64)
    plain = form != "unigram"  # whose model reads "</s>" as a word of its own
    assert [pair.chosen_ids.count(end) for pair in pairs] == [1 if plain else 2, 2, 2]
    assert pairs[0].prompt_ids == tokenizer("good")["input_ids"]
    if form not in ("wordpiece", "unigram"):  # the one keeps no spaces, the other puts one behind a special token
        assert tokenizer.decode(pairs[0].prompt_ids[1:] + pairs[0].chosen_ids).lstrip() == "good fun</s>fine</s>"
    assert all(pair.prompt_ids[0] == tokenizer.bos_token_id != pair.prompt_ids[1] for pair in pairs)
    assert report.special == 3
    assert "3 rows that hold the text of a special token in a response" in str(report)


def test_special_tokens_of_a_template_are_not_counted_those_of_a_message_are():
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    turns = [said("assistant", "A"), said("user", "more"), said("assistant", "B")]
    spoken = [said("assistant", f"A{EOS}B")]
    rows = [MESSAGES | {"chosen": turns}, MESSAGES | {"chosen": spoken}]
    pairs, report = data.encode_pairs(table_of(*rows), tokenizer, max_length=128)
    assert [pair.chosen_ids.count(0) for pair in pairs] == [3, 2]
    assert report.special == 1


@pytest.mark.parametrize("ends", ["", EOS, EOS + EOS, f" {EOS}\n{EOS}\n\n"])
def test_however_many_eos_end_a_response_it_gets_one(tokenizer, ends):
    row = GOOD | {"chosen": GOOD["chosen"] + ends}
    (pair,), report = data.encode_pairs(table_of(row), tokenizer, max_length=64)
    assert tokenizer.decode(pair.chosen_ids) == " was good" + " " * ends.startswith(" ") + EOS
    assert report.repeated_eos == (ends.count(EOS) > 1)
    assert ("1 rows with several EOS" in str(report)) == (ends.count(EOS) > 1)


def test_a_table_without_rejected_sides_is_encoded_for_sft(tokenizer):
    (pair,), report = data.encode_pairs(table_of(GOOD).remove_columns("rejected"), tokenizer, max_length=14)
    assert (tokenizer.decode(pair.prompt_ids), tokenizer.decode(pair.chosen_ids)) == (f"{EOS}The film", " was ")
    assert pair.rejected_ids == []
    assert report.truncated == 1


def test_of_a_book_a_page_is_tokenized(monkeypatch):
    tokenizer, read = tiny.tokenizer_of("byte"), []
    row = {"prompt": "the plot", "chosen": " is bad" * 100_000, "rejected": " is fine" * 100_000}
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda t, x, **k: (read.append(len(str(x))), call(t, x, **k))[1])
    (pair,), report = data.encode_pairs(table_of(row), tokenizer, max_length=16)
    assert max(read) < 1000
    assert pair.chosen_ids == tokenizer(" is bad" * 20)["input_ids"][1 : 17 - len(pair.prompt_ids)]
    assert report.truncated == 2
    with pytest.raises(BadRowsError, match=r"'prompt': takes \d+ tokens or more, which leaves a response no room"):
        data.encode_pairs(table_of(row | {"prompt": "the plot" * 100_000}), tokenizer, max_length=16)


def test_what_follows_many_spaces_is_read():
    tokenizer = tiny.tokenizer_of("wordpiece")
    row = {"prompt": "the plot", "chosen": " " * 5000 + "is bad", "rejected": " is fine"}
    (pair,), _ = data.encode_pairs(table_of(row), tokenizer, max_length=16)
    assert tokenizer.decode(pair.chosen_ids) == "is bad </s>"


# ---- batching

IDS = st.lists(st.integers(1, 50), min_size=1, max_size=7)
PAIRS = st.lists(st.builds(EncodedPair, st.integers(0, 99), IDS, IDS, IDS), min_size=1, max_size=5)


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_collate_holds_every_token_once_and_labels_responses_only(pairs):
    batch = data.collate(pairs, pad_token_id=0)
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    longest = max(len(prompt + response) for prompt, response in sequences)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (2 * len(pairs), longest)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == torch.int64
    for i, (prompt, response) in enumerate(sequences):
        rest = longest - len(prompt) - len(response)
        assert batch.input_ids[i].tolist() == prompt + response + [0] * rest
        assert batch.labels[i].tolist() == [-100] * len(prompt) + response + [-100] * rest
        assert batch.attention_mask[i].tolist() == [1] * (longest - rest) + [0] * rest
    assert batch.rows.tolist() == [pair.row for pair in pairs]
    used = sum(len(prompt + response) for prompt, response in sequences)
    assert data.padding(batch) == (longest * len(sequences) - used, longest * len(sequences))


@given(PAIRS, st.integers(28, 200))
@settings(max_examples=60, deadline=None)
def test_a_token_budget_holds_every_pair_once_and_is_kept(pairs, budget):
    batches = data.token_budget(pairs, budget)
    rows = [id(pair) for batch in batches for pair in batch]
    assert sorted(rows) == sorted(map(id, pairs))
    taken = [data.collate(batch, 0).input_ids.numel() for batch in batches]
    assert max(taken) <= budget
    for batch, following in itertools.pairwise(batches):  # none could have taken one pair more
        assert 2 * following[0].length * (len(batch) + 1) > budget


def test_a_pair_larger_than_the_token_budget_is_named():
    with pytest.raises(ValueError, match="row 7 takes 24 tokens, more than max_tokens 23"):
        data.token_budget([EncodedPair(7, [1], [2] * 11, [3])], 23)


def test_a_batch_without_rejected_sides_has_one_sequence_a_row():
    bare = [EncodedPair(4, [1], [2, 3]), EncodedPair(5, [1, 7], [2])]
    batch = data.collate(bare, 0)
    assert not batch.paired
    assert batch.labels.tolist() == [[-100, 2, 3], [-100, -100, 2]]
    assert [len(chunk) for chunk in data.token_budget(bare, 6)] == [2]
    with pytest.raises(ValueError, match="1 of 2 pairs have no rejected side; batch them apart"):
        data.collate([bare[0], EncodedPair(5, [1], [2], [3])], 0)


def test_collate_refuses_no_pairs():
    with pytest.raises(ValueError, match="at least one pair"):
        data.collate([], pad_token_id=0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_batches_are_full_and_hold_each_row_at_most_once(lengths, batch_size, seed, epoch):
    if len(lengths) < batch_size:
        with pytest.raises(ValueError, match=f"{len(lengths)} pairs do not fill one batch of {batch_size}; lower"):
            data.bucketed_batches(lengths, batch_size, seed=seed, epoch=epoch)
        return
    batches = data.bucketed_batches(lengths, batch_size, seed=seed, epoch=epoch)
    rows = [row for batch in batches for row in batch]
    assert all(len(batch) == batch_size for batch in batches)
    assert len(set(rows)) == len(rows) == len(lengths) - len(lengths) % batch_size
    assert set(rows) <= set(range(len(lengths)))
    assert batches == data.bucketed_batches(lengths, batch_size, seed=seed, epoch=epoch)


def test_batches_differ_between_epochs_and_seeds():
    orders = [data.bucketed_batches(range(64), 8, seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_rows_left_out_change_with_the_epoch_and_are_not_the_longest():
    lengths = list(range(1, 18))  # 17 rows, batches of 8: one is left out
    left_out = {
        (set(range(17)) - {row for batch in data.bucketed_batches(lengths, 8, seed=0, epoch=e) for row in batch}).pop()
        for e in range(60)
    }
    assert len(left_out) > 10


@pytest.mark.parametrize("batch_size", [1, 8, 12, 32])
def test_the_rows_of_a_prompt_stay_together(batch_size):
    draw = torch.Generator().manual_seed(0)
    prompts = [p for p in range(60) for _ in range(int(torch.randint(1, 7, (1,), generator=draw)))]
    lengths = torch.randint(5, 100, (len(prompts),), generator=draw).tolist()
    made = partial(data.bucketed_batches, lengths, batch_size, seed=1, prompts=prompts)
    batches = made(epoch=0)
    rows = [row for batch in batches for row in batch]
    assert all(len(batch) == batch_size for batch in batches)
    assert len(set(rows)) == len(rows) == len(lengths) // batch_size * batch_size
    apart = [len({prompts[row] for row in batch}) for batch in batches]
    # a batch begins within a prompt that another has begun, at most: the pieces are as few as cuts and prompts
    assert sum(apart) <= len(set(prompts)) + len(batches)
    for batch in batches:  # and within a batch, they are neighbours
        seen = [prompts[row] for row in batch]
        assert seen == sorted(seen, key=seen.index)
    assert batches == made(epoch=0)
    assert batches != made(epoch=1)


def test_bucketing_saves_padding():
    lengths = torch.randint(5, 100, (800,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(batches):
        return sum(
            max(lengths[row] for row in batch) * len(batch) - sum(lengths[row] for row in batch) for batch in batches
        )

    plain = [list(range(i, i + 8)) for i in range(0, 800, 8)]
    assert padding(data.bucketed_batches(lengths, 8, seed=0, epoch=0)) < 0.2 * padding(plain)
