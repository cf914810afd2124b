"""Derivation 5: TGDPO, from the bound on PPO to token weights, and what its elimination of Z costs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.dpo import BETAS
from tpo_course.derivations.steps import Hyper, Step
from tpo_course.tabular import minimise
from tpo_course.world import TokenWorld, Values
from tpo_lib import losses


def guide(w: TokenWorld, h: Hyper) -> Tensor:
    """(S, V) log pi_hat: a DPO model trained to the end with guide_beta on all pairs."""
    return w.soft_optimum(h.guide_beta)[1]


def token_reward(w: TokenWorld, h: Hyper) -> Tensor:
    """(S, V) r_hat = guide_beta log(pi_hat/pi_ref)."""
    return h.guide_beta * (guide(w, h) - w.ref_logps)


def shaping(w: TokenWorld, h: Hyper) -> Tensor:
    """(S, V) f = 1 + alpha r_hat with alpha made small enough for f >= 0.1 everywhere, as the theorems need f > 0."""
    r_hat = token_reward(w, h)
    return 1 + min(h.alpha, 0.9 / float(r_hat.abs().max())) * r_hat


def guided_optimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    """log pi*_f (S, V) and log Z (S,) of pi*_f = pi_ref exp(R/(beta f))/Z."""
    return w.gibbs(w.reward / (h.beta * shaping(w, h)))


def value_by_bisection(q: Tensor, ref_logps: Tensor, temperature: Tensor, *, halvings: int = 80) -> Tensor:
    """(n,) V that solve sum_a pi_ref exp((q - V)/temperature) = 1, from three (n, V) tables."""
    low, high = q.amin(-1), q.amax(-1)  # the sum falls in V: at least 1 at the smallest q, at most 1 at the largest
    for _ in range(halvings):  # after 80 nothing is left in float64
        v = (low + high) / 2
        over = (ref_logps + (q - v[:, None]) / temperature).logsumexp(-1) > 0
        low, high = torch.where(over, v, low), torch.where(over, high, v)
    return (low + high) / 2


def optimum_without_delta(w: TokenWorld, temperature: Tensor) -> tuple[Values, Tensor]:
    """V, Q and log pi of sum_a pi_ref exp((R + V(s') - V(s))/temperature) = 1, with pi its summands; temperature is (S, V), > 0.

    Where the temperature is one number this is `soft_optimum`; where it depends on the token no logsumexp solves for V.
    """
    ref = w.ref_logps
    soft = w.backup(w.reward, lambda q, at: value_by_bisection(q, ref[at], temperature[at]), gamma=w.gamma)
    return soft, ref + soft.a / temperature


def split(w: TokenWorld, potential: Tensor) -> Tensor:
    """(S, V) R + gamma Phi(s') - Phi(s) for a (S,) potential Phi, 0 after the end: the reward, split over tokens differently.

    Every return loses Phi(s_0), the same for all responses to a prompt.
    """
    return w.backup(w.reward, lambda q, rows: potential[rows], gamma=w.gamma).q - potential[:, None]


def random_potential(w: TokenWorld, seed: int) -> Tensor:
    """(S,) standard normal numbers."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(w.num_states, generator=draw, dtype=torch.float64)


def _gain(w: TokenWorld, logps: Tensor, beta: float) -> Tensor:
    """(S,) E_{a~pi}[R(s,a) - beta log(pi/pi_ref)]: what a policy earns while it stands in s."""
    return (logps.exp() * w.reward).sum(-1) - beta * w.kl(logps, w.ref_logps)


def by_timestep(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(1)
    paid = w.by_prompt(w.returns - h.beta * tools.logratio(w, pi))
    whole = w.expected((w.by_prompt(w.sequence_logps(pi)).exp() * paid).sum(-1))
    gains = w.visits(pi) * _gain(w, pi, h.beta)
    return whole, torch.stack([gains[level].sum() for level in w.levels]).sum()


def token_maxima(w: TokenWorld, beta: float, reward: Tensor | None = None) -> Tensor:
    """(T,) max over pi of E_{s~D_t}E_{a~pi}[R - beta log(pi/pi_ref)], for each t alone; `reward` stands in for R if given.

    Nothing is paid before t, so the best policy walks straight to the best state of that depth, or ends early (worth 0).
    """
    _, log_z = w.gibbs((w.reward if reward is None else reward) / beta)
    best = []
    for t, level in enumerate(w.levels):
        at_best = beta * log_z[level].view(w.num_prompts, -1).amax(-1)  # (P,)
        best.append(w.expected(at_best.clamp_min(0) if w.eos and t else at_best))
    return torch.stack(best)


def upper_bound(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, star = w.soft_optimum(h.beta)
    best, maxima, winners = w.expected(soft.v), token_maxima(w, h.beta), _winners(w, h.beta)

    def terms(pi: Tensor) -> Tensor:
        gains = w.visits(pi) * _gain(w, pi, h.beta)
        return torch.stack([gains[level].sum() for level in w.levels])  # (T,) J_t, by its definition

    climbed = tools.ascend(lambda pi: (terms(pi) - maxima).max(), [w.ref_logps])
    tried = torch.stack([terms(pi) for pi in [star, *winners, *tools.rivals(w, 4), *climbed]])  # (n, T)
    attained = torch.stack([terms(pi)[t] for t, pi in enumerate(winners)])
    # the theorem; then each of its two sides is reached by a policy, and passed by none that was tried
    left = [best, best, tried.sum(-1).max(), *maxima, *tried.amax(0)]
    return torch.stack(left), torch.stack([maxima.sum(), terms(star).sum(), best, *attained, *maxima])


def _winners(w: TokenWorld, beta: float) -> list[Tensor]:
    """T tables (S, V): for each t the policy of `token_maxima`, which walks to the best state of depth t."""
    (star, log_z), found = w.gibbs(w.reward / beta), []
    for level in w.levels:
        walk = w.backup(
            torch.zeros_like(w.reward),
            lambda q, at, level=level: beta * log_z[at] if at == level else q.amax(-1),
            gamma=1.0,
        )
        pi = (1e12 * walk.q).log_softmax(-1)  # all on the best token
        pi[level] = star[level]
        found.append(pi)
    return found


def _slack(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {}
    for beta in BETAS:
        best = w.expected(w.soft_optimum(beta)[0].v)
        found[f"best sequence-level value at beta={beta:g}"] = float(best)
        found[f"slack of the bound at beta={beta:g}"] = float(token_maxima(w, beta).sum() - best)
    return found


def relaxed_optimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, data = w.random_policy(2), w.visits(w.ref_logps)
    star, log_z = w.gibbs(w.reward / h.beta)
    return (data * _gain(w, pi, h.beta)).sum(), (data * (h.beta * log_z - h.beta * w.kl(pi, star))).sum()


def relaxation_error(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star, _ = w.gibbs(w.reward / h.beta)
    gain, data = _gain(w, star, h.beta), w.visits(w.ref_logps)
    return tools.objective(w, star, h.beta) - (data * gain).sum(), ((w.visits(star) - data) * gain).sum()


def _relaxation_over_beta(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found, data = {}, w.visits(w.ref_logps)
    for beta in BETAS:
        star, _ = w.gibbs(w.reward / beta)
        best, true = w.expected(w.soft_optimum(beta)[0].v), tools.objective(w, star, beta)
        promised = (data * _gain(w, star, beta)).sum()
        moved = torch.stack([(w.visits(star) - data)[level].abs().sum() / 2 for level in w.levels])
        found[f"relaxed value minus true optimum, beta={beta:g}"] = float(promised - best)
        found[f"lost by using the relaxed optimum, beta={beta:g}"] = float(best - true)
        found[f"largest distance of D_t from D, beta={beta:g}"] = float(moved.max())
    return found


def relaxation_bound(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    rivals = [w.random_policy(seed, scale) for seed, scale in enumerate((0.1, 0.5, 1.0, 3.0, 10.0))]
    tried = [w.gibbs(w.reward / h.beta)[0], *rivals]  # from near pi_ref to nearly deterministic
    error, by_distance, by_kl = torch.stack([relaxation_bounds(w, h.beta, pi) for pi in tried], -1)
    # the bounds have room, so their KL is compared with that of whole responses, from either side
    ratios = [w.sequence_logps(pi).exp()[:, None] * w.tokenwise(pi - w.ref_logps) for pi in tried]  # (R, T) each
    steps = torch.stack([(w.prompt_probs[w.responses.prompt, None] * ratio).sum(0) for ratio in ratios])
    walked, counted = torch.stack([_walked(w, pi) for pi in tried]).flatten(), (steps.cumsum(-1) - steps).flatten()
    return torch.cat([error, by_distance, walked, counted]), torch.cat([by_distance, by_kl, counted, walked])


def _walked(w: TokenWorld, logps: Tensor) -> Tensor:
    """(T,) KL(pi || pi_ref) of the tokens before each t, in nats."""
    paid = w.visits(logps) * w.kl(logps, w.ref_logps)  # (S,) of the tokens written in s
    steps = torch.stack([paid[level].sum() for level in w.levels])
    return steps.cumsum(0) - steps


def relaxation_bounds(w: TokenWorld, beta: float, logps: Tensor) -> Tensor:
    """(3,) |J - J_D| of a policy; its bound by total variation; that by Pinsker. D is what pi_ref visits."""
    gain, shift = _gain(w, logps, beta), w.visits(logps) - w.visits(w.ref_logps)
    by_distance, by_kl = 0.0, 0.0
    for level, walked in zip(w.levels, _walked(w, logps), strict=True):
        ended = -shift[level].sum()  # a response that has ended is in a state too, where nothing is earned
        distance = (shift[level].abs().sum() + ended.abs()) / 2
        spread = gain[level].max().clamp_min(0) - gain[level].min().clamp_max(0)
        by_distance, by_kl = by_distance + spread * distance, by_kl + spread * (walked / 2).sqrt()
    return torch.stack([(shift * gain).sum().abs(), by_distance, by_kl])


def _bounds_over_beta(w: TokenWorld, h: Hyper) -> dict[str, float]:
    names = ("error", "bound by total variation", "bound by KL")
    return {
        f"{name} at beta={beta:g}": float(value)
        for beta in BETAS
        for name, value in zip(names, relaxation_bounds(w, beta, w.gibbs(w.reward / beta)[0]), strict=True)
    }


def other_splits(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    other = split(w, random_potential(w, 1))
    return tools.gap(w, w.along(other, gamma=w.gamma)), tools.gap(w, w.returns)


def slack_and_loss(w: TokenWorld, beta: float, potential: Tensor) -> tuple[float, float]:
    """Slack of Theorem 4.1, and what the relaxed optimum loses, if the reward is split by a (S,) potential."""
    best, reward = w.expected(w.soft_optimum(beta)[0].v), split(w, potential)
    slack = token_maxima(w, beta, reward).sum() - (best - w.expected(potential))
    return float(slack), float(best - tools.objective(w, w.gibbs(reward / beta)[0], beta))


def _over_splits(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {}
    for beta in BETAS:
        random = [slack_and_loss(w, beta, random_potential(w, seed)) for seed in range(50)]
        for name, values in zip(("slack", "loss"), zip(*random, strict=True), strict=True):
            found[f"smallest {name} of 50 random splits at beta={beta:g}"] = min(values)
            found[f"largest {name} of 50 random splits at beta={beta:g}"] = max(values)
    return found


def natural_split(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, star = w.soft_optimum(h.beta)
    natural = split(w, soft.v)
    relaxed, bounds = w.gibbs(natural / h.beta)[0], token_maxima(w, h.beta, natural)
    return torch.cat([relaxed.flatten(), bounds]), torch.cat([star.flatten(), torch.zeros_like(bounds)])


def guided_objective(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(3)
    star, log_z = guided_optimum(w, h)
    per_state = (pi.exp() * (w.reward / (h.beta * shaping(w, h)) - (pi - w.ref_logps))).sum(-1)
    return per_state, log_z - w.kl(pi, star)


def guided_reward(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star, log_z = guided_optimum(w, h)
    f = shaping(w, h)
    return w.reward, h.beta * f * (star - w.ref_logps) + h.beta * f * log_z[:, None]


def f_must_be_positive(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    f = shaping(w, h)
    f = torch.cat([-f[:, :1], f[:, 1:]], dim=-1)  # token 0 gets a negative weight on purpose

    def log_star(reward: Tensor) -> Tensor:
        return w.gibbs(reward / (h.beta * f))[0]

    columns = [tools.gradient(lambda r, a=a: log_star(r)[:, a].sum(), w.reward)[:, a] for a in range(w.vocab_size)]
    return h.beta * torch.stack(columns, dim=-1), (1 - log_star(w.reward).exp()) / f


def phi_and_delta(w: TokenWorld, logps: Tensor, h: Hyper) -> tuple[Tensor, Tensor]:
    """(R,) sum_t beta f log(pi/pi_ref) and sum_t beta f log Z(s_t); phi and delta_Z are their gaps over pairs."""
    f, (_, log_z) = shaping(w, h), guided_optimum(w, h)
    return w.along(h.beta * f * (logps - w.ref_logps)), w.along(h.beta * f * log_z[:, None])


def guided_preference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    weighted, partition = phi_and_delta(w, guided_optimum(w, h)[0], h)
    phi, delta = tools.gap(w, weighted), tools.gap(w, partition)
    return w.pairs.prob, torch.sigmoid(phi + delta)


def one_pair(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, f = w.random_policy(4), shaping(w, h)
    left, right = [], []
    for pair in (0, len(w.pairs.chosen) // 2):
        y_w, y_l = w.pairs.chosen[pair], w.pairs.rejected[pair]

        def log_prob(logits: Tensor, y_w=y_w, y_l=y_l) -> Tensor:
            weighted, partition = phi_and_delta(w, logits.log_softmax(-1), h)
            return F.logsigmoid(weighted[y_w] - weighted[y_l] + partition[y_w] - partition[y_l])

        left.append(tools.gradient(log_prob, pi) / (1 - log_prob(pi).exp()))
        signs = torch.zeros(len(w.returns), dtype=torch.float64)
        signs[y_w], signs[y_l] = 1.0, -1.0
        right.append(tools.score(w, pi, signs[:, None] * h.beta * w.tokenwise(f)))
    return torch.stack(left), torch.stack(right)


def _argmax(up: float, down: float) -> Tensor:
    """The phi at which log sigma(phi + up) + log sigma(-phi + down)/2 is largest."""
    low, high = torch.tensor(-99.0, dtype=torch.float64), torch.tensor(99.0, dtype=torch.float64)
    for _ in range(80):  # bisection on the slope, which falls
        phi = (low + high) / 2
        slope = torch.sigmoid(-(phi + up)) - 0.5 * torch.sigmoid(phi - down)
        low, high = (phi, high) if slope > 0 else (low, phi)
    return low


def both_labels(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    _, partition = phi_and_delta(w, guided_optimum(w, h)[0], h)
    pair = int(tools.gap(w, partition).argmax())
    y_w, y_l = w.pairs.chosen[pair], w.pairs.rejected[pair]
    one, other = partition[y_w] - partition[y_l], partition[y_l] - partition[y_w]  # the same pair, labelled either way
    return _argmax(float(one), float(other)), torch.tensor(2.0, dtype=torch.float64).log() - one


def _both_ways(w: TokenWorld, h: Hyper) -> dict[str, float]:
    delta = tools.gap(w, phi_and_delta(w, guided_optimum(w, h)[0], h)[1])
    return {
        "argmax without delta_Z": float(_argmax(0.0, 0.0)),
        "argmax with delta_Z = (2, -2)": float(_argmax(2.0, -2.0)),
        "mean |delta_Z| over the pairs of this world": float(tools.mean_over_pairs(w, delta.abs())),
        "largest |delta_Z|": float(delta.abs().max()),
    }


def two_pairs(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    with_delta = ((0.5 * e + (0.25 * e**2 + 2 * e**3).sqrt()) / e**3).log()  # a quadratic equation in exp(phi)
    without = torch.tensor(2.0, dtype=torch.float64).log()
    return torch.stack([_argmax(0.0, 0.0), _argmax(2.0, -1.0)]), torch.stack([without, with_delta])


def _two_argmaxes(w: TokenWorld, h: Hyper) -> dict[str, float]:
    without, with_delta = two_pairs(w, h)[1].tolist()
    return {"argmax without delta_Z": without, "argmax with delta_Z = (2, -1)": with_delta}


def _guided_loss(w: TokenWorld, logits: Tensor, h: Hyper, *, keep_delta: bool) -> Tensor:
    weighted, partition = phi_and_delta(w, logits.log_softmax(-1), h)
    margin = tools.gap(w, weighted) + (tools.gap(w, partition) if keep_delta else 0.0)
    return -tools.mean_over_pairs(w, F.logsigmoid(margin))


def delta_keeps_the_optimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star, _ = guided_optimum(w, h)
    return tools.at_rest(w, lambda z: _guided_loss(w, z, h, keep_delta=True), star)


def _two_optima(w: TokenWorld, h: Hyper) -> dict[str, float]:
    star, _ = guided_optimum(w, h)
    fit = minimise(lambda z: _guided_loss(w, z, h, keep_delta=False), w.ref_logps, steps=15)
    trained, (_, dropped) = fit.policy.logps(), optimum_without_delta(w, h.beta * shaping(w, h))
    myopic, (soft, best) = w.gibbs(w.reward / h.beta)[0], w.soft_optimum(h.beta)
    return {
        "KL(pi with delta_Z || pi without), nats per response": float(tools.mean_seq_kl(w, star, dropped)),
        "J(pi_ref)": float(tools.objective(w, w.ref_logps, h.beta)),
        "J(optimum with delta_Z)": float(tools.objective(w, star, h.beta)),
        "J(optimum without delta_Z)": float(tools.objective(w, dropped, h.beta)),
        "J(best policy)": float(w.expected(soft.v)),
        "f = 1: J(optimum with delta_Z)": float(tools.objective(w, myopic, h.beta)),
        "f = 1: J(optimum without delta_Z), which is DPO's": float(tools.objective(w, best, h.beta)),
        "slope left by the fit": fit.grad_norm,
        "KL(pi trained without delta_Z || its closed form), nats": float(tools.mean_seq_kl(w, trained, dropped)),
    }


def value_without_delta(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    f = shaping(w, h)
    _, pi = optimum_without_delta(w, h.beta * f)
    plain, _ = optimum_without_delta(w, h.beta * torch.ones_like(f))
    return torch.cat([pi.exp().sum(-1), plain.v]), torch.cat([torch.ones_like(plain.v), w.soft_optimum(h.beta)[0].v])


def telescopes_without_delta(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    f = shaping(w, h)
    soft, pi = optimum_without_delta(w, h.beta * f)
    return w.along(h.beta * f * (pi - w.ref_logps)), w.returns - soft.v[w.responses.prompt]


def exact_without_delta(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    _, pi = optimum_without_delta(w, h.beta * shaping(w, h))
    return tools.at_rest(w, lambda z: _guided_loss(w, z, h, keep_delta=False), pi)


def delta_is_a_split(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    temperature = h.beta * shaping(w, h)
    soft, pi = optimum_without_delta(w, temperature)
    guided, log_z = w.gibbs(split(w, soft.v) / temperature)  # Theorem 4.3, its reward split by V
    return torch.cat([guided, log_z[:, None]], -1), torch.cat([pi, torch.zeros_like(log_z)[:, None]], -1)


def _weights(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    """(R, T) f_w and f_l with the floor of the library."""
    signal = h.alpha * w.tokenwise(token_reward(w, h))
    return (1 + signal).clamp_min(losses.F_FLOOR), (1 - signal).clamp_min(losses.F_FLOOR)


def _margin(w: TokenWorld, logps: Tensor, h: Hyper) -> Tensor:
    """(B,) TGDPO's margin from token tables."""
    ratio = w.tokenwise(logps - w.ref_logps)
    as_chosen, as_rejected = (h.beta * (f * ratio).sum(-1) for f in _weights(w, h))
    return as_chosen[w.pairs.chosen] - as_rejected[w.pairs.rejected]


def loss(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, r_hat = w.random_policy(5), token_reward(w, h)
    f_w = (1 + h.alpha * r_hat).clamp_min(losses.F_FLOOR)
    f_l = (1 - h.alpha * r_hat).clamp_min(losses.F_FLOOR)
    as_chosen, as_rejected = w.along(f_w * (pi - w.ref_logps)), w.along(f_l * (pi - w.ref_logps))
    by_hand = -F.logsigmoid(h.beta * as_chosen[w.pairs.chosen] - h.beta * as_rejected[w.pairs.rejected])
    return _expected(w, pi, h), tools.mean_over_pairs(w, by_hand)


def _expected(w: TokenWorld, logits: Tensor, h: Hyper) -> Tensor:
    options = {"beta": h.beta, "alpha": h.alpha, "guide_beta": h.guide_beta}
    return w.expected_loss("tgdpo", logits, guide=guide(w, h), **options)


def _one_policy_two_f(w: TokenWorld, h: Hyper) -> dict[str, float]:
    f_w = shaping(w, h)
    f_l = 2 - f_w  # 1 - alpha r_hat
    star, log_zw = w.gibbs(w.reward / (h.beta * f_w))
    _, log_zl = w.gibbs(w.reward / (h.beta * f_l))
    as_chosen = w.along(h.beta * f_w * (star - w.ref_logps + log_zw[:, None]))
    as_rejected = w.along(h.beta * f_l * (star - w.ref_logps + log_zl[:, None]))
    claimed = torch.sigmoid(as_chosen[w.pairs.chosen] - as_rejected[w.pairs.rejected])
    (value_w, pi_w), (value_l, pi_l) = (optimum_without_delta(w, h.beta * f) for f in (f_w, f_l))
    return {
        "KL(optimum without delta_Z of f_w || that of f_l), nats": float(tools.mean_seq_kl(w, pi_w, pi_l)),
        "their V(s_0), largest difference": float((value_w.v - value_l.v)[: w.num_prompts].abs().max()),
        "largest error of sigma(phi + delta_Z) with one pi*_f for f_w and f_l": float(
            (claimed - w.pairs.prob).abs().max()
        ),
    }


def gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(6)
    f_w, f_l = _weights(w, h)
    pull = -h.beta * w.pairs.weight * torch.sigmoid(-_margin(w, pi, h))
    push_w = tools.onto_responses(w, pull, torch.zeros_like(pull))[:, None] * f_w  # (R, T)
    push_l = tools.onto_responses(w, torch.zeros_like(pull), -pull)[:, None] * f_l
    return tools.gradient(lambda z: _expected(w, z, h), pi), tools.score(w, pi, push_w + push_l)


def four_behaviours(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, mask, c, r = w.random_policy(7), w.responses.mask, w.pairs.chosen, w.pairs.rejected
    options = {"beta": h.beta, "alpha": h.alpha, "guide_beta": h.guide_beta, "floor": 1e-6, "shaping": "exp"}
    found = tools.pushes(w, "tgdpo", pi, guide=guide(w, h), **options)
    signal = h.alpha * w.tokenwise(token_reward(w, h))
    ratio = w.tokenwise(pi - w.ref_logps)
    margin = h.beta * ((signal.exp() * ratio).sum(-1)[c] - ((-signal).exp() * ratio).sum(-1)[r])
    plain = h.beta * torch.sigmoid(-margin)[:, None]  # what every token would get without guidance
    up, down = -plain * torch.exp(signal[c]), plain * torch.exp(-signal[r])
    by_hand = torch.where(torch.cat([mask[c], mask[r]]), torch.cat([up, down]), 0.0)
    return torch.cat([found.chosen.logps, found.rejected.logps]), by_hand


def _shares(w: TokenWorld, h: Hyper) -> dict[str, float]:
    r_hat, mask = w.tokenwise(token_reward(w, h)), w.responses.mask
    weight = w.pairs.weight[:, None]
    found = {}
    for side, rows, up, down in (
        ("chosen", w.pairs.chosen, "pushed up more", "pushed up less"),
        ("rejected", w.pairs.rejected, "pushed down less", "pushed down more"),
    ):
        tokens = (weight * mask[rows]).sum()
        good = (weight * (mask[rows] & (r_hat[rows] > 0))).sum() / tokens
        found[f"{side}, r_hat > 0: {up}, share"] = float(good)
        found[f"{side}, r_hat < 0: {down}, share"] = float(1 - good)
    return found


def floor(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    strong = 3 * h.alpha  # strong enough for the floor to bite
    chosen, rejected = w.pair_stats(w.stats(w.random_policy(8), guide=guide(w, h)), w.pairs)
    found = losses.tgdpo(chosen, rejected, beta=h.beta, alpha=strong, guide_beta=h.guide_beta).token_weights
    signal = strong * w.tokenwise(token_reward(w, h))
    signal = torch.cat([signal[w.pairs.chosen], -signal[w.pairs.rejected]])  # (2B, T)
    mask = torch.cat([chosen.mask, rejected.mask])
    return found, torch.where(mask, torch.maximum(1 + signal, torch.full_like(signal, 0.01)), 0.0)


def _floored(w: TokenWorld, h: Hyper) -> dict[str, float]:
    r_hat, mask = w.tokenwise(token_reward(w, h)), w.responses.mask
    weight, c, r = w.pairs.weight[:, None], w.pairs.chosen, w.pairs.rejected
    found = {}
    for alpha in (0.1, 0.5, 1.0, 2.0):
        reversed_w = (weight * (mask & (1 + alpha * r_hat <= losses.F_FLOOR))[c]).sum()
        reversed_l = (weight * (mask & (1 - alpha * r_hat <= losses.F_FLOOR))[r]).sum()
        tokens = (weight * mask[c]).sum() + (weight * mask[r]).sum()
        found[f"share of tokens on the floor at alpha={alpha:g}"] = float((reversed_w + reversed_l) / tokens)
    return found


STEPS = (
    Step(by_timestep, gamma_one=True, implements="tpo_course.world.TokenWorld.visits"),
    Step(upper_bound, relation="<=", gamma_one=True, numbers=_slack),
    Step(relaxed_optimum),
    Step(relaxation_error, gamma_one=True, numbers=_relaxation_over_beta),
    Step(relaxation_bound, relation="<=", gamma_one=True, numbers=_bounds_over_beta),
    Step(other_splits, numbers=_over_splits, implements="tpo_course.derivations.tgdpo.split"),
    Step(natural_split),
    Step(guided_objective, implements="tpo_course.derivations.tgdpo.guided_optimum"),
    Step(guided_reward, by_definition=True),
    Step(f_must_be_positive),
    Step(guided_preference, gamma_one=True),
    Step(one_pair),
    Step(both_labels, numbers=_both_ways),
    Step(two_pairs, numbers=_two_argmaxes),
    Step(delta_keeps_the_optimum, gamma_one=True, numbers=_two_optima),
    Step(value_without_delta, implements="tpo_course.derivations.tgdpo.optimum_without_delta"),
    Step(telescopes_without_delta, gamma_one=True),
    Step(exact_without_delta, gamma_one=True),
    Step(delta_is_a_split),
    Step(loss, implements="tpo_lib.losses.tgdpo", numbers=_one_policy_two_f),
    Step(gradient, implements="tpo_lib.losses.tgdpo"),
    Step(four_behaviours, implements="tpo_lib.losses.tgdpo", numbers=_shares),
    Step(floor, implements="tpo_lib.losses.tgdpo", numbers=_floored),
)
