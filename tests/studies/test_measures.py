"""Measures: ranks, slopes, sums and n-grams against what is written out, on the positions that they speak of."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import spearmanr
from test_device import both, on_the_device
from test_guides import additive

from tpo_lib.config import TrainConfig
from tpo_lib.data import collate
from tpo_lib.evaluation import Sample, pair_stats
from tpo_lib.intervals import bootstrap, linearised
from tpo_lib.stats import response_mask
from tpo_lib.studies import measures
from tpo_lib.studies.measures import LENGTHS, Seen, bleu, measure

PAIRS = tiny.pairs(10, longest=24)
SHARED = [
    PAIRS[0],
    *(type(p)(p.row, PAIRS[i % 4].prompt_ids, p.chosen_ids, p.rejected_ids) for i, p in enumerate(PAIRS[1:])),
]
TEXTS = ["a good film", "a bad film", "ab cd", "fine"]


def stage(pairs=SHARED, **changes):
    """What measures read of a stage: four prompts with ten pairs, uneven; a reward whose credits are known."""
    tokenizer = tiny.letters()
    given = {
        "start": tiny.llama(0),
        "tokenizer": tokenizer,
        "reward": additive(tokenizer),
        "held_out_pairs": list(pairs),
    }
    return SimpleNamespace(**given | {"reference_cache": {}, "held_out_prompts": ["a", "b c"]} | changes)


def seen(policy=None, loss_type="dpo", on=None, texts=("ab cd", "ab", "ab cd e", "ab c"), **hyper):
    samples = [Sample("", text, None, None) for text in texts]
    config = TrainConfig(loss_type=loss_type, **hyper)
    return Seen(on or stage(), policy or tiny.llama(1), SimpleNamespace(samples=samples), config)


def by_token(given: Seen):
    """Of every response token, written out: implied reward at beta 1, credit, place from the start, row, log ref."""
    rows, reward = [], given.stage.reward
    pairs = given.stage.held_out_pairs
    for i, (pair, side) in enumerate([(p, "chosen_ids") for p in pairs] + [(p, "rejected_ids") for p in pairs]):
        prompt, response = pair.prompt_ids, getattr(pair, side)
        ids = torch.tensor([[*prompt, *response]])
        said = [m(ids).logits[0].detach().double().log_softmax(-1) for m in (given.policy, given.stage.start)]
        for t, token in enumerate(response):
            at, previous = len(prompt) + t - 1, response[t - 1] if t else 0
            w = reward.token_credit(torch.tensor([previous, token]))[1].item()
            pi, ref = (each[at, token].item() for each in said)
            rows.append((pi - ref, w, t / len(response), i, ref))
    return np.array(rows)


def test_true_credit_and_implied_reward_meet_at_the_same_token():
    given = seen(beta=0.3)
    rows, found = by_token(given), measures.credit(given)
    assert found["credit_rho"].mean() == pytest.approx(spearmanr(rows[:, 0], rows[:, 1]).statistic, abs=1e-3)
    assert found["credit_slope"].mean() == pytest.approx(0.3 * np.polyfit(rows[:, 1], rows[:, 0], 1)[0], abs=1e-4)
    for i, part in enumerate(("early", "mid", "late")):
        own = rows[(rows[:, 2] * 3 + 1e-9).astype(int) == i]
        assert found[f"credit_rho_{part}"].mean() == pytest.approx(spearmanr(own[:, 0], own[:, 1]).statistic, abs=2e-3)
        assert found[f"credit_slope_{part}"].mean() == pytest.approx(
            0.3 * np.polyfit(own[:, 1], own[:, 0], 1)[0], abs=1e-4
        )
    within = [spearmanr(own[:, 0], own[:, 1]).statistic for i in range(20) if len(own := rows[rows[:, 3] == i]) >= 3]
    assert found["credit_rho_within"].mean() == pytest.approx(np.mean(within), abs=5e-3)
    assert all(values.shape == (4,) for values in found.values()), "one number a prompt, in whatever part"


def test_rare_tokens_are_those_that_the_reference_hardly_writes(monkeypatch):
    given = seen()
    rows = by_token(given)
    monkeypatch.setattr(measures, "RARE", math.exp(np.quantile(rows[:, 4], 0.3)))
    own = rows[rows[:, 4] < math.log(measures.RARE)]
    assert 20 < len(own) < 0.4 * len(rows)
    assert measures.credit(given)["credit_rho_rare"].mean() == pytest.approx(
        spearmanr(own[:, 0], own[:, 1]).statistic, abs=2e-3
    )
    monkeypatch.setattr(measures, "RARE", 1e-30)
    assert "credit_rho_rare" not in measures.credit(given)


def credited(start, reward, strength: float):
    """A policy whose log pi(y) - log pi_ref(y) is strength * w up to a state's constant, by way of its forward."""
    model = copy.deepcopy(start)
    plain = model.forward

    def forward(input_ids=None, **more):
        output = plain(input_ids=input_ids, **more)
        table = reward.unigram[: tiny.VOCAB]
        output["logits"] = output["logits"] + strength * table
        return output

    model.forward = forward
    return model


