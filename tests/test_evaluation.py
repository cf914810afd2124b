"""KL and entropy against a float64 loop over single prefixes, pair metrics against the core."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import reference as naive
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tpo_lib
from tpo_lib import evaluation as ev
from tpo_lib import fast, pairing, stats
from tpo_lib.data import EncodedPair, collate
from tpo_lib.intervals import Metric, bootstrap
from tpo_lib.losses import OBJECTIVES
from tpo_lib.rewards import PROBE
from tpo_lib.sampling import Completion
from tpo_lib.stats import split, token_stats
from tpo_lib.types import TokenStats

EOS = "<|endoftext|>"
PROMPTS = ["the film", "a", "one more time the cat", "so it goes"]


@pytest.fixture(scope="module")
def tokenizer():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator([*PROMPTS, "the film the film so one more cat"] * 3, trainer)
    tok.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=EOS, eos_token=EOS, pad_token=EOS)


def build(kind: str, vocab: int, seed: int):
    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, **sizes, **ends))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=64, n_embd=16, n_layer=1, n_head=2, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # distributions far from uniform
    return model.eval()


@pytest.fixture(params=["llama", "gpt2"])
def pair_of_models(request, tokenizer):
    return build(request.param, len(tokenizer), 1), build(request.param, len(tokenizer), 2)


@pytest.fixture(scope="module")
def llamas(tokenizer):
    return [build("llama", len(tokenizer), seed) for seed in (1, 2, 3)]


def completions() -> list[Completion]:
    rows = [((5, 9, 200, 31, 7), False), ((40,), True), ((), True), ((8, 8, 8), True)]
    return [Completion("", ids, 0 if complete else None) for ids, complete in rows]


def encoded_pairs(count: int = 5) -> list[EncodedPair]:
    generator = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(1, 280, size=generator.integers(low, high)).tolist()

    return [EncodedPair(row, [0, *ids(1, 5)], ids(1, 8), [*ids(1, 8), 0]) for row in range(count)]


class Shouting:
    """Share of spaces, so that it depends on the text and lies in [0, 1]."""

    name, fingerprint = "spaces", "1"

    def __init__(self, scope: str = "response"):
        self.scope, self.seen = scope, []

    def __call__(self, texts):
        self.seen += texts
        return torch.tensor([text.count(" ") / max(1, len(text)) for text in texts])


# ---- diversity


def test_distinct_2_by_hand():
    # (1,2) (2,3) (3,1) | (1,2) (2,1): 4 distinct of 5. Without the first prompt 2/2, without the second 3/3.
    metric = ev.distinct_2([[[1, 2, 3, 1]], [[1, 2, 1]]])
    assert (metric.mean, metric.low, metric.high, metric.n) == (0.8, 0.8, 0.8, 2)
    # one prompt, two samples: bigrams are pooled within a prompt and never cross from one sample to the next
    assert ev.distinct_2([[[1, 2], [1, 2]], [[3, 4]]]).mean == pytest.approx(2 / 3)
    assert ev.distinct_2([[[1]], [[]]]).as_dict() == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2}


def test_the_interval_of_distinct_2_is_as_wide_as_fresh_samples_differ():
    generator = np.random.default_rng(0)

    def draw() -> Metric:
        return ev.distinct_2([[generator.geometric(0.15, size=20).tolist()] for _ in range(40)])

    metrics = [draw() for _ in range(60)]
    spread = np.std([m.mean for m in metrics])
    half = np.mean([m.high - m.low for m in metrics]) / 2
    assert 1.6 * spread < half < 3.2 * spread  # 1.96 would be exact, the jackknife errs on the wide side


def sums_of(ids) -> ev.SampleStats:
    return ev.SampleStats(*(torch.arange(1.0, 1 + len(ids)).double() for _ in range(5)))


def test_collapse_within_a_prompt_is_seen_where_all_samples_together_look_diverse():
    # K = 3; alike within a prompt, or alike across the prompts: the same six sentences
    alike, apart = [[1, 2, 3]] * 3 + [[4, 5, 6]] * 3, [[1, 2, 3], [4, 5, 6], [7, 8, 9]] * 2
    first, second = (ev.sample_metrics(sums_of(ids), ids, 2, seed=0)[0] for ids in (alike, apart))
    assert (first["distinct_2"].mean, second["distinct_2"].mean) == (1.0, 0.5)  # of the first sample of each prompt
    assert (first["distinct_2_within"].mean, second["distinct_2_within"].mean) == (pytest.approx(1 / 3), 1.0)
    mixed = ev.sample_metrics(sums_of(alike), [*alike[:3], *apart[:3]], 2, seed=0)[0]["distinct_2_within"]
    assert (mixed.mean, mixed.low, mixed.high, mixed.n) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 1.0, 2)
    for found in ev.sample_metrics(sums_of(alike), alike, 6, seed=0):
        assert "distinct_2_within" not in found  # one sample a prompt
    nothing, of_prompts = ev.sample_metrics(sums_of([[]] * 4), [[], [1], [], []], 2, seed=0)
    assert of_prompts["repetition"].tolist() == of_prompts["distinct_2_within"].tolist() == [0, 0]
    assert [nothing[name].mean for name in ("distinct_2", "distinct_2_within", "repetition")] == [0, 0, 0]


def test_rare_tokens_and_perplexity_are_per_token():
    sums = ev.SampleStats(*(torch.tensor(v).double() for v in ([1.0, 1], [1.0, 1], [6.0, 2], [2.0, 0], [3.0, 1])))
    metrics, of_prompts = ev.sample_metrics(sums, [[1, 2, 3], [1]], 2, seed=0)
    assert metrics["ref_perplexity"].mean == pytest.approx(math.exp(8 / 4))  # not the mean of exp(2) and exp(2)
    assert metrics["rare"].mean == pytest.approx(2 / 4)
    assert metrics["rare"].low == 0.0
    # ratio 2, P / sum(steps) = 2 / 4: 2 + (6 - 2 * 3) / 2 and 2 + (2 - 2 * 1) / 2; the shares 2/3 and 0 of 1/2 in all
    assert of_prompts["ref_nats"].tolist() == [2.0, 2.0]
    assert of_prompts["rare"].tolist() == [0.75, 0.25]  # 1/2 + (2 - 3/2) / 2, 1/2 + (0 - 1/2) / 2


# ---- KL and entropy of the policy's own samples


def loop(policy, ref, tokenizer) -> tuple[list[float], ...]:
    """One forward pass a prefix, no padding, plain floats: KL, entropy, surprisal under the reference, rare ones, steps."""
    found = []
    for prompt, completion in zip(PROMPTS, completions(), strict=True):
        prefix = tokenizer(prompt)["input_ids"]
        tokens = [*completion.token_ids, *([0] if completion.complete else [])]
        sums = [0.0, 0.0, 0.0, 0]
        for token in tokens:
            with torch.no_grad():
                rows = [m(input_ids=torch.tensor([prefix])).logits[0, -1].tolist() for m in (policy, ref)]
            sums[0] += naive.kl_of_rows(*rows)
            sums[1] -= sum(math.exp(x) * x for x in naive.log_softmax(rows[0]))
            sums[2] -= naive.log_softmax(rows[1])[token]
            sums[3] += naive.log_softmax(rows[1])[token] < math.log(ev.RARE)
            prefix = [*prefix, token]
        found.append([*sums, len(tokens)])
    return tuple(map(list, zip(*found, strict=True)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_sequence_kl_equals_the_loop(pair_of_models, tokenizer, dtype, tolerance, monkeypatch):
    assert ev.RARE == 1e-4
    monkeypatch.setattr(ev, "RARE", 3e-3)  # some of what these models wrote
    policy, ref = (model.double() for model in pair_of_models)
    kl, entropy, surprisal, rare, steps = loop(policy, ref, tokenizer)
    policy, ref = policy.to(dtype), ref.to(dtype)
    stats = ev.sequence_kl(policy, ref, tokenizer, PROMPTS, completions(), batch_size=3)
    assert stats.steps.tolist() == steps == [5, 2, 1, 4]
    assert stats.kl.tolist() == pytest.approx(kl, rel=tolerance)
    assert stats.entropy.tolist() == pytest.approx(entropy, rel=tolerance)
    assert stats.surprisal.tolist() == pytest.approx(surprisal, rel=tolerance)
    assert stats.rare.tolist() == rare
    assert min(kl) > 0.1  # the comparison would mean little otherwise
    assert 0 < sum(rare) < sum(steps)


def test_sequence_kl_does_not_depend_on_batches_or_padding(pair_of_models, tokenizer):
    policy, ref = (model.double() for model in pair_of_models)
    whole = ev.sequence_kl(policy, ref, tokenizer, PROMPTS, completions(), batch_size=100)
    single = ev.sequence_kl(policy, ref, tokenizer, PROMPTS, completions(), batch_size=1)
    torch.testing.assert_close(whole.kl, single.kl, rtol=1e-10, atol=0)
    torch.testing.assert_close(whole.entropy, single.entropy, rtol=1e-10, atol=0)


def test_no_more_logits_are_made_at_a_time_than_there_is_room_for(pair_of_models, tokenizer, monkeypatch):
    policy, ref = (model.double() for model in pair_of_models)
    whole, sizes = ev.sequence_kl(policy, ref, tokenizer, PROMPTS, completions()), []
    longest, vocab = max(len(each.steps) for each in completions()), len(policy.get_input_embeddings().weight)
    for room, batches in ((2 * vocab * longest, [2, 2]), (vocab, [1, 1, 1, 1])):
        monkeypatch.setattr(ev, "LOGITS", room)
        with monkeypatch.context() as inner:
            collate = ev.collate
            inner.setattr(
                ev, "collate", lambda pairs, *given, to=collate: (sizes.append(len(pairs)), to(pairs, *given))[1]
            )
            few = ev.sequence_kl(policy, ref, tokenizer, PROMPTS, completions())
        assert sizes == batches
        sizes.clear()
        torch.testing.assert_close(few.kl, whole.kl, rtol=1e-10, atol=0)


# ---- held-out pairs


def direct(policy, ref, guide, pairs):
    """The core's statistics from full logits of one padded batch."""
    batch = collate(pairs, 0)
    with torch.no_grad():
        logits = [
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for m in (policy, ref, guide)
        ]
    return token_stats(logits[0], batch.labels, logits[1], guide_logits=logits[2], with_kl=True)


