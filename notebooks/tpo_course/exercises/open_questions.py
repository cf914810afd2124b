"""Exercises of 09_open_questions.ipynb: weights of mean 1, what a state is worth, a guide that follows its policy."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case, marks, normal
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld
from tpo_lib.losses import F_FLOOR

chapter = Chapter(__file__)


# ---- softmax_weights

largest_at_16 = chapter.predict("largest_at_16", "exp")


def _lengths(mask: Tensor) -> Tensor:
    return mask.sum(-1, keepdim=True)  # (N, 1)


def _softmax_weights(r_hat: Tensor, mask: Tensor, alpha: float) -> Tensor:
    return _lengths(mask) * (alpha * r_hat).masked_fill(~mask, -torch.inf).softmax(-1)


def _weights_cases() -> tuple[Case, ...]:
    def case(words: str, size: float, alpha: float) -> Case:
        mask = marks(".xxxx.x.", "xx......")
        r_hat = torch.where(mask, size * normal(0)(*mask.shape), 0.7)  # prompt and padding hold anything
        return Case(words, r_hat=r_hat, mask=mask, alpha=alpha)

    return (
        case("responses of five tokens and of two, alpha = 2", 0.5, 2.0),
        case("a guide so sure that exp overflows", 500.0, 3.0),
    )


def _by_exp(r_hat: Tensor, mask: Tensor, alpha: float) -> Tensor:
    weights = torch.where(mask, (alpha * r_hat).exp(), 0.0)
    return weights * _lengths(mask) / weights.sum(-1, keepdim=True)


def _padding_counts(r_hat: Tensor, mask: Tensor, alpha: float) -> Tensor:
    return _lengths(mask) * torch.where(mask, (alpha * torch.where(mask, r_hat, 0.0)).softmax(-1), 0.0)


def _over_the_batch(r_hat: Tensor, mask: Tensor, alpha: float) -> Tensor:
    scores = _scores(r_hat, mask, alpha)
    return mask.sum() * scores.flatten().softmax(-1).view_as(scores)


def _centred(r_hat: Tensor, mask: Tensor, alpha: float) -> Tensor:
    middle = torch.where(mask, r_hat, 0.0).sum(-1, keepdim=True) / _lengths(mask)
    return torch.where(mask, 1 + alpha * (r_hat - middle), 0.0)


def _scores(r_hat: Tensor, mask: Tensor, alpha: float) -> Tensor:
    return (alpha * r_hat).masked_fill(~mask, -torch.inf)


def _linear(r_hat: Tensor, mask: Tensor, alpha: float) -> Tensor:
    return torch.where(mask, (1 + alpha * r_hat).clamp_min(F_FLOOR), 0.0)


softmax_weights = chapter.exercise(
    "softmax_weights",
    _softmax_weights,
    _weights_cases,
    sums_to_one=lambda **given: _softmax_weights(**given) / _lengths(given["mask"]),
    padded_length=lambda r_hat, mask, alpha: (
        r_hat.shape[-1] * (alpha * r_hat).masked_fill(~mask, -torch.inf).softmax(-1)
    ),
    no_mask=lambda r_hat, mask, alpha: r_hat.shape[-1] * (alpha * r_hat).softmax(-1),
    mask_afterwards=lambda r_hat, mask, alpha: torch.where(mask, _lengths(mask) * (alpha * r_hat).softmax(-1), 0.0),
    padding_counts=_padding_counts,
    over_the_batch=_over_the_batch,
    no_alpha=lambda **given: _softmax_weights(**given | {"alpha": 1.0}),
    rejected_side=lambda **given: _softmax_weights(**given | {"alpha": -given["alpha"]}),
    alpha_outside=lambda **given: given["alpha"] * _softmax_weights(**given | {"alpha": 1.0}),
    not_normalised=lambda r_hat, mask, alpha: torch.where(mask, (alpha * r_hat).exp(), 0.0),
    centred=_centred,
    mask_inverted=lambda r_hat, mask, alpha: _lengths(mask) * _scores(r_hat, ~mask, alpha).softmax(-1),
    zero_for_minus_infinity=lambda r_hat, mask, alpha: (
        _lengths(mask) * torch.where(mask, alpha * r_hat, 0.0).softmax(-1)
    ),
    over_columns=(
        lambda r_hat, mask, alpha: _lengths(mask) * _scores(r_hat, mask, alpha).softmax(0),
        lambda r_hat, mask, alpha: _lengths(mask) * _scores(r_hat, mask, alpha).softmax(0).nan_to_num(),
    ),
    mean_length=lambda r_hat, mask, alpha: (
        _lengths(mask).double().mean() * _softmax_weights(r_hat, mask, alpha) / _lengths(mask)
    ),
    all_tokens=lambda r_hat, mask, alpha: mask.sum() * _softmax_weights(r_hat, mask, alpha) / _lengths(mask),
    divided=lambda r_hat, mask, alpha: _softmax_weights(r_hat, mask, alpha) / _lengths(mask) ** 2,
    added_to_one=lambda r_hat, mask, alpha: torch.where(
        mask, 1 + _softmax_weights(r_hat, mask, alpha) / _lengths(mask), 0.0
    ),
    logarithm=lambda r_hat, mask, alpha: _lengths(mask) * _scores(r_hat, mask, alpha).log_softmax(-1),
    linear=(
        _linear,
        lambda **given: _linear(**given) * _lengths(given["mask"]) / _linear(**given).sum(-1, keepdim=True),
    ),
    overflow=_by_exp,
)


# ---- one f, both orders, the natural split, and the states of the data

F_CHANGES = {
    "other_sign": ("h.beta * f * (pi", "h.beta * (2 - f) * (pi"),
    "any_table": ("= shaping(w, h)", "= w.random_policy(7).exp() + 0.1"),
    "start_value": (" - soft.v[w.responses.prompt]", ""),
    "exponential": ("= shaping(w, h)", "= (h.alpha * token_reward(w, h)).exp()"),
    "best_policy": ("optimum_without_delta(w, h.beta * f)", "w.soft_optimum(h.beta)"),
}


def _world() -> TokenWorld:
    return TokenWorld(vocab_size=4, horizon=3, seed=0, num_prompts=2)


one_f_notices = chapter.break_it(
    "one_f_notices", "tgdpo.telescopes_without_delta", _world, F_CHANGES, beta=0.5, alpha=0.2, guide_beta=1.0
)

turned_round = chapter.complete(
    "turned_round",
    "plus",
    "turned",
    "outweighs",
    sides_subtract=("minus", None, None),
    all_turns=(None, "all_turns", None),
    pull_turns=(None, "pull_turns", None),
    nothing_turns=(None, "nothing_turns", None),
    only_positive=(None, None, "positive"),
    labels_lead=(None, None, "labels_lead"),
)
both_orders = chapter.predict("both_orders", 24, within=0.15, none=0, half=12)
random_splits = chapter.predict("random_splits", "none")
natural_in_steps = chapter.order(
    "natural_in_steps",
    "pay",
    "ratio",
    "exponent",
    "z_is_one",
    "state",
    "everywhere",
    ratio_first=("ratio", "pay"),
    exponent_first=("exponent", "ratio"),
    z_by_itself=("z_is_one", "exponent"),
    zero_by_itself=("state", "z_is_one"),
    all_states_first=("everywhere", "state"),
)
promises = chapter.predict("promises", "+")


# ---- state_worth


def _state_worth(logits: Tensor, ref_logits: Tensor, credit: Tensor, beta: float) -> Tensor:
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logps.exp() * (credit - beta * (logps - ref_logps))).sum(-1)


def _worth_cases() -> tuple[Case, ...]:
    draw = normal(1)
    tables = {name: draw(3, 5) for name in ("logits", "ref_logits", "credit")}
    sure = tables | {"logits": tables["logits"] - torch.tensor([0.0, 800.0, 0.0, 0.0, 0.0])}
    return (
        Case("three states, beta = 0.3", **tables, beta=0.3),
        Case("a token whose probability rounds to 0", **sure, beta=2.0),
    )


def _by_logs(logps: Tensor, ref_logps: Tensor, credit: Tensor, beta: float) -> Tensor:
    return (logps.exp() * (credit - beta * (logps - ref_logps))).sum(-1)


def _forward(logits: Tensor, ref_logits: Tensor, credit: Tensor, beta: float) -> Tensor:
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logps.exp() * credit).sum(-1) - beta * (ref_logps.exp() * (ref_logps - logps)).sum(-1)


def _expected_credit(logits: Tensor, credit: Tensor) -> Tensor:
    return (logits.softmax(-1) * credit).sum(-1)


def _kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return -_state_worth(logits, ref_logits, torch.zeros_like(logits), 1.0)


def _log_ratio(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return logits.log_softmax(-1) - ref_logits.log_softmax(-1)


state_worth = chapter.exercise(
    "state_worth",
    _state_worth,
    _worth_cases,
    forward_kl=_forward,
    no_beta=lambda **given: _state_worth(**given | {"beta": 1.0}),
    no_kl=lambda logits, ref_logits, credit, beta: _expected_credit(logits, credit),
    kl_is_paid=lambda **given: _state_worth(**given | {"beta": -given["beta"]}),
    under_the_reference=lambda logits, ref_logits, credit, beta: (
        _expected_credit(ref_logits, credit) - beta * _kl(logits, ref_logits)
    ),
    likeliest_token=lambda logits, ref_logits, credit, beta: (
        credit.gather(-1, logits.argmax(-1, keepdim=True))[:, 0] - beta * _kl(logits, ref_logits)
    ),
    mean_credit=lambda logits, ref_logits, credit, beta: credit.mean(-1) - beta * _kl(logits, ref_logits),
    added_up=lambda logits, ref_logits, credit, beta: credit.sum(-1) - beta * _kl(logits, ref_logits),
    mean_for_sum=lambda **given: _state_worth(**given) / given["logits"].shape[-1],
    beta_on_both=lambda logits, ref_logits, credit, beta: beta * _state_worth(logits, ref_logits, credit, 1.0),
    divided_by_beta=lambda **given: _state_worth(**given) / given["beta"],
    ratio_not_weighted=lambda logits, ref_logits, credit, beta: (
        _expected_credit(logits, credit) - beta * _log_ratio(logits, ref_logits).sum(-1)
    ),
    reference_averages=lambda logits, ref_logits, credit, beta: (
        ref_logits.softmax(-1) * (credit - beta * _log_ratio(logits, ref_logits))
    ).sum(-1),
    no_credit=lambda logits, ref_logits, credit, beta: -beta * _kl(logits, ref_logits),
    best_policy=lambda logits, ref_logits, credit, beta: (
        beta * (ref_logits.log_softmax(-1) + credit / beta).logsumexp(-1)
    ),
    over_all_states=(
        lambda logits, ref_logits, credit, beta: (
            _expected_credit(logits, credit) - beta * _kl(logits, ref_logits).mean()
        ),
        lambda logits, ref_logits, credit, beta: (
            _expected_credit(logits, credit) - beta * _kl(logits, ref_logits).mean() / logits.shape[-1]
        ),
    ),
    logits_for_logps=lambda logits, ref_logits, credit, beta: (
        logits.softmax(-1) * (credit - beta * (logits - ref_logits))
    ).sum(-1),
    log_of_softmax=lambda logits, ref_logits, credit, beta: _by_logs(
        logits.softmax(-1).log(), ref_logits.softmax(-1).log(), credit, beta
    ),
)


# ---- averaged


def _averaged(average: list[Tensor], policy: list[Tensor], decay: float, updates: int) -> list[Tensor]:
    keep = decay**updates
    return [keep * mine + (1 - keep) * theirs for mine, theirs in zip(average, policy, strict=True)]


def _average_cases() -> tuple[Case, ...]:
    draw = normal(2)

    def case(words: str, decay: float, updates: int) -> Case:
        models = {name: [draw(2, 3), draw(4)] for name in ("average", "policy")}
        return Case(words, **models, decay=decay, updates=updates)

    return (
        case("after one update, decay = 0.9", 0.9, 1),
        case("after three updates, decay = 0.5", 0.5, 3),
        case("decay = 0: the guide is the policy", 0.0, 1),
    )


def _shares(of: Callable[[float, int], tuple[float, float]]) -> Callable[..., list[Tensor]]:
    """The guide's and the policy's shares, from the decay and the number of updates, as an answer."""

    def answer(average: list[Tensor], policy: list[Tensor], decay: float, updates: int) -> list[Tensor]:
        keep, take = of(decay, updates)
        return [keep * mine + take * theirs for mine, theirs in zip(average, policy, strict=True)]

    return answer


averaged = chapter.exercise(
    "averaged",
    _averaged,
    _average_cases,
    swapped=lambda average, policy, **given: _averaged(policy, average, **given),
    one_update=lambda **given: _averaged(**given | {"updates": 1}),
    times_updates=lambda **given: _averaged(**given | {"decay": given["decay"] * given["updates"], "updates": 1}),
    weights_do_not_sum=lambda average, policy, decay, updates: [
        decay**updates * mine + theirs for mine, theirs in zip(average, policy, strict=True)
    ],
    plain_mean=lambda average, policy, decay, updates: [
        (mine + theirs) / 2 for mine, theirs in zip(average, policy, strict=True)
    ],
    forgets_itself=lambda average, policy, decay, updates: [(1 - decay**updates) * theirs for theirs in policy],
    corrected=lambda average, policy, decay, updates: [
        each / (1 - decay**updates) for each in _averaged(average, policy, decay, updates)
    ],
    stays=lambda average, policy, decay, updates: average,
    follows_at_once=lambda average, policy, decay, updates: policy,
    power_of_the_rest=_shares(lambda d, k: (1 - (1 - d) ** k, (1 - d) ** k)),
    one_power=(
        _shares(lambda d, k: (d**k, 1 - d)),
        _shares(lambda d, k: (d, (1 - d) ** k)),
        _shares(lambda d, k: (d**k, (1 - d) ** k)),
    ),
    rest_times_updates=_shares(lambda d, k: (1 - (1 - d) * k, (1 - d) * k)),
    divided=_shares(lambda d, k: (d / k, 1 - d / k)),
    one_too_many=_shares(lambda d, k: (d ** (k + 1), 1 - d ** (k + 1))),
    one_too_few=_shares(lambda d, k: (d ** (k - 1), 1 - d ** (k - 1))),
)


held_end = chapter.predict("held_end", "larger")
ends_with_one_f = chapter.predict("ends_with_one_f", "nearer")
farther_with_size = chapter.predict("farther_with_size", "farther")
across_sizes = chapter.choose("across_sizes", "within", "share")
your_variant = chapter.open_ended("your_variant")
quiz = chapter.quiz()