def test_a_policy_that_holds_the_credit_is_found_out():
    """Unigram credits added to the logits: rank correlation near one, slope near the strength (a state's constant aside)."""
    tokenizer = tiny.letters()
    reward = additive(tokenizer)
    reward.bigram = torch.zeros_like(reward.bigram)
    on = stage(reward=reward)
    for strength, low, high in ((0.5, 0.9, 1.0), (-0.5, -1.0, -0.9)):
        given = seen(credited(on.start, reward, strength), on=on, beta=1.0)
        found = measures.credit(given)
        assert low < found["credit_rho"].mean() <= high
        assert found["credit_slope"].mean() == pytest.approx(strength, rel=0.1)


def test_the_start_has_learned_no_credit_and_moved_nothing():
    found = measure(["credit", "moved", "growth"], seen(tiny.llama(0)))
    assert max(abs(np.mean(v)) for name, v in found.items() if "slope" in name or "moved" in name) < 1e-6
    assert {name: np.mean(v) for name, v in found.items() if "_at_" in name} == pytest.approx(
        {name: 0 for name in found if "_at_" in name}, abs=1e-5
    )


def test_per_prompt_numbers_give_the_interval_of_a_ratio_over_prompts():
    """Shifting one prompt's tokens shifts the mean by its share of tokens: what is linearised is the mean over tokens."""
    values, groups = np.array([1.0, 2.0, 3.0, 10.0]), np.array([0, 0, 0, 1])
    found = measures._mean(values, groups, 3)  # a third prompt has no token at all
    assert found.mean() == pytest.approx(4.0)
    assert found.tolist() == pytest.approx([4 + 3 / 4 * (6 - 12), 4 + 3 / 4 * (10 - 4), 4.0])
    assert bootstrap(found, seed=0).mean == pytest.approx(4.0)


def test_every_response_counts_for_its_own_prompt():
    """Four prompts in the order of the pairs; both responses of a pair belong to its own: values a prompt, not their mean."""
    given, names = seen(), []
    for pair in SHARED:
        names += [tuple(pair.prompt_ids)] * (tuple(pair.prompt_ids) not in names)
    rows = by_token(given)
    of = np.array([names.index(tuple(SHARED[int(i) % 10].prompt_ids)) for i in rows[:, 3]])
    on = (rows[:, 3] < 10) & (rows[:, 1] > 0)
    expected = linearised(*(np.bincount(of[on], v, 4) for v in (rows[on, 0], np.ones(on.sum()))))
    assert measures.moved(given)["moved_chosen_good"] == pytest.approx(expected, abs=1e-3)
    on = (rows[:, 3] >= 10) & (rows[:, 1] > 0)
    expected = linearised(*(np.bincount(of[on], v, 4) for v in (rows[on, 0], np.ones(on.sum()))))
    assert measures.moved(given)["moved_rejected_good"] == pytest.approx(expected, abs=1e-3)
    x = rows[:, 1] - rows[:, 1].mean()
    expected = linearised(*(np.bincount(of, v, 4) for v in (0.1 * x * rows[:, 0], x * x)))
    assert measures.credit(given)["credit_slope"] == pytest.approx(expected, abs=1e-4)


