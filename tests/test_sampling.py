"""sampling.py: samples follow the model's distribution, pairs follow the scores, and the cache never lies."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tpo_lib import pairing, sampling
from tpo_lib.data import encode_pairs
from tpo_lib.evaluation import evaluate, sequence_kl
from tpo_lib.files import store
from tpo_lib.files.pairs import load_pairs, save_pairs
from tpo_lib.files.tokens import prompt_token_ids
from tpo_lib.rewards import PROBE, AdditiveReward
from tpo_lib.runs.plots import score_gaps
from tpo_lib.runs.prompts import PAPER_RECIPE
from tpo_lib.sampling import Completion, Sampler

EOS, WORDS = tiny.EOS, tiny.LETTERS


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.letters()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return getattr(tiny, request.param)(vocab=len(WORDS))


@pytest.fixture
def llama():
    return tiny.llama(vocab=len(WORDS))


class CountReward:
    """The share of the letter a: a reward small enough to work out by hand."""

    name, scope, fingerprint = "count", "response", "count-1"

    def __init__(self, scope="response"):
        self.scope = scope
        self.read = []

    def __call__(self, texts):
        self.read += texts
        return torch.tensor([text.count("a") / max(len(text), 1) for text in texts])


# ---- drawing

PROMPTS = ["abc", "d", "abcdefgh", "e a", "h.", "ccccc"]


def next_probabilities(model, tokenizer, prompt):
    """What the model says without any padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].softmax(-1)


def test_sampling_in_bf16_reads_nearly_the_same_distribution(llama, tokenizer):
    """The most likely tokens stay the same where no two are close; outside of the call nothing is in bf16."""
    kinds = []
    handle = llama.lm_head.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    settings = {"max_new_tokens": 4, "temperature": 0.0, "seed": 0}
    try:
        whole, short = (
            sampling.generate(llama, tokenizer, ["a", "the film"], precision=p, **settings) for p in ("no", "bf16")
        )
    finally:
        handle.remove()
    assert set(kinds) == {torch.float32, torch.bfloat16}
    assert [c.token_ids[:1] for [c] in short] == [c.token_ids[:1] for [c] in whole]
    assert not torch.is_autocast_enabled("cpu")


def test_left_padded_batches_continue_as_single_prompts_do(model, tokenizer):
    together = sampling.generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0, seed=0)
    for prompt, completions in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(12):  # the plainest greedy loop: no padding, no cache
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == 0:
                break
        assert completions[0].token_ids == tuple(token for token in ids[start:] if token != 0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_model_whatever_the_padding(model, tokenizer, temperature):
    prompts = ["abcdefgh", "d"]  # the second one is padded by seven
    count = 4000
    drawn = sampling.generate(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=count,
        max_new_tokens=1,
        temperature=temperature,
        seed=0,
        batch_size=2 * count,
    )
    for prompt, completions in zip(prompts, drawn, strict=True):
        expected = (next_probabilities(model, tokenizer, prompt).log() / temperature).softmax(-1)
        firsts = Counter(0 if c.complete else c.token_ids[0] for c in completions)
        seen = torch.tensor([firsts[token] / count for token in range(len(WORDS))])
        error = ((expected * (1 - expected)) / count).sqrt()  # standard error of each share
        assert ((seen - expected).abs() <= 4 * error + 1e-9).all()


def test_top_p_draws_from_the_nucleus_only(llama, tokenizer):
    probabilities, order = next_probabilities(llama, tokenizer, "abc").sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    nucleus = {token for token, mass in zip(order.tolist(), before.tolist(), strict=True) if mass < 0.6}
    (drawn,) = sampling.generate(
        llama, tokenizer, ["abc"], samples_per_prompt=1000, max_new_tokens=1, top_p=0.6, seed=0, batch_size=1000
    )
    assert {0 if c.complete else c.token_ids[0] for c in drawn} == nucleus
    assert len(nucleus) < len(WORDS)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=8), st.integers(0, 100))
