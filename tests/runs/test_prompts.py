"""prompts.py: held-out prompts are none that training has seen, and every source says what it is."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch

from tpo_lib.files.tokens import prompt_token_ids
from tpo_lib.runs import prompts, stage
from tpo_lib.runs.prompts import sample_prompts


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    return tiny.llama(vocab=300), tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def overlapping(texts, seen) -> int:
    return sum(any(a.startswith(b) or b.startswith(a) for b in seen) for a in texts)


def test_a_stream_is_its_own():
    seeds = [prompts.stream(seed, tag) for seed in range(50) for tag in ("a", "b")]
    assert len(set(seeds)) == 100
    assert min(abs(a - b) for i, a in enumerate(seeds) for b in seeds[:i]) > 1000  # not seed + 1
    assert prompts.stream(3, "a") == prompts.stream(3, "a")


def test_the_same_seed_samples_other_prompts_held_out(model_and_tokenizer):
    train = prompts.training_prompts("model", 60, *model_and_tokenizer, seed=0)
    held_out = prompts.held_out_prompts("model", 60, *model_and_tokenizer, seed=0)
    assert len(set(train.texts) & set(held_out.texts)) < 6
    assert held_out.shared is None
    assert "not compared with training prompts" in held_out.words
    assert held_out.texts == prompts.held_out_prompts("model", 60, *model_and_tokenizer, seed=0).texts


def test_held_out_prompts_that_training_has_seen_are_drawn_anew(model_and_tokenizer):
    plain = prompts.held_out_prompts("model", 60, *model_and_tokenizer, seed=0).texts
    seen = [plain[0], plain[1] + " and more", plain[2][:2], "nothing of the kind"]
    found = prompts.held_out_prompts("model", 60, *model_and_tokenizer, seed=0, seen=seen)
    assert overlapping(plain, seen) >= 3
    assert overlapping(found.texts, seen) == found.shared == 0
    assert len(set(found.texts)) == 60
    assert set(plain) - set(found.texts) >= set(plain[:3])
    assert int(re.search(r"0 of them seen in training \((\d+) others were drawn anew", found.words)[1]) >= 3


def test_held_out_prompts_that_cannot_be_had_are_refused(model_and_tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "sample_prompts", lambda *_, **__: ["the film", "the plot"])
    with pytest.raises(ValueError, match="only 1 of 2 held-out prompts were found that training has not seen"):
        prompts.held_out_prompts("model", 2, *model_and_tokenizer, seed=0, seen=["the film is"])


def test_imdb_prompts_are_held_out_from_the_test_reviews(model_and_tokenizer, monkeypatch):
    reviews = {s: {"text": [f"{s} number {i} of the films that I saw" for i in range(40)]} for s in ("train", "test")}
    monkeypatch.setattr("tpo_lib.runs.prompts.load_imdb", lambda source: reviews)
    train = prompts.training_prompts("imdb", 4, *model_and_tokenizer, seed=0)
    held_out = prompts.held_out_prompts("imdb", 4, *model_and_tokenizer, seed=0)
    assert all(any(text.startswith(prompt) for text in reviews["train"]["text"]) for prompt in train.texts)
    assert all(any(text.startswith(prompt) for text in reviews["test"]["text"]) for prompt in held_out.texts)
    assert "IMDb's test reviews" in held_out.words


def test_a_file_is_read_a_prompt_a_line(tmp_path, model_and_tokenizer):
    (tmp_path / "p.txt").write_bytes("\ufeffthe film\r\n\n the plot \nthe film\nein Stück\u2028\n".encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "x": 1}\n\n{"prompt": "c"}\n')
    assert prompts.read_prompts(tmp_path / "p.txt")[0] == ["the film", " the plot ", "ein Stück\u2028"]
    assert "1 repeated ones left out" in prompts.read_prompts(tmp_path / "p.txt")[1]
    assert prompts.read_prompts(tmp_path / "p.jsonl")[0] == ["a\nb", "c"]
    chosen = prompts.training_prompts(str(tmp_path / "p.txt"), None, *model_and_tokenizer, seed=0)
    assert chosen.texts == ["the film", " the plot ", "ein Stück\u2028"]
    assert prompts.training_prompts(str(tmp_path / "p.txt"), 2, *model_and_tokenizer, seed=0).texts == chosen.texts[:2]
    with pytest.raises(ValueError, match=r"--num-prompts 4: .*p\.txt has 3 distinct prompts"):
        prompts.training_prompts(str(tmp_path / "p.txt"), 4, *model_and_tokenizer, seed=0)


def test_the_overlap_of_a_file_is_counted(tmp_path, model_and_tokenizer):
    (tmp_path / "p.txt").write_text("the film\nthe plot is\nnobody\n")
    held_out = prompts.held_out_prompts(
        str(tmp_path / "p.txt"), None, *model_and_tokenizer, seed=0, seen=["the film", "the plot"]
    )
    assert len(held_out.texts) == 3
    assert held_out.shared == 2
    assert "2 of them seen in training" in held_out.words


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "has no prompts; write one a line"),
        ("p.txt", b"caf\xe9\n", "is not UTF-8 text"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'line 2 has no text under "prompt"'),
        ("p.jsonl", b'{"prompt": [{"role": "user"}]}\n', 'line 1 has no text under "prompt"'),
        ("p.jsonl", b"the film\n", "line 1 is not JSON"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(tmp_path / name)


def test_a_misspelt_source_is_named():
    with pytest.raises(OSError, match="--prompts imbd: neither `model`, nor `imdb`, nor a file"):
        prompts.read_prompts("imbd")


def test_a_model_that_does_not_begin_texts_is_said(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    assert "may be no beginnings" not in prompts.training_prompts("model", 2, model, tokenizer, seed=0).words
    bos, tokenizer.bos_token = tokenizer.bos_token, None
    try:
        words = prompts.training_prompts("model", 2, model, tokenizer, seed=0).words
        assert "its tokenizer has no BOS, so they begin after '<|endoftext|>'" in words
    finally:
        tokenizer.bos_token = bos
    tokenizer.chat_template = "{{ messages }}"
    try:
        assert "it is a chat model" in prompts.training_prompts("model", 2, model, tokenizer, seed=0).words
    finally:
        tokenizer.chat_template = None


def test_recorded_prompts_come_back_as_text(model_and_tokenizer):
    class Record:
        def prompts(self):
            return prompt_token_ids(model_and_tokenizer[1], ["a good film", "the plot"])

    assert prompts.recorded_prompts(Record(), model_and_tokenizer[1]) == ["a good film", "the plot"]
    assert prompts.recorded_prompts(None, model_and_tokenizer[1]) is None


def test_texts_of_two_roots_share_nothing_and_texts_of_one_are_joined_by_what_they_share():
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab", k=draw.randint(1, 6))) for _ in range(60)]
    roots = dict(zip(texts, prompts.prompt_roots(texts), strict=True))
    joined = {text: {text} for text in texts}
    for a in texts:
        for b in texts:
            if prompts.shared_prompts([a], [b]) and joined[a] is not joined[b]:
                joined[a] |= joined[b]
                joined.update(dict.fromkeys(joined[b], joined[a]))
    assert 2 < len({id(group) for group in joined.values()}) < len(joined)
    for a in texts:
        assert {b for b in texts if roots[b] == roots[a]} == joined[a]


def test_a_stage_trains_on_the_prompts_it_always_did_and_reports_on_none_it_has_seen(small_stage):
    config = replace(small_stage.config, train_prompts=150, held_out_prompts=50)
    drawn = sample_prompts(small_stage.start, small_stage.tokenizer, 200, seed=config.seed + 1)
    train, held_out = stage.stage_prompts(config, small_stage.start, small_stage.tokenizer, None)
    assert train == drawn[:150]
    assert overlapping(drawn[150:], train) > 5  # as the next ones of the same list would have been
    assert overlapping(held_out, train) == 0
    assert len(set(held_out)) == 50
    assert small_stage.seen_prompts == 0 < len(small_stage.held_out_pairs)
    of_pairs = small_stage.tokenizer.batch_decode(
        [pair.prompt_ids for pair in small_stage.held_out_pairs], skip_special_tokens=True
    )
    assert set(of_pairs) <= set(small_stage.held_out_prompts)


def test_of_one_list_the_held_out_part_leaves_out_what_training_has_seen(capsys):
    texts = ["the film", "a plot", "the film is", "I saw", "a", "a pl", "we sat", "I saw", "he ran"]
    config = stage.StageConfig(**stage.OWN | {"model": "m", "train_prompts": 2, "held_out_prompts": 3})
    assert stage.stage_prompts(config, None, None, texts) == (texts[:2], ["I saw", "a", "we sat"])
    assert (
        "2 of the 6 prompts behind the first 2 begin or continue one of these, and are left out"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"there are 8 distinct prompts, 2 [+] 5 are needed, and 2 of the 6 .* fewer"):
        stage.stage_prompts(replace(config, held_out_prompts=5), None, None, texts)


def test_a_tenth_of_the_pairs_is_held_out_with_its_prompts():
    """A prompt's pairs, and those of prompts that continue it, stay on one side: text, and conversations."""
    sides = {"chosen": "good", "rejected": "bad"}
    text = [{"prompt": f"{prompt} {i}", **sides} for i in range(100, 120) for prompt in ("film", "film", "plot")]
    text += [row | {"prompt": row["prompt"] + " is"} for row in text]
    talk = [[{"role": "user", "content": row["prompt"]}] for row in text[:60]]
    talk += [[*first, {"role": "assistant", "content": "so"}, {"role": "user", "content": "?"}] for first in talk]
    said = {side: [{"role": "assistant", "content": words}] for side, words in sides.items()}
    for rows in (text, [{"prompt": prompt, **said} for prompt in talk]):
        config = stage.StageConfig(**stage.OWN | {"model": "m"})
        train, held_out = stage.given_pairs(config, {"pairs": rows})
        keys = [
            [str(prompt).partition(" is")[0].partition("}")[0] for prompt in t["prompt"]] for t in (train, held_out)
        ]
        assert not set(keys[0]) & set(keys[1])
        assert len(train) + len(held_out) == 120
        assert 12 <= len(held_out) < 16
    one = [{"prompt": "the film", **sides}] * 40
    with pytest.raises(
        ValueError, match="the table has 40 pairs of 1 prompts that do not begin each other, too few to hold"
    ):
        stage.given_pairs(config, {"pairs": one})


