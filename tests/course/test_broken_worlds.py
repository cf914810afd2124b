"""Break one thing of a world, and every step whose words speak of it must notice."""

from __future__ import annotations

import hashlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tpo_course.derivations import DERIVATIONS, dpo
from tpo_course.world import TokenWorld

STEPS = {f"{name}.{step.key}": step for name, derivation in DERIVATIONS.items() for step in derivation.steps}

# How the words of a step name each thing, in its title, its equation or its text.
NAMES = {
    "Q": r"\bQ",
    "V": r"\bV(?![a-z])",
    "A": r"\bA[_^]|[Aa]dvantage",
    "D": r"\bD_t|\bvisit",
    "KL": r"KL",
    "pi*": r"\\pi\^\*|pi\*",
    "R": r"\bR\b",
    "r": r"(?<!\\hat )\br\b(?!\u0302)(?! to )",
    "P": r"(?<!\\hat )\bP\b",
    "Z": r"\bZ\b",
    "L": r"\bL(?:_|\b)",
}


class Broken:
    """A world of which one thing is wrong wherever a step reads it; all others are made from the right one."""

    def __init__(self, world: TokenWorld, thing: str, seed: int) -> None:
        self.right, self.seed = world, seed
        for name, made in WRONG[thing](self).items():
            setattr(self, name, made)

    def __getattr__(self, name: str) -> object:
        return getattr(self.right, name)

    def noise(self, like: Tensor, *key: object) -> Tensor:
        """Normal noise that is the same for the same key, as a wrong function's error is."""
        text = [k.detach().numpy().tobytes() if isinstance(k, Tensor) else repr(k).encode() for k in key]
        digest = hashlib.blake2b(b"|".join([repr(self.seed).encode(), *text]), digest_size=7).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return 0.3 * torch.randn(like.shape, generator=draw, dtype=torch.float64)

    def policy(self, logps: Tensor, *key: object) -> Tensor:
        """Another policy near the given one."""
        return (logps + self.noise(logps, *key)).log_softmax(-1)


def _values(w: Broken, change: str) -> dict[str, object]:
    def wrong(values, *key):
        parts = {name: getattr(values, name) for name in "vqa"}
        parts[change] = parts[change] + w.noise(parts[change], change, *key)
        if change != "a":
            parts["a"] = parts["q"] - parts["v"][:, None]
        return SimpleNamespace(**parts)

    made = {
        "values": lambda logps, reward=None: wrong(w.right.values(logps, reward), logps),
        "regularised_values": lambda logps, beta: wrong(w.right.regularised_values(logps, beta), logps, beta),
    }

    def soft_optimum(beta):
        soft, star = w.right.soft_optimum(beta)
        soft = wrong(soft, beta)
        return soft, (w.ref_logps + soft.a / beta if change == "q" else star)  # the world makes pi* from Q

    made["soft_optimum"] = soft_optimum
    if change == "q":
        made["one_step_optimum"] = lambda beta: w.right.gibbs(w.values(w.ref_logps).q / beta)[0]
    return made


def _optima(w: Broken) -> dict[str, object]:
    def gibbs(scores):
        star, log_z = w.right.gibbs(scores)
        return w.policy(star + 0.1 * scores, scores), log_z  # wrong in its slope too

    return {
        "soft_optimum": lambda beta: (w.right.soft_optimum(beta)[0], w.policy(w.right.soft_optimum(beta)[1], beta)),
        "one_step_optimum": lambda beta: w.policy(w.right.one_step_optimum(beta), beta),
        "gibbs": gibbs,
        "also": lambda found: (w.policy(found[0], found[1]), found[1]),
    }


def _partition(w: Broken) -> dict[str, object]:
    def gibbs(scores):
        star, log_z = w.right.gibbs(scores)
        return star, log_z + w.noise(log_z, scores)

    return {"gibbs": gibbs, "also": lambda found: (found[0], found[1] + w.noise(found[1], found[1]))}