def test_a_token_without_probability_is_never_drawn(logits, seed):
    torch.manual_seed(seed)
    row = torch.tensor([-float("inf"), *logits, -float("inf")])
    tokens = Sampler(1).draw(row.expand(50, -1))
    assert tokens.min() >= 1
    assert tokens.max() <= len(logits)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 2)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch, uniform, token):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, device: torch.full(shape, uniform, dtype=dtype))
    impossible = -float("inf")
    assert Sampler(1).draw(torch.tensor([[impossible, 0.0, 0.0, impossible]])).tolist() == [token]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(broken, temperature):
    with pytest.raises(ValueError, match="logits are not finite"):
        Sampler(1, temperature)(None, torch.tensor([[0.0, broken]]))


def test_the_models_own_generation_settings_do_not_act_and_come_back(llama, tokenizer):
    plain = sampling.generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=3)
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, min_new_tokens=8, max_length=3, num_beams=2)
    llama.generation_config = own
    assert sampling.generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=3) == plain
    assert llama.generation_config is own


def test_dropout_is_off_while_sampling_and_the_mode_comes_back(tokenizer):
    model = tiny.gpt2(vocab=len(WORDS))
    plain = sampling.generate(model, tokenizer, PROMPTS, max_new_tokens=8, seed=3)
    model.train()
    assert sampling.generate(model, tokenizer, PROMPTS, max_new_tokens=8, seed=3) == plain
    assert model.training


def test_seed_decides_and_the_global_state_is_left_alone(llama, tokenizer):
    before = torch.random.get_rng_state()
    first = sampling.generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert sampling.generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=1) == first
    assert sampling.generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=2) != first


def test_completions_end_where_eos_stood(llama, tokenizer):
    drawn = sampling.generate(llama, tokenizer, PROMPTS, samples_per_prompt=50, max_new_tokens=10, seed=0)
    assert [len(several) for several in drawn] == [50] * len(PROMPTS)
    flat = [completion for several in drawn for completion in several]
    assert {completion.complete for completion in flat} == {False, True}
    for completion in flat:
        assert 0 not in completion.token_ids
        assert len(completion.token_ids) < 10 if completion.complete else len(completion.token_ids) == 10
        assert completion.text == tokenizer.decode(list(completion.token_ids))


def test_every_end_token_the_model_names_ends_a_completion(llama, tokenizer):
    llama.generation_config.eos_token_id = [0, 3]
    (drawn,) = sampling.generate(llama, tokenizer, ["abc"], samples_per_prompt=200, max_new_tokens=10, seed=0)
    assert all(3 not in completion.token_ids for completion in drawn)
    assert {completion.end for completion in drawn} == {0, 3, None}  # which of them it was is kept
    assert all(completion.steps == [*completion.token_ids, 3] for completion in drawn if completion.end == 3)
    assert all(len(completion.token_ids) == 10 for completion in drawn if not completion.complete)


def test_progress_counts_to_the_end(llama, tokenizer):
    calls = []
    sampling.generate(
        llama, tokenizer, PROMPTS, max_new_tokens=2, seed=0, batch_size=4, progress=lambda *call: calls.append(call)
    )
    assert calls == [(4, 6), (6, 6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"samples_per_prompt": 0}, "must be at least 1, got 0"),
        (
            {"max_new_tokens": 127},
            "prompt 1 has 3 tokens and 127 to be sampled, but the model has 128 positions; lower max_new_tokens",
        ),
    ],
)
def test_settings_out_of_range_are_named(llama, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        sampling.generate(llama, tokenizer, ["", "de"], **{"max_new_tokens": 4, "seed": 0, **settings})


def test_any_id_may_pad_and_an_unknown_one_is_named(model, tokenizer):
    plain = sampling.generate(model, tokenizer, PROMPTS, max_new_tokens=8, seed=3)
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<pad>"})  # and the model was not resized
    assert larger.pad_token_id == len(WORDS)
    assert sampling.generate(model, larger, PROMPTS, max_new_tokens=8, seed=3) == plain
    with pytest.raises(
        ValueError, match=f"prompt 1, column 2 holds token id {len(WORDS)}, but the model has the ids 0 to"
    ):
        sampling.generate(model, larger, ["a", "a<pad>"], samples_per_prompt=3, max_new_tokens=8, seed=3)


def test_a_prompt_without_tokens_is_named(llama, tokenizer):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=EOS
    )
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        sampling.generate(llama, bare, ["a", ""], max_new_tokens=4, seed=0)