# ---- drawn from a model, cut from texts


@pytest.fixture
def letters():
    return tiny.letters()


@pytest.fixture
def letters_model():
    return tiny.llama(vocab=len(tiny.LETTERS))


def test_sampled_prompts_are_distinct_valid_and_of_every_length(letters_model, letters):
    drawn = prompts.sample_prompts(letters_model, letters, 70, min_tokens=2, max_tokens=5, seed=0)
    assert len(set(drawn)) == 70
    lengths = Counter(len(letters(prompt, add_special_tokens=False)["input_ids"]) for prompt in drawn)
    assert set(lengths) == {2, 3, 4, 5}
    assert min(lengths.values()) >= 8  # about 17 each
    assert all(prompt.strip() for prompt in drawn)


def test_prompts_come_in_random_order():
    found = dict.fromkeys("abcdefgh")
    drawn = prompts._shuffled(found, 8, random.Random(0))
    assert sorted(drawn) == list(found)
    assert drawn != list(found)


def test_prompt_texts_refuses_blanks_and_what_does_not_tokenize_back(letters):
    rows = [[3, 4], [1, 2], [9, 11], [12], [], [0, 3]]  # cd as c + d, a + b, blank, ab, ended early, begins with EOS
    assert prompts._prompt_texts(rows, letters) == [None, None, None, "ab", None, None]


