"""Guides by a spec: what they say at which token, that they are fixed, and what training makes of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import tiny
import torch

from tpo_lib import train
from tpo_lib.config import TrainConfig
from tpo_lib.data import collate
from tpo_lib.losses import tgdpo
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.rewards import AdditiveReward
from tpo_lib.runs import run
from tpo_lib.stats import from_readings, response_mask, split, unpack
from tpo_lib.studies import guides
from tpo_lib.studies.guides import Average, make, matched_beta
from tpo_lib.types import PairBatch, Reading

BETA = 0.2


def additive(tokenizer=None, seed: int = 5):
    draw = torch.Generator().manual_seed(seed)
    tokenizer = tokenizer or tiny.letters()
    unigram, bigram = (torch.randn(n, generator=draw) for n in (tiny.VOCAB, 32))
    return AdditiveReward(tokenizer, unigram, bigram, 0.3)


def known(**changes) -> dict:
    """A stand-in of everything that a spec may need; ids of `tiny.pairs` never hold the EOS of the tokenizer."""
    tokenizer = tiny.letters()
    given = {"reference": tiny.llama(0), "tokenizer": tokenizer, "beta": BETA, "model": tiny.llama(1)}
    return given | {"reward": additive(tokenizer)} | changes


def r_hat(guide: guides.Guide, batch: PairBatch, reference=None) -> torch.Tensor:
    """(N, T-1) BETA (log pi_hat - log pi_ref) as training reads it."""
    reference = reference or tiny.llama(0)
    with torch.no_grad():
        tokens = from_readings(ResponseReader(reference)(batch), batch.labels, guide=guide.reader(batch))
    return BETA * torch.where(tokens.mask, tokens.guide_logps - tokens.logps, 0.0)


def of_model(batch: PairBatch, seed: int = 1) -> torch.Tensor:
    """The same of a model, each sequence on its own and without padding."""
    mask, rows = response_mask(batch.labels), []
    for ids, attention, on in zip(batch.input_ids, batch.attention_mask, mask, strict=True):
        ids = ids[attention.bool()]
        said = [tiny.llama(s)(ids[None]).logits[0].detach().log_softmax(-1)[:-1] for s in (seed, 0)]
        logps = [each.gather(-1, ids[1:, None])[:, 0] for each in said]
        rows.append(torch.nn.functional.pad(BETA * (logps[0] - logps[1]), (0, len(on) - len(ids) + 1)) * on)
    return torch.stack(rows)


def test_a_model_says_what_it_says_at_every_response_token_and_nowhere_else():
    pairs = tiny.pairs(7)
    guide = make({"kind": "model"}, pairs, **known())
    batch = collate([pairs[i] for i in (4, 0, 6)])  # other rows, another order, another width
    torch.testing.assert_close(r_hat(guide, batch), of_model(batch), rtol=0, atol=1e-5)
    everything = of_model(collate(pairs))
    on = everything[response_mask(collate(pairs).labels)]
    assert guide.note["std"] == pytest.approx(on.std(correction=0).item(), rel=1e-4)
    assert guide.note["mean_chosen"] == pytest.approx(
        (everything[:7].sum() / response_mask(collate(pairs).labels)[:7].sum()).item(), rel=1e-3
    )


def test_training_is_the_same_with_the_model_and_with_its_guide():
    config = TrainConfig(
        loss_type="tgdpo",
        alpha=1.0,
        guide_beta=BETA,
        batch_size=4,
        epochs=2,
        lr=1e-2,
        device="cpu",
        log_every=1,
    )
    pairs, rows = tiny.pairs(8), []
    guide = make({"kind": "model"}, pairs, **known())
    for each in (tiny.llama(1), guide.reader):
        result = train.fit(config, tiny.llama(0), tiny.llama(0), pairs, guide=each, progress=False)
        rows.append([row["loss"] for row in result.metrics])
    assert rows[1] == pytest.approx(rows[0], abs=1e-5)
    assert len(set(rows[0])) == 4


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_keeps_each_response_s_values_and_loses_their_place(seed):
    pairs = tiny.pairs(6, longest=20)
    guide = make({"kind": "shuffled", "seed": seed}, pairs, **known())
    batch = collate(pairs)
    here, there, mask = r_hat(guide, batch), of_model(batch), response_mask(batch.labels)
    for one, other, on in zip(here, there, mask, strict=True):
        torch.testing.assert_close(one[on].sort().values, other[on].sort().values, rtol=0, atol=1e-5)
        assert not one[~on].any()
    assert (here - there).abs().max() > 0.05
    other = make({"kind": "shuffled", "seed": seed + 1}, pairs, **known())
    assert (r_hat(other, batch) - here).abs().max() > 0.05


@pytest.mark.parametrize("spec", [{"kind": "shuffled"}, {"kind": "random", "std": 0.5}])
def test_what_is_drawn_is_fixed_by_the_row_s_content(spec):
    """Not by its number, nor by what stands beside it."""
    pairs = tiny.pairs(6)
    later = [replace(pairs[i], row=row) for row, i in enumerate((5, 2))]
    first = r_hat(make(spec, pairs, **known()), collate([pairs[5], pairs[2]]))
    torch.testing.assert_close(r_hat(make(spec, later, **known()), collate(later)), first, rtol=0, atol=1e-5)


def test_random_has_the_spread_it_is_told_or_the_model_s_and_no_mean():
    pairs = tiny.pairs(60, longest=40)
    batch = collate(pairs)
    mask = response_mask(batch.labels)
    for spec, std in (({"std": 0.5}, 0.5), ({}, of_model(batch)[mask].std().item())):
        drawn = r_hat(make({"kind": "random"} | spec, pairs, **known()), batch)[mask]
        assert drawn.std().item() == pytest.approx(std, rel=0.05)
        assert abs(drawn.mean().item()) < 3 * std / len(drawn) ** 0.5
    assert make({"kind": "random", "std": 0.5}, pairs, **known(model=None)).reader, "a number needs no model"


def test_the_oracle_says_the_true_credit_up_to_its_scale():
    pairs = tiny.pairs(6, longest=20)
    batch, setting = collate(pairs), known()
    mask, reward = response_mask(batch.labels), setting["reward"]
    credit = [
        reward.token_credit(torch.tensor(ids))
        for ids in [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    ]
    true = unpack(torch.cat(credit), mask)  # spelled out: response by response, its first token after "the beginning"
    for spec, std in (({"std": 0.7}, 0.7), ({}, of_model(batch)[mask].std(correction=0).item())):
        guide = make({"kind": "oracle"} | spec, pairs, **setting)
        here = r_hat(guide, batch)
        torch.testing.assert_close(here, true * std / true[mask].std(correction=0), rtol=0, atol=1e-5)
        assert guide.note["std"] == pytest.approx(std, rel=1e-4)
        assert guide.note["credit_rho"] == pytest.approx(1.0)
    centred = r_hat(make({"kind": "oracle", "std": 0.7, "centred": True}, pairs, **setting), batch)
    assert abs(centred[mask].mean().item()) < 1e-5
    shift = (here[mask] / here[mask].std() - centred[mask] / centred[mask].std()).std()
    assert shift < 1e-5, "centring moves all tokens alike"


def test_credits_sum_to_the_log_odds_of_the_score_on_the_bundled_model(small_stage):
    """Exact ids, exact masks, the first token after the beginning of a text, and no credit for the token that ends it."""
    stage = small_stage
    mask = response_mask(collate(stage.pairs).labels)
    credit = guides.true_credit(stage.reward, stage.tokenizer, stage.start, stage.pairs, mask)
    rows = [stage.table[pair.row] for pair in stage.pairs]
    scores = torch.tensor([row["chosen_score"] for row in rows] + [row["rejected_score"] for row in rows])
    torch.testing.assert_close(torch.sigmoid(stage.reward.bias + credit.sum(-1)), scores, rtol=0, atol=1e-5)


def test_the_token_that_ends_a_response_has_no_credit():
    """`score_ids` scores the tokens before it; inside a response the same id would count."""
    reward, (pair,) = known()["reward"], tiny.pairs(1)
    ended = replace(pair, chosen_ids=[*pair.chosen_ids, 0])  # EOS is 0
    mask = response_mask(collate([ended]).labels)
    credit = guides.true_credit(reward, tiny.letters(), tiny.llama(), [ended], mask)
    own = credit[0][mask[0]]
    torch.testing.assert_close(own, torch.cat([reward.token_credit(torch.tensor(pair.chosen_ids)), torch.zeros(1)]))
    assert reward.token_credit(torch.tensor(ended.chosen_ids))[-1] != 0
    assert torch.sigmoid(reward.bias + own.sum()).item() == pytest.approx(reward.score_ids([pair.chosen_ids]).item())


def test_the_oracle_knows_the_credit_and_a_random_guide_does_not(small_stage):
    setting = {
        "reference": small_stage.start,
        "tokenizer": small_stage.tokenizer,
        "beta": 0.1,
        "reward": small_stage.reward,
    }
    for spec, low, high in (({"kind": "oracle", "std": 0.5}, 0.999, 1.0), ({"kind": "random", "std": 0.5}, -0.1, 0.1)):
        assert low <= make(spec, small_stage.pairs, **setting).note["credit_rho"] <= high + 1e-9


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ({"kind": "mood"}, {}, r"kind='mood' is no guide; choose one of none, model, shuffled, random, oracle, ema"),
        ({}, {}, r"kind=None is no guide"),
        ({"kind": "model", "std": 1.0}, {}, r"kind 'model' does not take std; it takes nothing else"),
        ({"kind": "random", "std": -1.0}, {}, r"std=-1\.0 must be greater than 0"),
        ({"kind": "shuffled"}, {"model": None}, r"kind 'shuffled' needs model=, a DPO policy$"),
        ({"kind": "oracle"}, {"model": None}, r"kind 'oracle' needs model=, a DPO policy, or std"),
        (
            {"kind": "oracle", "std": 1.0},
            {"reward": len},
            r"needs a reward whose token_credit reads the model's own token ids",
        ),
        ({"kind": "ema", "decay": 1.0}, {}, r"decay=1\.0 must be less than 1"),
    ],
)
def test_a_spec_that_cannot_be_carried_out_is_refused(spec, changes, message):
    with pytest.raises(ValueError, match=message):
        make(spec, tiny.pairs(3), **known(**changes))


def test_pairs_of_one_row_are_refused_and_nothing_is_no_guide():
    with pytest.raises(ValueError, match=r"3 pairs have 2 rows"):
        make({"kind": "model"}, [replace(p, row=p.row // 2) for p in tiny.pairs(3)], **known())
    assert make({"kind": "none"}, tiny.pairs(3), **known()).reader is None


# a guide that follows the policy

CONFIG = TrainConfig(
    loss_type="tgdpo",
    alpha=2.0,
    guide_beta=0.1,
    batch_size=4,
    epochs=2,
    lr=3e-2,
    device="cpu",
    log_every=1,
    eval_every=1,
)


def averaged(decay: float, config: TrainConfig = CONFIG):
    """A run with its averaged guide: the weights of the policy after every callback, and the guide."""
    start, seen = tiny.llama(0), []
    guide = make({"kind": "ema", "decay": decay}, [], reference=start, tokenizer=tiny.letters(), beta=0.1)
    keep = lambda step, policy: seen.append((step, frozen_copy(policy)))  # noqa: E731
    more = {"guide": guide.reader, "callbacks": [keep, *guide.callbacks], "progress": False}
    result = train.fit(config, tiny.llama(0), start, tiny.pairs(8), **more)
    return seen, guide.reader, [row["loss"] for row in result.metrics]


@pytest.mark.parametrize(("decay", "every"), [(0.0, 1), (0.7, 1), (0.7, 2)])
def test_the_average_is_that_of_the_policy_s_weights(decay, every):
    seen, average, _ = averaged(decay, replace(CONFIG, eval_every=every))
    assert [step for step, _ in seen] == list(range(0, 5, every))
    expected = {name: value.clone() for name, value in tiny.llama(0).named_parameters()}
    for (before, _), (step, policy) in itertools.pairwise(seen):
        keep = decay ** (step - before)
        expected = {
            name: keep * value + (1 - keep) * dict(policy.named_parameters())[name] for name, value in expected.items()
        }
    for name, value in average.model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert not value.requires_grad
    assert (
        max((v - dict(tiny.llama(0).named_parameters())[n]).abs().max() for n, v in average.model.named_parameters())
        > 1e-3
    )


def test_the_first_update_is_dpo_s_and_the_next_ones_are_guided():
    plain = []
    keep = lambda step, policy: plain.append(frozen_copy(policy).lm_head.weight)  # noqa: E731
    dpo = replace(CONFIG, loss_type="dpo", hyper={})
    train.fit(dpo, tiny.llama(0), tiny.llama(0), tiny.pairs(8), callbacks=[keep], progress=False)
    guided = [policy.lm_head.weight for _, policy in averaged(0.0)[0]]
    torch.testing.assert_close(guided[1], plain[1], rtol=0, atol=1e-6)
    assert (guided[3] - plain[3]).abs().max() > 1e-3


def test_it_reads_as_the_model_that_it_is():
    _, average, _ = averaged(0.5)
    batch = collate(tiny.pairs(3))
    assert isinstance(average(batch), Reading)
    plain = average.model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1][
        response_mask(batch.labels)
    ]
    torch.testing.assert_close(average(batch).logits(), plain, rtol=1e-4, atol=1e-5)


def test_an_average_that_missed_the_beginning_or_adapters_is_refused():
    with pytest.raises(RuntimeError, match=r"goes on at update 3, but its averaged guide was not kept"):
        Average(tiny.llama(), 0.5).update(3, tiny.llama())
    with pytest.raises(ValueError, match=r"train without lora_rank"):
        Average(tiny.llama(), 0.5).update(0, torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"the guide is a reader: give its model, if it is frozen, or train with train\.fit"
    ):
        run.fit(CONFIG, tiny.llama(0), tiny.llama(0), tiny.pairs(8), guide=Average(tiny.llama(1), 0.5), progress=False)


# the control without guidance


def test_matched_beta_is_the_mean_weight_that_was_written_out():
    pairs = tiny.pairs(9)
    setting, hyper = known(), {"beta": 0.4, "alpha": 1.5, "guide_beta": BETA}
    guide = make({"kind": "model"}, pairs, **setting)
    found = matched_beta(guide, pairs, reference=setting["reference"], **hyper)
    batch = collate(pairs)
    with torch.no_grad():
        tokens = from_readings(
            ResponseReader(tiny.llama(0))(batch),
            batch.labels,
            ResponseReader(tiny.llama(0))(batch),
            guide=guide.reader(batch),
        )
    f = tgdpo(*split(tokens), **hyper).token_weights
    pull = torch.where(tokens.mask, 1 - tokens.logps.exp(), 0.0)
    assert found["f"] == pytest.approx(((f * pull).sum() / pull.sum()).item(), rel=1e-5)
    assert found["beta"] == pytest.approx(0.4 * found["f"])
    assert found["f_chosen"] == pytest.approx(((f * pull)[:9].sum() / pull[:9].sum()).item(), rel=1e-5)
    assert found["f_rejected"] == pytest.approx(((f * pull)[9:].sum() / pull[9:].sum()).item(), rel=1e-5)
    assert found["f_plain"] == pytest.approx((f.sum() / tokens.mask.sum()).item(), rel=1e-5)
    assert found["floor_share"] == pytest.approx(((f <= 0.01) & tokens.mask).sum().item() / tokens.mask.sum().item())


def test_the_matched_beta_s_step_is_as_long_as_the_guided_one_where_f_is_the_same_everywhere():
    """f = 1 + alpha r on the chosen side of a guide that says r at every token: DPO at beta f has the same gradient."""
    pairs, setting = tiny.pairs(5), known()
    spec = {"kind": "random", "std": 1e-9}
    guide = make(spec, pairs, **setting)
    found = matched_beta(guide, pairs, reference=setting["reference"], beta=0.3, alpha=2.0, guide_beta=BETA)
    assert (found["f"], found["beta"], found["floor_share"]) == (
        pytest.approx(1, abs=1e-5),
        pytest.approx(0.3, abs=1e-5),
        0,
    )
    with pytest.raises(ValueError, match="dpo has no token weights"):
        matched_beta(guide, pairs, reference=setting["reference"], loss_type="dpo")