# ---- scores and pairs


def test_scope_decides_what_a_reward_reads():
    for scope, read in [("response", ["a", "b", "", "aa"]), ("full", ["xa", "xb", "y", "yaa"])]:
        reward = CountReward(scope)
        scores = pairing.score(reward, ["x", "y"], [["a", "b"], ["", "aa"]])
        assert reward.read == read
        assert scores.shape == (2, 2)
    assert pairing.score(CountReward(), ["x"], [["a", "ab"]]).tolist() == [[1.0, 0.5]]


def test_scores_out_of_range_unknown_scopes_and_ragged_lists_are_refused():
    class Broken(CountReward):
        def __call__(self, texts):
            return torch.tensor([0.5, float("nan")])

    with pytest.raises(ValueError, match="gave text 1 of 2 the score nan"):
        pairing.score(Broken(), ["x"], [["a", "b"]])
    with pytest.raises(ValueError, match="has scope 'all'; it must be"):
        pairing.score(CountReward("all"), ["x"], [["a"]])
    with pytest.raises(ValueError, match=r"lists of completions of lengths \[1, 2\]"):
        pairing.score(CountReward(), ["x", "y"], [["a"], ["a", "b"]])


def said(*texts):
    return [Completion(text, (1,), end=None if i % 2 else 0) for i, text in enumerate(texts)]


def test_four_completions_give_the_papers_six_pairs():
    table, report = pairing.pairs_from_scores(["p"], [said("a", "b", "c", "d")], [[0.4, 0.1, 0.8, 0.3]])
    assert [(row["chosen"], row["rejected"]) for row in table] == [
        ("c", "a"), ("c", "d"), ("c", "b"), ("a", "d"), ("a", "b"), ("d", "b")
    ]  # fmt: skip
    assert table[0] == {
        "prompt": "p",
        "chosen": "c",
        "rejected": "a",
        "chosen_score": 0.8,
        "rejected_score": 0.4,
        "chosen_complete": True,
        "rejected_complete": True,
    }
    assert table[1]["rejected_complete"] is False
    assert (report.prompts, report.completions, report.kept) == (1, 4, 6)
    assert report.score_mean == pytest.approx(0.4)
    assert report.score_std == pytest.approx((0.26 / 4) ** 0.5)  # deviations 0, -.3, .4, -.1


def test_best_against_worst_gives_one_pair_a_prompt():
    completions = [said("a", "b", "c"), said("d", "e", "f"), said("only")]
    table, report = pairing.pairs_from_scores(
        ["p", "q", "r"], completions, [[0.4, 0.1, 0.8], [1, 0.2, 0.2], [0.5]], rule="best_worst"
    )
    assert [(row["chosen"], row["rejected"]) for row in table] == [("c", "b"), ("d", "f")]
    assert sum(report.dropped.values()) == 0


