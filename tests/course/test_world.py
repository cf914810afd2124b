"""The enumerable world against plain recursion over strings, and training in it against the exact optima."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from tpo_course import world
from tpo_course.tabular import TabularPolicy, fit_tabular, minimise
from tpo_course.world import TokenWorld
from tpo_lib import losses
from tpo_lib.stats import split, token_stats

SHAPES = [(2, 1, True), (3, 3, True), (4, 2, True), (2, 4, False), (3, 3, False)]


def make(vocab=3, horizon=3, eos=True, **more) -> TokenWorld:
    return TokenWorld(vocab, horizon, eos=eos, **{"seed": 5, "num_prompts": 2, "gamma": 0.9, **more})


class Naive:
    """The same world with a dictionary of prefixes: nothing vectorised, nothing clever."""

    def __init__(self, w: TokenWorld):
        self.w, self.row = w, {}
        width = w.vocab_size - w.eos
        for t in range(w.horizon):
            for prompt in range(w.num_prompts):
                for prefix in itertools.product(range(width), repeat=t):
                    self.row[prompt, prefix] = len(self.row)

    def ends(self, response: tuple) -> bool:
        return len(response) == self.w.horizon or (self.w.eos and response[-1:] == (self.w.vocab_size - 1,))

    def responses(self, prefix: tuple = ()) -> list[tuple]:
        if prefix and self.ends(prefix):
            return [prefix]
        return [r for token in range(self.w.vocab_size) for r in self.responses((*prefix, token))]

    def path(self, prompt: int, response: tuple) -> list[tuple[int, int]]:
        return [(self.row[prompt, response[:t]], token) for t, token in enumerate(response)]

    def value(self, prompt: int, prefix: tuple, logps: torch.Tensor) -> float:
        if prefix and self.ends(prefix):
            return 0.0
        s = self.row[prompt, prefix]
        return sum(
            math.exp(logps[s, a])
            * (float(self.w.reward[s, a]) + self.w.gamma * self.value(prompt, (*prefix, a), logps))
            for a in range(self.w.vocab_size)
        )

    def soft(self, prompt: int, prefix: tuple, beta: float) -> float:
        if prefix and self.ends(prefix):
            return 0.0
        s = self.row[prompt, prefix]
        total = 0.0
        for a in range(self.w.vocab_size):
            q = float(self.w.reward[s, a]) + self.w.gamma * self.soft(prompt, (*prefix, a), beta)
            total += math.exp(self.w.ref_logps[s, a]) * math.exp(q / beta)
        return beta * math.log(total)


@pytest.mark.parametrize(("vocab", "horizon", "eos"), SHAPES)
def test_states_and_responses_match_naive(vocab, horizon, eos):
    w = make(vocab, horizon, eos)
    naive = Naive(w)
    assert w.num_states == len(naive.row)
    rows, seen = w.responses, set()
    assert len(rows.prompt) == w.num_prompts * len(naive.responses())
    for prompt, tokens, states, mask in zip(rows.prompt, rows.tokens, rows.states, rows.mask, strict=True):
        response = tuple(tokens[mask].tolist())
        assert naive.path(int(prompt), response) == list(zip(states[mask].tolist(), response, strict=True))
        assert (tokens[~mask] == -100).all()
        seen.add((int(prompt), response))
    assert seen == {(p, r) for p in range(w.num_prompts) for r in naive.responses()}


@pytest.mark.parametrize(("vocab", "horizon", "eos"), SHAPES)
def test_values_match_naive(vocab, horizon, eos):
    w = make(vocab, horizon, eos)
    naive, pi = Naive(w), w.random_policy(1)
    values, (soft, star) = w.values(pi), w.soft_optimum(0.5)
    for (prompt, prefix), s in naive.row.items():
        assert float(values.v[s]) == pytest.approx(naive.value(prompt, prefix, pi), abs=1e-12)
        assert float(soft.v[s]) == pytest.approx(naive.soft(prompt, prefix, 0.5), abs=1e-12)
    torch.testing.assert_close((pi.exp() * values.a).sum(-1), torch.zeros(w.num_states, dtype=torch.float64))
    torch.testing.assert_close(star.exp().sum(-1), torch.ones(w.num_states, dtype=torch.float64))


def test_sums_along_responses_match_naive():
    w = make()
    naive, pi, other = Naive(w), w.random_policy(1), w.random_policy(2)
    kl = kl_divergence(Categorical(logits=pi), Categorical(logits=other))
    torch.testing.assert_close(w.kl(pi, other), kl)
    for row in range(len(w.responses.prompt)):
        tokens = tuple(t for t in w.responses.tokens[row].tolist() if t >= 0)
        path = naive.path(int(w.responses.prompt[row]), tokens)
        returned = sum(0.9**t * float(w.reward[s, a]) for t, (s, a) in enumerate(path))
        assert float(w.returns[row]) == pytest.approx(returned)
        assert float(w.sequence_logps(pi)[row]) == pytest.approx(sum(float(pi[s, a]) for s, a in path))
        assert float(w.seq_kl(pi, other)[row]) == pytest.approx(sum(float(kl[s]) for s, _ in path))


def test_visits_count_responses():
    w = make(4, 3)
    pi = w.random_policy(3)
    rows = w.responses
    chance = w.prompt_probs[rows.prompt] * w.sequence_logps(pi).exp()
    assert float(chance.sum()) == pytest.approx(1)
    counted = torch.zeros(w.num_states, dtype=torch.float64)
    for t in range(w.horizon):
        counted.index_add_(0, rows.states[rows.mask[:, t], t], chance[rows.mask[:, t]])
    torch.testing.assert_close(w.visits(pi), counted)
    assert w.depth.tolist() == sorted(w.depth.tolist())


@pytest.mark.parametrize("eos", [True, False])
def test_factorise_inverts_sequence_logps(eos):
    w = make(eos=eos)
    pi = w.random_policy(4)
    torch.testing.assert_close(w.factorise(w.sequence_logps(pi)), pi)


def test_gibbs_and_one_step():
    w = make()
    star = w.one_step_optimum(0.5)
    tilted = w.ref_logps.exp() * (w.values(w.ref_logps).q / 0.5).exp()
    torch.testing.assert_close(star.exp(), tilted / tilted.sum(-1, keepdim=True))


def test_pairs_match_naive():
    w = make()
    pairs, seen = w.pairs, {}
    ref = w.sequence_logps(w.ref_logps).exp()
    for x in range(w.num_prompts):
        rows = [r for r in range(len(ref)) if w.responses.prompt[r] == x]
        draws = {(i, j): float(ref[i] * ref[j]) for i in rows for j in rows if i != j}
        for (i, j), chance in draws.items():  # the pair (i, j) is drawn in either order
            win = 1 / (1 + math.exp(float(w.returns[j] - w.returns[i])))
            seen[i, j] = float(w.prompt_probs[x]) * 2 * chance * win / sum(draws.values())
    found = dict(
        zip(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True), pairs.weight.tolist(), strict=True)
    )
    assert found == pytest.approx(seen)
    assert float(pairs.weight.sum()) == pytest.approx(1)
    assert len(found) == w.num_pairs


GIVEN = {"beta": 0.3, "alpha": 0.5, "guide_beta": 0.7}
HYPER = {name: entry.settings({} if name == "simpo" else GIVEN) for name, entry in losses.OBJECTIVES.items()}


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_expected_loss_matches_a_language_models_batch(name):
    """One pair at a time through TabularPolicy, token_stats and the loss, as a training loop would."""
    w = make(3, 2)
    policy, guide = TabularPolicy(2 * w.random_policy(5)), w.random_policy(6)
    total = 0.0
    for c, r, weight in zip(w.pairs.chosen, w.pairs.rejected, w.pairs.weight, strict=True):
        rows = torch.stack([c, r])
        states, labels = w.responses.states[rows], w.responses.labels[rows]
        ref, hint = (TabularPolicy(table)(states) for table in (w.ref_logps, guide))
        stats = token_stats(policy(states), labels, ref, guide_logits=hint, with_kl=True)
        chosen, rejected = split(stats)
        total += float(weight * losses.OBJECTIVES[name].fn(chosen, rejected, **HYPER[name]).loss[0].detach())
    exact = w.expected_loss(name, policy.logits, guide=guide, **HYPER[name])
    assert float(exact.detach()) == pytest.approx(total, abs=1e-12)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(policy.logps(), policy.logits.detach().log_softmax(-1))


def test_chunks_give_the_same_loss_and_gradient(monkeypatch):
    w = make(4, 3)
    grads = []
    for limit in (1 << 19, 500):
        monkeypatch.setattr(world, "CHUNK_PAIRS", limit)
        logits = w.random_policy(7).requires_grad_()
        value = w.expected_loss("tdpo2", logits, beta=0.3, alpha=0.5)
        value.backward()
        grads.append((value.detach(), logits.grad))
    assert len(list(w.pair_chunks())) > 1
    torch.testing.assert_close(grads[0], grads[1])
    joined = torch.cat([chunk.weight for chunk in w.pair_chunks(500)])
    assert float(joined.sum()) == pytest.approx(1)
    assert len(joined) == w.num_pairs


def test_expected_loss_takes_a_function():
    w = make()
    named = w.expected_loss("dpo", w.random_policy(1), beta=0.3)
    assert float(w.expected_loss(losses.dpo, w.random_policy(1), beta=0.3)) == float(named)


def test_too_large_is_refused():
    with pytest.raises(ValueError, match=r"needs 3,486,784,400 states"):
        TokenWorld(10, 10, seed=0)
    w = TokenWorld(6, 6, seed=0)
    with pytest.raises(ValueError, match=r"pairs of up to 6 tokens do not fit"):
        _ = w.pairs
    with pytest.raises(ValueError, match=r"the exact loss needs [\d,]+ pairs"):
        w.expected_loss("dpo", w.ref_logps, beta=0.1)


@pytest.mark.parametrize(
    "bad", [{"vocab_size": 1}, {"horizon": 0}, {"num_prompts": 0}, {"gamma": 0.0}, {"gamma": 1.1}, {"temperature": 0.0}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TokenWorld(**{"vocab_size": 3, "horizon": 2, "seed": 0, **bad})


def test_seed_fixes_everything():
    first, second, other = make(), make(gamma=1.0), make(seed=6)
    for name in ("ref_logps", "reward", "prompt_probs"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(first, name), getattr(first.with_gamma(0.3), name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert (first.with_gamma(0.3).gamma, make(eos=False).with_gamma(0.3).eos) == (0.3, False)
    assert (
        make(temperature=0.1).ref_logps.max(-1).values.mean() > make(temperature=10.0).ref_logps.max(-1).values.mean()
    )


def test_large_world_takes_seconds():
    started = time.process_time()
    w = TokenWorld(6, 6, seed=0)
    soft, star = w.soft_optimum(0.5)
    assert len(w.responses.prompt) == 8 * 19531
    left = w.expected(soft.v)
    right = w.expected(w.regularised_values(star, 0.5).v)
    torch.testing.assert_close(left, right)
    assert float(w.sequence_logps(star).exp().sum()) == pytest.approx(8)
    assert time.process_time() - started < 5


# Training.


def test_dpo_converges_to_the_soft_optimum():
    w = make(gamma=1.0)
    fit = fit_tabular(w, "dpo", beta=0.5)
    assert fit.grad_norm < 1e-7
    assert float(w.kl(w.soft_optimum(0.5)[1], fit.policy.logps()).max()) < 1e-6
    assert fit.losses[0] == pytest.approx(math.log(2))
    assert fit.losses[-1] < fit.losses[0]


def test_tdpo1_converges_to_the_one_step_optimum_not_to_the_true_one():
    w = make(gamma=1.0)
    fit = fit_tabular(w, "tdpo1", beta=0.5)
    assert float(w.kl(w.one_step_optimum(0.5), fit.policy.logps()).max()) < 1e-6
    assert float(w.kl(w.soft_optimum(0.5)[1], fit.policy.logps()).max()) > 1e-3


@pytest.mark.parametrize(("name", "optimizer"), [("tdpo2", "adam"), ("tgdpo", "lbfgs"), ("simpo", "lbfgs")])
def test_other_objectives_come_to_rest(name, optimizer):
    w = make(3, 2, gamma=1.0)
    guide = w.soft_optimum(1.0)[1]
    steps = 100 if optimizer == "lbfgs" else 300
    fit = fit_tabular(w, name, guide=guide, optimizer=optimizer, steps=steps, lr=None, **HYPER[name])
    assert fit.grad_norm < 1e-4
    assert fit.losses[-1] < fit.losses[0]


def test_callback_sees_every_step_and_start_is_kept():
    w, seen = make(), []
    start = w.random_policy(9)
    before = start.clone()
    record = lambda step, logps: seen.append((step, float(w.kl(start, logps).max())))  # noqa: E731
    fit = fit_tabular(w, "dpo", beta=0.5, start=start, optimizer="sgd", steps=3, lr=0.5, callback=record)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1] < 1e-12 < seen[1][1] < seen[2][1]
    assert torch.equal(start, before)
    assert len(fit.losses) == 3


def test_training_errors():
    w = make()
    with pytest.raises(ValueError, match=r"optimizer='rmsprop' is unknown"):
        fit_tabular(w, "dpo", beta=0.5, optimizer="rmsprop")
    with pytest.raises(ValueError, match=r"pass optimizer='adam'"):
        fit_tabular(w, "tdpo2", beta=0.5, alpha=0.5)
    with pytest.raises(ValueError, match=r"the loss is inf at step 0"):
        minimise(lambda z: z.sum() + math.inf, w.ref_logps, optimizer="sgd", steps=2)