def _kl(w: Broken) -> dict[str, object]:
    def kl(p, q):
        right = w.right.kl(p, q)
        return right * (1 + w.noise(right, p, q)) + w.noise(right, q, p).abs() / 10

    return {"kl": kl, "seq_kl": lambda p, q: w.right.along(kl(p, q))}


def _loss(w: Broken) -> dict[str, object]:
    def expected_loss(objective, logits, *, guide=None, **hyper):
        right = w.right.expected_loss(objective, logits, guide=guide, **hyper)
        return right + (w.noise(logits, objective, logits) * logits).sum()

    return {"expected_loss": expected_loss}


def _probabilities(w: Broken) -> dict[str, object]:
    pairs = w.right.pairs
    return {
        "pairs": type(pairs)(
            pairs.chosen, pairs.rejected, torch.sigmoid(pairs.prob.logit() + w.noise(pairs.prob)), pairs.weight
        )
    }


WRONG = {
    "Q": lambda w: _values(w, "q"),
    "V": lambda w: _values(w, "v"),
    "A": lambda w: _values(w, "a"),
    "D": lambda w: {"visits": lambda logps: w.right.visits(logps) * (1 + w.noise(w.right.visits(logps), logps))},
    "KL": _kl,
    "pi*": _optima,
    "R": lambda w: {"reward": w.right.reward + w.noise(w.right.reward)},
    "r": lambda w: {"returns": w.right.returns + w.noise(w.right.returns)},
    "P": _probabilities,
    "Z": _partition,
    "L": _loss,
}


def spoken(step) -> set[str]:
    text = " ".join([step.title, step.latex, step.words])
    return {thing for thing, pattern in NAMES.items() if re.search(pattern, text)}


def worst(name: str, thing: str, monkeypatch) -> float:
    """The largest residual of a step over a few ways of breaking the thing."""
    step = STEPS[name]
    world = TokenWorld(4, 3, seed=3, num_prompts=2, gamma=1.0 if step.gamma_one else 0.9)
    if thing in {"pi*", "Z"}:  # two functions of the course find them as well
        for function in (dpo.gibbs, dpo.by_tokens):
            monkeypatch.setattr(dpo, function.__name__, lambda w, beta, right=function: w.also(right(w, beta)))
    return max(step.residual(Broken(world, thing, seed)) for seed in range(3))