def test_dropped_pairs_are_counted_by_reason():
    table, report = pairing.pairs_from_scores(
        ["p", "q"],
        [said("a", "a", " ", "b"), said("c", "d", "e")],
        [[0.5, 0.5, 0.9, 0.1], [0.25, 0.5, 0.5]],
        min_gap=0.3,
    )
    # p: " " against three: empty; a-a identical; a-b twice (gap 0.4): kept. q: d-e equal, c-d and c-e: gap 0.25
    assert report.dropped == {"empty text": 3, "identical text": 1, "equal scores": 1, "gap below min_gap": 2}
    assert report.kept == len(table) == 2
    assert "dropped: 3 empty text, 1 identical text, 1 equal scores, 2 gap below min_gap" in str(report)


def test_a_gap_of_exactly_min_gap_is_kept():
    for min_gap, kept in [(0.25, 1), (0.26, 0)]:
        assert pairing.pairs_from_scores(["p"], [said("a", "b")], [[0.75, 0.5]], min_gap=min_gap)[1].kept == kept


@given(st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 4))
def test_every_candidate_pair_is_kept_or_counted(scores, min_gap):
    scores = [[value / 4 for value in row] for row in scores]
    completions = [said("a", "b", "c", "")] * len(scores)
    table, report = pairing.pairs_from_scores(["p"] * len(scores), completions, scores, min_gap=min_gap / 4)
    assert report.kept + sum(report.dropped.values()) == 6 * len(scores)
    assert sum(report.gap_counts) == report.kept == len(table)
    assert all(row["chosen_score"] - row["rejected_score"] >= max(min_gap / 4, 1e-9) for row in table)


def test_report_draws_the_histogram_as_text_and_figure():
    _, report = pairing.pairs_from_scores(["p"], [said("a", "b", "c")], [[0.0, 0.52, 1.0]])  # gaps .52, 1, .48
    assert [i for i, count in enumerate(report.gap_counts) if count] == [9, 10, 19]
    text = str(report)
    assert "3 pairs from 3 completions of 1 prompts" in text
    assert "  0.45 to 0.50 " + "█" * 30 + " 1" in text
    assert text.count("█" * 30) == 3
    (axes,) = score_gaps(report).axes
    assert "reward units" in axes.get_xlabel()
    assert "pairs" in axes.get_ylabel()
    assert [bar.get_height() for bar in axes.patches] == list(report.gap_counts)


def test_rule_and_gap_are_checked():
    with pytest.raises(ValueError, match="rule must be"):
        pairing.pairs_from_scores(["p"], [said("a", "b")], [[0, 1]], rule="best")
    with pytest.raises(ValueError, match="min_gap at least 0"):
        pairing.pairs_from_scores(["p"], [said("a", "b")], [[0, 1]], min_gap=-0.1)


def test_the_papers_recipe():
    assert dataclasses.astuple(PAPER_RECIPE) == (25_000, 2, 8, 4, "all")


# ---- what was sampled is what is trained


@pytest.fixture(params=[".jsonl", ".parquet", ".csv"])
def sampled(request, llama, tokenizer, tmp_path):
    """Completions that end with either of two tokens or are cut, and their pairs read back from a file."""
    llama.generation_config.eos_token_id = [0, 3]
    prompts = [*PROMPTS, "ab"]
    drawn = sampling.generate(llama, tokenizer, prompts, samples_per_prompt=6, max_new_tokens=8, seed=1)
    scores = pairing.score(CountReward(), prompts, [[c.text for c in several] for several in drawn])
    table, _ = pairing.pairs_from_scores(prompts, drawn, scores.tolist(), tokenizer=tokenizer)
    if request.param == ".csv":
        table.to_csv(str(tmp_path / "pairs.csv"))  # writes lists as [1 2 3]
    else:
        save_pairs(table, tmp_path / f"pairs{request.param}")
    steps = {(prompt, c.text): c.steps for prompt, several in zip(prompts, drawn, strict=True) for c in several}
    return load_pairs(tmp_path / f"pairs{request.param}")[0], steps