@pytest.mark.parametrize("pair_loss", [stats.pair_loss, fast.pair_loss], ids=["textbook", "fast"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_pair_stats_are_those_of_one_batch(llamas, batch_size, pair_loss):
    policy, ref, guide = llamas
    pairs = encoded_pairs()
    expected = direct(policy, ref, guide, pairs)
    found = ev.pair_stats(policy, ref, pairs, 0, batch_size=batch_size, guide=guide, pair_loss=pair_loss)
    assert torch.equal(found.mask, expected.mask)
    for name in ("logps", "ref_logps", "kl", "guide_logps"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    bare = ev.pair_stats(policy, ref, pairs, 0, batch_size=batch_size, with_kl=False, pair_loss=pair_loss)
    assert bare.kl is None
    assert bare.guide_logps is None


HYPERPARAMETERS = {
    "sft": {},
    "dpo": {"beta": 0.3},
    "tdpo1": {"beta": 0.3},
    "tdpo2": {"beta": 0.3, "alpha": 0.5},
    "tgdpo": {"beta": 0.3, "alpha": 2.0, "guide_beta": 0.2},
    "simpo": {"beta": 2.0, "gamma": 5.0},
    "ipo": {"beta": 0.4},
}


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_pair_metrics_are_the_objectives_own(llamas, objective):
    stats = direct(*llamas, encoded_pairs(9))
    output = OBJECTIVES[objective].fn(*split(stats), **HYPERPARAMETERS[objective])
    values = ev.pair_values(stats, objective, HYPERPARAMETERS[objective] | {"unrelated": 1})
    metrics = {name: bootstrap(value, seed=0) for name, value in values.items()}
    margin = output.chosen_reward - output.rejected_reward
    assert metrics["own_margin"].mean == pytest.approx(margin.mean().item(), rel=1e-5)
    assert metrics["own_accuracy"].mean == pytest.approx((margin > 0).double().mean().item())
    assert 0 < metrics["own_accuracy"].mean < 1  # both cases occur
    chosen, rejected = (half.kl.sum(-1) for half in split(stats))
    assert metrics["seqkl_chosen"].mean == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert metrics["seqkl_rejected"].mean == pytest.approx(rejected.mean().item(), rel=1e-5)
    assert metrics["seqkl_margin"].mean == pytest.approx((rejected - chosen).mean().item(), rel=1e-4)
    assert {m.n for m in metrics.values()} == {9}


def test_objectives_rank_by_different_rewards(llamas):
    stats = direct(*llamas, encoded_pairs(9))
    found = {name: ev.pair_values(stats, name, h)["own_margin"].mean().item() for name, h in HYPERPARAMETERS.items()}
    assert len({round(value, 6) for value in found.values()}) == len(found)


def test_without_an_objective_the_log_ratio_ranks_and_ties_count_half(llamas):
    stats = direct(*llamas, encoded_pairs(9))
    chosen, rejected = split(stats)
    ratio = ((chosen.logps - chosen.ref_logps).sum(-1) - (rejected.logps - rejected.ref_logps).sum(-1)).mean().item()
    assert ev.pair_values(stats, None, {"beta": 7.0})["own_margin"].mean().item() == pytest.approx(ratio, rel=1e-5)
    start = direct(llamas[1], llamas[1], llamas[2], encoded_pairs(9))
    values = ev.pair_values(start, None, None)
    for name in ("own_accuracy", "accuracy_logratio", "accuracy_mean"):
        assert values[name].mean() == 0.5


def test_accuracy_by_log_ratio_reads_no_label():
    # pair 0: sums 3 > 2, means 1 < 2; pair 1: sums -1 < 1, means -0.5 < 0.5; pair 2: a tie of sums, means 1 > 0.5
    logps = [[1.0, 1.0, 1.0], [-0.5, -0.5, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    lengths = torch.tensor([3, 2, 1, 1, 2, 2])
    mask = torch.arange(3) < lengths[:, None]
    kl = torch.arange(18.0).view(6, 3) * mask  # TDPO1 reads it on both sides
    table = TokenStats(torch.tensor(logps) - 4.0 * mask, -4.0 * mask, mask, kl=kl, guide_logps=-3.0 * mask)
    swapped = table.map(lambda field: field.roll(3, 0))
    for objective in OBJECTIVES:
        values = ev.pair_values(table, objective, HYPERPARAMETERS[objective])
        assert values["accuracy_logratio"].tolist() == [1.0, 0.0, 0.5]
        assert values["accuracy_mean"].tolist() == [0.0, 0.0, 1.0]
        other = ev.pair_values(swapped, objective, HYPERPARAMETERS[objective])
        for name in ("accuracy_logratio", "accuracy_mean"):
            assert other[name].tolist() == [1 - value for value in values[name].tolist()]
    assert "accuracy_mean" not in ev.pair_values(replace(table, ref_logps=None), "simpo", HYPERPARAMETERS["simpo"])


def test_tgdpos_own_accuracy_reads_the_label_and_the_ranking_does_not(llamas):
    """Swap chosen and rejected: what ranks pairs must turn a into 1 - a, whatever the policy was trained with."""
    pairs = encoded_pairs(40)
    swapped = [EncodedPair(p.row, p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in pairs]
    tables, turned = [direct(*llamas, rows) for rows in (pairs, swapped)], {}
    for objective in OBJECTIVES:
        first, second = (ev.pair_values(table, objective, HYPERPARAMETERS[objective]) for table in tables)
        for name in ("accuracy_logratio", "accuracy_mean"):
            assert torch.equal(second[name], 1 - first[name])
        turned[objective] = first["own_accuracy"].mean() + second["own_accuracy"].mean()
    assert turned["tgdpo"] != pytest.approx(1)
    assert turned["dpo"] == turned["tdpo1"] == turned["ipo"] == pytest.approx(1)


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_an_objective_that_reads_no_label_ranks_swapped_pairs_the_other_way(llamas, objective):
    pairs = encoded_pairs(9)
    swapped = [EncodedPair(p.row, p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in pairs]
    first, second = (
        ev.pair_values(direct(*llamas, rows), objective, {"beta": 0.3, "gamma": 0.0}) for rows in (pairs, swapped)
    )
    for name in ("own_accuracy", "accuracy_logratio", "accuracy_mean"):
        assert second[name].mean().item() == pytest.approx(1 - first[name].mean().item())
    assert 0 < first["accuracy_logratio"].mean() < 1


def test_a_missing_guide_is_named(llamas):
    stats = ev.pair_stats(llamas[0], llamas[1], encoded_pairs(), 0)
    with pytest.raises(ValueError, match="guide_logps"):
        ev.pair_values(stats, "tgdpo", HYPERPARAMETERS["tgdpo"])


def test_the_cache_spares_the_frozen_models_and_knows_the_pairs(llamas):
    policy, ref, guide = llamas
    cache, calls, pairs = {}, [], encoded_pairs()
    handles = [
        m.register_forward_hook(lambda *_, n=n: calls.append(n))
        for n, m in (("ref", ref.model), ("guide", guide.model))
    ]
    first = ev.pair_stats(policy, ref, pairs, 0, batch_size=2, guide=guide, cache=cache)
    calls.clear()
    second = ev.pair_stats(policy, ref, pairs, 0, batch_size=2, guide=guide, cache=cache)
    probes = 2 * ["ref", "guide"]  # ResponseReader tries each model once, on four tokens
    assert sorted(calls) == sorted(probes)
    for name in ("ref_logps", "kl", "guide_logps"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    other = [EncodedPair(p.row, p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in pairs]
    swapped = ev.pair_stats(policy, ref, other, 0, batch_size=2, guide=guide, cache=cache)
    for handle in handles:
        handle.remove()
    fresh = ev.pair_stats(policy, ref, other, 0, batch_size=2, guide=guide)
    assert torch.equal(swapped.ref_logps, fresh.ref_logps)


# ---- all together


def run(models, tokenizer, **changes) -> ev.Evaluation:
    settings = {"pairs": encoded_pairs(), "max_new_tokens": 6, "batch_size": 4, "seed": 7, "judge": Shouting()}
    return ev.evaluate(models[0], models[1], tokenizer, PROMPTS, Shouting(), **settings | changes)


def test_what_people_call_takes_the_fast_path(llamas, tokenizer, monkeypatch):
    taken = []
    monkeypatch.setattr(
        ev, "pair_stats", lambda *_, **how: taken.append(how["pair_loss"]) or direct(*llamas, encoded_pairs())
    )
    for evaluate in (tpo_lib.evaluate, ev.evaluate):
        evaluate(*llamas[:2], tokenizer, PROMPTS, Shouting(), pairs=encoded_pairs(), max_new_tokens=2)
    assert taken == [fast.pair_loss, stats.pair_loss]


def test_evaluate_reports_everything_and_repeats_itself(llamas, tokenizer):
    first, second = run(llamas, tokenizer), run(llamas, tokenizer)
    assert first.metrics == second.metrics
    assert first.samples == second.samples
    assert run(llamas, tokenizer, seed=8).samples != first.samples
    names = "reward judge kl entropy rare ref_perplexity distinct_2 repetition length seqkl_chosen seqkl_rejected seqkl_margin"
    names += " accuracy_logratio accuracy_mean own_accuracy own_margin"
    assert list(first.metrics) == names.split()
    for metric in first.metrics.values():
        assert metric.low <= metric.mean <= metric.high
    assert [sample.prompt for sample in first.samples] == PROMPTS
    rewards = [sample.reward for sample in first.samples]
    assert first.metrics["reward"].mean == pytest.approx(sum(rewards) / 4)
    assert first.by_prompt["reward"].tolist() == pytest.approx(rewards)
    assert set(first.by_prompt) == set(names.split()) - {"ref_perplexity", "distinct_2"} | {"ref_nats"}
    for name in set(first.by_prompt) - {"ref_nats"}:
        assert first.metrics[name].mean == pytest.approx(first.by_prompt[name].mean().item()), name
    assert first.metrics["ref_perplexity"].mean == pytest.approx(first.by_prompt["ref_nats"].mean().exp().item())


def test_several_samples_a_prompt_count_as_one_unit(llamas, tokenizer):
    result = run(llamas, tokenizer, samples_per_prompt=3, judge=None, pairs=None)
    assert "judge" not in result.metrics
    assert "own_accuracy" not in result.metrics
    assert [sample.prompt for sample in result.samples] == 3 * PROMPTS  # so that the first four have one each
    assert result.samples[0].judge is None
    assert {metric.n for metric in result.metrics.values()} == {4}
    assert {len(values) for values in result.by_prompt.values()} == {4}
    assert result.metrics["distinct_2_within"].mean == pytest.approx(
        result.by_prompt["distinct_2_within"].mean().item()
    )
    means = [sum(s.reward for s in result.samples[i::4]) / 3 for i in range(4)]
    assert result.by_prompt["reward"].tolist() == pytest.approx(means)
    assert result.metrics["length"].mean <= 6


def test_pairs_of_one_prompt_are_one_unit(llamas, tokenizer):
    pairs = encoded_pairs(6)
    same = [EncodedPair(p.row, pairs[i // 3].prompt_ids, p.chosen_ids, p.rejected_ids) for i, p in enumerate(pairs)]
    same.append(EncodedPair(6, pairs[0].prompt_ids, pairs[1].chosen_ids, pairs[1].rejected_ids))
    result = run(llamas, tokenizer, pairs=same)
    expected = ev.pair_values(direct(*llamas, same), None, None)
    for name, values in expected.items():
        assert result.metrics[name].mean == pytest.approx(values.mean().item(), rel=1e-4), name  # of pairs
        assert (result.metrics[name].n, len(result.by_prompt[name])) == (2, 2)
    assert result.metrics["reward"].n == 4


def test_a_second_judge_is_scored_beside_the_first(llamas, tokenizer):
    result = run(llamas, tokenizer, second_judge=lambda texts: [float(len(text)) for text in texts])
    lengths = [float(len(sample.text)) for sample in result.samples]
    assert result.by_prompt["second_judge"].tolist() == lengths
    assert list(result.metrics)[:3] == ["reward", "judge", "second_judge"]
    with pytest.raises(ValueError, match=r"returned shape \(1,\) for 2 texts"):
        run(llamas, tokenizer, second_judge=lambda texts: [0.5])


def test_batch_size_changes_nothing_that_is_measured(llamas, tokenizer):
    one, many = run(llamas, tokenizer, batch_size=1), run(llamas, tokenizer, batch_size=64)
    assert one.samples == many.samples
    for name, metric in one.metrics.items():
        assert metric.mean == pytest.approx(many.metrics[name].mean, rel=1e-4, abs=1e-5), name


def test_the_start_model_is_at_distance_zero(llamas, tokenizer):
    metrics = run([llamas[1], llamas[1]], tokenizer).metrics
    for name in ("kl", "seqkl_chosen", "seqkl_rejected", "own_margin"):
        assert metrics[name].mean == pytest.approx(0, abs=1e-6)
    assert metrics["own_accuracy"].mean == 0.5


def test_modes_and_the_global_random_state_are_put_back(llamas, tokenizer):
    policy = llamas[0]
    policy.train()
    policy.lm_head.eval()
    modes = [module.training for module in policy.modules()]
    state = torch.get_rng_state()
    run(llamas, tokenizer)
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    policy.eval()
    with pytest.raises(ValueError, match="guide_logps"):
        run(llamas, tokenizer, objective="tgdpo", hyperparameters=HYPERPARAMETERS["tgdpo"])
    assert not any(module.training for module in policy.modules())


def test_a_reward_reads_prompt_and_response_if_it_asks_for_both(llamas, tokenizer):
    full, response = Shouting("full"), Shouting()
    result = ev.evaluate(*llamas[:2], tokenizer, PROMPTS, full, judge=response, max_new_tokens=4)
    for reward in (full, response):  # each was tried before anything was sampled
        assert reward.seen[:2] == list(PROBE)
    assert full.seen[2:] == [sample.prompt + sample.text for sample in result.samples]
    assert response.seen[2:] == [sample.text for sample in result.samples]


def test_a_plain_function_of_texts_is_a_reward_and_its_scale_is_its_own(llamas, tokenizer):
    result = ev.evaluate(
        *llamas[:2], tokenizer, PROMPTS, lambda texts: [10.0 * len(text) for text in texts], max_new_tokens=4
    )
    lengths = [10.0 * len(sample.text) for sample in result.samples]
    assert [sample.reward for sample in result.samples] == lengths
    assert result.metrics["reward"].mean == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": [EncodedPair(7, [1], [2, 3])]}, "row 7 has no rejected side, so there is nothing to compare"),
        ({"judge": lambda texts: [0.5]}, r"returned shape \(1,\) for 2 texts"),
        ({"objective": "tdpo2", "hyperparameters": {"beta": 0.1}}, "tdpo2 cannot rank pairs without its alpha"),
        ({"objective": "tgdpo", "hyperparameters": HYPERPARAMETERS["tgdpo"]}, "without guide_logps of its guide"),
        ({"reference": build("llama", 64, 1)}, "the reference has a vocabulary of 64, the policy of 286"),
    ],
)
def test_what_must_fail_fails_before_anything_is_sampled(llamas, tokenizer, monkeypatch, changes, message):
    monkeypatch.setattr(ev, "sample_cached", lambda *_, **__: pytest.fail("sampled first"))
    models = [llamas[0], changes.pop("reference", llamas[1])]
    with pytest.raises(ValueError, match=message):
        run(models, tokenizer, **changes)


def test_it_samples_as_many_together_as_it_is_told(llamas, tokenizer, monkeypatch):
    asked, real = [], ev.sample_cached
    monkeypatch.setattr(ev, "sample_cached", lambda *a, **how: asked.append(how["batch_size"]) or real(*a, **how))
    for settings in ({}, {"sampled_together": 2}):
        ev.evaluate(*llamas[:2], tokenizer, PROMPTS, Shouting(), max_new_tokens=2, **settings)
    assert asked == [256, 2]


def test_samples_are_kept_when_scoring_fails(llamas, tokenizer, monkeypatch, tmp_path):
    def broken(texts):
        return [0.5] * len(texts) if texts[0] == PROBE[0] else [math.nan] * len(texts)

    expected = run(llamas, tokenizer).samples
    with pytest.raises(ValueError, match="gave text 0 of 4 the score nan"):
        run(llamas, tokenizer, judge=broken, cache_dir=tmp_path)
    monkeypatch.setattr(pairing, "generate", lambda *_, **__: pytest.fail("sampled again"))
    assert run(llamas, tokenizer, cache_dir=tmp_path).samples == expected


def test_dropout_does_not_act_while_evaluating(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=0, eos_token_id=0)).train()
    metrics = run([model, model], tokenizer).metrics
    assert metrics["kl"].mean == pytest.approx(0, abs=1e-6)


def test_no_prompts_are_refused(llamas, tokenizer):
    with pytest.raises(ValueError, match="at least one prompt"):
        ev.evaluate(*llamas[:2], tokenizer, [], Shouting())