# What each step says something about, so that its residual must show when that is wrong.
SPEAKS = {
    "preferences.bradley_terry": "r P",
    "preferences.log_odds": "r P",
    "preferences.cross_entropy": "P",
    "preferences.likelihood_gradient": "P",
    "preferences.maximum_likelihood": "r",
    "preferences.shift": "r P",
    "preferences.canonical": "r P",
    "dpo.chain_rule": "KL r",
    "dpo.objective_gap": "pi* r Z",
    "dpo.optimum_value": "pi* r Z",
    "dpo.no_policy_is_better": "Z",
    "dpo.reparametrisation": "pi* r Z",
    "dpo.z_cancels": "pi* P",
    "dpo.loss": "L",
    "dpo.loss_minimum": "pi* P L",
    "dpo.gradient": "L",
    "dpo.one_coefficient": "",
    "dpo.beta_at_the_optimum": "KL pi* r",
    "dpo.beta_in_the_first_step": "L",
    "token_mdp.returns_by_token": "V R r",
    "token_mdp.bellman": "Q V R",
    "token_mdp.action_values": "Q V R",
    "token_mdp.telescope": "Q V A r",
    "token_mdp.performance_difference": "A D V",
    "token_mdp.soft_bellman": "Q V Z",
    "token_mdp.soft_value_is_attained": "V pi* R",
    "token_mdp.soft_performance_difference": "D KL pi*",
    "token_mdp.same_optimum": "Q V pi*",
    "token_mdp.token_reward_up_to_shaping": "V A pi* R",
    "token_mdp.reward_from_tokens": "V pi* R",
    "token_mdp.dpo_agrees": "pi* P L",
    "tdpo.policy_improvement": "V A",
    "tdpo.state_objective": "Q V A KL pi* Z",
    "tdpo.closed_form": "Q A pi* Z",
    "tdpo.regret_preference": "V A P",
    "tdpo.value_and_partition": "Q V KL pi* Z",
    "tdpo.advantage_from_policy": "Q A KL pi* Z",
    "tdpo.reward_from_policy": "V A KL pi* r",
    "tdpo.preference": "Q KL pi* P",
    "tdpo.tdpo1_loss": "L",
    "tdpo.tdpo1_minimum": "pi* P L",
    "tdpo.margin_is_linear": "KL",
    "tdpo.tdpo1_gradient": "L",
    "tdpo.rewards_kl_of_chosen": "KL",
    "tdpo.stop_gradient": "KL L",
    "tdpo.tdpo2_loss": "KL L",
    "tdpo.tdpo2_gradient": "KL L",
    "tdpo.one_step_is_not_optimal": "Q D KL pi*",
    "tgdpo.by_timestep": "D R r",
    "tgdpo.upper_bound": "D R",
    "tgdpo.relaxed_optimum": "KL pi* Z",
    "tgdpo.relaxation_error": "D R",
    "tgdpo.relaxation_bound": "D KL",
    "tgdpo.other_splits": "R r",
    "tgdpo.natural_split": "V pi* R Z",
    "tgdpo.guided_objective": "KL pi* Z",
    "tgdpo.guided_reward": "pi* Z",
    "tgdpo.f_must_be_positive": "pi*",
    "tgdpo.guided_preference": "pi* P Z",
    "tgdpo.one_pair": "",
    "tgdpo.both_labels": "",
    "tgdpo.two_pairs": "",
    "tgdpo.delta_keeps_the_optimum": "pi* P",
    "tgdpo.value_without_delta": "V R",
    "tgdpo.telescopes_without_delta": "r",
    "tgdpo.exact_without_delta": "P",
    "tgdpo.delta_is_a_split": "Z",
    "tgdpo.loss": "L",
    "tgdpo.gradient": "L",
    "tgdpo.four_behaviours": "",
    "tgdpo.floor": "",
    "one_form.one_form": "KL L",
    "one_form.at_the_reference": "KL L",
    "one_form.alpha_zero": "L",
    "one_form.alpha_one": "L",
    "one_form.simpo_loss": "L",
    "one_form.simpo_is_dpo": "",
    "one_form.simpo_gradient": "L",
    "one_form.policy_gradient": "A",
    "one_form.ppo_surrogate": "A",
    "one_form.same_fixed_point": "A pi* L",
    "ppo.token_rewards": "r",
    "ppo.any_critic": "",
    "ppo.true_critic": "V R",
    "ppo.leave_one_out": "r",
}