def test_sampled_responses_are_trained_as_the_tokens_that_were_sampled(sampled, tokenizer):
    table, steps = sampled
    pairs, report = encode_pairs(table, tokenizer, max_length=64)
    assert len(pairs) == len(table) > 10
    for pair, row in zip(pairs, table, strict=True):
        assert pair.prompt_ids == prompt_token_ids(tokenizer, [row["prompt"]])[0]
        for column in ("chosen", "rejected"):
            assert getattr(pair, f"{column}_ids") == steps[row["prompt"], row[column]]
    last = {ids[-1] for ids in steps.values() if len(ids) < 8}
    assert last == {0, 3}
    again = tokenizer(list(table["rejected"]), add_special_tokens=False)["input_ids"]
    assert any(ids != own[: len(ids)] for ids, own in zip(again, table["rejected_ids"], strict=True))
    assert "encoded from their text" not in str(report)


def test_ids_of_another_vocabulary_or_another_text_are_not_trained(sampled, tokenizer):
    table, _ = sampled
    plain, _ = encode_pairs(table.remove_columns(["tokenizer"]), tokenizer, max_length=64)
    names = {f"chosen{end}": f"rejected{end}" for end in ("", "_complete")}
    exchanged = table.rename_columns(names | {new: old for old, new in names.items()})
    foreign = table.map(lambda _: {"tokenizer": "another"})
    texts = [(pair.chosen_ids, pair.rejected_ids) for pair in plain]
    for changed, expected in [(exchanged, [pair[::-1] for pair in texts]), (foreign, texts)]:
        pairs, report = encode_pairs(changed, tokenizer, max_length=64)
        assert [(pair.chosen_ids, pair.rejected_ids) for pair in pairs] == expected
        assert report.reencoded == len(table)
        assert f"{len(table)} rows encoded from their text: the ids beside it are another tokenizer's" in str(report)
    uncut = table.filter(lambda row: row["chosen_complete"]).map(lambda _: {"chosen_complete": False})
    pairs, _ = encode_pairs(uncut, tokenizer, max_length=64, on_bad_rows="skip")
    assert all(pair.chosen_ids[-1] != 0 for pair in pairs)  # the flag beside the ids decides


@pytest.mark.parametrize("form", tiny.FORMS)
def test_sampled_tokens_are_trained_whatever_the_tokenizer(form):
    tokenizer = tiny.tokenizer_of(form)
    model = tiny.llama(vocab=len(tokenizer))
    drawn = sampling.generate(
        model, tokenizer, ["a good", "<s>a good"], samples_per_prompt=20, max_new_tokens=6, seed=0
    )
    scores = torch.arange(40.0).view(2, 20).tolist()
    table, report = pairing.pairs_from_scores(["a good", "<s>a good"], drawn, scores, tokenizer=tokenizer)
    pairs, encoding = encode_pairs(table, tokenizer, max_length=64, on_bad_rows="skip")
    steps = {tuple(c.steps) for several in drawn for c in several}
    assert len(pairs) == report.kept > 200
    assert {tuple(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)} <= steps
    assert encoding.reencoded == 0
    assert {tuple(i for i, token in enumerate(pair.prompt_ids) if token == 1) for pair in pairs} == {
        (0,)
    }  # one BOS, leading


def test_a_prompt_that_begins_with_bos_is_sampled_and_scored_as_the_one_without():
    tokenizer = tiny.tokenizer_of("byte")
    model, other = tiny.llama(vocab=len(tokenizer)), tiny.llama(seed=1, vocab=len(tokenizer))
    prompts = ["a good film", "<s>a good film"]
    (plain,), (rendered,) = sampling.generate(model, tokenizer, prompts, max_new_tokens=12, temperature=0, seed=0)
    assert plain == rendered
    stats = sequence_kl(model, other, tokenizer, prompts, [plain, rendered])
    assert stats.kl[0].item() == pytest.approx(stats.kl[1].item(), rel=1e-6)


