"""PPO and RLOO: exact in the enumerable world, hand-worked numbers, what is masked, and that a small model learns by them."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from tpo_course.world import TokenWorld
from tpo_lib import evaluation, ppo, stats
from tpo_lib.data import EncodedPair, collate
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.models import frozen_copy
from tpo_lib.ppo import PPOConfig
from tpo_lib.rewards import load_reward
from tpo_lib.sampling import Completion
from tpo_lib.train import NonFiniteLoss
from tpo_lib.types import PairBatch

BETA = 0.3
ONE_STEP = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9, "kl_coef": BETA}


# ---- the enumerable world: an update is the exact policy gradient


class Table(nn.Module):
    """A policy and its values with a row for every state, read as an Actor is: the ids of its batches are states."""

    def __init__(self, logits, values=None):
        super().__init__()
        self.logits, self.values = nn.Parameter(logits.clone()), values

    def forward(self, batch):
        mask = stats.response_mask(batch.labels)
        states = batch.input_ids[:, :-1][mask]
        values = None if self.values is None else stats.unpack(self.values[states], mask)
        return self.logits[states], values


class World:
    """Token probabilities of 1/2, 1/4 and 1/4, so that a batch can hold each response as often as it is likely."""

    def __init__(self, horizon, prompts):
        self.world = TokenWorld(vocab_size=3, horizon=horizon, seed=3, num_prompts=prompts)
        self.world.prompt_probs = torch.full((prompts,), 1 / prompts, dtype=torch.float64)
        draw = torch.Generator().manual_seed(1)
        odds = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
        self.logits = torch.stack([odds[torch.randperm(3, generator=draw)] for _ in range(self.world.num_states)]).log()
        often = (self.world.sequence_logps(self.logits).exp() * 4**horizon).round().long()  # (R,)
        assert often.sum() == prompts * 4**horizon
        self.rows = torch.arange(len(often)).repeat_interleave(
            often
        )  # (N,) of the responses, those of a prompt side by side

    def batch(self, rows):
        responses = self.world.responses
        ids = torch.cat([responses.states[rows], torch.zeros_like(rows)[:, None]], dim=1)  # (N, T + 1)
        return PairBatch(ids, torch.ones_like(ids), responses.labels[rows], torch.arange(len(rows)))

    def gradient(self):
        """(S, V) gradient of E[score - beta log(pi/pi_ref)], by backward recursion instead of by samples."""
        logits = self.logits.clone().requires_grad_()
        values = self.world.regularised_values(logits.log_softmax(-1), BETA)
        return torch.autograd.grad(self.world.expected(values.v), logits)[0]

    def update(self, config, rows, values=None):
        """(S, V) change of the logits by one plain gradient step of size 1, and response tokens a sequence."""
        actor, frozen = Table(self.logits, values), Table(self.world.ref_logps)
        batch, scores = self.batch(rows), self.world.returns[rows]
        experience, _ = ppo.appraise(config, actor, frozen, batch, scores, config.kl_coef)
        optimizer = torch.optim.SGD(actor.parameters(), lr=1.0)
        ppo.improve(config, actor, optimizer, batch, experience, np.random.default_rng(0))
        return actor.logits.detach() - self.logits, (experience.mask.sum() / len(rows)).item()

    def true_values(self, rows):
        """(S,) mean return to go of the responses that pass through a state: exact, since the batch is the distribution."""
        responses, mask = self.world.responses, self.world.responses.mask[rows]
        drift = self.world.tokenwise(self.logits - self.world.ref_logps)[rows]
        rewards = ppo.token_rewards(self.world.returns[rows], drift, torch.zeros_like(drift), mask, BETA)
        to_go = rewards.flip(1).cumsum(1).flip(1)
        states, count = responses.states[rows][mask], torch.zeros(self.world.num_states, dtype=torch.float64)
        total = count.index_add(0, states, to_go[mask])
        return total / count.index_add(0, states, torch.ones_like(to_go[mask])).clamp_min(1)


@pytest.fixture(scope="module")
def small():
    return World(horizon=3, prompts=2)


def unwhitened(monkeypatch):
    monkeypatch.setattr(ppo, "whiten", lambda values, mask, **_: values)


@pytest.mark.parametrize("critic", ["none", "any", "true"])
def test_an_update_is_the_exact_policy_gradient(small, monkeypatch, critic):
    """Whatever the critic says where lambda is 1; where it is not, with the true values."""
    unwhitened(monkeypatch)
    draw = torch.Generator().manual_seed(5)
    anything = torch.randn(small.world.num_states, generator=draw, dtype=torch.float64)
    values = {"none": None, "any": anything, "true": small.true_values(small.rows)}[critic]
    config = PPOConfig(lam=0.7 if critic == "true" else 1.0, **ONE_STEP)
    change, length = small.update(config, small.rows, values)
    assert torch.allclose(change * length, small.gradient(), atol=1e-12, rtol=1e-9)


def test_a_wrong_critic_biases_where_lambda_is_less_than_1(small, monkeypatch):
    unwhitened(monkeypatch)
    change, length = small.update(PPOConfig(lam=0.7, **ONE_STEP), small.rows)  # values of 0
    assert (change * length - small.gradient()).abs().max() > 1e-2


def test_whitening_changes_the_length_of_the_gradient_alone(small):
    change, _ = small.update(PPOConfig(lam=1.0, **ONE_STEP), small.rows)
    exact = small.gradient()
    assert torch.allclose(change / change.norm(), exact / exact.norm(), atol=1e-10)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_the_critic_is_told_what_came(small, lam):
    """All that came after a state where lambda is 1, else in part its own word; on average the same, since it is right here."""
    batch, mask = small.batch(small.rows), small.world.responses.mask[small.rows]
    scores, values = small.world.returns[small.rows], small.true_values(small.rows)
    config = PPOConfig(lam=lam, **ONE_STEP)
    actor, frozen = Table(small.logits, values), Table(small.world.ref_logps)
    found, _ = ppo.appraise(config, actor, frozen, batch, scores, BETA)
    drift = small.world.tokenwise(small.logits - small.world.ref_logps)[small.rows]
    to_go = ppo.token_rewards(scores, drift, torch.zeros_like(drift), mask, BETA).flip(1).cumsum(1).flip(1)
    assert torch.allclose(found.returns[mask], to_go[mask]) == (lam == 1)
    assert found.returns[mask].mean().item() == pytest.approx(to_go[mask].mean().item())
    assert torch.equal(found.values, torch.where(mask, values[batch.input_ids[:, :-1]], 0.0))


def test_a_long_gradient_is_cut_to_its_most(small):
    config = PPOConfig(lam=1.0, **ONE_STEP | {"max_grad_norm": 0.01})
    assert small.update(config, small.rows)[0].norm().item() == pytest.approx(0.01, rel=1e-3)


def test_whitened_rewards_keep_their_mean_and_are_what_is_returned(small):
    batch, scores, mask = (
        small.batch(small.rows),
        small.world.returns[small.rows],
        small.world.responses.mask[small.rows],
    )
    actor, config = Table(small.logits), PPOConfig(whiten_rewards=True, lam=1.0, **ONE_STEP | {"kl_coef": 0.0})
    experience, _ = ppo.appraise(config, actor, actor, batch, scores, 0.0)
    to_go = ppo.whiten(
        ppo.token_rewards(scores, *[torch.zeros(mask.shape).double()] * 2, mask, 0.0), mask, keep_mean=True
    )
    assert torch.allclose(experience.returns, torch.where(mask, to_go.flip(1).cumsum(1).flip(1), 0.0))
    assert to_go[mask].mean().item() == pytest.approx((scores.sum() / mask.sum()).item())


def test_rloo_is_unbiased(monkeypatch):
    """All pairs of independent responses, each as often as it is likely: the mean over them is the mean over samples."""
    unwhitened(monkeypatch)
    world = World(horizon=2, prompts=2)
    halves = world.rows.view(2, -1).tolist()
    rows = torch.tensor([row for half in halves for pair in itertools.product(half, half) for row in pair])
    change, length = world.update(PPOConfig(estimator="rloo", samples_per_prompt=2, **ONE_STEP), rows)
    assert torch.allclose(change * length, world.gradient(), atol=1e-12, rtol=1e-9)


# ---- by hand


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


TRUE = torch.ones(1, 3, dtype=torch.bool)


def test_gae_by_hand():
    """delta 0 + .1 - .5 = -.4, 0 + .3 - .2 = .1, 1 - .6 = .4; A 0.4, .1 + .25 x .4, -.4 + .25 x .2."""
    found = ppo.gae(row(0, 0, 1), row(0.5, 0.2, 0.6), TRUE, gamma=0.5, lam=0.5)
    assert torch.allclose(found, row(-0.35, 0.2, 0.4))


def test_gae_reads_nothing_outside_the_response():
    mask = torch.tensor([[False, True, True, True, False, False]])
    found = ppo.gae(row(0, 0, 0, 1, 0, 0), row(9, 0.5, 0.2, 0.6, 7, math.inf), mask, gamma=0.5, lam=0.5)
    assert torch.allclose(found, row(0, -0.35, 0.2, 0.4, 0, 0))


def test_the_extremes_of_lambda():
    rewards, values = row(1, 2, 4), row(0.5, 3, 1)
    assert torch.allclose(ppo.gae(rewards, values, TRUE, gamma=1, lam=1), row(7, 6, 4) - values)  # returns
    assert torch.allclose(ppo.gae(rewards, values, TRUE, gamma=1, lam=0), row(1 + 3, 2 + 1, 4) - values)  # one step


def test_rloo_by_hand():
    rewards = torch.tensor([[0.0, 1], [2, 0], [3, 3], [5, 0], [0, 0], [1, 0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False], [True, False], [True, False]])
    found = ppo.leave_one_out(rewards, mask, samples=3)  # returns 1 2 6 | 5 0 1
    expected = torch.tensor([-3.0, -1.5, 4.5, 4.5, -3, -1.5])
    assert torch.equal(found, torch.where(mask, expected[:, None], 0.0))


def test_the_price_of_the_kl_and_the_score_at_the_last_token():
    logps, ref_logps = torch.tensor([[0.0, -1, -2, 0]]), torch.tensor([[0.0, -3, -1, 0]])
    mask = torch.tensor([[False, True, True, False]])
    found = ppo.token_rewards(torch.tensor([10.0]), logps, ref_logps, mask, 0.5)
    # a token that the policy likes better than the reference costs, the other way round it pays
    assert torch.equal(found, torch.tensor([[0.0, -1, 10.5, 0]]))


def test_whitening():
    values, mask = row(1, 2, 6, 1e9), torch.tensor([[True, True, True, False]])
    both, scaled = ppo.whiten(values, mask), ppo.whiten(values, mask, keep_mean=True)
    for found, mean in ((both, 0.0), (scaled, 3.0)):
        assert found[mask].mean().item() == pytest.approx(mean)
        assert found[mask].std(correction=0).item() == pytest.approx(1)
        assert found[0, 3] == 0
    assert ppo.whiten(torch.ones(1, 3), TRUE).abs().max() == 0  # nothing to tell apart: no advantage, and no NaN


def old(logps, advantages, values=(0,), returns=(0,)):
    return ppo.Experience(
        torch.ones(1, 1, dtype=torch.bool), row(*logps), row(*values), row(*advantages), row(*returns)
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2, -2, -2),
        (1.1, 2, -2.2, -2.2),
        (1.5, 2, -2.4, 0),  # far enough up
        (1.5, -2, 3, 3),  # the wrong way: nothing is clipped
        (0.5, -2, 1.6, 0),  # far enough down
        (0.5, 2, -1, -1),
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, gradient):
    logps = row(math.log(ratio)).requires_grad_()
    found, metrics = ppo.objective(PPOConfig(clip=0.2), logps, None, old([0], [advantage]))
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(gradient)  # d ratio / d log-ratio = ratio
    assert metrics["policy/clipfrac_avg"].item() == (gradient == 0)
    assert metrics["val/ratio"].item() == pytest.approx(ratio)
    assert metrics["policy/approxkl_avg"].item() == pytest.approx(math.log(ratio) ** 2 / 2)


@pytest.mark.parametrize(
    ("value", "before", "loss", "clipped"),
    [
        (0.6, 0.5, 0.08, False),  # (.6 - 1)^2 / 2
        (0.9, 0.5, 0.045, True),  # it moved by .4, and counts as having moved by .2
        (0.1, 0.5, 0.405, False),  # the wrong way: the larger loss counts
    ],
)
def test_the_critics_loss_by_hand(value, before, loss, clipped):
    config = PPOConfig(value_clip=0.2, value_coef=0.5)
    found, metrics = ppo.objective(config, row(0), row(value), old([0], [0], [before], [1]))
    assert metrics["loss/value_avg"].item() == pytest.approx(loss)
    assert found.item() == pytest.approx(0.5 * loss)
    assert metrics["val/clipfrac_avg"].item() == clipped


@pytest.mark.parametrize(
    ("kl", "factor"), [(12, 1 + 0.2 * 64 / 1000), (6.6, 1 + 0.1 * 64 / 1000), (0, 1 - 0.2 * 64 / 1000)]
)
def test_kl_coef_follows_its_target(kl, factor):
    config = PPOConfig(kl_target=6, kl_horizon=1000, prompts_per_update=32, samples_per_prompt=2)
    assert ppo.adapted(config, 0.1, kl) == pytest.approx(0.1 * factor)
    assert ppo.adapted(PPOConfig(), 0.1, kl) == 0.1


# ---- with a language model


VOCAB = 300
SMALL = {"prompts_per_update": 4, "samples_per_prompt": 2, "max_new_tokens": 6, "epochs": 2, "minibatches": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def vowels(texts):
    return [float(sum(text.count(letter) for letter in "aeiou")) for text in texts]


def run(tokenizer, policy=None, reference=None, reward=vowels, prompts=tiny.TEXT[:5], **settings):
    told = {name: settings.pop(name) for name in ("callbacks", "on_log") if name in settings}
    policy = policy or tiny.llama(vocab=VOCAB)
    reference = reference or frozen_copy(policy)
    config = PPOConfig(**{"updates": 3, "lr": 1e-2, **SMALL, **settings})
    return ppo.fit(config, policy, reference, tokenizer, reward, prompts, progress=False, **told)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"estimator": "rloo"}], ids=str)
def test_the_ratio_is_1_in_the_first_minibatch_of_every_update(tokenizer, monkeypatch, settings):
    ratios, plain = [], ppo.objective

    def spy(config, logps, values, before):
        ratios.append((logps - before.logps).detach().exp()[before.mask])
        return plain(config, logps, values, before)

    monkeypatch.setattr(ppo, "objective", spy)
    run(tokenizer, **settings)
    assert len(ratios) == 3 * 2 * 2
    away = [(ratio - 1).abs().max().item() for ratio in ratios]
    assert max(away[::4]) < 1e-5
    assert min(away[1::4]) > 1e-3  # and no longer in the second


@pytest.mark.parametrize("estimator", ["ppo", "rloo"])
def test_what_a_run_leaves(tokenizer, estimator):
    steps, seen, policy = [], [], tiny.llama(vocab=VOCAB)
    settings = {"callbacks": [lambda step, model: steps.append((step, model is policy))], "on_log": seen.append}
    result = run(tokenizer, policy, estimator=estimator, **settings)
    assert steps == [(step, True) for step in range(4)]
    assert (result.steps, result.policy, result.metrics) == (3, policy, seen)
    assert [each["step"] for each in seen] == [1, 2, 3]
    assert [each["lr"] for each in seen] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert {each["kl_coef"] for each in seen} == {PPOConfig().kl_coef}
    first, last = seen[0], seen[-1]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/scores"])
    assert last["objective/kl"] > 0.01
    assert 0 < last["policy/entropy_avg"] < math.log(VOCAB)
    assert last["tokens"] == pytest.approx(8 * sum(each["val/length"] for each in seen))
    assert first["seconds"] < last["seconds"]
    assert 0 < last["seconds/sampling"] < last["seconds"]
    critics = {"loss/value_avg", "val/clipfrac_avg", "val/explained"}
    assert critics & set(last) == (critics if estimator == "ppo" else set())
    assert (result.critic is None) == (estimator == "rloo")
    if result.critic is not None:
        assert first["val/explained"] == 0  # it begins at 0, and learns
        assert result.critic.weight.abs().max() > 0


def test_a_run_repeats_and_depends_on_its_seed(tokenizer):
    def told(seed):
        return [each["objective/scores"] for each in run(tokenizer, seed=seed).metrics]

    assert told(1) == told(1) != told(2)


def test_on_log_ends_a_run(tokenizer):
    assert run(tokenizer, on_log=lambda row: row["step"] == 2).steps == 2


def test_the_kl_is_the_one_that_evaluation_measures(tokenizer, monkeypatch):
    drawn, plain = [], ppo.generate

    def spy(policy, tokenizer, prompts, **settings):
        found = plain(policy, tokenizer, prompts, **settings)
        drawn.append((prompts, found))
        return found

    monkeypatch.setattr(ppo, "generate", spy)
    policy, reference = tiny.llama(seed=1, vocab=VOCAB), tiny.llama(vocab=VOCAB)
    row = run(tokenizer, frozen_copy(policy).requires_grad_(True), reference, updates=1).metrics[0]
    ((prompts, several),) = drawn
    flat = [completion for group in several for completion in group]
    sums = evaluation.sequence_kl(policy, reference, tokenizer, [p for p in prompts for _ in range(2)], flat)
    assert row["objective/kl"] == pytest.approx(sums.kl.mean().item(), rel=1e-5)
    assert row["policy/entropy_avg"] == pytest.approx((sums.entropy.sum() / sums.steps.sum()).item(), rel=1e-5)


def test_the_temperature_divides_the_logits_of_both():
    model, batch = tiny.llama(), collate([EncodedPair(0, [1, 2], [3, 4, 5])])
    warm, plain = (ppo.Actor(PPOConfig(temperature=t), model, critic=False)(batch)[0] for t in (2.0, 1.0))
    assert torch.allclose(warm * 2, plain)


def test_samples_are_drawn_as_they_are_read(tokenizer, monkeypatch):
    asked, plain = {}, ppo.generate

    def spy(*args, **settings):
        asked.update(settings)
        return plain(*args, **settings)

    monkeypatch.setattr(ppo, "generate", spy)
    run(tokenizer, updates=1, temperature=0.7)
    names = ("samples_per_prompt", "max_new_tokens", "temperature", "precision")
    assert {name: asked[name] for name in names} == dict(zip(names, (2, 6, 0.7, "no"), strict=True))


@pytest.fixture
def sampled(tokenizer, monkeypatch):
    """Two responses as `sample` sees them, of which the second was cut."""
    eos = tokenizer.eos_token_id
    said = [[Completion("ab", (5, 6), eos), Completion("abcd", (5, 6, 7, 8), None)]]
    monkeypatch.setattr(ppo, "generate", lambda *args, **settings: said)

    def sample(**settings):
        config = PPOConfig(prompts_per_update=1, minibatches=1, max_new_tokens=3, **settings)
        return ppo.sample(config, tiny.llama(vocab=VOCAB), tokenizer, vowels, ["a good"], np.random.default_rng(0))

    return sample, eos


def test_a_response_goes_up_to_and_with_its_end(sampled):
    sample, eos = sampled
    batch, scores = sample(missing_eos_penalty=0.5)
    assert [[i for i in labels if i >= 0] for labels in batch.labels.tolist()] == [[5, 6, eos], [5, 6, 7, 8]]
    assert scores.tolist() == [1.0, 0.5]


def test_what_stands_behind_a_response_changes_nothing(sampled):
    """Neither the padding of a batch, nor what is written there."""
    batch, scores = sampled[0]()
    config = PPOConfig(prompts_per_update=1, minibatches=1)
    policy, reference = tiny.llama(vocab=VOCAB), tiny.llama(seed=1, vocab=VOCAB)
    actor, frozen = ppo.Actor(config, policy, critic=True), ppo.Actor(config, reference, critic=False)
    nn.init.normal_(actor.critic.weight)
    wide = [torch.nn.functional.pad(getattr(batch, name), (0, 4), value=v) for name, v in
            (("input_ids", 9), ("attention_mask", 0), ("labels", -100))]  # fmt: skip
    first, second = (
        ppo.appraise(config, actor, frozen, each, scores, 0.1)[0] for each in (batch, PairBatch(*wide, batch.rows))
    )
    for each in fields(first):
        before, after = getattr(first, each.name), getattr(second, each.name)
        assert torch.allclose(before.float(), after[:, :-4].float(), atol=1e-5)
        assert not after[:, -4:].any()
    losses = [
        ppo.objective(config, each.logps + 0.1 * each.mask, each.values + 0.1 * each.mask, each)[0]
        for each in (first, second)
    ]
    assert torch.allclose(*losses, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"estimator": "rloo", "prompts_per_update": 8, "samples_per_prompt": 4}], ids=["ppo", "rloo"]
)
def test_it_raises_the_reward_of_the_bundled_model(settings):
    policy, tokenizer = load_model(POCKET), load_tokenizer(POCKET)
    openings = [
        "The film",
        "This movie was",
        "I watched this",
        "The acting",
        "A story of",
        "It is",
        "My wife",
        "One of the",
    ]
    short = {"updates": 8, "lr": 1e-3, "prompts_per_update": 16, "max_new_tokens": 8, **settings}
    rows = run(tokenizer, policy, reward=load_reward(POCKET), prompts=openings * 2, **short).metrics
    scores = [row["objective/scores"] for row in rows]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.05, scores  # by .11 to .20 with three seeds of each
    assert rows[-1]["objective/kl"] > 1


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "grpo"}, "estimator='grpo' is unknown; choose one of ppo, rloo"),
        ({"lr": 0}, "lr=0 must be greater than 0"),
        ({"updates": 1.5}, r"updates=1.5 must be a number \(int\)"),
        ({"gamma": 1.1}, "gamma=1.1 must be at most 1"),
        ({"lam": -0.1}, "lam=-0.1 must be at least 0"),
        ({"kl_coef": math.nan}, "kl_coef=nan"),
        ({"whiten_rewards": 1}, "whiten_rewards=1 must be True or False"),
        ({"minibatches": 9, "prompts_per_update": 4}, "minibatches=9 are more than the 8 responses"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target has no effect on kl_coef=0"),
        ({"estimator": "rloo", "samples_per_prompt": 1}, "samples_per_prompt=1 leaves rloo nothing"),
        ({"estimator": "rloo", "lam": 0.9}, "lam=0.9 has no effect with rloo"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_runs_that_are_refused_before_anything_is_sampled(tokenizer, monkeypatch):
    monkeypatch.setattr(ppo, "generate", lambda *args, **settings: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="3 prompts are fewer than the 4 of one update; lower prompts_per_update"):
        run(tokenizer, prompts=tiny.TEXT[:3])
    with pytest.raises(ValueError, match="the reference has a vocabulary of 64, the policy of 300"):
        run(tokenizer, reference=tiny.llama())
    with pytest.raises(ValueError, match="every score must be finite"):
        run(tokenizer, reward=lambda texts: [math.nan] * len(texts))


def test_a_model_without_hidden_states_has_no_critic(tokenizer):
    policy = tiny.llama(vocab=VOCAB)
    policy.register_forward_hook(lambda _, __, output: setattr(output, "logits", 2 * output.logits))
    with pytest.raises(ValueError, match='no hidden states for a critic; set estimator="rloo"'):
        run(tokenizer, policy)
    assert run(tokenizer, policy, updates=1, estimator="rloo").steps == 1


def test_what_is_not_finite_is_named(tokenizer):
    reference = tiny.llama(vocab=VOCAB)
    forbidding = frozen_copy(reference)
    forbidding.lm_head = nn.Linear(16, VOCAB)
    nn.init.zeros_(forbidding.lm_head.weight), nn.init.constant_(forbidding.lm_head.bias, -math.inf)
    forbidding.lm_head.bias.data[0] = 0
    with pytest.raises(
        NonFiniteLoss, match=r"update 1: column .*: the reference's log-probability of the token is -inf"
    ):
        run(tokenizer, reference, forbidding)
    with pytest.raises(NonFiniteLoss, match=r"update 1: the loss is .*lower lr"):
        run(tokenizer, lr=1e30, epochs=4)