def test_asking_for_more_prompts_than_there_are_says_so(letters_model, letters):
    with pytest.raises(ValueError, match=r"of 500 distinct prompts were found; ask for fewer, raise max_tokens"):
        prompts.sample_prompts(letters_model, letters, 500, min_tokens=1, max_tokens=1, seed=0)
    with pytest.raises(ValueError, match="only 1 of 3 distinct"):
        prompts.imdb_prompts(["abc"] * 5, letters, 3, min_tokens=2, max_tokens=2, seed=0)
    with pytest.raises(ValueError, match="min_tokens <= max_tokens, got 3, 5, 2"):
        prompts.imdb_prompts(["abc"], letters, 3, min_tokens=5, max_tokens=2, seed=0)


def test_imdb_prompts_are_beginnings_of_the_texts(letters):
    texts = ["".join(tiny.LETTERS[1 + (i * j) % 8] for j in range(1, 30)) for i in range(60)]
    drawn = prompts.imdb_prompts(texts, letters, 20, min_tokens=3, max_tokens=6, seed=0)
    assert len(set(drawn)) == 20
    assert all(any(text.startswith(prompt) for text in texts) for prompt in drawn)
    lengths = [len(ids) for ids in letters(drawn, add_special_tokens=False)["input_ids"]]
    assert set(lengths) == {3, 4, 5, 6}
    assert drawn == prompts.imdb_prompts(texts, letters, 20, min_tokens=3, max_tokens=6, seed=0)
    assert drawn != prompts.imdb_prompts(texts, letters, 20, min_tokens=3, max_tokens=6, seed=1)


def test_a_tokenizer_whose_texts_have_no_beginning_is_refused(letters_model, letters):
    letters.bos_token = letters.eos_token = None
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token, so a text has no beginning"):
        prompts.sample_prompts(letters_model, letters, 2, seed=0)


def test_a_beginning_that_the_model_has_no_embedding_for_is_named(letters_model, letters):
    letters.add_special_tokens({"bos_token": "<new>"})  # and the model was not resized
    with pytest.raises(ValueError, match=f"beginning of a text, column 0 holds token id {len(tiny.LETTERS)}"):
        prompts.sample_prompts(letters_model, letters, 3, seed=0)


def test_the_seed_decides_the_prompts_and_the_global_state_is_left_alone(letters_model, letters):
    before = torch.random.get_rng_state()
    drawn = prompts.sample_prompts(letters_model, letters, 20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert prompts.sample_prompts(letters_model, letters, 20, seed=1) == drawn


def test_a_prompt_of_many_pairs_does_not_take_the_place_of_a_tenth_and_bounds_hold():
    sides = {"chosen": "good", "rejected": "bad"}
    rows = [{"prompt": "film", **sides}] * 60 + [{"prompt": f"plot {i // 2}", **sides} for i in range(200, 261)]
    for tenth, bounds in ((12, {}), (4, {"max_held_out_pairs": 5, "max_pairs": 40}), (1, {"max_held_out_pairs": 1})):
        for seed in range(4):
            config = stage.StageConfig(**stage.OWN | {"model": "m", "seed": seed} | bounds)
            train, held_out = stage.given_pairs(config, {"pairs": rows})
            assert "film" not in held_out["prompt"]
            assert tenth <= len(held_out) <= min(tenth + 1, config.max_held_out_pairs)  # two of a prompt stay together
            assert len(train) <= config.max_pairs
            assert bounds or len(train) + len(held_out) == len(rows)