def test_an_unknown_scope_is_refused_before_anything_is_sampled(tokenizer, llama, monkeypatch):
    monkeypatch.setattr(pairing, "generate", None)
    with pytest.raises(ValueError, match=r"has scope 'prompt'; it must be"):
        pairing.build_pairs(llama, tokenizer, CountReward("prompt"), prompts=PROMPTS, seed=0, cache_dir=None)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda rows: [math.nan] * len(rows), "the score nan: .*every score must be finite"),
        (lambda rows: [1.0], r"returned shape \(1,\) for 6 texts"),
    ],
)
def test_scores_of_sampled_tokens_are_checked_like_those_of_texts(tokenizer, llama, scores, message):
    reward = CountReward()
    reward.tokenizer, reward.score_ids = tokenizer, scores
    drawn = sampling.generate(llama, tokenizer, PROMPTS[:2], samples_per_prompt=3, max_new_tokens=4, seed=1)
    with pytest.raises(ValueError, match=message):
        pairing.score_samples(reward, tokenizer, PROMPTS[:2], drawn)


def test_a_reward_that_reads_tokens_scores_the_sampled_ones(tokenizer, llama):
    draw = torch.Generator().manual_seed(0)
    tables = torch.randn(len(WORDS), generator=draw), torch.randn(64, generator=draw)
    drawn = sampling.generate(llama, tokenizer, PROMPTS, samples_per_prompt=20, max_new_tokens=8, seed=1)
    reward = AdditiveReward(tokenizer, *tables, bias=0.1)
    credits = [reward.token_credit(torch.tensor(c.token_ids, dtype=int)).sum() for several in drawn for c in several]
    by_token = torch.sigmoid(0.1 + torch.stack(credits)).view(len(PROMPTS), 20)
    by_text = pairing.score(reward, PROMPTS, [[completion.text for completion in several] for several in drawn])
    torch.testing.assert_close(pairing.score_samples(reward, tokenizer, PROMPTS, drawn), by_token)
    assert not torch.allclose(by_text, by_token)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    other.add_tokens(["another"])
    torch.testing.assert_close(pairing.score_samples(reward, other, PROMPTS, drawn), by_text)
    assert pairing.score_samples(reward, tokenizer, [], []).shape == (0, 0)
    settings = {"max_new_tokens": 8, "samples_per_prompt": 20, "seed": 1}
    table, _ = pairing.build_pairs(llama, tokenizer, reward, prompts=PROMPTS, cache_dir=None, **settings)
    for row in table:
        ids = row["chosen_ids"][:-1] if row["chosen_complete"] else row["chosen_ids"]
        assert row["chosen_score"] == pytest.approx(reward.score_ids([ids]).item(), abs=1e-6)
    found = evaluate(llama, llama, tokenizer, PROMPTS, reward, **settings)
    torch.testing.assert_close(torch.tensor([sample.reward for sample in found.samples]), by_token.T.flatten())


# ---- files and cache


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_saved_pairs_load_as_they_were(tmp_path, suffix):
    completions = [
        said("é\u2028", "b", "p\n"),
        said("p q", "p r"),
    ]  # the last two begin with their prompt, as it happens
    table, _ = pairing.pairs_from_scores(["p", "p"], completions, [[0.1, 1 / 3, 0.2], [0, 1]])
    save_pairs(table, tmp_path / f"new/pairs{suffix}")
    loaded, bad = load_pairs(tmp_path / f"new/pairs{suffix}")
    assert loaded.to_list() == table.to_list()
    assert loaded.features == table.features
    assert bad == []


def test_pairs_are_saved_under_known_suffixes_only(tmp_path):
    table, _ = pairing.pairs_from_scores(["p"], [said("a", "b")], [[0, 1]])
    with pytest.raises(ValueError, match=r"written as \.jsonl or \.parquet, not '\.csv'"):
        save_pairs(table, tmp_path / "pairs.csv")