def test_where_the_probability_went_by_credit():
    given = seen()
    rows, found = by_token(given), measures.moved(given)
    for name, sign in (("good", 1), ("bad", -1)):
        for side, half in (("chosen", rows[:, 3] < 10), ("rejected", rows[:, 3] >= 10)):
            expected = rows[half & (sign * rows[:, 1] > 0), 0].mean()
            assert found[f"moved_{side}_{name}"].mean() == pytest.approx(expected, abs=1e-3), (side, name)
    assert len(found) == 4


def test_sums_over_a_response_up_to_each_length():
    given = seen(on=stage(pairs := tiny.pairs(10, longest=40)))
    found, rows = measures.growth(given), by_token(given)
    tokens = pair_stats(given.policy, given.stage.start, pairs, 0)
    kl = tokens.kl[response_mask(collate(pairs).labels)].double().numpy()
    for name, values in (("logratio", rows[:, 0]), ("seqkl", kl)):
        for t in (8, 16):
            sums = {0: [], 1: []}
            for i in range(20):
                own = values[rows[:, 3] == i]
                if len(own) >= t:
                    sums[i // 10].append(own[:t].sum())
            both = np.concatenate([*map(np.array, sums.values())])
            variance = sum(((np.array(s) - np.mean(s)) ** 2).sum() for s in sums.values()) / len(both)
            assert found[f"{name}_mean_at_{t}"].mean() == pytest.approx(both.mean(), abs=1e-3)
            assert found[f"{name}_var_at_{t}"].mean() == pytest.approx(variance, abs=1e-3)
    longest = min(max(len(getattr(p, side)) for p in pairs) for side in ("chosen_ids", "rejected_ids"))
    assert {int(name.rpartition("_")[2]) for name in found} == {t for t in LENGTHS if t <= longest}


def test_bleu_worked_by_hand():
    """Seven against six tokens: 5/7, 3/6, 2/5, 1/4 in common, no brevity penalty; of two references the larger count clips."""
    candidate, reference = [1, 2, 3, 4, 9, 9, 5], [1, 2, 3, 4, 5, 6]
    assert bleu(candidate, [reference]) == pytest.approx((5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    assert bleu([7, 7, 7], [[7], [7, 7]], most=1) == pytest.approx(2 / 3)
    assert bleu([1, 2], [[3, 4]], most=2) == pytest.approx((0.1 / 2 * 0.1 / 1) ** 0.5)
    assert bleu([1, 2, 3], [[1, 2, 3]]) == 1
    assert bleu([], [[1]]) == 0
    assert bleu([1], [[1, 2, 3], [1, 2]], most=1) == pytest.approx(math.exp(1 - 2)), "the nearest length"


def test_self_bleu_is_of_the_samples_of_one_prompt():
    """Two prompts, samples as `evaluate` has them: the first of each, then the second."""
    same = seen(texts=("ab cd", "efgh", "ab cd", "efgh"))
    assert measures.self_bleu(same)["self_bleu"].tolist() == [1, 1]
    apart = seen(texts=("ab cd", "efgh", "efgh", "ab cd"))
    assert max(measures.self_bleu(apart)["self_bleu_2"]) < 0.1
    mixed = measures.self_bleu(seen(texts=("ab cd", "efgh", "ab cd", "abab")))
    assert mixed["self_bleu"][0] == 1
    assert mixed["self_bleu"][1] < 0.1
    with pytest.raises(ValueError, match="takes two samples a prompt or more"):
        measures.self_bleu(seen(texts=("ab", "cd")))


def test_credit_on_the_policy_s_own_samples():
    """As on a pair of the two samples' tokens behind the prompt; a prompt with an empty sample counts for nothing."""
    given = seen(texts=("ab cd e", "", "fgh a", "ab"))
    found = measures.credit_own(given)
    assert all(name.startswith("own_credit") for name in found)
    assert all(values.shape == (2,) for values in found.values())
    tokenizer = given.stage.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab cd e", "fgh a")]
    pair = type(PAIRS[0])(0, tokenizer("a")["input_ids"], *ids)
    alone = measures.credit(seen(on=stage([pair])))
    assert found["own_credit_rho"].mean() == pytest.approx(alone["credit_rho"].mean(), abs=1e-4)
    with pytest.raises(ValueError, match="takes two samples a prompt; set"):
        measures.credit_own(seen(texts=("ab", "cd")))


def test_the_value_of_a_state_summed_over_the_vocabulary_by_hand():
    given = seen(texts=("ab cd e", "fgh a", "x", "y"), beta=0.3)
    reward, tokenizer, found = given.stage.reward, given.stage.tokenizer, measures.relaxation(given)

    def values(prompt: list[int], response: list[int]) -> list[float]:
        ids, out = torch.tensor([[*prompt, *response]]), []
        said = [m(ids).logits[0].detach().double().log_softmax(-1) for m in (given.policy, given.stage.start)]
        for t in range(len(response)):
            p, q = (each[len(prompt) + t - 1] for each in said)
            previous = response[t - 1] if t else 0
            credit = torch.tensor([reward.token_credit(torch.tensor([previous, z]))[1] for z in range(tiny.VOCAB)])
            credit[0] = 0  # EOS
            out.append((p.exp() @ credit.double() - 0.3 * (p.exp() * (p - q)).sum()).item())
        return out

    own = [values(*(tokenizer(x, add_special_tokens=x == y)["input_ids"] for x in (y, text))) for y, text in
           (("a", "ab cd e"), ("b c", "fgh a"))]  # fmt: skip
    assert found["step_own"].mean() == pytest.approx(np.mean(own[0] + own[1]), abs=1e-5)
    pairs = given.stage.held_out_pairs
    data = [v for p in pairs for ids in (p.chosen_ids, p.rejected_ids) for v in values(p.prompt_ids, ids)]
    assert found["step_data"].mean() == pytest.approx(np.mean(data), abs=1e-5)
    assert (len(found["step_own"]), len(found["step_data"])) == (2, 4)
    assert "step_gain" not in found  # pairs of other prompts than the samples'

    second, first = (tokenizer(prompt)["input_ids"] for prompt in ("b c", "a"))
    held_out = [
        type(PAIRS[0])(i, ids, p.chosen_ids, p.rejected_ids)
        for i, (ids, p) in enumerate(zip((second, first, second), PAIRS, strict=False))
    ]
    given = seen(on=stage(held_out), texts=("ab cd e", "fgh a", "x", "y"), beta=0.3)
    gain = measures.relaxation(given)["step_gain"]
    data = [[v for p in held_out if p.prompt_ids == ids for side in (p.chosen_ids, p.rejected_ids) for v in values(ids, side)]
            for ids in (second, first)]  # fmt: skip
    assert gain.shape == (2,)
    assert gain.mean() == pytest.approx(np.mean(own[0] + own[1]) - np.mean(data[0] + data[1]), abs=1e-5)
    each = [linearised(*(np.array([f(x) for x in lists]) for f in (sum, len))) for lists in ([own[1], own[0]], data)]
    assert gain == pytest.approx(each[0] - each[1], abs=1e-5)


def test_what_is_unknown_or_cannot_be_measured_is_refused():
    with pytest.raises(
        ValueError, match="mood is no measure; there is credit, credit_own, moved, growth, self_bleu, relaxation"
    ):
        measure(["credit", "mood"], seen())
    for name in ("credit", "moved"):
        with pytest.raises(ValueError, match="gives no credit to the model's own tokens"):
            measure([name], seen(on=stage(reward=len)))


def test_everything_on_the_bundled_model(small_stage):
    evaluation = small_stage.evaluate(small_stage.start)
    found = measure(list(measures.MEASURES), Seen(small_stage, small_stage.policy(), evaluation, TrainConfig()))
    held_out = len({tuple(p.prompt_ids) for p in small_stage.held_out_pairs})
    for name, values in found.items():
        own = name.startswith(("own", "self", "step_own"))
        assert len(values) == (len(small_stage.held_out_prompts) if own else held_out), name
        assert np.isfinite(values).all(), name
    assert {
        "credit_rho_rare",
        "credit_rho_within",
        "moved_rejected_bad",
        "seqkl_var_at_16",
        "self_bleu",
    } <= found.keys()


def everything() -> None:
    def said(device: str) -> list[float]:
        on = stage(start=tiny.llama(0).to(device))
        found = measure(list(measures.MEASURES), seen(tiny.llama(1).to(device), on=on))
        return [number for values in found.values() for number in values]

    both(said)


def test_all_of_them_are_measured_on_the_device_of_the_models():
    on_the_device(everything)