# Named, but not claimed: (step, thing) and why its residual need not show it.
ASIDES = {
    ("preferences.cross_entropy", "KL"): "that of two answers, written out in the step: no function of the world",
    ("preferences.likelihood_gradient", "L"): "the loss of a reward model, not that of a policy",
    ("preferences.shift", "Z"): "a look ahead to DPO",
    ("dpo.objective_gap", "KL"): "that of whole responses, written out in the step",
    ("dpo.optimum_value", "KL"): "the reason; objective_gap checks it",
    ("dpo.no_policy_is_better", "KL"): "the reason; objective_gap checks it",
    ("dpo.no_policy_is_better", "pi*"): "the reason; optimum_value checks it",
    ("dpo.z_cancels", "Z"): "the equation has none any more",
    ("dpo.loss", "pi*"): "what stood there before",
    ("dpo.loss_minimum", "KL"): "the name of the objective",
    ("token_mdp.soft_bellman", "KL"): "what is paid; soft_performance_difference checks it",
    ("token_mdp.soft_value_is_attained", "KL"): "another name for the log-ratio that the step subtracts",
    ("tdpo.closed_form", "V"): "the equation is free of it",
    ("tdpo.preference", "V"): "the equation is free of it",
    ("tdpo.preference", "Z"): "the equation is free of it",
    ("tdpo.tdpo1_loss", "pi*"): "what stood there before",
    ("tgdpo.relaxed_optimum", "D"): "holds state by state, so for any D",
    ("tgdpo.relaxed_optimum", "R"): "holds for any token reward",
    ("tgdpo.guided_objective", "R"): "holds for any token reward",
    ("tgdpo.guided_reward", "R"): "by definition",
    ("tgdpo.f_must_be_positive", "R"): "holds for any token reward",
    ("tgdpo.both_labels", "Z"): "any Z gives a delta, and the step holds for each",
    ("tgdpo.telescopes_without_delta", "V"): "the step's own, from bisection; value_without_delta checks it",
    ("tgdpo.telescopes_without_delta", "Z"): "a comparison with DPO",
    ("tgdpo.exact_without_delta", "V"): "the step's own, from bisection; value_without_delta checks it",
    ("tgdpo.delta_is_a_split", "V"): "the step's own, from bisection; value_without_delta checks it",
    ("tgdpo.delta_is_a_split", "R"): "holds for any token reward",
    ("tgdpo.loss", "V"): "what cannot be; how far apart the two are is among the numbers",
    ("one_form.alpha_zero", "KL"): "what alpha = 0 switches off",
    ("one_form.simpo_is_dpo", "L"): "the losses of single pairs, taken from the library, not their mean",
    ("one_form.policy_gradient", "KL"): "another name for the log-ratio inside the reward",
    ("ppo.token_rewards", "R"): "PPO's token reward, made from the score of the response",
    ("ppo.any_critic", "R"): "PPO's token reward, made from the score of the response",
    ("ppo.any_critic", "V"): "holds for any function of states; the step takes one of its own",
    ("ppo.true_critic", "A"): "an estimate of it from one response, which the step makes",
    ("ppo.leave_one_out", "R"): "PPO's token reward, made from the score of the response",
}

CLAIMS = [(name, thing) for name, things in SPEAKS.items() for thing in things.split()]


@pytest.mark.parametrize("name", STEPS)
def test_the_table_says_what_the_words_say(name):
    """A new step, or a new word in an old one, has to enter the table."""
    asides = {thing for step, thing in ASIDES if step == name}
    claims = set(SPEAKS[name].split())
    assert claims.isdisjoint(asides)
    assert spoken(STEPS[name]) == claims | asides


def test_the_tables_name_steps_and_things_that_exist():
    assert set(SPEAKS) == set(STEPS)
    assert {thing for _, thing in CLAIMS} | {thing for _, thing in ASIDES} <= set(NAMES) == set(WRONG)


@pytest.mark.parametrize(("name", "thing"), CLAIMS)
def test_a_step_notices_a_broken_world(name, thing, monkeypatch):
    assert worst(name, thing, monkeypatch) > 1e-6


def test_only_steps_that_are_algebra_are_excused_as_by_definition():
    excused = {step for (step, _), why in ASIDES.items() if why == "by definition"}
    assert excused == {name for name, step in STEPS.items() if step.by_definition}


@pytest.mark.parametrize("thing", WRONG)
def test_an_unbroken_reading_stays_right(thing):
    """What is not broken passes through: a wrong thing leaves the others alone."""
    world = TokenWorld(3, 2, seed=0, num_prompts=2)
    broken = Broken(world, thing, 0)
    assert torch.equal(broken.ref_logps, world.ref_logps)
    assert torch.equal(broken.tokenwise(world.reward), world.tokenwise(world.reward))
    untouched = {"V": "q", "Q": "v"}.get(thing)
    if untouched:
        pi = world.random_policy(0)
        assert torch.equal(getattr(broken.values(pi), untouched), getattr(world.values(pi), untouched))
