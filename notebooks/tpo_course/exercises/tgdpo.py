"""Exercises of 05_tgdpo.ipynb: the guide's token reward, V without delta_Z, the weights, the largest safe alpha, the pull."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tpo_course.derivations.tgdpo import value_by_bisection
from tpo_course.exercise import Case, marks, normal
from tpo_course.pair_cases import guided, log_ratio
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld
from tpo_lib.losses import F_FLOOR
from tpo_lib.types import TokenStats

chapter = Chapter(__file__)


# ---- r_hat


def _token_reward(guide_logps: Tensor, ref_logps: Tensor, guide_beta: float) -> Tensor:
    return (guide_beta * (guide_logps - ref_logps)).detach()


def _reward_cases() -> tuple[Case, ...]:
    draw = normal(0)

    def case(mask: Tensor, guide_beta: float, words: str) -> Case:
        ref = torch.where(mask, -draw(*mask.shape).abs() - 0.5, 0.0)
        guide = torch.where(mask, ref + draw(*mask.shape), 0.0).requires_grad_()
        return Case(words, guide_logps=guide, ref_logps=ref, guide_beta=guide_beta)

    return (
        case(marks(".xxxx.x", "xx....."), 0.1, "responses of five tokens and of two, guide_beta = 0.1"),
        case(marks("xxx"), 2.0, "a single response, guide_beta = 2"),
    )


def _mean_of(values: Tensor) -> Tensor:
    return values.mean(-1, keepdim=True).expand_as(values)


r_hat = chapter.exercise(
    "r_hat",
    _token_reward,
    _reward_cases,
    not_detached=lambda guide_logps, ref_logps, guide_beta: guide_beta * (guide_logps - ref_logps),
    sign_reversed=lambda **given: -_token_reward(**given),
    no_guide_beta=lambda **given: _token_reward(**given | {"guide_beta": 1.0}),
    divided_by_guide_beta=lambda **given: _token_reward(**given | {"guide_beta": 1 / given["guide_beta"]}),
    guide_beta_on_guide_alone=lambda guide_logps, ref_logps, guide_beta: (
        guide_beta * guide_logps - ref_logps
    ).detach(),
    of_probabilities=lambda guide_logps, ref_logps, guide_beta: (
        guide_beta * (guide_logps.exp() - ref_logps.exp()).detach()
    ),
    ratio=lambda guide_logps, ref_logps, guide_beta: (guide_beta * (guide_logps - ref_logps).exp()).detach(),
    averaged=lambda **given: _mean_of(_token_reward(**given)),
    centred=lambda **given: _token_reward(**given) - _mean_of(_token_reward(**given)),
)


# ---- what the derivation gives up, asked before it is measured

what_it_follows = chapter.predict("what_it_follows", "advantage")
how_loose = chapter.predict("how_loose", "much")
where_it_costs = chapter.predict("where_it_costs", "small")
large_f = chapter.predict("large_f", "-")
which_optimum = chapter.predict("which_optimum", "dropped")


# ---- state_value


def _value_cases() -> tuple[Case, ...]:
    draw = normal(7)
    q, ref, temperature = 2 * draw(3, 4), draw(3, 4).log_softmax(-1), 0.5 * draw(3, 4).exp()
    return (
        Case("three states, every token with its own temperature", q=q, ref_logps=ref, temperature=temperature),
        Case("temperatures near 0.02", q=q, ref_logps=ref, temperature=0.02 * temperature),
    )


def _soft(q: Tensor, ref_logps: Tensor, temperature: Tensor) -> Tensor:
    """The V of one temperature a state, given as (n, 1)."""
    return temperature[:, 0] * (ref_logps + q / temperature).logsumexp(-1)


state_value = chapter.exercise(
    "state_value",
    value_by_bisection,
    _value_cases,
    mean_temperature=lambda q, ref_logps, temperature: _soft(q, ref_logps, temperature.mean(-1, keepdim=True)),
    no_temperature=lambda q, ref_logps, temperature: _soft(q, ref_logps, torch.ones_like(q[:, :1])),
    log_z=lambda q, ref_logps, temperature: (ref_logps + q / temperature).logsumexp(-1),
    expected_log_z=lambda q, ref_logps, temperature: (
        (ref_logps.exp() * temperature).sum(-1) * (ref_logps + q / temperature).logsumexp(-1)
    ),
    expectation=lambda q, ref_logps, temperature: (ref_logps.exp() * q).sum(-1),
    stuck_at_the_top=lambda q, ref_logps, temperature: q.amax(-1),
    stuck_at_the_bottom=lambda q, ref_logps, temperature: q.amin(-1),
    too_coarse=lambda **given: value_by_bisection(**given, halvings=10),
)


# ---- token_weights


def _shaped(shape: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """(f_w, f_l): the shape of alpha r_hat, and of -alpha r_hat."""
    return lambda r_hat, alpha: (shape(alpha * r_hat), shape(-alpha * r_hat))


def _f(signal: Tensor) -> Tensor:
    return (1 + signal).clamp_min(F_FLOOR)


_weights = _shaped(_f)


def _weights_cases() -> tuple[Case, ...]:
    by_hand = torch.tensor([[0.0, 1.0, -1.0, 1.9, -1.9, 2.5, -7.0]], dtype=torch.float64)  # f = 0.05 at 1.9
    return (
        Case("r_hat from -7 to 2.5 and alpha = 0.5", r_hat=by_hand, alpha=0.5),
        Case("small r_hat, where no floor is needed", r_hat=0.2 * normal(1)(3, 5), alpha=0.3),
        Case("alpha = 2", r_hat=3 * normal(2)(2, 3), alpha=2.0),
    )


token_weights = chapter.exercise(
    "token_weights",
    _weights,
    _weights_cases,
    same_sign=lambda r_hat, alpha: (_f(alpha * r_hat), _f(alpha * r_hat)),
    signs_swapped=lambda r_hat, alpha: _weights(r_hat, -alpha),
    no_floor=_shaped(lambda signal: 1 + signal),
    absolute_value=_shaped(lambda signal: (1 + signal).abs()),
    floor_at_zero=_shaped(lambda signal: (1 + signal).clamp_min(0.0)),
    floor_of_the_derivations=_shaped(lambda signal: (1 + signal).clamp_min(0.1)),
    floor_on_chosen_alone=lambda r_hat, alpha: (_f(alpha * r_hat), 1 - alpha * r_hat),
    reset_to_one=_shaped(lambda signal: torch.where(1 + signal < F_FLOOR, 1.0, 1 + signal)),
    floored_r_hat=lambda r_hat, alpha: _shaped(lambda signal: 1 + signal)(r_hat.clamp_min(F_FLOOR), alpha),
    alpha_on_the_one=lambda r_hat, alpha: (_f(alpha * (1 + r_hat) - 1), _f(alpha * (1 - r_hat) - 1)),
    no_alpha=lambda r_hat, alpha: _weights(r_hat, 1.0),
    normalised=_shaped(lambda signal: _f(signal) / _mean_of(_f(signal))),
    exponential=_shaped(torch.exp),
)


# ---- largest_alpha


def _largest(r_hat: Tensor, mask: Tensor) -> Tensor:
    return (1 - F_FLOOR) / r_hat[mask].abs().max()


def _alpha_cases() -> tuple[Case, ...]:
    def case(strongest: float, other: float, words: str, off: tuple[float, float] = (9.0, 9.0)) -> Case:
        mask = marks(".xxxx.x", "xx.....")
        r_hat = torch.where(mask, 0.1 * normal(6)(*mask.shape), off[0])  # prompt and padding hold anything
        r_hat[1, 3] = off[1]
        r_hat[0, 3], r_hat[1, 1] = strongest, other
        return Case(words, r_hat=r_hat, mask=mask)

    return (
        case(-2.5, 1.25, "a token that the guide dislikes most of all"),
        case(1.5, -0.75, "a token that the guide likes most of all"),
        case(-2.0, 0.5, "inf and nan where no token is", off=(torch.inf, torch.nan)),
    )


largest_alpha = chapter.exercise(
    "largest_alpha",
    _largest,
    _alpha_cases,
    no_mask=lambda r_hat, mask: (1 - F_FLOOR) / r_hat.abs().max(),
    times_mask=lambda r_hat, mask: (1 - F_FLOOR) / (r_hat * mask).abs().max(),
    most_negative=lambda r_hat, mask: (1 - F_FLOOR) / -r_hat[mask].min(),
    most_positive=lambda r_hat, mask: (1 - F_FLOOR) / r_hat[mask].max(),
    floor_at_zero=lambda r_hat, mask: 1 / r_hat[mask].abs().max(),
    average_token=lambda r_hat, mask: (1 - F_FLOOR) / r_hat[mask].abs().mean(),
    strongest_itself=lambda r_hat, mask: r_hat[mask].abs().max(),
    weakest_token=lambda r_hat, mask: (1 - F_FLOOR) / r_hat[mask].abs().min(),
)


# ---- guide_pull: why TGDPO travels further


def _pull(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    """(B,) what alpha adds to the margin: alpha beta sum r_hat log(pi/pi_ref), over both responses."""
    return alpha * beta * sum(_along_guide(side, guide_beta) for side in (chosen, rejected))


def _along_guide(side: TokenStats, guide_beta: float) -> Tensor:
    return (_r_hat(side, guide_beta) * log_ratio(side)).sum(-1).detach()


def _r_hat(side: TokenStats, guide_beta: float) -> Tensor:
    return _token_reward(side.guide_logps, side.ref_logps, guide_beta)


def _pull_cases() -> tuple[Case, ...]:
    draw = normal(8)
    pair = {
        "chosen": guided(marks(".xxxx.", "..xxx.", "xx.xx."), draw).map(Tensor.detach),
        "rejected": guided(marks(".xx...", "..x.xx", "xxxxxx"), draw).map(Tensor.detach),
    }
    itself = {name: replace(side, logps=side.guide_logps) for name, side in pair.items()}
    return (
        Case("a policy that has moved", **pair, beta=0.1, alpha=0.5, guide_beta=0.3),
        Case("a policy that has become its guide", **itself, beta=0.5, alpha=0.4, guide_beta=0.5),
    )


def _weighted_margin(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    plain = beta * (log_ratio(chosen).sum(-1) - log_ratio(rejected).sum(-1))
    return plain + _pull(chosen, rejected, beta, alpha, guide_beta)


guide_pull = chapter.exercise(
    "guide_pull",
    _pull,
    _pull_cases,
    difference=lambda chosen, rejected, beta, alpha, guide_beta: (
        alpha * beta * (_along_guide(chosen, guide_beta) - _along_guide(rejected, guide_beta))
    ),
    whole_margin=_weighted_margin,
    no_guide_beta=lambda **given: _pull(**given) / given["guide_beta"],
    no_beta=lambda **given: _pull(**given) / given["beta"],
    no_alpha=lambda **given: _pull(**given) / given["alpha"],
    wrong_guide_beta=lambda **given: _pull(**given | {"guide_beta": given["beta"]}),
    no_reference=lambda chosen, rejected, beta, alpha, guide_beta: (
        alpha * beta * sum((_r_hat(side, guide_beta) * side.logps).sum(-1) for side in (chosen, rejected))
    ),
    sign_reversed=lambda **given: -_pull(**given),
    chosen_alone=lambda chosen, rejected, beta, alpha, guide_beta: alpha * beta * _along_guide(chosen, guide_beta),
    sums_multiplied=lambda chosen, rejected, beta, alpha, guide_beta: (
        alpha * beta * sum(_r_hat(side, guide_beta).sum(-1) * log_ratio(side).sum(-1) for side in (chosen, rejected))
    ),
)


# ---- predictions, derivations, explanations


def _world() -> TokenWorld:
    return TokenWorld(vocab_size=3, horizon=2, seed=5, num_prompts=2)


predict = chapter.answer
along_the_guide = chapter.predict("along_the_guide", "+")
at_a_token = chapter.predict("at_a_token", 0.7, within=0.02, as_chosen=1.3, not_weighted=1.0, r_hat_itself=0.6)
given_up = chapter.complete(
    "given_up",
    "free_walk",
    "own_states",
    "look_ahead",
    "exact_sum",
    relaxation_is_a_bound=(None, "free_walk", None, None),
    delta_is_free=(None, None, None, "nothing"),
)
tgdpo_in_steps = chapter.order(
    "tgdpo_in_steps",
    "timesteps",
    "states",
    "shaped",
    "solve",
    "preference",
    "drop",
    drop_too_soon=("drop", "preference"),
    reward_first=("solve", "shaped"),
)
delta_z_notices = chapter.break_it(
    "delta_z_notices",
    "tgdpo.guided_preference",
    _world,
    {
        "dropped": ("phi + delta)", "phi)"),
        "shifted": ("tools.gap(w, partition)", "tools.gap(w, partition + 7)"),
        "sign": ("phi + delta)", "phi - delta)"),
        "best_policy": ("guided_optimum(w, h)[0]", "w.soft_optimum(h.beta)[1]"),
    },
    beta=0.5,
    alpha=0.5,
    guide_beta=1.0,
)
what_each_step_costs = chapter.open_ended("what_each_step_costs")


quiz = chapter.quiz()
