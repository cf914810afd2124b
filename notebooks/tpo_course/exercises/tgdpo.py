"""Exercises of 05_tgdpo.ipynb: the guide's token reward, V without delta_Z, the weights, TGDPO's loss, the largest safe alpha."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations.tgdpo import value_by_bisection
from tpo_course.exercise import Case, loss_of, marks, narrow, normal
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld
from tpo_lib import losses
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
    floor_on_chosen_alone=lambda r_hat, alpha: (_f(alpha * r_hat), 1 - alpha * r_hat),
    reset_to_one=_shaped(lambda signal: torch.where(1 + signal < F_FLOOR, 1.0, 1 + signal)),
    floored_r_hat=lambda r_hat, alpha: _shaped(lambda signal: 1 + signal)(r_hat.clamp_min(F_FLOOR), alpha),
    alpha_on_the_one=lambda r_hat, alpha: (_f(alpha * (1 + r_hat) - 1), _f(alpha * (1 - r_hat) - 1)),
    no_alpha=lambda r_hat, alpha: _weights(r_hat, 1.0),
    normalised=_shaped(lambda signal: _f(signal) / _mean_of(_f(signal))),
    exponential=_shaped(torch.exp),
)


# ---- tgdpo_loss


def _side(mask: Tensor, draw: Callable[..., Tensor], *, learn: bool = False) -> TokenStats:
    """Statistics of responses; the guide's are a leaf with a gradient, the policy's are one if `learn`."""

    def values(raw: Tensor) -> Tensor:
        return torch.where(mask, raw, 0.0)

    ref = values(-draw(*mask.shape).abs() - 0.5)
    logps = values(ref + 0.7 * draw(*mask.shape))
    guide = values(ref + 1.5 * draw(*mask.shape))
    return TokenStats(logps.requires_grad_(learn), ref, mask, guide_logps=guide.requires_grad_())


def _far_apart() -> dict[str, TokenStats]:
    """One pair that the policy has wrong by hundreds of nats, in float32 as in training."""
    draw, sides = normal(5), {}
    for name, row, shift in (("chosen", "xxx.", -300.0), ("rejected", "xxxx", 5.0)):
        side = _side(marks(row), draw)
        sides[name] = narrow(replace(side, logps=side.logps + shift * side.mask))
    return sides


def _loss_cases() -> tuple[Case, ...]:
    """Gradients at the policy are compared on full rows alone: at padding, where nobody needs them, they may differ."""
    draw = normal(3)
    holes = {
        "chosen": _side(marks(".xxxx.", "..xxx.", "xx.xx."), draw),
        "rejected": _side(marks(".xx...", "..x.xx", "xxxxxx"), draw),
    }
    full = {name: _side(marks("xxxxx", "xxxxx"), draw, learn=True) for name in ("chosen", "rejected")}
    return (
        Case("responses of unequal length", **holes, beta=0.1, alpha=0.5, guide_beta=0.3),
        Case("strong guidance, with gradients", **full, beta=0.5, alpha=1.5, guide_beta=0.8),
        Case("a pair that is wrong by hundreds of nats", **_far_apart(), beta=0.7, alpha=0.5, guide_beta=0.2),
    )


_loss = loss_of(losses.tgdpo)


def _ratio(side: TokenStats) -> Tensor:
    return side.logps - side.ref_logps  # (B, T-1), 0 off-mask


def _per_token(side: TokenStats, values: Tensor) -> Tensor:
    """(B, 1) mean of (B, T-1) values over the tokens of each response."""
    return torch.where(side.mask, values, 0.0).sum(-1, keepdim=True) / side.mask.sum(-1, keepdim=True)


def _weighted(side: TokenStats, signal: Tensor) -> Tensor:
    return _f(signal.detach()) * _ratio(side)


def _from_rewards(
    reward: Callable[[TokenStats, Tensor], Tensor],
    signs: tuple[int, int] = (1, -1),
    log_sigmoid: Callable[[Tensor], Tensor] = F.logsigmoid,
) -> Callable[..., Tensor]:
    """-log sigma(beta reward(chosen) - beta reward(rejected)); `reward` sees a side and its +-alpha r_hat, not detached."""

    def loss(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
        won, lost = (
            beta * reward(side, sign * alpha * guide_beta * (side.guide_logps - side.ref_logps)).sum(-1)
            for side, sign in zip((chosen, rejected), signs, strict=True)
        )
        return -log_sigmoid(won - lost)

    return loss


def _weighted_pair(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    f = _f(alpha * guide_beta * (chosen.guide_logps - chosen.ref_logps).detach())
    return _per_token(chosen, f)[:, 0] * losses.dpo(chosen, rejected, beta=beta).loss


def _guided_by_itself(chosen: TokenStats, rejected: TokenStats, **given: float) -> Tensor:
    return _loss(*(replace(side, guide_logps=side.logps.detach()) for side in (chosen, rejected)), **given)


tgdpo_loss = chapter.exercise(
    "tgdpo_loss",
    _loss,
    _loss_cases,
    wrong_guide_beta=lambda **given: _loss(**given | {"guide_beta": given["beta"]}),
    same_sign=_from_rewards(_weighted, signs=(1, 1)),
    weights_swapped=_from_rewards(_weighted, signs=(-1, 1)),
    no_floor=_from_rewards(lambda side, signal: (1 + signal.detach()) * _ratio(side)),
    absolute_value=_from_rewards(lambda side, signal: (1 + signal.detach()).abs() * _ratio(side)),
    not_detached=_from_rewards(lambda side, signal: _f(signal) * _ratio(side)),
    normalised=_from_rewards(lambda side, signal: _weighted(side, signal) / _per_token(side, _f(signal.detach()))),
    weighted_pair=_weighted_pair,
    reference_not_weighted=_from_rewards(lambda side, signal: _f(signal.detach()) * side.logps - side.ref_logps),
    mean=_from_rewards(lambda side, signal: _per_token(side, _weighted(side, signal))),
    detached=lambda **given: _loss(**given).detach(),
    no_weights=lambda chosen, rejected, beta, **_: losses.dpo(chosen, rejected, beta=beta).loss,
    guided_by_itself=_guided_by_itself,
    no_reference=_from_rewards(lambda side, signal: _f(signal.detach()) * side.logps),
    no_guide_beta=lambda **given: _loss(**given | {"guide_beta": 1.0}),
    guide_beta_for_beta=lambda **given: _loss(**given | {"beta": given["guide_beta"]}),
    r_hat_summed=_from_rewards(lambda side, signal: _f(signal.detach().sum(-1, keepdim=True)) * _ratio(side)),
    beta_outside=lambda **given: given["beta"] * _loss(**given | {"beta": 1.0}),
    exponential=_from_rewards(lambda side, signal: signal.detach().exp() * _ratio(side)),
    no_beta=lambda **given: _loss(**given | {"beta": 1.0}),
    swapped=lambda chosen, rejected, **given: _loss(rejected, chosen, **given),
    no_minus=lambda **given: -_loss(**given),
    log_of_sigmoid=_from_rewards(_weighted, log_sigmoid=lambda margin: torch.sigmoid(margin).log()),
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
    return (guide_beta * (side.guide_logps - side.ref_logps) * _ratio(side)).sum(-1).detach()


def _pull_cases() -> tuple[Case, ...]:
    draw = normal(8)
    pair = {
        "chosen": _side(marks(".xxxx.", "..xxx.", "xx.xx."), draw).map(Tensor.detach),
        "rejected": _side(marks(".xx...", "..x.xx", "xxxxxx"), draw).map(Tensor.detach),
    }
    itself = {name: replace(side, logps=side.guide_logps) for name, side in pair.items()}
    return (
        Case("a policy that has moved", **pair, beta=0.1, alpha=0.5, guide_beta=0.3),
        Case("a policy that has become its guide", **itself, beta=0.5, alpha=2.0, guide_beta=0.5),
    )


def _weighted_margin(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    plain = beta * (_ratio(chosen).sum(-1) - _ratio(rejected).sum(-1))
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
    chosen_alone=lambda chosen, rejected, beta, alpha, guide_beta: alpha * beta * _along_guide(chosen, guide_beta),
    sums_multiplied=lambda chosen, rejected, beta, alpha, guide_beta: (
        alpha
        * beta
        * sum(
            guide_beta * (side.guide_logps - side.ref_logps).sum(-1) * _ratio(side).sum(-1)
            for side in (chosen, rejected)
        )
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
line_of_tgdpo = chapter.name_the_bug("line_of_tgdpo", "bug_11")
further_or_better = chapter.choose("further_or_better", "equal_kl", "guide_counts")
what_each_step_costs = chapter.open_ended("what_each_step_costs")


quiz = chapter.quiz()