@pytest.fixture
def build(llama, tokenizer, tmp_path):
    def call(**changes):
        settings = {
            "prompts": ["abc", "d"],
            "max_new_tokens": 6,
            "seed": 0,
            "cache_dir": tmp_path,
            "reward": CountReward(),
        }
        settings |= {"model": llama, "tokenizer": tokenizer} | changes
        return pairing.build_pairs(**settings)

    return call


def entries(folder, kind: str = "pairs") -> list:
    """Cache entries of pairs, or of samples."""
    found = [path for path in folder.iterdir() if path.is_dir()]
    return [path for path in found if path.name.startswith("samples-") == (kind == "samples")]


def test_of_two_at_once_one_samples_and_the_other_waits_and_reads(build, monkeypatch, capsys):
    real, began, others = pairing.generate, [], []

    def slow(*args, **kwargs):
        began.append(1)
        others.append(pool.submit(build))
        time.sleep(0.3)  # in which it would sample too, were it not waiting
        assert not others[0].done()
        return real(*args, **kwargs)

    monkeypatch.setattr(pairing, "generate", slow)
    with ThreadPoolExecutor(1) as pool:
        table, report = build()
        again, read = others[0].result()
    assert len(began) == 1
    assert (again.to_dict(), read) == (table.to_dict(), report)
    assert "waiting for it" in capsys.readouterr().err


def test_a_full_disk_does_not_cost_what_was_sampled(build, monkeypatch, tmp_path, capsys):
    table, _ = build(cache_dir=None)
    fail = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(store.os, "rename", lambda *args: (_ for _ in ()).throw(fail))
    assert build()[0].to_dict() == table.to_dict()
    assert capsys.readouterr().err.count("not cached: [Errno 28] No space left") == 2
    assert entries(tmp_path) == entries(tmp_path, "samples") == []


def test_the_second_call_reads_the_cache(build, monkeypatch, tmp_path):
    table, report = build()
    assert len(entries(tmp_path)) == len(entries(tmp_path, "samples")) == 1

    def refuse(*args, **kwargs):
        raise AssertionError("sampled again")

    monkeypatch.setattr(pairing, "generate", refuse)
    again, same = build()
    assert again.to_list() == table.to_list()
    assert same == report
    assert str(same) == str(report)


def test_everything_that_decides_the_pairs_names_the_cache_entry(build, llama, tokenizer, tmp_path):
    build()
    reward = CountReward()
    reward.fingerprint = "count-2"
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token=EOS, eos_token=EOS, pad_token="a"
    )
    changes = [
        {"prompts": ["d", "abc"]},
        {"max_new_tokens": 7},
        {"seed": 1},
        {"samples_per_prompt": 3},
        {"temperature": 0.5},
    ]
    changes += [{"rule": "best_worst"}, {"min_gap": 0.01}, {"batch_size": 3}, {"reward": reward}, {"tokenizer": other}]
    changes += [{"reward": CountReward("full")}, {"model": tiny.llama(seed=1, vocab=len(WORDS))}]
    for number, change in enumerate(changes, start=2):
        build(**change)
        assert len(entries(tmp_path)) == number, change
    tokenizer(["abc", "d"], padding=True, truncation=True, max_length=5)  # leaves its settings in the tokenizer
    build()
    llama.config.rms_norm_eps = 0.5
    build()
    assert len(entries(tmp_path)) == len(changes) + 2
    assert (
        len(entries(tmp_path, "samples")) == len(changes) + 2 - 4
    )  # rule, gap and the two rewards share their samples


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "manifest"])
def test_a_damaged_entry_is_built_anew_saying_so(build, tmp_path, capsys, damage):
    table, report = build()
    (entry,) = entries(tmp_path)
    if damage == "truncate":
        path = entry / "pairs.parquet"
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "alter":
        path = entry / "report.json"
        path.write_text(path.read_text().replace('"prompts": 2', '"prompts": 3'))
    elif damage == "remove":
        (entry / "report.json").unlink()
    else:
        (entry / "MANIFEST.json").write_text(json.dumps({}))
        (entry / "report.json").write_text("{}")
    again, same = build()
    assert "cannot be used and is built anew" in capsys.readouterr().err
    assert again.to_list() == table.to_list()
    assert same == report
    build()
    assert capsys.readouterr().err == ""


