"""Equations that are broken on purpose: one wrong sign or term, and the residual that jumps.

A break replaces a piece of the source of a step's two sides. Its name says what is wrong, its text what stands where.

>>> from tpo_course.world import TokenWorld
>>> jump = break_it("dpo.z_cancels", "a plus for the minus", TokenWorld(vocab_size=3, horizon=2, seed=0), beta=0.5)
>>> jump.residual < 1e-9 < 0.1 < jump.broken
True
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from tpo_course.cards import fold
from tpo_course.derivations.steps import TOLERANCE, Step
from tpo_course.world import TokenWorld

# {derivation.step: {what is wrong: (text in the source of step.sides, what stands there instead)}}; the first is `holds`'s.
BREAKS: dict[str, dict[str, tuple[str, str]]] = {
    "preferences.bradley_terry": {
        "the loser's strength in the numerator": ("chosen / (chosen + rejected)", "rejected / (chosen + rejected)")
    },
    "preferences.log_odds": {
        "the rewards added, not subtracted": ("r[:, :, None] - r[:, None, :]", "r[:, :, None] + r[:, None, :]"),
        "one of the two probabilities left out": ("wins.log() - wins.mT.log()", "wins.log()"),
    },
    "preferences.cross_entropy": {"the wrong answer's probability left out": ("F.logsigmoid(-d)", "F.logsigmoid(d)")},
    "preferences.likelihood_gradient": {
        "the sign lost": ("-torch.zeros_like", "torch.zeros_like"),
        "the probability given to the right answer": ("w.pairs.prob - torch.sigmoid", "-torch.sigmoid"),
    },
    "preferences.maximum_likelihood": {
        "the first reward added, not subtracted": ("truth - truth[0]", "truth + truth[0]")
    },
    "preferences.shift": {
        "a shift that depends on the response": ("b[w.responses.prompt]", "b[w.responses.tokens[:, 0] % len(b)]"),
        "a shift of another size, 30 for 3": ("3 * _noise", "30 * _noise"),
    },
    "preferences.canonical": {"the baseline added, not subtracted": ("r - (ref", "r + (ref")},
    "dpo.chain_rule": {"the KL added, not subtracted": ("- h.beta *", "+ h.beta *")},
    "dpo.objective_gap": {
        "the KL added, not subtracted": ("- h.beta * divergence", "+ h.beta * divergence"),
        "log Z left out": ("h.beta * log_z - h.beta", "-h.beta"),
        "beta left out before the KL": ("- h.beta * divergence", "- divergence"),
        "the KL the other way round": (
            "(log_pi.exp() * (log_pi - log_star))",
            "(log_star.exp() * (log_star - log_pi))",
        ),
    },
    "dpo.optimum_value": {"beta on the wrong side": ("/ h.beta).exp()", "* h.beta).exp()")},
    "dpo.no_policy_is_better": {"the sign of the bound": ("w.expected(h.beta", "w.expected(-h.beta")},
    "dpo.reparametrisation": {
        "beta log Z subtracted, not added": ("+ h.beta * gibbs", "- h.beta * gibbs"),
        "log Z left out": ("+ h.beta * gibbs(w, h.beta)[1][w.responses.prompt]", ""),
        "beta left out": ("h.beta * (star - ref)", "(star - ref)"),
        "the reference left out": ("(star - ref)", "star"),
    },
    "dpo.z_cancels": {
        "a plus for the minus": ("u[w.pairs.chosen] - u", "u[w.pairs.chosen] + u"),
        "beta left out": ("h.beta * tools", "tools"),
        "7 added to the reward of both": (
            "u[w.pairs.chosen] - u[w.pairs.rejected]",
            "(u[w.pairs.chosen] + 7) - (u[w.pairs.rejected] + 7)",
        ),
        "beta log Z added to both rewards": (
            "= h.beta * tools.logratio(w, by_tokens(w, h.beta)[0])",
            "= h.beta * tools.logratio(w, by_tokens(w, h.beta)[0]) + h.beta * gibbs(w, h.beta)[1][w.responses.prompt]",
        ),
        "7 added to the chosen reward alone": ("u[w.pairs.chosen] - u", "7 + u[w.pairs.chosen] - u"),
    },
    "dpo.loss": {
        "chosen and rejected swapped": ("-F.logsigmoid(margin)", "-F.logsigmoid(-margin)"),
        "beta outside the sigmoid": (
            "h.beta * tools.gap(w, tools.logratio(w, pi))",
            "tools.gap(w, tools.logratio(w, pi)) / h.beta",
        ),
    },
    "dpo.loss_minimum": {"the optimum of another beta": ("optimum(w, h.beta)", "optimum(w, 2 * h.beta)")},
    "dpo.gradient": {
        "sigma(m) for sigma(-m)": ("-h.beta * tools.gap", "h.beta * tools.gap"),
        "beta left out": ("= -h.beta * w.pairs.weight", "= -w.pairs.weight"),
    },
    "dpo.one_coefficient": {"the same sign on both responses": (", h.beta * wrong", ", -h.beta * wrong")},
    "dpo.beta_at_the_optimum": {"the sign lost": (", -variance", ", variance")},
    "dpo.beta_in_the_first_step": {"the 1/2 left out": ("-h.beta / 2", "-h.beta")},
    "token_mdp.returns_by_token": {"the values of another policy": ("w.values(pi)", "w.values(w.ref_logps)")},
    "token_mdp.bellman": {"the policy's probabilities left out": ("pi.exp() * values.q", "values.q")},
    "token_mdp.action_values": {
        "the next value subtracted, not added": ("+ w.gamma * tools", "- w.gamma * tools"),
        "the state's own value for the next one": ("tools.arrival(w, values.v)", "values.v[:, None]"),
        "gamma left out": ("w.gamma * tools", "tools"),
    },
    "token_mdp.telescope": {
        "V(s_0) added, not subtracted": ("w.returns - values", "w.returns + values"),
        "Q for the advantage": ("values.a, gamma", "values.q, gamma"),
    },
    "token_mdp.performance_difference": {
        "the states that the old policy visits": ("w.visits(new)", "w.visits(old)"),
        "the new policy's own advantages": ("w.values(old).a", "w.values(new).a"),
    },
    "token_mdp.soft_bellman": {
        "the sign of the reward": ("(reward / h.beta)", "(-reward / h.beta)"),
        "beta left out in front": ("= h.beta * tools.state_sums", "= tools.state_sums"),
    },
    "token_mdp.soft_value_is_attained": {"the KL earned, not paid": ("- h.beta * (star", "+ h.beta * (star")},
    "token_mdp.soft_performance_difference": {
        "the KL the other way round": ("w.kl(pi, star)", "w.kl(star, pi)"),
        "the states that pi* visits": ("w.visits(pi)", "w.visits(star)"),
    },
    "token_mdp.same_optimum": {"V added, not subtracted": ("soft.q - soft.v", "soft.q + soft.v")},
    "token_mdp.token_reward_up_to_shaping": {
        "V(s) added, not subtracted": ("- soft.v[:, None]", "+ soft.v[:, None]"),
        "the next value left out": ("+ w.gamma * tools.arrival(w, soft.v) ", ""),
    },
    "token_mdp.reward_from_tokens": {
        "the log-ratios subtracted, not added": ("+ h.beta * w.along", "- h.beta * w.along"),
        "V(s_0) left out": ("soft.v[w.responses.prompt] + ", ""),
    },
    "token_mdp.dpo_agrees": {"the optimum of another beta": ("w.soft_optimum(h.beta)", "w.soft_optimum(2 * h.beta)")},
    "tdpo.policy_improvement": {"a policy that loses advantage": ("improved(old.a, new)", "improved(-old.a, new)")},
    "tdpo.state_objective": {"V added, not subtracted": ("log_z - values.v", "log_z + values.v")},
    "tdpo.closed_form": {"the sign of the advantage": ("(advantage / h.beta)", "(-advantage / h.beta)")},
    "tdpo.regret_preference": {"Q for the advantage": ("w.values(pi).a", "w.values(pi).q")},
    "tdpo.value_and_partition": {
        "the reverse KL for the forward one": ("w.kl(w.ref_logps, star)", "w.kl(star, w.ref_logps)"),
        "log Z left out": ("h.beta * log_z - h.beta", "-h.beta"),
    },
    "tdpo.advantage_from_policy": {
        "the KL subtracted, not added": ("+ h.beta * w.kl", "- h.beta * w.kl"),
        "the KL left out": ("ratio + h.beta * w.kl(w.ref_logps, star)[:, None]", "ratio"),
    },
    "tdpo.reward_from_policy": {"the SeqKL subtracted, not added": ("+ h.beta * seq_kl", "- h.beta * seq_kl")},
    "tdpo.preference": {
        "delta added, not subtracted": ("u - delta", "u + delta"),
        "delta left out": ("u - delta", "u"),
    },
    "tdpo.tdpo1_loss": {"delta added, not subtracted": ("u - delta", "u + delta")},
    "tdpo.tdpo1_minimum": {
        "the soft optimum for the one-step policy": ("w.one_step_optimum(h.beta)", "w.soft_optimum(h.beta)[1]")
    },
    "tdpo.margin_is_linear": {"the sign of the entropy": ("- entropy)", "+ entropy)")},
    "tdpo.tdpo1_gradient": {
        "the policy's score for the reference's": ("tools.score(w, w.ref_logps", "tools.score(w, pi")
    },
    "tdpo.rewards_kl_of_chosen": {"the sign on the chosen side": ("[-h.beta * wrong", "[h.beta * wrong")},
    "tdpo.stop_gradient": {
        "the sign of the chosen KL's gradient": ("chosen_kl = tools", "chosen_kl = -tools"),
        "the rejected KL for the chosen one": (
            "onto_responses(w, pull, torch.zeros_like(pull))",
            "onto_responses(w, torch.zeros_like(pull), -pull)",
        ),
    },
    "tdpo.tdpo2_loss": {"delta added, not subtracted": ("u - h.alpha", "u + h.alpha")},
    "tdpo.tdpo2_gradient": {"the sign of the rejected KL's gradient": ("-h.alpha * pull", "h.alpha * pull")},
    "tdpo.one_step_is_not_optimal": {"the KL the other way round": ("w.kl(one, star)", "w.kl(star, one)")},
    "tgdpo.by_timestep": {"the states that the reference visits": ("w.visits(pi)", "w.visits(w.ref_logps)")},
    "tgdpo.upper_bound": {"the first timestep's maximum alone": ("maxima.sum()", "maxima[0]")},
    "tgdpo.relaxed_optimum": {"the KL added, not subtracted": ("log_z - h.beta", "log_z + h.beta")},
    "tgdpo.relaxation_error": {"the visits added, not subtracted": ("w.visits(star) - data", "w.visits(star) + data")},
    "tgdpo.relaxation_bound": {
        "the bound by distance ten times as large": ("cat([error, by_distance,", "cat([error, 10 * by_distance,")
    },
    "tgdpo.other_splits": {"another discount": ("gamma=w.gamma)), tools", "gamma=w.gamma / 2)), tools")},
    "tgdpo.natural_split": {"half of the potential": ("split(w, soft.v)", "split(w, soft.v / 2)")},
    "tgdpo.guided_objective": {"the KL added, not subtracted": ("log_z - w.kl", "log_z + w.kl")},
    "tgdpo.guided_reward": {
        "log Z subtracted, not added": ("+ h.beta * f * log_z", "- h.beta * f * log_z"),
        "log Z left out": (" + h.beta * f * log_z[:, None]", ""),
        "f left out of the log-ratio": ("h.beta * f * (star", "h.beta * (star"),
    },
    "tgdpo.f_must_be_positive": {"a plus for the minus": ("1 - log_star", "1 + log_star")},
    "tgdpo.guided_preference": {
        "delta_Z subtracted, not added": ("phi + delta)", "phi - delta)"),
        "delta_Z left out": ("phi + delta)", "phi)"),
    },
    "tgdpo.one_pair": {"the same sign on both responses": ("= 1.0, -1.0", "= 1.0, 1.0")},
    "tgdpo.both_labels": {"delta_Z added, not subtracted": (".log() - one", ".log() + one")},
    "tgdpo.two_pairs": {"a sign in the quadratic formula": ("(0.5 * e + (", "(-0.5 * e + (")},
    "tgdpo.delta_keeps_the_optimum": {"delta_Z left out": ("w, z, h, keep_delta=True", "w, z, h, keep_delta=False")},
    "tgdpo.value_without_delta": {"f kept where it should be 1": ("h.beta * torch.ones_like(f)", "h.beta * f")},
    "tgdpo.telescopes_without_delta": {"V(s_0) added, not subtracted": ("w.returns - soft.v", "w.returns + soft.v")},
    "tgdpo.exact_without_delta": {"delta_Z kept": ("keep_delta=False", "keep_delta=True")},
    "tgdpo.delta_is_a_split": {"half of the potential": ("split(w, soft.v)", "split(w, soft.v / 2)")},
    "tgdpo.loss": {
        "the chosen side's weight on the rejected one": ("1 - h.alpha * r_hat", "1 + h.alpha * r_hat / 2"),
        "the chosen side's weights left out": ("w.along(f_w * (pi - w.ref_logps))", "w.along(pi - w.ref_logps)"),
    },
    "tgdpo.gradient": {"the sign on the rejected side": ("-pull)[:, None] * f_l", "pull)[:, None] * f_l")},
    "tgdpo.four_behaviours": {"the chosen side's weight on the rejected one": ("exp(-signal[r])", "exp(signal[r])")},
    "tgdpo.floor": {
        "the chosen side's sign on the rejected one": ("-signal[w.pairs.rejected]", "signal[w.pairs.rejected]")
    },
    "one_form.one_form": {"DPO's row for every objective": ("common_form(w, name, z", "common_form(w, 'dpo', z")},
    "one_form.at_the_reference": {"3 for 2": ("2.0", "3.0")},
    "one_form.alpha_zero": {"alpha = 0.5 for 0": ("alpha=0.0", "alpha=0.5")},
    "one_form.alpha_one": {"alpha = 0.5 for 1": ("alpha=1.0", "alpha=0.5")},
    "one_form.simpo_loss": {"the target margin added, not subtracted": ("margin - h.margin", "margin + h.margin")},
    "one_form.simpo_is_dpo": {"beta times the length, not divided by it": ("beta=h.beta / n", "beta=h.beta * n")},
    "one_form.simpo_gradient": {"the sign of the margin": ("h.margin - margin", "h.margin + margin")},
    "one_form.policy_gradient": {"the sign lost": ("chance * discount * advantage", "-chance * discount * advantage")},
    "one_form.ppo_surrogate": {"the states that the reference visits": ("w.visits(old)", "w.visits(w.ref_logps)")},
    "one_form.same_fixed_point": {
        "the optimum of another beta": ("w.soft_optimum(h.beta)", "w.soft_optimum(2 * h.beta)")
    },
    "ppo.token_rewards": {"the KL of the reference to itself": ("_paid(w, pi, h)", "_paid(w, w.ref_logps, h)")},
    "ppo.any_critic": {"lambda = 0.5 for 1": ("lam=1.0", "lam=0.5")},
    "ppo.true_critic": {"what was earned left out": ("earned + w.tokenwise", "w.tokenwise")},
    "ppo.leave_one_out": {"the answer itself in its baseline": ("[::2]", "[1::2]")},
}


@dataclass(frozen=True)
class Jump:
    """The residual of a step as it is, and with a break."""

    title: str
    wrong: str  # what is wrong
    residual: float
    broken: float

    def __repr__(self) -> str:
        return f"{self.title}: residual {self.residual:.0e}; with {self.wrong}: {self.broken:.2g}"

    def _repr_html_(self) -> str:
        return f"<div><b>{self.title}</b>: residual <b>{self.residual:.0e}</b><br>with {self.wrong}: <b>{self.broken:.2g}</b></div>"


def changed(step: Step, old: str, new: str) -> Step:
    """The step with one piece of the source of its sides replaced.

    Raises:
        ValueError: the piece does not occur exactly once.
    """
    return replace(step, sides=broken(step.sides, old, new))


def broken(function: Callable, old: str, new: str) -> Callable:
    """The function with one piece of its source replaced.

    Raises:
        ValueError: the piece does not occur exactly once.
    """
    source = inspect.getsource(function)
    if source.count(old) != 1:
        raise ValueError(
            f"{function.__name__}: {old!r} occurs {source.count(old)} times, not once; its source:\n{source}"
        )
    space = dict(vars(sys.modules[function.__module__]))
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "<broken>", "exec"), space)
    return space[function.__name__]


def find(key: str) -> Step:
    """The step "derivation.step".

    Raises:
        KeyError: there is none; names those there are.
    """
    from tpo_course.derivations import DERIVATIONS

    name, _, step = key.partition(".")
    if name not in DERIVATIONS:
        raise KeyError(f"there is no derivation {name!r}; there are {', '.join(DERIVATIONS)}")
    return DERIVATIONS[name].step(step)


def break_it(key: str, wrong: str | None, world: TokenWorld, **hyper: float) -> Jump:
    """Break a step in the way named `wrong` (None: its first) and measure both residuals.

    Args:
        key: "derivation.step".
        wrong: a name from BREAKS[key].
        hyper: fields of Hyper.

    Raises:
        KeyError: no such step or break; names those there are.
    """
    step, known = find(key), BREAKS[key]
    wrong = next(iter(known)) if wrong is None else wrong
    if wrong not in known:
        raise KeyError(f"{key} has no break {wrong!r}; it has {', '.join(map(repr, known))}")
    whole, other = (each.residual(world, **hyper) for each in (step, changed(step, *known[wrong])))
    return Jump(step.title, wrong, whole, other)


class Holds:
    """What a chapter says at every equation: it holds, and with one named break it does not. Raises where it does not hold.

    holds = Holds("dpo", world, beta=0.5)
    holds("z_cancels")                    # prints both residuals
    holds.ask("z_cancels")                # asks first: the jumps are folded
    """

    def __init__(self, derivation: str, world: TokenWorld, **hyper: float) -> None:
        self.derivation, self.world, self.hyper = derivation, world, hyper

    def __call__(self, key: str, wrong: str | None = None) -> None:
        """Print the residual of a step without and with a break (default: its first)."""
        print(self._jump(key, wrong))

    def ask(self, key: str) -> "Asked":
        """The step's equation and all its breaks as a question, the residuals folded below."""
        full = f"{self.derivation}.{key}"
        return Asked(find(full), [self._jump(key, wrong) for wrong in BREAKS[full]])

    def _jump(self, key: str, wrong: str | None) -> Jump:
        jump = break_it(f"{self.derivation}.{key}", wrong, self.world, **self.hyper)
        assert jump.residual <= TOLERANCE, f"{jump} is above {TOLERANCE}"
        return jump


@dataclass(frozen=True)
class Asked:
    """A step and its breaks: predict which leave it standing and how far it jumps, then unfold."""

    step: Step
    jumps: list[Jump]

    def __repr__(self) -> str:
        lines = [f"{self.step.title}: residual {self.jumps[0].residual:.0e}. How large is it with ..."]
        return "\n".join([*lines, *(f"  {jump.wrong}: {jump.broken:.2g}" for jump in self.jumps)])

    def _repr_html_(self) -> str:
        parts = [fold(f"with {jump.wrong}", f"<p>residual <b>{jump.broken:.2g}</b></p>") for jump in self.jumps]
        head = (
            f"<b>{self.step.title}</b> <p>$${self.step.latex}$$</p><p>Residual {self.jumps[0].residual:.0e}: it holds. "
        )
        ask = "Predict: to what does the residual jump (0.01, 1, 100?), and is there a change that it does not notice?</p>"
        return f'<div style="max-width:60em">{head}{ask}{"".join(parts)}</div>'