def test_without_a_cache_nothing_is_written(build, tmp_path):
    table = build(cache_dir=None)[0]
    assert list(tmp_path.iterdir()) == []
    assert table.to_list() == build()[0].to_list()


def test_a_plain_function_is_a_reward_whose_pairs_are_not_cached(build, tmp_path, capsys):
    def count(texts):
        return [10.0 * text.count("a") - 5 for text in texts]

    table, report = build(reward=count)
    assert "reward 'count' has no fingerprint, so its pairs are not cached" in capsys.readouterr().err
    assert not entries(tmp_path)
    assert len(entries(tmp_path, "samples")) == 1
    assert {row["chosen_score"] - row["rejected_score"] for row in table} <= {10.0 * k for k in range(1, 7)}
    assert report.gap_edges[-1] == max(row["chosen_score"] - row["rejected_score"] for row in table)
    assert sum(report.gap_counts) == report.kept  # none beyond the histogram
    assert "0 to 1" not in score_gaps(report).axes[0].get_xlabel()


def test_a_reward_that_cannot_score_fails_before_sampling(build, monkeypatch):
    monkeypatch.setattr(pairing, "generate", lambda *_, **__: pytest.fail("sampled first"))
    with pytest.raises(ValueError, match=r"returned shape \(1,\) for 2 texts"):
        build(reward=lambda texts: [0.5])


def test_samples_outlive_a_reward_that_fails(build, monkeypatch, tmp_path):
    table, _ = build(cache_dir=None)

    def fails_late(texts):
        return [0.5 if text in PROBE else math.nan for text in texts]

    with pytest.raises(ValueError, match="gave text 0 of 8 the score nan"):
        build(reward=fails_late)
    monkeypatch.setattr(pairing, "generate", lambda *_, **__: pytest.fail("sampled again"))
    assert build()[0].to_list() == table.to_list()


def test_damaged_samples_are_drawn_anew_saying_so(build, tmp_path, capsys):
    table, _ = build()
    (entry,), (pairs,) = entries(tmp_path, "samples"), entries(tmp_path)
    shutil.rmtree(pairs)
    text = (entry / "samples.json").read_text()
    (entry / "samples.json").write_text(text.replace('"end": null', '"end": 0', 1))
    assert build()[0].to_list() == table.to_list()
    assert "built anew" in capsys.readouterr().err


def test_no_pair_left_says_why(build, tmp_path):
    with pytest.raises(ValueError, match=r"no pair is left; lower min_gap(.|\n)*gap below min_gap"):
        build(min_gap=1.5)
    assert not entries(tmp_path)


def test_a_tokenizer_without_ends_is_refused(llama, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = llama.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="neither tokenizer nor model has an EOS token, so no text would end"):
        sampling.stop_ids(llama, tokenizer)


@pytest.mark.parametrize(("moved", "refused"), [(1e-5, False), (1e-2, True)])
def test_rounding_is_no_reading_of_the_padding(moved, refused):
    """Thirty layers round a little otherwise beside padding; what reads it moves its logits far more."""

    class Deep:
        device, dtype = torch.device("cpu"), torch.float32

        def generate(self, input_ids, **_):
            logits = torch.tensor([[10.0, -3.0, 1.0]]) + (10 * moved if input_ids.shape[1] > 2 else 0.0)
            return type("Output", (), {"logits": [logits]})

    if refused:
        with pytest.raises(ValueError, match="reads the padding before a prompt"):
            sampling._check_padding(Deep())
    else:
        sampling._check_padding(Deep())
